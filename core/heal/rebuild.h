/* The plan of a new refcount structure: pure arithmetic over the reference map,
 * nothing is written before the plan is whole.
 */
#ifndef QR_HEAL_REBUILD_H
#define QR_HEAL_REBUILD_H

#include "base/err.h"
#include "base/vec.h"
#include "check/ownermap.h"
#include "fmt/header.h"

/* The refcount block for clusters [index * rb_entries, (index+1) * rb_entries). */
struct rb_place {
  uint64_t index;
  uint64_t host_ci;
};
DEFINE_VEC (rb_place_vec, struct rb_place);

struct rebuild_plan {
  uint64_t rt_host_ci;          /* first cluster of the new table */
  uint64_t rt_clusters;
  struct rb_place_vec blocks;   /* ascending by index */
  uint64_t end_ci;              /* clusters the file must have: > file_clusters if it grows */
  unsigned rounds;              /* how often the table was placed until it stopped growing */
};

enum rebuild_growth {
  REBUILD_FIXED,                /* the file cannot grow */
  REBUILD_GROW_IF_FULL,         /* holes first */
  REBUILD_APPEND,               /* holes may hold what nothing refers to any more: leave them */
};

/* Plan a structure that covers every cluster referenced in owners (which must
 * hold no old refcount structures) and itself, in the fewest clusters:
 *
 *   round 1  the table is sized for the highest used cluster;
 *   always   the table goes into the hole that costs the fewest extra blocks,
 *            the earliest of these; then each block into the lowest free cluster
 *            that another needed block covers; then the table is sized again.
 *            If it grew, everything is given back and placed anew.
 *
 * This ends, since each table cluster covers many more clusters than it costs.
 * Clusters at and past file_clusters are used only when none is free before it,
 * and only if growth says so.  -ENOSPC says in err how many clusters are missing.
 */
int rebuild_plan (const struct ownermap *owners, const struct geom *g,
                  uint64_t file_clusters, enum rebuild_growth growth,
                  struct rebuild_plan *plan, struct err *err);

void rebuild_plan_reset (struct rebuild_plan *plan);

#endif /* QR_HEAL_REBUILD_H */
