/* Healing: findings -> ordered writes on a block device (the healed bytes: an
 * overlay over the damaged image; or, in place, the image itself).
 */
#ifndef QR_HEAL_HEAL_H
#define QR_HEAL_HEAL_H

#include "check/check.h"

/* What was done, as numbers. */
struct heal_result {
  uint64_t refcounts_raised;    /* clusters */
  uint64_t refcounts_lowered;   /* clusters */
  uint64_t copied_fixed;        /* L1 and L2 entries */
  uint64_t blocks_replaced;     /* refcount blocks replaced alone */
  bool rebuilt;                 /* the whole refcount structure was */
  uint64_t rt_host_off;         /* new table, if rebuilt */
  uint64_t rt_clusters;
  uint64_t blocks_written;      /* new refcount blocks, if rebuilt */
  unsigned rounds;
  unsigned refcount_bits;       /* new width, if the old one could not hold the counts; else 0 */
  uint64_t leaks_kept;          /* clusters left alone because the check was incomplete */
  bool dirty_cleared, corrupt_cleared;
};

/* Mend what level allows of c's findings on d, the bytes that c was made from.
 * Stages with a flush between each (I2, I3, I5); stopped anywhere, the next
 * check and heal finish the job (I6).  Nothing is written if the plan fails:
 * -ENOSPC says how many clusters are missing.  Does not touch the dirty and
 * corrupt bits: see heal_finish.  c->owners is brought up to date with what is
 * placed, so c describes the damaged image no longer where that matters.
 *
 * Clusters of old refcount structures may be overwritten before the new ones
 * are in force, so d must be an overlay, or a journal must be able to replay this.
 */
int heal_run (struct bdev *d, struct check *c, enum repair_level level,
              struct progress *progress, struct heal_result *res, struct err *err);

/* Clear the dirty bit, and the corrupt bit too if after (a check made since
 * heal_run) finds no corruption but these bits.  Last write of a healing.  after
 * is told, so that it describes the image as it is then.
 */
int heal_finish (struct bdev *d, struct check *after, struct heal_result *res,
                 struct err *err);

/* Would heal_run or heal_finish write anything? */
bool heal_needed (const struct check *c, enum repair_level level);

#endif /* QR_HEAL_HEAL_H */
