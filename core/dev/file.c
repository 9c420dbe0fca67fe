/* Regular files and Linux block devices: see file.h.
 *
 * One descriptor holds QEMU's image locks for the life of the device; it also
 * does the I/O, unless the device was made writable later, when a second one
 * does (the locks could not move to it without an instant in which they are
 * nobody's).
 *
 * Errors of the disk: once fdatasync has failed, every later flush fails.  The
 * kernel reports a lost write only once and then takes the pages for clean, so
 * a second fdatasync that succeeds says nothing about them.  Flushes go one
 * after the other, since of two at once only one would be told.
 *
 * A file that grows for bdev_grow is made longer than its device: from d.size to
 * length there is nothing but a hole, since nobody writes past d.size.  Closing the
 * device cuts it off.  To whoever looks on without a lock (FILE_NO_LOCK) the file then
 * becomes shorter: bytes that are gone read as zeros, which they were.  Others may have cut off
 * more than that, so he is told.
 *
 * What a file system or disk cannot do (punch holes, write zeros by itself,
 * discard) is found out by trying and remembered for each device.
 *
 * Deliberately not here: O_DIRECT (the caller may use any alignment), watching
 * the size of a file that others change, native FUA (a synchronous write can
 * fail for the sake of other writes, which would have to be told apart).
 *
 * Invariants: I1; a device opened read-only has no descriptor that can write.
 */
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "base/num.h"
#include "dev/file.h"
#include "dev/imglock.h"
#include "dev/many.h"

struct file {
  struct bdev d;
  /* constant once I/O has begun */
  int fd;                       /* for I/O */
  int lock_fd;                  /* holds the locks; may be the same */
  bool locked;                  /* not FILE_NO_LOCK */
  bool is_block;
  atomic_bool told_shorter;     /* without a lock: the file ends before d.size */
  unsigned sector;              /* block device: bytes of a logical sector; else 1 */
  /* What was found to be unsupported. */
  atomic_bool no_punch, no_zero_range, no_discard, no_seek;
  pthread_mutex_t resize_lock;
  /* protected by resize_lock */
  uint64_t length;              /* of the file; at least d.size */
  bool no_ahead;                /* there was no room for it */
  /* Each flush that begins raises nr_flushes; flush_error under flush_lock. */
  pthread_mutex_t flush_lock;
  _Atomic uint64_t nr_flushes;
  int flush_error;              /* positive errno of the first that failed */
};

/* A file that must not be longer is as full as a disk. */
static int
told_as (int errnum)
{
  return errnum == EFBIG ? ENOSPC : errnum;
}

static int
io_error (struct file *f, int errnum, const char *what, uint64_t len, uint64_t off,
          struct err *err)
{
  return err_set (err, told_as (errnum), "%s: %s of %llu bytes at byte %llu: %s", f->d.name, what,
                  (unsigned long long) len, (unsigned long long) off, strerror (errnum));
}

static int
read_gone (struct file *f, void *buf, size_t len, uint64_t off)
{
  if (!atomic_exchange (&f->told_shorter, true))
    log_notice ("%s: it has become shorter since it was opened: it had %llu bytes and ends at byte %llu or "
                "before.  What is gone reads as zeros", f->d.name,
                (unsigned long long) bdev_size (&f->d), (unsigned long long) off);
  memset (buf, 0, len);
  return 0;
}

static int
file_pread (struct bdev *d, void *buf, size_t len, uint64_t off, struct err *err)
{
  struct file *f = (struct file *) d;
  uint8_t *p = buf;

  while (len > 0) {
    ssize_t n = pread (f->fd, p, len, off);

    if (n < 0 && errno == EINTR)
      continue;
    if (n < 0)
      return io_error (f, errno, "read", len, off, err);
    if (n == 0 && !f->locked)
      return read_gone (f, p, len, off);
    if (n == 0)
      return err_set (err, EIO, "%s: the file ends at byte %llu, it was %llu bytes long "
                      "when it was opened", d->name, (unsigned long long) off,
                      (unsigned long long) bdev_size (d));
    p += n;
    off += n;
    len -= n;
  }
  return 0;
}

