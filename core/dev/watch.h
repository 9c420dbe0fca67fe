/* Another device, watched: what could not be read from it is remembered.
 *
 * For reports: a disk with bad sectors, or a far one that has some, is read as far as it can be,
 * and the operator is told which bytes are missing.
 */
#ifndef QR_DEV_WATCH_H
#define QR_DEV_WATCH_H

#include "base/vec.h"
#include "dev/bdev.h"

struct unread_range {
  uint64_t off, len;            /* bytes */
};
DEFINE_VEC (unread_vec, struct unread_range);

/* More than these are counted only: the first on the disk are told. */
#define WATCH_MAX_RANGES 1000

struct watch_notes {
  struct unread_vec ranges;     /* sorted, disjoint; owned by whoever asked */
  uint64_t bytes;               /* in all, also of ranges that are not in the list */
  uint64_t unreachable;         /* reads that failed because the device was out of reach */
};

/* The same bytes as under, of which it takes its own reference; everything is passed on.  With
 * narrow, a read that fails with an error of the disk is looked at closer (by reading its parts),
 * down to sectors of 512 bytes: for devices of which the parts can be read at once (far), or that
 * lie on such.
 */
int watch_new (struct bdev *under, bool narrow, struct bdev **ret, struct err *err);

/* What was seen so far; d must be of watch_new.  -ENOMEM.  The caller resets notes->ranges. */
int watch_notes (struct bdev *d, struct watch_notes *notes, struct err *err);

#endif /* QR_DEV_WATCH_H */
