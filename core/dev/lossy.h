/* A disk some ranges of which are lost: reading one is an I/O error, until
 * somebody writes there.
 *
 * A copy that must not pass for a whole one is made from such a device: tools that
 * copy stop, or (ddrescue) go around what is not there, instead of taking
 * zeros for data.
 */
#ifndef QR_DEV_LOSSY_H
#define QR_DEV_LOSSY_H

#include "dev/bdev.h"

/* Bytes; [off, off + len). */
struct lossy_range {
  uint64_t off, len;
};

/* d, with nr ranges lost; in any order, they may overlap, empty ones and parts
 * past the end of d are left out.  A read that touches a lost byte is -EIO, as a
 * whole, and says which range it was.  A write, zero or trim that succeeds makes
 * the bytes that it covers readable, and no others.  Lost bytes are told as data
 * by bdev_extents, so that whoever copies meets the error.  Everything else is d's own.
 *
 * Takes a reference to d and copies ranges.  Thread-safe as every device.  As long
 * as nothing lost is near, a request takes no lock.
 */
int lossy_new (struct bdev *d, const struct lossy_range *ranges, size_t nr,
               struct bdev **ret, struct err *err);

#endif /* QR_DEV_LOSSY_H */
