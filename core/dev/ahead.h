/* Telling a far device what a loop is going to read.
 *
 * A loop that reads one thing after the other from a device where each read costs a
 * journey (bdev.h: far) waits once for each.  Many such loops are better left as they
 * are: they write between their reads, or stop early, or what they do depends on the order.
 * They announce what comes next instead, some dozens of reads ahead, and wait once for
 * all of these.
 *
 *   ahead_init (&a, d, nr, range_of_table, h);
 *   for (i = 0; i < nr; ++i) {
 *     ahead_at (&a, i);
 *     ... read table i ...
 *
 * A write to an overlay copies what lies around it from the far device, which is a journey
 * for each write.  Only who has read a table knows whether it is going to be written to.  For that
 * there are scouts: they are called for the steps to come, when what these read has arrived,
 * and announce (ahead_hint) what the loop will touch then.
 *
 * On a device that is near all this does nothing.
 */
#ifndef QR_DEV_AHEAD_H
#define QR_DEV_AHEAD_H

#include "dev/bdev.h"

/* What step i of the loop reads; false: nothing.  The range may reach past the end of the
 * device.
 */
typedef bool (*ahead_fn) (void *opaque, uint64_t i, struct bdev_range *range);

/* What step i reads is there: read it too, and announce what the step needs beyond that.
 * Called between two steps of the loop.
 */
typedef void (*ahead_scout_fn) (void *opaque, uint64_t i);

struct ahead {
  /* constant */
  struct bdev *d;
  uint64_t nr;                  /* steps */
  ahead_fn fn;                  /* NULL: step i reads the next bytes of [off, end) */
  void *opaque;
  ahead_scout_fn scout;         /* or NULL; set it after ahead_init */
  uint64_t off, end, step;      /* bytes */
  /* changed by ahead_at */
  uint64_t announced;           /* steps before it are announced */
  uint64_t trigger;             /* the step at which more is to be announced */
};

/* A loop of nr steps that reads from d; fn and opaque as above.  Needs no cleaning up. */
void ahead_init (struct ahead *a, struct bdev *d, uint64_t nr, ahead_fn fn, void *opaque);

/* A loop that reads [off, off+len) in steps of that many bytes. */
void ahead_init_bytes (struct ahead *a, struct bdev *d, uint64_t off, uint64_t len,
                       uint64_t step);

/* The loop has come to step i.  Errors are left to show when it reads.  Where i goes back,
 * nothing is announced again.
 */
void ahead_at (struct ahead *a, uint64_t i);

/* [off, off+len), as far as it lies inside the device, will be read soon. */
void ahead_hint (struct bdev *d, uint64_t off, uint64_t len);

#endif /* QR_DEV_AHEAD_H */