static int
file_pwrite (struct bdev *d, const void *buf, size_t len, uint64_t off,
             unsigned flags, struct err *err)
{
  struct file *f = (struct file *) d;
  const uint8_t *p = buf;

  while (len > 0) {
    ssize_t n = pwrite (f->fd, p, len, off);

    if (n < 0 && errno == EINTR)
      continue;
    if (n <= 0)
      return io_error (f, n < 0 ? errno : EIO, "write", len, off, err);
    p += n;
    off += n;
    len -= n;
  }
  return 0;
}

static int
file_flush (struct bdev *d, struct err *err)
{
  struct file *f = (struct file *) d;
  uint64_t seen = atomic_load (&f->nr_flushes);

  LOCK_SCOPE (&f->flush_lock);
  /* Did one begin after we were called, and so end while we queued? */
  if (f->flush_error == 0 && atomic_load (&f->nr_flushes) == seen) {
    atomic_fetch_add (&f->nr_flushes, 1);
    while (fdatasync (f->fd) < 0)
      if (errno != EINTR) {
        f->flush_error = errno;
        break;
      }
  }
  if (f->flush_error == 0)
    return 0;
  return err_set (err, f->flush_error, "%s: flush: %s; what was written since the last good "
                  "flush may be lost, so that no later flush can succeed",
                  d->name, strerror (f->flush_error));
}

static bool
is_unsupported (int errnum)
{
  return errnum == EOPNOTSUPP || errnum == ENOSYS || errnum == ENOTTY || errnum == ENODEV;
}

/* 0 or -errno.  -ENOTSUP: *unsupported is set, and this is not tried again. */
static int
try_fallocate (struct file *f, int mode, uint64_t off, uint64_t len, atomic_bool *unsupported)
{
  if (atomic_load (unsupported))
    return -ENOTSUP;
  while (fallocate (f->fd, mode | FALLOC_FL_KEEP_SIZE, off, len) < 0) {
    if (errno == EINTR)
      continue;
    if (!is_unsupported (errno))
      return -errno;
    log_debug ("%s: fallocate mode %d is not supported", f->d.name, mode);
    atomic_store (unsupported, true);
    return -ENOTSUP;
  }
  return 0;
}

/* The part of a range that consists of whole sectors; *len = 0 if none. */
static void
whole_sectors (struct file *f, uint64_t *off, uint64_t *len)
{
  uint64_t from = ROUND_UP (*off, f->sector), to = ROUND_DOWN (*off + *len, f->sector);

  *off = from;
  *len = to > from ? to - from : 0;
}

/* Zero whole sectors without writing from here. */
static int
zero_sectors (struct file *f, uint64_t off, uint64_t len, unsigned flags)
{
  int r = -ENOTSUP;

  /* On a block device this one never falls back to writing. */
  if (flags & BDEV_MAY_TRIM)
    r = try_fallocate (f, FALLOC_FL_PUNCH_HOLE, off, len, &f->no_punch);
  /* On a block device this one may, in the kernel. */
  if (r == -ENOTSUP && !(f->is_block && (flags & BDEV_FAST)))
    r = try_fallocate (f, FALLOC_FL_ZERO_RANGE, off, len, &f->no_zero_range);
  return r;
}

