/* The report file: written beside its place under another name and then moved
 * there, so that whoever waits for it never reads half of one.  A device or a
 * pipe (/dev/stderr, a FIFO) cannot be moved: it is appended to.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "plugin/plugin.h"
#include "report.h"

static int
fail (struct err *err, const char *path, int code)
{
  return err_set (err, code, "report %s cannot be written: %s", path, strerror (code));
}

/* Write the report to fd and close it, whatever happens.  0 or -errno. */
static int
write_and_close (int fd, const struct stack *s, const struct err *failure)
{
  FILE *fp = fdopen (fd, "w");
  int r;

  if (fp == NULL) {
    r = -errno;
    close (fd);
    return r;
  }
  r = report_write_json (fp, s, failure);
  if (r == 0 && (fflush (fp) == EOF || ferror (fp)))
    r = errno ? -errno : -EIO;
  if (fclose (fp) == EOF && r == 0)
    r = -errno;
  return r;
}

static int
write_special (const char *path, const struct stack *s, const struct err *failure)
{
  /* A FIFO that nobody reads is an error (ENXIO), not a place to hang. */
  int fd = open (path, O_WRONLY | O_APPEND | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);

  if (fd == -1)
    return -errno;
  if (fcntl (fd, F_SETFL, fcntl (fd, F_GETFL) & ~O_NONBLOCK) == -1) {
    int r = -errno;

    close (fd);
    return r;
  }
  return write_and_close (fd, s, failure);
}

static int
write_regular (const char *path, const struct stack *s, const struct err *failure)
{
  CLEANUP_FREE char *tmp = NULL;
  int fd, r;

  if (asprintf (&tmp, "%s.XXXXXX", path) == -1) {
    tmp = NULL;
    return -ENOMEM;
  }
  fd = mkostemp (tmp, O_CLOEXEC);
  if (fd == -1)
    return -errno;
  r = fchmod (fd, 0644) == -1 ? -errno : 0;
  if (r < 0)
    close (fd);
  else
    r = write_and_close (fd, s, failure);
  if (r == 0 && rename (tmp, path) == -1)
    r = -errno;
  if (r < 0)
    unlink (tmp);
  return r;
}

/* What /dev/stderr leads to may well be a regular file, with other things in it.  But /dev/shm is
 * a folder like any other.
 */
static bool
is_special (const char *path)
{
  struct stat st;

  if (strncmp (path, "/dev/", 5) == 0 && strncmp (path, "/dev/shm/", 9) != 0)
    return true;
  return stat (path, &st) == 0 && !S_ISREG (st.st_mode);
}

int
report_file_write (const char *path, const struct stack *s, const struct err *failure,
                   struct err *err)
{
  int r = is_special (path) ? write_special (path, s, failure) : write_regular (path, s, failure);

  return r < 0 ? fail (err, path, -r) : 0;
}
