/* Another device, read ahead of whoever reads it from front to back. */
#ifndef QR_DEV_READAHEAD_H
#define QR_DEV_READAHEAD_H

#include "dev/bdev.h"

/* The same bytes as under, of which it takes its own reference; everything is passed on.  Reads
 * that follow each other are noticed, several streams of them at once, and what they will ask for
 * next is announced to under with bdev_cache.  For far devices, whose bdev_cache returns at once.
 * window: bytes that are announced and not read yet, of all streams together; one gets half of it at most.
 */
int readahead_new (struct bdev *under, uint64_t window, struct bdev **ret, struct err *err);

#define READAHEAD_WINDOW (UINT64_C (96) << 20)

#endif /* QR_DEV_READAHEAD_H */