static int
file_zero (struct bdev *d, uint64_t off, uint64_t len, unsigned flags, struct err *err)
{
  static const uint8_t zeros[4096];
  struct file *f = (struct file *) d;
  uint64_t from = off, middle = len, end = off + len;
  int r;

  whole_sectors (f, &from, &middle);
  if (middle == 0 && len > sizeof zeros)
    return -ENOTSUP;            /* giant sectors: let it be written */
  if (middle == 0)
    return file_pwrite (d, zeros, len, off, 0, err);
  if (from - off > sizeof zeros || end - (from + middle) > sizeof zeros)
    return -ENOTSUP;
  r = zero_sectors (f, from, middle, flags);
  if (r == -ENOTSUP)
    return r;
  if (r < 0)
    return io_error (f, -r, "zeroing", middle, from, err);
  r = file_pwrite (d, zeros, from - off, off, 0, err);
  if (r == 0)
    r = file_pwrite (d, zeros, end - (from + middle), from + middle, 0, err);
  return r;
}

static int
discard (struct file *f, uint64_t off, uint64_t len)
{
  uint64_t range[2] = { off, len };

  if (atomic_load (&f->no_discard))
    return -ENOTSUP;
  while (ioctl (f->fd, BLKDISCARD, range) < 0) {
    if (errno == EINTR)
      continue;
    if (!is_unsupported (errno))
      return -errno;
    atomic_store (&f->no_discard, true);
    return -ENOTSUP;
  }
  return 0;
}

static int
file_trim (struct bdev *d, uint64_t off, uint64_t len, unsigned flags, struct err *err)
{
  struct file *f = (struct file *) d;
  int r;

  whole_sectors (f, &off, &len);
  if (len == 0)
    return 0;
  r = f->is_block ? discard (f, off, len)
                  : try_fallocate (f, FALLOC_FL_PUNCH_HOLE, off, len, &f->no_punch);
  if (r == 0 || r == -ENOTSUP)
    return 0;                   /* a wish, not a command */
  return io_error (f, -r, "trimming", len, off, err);
}

/* 0 or -errno. */
static int
set_length_locked (struct file *f, uint64_t length)
{
  if (length > INT64_MAX)
    return -EFBIG;
  while (ftruncate (f->fd, length) < 0)
    if (errno != EINTR)
      return -errno;
  f->length = length;
  return 0;
}

