/* A device far away, and a clock that counts journeys.  For tests only.
 */
#ifndef QR_TESTS_JOURNEYS_H
#define QR_TESTS_JOURNEYS_H

#include "dev/bdev.h"

/* Pass everything through to under, and count the journeys that a single thread would have
 * waited for: a read, or a question about extents, is one; of ranges that are asked for at once 64
 * go together.  Bytes announced with bdev_cache are there one journey later (64 announcements
 * go together as well) and cost whoever comes then nothing; the last 32 MiB of them are kept.
 * Writes cost nothing.
 */
int journeys_new (struct bdev *under, struct bdev **ret, struct err *err);

/* Made so far.  With reads in several threads, too many are counted. */
uint64_t journeys_made (struct bdev *d);

/* Forget what was announced, and count from 0 again. */
void journeys_reset (struct bdev *d);

#endif /* QR_TESTS_JOURNEYS_H */
