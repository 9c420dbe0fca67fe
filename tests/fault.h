/* A block device that fails on purpose, and one whose power can be cut.
 * For tests only; lies on any bdev.
 */
#ifndef QR_TESTS_FAULT_H
#define QR_TESTS_FAULT_H

#include "dev/bdev.h"

enum fault_kind {
  FAULT_ONCE,                   /* operation n fails with EIO, later ones work */
  FAULT_STICKY,                 /* operation n and all that follow fail */
};

/* Pass everything through to under, except that the nth operation that changes
 * or flushes the device (pwrite, zero, trim, flush, resize; counted from 1)
 * fails with -EIO.  n = 0: none.  Reads are not counted.
 */
int fault_new (struct bdev *under, unsigned n, enum fault_kind kind,
               struct bdev **ret, struct err *err);
bool fault_fired (struct bdev *d);      /* did it happen? */
unsigned fault_count (struct bdev *d);  /* operations seen so far */

/* Pass everything through, and record every change since the last flush that
 * completed, so that states in which a power cut could leave the disk can be
 * made.  crash_now builds one such state as a new mem device: the flushed
 * state plus some of the changes since, each dropped or applied, in random order, each write
 * possibly torn at 512-byte sectors, chosen by seed (seed 0: all dropped, seed
 * 1: all applied).  The recorder itself goes on unharmed.  A write with BDEV_FUA
 * survives alone: nothing else becomes durable with it.
 */
int crash_new (struct bdev *under, struct bdev **ret, struct err *err);
int crash_now (struct bdev *d, unsigned seed, struct bdev **ret, struct err *err);

/* Called at the start of every flush and FUA, before it takes effect: the points
 * at which a cut is most interesting.  May call crash_now.  NULL = none.
 */
void crash_set_hook (struct bdev *d, void (*fn) (void *opaque), void *opaque);

/* A device in RAM with the bytes, size and can_grow of src; holes stay holes. */
int mem_copy_of (struct bdev *src, struct bdev **ret, struct err *err);

#endif /* QR_TESTS_FAULT_H */
