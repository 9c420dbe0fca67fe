/* See rebuild.h.
 *
 * Words used here: a "range" is the run of rb_entries clusters that one refcount
 * block describes; a range is "needed" once anything in it is used.  A cluster
 * in a needed range costs nothing more; one in any other range costs a block.
 *
 * The table comes first, since it needs a run of clusters and a block fits
 * anywhere.  Of the runs inside the file it takes the cheapest, of equally cheap ones
 * the earliest.  Within one free run, only two positions can be cheapest: its
 * start, and the start of its last range, since every range in between is wholly
 * free and hence not needed.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>

#include "base/num.h"
#include "heal/rebuild.h"

DEFINE_VEC (u64_vec, uint64_t);

struct planner {
  const struct ownermap *owners;
  const struct geom *g;
  uint64_t file_clusters;
  uint64_t hole_clusters;       /* free clusters below this may be used; 0 or file_clusters */
  uint64_t rt_ci, rt_clusters;
  struct u64_vec needed;        /* sorted: ranges used by owners, then by the table too */
  struct u64_vec opened;        /* ascending: ranges that only blocks made necessary */
  struct u64_vec places;        /* ascending within each source: clusters for the blocks */
  uint64_t end_ci;              /* the file must be this long, in clusters */
};

static uint64_t
range_of (const struct planner *p, uint64_t ci)
{
  return ci >> p->g->rb_bits;
}

static bool
range_is_used (const struct planner *p, uint64_t range)
{
  uint64_t start = range << p->g->rb_bits;
  uint64_t end = start + p->g->rb_entries;

  return ownermap_find (p->owners, start, end, true) < end;
}

static int
find_used_ranges (struct planner *p)
{
  uint64_t end = ownermap_end (p->owners);

  p->needed.len = 0;
  for (uint64_t ci = 0; (ci = ownermap_find (p->owners, ci, end, true)) < end;
       ci = (range_of (p, ci) + 1) << p->g->rb_bits)
    if (u64_vec_push (&p->needed, range_of (p, ci)) < 0)
      return -ENOMEM;
  return 0;
}

/* Blocks that putting the table at [ci, ci+n) makes necessary.  The clusters
 * are all free, so only the outermost ranges can have a user.
 */
static uint64_t
table_cost (const struct planner *p, uint64_t ci, uint64_t n)
{
  uint64_t first = range_of (p, ci), last = range_of (p, ci + n - 1);
  uint64_t cost = last - first + 1;

  cost -= range_is_used (p, first);
  if (last != first)
    cost -= range_is_used (p, last);
  return cost;
}

static void
consider (const struct planner *p, uint64_t ci, uint64_t *best_ci, uint64_t *best_cost)
{
  uint64_t cost = table_cost (p, ci, p->rt_clusters);

  if (cost < *best_cost) {
    *best_cost = cost;
    *best_ci = ci;
  }
}

/* Where the table goes: sets rt_ci and end_ci. */
static void
place_table (struct planner *p)
{
  uint64_t n = p->rt_clusters, best_cost = UINT64_MAX, start, end = 0;

  for (start = 0; best_cost != 0; start = end) {
    start = ownermap_find (p->owners, start, p->hole_clusters, false);
    if (start >= p->hole_clusters)
      break;
    end = ownermap_find (p->owners, start, p->hole_clusters, true);
    if (end - start < n)
      continue;
    consider (p, start, &p->rt_ci, &best_cost);
    if (ROUND_DOWN (end - 1, p->g->rb_entries) > start
        && end - ROUND_DOWN (end - 1, p->g->rb_entries) >= n)
      consider (p, ROUND_DOWN (end - 1, p->g->rb_entries), &p->rt_ci, &best_cost);
  }
  if (best_cost == UINT64_MAX) {
    /* No hole fits: use the free clusters at the end of the file, and grow. */
    p->rt_ci = p->hole_clusters ? MIN (ownermap_end (p->owners), p->file_clusters)
                                : p->file_clusters;
  }
  p->end_ci = MAX (p->file_clusters, p->rt_ci + n);
}

static int
compare_u64 (const void *a, const void *b)
{
  uint64_t x = *(const uint64_t *) a, y = *(const uint64_t *) b;

  return x < y ? -1 : x > y;
}

static bool
is_needed (const struct planner *p, uint64_t range)
{
  return (p->opened.len && p->opened.ptr[p->opened.len - 1] == range)
         || bsearch (&range, p->needed.ptr, p->needed.len, sizeof range, compare_u64);
}

static int
add_table_ranges (struct planner *p)
{
  uint64_t last = range_of (p, p->rt_ci + p->rt_clusters - 1);
  size_t used = p->needed.len;

  for (uint64_t range = range_of (p, p->rt_ci); range <= last; ++range)
    if (!(used && bsearch (&range, p->needed.ptr, used, sizeof range, compare_u64))
        && u64_vec_push (&p->needed, range) < 0)
      return -ENOMEM;
  if (p->needed.len)
    qsort (p->needed.ptr, p->needed.len, sizeof p->needed.ptr[0], compare_u64);
  return 0;
}

static size_t
blocks_wanted (const struct planner *p)
{
  return p->needed.len + p->opened.len;
}

/* First free cluster in [ci, end) that the table does not take; end if none. */
static uint64_t
next_free (const struct planner *p, uint64_t ci, uint64_t end)
{
  ci = ownermap_find (p->owners, ci, end, false);
  if (ci < end && ci >= p->rt_ci && ci < p->rt_ci + p->rt_clusters)
    ci = ownermap_find (p->owners, MIN (p->rt_ci + p->rt_clusters, end), end, false);
  return ci;
}

