/* Writing refcounts: the whole structure, one block, or one value.
 *
 * Invariants: I2 (refcounts are durable before anything relies on them: the
 * stages of heal.c), I5 (blocks, then table, flush, then one write of the header
 * fields that switches to them, flush).  Every cluster written here was free in
 * the reference map a moment before: claim_free asserts it.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/endian.h"
#include "base/num.h"
#include "fmt/refbits.h"
#include "heal/heal-int.h"

static int
claim_free (struct heal *h, uint64_t ci, uint64_t n, struct err *err)
{
  bool conflict = false;
  int r = ownermap_claim (h->c->owners, ci, n, 1, &conflict, err);

  assert (r < 0 || !conflict);
  return r;
}

/* Write whole clusters, past the end of the file too if the plan says so. */
static int
write_clusters (struct heal *h, const void *buf, uint64_t host_ci, uint64_t n, struct err *err)
{
  uint64_t host_off = host_ci << h->g.cluster_bits;
  uint64_t end = host_off + (n << h->g.cluster_bits);
  int r = 0;

  if (end > bdev_size (h->d))
    r = bdev_resize (h->d, end, err);
  if (r == 0)
    r = bdev_pwrite (h->d, buf, end - host_off, host_off, 0, err);
  return r;
}

/* Fill h->buf with the refcounts of the range that block index describes. */
static void
fill_block (struct heal *h, uint64_t index)
{
  uint64_t first = index << h->g.rb_bits;

  memset (h->buf, 0, h->g.cluster_size);
  for (uint64_t i = 0; i < h->g.rb_entries; i += 32) {
    uint64_t states = ownermap_word (h->c->owners, first + i);

    for (unsigned k = 0; states; ++k, states >>= 2) {
      unsigned n = states & 3;

      if (n)
        refbits_set (h->buf, h->g.refcount_order, i + k,
                     MIN (n < 3 ? n : ownermap_get (h->c->owners, first + i + k),
                          h->g.refcount_max));
    }
  }
}

static int
write_block (struct heal *h, uint64_t index, uint64_t host_ci, struct err *err)
{
  fill_block (h, index);
  return write_clusters (h, h->buf, host_ci, 1, err);
}

/* --- the whole structure */

/* The mapping's references alone shall count: give back what the check claimed
 * for the old table and its sound blocks.
 */
static void
forget_old_structure (struct heal *h)
{
  const struct rt_state *rt = &h->c->rt;

  if (!rt->usable)
    return;
  for (uint64_t i = 0; i < rt->clusters; ++i)
    ownermap_unclaim (h->c->owners, (rt->host_off >> h->g.cluster_bits) + i);
  for (uint64_t i = 0; i < rt->nr_entries; ++i)
    if (rt->states[i] == RB_SOUND)
      ownermap_unclaim (h->c->owners, (rt->entries[i] & RTE_OFF_MASK) >> h->g.cluster_bits);
  h->c->rt.usable = false;
}

/* Refcounts above the references, which a lost table may explain: claim what is
 * missing, so that the new structure says the same.  Past the end of the file
 * there is nothing to keep, and the plan may grow into it.
 */
static int
keep_block (struct heal *h, uint64_t index, struct err *err)
{
  uint64_t first = index << h->c->geom.rb_bits;
  int r = bdev_pread_padded (h->d, h->buf, h->g.cluster_size,
                             h->c->rt.entries[index] & RTE_OFF_MASK, err);

  for (uint64_t i = 0; r == 0 && i < h->c->geom.rb_entries; ++i) {
    uint64_t stored = refbits_get (h->buf, h->c->geom.refcount_order, i);
    uint64_t refs = ownermap_get (h->c->owners, first + i);

    if (stored > refs && first + i < h->held_clusters) {
      r = ownermap_claim (h->c->owners, first + i, 1, stored - refs, NULL, err);
      h->res->leaks_kept++;
    }
  }
  return r;
}

