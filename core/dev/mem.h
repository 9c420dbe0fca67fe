/* Sparse RAM as a block device: throw-away overlays, and the tests' disks. */
#ifndef QR_DEV_MEM_H
#define QR_DEV_MEM_H

#include "dev/bdev.h"

/* A device of size bytes that reads as zeros; pages exist once written.
 * Writable; can_grow as given.  extents tells holes at page granularity.
 */
int mem_new (const char *name, uint64_t size, bool can_grow, struct bdev **ret,
             struct err *err);

/* Bytes of RAM that hold data now. */
uint64_t mem_used (struct bdev *d);

#endif /* QR_DEV_MEM_H */
