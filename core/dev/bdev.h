/* The block device: the one type that everything in this project is.
 *
 * A file, a piece of RAM, the guest's view of a qcow2 image that lies on
 * another block device: each is a struct bdev, and features are made by
 * stacking them (see core/stack.c).  This header is the contract; bounds,
 * reference counts and the emulation of missing operations live in bdev.c
 * and nowhere else.
 */
#ifndef QR_DEV_BDEV_H
#define QR_DEV_BDEV_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include "base/err.h"

struct bdev;

/* Flags of pwrite, zero and trim. */
enum {
  BDEV_FUA      = 1,            /* durable when the call returns */
  BDEV_MAY_TRIM = 2,            /* zero: the range may become unallocated */
  BDEV_FAST     = 4,            /* zero: fail with -ENOTSUP rather than write zeros */
};

/* Kind of an extent, as in NBD's base:allocation. */
enum {
  BDEV_HOLE = 1,                /* no space is allocated for it */
  BDEV_ZERO = 2,                /* reads as zeros */
};

/* Called for consecutive extents [off, off+len).  Return 0 to go on, 1 to stop
 * early without error, or -errno.
 */
typedef int (*bdev_extent_fn) (void *opaque, uint64_t off, uint64_t len, unsigned kind);

struct bdev_range {
  uint64_t off;                 /* bytes */
  size_t len;                   /* bytes */
};

/* Called once for each range of bdev_read_many when its bytes are there (r = 0)
 * or when they could not be read (r = -errno, why->msg says why, buf undefined).  Calls come
 * in any order and FROM SEVERAL THREADS AT ONCE; buf belongs to the device and
 * is gone when the call returns.  Return 0 to go on, or -errno to end it all.
 */
typedef int (*bdev_many_fn) (void *opaque, size_t index, const void *buf, int r,
                             const struct err *why);

/* Facts about what a device lies on that change when somebody else writes to it. */
struct bdev_identity {
  bool has_mtime;               /* false: there is no time, or it says nothing */
  struct timespec mtime;
};

/* What a device implements.  Arguments were checked by bdev.c: the range lies
 * inside the device, len > 0, the device is writable where that matters.
 * NULL = not supported: see the functions below for what then happens.
 * Everything may be called from several threads at once, except close.
 * resize stores the new d->size itself, under whatever lock orders its callers.  With
 * ahead (see bdev_grow, a permission) it never makes the device smaller.
 * zero may answer -ENOTSUP: then bdev.c writes, or passes it on with BDEV_FAST.
 * Ranges of read_many may reach past the end (see bdev_pread_padded) or be empty.
 */
struct bdev_ops {
  const char *kind;             /* "file", "mem", ... for messages */
  bool native_fua;              /* pwrite/zero/trim understand BDEV_FUA themselves */
  int (*pread) (struct bdev *, void *buf, size_t len, uint64_t off, struct err *);
  int (*read_many) (struct bdev *, const struct bdev_range *, size_t nr,
                    bdev_many_fn, void *opaque, struct err *);
  int (*pwrite) (struct bdev *, const void *buf, size_t len, uint64_t off,
                 unsigned flags, struct err *);
  int (*zero) (struct bdev *, uint64_t off, uint64_t len, unsigned flags, struct err *);
  int (*trim) (struct bdev *, uint64_t off, uint64_t len, unsigned flags, struct err *);
  int (*flush) (struct bdev *, struct err *);
  int (*resize) (struct bdev *, uint64_t size, uint64_t ahead, struct err *);
  int (*extents) (struct bdev *, uint64_t off, uint64_t len, bdev_extent_fn,
                  void *opaque, struct err *);
  int (*cache) (struct bdev *, uint64_t off, uint64_t len, struct err *);
  /* Sources only: see the functions of the same name. */
  int (*make_writable) (struct bdev *, struct err *);
  int (*identity) (struct bdev *, struct bdev_identity *, struct err *);
  /* Last reference gone: free what the device owns and its struct too; name is
   * freed by bdev.c afterwards.
   */
  void (*close) (struct bdev *);
};

/* First member of every device's own struct. */
struct bdev {
  const struct bdev_ops *ops;   /* constant after open */
  char *name;                   /* constant after open; owned; for messages */
  bool writable;                /* constant once I/O has begun */
  bool can_grow;                /* constant after open; false: size is a hard limit */
  bool far;                     /* constant after open; each read costs a journey: ask for more
                                   at once (bdev_cache, bdev_read_many) than is needed next.
                                   A device that lies on others is far if one of them is. */
  atomic_uint refs;
  _Atomic uint64_t size;        /* bytes; grows only through resize */
};