/* Orphans that are to stay and whose refcount is lost: they get one. */
static int
keep_lost_orphans (struct heal *h, struct err *err)
{
  uint64_t stop = 0, ci;
  int r = 0;

  if (!h->c->kept || !h->c->keep_orphans)
    return 0;
  while (r == 0 && (ci = orphan_next (h->c, stop, h->held_clusters, &stop)) < h->held_clusters)
    for (; r == 0 && ci < stop; ++ci)
      if (orphan_unknown (h->c, ci) && ownermap_get (h->c->owners, ci) == 0) {
        r = ownermap_claim (h->c->owners, ci, 1, 1, NULL, err);
        h->res->leaks_kept++;
      }
  return r;
}

/* The block of refcount table entry i, if it stays in use. */
static bool
range_of_block (void *opaque, uint64_t i, struct bdev_range *range)
{
  const struct heal *h = opaque;

  *range = (struct bdev_range) { h->c->rt.entries[i] & RTE_OFF_MASK, h->g.cluster_size };
  return h->c->rt.states[i] == RB_SOUND;
}

/* An incomplete check must not free what it did not understand. */
static int
keep_refcounts (struct heal *h, struct err *err)
{
  const struct rt_state *rt = &h->c->rt;
  int r = keep_lost_orphans (h, err);
  struct ahead ahead;

  if (r < 0 || !rt->usable || !h->c->kept)
    return r;
  ahead_init (&ahead, h->d, rt->nr_entries, range_of_block, h);
  for (uint64_t i = 0; r == 0 && i < rt->nr_entries; ++i)
    if (rt->states[i] == RB_SOUND) {
      ahead_at (&ahead, i);
      r = keep_block (h, i, err);
    }
  return r;
}

static int
write_table (struct heal *h, const struct rebuild_plan *plan, struct err *err)
{
  uint64_t bytes = plan->rt_clusters << h->g.cluster_bits;
  CLEANUP_FREE uint8_t *table = calloc (1, bytes);

  if (!table)
    return err_set (err, ENOMEM, "out of memory");
  for (size_t i = 0; i < plan->blocks.len; ++i)
    store_be64 (table + plan->blocks.ptr[i].index * 8,
                plan->blocks.ptr[i].host_ci << h->g.cluster_bits);
  return write_clusters (h, table, plan->rt_host_ci, plan->rt_clusters, err);
}

/* I5.  Offset and length are 12 bytes; a new refcount width is 40 bytes further
 * on, in the same sector, and must change in the same write.
 */
static int
switch_header (struct heal *h, const struct rebuild_plan *plan, struct err *err)
{
  uint8_t fields[HEADER_OFF_REFCOUNT_ORDER + 4 - HEADER_OFF_RT];
  size_t len = 12;
  int r = 0;

  if (h->g.refcount_order != h->c->geom.refcount_order) {
    len = sizeof fields;
    r = bdev_pread (h->d, fields, len, HEADER_OFF_RT, err);
    store_be32 (fields + (HEADER_OFF_REFCOUNT_ORDER - HEADER_OFF_RT), h->g.refcount_order);
  }
  store_be64 (fields, plan->rt_host_ci << h->g.cluster_bits);
  store_be32 (fields + 8, plan->rt_clusters);
  if (r == 0)
    r = bdev_pwrite (h->d, fields, len, HEADER_OFF_RT, 0, err);
  if (r == 0)
    r = bdev_flush (h->d, err);
  return r;
}

struct placed {
  const struct heal *h;
  const struct rb_place_vec *places;
};

/* What an overlay copies around new block i. */
static bool
range_around_place (void *opaque, uint64_t i, struct bdev_range *range)
{
  const struct placed *p = opaque;
  uint64_t host_off = p->places->ptr[i].host_ci << p->h->g.cluster_bits;

  *range = (struct bdev_range) { ROUND_DOWN (host_off, COPY_GRAIN), COPY_GRAIN };
  return host_off != 0 && p->h->g.cluster_size < COPY_GRAIN;
}

