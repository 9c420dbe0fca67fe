/* Reading many ranges with a few threads, for devices whose pread blocks. */
#ifndef QR_DEV_MANY_H
#define QR_DEV_MANY_H

#include "dev/bdev.h"

/* A read_many for any device that has pread (see bdev_ops): put it into the
 * table as it is.  Ranges that touch are read at once; where reads turn out to
 * be slow, the ranges to come are announced through the device's cache.  The
 * threads are gone when it returns, so that nothing of them survives a fork.
 */
int many_read (struct bdev *d, const struct bdev_range *ranges, size_t nr,
               bdev_many_fn fn, void *opaque, struct err *err);

#endif /* QR_DEV_MANY_H */