/* Make the file long enough for size, and longer if that can be had. */
static int
grow_ahead_locked (struct file *f, uint64_t size, uint64_t ahead)
{
  struct rlimit limit;

  if (size <= f->length)
    return 0;
  ahead = MIN (ahead, INT64_MAX - size);
  /* Going beyond that one is not an error but the end of the process. */
  if (getrlimit (RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY)
    ahead = limit.rlim_cur > size ? MIN (ahead, limit.rlim_cur - size) : 0;
  if (!f->no_ahead && set_length_locked (f, size + ahead) == 0)
    return 0;
  f->no_ahead = true;
  return set_length_locked (f, size);
}

static int
file_resize (struct bdev *d, uint64_t size, uint64_t ahead, struct err *err)
{
  struct file *f = (struct file *) d;
  uint64_t old;
  int r;

  if (f->is_block)
    return err_set (err, ENOTSUP, "%s: a block device cannot be resized", d->name);
  if (size > INT64_MAX)
    return err_set (err, EFBIG, "%s: %llu bytes are too many for a file", d->name,
                    (unsigned long long) size);
  LOCK_SCOPE (&f->resize_lock);
  old = bdev_size (d);
  if (ahead > 0 && size <= old)         /* somebody else was quicker */
    return 0;
  if (size < old)               /* no new request may reach for what is going away */
    atomic_store (&d->size, size);
  r = ahead > 0 ? grow_ahead_locked (f, size, ahead) : set_length_locked (f, size);
  if (r < 0) {
    atomic_store (&d->size, old);
    return err_set (err, told_as (-r), "%s: cannot resize from %llu to %llu bytes: %s",
                    d->name, (unsigned long long) old, (unsigned long long) size, strerror (-r));
  }
  atomic_store (&d->size, size);
  return 0;
}

/* A file that is not as long as we made it is in somebody else's hands: not ours to cut. */
static void
cut_off_what_is_ahead (struct file *f)
{
  uint64_t size = bdev_size (&f->d);
  struct stat st;

  LOCK_SCOPE (&f->resize_lock);
  if (f->length == size)
    return;
  if (fstat (f->fd, &st) < 0 || (uint64_t) st.st_size != f->length ||
      set_length_locked (f, size) < 0)
    log_debug ("%s: stays longer than its %llu bytes", f->d.name, (unsigned long long) size);
}

/* The end of the run of data or hole that begins at off, at most end. */
static int
run_at (struct file *f, uint64_t off, uint64_t end, uint64_t *run_end, unsigned *kind)
{
  off_t data = lseek (f->fd, off, SEEK_DATA), hole;

  *run_end = end;
  if (data < 0 && errno == ENXIO) {     /* nothing but a hole up to the end of the file */
    *kind = BDEV_HOLE | BDEV_ZERO;
    return 0;
  }
  if (data < 0)
    return -errno;
  if ((uint64_t) data > off) {
    *kind = BDEV_HOLE | BDEV_ZERO;
    *run_end = MIN (end, (uint64_t) data);
    return 0;
  }
  *kind = 0;
  hole = lseek (f->fd, off, SEEK_HOLE);
  if (hole < 0 && errno != ENXIO)
    return -errno;
  if (hole >= 0 && (uint64_t) hole > off)
    *run_end = MIN (end, (uint64_t) hole);
  return 0;
}

static int
file_extents (struct bdev *d, uint64_t off, uint64_t len, bdev_extent_fn fn,
              void *opaque, struct err *err)
{
  struct file *f = (struct file *) d;
  uint64_t end = off + len;

  while (off < end) {
    uint64_t run_end = end;
    unsigned kind = 0;
    int r;

    if (!atomic_load (&f->no_seek)) {
      r = run_at (f, off, end, &run_end, &kind);
      if (r == -EINVAL || is_unsupported (-r))
        atomic_store (&f->no_seek, true);
      else if (r < 0)
        return io_error (f, -r, "looking for holes", end - off, off, err);
    }
    r = fn (opaque, off, run_end - off, kind);
    if (r != 0)
      return r;
    off = run_end;
  }
  return 0;
}

static int
file_cache (struct bdev *d, uint64_t off, uint64_t len, struct err *err)
{
  struct file *f = (struct file *) d;
  int r = posix_fadvise (f->fd, off, len, POSIX_FADV_WILLNEED);

  if (r == 0 || r == EINVAL || is_unsupported (r))
    return 0;                   /* a hint */
  return io_error (f, r, "caching", len, off, err);
}

static int
file_make_writable (struct bdev *d, struct err *err)
{
  struct file *f = (struct file *) d;
  char path[64];
  int fd, r;

  if (!f->locked)
    return err_set (err, EINVAL, "%s: an image that is not locked must not be opened "
                    "for writing", d->name);
  r = imglock_take (f->lock_fd, d->name, true, err);
  if (r < 0)
    return r;
  /* The same inode, whatever the name means by now. */
  snprintf (path, sizeof path, "/proc/self/fd/%d", f->lock_fd);
  fd = open (path, O_RDWR | O_CLOEXEC | O_NOCTTY);
  if (fd < 0) {
    r = err_set (err, errno, "cannot open %s for writing: %s", d->name, strerror (errno));
    imglock_lower (f->lock_fd);
    return r;
  }
  f->fd = fd;
  d->writable = true;
  return 0;
}

static int
file_identity (struct bdev *d, struct bdev_identity *id, struct err *err)
{
  struct file *f = (struct file *) d;
  struct stat st;

  if (fstat (f->fd, &st) < 0)
    return err_set (err, errno, "%s: cannot stat: %s", d->name, strerror (errno));
  id->has_mtime = !f->is_block;
  if (id->has_mtime)
    id->mtime = st.st_mtim;
  return 0;
}

static void
file_close (struct bdev *d)
{
  struct file *f = (struct file *) d;

  cut_off_what_is_ahead (f);
  if (f->fd != f->lock_fd)
    close (f->fd);
  close (f->lock_fd);
  pthread_mutex_destroy (&f->flush_lock);
  pthread_mutex_destroy (&f->resize_lock);
  free (f);
}

static const struct bdev_ops file_ops = {
  .kind = "file",
  .pread = file_pread,
  .read_many = many_read,
  .pwrite = file_pwrite,
  .zero = file_zero,
  .trim = file_trim,
  .flush = file_flush,
  .resize = file_resize,
  .extents = file_extents,
  .cache = file_cache,
  .make_writable = file_make_writable,
  .identity = file_identity,
  .close = file_close,
};

static int
check_type (const char *path, mode_t mode, struct err *err)
{
  const char *what = S_ISDIR (mode) ? "a directory" : S_ISFIFO (mode) ? "a FIFO"
    : S_ISSOCK (mode) ? "a socket" : S_ISCHR (mode) ? "a character device"
    : S_ISREG (mode) || S_ISBLK (mode) ? NULL : "of an unknown type";

  if (what == NULL)
    return 0;
  return err_set (err, S_ISDIR (mode) ? EISDIR : EINVAL,
                  "%s: it is %s, not a regular file or a block device", path, what);
}

/* Size and sector size of what fd is open on. */
static int
probe (struct file *f, int fd, const char *path, uint64_t *size, struct err *err)
{
  struct stat st;
  int sector, r;

  if (fstat (fd, &st) < 0)
    return err_set (err, errno, "%s: cannot stat: %s", path, strerror (errno));
  r = check_type (path, st.st_mode, err);
  if (r < 0)
    return r;
  f->sector = 1;
  f->is_block = S_ISBLK (st.st_mode);
  *size = st.st_size;
  if (!f->is_block)
    return 0;
  if (ioctl (fd, BLKGETSIZE64, size) < 0)
    return err_set (err, errno, "%s: cannot find out its size: %s", path, strerror (errno));
  if (ioctl (fd, BLKSSZGET, &sector) < 0 || sector <= 0 || !is_power_of_2 (sector))
    sector = 4096;
  f->sector = sector;
  return 0;
}

/* Takes over fd, also on failure. */
static int
device_new (int fd, const char *path, unsigned flags, struct bdev **ret, struct err *err)
{
  struct file *f = calloc (1, sizeof *f);
  bool writer = flags & FILE_WRITE;
  uint64_t size = 0;
  int r;

  if (f == NULL)
    r = err_set (err, ENOMEM, "out of memory");
  else
    r = probe (f, fd, path, &size, err);
  if (r == 0 && !(flags & FILE_NO_LOCK))
    r = imglock_take (fd, path, writer, err);
  if (r == 0)
    r = bdev_init (&f->d, &file_ops, path, size, writer, !f->is_block, err);
  if (r < 0) {
    close (fd);
    free (f);
    return r;
  }
  fcntl (fd, F_SETFL, fcntl (fd, F_GETFL) & ~O_NONBLOCK);
  f->fd = f->lock_fd = fd;
  f->length = size;
  f->locked = !(flags & FILE_NO_LOCK);
  pthread_mutex_init (&f->flush_lock, NULL);
  pthread_mutex_init (&f->resize_lock, NULL);
  *ret = &f->d;
  return 0;
}

int
file_open (const char *path, unsigned flags, struct bdev **ret, struct err *err)
{
  struct stat st;
  int fd, r;

  if ((flags & FILE_WRITE) && (flags & FILE_NO_LOCK))
    return err_set (err, EINVAL, "%s: an image that is not locked must not be opened "
                    "for writing", path);
  /* Asked first, since opening alone may do something to a character device;
   * and again afterwards, since the name may mean something else by then.
   */
  if (stat (path, &st) < 0)
    return err_set (err, errno, "cannot open %s: %s", path, strerror (errno));
  r = check_type (path, st.st_mode, err);
  if (r < 0)
    return r;
  fd = open (path, (flags & FILE_WRITE ? O_RDWR : O_RDONLY) | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  if (fd < 0)
    return err_set (err, errno, "cannot open %s%s: %s", path,
                    flags & FILE_WRITE ? " for writing" : "", strerror (errno));
  return device_new (fd, path, flags, ret, err);
}

int
file_create (const char *path, struct bdev **ret, struct err *err)
{
  int fd = open (path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOCTTY, 0644), r;

  if (fd < 0)
    return err_set (err, errno, "cannot create %s: %s", path, strerror (errno));
  r = device_new (fd, path, FILE_WRITE, ret, err);
  if (r < 0)
    unlink (path);
  return r;
}

int
file_create_unnamed (const char *path, struct bdev **ret, struct err *err)
{
  CLEANUP_FREE char *copy = strdup (path);
  int fd;

  if (copy == NULL)
    return err_set (err, ENOMEM, "out of memory");
  fd = open (dirname (copy), O_TMPFILE | O_RDWR | O_CLOEXEC, 0644);
  if (fd < 0)
    return err_set (err, is_unsupported (errno) || errno == EISDIR ? ENOTSUP : errno,
                    "cannot create %s: %s", path, strerror (errno));
  return device_new (fd, path, FILE_WRITE, ret, err);
}

int
file_publish (struct bdev *d, const char *path, struct err *err)
{
  struct file *f = (struct file *) d;
  char self[64];

  snprintf (self, sizeof self, "/proc/self/fd/%d", f->fd);
  if (linkat (AT_FDCWD, self, AT_FDCWD, path, AT_SYMLINK_FOLLOW) < 0)
    return err_set (err, errno, "cannot create %s: %s", path, strerror (errno));
  return file_sync_folder (path, err);
}

int
file_copy_mode (struct bdev *d, const char *path, struct err *err)
{
  struct file *f = (struct file *) d;
  struct stat like, st;
  mode_t mode;

  if (path == NULL)
    return fchmod (f->fd, S_IRUSR | S_IWUSR) == 0 ? 0
           : err_set (err, errno, "%s: cannot set the permissions: %s", d->name, strerror (errno));
  if (stat (path, &like) < 0 || fstat (f->fd, &st) < 0)
    return err_set (err, errno, "%s: cannot stat: %s", path, strerror (errno));
  mode = st.st_mode & (like.st_mode | S_IRUSR | S_IWUSR) & 0777;
  /* What the image's group may do is not for another group. */
  if (st.st_gid != like.st_gid && fchown (f->fd, -1, like.st_gid) < 0)
    mode &= ~S_IRWXG;
  if (fchmod (f->fd, mode) < 0)
    return err_set (err, errno, "%s: cannot set the permissions: %s", d->name, strerror (errno));
  return 0;
}

int
file_sync_folder (const char *path, struct err *err)
{
  CLEANUP_FREE char *copy = strdup (path);
  int fd, errnum = 0;

  if (copy == NULL)
    return err_set (err, ENOMEM, "out of memory");
  fd = open (dirname (copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0)
    return err_set (err, errno, "cannot open the folder of %s: %s", path, strerror (errno));
  while (fsync (fd) < 0) {
    if (errno == EINTR)
      continue;
    errnum = errno == EINVAL || is_unsupported (errno) ? 0 : errno;
    break;
  }
  close (fd);
  return errnum ? err_set (err, errnum, "cannot sync the folder of %s: %s", path,
                           strerror (errnum)) : 0;
}

int
file_remove (const char *path, struct err *err)
{
  if (unlink (path) < 0 && errno != ENOENT)
    return err_set (err, errno, "cannot remove %s: %s", path, strerror (errno));
  return file_sync_folder (path, err);
}
