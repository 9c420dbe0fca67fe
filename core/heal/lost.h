/* Lost guest ranges: what a disk held and nothing can say any more.  They read
 * as zeros (or as EIO: lost=error), and they are listed.
 */
#ifndef QR_HEAL_LOST_H
#define QR_HEAL_LOST_H

#include "check/check.h"

/* why: a finding, or */
#define LOST_BACKING NR_FINDINGS        /* would come from a backing file that is missing */

struct lost_range {
  uint64_t guest_off, guest_len;        /* bytes */
  const char *snapshot_id, *snapshot_name;      /* NULL: the active disk; owned by struct lost */
  int why;
};
DEFINE_VEC (lost_range_vec, struct lost_range);

/* A snapshot that is gone as a whole. */
struct lost_snapshot {
  char *id, *name;              /* as far as they could be read; may be empty; owned */
  int why;                      /* a finding */
};
DEFINE_VEC (lost_snapshot_vec, struct lost_snapshot);

DEFINE_VEC (lost_name_vec, char *);

struct lost {
  struct lost_name_vec names;   /* what the ranges' names point to; owned */
  struct lost_range_vec ranges; /* once finished: sorted by disk (active first) and place, joined */
  struct lost_snapshot_vec snapshots;
  uint64_t active_bytes;        /* of the active disk, once finished */
};

void lost_init (struct lost *l);
void lost_reset (struct lost *l);

/* Add the guest ranges that c->bad takes away: of the active disk, and of every
 * snapshot whose tables are hit, as far as their sizes reach.  d: the bytes that c
 * was made from, not mended yet.  0, -ENOMEM, or a read error.
 */
int lost_collect (struct lost *l, struct bdev *d, const struct check *c, struct err *err);

/* Add one range; snapshot NULL: the active disk.  0 or -ENOMEM. */
int lost_add (struct lost *l, const struct snapshot *snapshot, uint64_t guest_off,
              uint64_t guest_len, int why);

/* Add a snapshot that is gone as a whole; id and name are copied, NULL = unknown. */
int lost_add_snapshot (struct lost *l, const char *id, const char *name, int why);

/* Sort and join; after the last addition.  May be called again after more. */
void lost_finish (struct lost *l);

#endif /* QR_HEAL_LOST_H */