static int
write_plan (struct heal *h, const struct rebuild_plan *plan, struct err *err)
{
  struct placed placed = { h, &plan->blocks };
  struct ahead ahead;
  int r = claim_free (h, plan->rt_host_ci, plan->rt_clusters, err);

  for (size_t i = 0; r == 0 && i < plan->blocks.len; ++i)
    r = claim_free (h, plan->blocks.ptr[i].host_ci, 1, err);
  ahead_init (&ahead, h->d, plan->blocks.len, range_around_place, &placed);
  for (size_t i = 0; r == 0 && i < plan->blocks.len; ++i) {
    progress_update (h->progress, "rebuilding refcounts", i, plan->blocks.len);
    ahead_at (&ahead, i);
    r = write_block (h, plan->blocks.ptr[i].index, plan->blocks.ptr[i].host_ci, err);
  }
  if (r == 0)
    r = write_table (h, plan, err);
  if (r == 0)
    r = bdev_flush (h->d, err);
  if (r == 0)
    r = switch_header (h, plan, err);
  return r;
}

/* After an incomplete check a hole may be all that is left of a lost table, and a
 * commit would make its loss final; so the new structure is appended then.
 * LIMIT: a device that cannot grow leaves no choice; there the holes are used.
 */
static enum rebuild_growth
choose_growth (const struct heal *h)
{
  if (!h->d->can_grow)
    return REBUILD_FIXED;
  return h->c->kept ? REBUILD_APPEND : REBUILD_GROW_IF_FULL;
}

int
heal_rebuild (struct heal *h, struct err *err)
{
  struct rebuild_plan plan;
  int r;

  r = keep_refcounts (h, err);
  if (r < 0)
    return r;
  forget_old_structure (h);
  r = rebuild_plan (h->c->owners, &h->g, h->file_clusters, choose_growth (h), &plan, err);
  if (r < 0)
    return r;
  r = write_plan (h, &plan, err);
  if (r == 0) {
    h->res->rebuilt = true;
    h->res->rt_host_off = plan.rt_host_ci << h->g.cluster_bits;
    h->res->rt_clusters = plan.rt_clusters;
    h->res->blocks_written = plan.blocks.len;
    h->res->rounds = plan.rounds;
  }
  rebuild_plan_reset (&plan);
  return r;
}

/* --- blocks replaced alone */

/* A free cluster whose refcount has, or is getting, a block.  A block that is
 * made for a range that needed none would cost a second one.  If the check was
 * incomplete, a cluster is free only if a sound block says so too: what nothing
 * seems to use may be all that is left of a lost table.
 */
static uint64_t
find_place (const struct heal *h, uint64_t from)
{
  const struct rt_state *rt = &h->c->rt;
  const struct ownermap *kept = h->c->kept;
  uint64_t end = MIN (h->file_clusters, rt->nr_entries << h->g.rb_bits);

  for (uint64_t ci = from; (ci = ownermap_find (h->c->owners, ci, end, false)) < end; ) {
    uint64_t index = ci >> h->g.rb_bits;

    if (rt->states[index] == RB_ABSENT || (kept && rt->states[index] != RB_SOUND))
      ci = (index + 1) << h->g.rb_bits;
    else if (kept && ownermap_get (kept, ci) > 0)
      ci = ownermap_find (kept, ci, end, false);
    else
      return ci;
  }
  return UINT64_MAX;
}

/* Where the file ends, if its refcount has a block and the file may grow. */
static uint64_t
find_place_past_end (const struct heal *h)
{
  uint64_t ci = MAX (h->file_clusters, ownermap_end (h->c->owners));
  uint64_t index = ci >> h->g.rb_bits;

  if (!h->d->can_grow || index >= h->c->rt.nr_entries || h->c->rt.states[index] == RB_ABSENT)
    return UINT64_MAX;
  return ci;
}

/* An entry whose clusters are all free needs no block: it shall be zero. */
#define NO_BLOCK 0

static void
give_back (struct heal *h, struct rb_place_vec *places)
{
  for (size_t i = 0; i < places->len; ++i)
    if (places->ptr[i].host_ci != NO_BLOCK)
      ownermap_unclaim (h->c->owners, places->ptr[i].host_ci);
  places->len = 0;
}