/* Called by constructors: sets the fields, refs = 1.  name is copied.
 * Returns 0 or -ENOMEM.
 */
int bdev_init (struct bdev *d, const struct bdev_ops *ops, const char *name,
               uint64_t size, bool writable, bool can_grow, struct err *err);

struct bdev *bdev_ref (struct bdev *d);         /* d may be NULL */
void bdev_unref (struct bdev *d);               /* d may be NULL; may block in close */

static inline uint64_t
bdev_size (const struct bdev *d)
{
  return atomic_load_explicit (&d->size, memory_order_acquire);
}

/* All functions below: 0 or -errno with *err filled; ranges must lie inside the
 * device (else -EINVAL: a caller's bug reported, never undefined behaviour);
 * len == 0 is a no-op; thread-safe; may block; writing a read-only device is
 * -EROFS.
 */

/* Read exactly len bytes.  buf is undefined after an error. */
int bdev_pread (struct bdev *d, void *buf, size_t len, uint64_t off, struct err *err);

/* Like bdev_pread, but bytes past the end of the device read as zeros, as QEMU
 * does for the last, partial cluster of an image file.
 */
int bdev_pread_padded (struct bdev *d, void *buf, size_t len, uint64_t off, struct err *err);

/* Read many ranges, with as many in flight as the device likes (threads on a
 * file, pipelined requests on a network; a few MiB of buffers).  Ranges may reach past the end: those bytes read as zeros.  Returns when
 * every callback has returned.  A range that cannot be read is told to the
 * callback and is no error of the whole; the first -errno that a callback
 * returns is.
 */
int bdev_read_many (struct bdev *d, const struct bdev_range *ranges, size_t nr,
                    bdev_many_fn fn, void *opaque, struct err *err);

int bdev_pwrite (struct bdev *d, const void *buf, size_t len, uint64_t off,
                 unsigned flags, struct err *err);

/* Make the range read as zeros.  Without ops->zero: written, or -ENOTSUP with BDEV_FAST. */
int bdev_zero (struct bdev *d, uint64_t off, uint64_t len, unsigned flags, struct err *err);

/* The range's contents no longer matter.  Without ops->trim: does nothing. */
int bdev_trim (struct bdev *d, uint64_t off, uint64_t len, unsigned flags, struct err *err);

/* Everything that completed before the call is durable when it returns. */
int bdev_flush (struct bdev *d, struct err *err);

/* Change the size; a grown part reads as zeros.  -ENOSPC if !can_grow and larger. */
int bdev_resize (struct bdev *d, uint64_t size, struct err *err);

/* Make it no smaller than size, for somebody who will soon want more: what the device
 * lies on may be made as much as ahead bytes longer, so that the next calls find it long
 * enough.  Nothing of that shows in bdev_size, and it still reads as zeros when size gets
 * there.  Closing the device takes it back if it can; a crash leaves it, as a hole at the
 * end.  Those who grow one device take turns.  Errors as above.
 */
int bdev_grow (struct bdev *d, uint64_t size, uint64_t ahead, struct err *err);

/* Tell the extents of a range in order.  Without ops->extents: one data extent. */
int bdev_extents (struct bdev *d, uint64_t off, uint64_t len, bdev_extent_fn fn,
                  void *opaque, struct err *err);

/* Hint that the range will be read soon.  Without ops->cache: does nothing.  On a far
 * device it returns before the bytes are there; -EAGAIN: it has too much on its way now for all of
 * it.
 */
int bdev_cache (struct bdev *d, uint64_t off, uint64_t len, struct err *err);

/* Turn a source that was opened read-only into a writable one, so that nobody else can begin
 * to write in between.  No I/O may be under way.  On failure it is as before: -EAGAIN another
 * program uses it, -EACCES, -EROFS, -EPERM it is not writable; without ops->make_writable
 * -EROFS.
 */
int bdev_make_writable (struct bdev *d, struct err *err);

/* Without ops->identity: nothing is known. */
int bdev_identity (struct bdev *d, struct bdev_identity *id, struct err *err);

#endif /* QR_DEV_BDEV_H */