/* Use the free clusters of one range that lie inside the file. */
static int
fill_range (struct planner *p, uint64_t range)
{
  uint64_t ci = range << p->g->rb_bits;
  uint64_t end = MIN (ci + p->g->rb_entries, p->hole_clusters);

  for (; p->places.len < blocks_wanted (p); ++ci) {
    ci = next_free (p, MIN (ci, end), end);
    if (ci >= end)
      break;
    if (u64_vec_push (&p->places, ci) < 0)
      return -ENOMEM;
  }
  return 0;
}

/* Needed ranges are full: open the lowest others, each with a block of its own. */
static int
open_ranges (struct planner *p)
{
  uint64_t nr_ranges = DIV_ROUND_UP (p->hole_clusters, p->g->rb_entries);
  size_t i = 0;
  int r = 0;

  for (uint64_t range = 0; r == 0 && range < nr_ranges; ++range) {
    if (p->places.len >= blocks_wanted (p))
      break;
    while (i < p->needed.len && p->needed.ptr[i] < range)
      ++i;
    if (i < p->needed.len && p->needed.ptr[i] == range)
      continue;
    r = u64_vec_push (&p->opened, range);
    if (r == 0)
      r = fill_range (p, range);
  }
  return r;
}

/* The file is full: append. */
static int
grow (struct planner *p)
{
  int r = 0;

  while (r == 0 && p->places.len < blocks_wanted (p)) {
    if (!is_needed (p, range_of (p, p->end_ci)))
      r = u64_vec_push (&p->opened, range_of (p, p->end_ci));
    if (r == 0)
      r = u64_vec_push (&p->places, p->end_ci++);
  }
  return r;
}

static int
place_blocks (struct planner *p)
{
  int r;

  p->opened.len = p->places.len = 0;
  r = add_table_ranges (p);
  for (size_t i = 0; r == 0 && i < p->needed.len; ++i)
    r = fill_range (p, p->needed.ptr[i]);
  if (r == 0)
    r = open_ranges (p);
  if (r == 0)
    r = grow (p);
  return r;
}

static uint64_t
table_size_for (const struct planner *p)
{
  uint64_t highest = 0;

  if (p->needed.len)
    highest = p->needed.ptr[p->needed.len - 1];
  if (p->opened.len)
    highest = MAX (highest, p->opened.ptr[p->opened.len - 1]);
  return DIV_ROUND_UP ((highest + 1) * 8, p->g->cluster_size);
}

/* Give each needed range its block: the lowest place to the lowest range. */
static int
make_blocks (struct planner *p, struct rebuild_plan *plan)
{
  assert (p->places.len == blocks_wanted (p));
  for (size_t i = 0; i < p->opened.len; ++i)
    if (u64_vec_push (&p->needed, p->opened.ptr[i]) < 0)
      return -ENOMEM;
  if (p->needed.len)
    qsort (p->needed.ptr, p->needed.len, sizeof p->needed.ptr[0], compare_u64);
  if (p->places.len)
    qsort (p->places.ptr, p->places.len, sizeof p->places.ptr[0], compare_u64);
  for (size_t i = 0; i < p->places.len; ++i) {
    struct rb_place place = { p->needed.ptr[i], p->places.ptr[i] };

    if (rb_place_vec_push (&plan->blocks, place) < 0)
      return -ENOMEM;
  }
  plan->rt_host_ci = p->rt_ci;
  plan->rt_clusters = p->rt_clusters;
  plan->end_ci = p->end_ci;
  return 0;
}

/* Repeat until the table stops growing; what a round placed is given back. */
static int
find_fixpoint (struct planner *p, struct rebuild_plan *plan, struct err *err)
{
  uint64_t wanted;
  int r = find_used_ranges (p);

  if (r < 0)
    return r;
  for (wanted = table_size_for (p);; wanted = table_size_for (p)) {
    if (wanted > MAX_RT_BYTES / p->g->cluster_size && wanted > 1)
      return err_set (err, EFBIG, "the refcount table would need %llu clusters of %llu bytes, "
                      "more than the format's implementations allow (8 MiB)",
                      (unsigned long long) wanted, (unsigned long long) p->g->cluster_size);
    p->rt_clusters = wanted;
    plan->rounds++;
    r = find_used_ranges (p);
    if (r < 0)
      return r;
    place_table (p);
    r = place_blocks (p);
    if (r < 0)
      return r;
    if (table_size_for (p) <= p->rt_clusters)
      return make_blocks (p, plan);
  }
}

int
rebuild_plan (const struct ownermap *owners, const struct geom *g,
              uint64_t file_clusters, enum rebuild_growth growth,
              struct rebuild_plan *plan, struct err *err)
{
  struct planner p = {
    .owners = owners, .g = g, .file_clusters = file_clusters,
    .hole_clusters = growth == REBUILD_APPEND ? 0 : file_clusters,
  };
  int r;

  *plan = (struct rebuild_plan) { .rounds = 0 };
  r = find_fixpoint (&p, plan, err);
  if (r == -ENOMEM)
    err_set (err, ENOMEM, "out of memory while planning the refcount structures");
  if (r == 0 && growth == REBUILD_FIXED && plan->end_ci > file_clusters)
    r = err_set (err, ENOSPC, "the image has no room for new refcount structures and its "
                 "device cannot grow: %llu more clusters of %llu bytes are needed.  Nothing was "
                 "written; repair=off reads it as it is",
                 (unsigned long long) (plan->end_ci - file_clusters),
                 (unsigned long long) g->cluster_size);
  vec_reset (&p.needed);
  vec_reset (&p.opened);
  vec_reset (&p.places);
  if (r < 0)
    rebuild_plan_reset (plan);
  return r;
}

void
rebuild_plan_reset (struct rebuild_plan *plan)
{
  vec_reset (&plan->blocks);
}
