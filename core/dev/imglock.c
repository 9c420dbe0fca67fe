/* See imglock.h.  Locks are placed first and the others' looked for afterwards,
 * as QEMU does, so that of two who start at the same time at least one sees the
 * other.  Nothing ever waits for a lock.
 *
 * Deliberately not here: exclusive locks.  They would keep out QEMU's own
 * --force-share, which is how an administrator looks at an image in use.
 */
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "base/log.h"
#include "dev/imglock.h"

enum { CONSISTENT_READ = 0, WRITE = 1, RESIZE = 3 };

#define USES(perm)        (100 + (perm))
#define DENIES(perm)      (200 + (perm))

#define END_OF_LIST       (-1)

static const int reader_bytes[] = {
  USES (CONSISTENT_READ), DENIES (WRITE), DENIES (RESIZE), END_OF_LIST
};
static const int writer_more_bytes[] = { USES (WRITE), USES (RESIZE), END_OF_LIST };

/* What must be free of others' locks. */
static const int reader_tests[] = {
  USES (WRITE), USES (RESIZE), DENIES (CONSISTENT_READ), END_OF_LIST
};
static const int writer_tests[] = {
  USES (WRITE), USES (RESIZE), DENIES (CONSISTENT_READ), DENIES (WRITE), DENIES (RESIZE),
  END_OF_LIST
};

/* 0 or -errno; *l is as the kernel left it. */
static int
lock_op (int fd, int op, int type, int byte, struct flock *l)
{
  memset (l, 0, sizeof *l);     /* l_pid must be 0 */
  l->l_type = type;
  l->l_whence = SEEK_SET;
  l->l_start = byte;
  l->l_len = 1;
  while (fcntl (fd, op, l) < 0)
    if (errno != EINTR)
      return -errno;
  return 0;
}

static bool
locks_unsupported (int r)
{
  return r == -EINVAL || r == -ENOLCK || r == -ENOSYS || r == -EOPNOTSUPP;
}

static int
conflict (const char *name, int byte, const struct flock *l, struct err *err)
{
  const char *what = byte < DENIES (0) ? "has it open for writing"
    : byte == DENIES (CONSISTENT_READ) ? "has it open for itself alone"
    : "has it open and lets nobody else write to it";
  char who[40] = "";

  if (l && l->l_pid > 0)        /* unknown (-1) for open file description locks */
    snprintf (who, sizeof who, " (process %ld)", (long) l->l_pid);
  return err_set (err, EAGAIN, "%s: the image is in use: another process%s %s, most likely "
                  "a running virtual machine or qemu-nbd (`fuser -v' on the file shows it). "
                  "Stop it first; or use force-share=true to look at the image read-only "
                  "as it is now", name, who, what);
}

static int
place (int fd, const char *name, const int *byte, struct err *err)
{
  struct flock l;

  for (; *byte != END_OF_LIST; ++byte) {
    int r = lock_op (fd, F_OFD_SETLK, F_RDLCK, *byte, &l);

    if (r == -EAGAIN || r == -EACCES)
      return conflict (name, *byte, NULL, err);
    if (locks_unsupported (r))
      return r;
    if (r < 0)
      return err_set (err, -r, "%s: cannot lock byte %d: %s", name, *byte, strerror (-r));
  }
  return 0;
}

static int
test (int fd, const char *name, const int *byte, struct err *err)
{
  struct flock l;

  for (; *byte != END_OF_LIST; ++byte) {
    int r = lock_op (fd, F_OFD_GETLK, F_WRLCK, *byte, &l);

    if (locks_unsupported (r))
      return r;
    if (r < 0)
      return err_set (err, -r, "%s: cannot test the lock on byte %d: %s",
                      name, *byte, strerror (-r));
    if (l.l_type != F_UNLCK)
      return conflict (name, *byte, &l, err);
  }
  return 0;
}

int
imglock_take (int fd, const char *name, bool writer, struct err *err)
{
  int r = place (fd, name, reader_bytes, err);

  if (r == 0 && writer)
    r = place (fd, name, writer_more_bytes, err);
  if (r == 0)
    r = test (fd, name, writer ? writer_tests : reader_tests, err);
  if (locks_unsupported (r)) {
    log_debug ("%s: no image locks on this file system: %s", name, strerror (-r));
    return 0;
  }
  if (r < 0 && writer)
    imglock_lower (fd);
  return r;
}

void
imglock_lower (int fd)
{
  struct flock l;

  for (const int *byte = writer_more_bytes; *byte != END_OF_LIST; ++byte)
    lock_op (fd, F_OFD_SETLK, F_UNLCK, *byte, &l);
}
