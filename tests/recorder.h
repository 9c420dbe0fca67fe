/* A device that writes down what it is asked for, and fails where it is told to.  For tests only.
 */
#ifndef QR_TESTS_RECORDER_H
#define QR_TESTS_RECORDER_H

#include "base/vec.h"
#include "dev/bdev.h"

enum recorded_op { REC_READ, REC_CACHE, REC_WRITE, REC_ZERO, REC_TRIM, REC_FLUSH, REC_RESIZE,
                   REC_EXTENTS };

struct recorded {
  enum recorded_op op;
  uint64_t off, len;            /* bytes, inside the device */
  unsigned flags;
};
DEFINE_VEC (recorded_vec, struct recorded);

/* Pass everything through to under.  Each range of a read_many, which is carried out by threads
 * and in any order, counts as one read; so does a read that fails.
 */
int recorder_new (struct bdev *under, bool far, struct bdev **ret, struct err *err);

/* What was asked for since; the caller resets it.  Forgets it. */
struct recorded_vec recorder_take (struct bdev *d);
void recorder_forget (struct bdev *d);

/* Of one kind, since the last recorder_take: requests and bytes. */
uint64_t recorder_count (struct bdev *d, enum recorded_op op);
uint64_t recorder_bytes (struct bdev *d, enum recorded_op op);

/* Is any byte in two reads?  Tells the first of them on the standard error. */
bool recorder_read_twice (struct bdev *d);

/* From now on reads that touch the range fail with that error, further to the ranges of before. */
void recorder_fail (struct bdev *d, uint64_t off, uint64_t len, int error);
void recorder_heal (struct bdev *d);    /* no more */

/* Refuse to cache, as a far device does that has much on its way; such calls are not listed. */
void recorder_refuse (struct bdev *d, bool on);

/* The next call that is to cache does this first, then it is refused; it alone. */
void recorder_refuse_after (struct bdev *d, void (*fn) (void *opaque), void *opaque);

#endif /* QR_TESTS_RECORDER_H */