/* Before any place is looked for: the bad entries that can simply go. */
static int
drop_needless_entries (struct heal *h, struct rb_place_vec *places)
{
  struct rt_state *rt = &h->c->rt;

  for (uint64_t i = 0; i < rt->nr_entries; ++i) {
    uint64_t first = i << h->g.rb_bits;

    if (rt->states[i] != RB_LOST
        || ownermap_find (h->c->owners, first, first + h->g.rb_entries, true)
           < first + h->g.rb_entries)
      continue;
    rt->states[i] = RB_ABSENT;
    if (rb_place_vec_push (places, (struct rb_place) { i, NO_BLOCK }) < 0)
      return -ENOMEM;
  }
  return 0;
}

/* On failure or if it doesn't fit, the map is as before. */
static int
place_lost_blocks (struct heal *h, struct rb_place_vec *places, bool *fits, struct err *err)
{
  const struct rt_state *rt = &h->c->rt;
  uint64_t from = 0;
  int r = drop_needless_entries (h, places);

  for (uint64_t i = 0; r == 0 && i < rt->nr_entries; ++i) {
    uint64_t ci;

    if (rt->states[i] != RB_LOST)
      continue;
    ci = find_place (h, from);
    if (ci == UINT64_MAX)
      ci = find_place_past_end (h);
    else
      from = ci + 1;
    *fits = ci != UINT64_MAX;
    if (!*fits)
      break;
    r = rb_place_vec_reserve (places, 1);
    if (r == 0)
      r = claim_free (h, ci, 1, err);
    if (r == 0)
      rb_place_vec_push (places, (struct rb_place) { i, ci });
  }
  if (r == -ENOMEM)
    err_set (err, ENOMEM, "out of memory");
  if (r < 0 || !*fits)
    give_back (h, places);
  return r;
}

/* What an overlay copies around the entry that names it. */
static bool
range_around_entry (void *opaque, uint64_t i, struct bdev_range *range)
{
  const struct placed *p = opaque;
  uint64_t off = p->h->c->rt.host_off + p->places->ptr[i].index * 8;
  uint64_t before = i ? p->h->c->rt.host_off + p->places->ptr[i - 1].index * 8 : 0;

  *range = (struct bdev_range) { ROUND_DOWN (off, COPY_GRAIN), COPY_GRAIN };
  return i == 0 || ROUND_DOWN (before, COPY_GRAIN) != range->off;
}

/* New blocks and the raised values that account for them, flush, then the
 * entries that put them in force (I2, I5).
 */
static int
write_lost_blocks (struct heal *h, const struct rb_place_vec *places, struct err *err)
{
  struct placed placed = { h, places };
  struct ahead ahead;
  int r = 0;

  ahead_init (&ahead, h->d, places->len, range_around_place, &placed);
  for (size_t i = 0; r == 0 && i < places->len; ++i)
    if (places->ptr[i].host_ci != NO_BLOCK) {
      ahead_at (&ahead, i);
      r = write_block (h, places->ptr[i].index, places->ptr[i].host_ci, err);
    }
  if (r == 0)
    r = heal_values (h, HEAL_RAISE, err);
  if (r == 0)
    r = bdev_flush (h->d, err);
  ahead_init (&ahead, h->d, places->len, range_around_entry, &placed);
  for (size_t i = 0; r == 0 && i < places->len; ++i) {
    uint8_t entry[8];

    ahead_at (&ahead, i);
    store_be64 (entry, places->ptr[i].host_ci << h->g.cluster_bits);
    r = bdev_pwrite (h->d, entry, sizeof entry,
                     h->c->rt.host_off + places->ptr[i].index * 8, 0, err);
  }
  return r;
}

int
heal_replace_blocks (struct heal *h, bool *fits, struct err *err)
{
  struct rb_place_vec places = VEC_INIT;
  int r;

  *fits = true;
  r = keep_lost_orphans (h, err);
  if (r == 0)
    r = place_lost_blocks (h, &places, fits, err);
  h->res->blocks_replaced = places.len;
  if (r == 0 && *fits)
    r = write_lost_blocks (h, &places, err);
  vec_reset (&places);
  return r;
}

/* --- single values */

/* Only the 512-byte pieces in which something changed are written. */
#define PIECE 512

/* What heal_values is doing. */
struct values {
  struct heal *h;
  enum heal_direction direction;
};

