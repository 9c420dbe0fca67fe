/* Slices of another device, one after the other, as one read-only device. */
#ifndef QR_DEV_CONCAT_H
#define QR_DEV_CONCAT_H

#include "base/vec.h"
#include "dev/bdev.h"

struct slice_of {
  uint64_t off, len;            /* bytes of the other device; len > 0 */
};
DEFINE_VEC (slice_of_vec, struct slice_of);

/* Slices may lie in any order and overlap, but inside under; together at most
 * INT64_MAX bytes.  Takes a reference of under, and what slices holds: it is
 * empty afterwards, also on failure.
 */
int concat_new (const char *name, struct bdev *under, struct slice_of_vec *slices,
                struct bdev **ret, struct err *err);

#endif /* QR_DEV_CONCAT_H */
