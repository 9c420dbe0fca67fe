/* Preloaded into a program: ends it by SIGKILL at its Nth attempt to change a
 * file, before anything of that attempt is done.  For tests only.
 *
 *   KILL_AT=N      count from 1; unset or 0: never
 *   KILL_MARK=FILE made when it happens, so that the end of a sweep is known
 *   KILL_ERRNO=E   do not end it: let that attempt fail with error number E, and all
 *                  that follow, as on a disk that is full or gone; but names can
 *                  be removed still
 *
 * Counted are the library calls that this program changes files by, and NBD exports.  A child
 * goes on counting where its parent was at the fork.
 */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static atomic_uint calls;

/* Must the attempt fail? */
static int
count (void)
{
  const char *at = getenv ("KILL_AT"), *mark = getenv ("KILL_MARK"), *error = getenv ("KILL_ERRNO");
  unsigned long n = at ? strtoul (at, NULL, 10) : 0, now = atomic_fetch_add (&calls, 1) + 1;

  if (!mark || n == 0 || now < n || (now > n && !error))
    return 0;
  syscall (SYS_close, syscall (SYS_openat, AT_FDCWD, mark, O_CREAT | O_WRONLY, 0600));
  if (!error)
    syscall (SYS_kill, syscall (SYS_getpid), SIGKILL);
  errno = error ? atoi (error) : 0;
  return 1;
}

#define NEXT(name) ((__typeof__ (&name)) dlsym (RTLD_NEXT, #name))

/* result name (parameters), passed on as arguments. */
#define COUNTED(result, name, parameters, arguments)    \
  result name parameters { return count () ? -1 : NEXT (name) arguments; }
#define COUNTED_REMOVAL(result, name, parameters, arguments)    \
  result name parameters { count (); return NEXT (name) arguments; }

COUNTED (ssize_t, pwrite, (int fd, const void *b, size_t n, off_t o), (fd, b, n, o))
COUNTED (ssize_t, pwrite64, (int fd, const void *b, size_t n, off64_t o), (fd, b, n, o))
COUNTED (int, fsync, (int fd), (fd))
COUNTED (int, fdatasync, (int fd), (fd))
COUNTED (int, ftruncate, (int fd, off_t n), (fd, n))
COUNTED (int, ftruncate64, (int fd, off64_t n), (fd, n))
COUNTED (int, fallocate, (int fd, int m, off_t o, off_t n), (fd, m, o, n))
COUNTED (int, fallocate64, (int fd, int m, off64_t o, off64_t n), (fd, m, o, n))
COUNTED (int, rename, (const char *a, const char *b), (a, b))
COUNTED (int, renameat2, (int d, const char *a, int e, const char *b, unsigned f), (d, a, e, b, f))
COUNTED_REMOVAL (int, unlink, (const char *a), (a))
COUNTED (int, link, (const char *a, const char *b), (a, b))
COUNTED (int, symlink, (const char *a, const char *b), (a, b))
COUNTED (int, linkat, (int d, const char *a, int e, const char *b, int f), (d, a, e, b, f))
COUNTED (int, chmod, (const char *a, mode_t m), (a, m))
COUNTED (int, fchmod, (int fd, mode_t m), (fd, m))
COUNTED (int, mkdir, (const char *a, mode_t m), (a, m))

/* A request to an NBD server to change its export, or to make changes durable: such a request
 * begins with its magic number, flags and type, and is sent in a call of its own.
 */
static int
changes_export (const unsigned char *p, size_t n)
{
  static const unsigned char magic[] = { 0x25, 0x60, 0x95, 0x13 };

  return n >= 28 && memcmp (p, magic, sizeof magic) == 0 && p[6] == 0
         && (p[7] == 1 || p[7] == 3 || p[7] == 4 || p[7] == 6);
}

ssize_t
send (int fd, const void *p, size_t n, int flags)
{
  return changes_export (p, n) && count () ? -1 : NEXT (send) (fd, p, n, flags);
}

#define COUNTED_OPEN(name)                              \
  int name (const char *path, int flags, ...)           \
  {                                                     \
    va_list args;                                       \
    mode_t mode;                                        \
                                                        \
    va_start (args, flags);                             \
    mode = flags & O_CREAT ? va_arg (args, mode_t) : 0; \
    va_end (args);                                      \
    if (flags & (O_CREAT | O_TRUNC) && count ())        \
      return -1;                                        \
    return NEXT (name) (path, flags, mode);             \
  }

COUNTED_OPEN (open)
COUNTED_OPEN (open64)
