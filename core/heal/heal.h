/* Healing: findings -> ordered writes on a block device (the healed bytes: an
 * overlay over the damaged image; or, in place, the image itself).
 */
#ifndef QR_HEAL_HEAL_H
#define QR_HEAL_HEAL_H

#include "check/check.h"
#include "heal/lost.h"

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
  /* Level all. */
  uint64_t structures;          /* header fields, extensions, snapshot table, bitmaps mended */
  uint64_t entries_cleared;     /* L1 and L2 entries that could not be right */
  uint64_t entries_corrected;   /* of which the rest could be believed */
  uint64_t clusters_split;      /* guest clusters given a host cluster of their own */
  uint64_t clusters_unsplit;    /* left shared: encrypted, or no space */
  unsigned rounds_all;          /* how often it was checked and mended */
};

/* Mend what level allows of c's findings on d, the bytes that c was made from.
 * Stages with a flush between each (I2, I3, I5); stopped anywhere, the next
 * check and heal finish the job (I6).  Nothing is written if the plan fails:
 * -ENOSPC says how many clusters are missing.  Does not touch the dirty and
 * corrupt bits: see heal_finish.  res is added to.  c->owners is brought up to date with what is
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

/* Level all, before heal_run: mend what cannot be right in the mapping, the header and
 * the other tables, check again, and go on until nothing is left that this
 * level mends (or a bounded number of rounds).  *c is the check of d, and is
 * replaced by the last one, with the caller's options; lost is added to.  res is
 * added to.  The order of writes makes no promise to a crash beyond I6: d must be an overlay.
 */
int heal_all (struct bdev *d, struct check **c, const struct check_options *copts,
              struct heal_result *res, struct lost *lost, struct err *err);

/* Would heal_all do anything? */
bool heal_all_needed (const struct check *c);

/* Level all, after heal_finish: give guest clusters that share a host cluster one
 * each, where that can be done (res->clusters_split, clusters_unsplit).  *c is the check of d,
 * and is replaced by a newer one if anything was written.  Having no room is no
 * error, since sharing harms nobody before a write.  d must be an overlay that stays.
 */
int heal_split (struct bdev *d, struct check **c, const struct check_options *copts,
                struct heal_result *res, struct err *err);

/* Would heal_run, heal_finish, heal_all or heal_split write anything? */
bool heal_needed (const struct check *c, enum repair_level level);

#endif /* QR_HEAL_HEAL_H */