static uint64_t
set_values_in_piece (struct heal *h, uint64_t first_ci, uint64_t first, uint64_t n,
                     enum heal_direction direction)
{
  uint64_t changed = 0;

  for (uint64_t i = first; i < first + n; ++i) {
    uint64_t stored = refbits_get (h->buf, h->g.refcount_order, i);
    uint64_t right = right_refcount (h, first_ci + i);

    /* Past the end of the file there is nothing to keep. */
    if (direction == HEAL_LOWER && h->c->kept && first_ci + i < h->held_clusters)
      continue;
    if (direction == HEAL_RAISE ? stored < right : stored > right) {
      refbits_set (h->buf, h->g.refcount_order, i, right);
      changed++;
    }
  }
  return changed;
}

static int
set_values_in_block (struct heal *h, uint64_t index, enum heal_direction direction,
                     uint64_t *changed, struct err *err)
{
  uint64_t host_off = h->c->rt.entries[index] & RTE_OFF_MASK;
  uint64_t per_piece = (PIECE * 8) >> h->g.refcount_order;
  int r = bdev_pread_padded (h->d, h->buf, h->g.cluster_size, host_off, err);

  for (uint64_t i = 0; r == 0 && i < h->g.rb_entries; i += per_piece) {
    uint64_t n = set_values_in_piece (h, index << h->g.rb_bits, i, per_piece, direction);
    uint64_t at = i / per_piece * PIECE;

    *changed += n;
    if (n)
      r = heal_write (h, h->buf + at, PIECE, host_off + at, err);
  }
  return r;
}

/* heal_values is between two blocks, so h->buf is free.  Will it write into block i?  That is
 * smaller than COPY_GRAIN and lies in one.
 */
static void
scout_block (void *opaque, uint64_t i)
{
  struct values *v = opaque;
  struct heal *h = v->h;
  uint64_t host_off = h->c->rt.entries[i] & RTE_OFF_MASK;
  uint64_t per_piece = (PIECE * 8) >> h->g.refcount_order;

  if (bdev_pread_padded (h->d, h->buf, h->g.cluster_size, host_off, NULL) < 0)
    return;
  for (uint64_t at = 0; at < h->g.rb_entries; at += per_piece)
    if (set_values_in_piece (h, i << h->g.rb_bits, at, per_piece, v->direction)) {
      heal_announce_write (h, host_off, h->g.cluster_size);
      return;
    }
}

static bool
range_of_values (void *opaque, uint64_t i, struct bdev_range *range)
{
  struct values *v = opaque;

  return range_of_block (v->h, i, range);
}

static bool
values_wrong (const struct heal *h, enum heal_direction direction)
{
  const struct findings *fs = &h->c->findings;

  if (direction == HEAL_RAISE)
    return findings_has (fs, FINDING_REFCOUNT_LOW) || h->res->blocks_replaced > 0;
  return findings_has (fs, FINDING_REFCOUNT_HIGH)
         || findings_has (fs, FINDING_REFCOUNT_PAST_END);
}

int
heal_values (struct heal *h, enum heal_direction direction, struct err *err)
{
  const struct rt_state *rt = &h->c->rt;
  struct values v = { h, direction };
  struct ahead ahead;
  uint64_t changed = 0;
  int r = 0;

  if (direction == HEAL_LOWER && h->c->kept)
    h->res->leaks_kept = h->c->findings.totals[FINDING_REFCOUNT_HIGH];
  if (!values_wrong (h, direction))
    return 0;
  ahead_init (&ahead, h->d, rt->nr_entries, range_of_values, &v);
  if (h->g.cluster_size < COPY_GRAIN)
    ahead.scout = scout_block;
  for (uint64_t i = 0; r == 0 && i < rt->nr_entries; ++i)
    if (rt->states[i] == RB_SOUND) {
      progress_update (h->progress, "setting refcounts", i, rt->nr_entries);
      ahead_at (&ahead, i);
      r = set_values_in_block (h, i, direction, &changed, err);
    }
  if (direction == HEAL_RAISE)
    h->res->refcounts_raised += changed;
  else
    h->res->refcounts_lowered += changed;
  return r;
}
