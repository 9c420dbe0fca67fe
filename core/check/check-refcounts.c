/* The refcount table: is it usable, and which of its blocks are?
 *
 * Everything else has been claimed by now.  The refcount structures can be made
 * anew from that, so they are never believed against it: where one of them lies
 * on something else, the something else stays and the structure is displaced.
 * (Whether it is the something else that is wrong there is for level "all" to
 * act upon: see check-evidence.c.)
 *
 * The table as a whole is given up if it isn't where it could be, lies on
 * something, does not reach the used clusters, or has lost more than half of
 * the entries that are needed; that is one finding, whatever its size.
 * Otherwise each of its entries is judged, sound blocks and the table itself
 * are claimed, and the values are compared (check-compare.c).
 *
 * Deliberately not here: where new structures go (core/heal/rebuild.c).
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "check/check-int.h"

/* What an entry is worth, before it is known whether it is needed. */
enum verdict {
  ENTRY_ZERO,
  ENTRY_GOOD,
  ENTRY_BAD,                    /* misaligned, reserved bits, outside */
  ENTRY_OVERLAP,                /* on something else, or named before */
};

static uint64_t
rt_end_ci (const struct rt_state *rt, const struct geom *g)
{
  return (rt->host_off >> g->cluster_bits) + rt->clusters;
}

static int
rt_finding (struct checker *k, enum finding_id id, uint64_t found, uint64_t expected,
            struct err *err)
{
  return add_finding (k, (struct finding) {
      .id = id, .snapshot_index = FINDING_ACTIVE, .host_off = k->c->rt.host_off,
      .guest_off = FINDING_NO_OFF, .found = found, .expected = expected }, err);
}

int
rt_entry_finding (struct checker *k, enum finding_id id, uint64_t i, struct err *err)
{
  unsigned bits = k->g->rb_bits + k->g->cluster_bits;   /* at most 45 */
  bool fits = i <= UINT64_MAX >> bits;

  return add_finding (k, (struct finding) {
      .id = id, .snapshot_index = FINDING_ACTIVE, .host_off = fits ? i << bits : FINDING_NO_OFF,
      .guest_off = FINDING_NO_OFF, .index = i, .found = k->c->rt.entries[i] }, err);
}

/* --- the table as a whole */

/* Could it be there?  Sets *ok, or adds the finding that says why not. */
static int
check_place (struct checker *k, bool *ok, struct err *err)
{
  struct rt_state *rt = &k->c->rt;
  uint64_t bytes = (uint64_t) rt->clusters << k->g->cluster_bits;
  uint64_t ci = rt->host_off >> k->g->cluster_bits;
  int r = 0;

  *ok = false;
  if (rt->host_off == 0 || rt->clusters == 0)
    return rt_finding (k, FINDING_RT_MISSING, 0, 0, err);
  if (bytes > MAX_RT_BYTES)
    return rt_finding (k, FINDING_RT_TOO_LARGE, rt->clusters, 0, err);
  if (!table_fits (k, rt->host_off, bytes))
    return rt_finding (k, FINDING_RT_OUTSIDE, rt->host_off, 0, err);
  if (ownermap_find (k->c->owners, ci, ci + rt->clusters, true) == ci + rt->clusters) {
    *ok = true;
    return 0;
  }
  for (uint64_t at = ci, end = ci + rt->clusters; r == 0; ++at) {
    at = ownermap_find (k->c->owners, at, end, true);
    if (at == end)
      break;
    r = rt_doubt_add (k, at, RT_DOUBT_TABLE, err);
  }
  return r < 0 ? r : rt_finding (k, FINDING_RT_OVERLAP, rt->host_off, 0, err);
}

static int
read_table (struct checker *k, bool *ok, struct err *err)
{
  struct rt_state *rt = &k->c->rt;
  struct table_load load = {
    .host_off = rt->host_off, .len = (uint64_t) rt->clusters << k->g->cluster_bits,
  };
  uint64_t nr = load.len / 8;
  int r;

  *ok = false;
  rt->entries = malloc (load.len);
  rt->states = calloc (nr, 1);
  if (rt->entries == NULL || rt->states == NULL)
    return err_set (err, ENOMEM, "out of memory");
  load.buf = (uint8_t *) rt->entries;
  r = load_tables (k, &load, 1, err);
  if (r < 0)
    return r;
  if (load.r < 0)
    return rt_finding (k, FINDING_RT_UNREADABLE, 0, 0, err);
  for (uint64_t i = 0; i < nr; ++i)
    rt->entries[i] = load_be64 (&rt->entries[i]);
  rt->nr_entries = nr;
  *ok = true;
  return 0;
}

/* --- its entries */

/* Entry i; seen holds the blocks of the entries before it. */
static int
judge_entry (struct checker *k, struct ownermap *seen, uint64_t i, enum verdict *v,
             struct err *err)
{
  const struct rt_state *rt = &k->c->rt;
  uint64_t raw = rt->entries[i], off = raw & RTE_OFF_MASK, ci = off >> k->g->cluster_bits;
  bool conflict = false;
  int r;

  *v = ENTRY_ZERO;
  if (raw == 0)
    return 0;
  *v = ENTRY_BAD;
  if ((raw & RTE_RESERVED_MASK) || !table_fits (k, off, k->g->cluster_size))
    return 0;
  *v = ENTRY_OVERLAP;
  if (ownermap_get (k->c->owners, ci) > 0)
    return rt_doubt_add (k, ci, i, err);
  if (ci >= rt->host_off >> k->g->cluster_bits && ci < rt_end_ci (rt, k->g))
    return 0;
  r = ownermap_claim (seen, ci, 1, 1, &conflict, err);
  if (r == 0 && !conflict)
    *v = ENTRY_GOOD;
  return r;
}

static bool
covers_used (const struct checker *k, uint64_t i)
{
  uint64_t ci = i << k->g->rb_bits, end = ci + k->g->rb_entries;

  return ownermap_find (k->c->owners, ci, end, true) < end;
}

/* Judge every entry.  *end_ci: one past the highest cluster of a good block. */
static int
judge_entries (struct checker *k, uint8_t *verdicts, uint64_t *end_ci, struct err *err)
{
  const struct rt_state *rt = &k->c->rt;
  struct ownermap *seen;
  int r = ownermap_new (k->memory_limit, &seen, err);

  if (r < 0)
    return r;
  for (uint64_t i = 0; i < rt->nr_entries && r == 0; ++i) {
    enum verdict v;

    r = judge_entry (k, seen, i, &v, err);
    verdicts[i] = v;
  }
  *end_ci = ownermap_end (seen);
  ownermap_free (seen);
  return r;
}

/* Does the table reach far enough, and is enough of it left? */
static int
check_coverage (struct checker *k, const uint8_t *verdicts, uint64_t blocks_end_ci, bool *ok,
                struct err *err)
{
  struct rt_state *rt = &k->c->rt;
  uint64_t end_ci = MAX (ownermap_end (k->c->owners), rt_end_ci (rt, k->g));
  uint64_t needed = 0, usable = 0;

  *ok = false;
  end_ci = MAX (end_ci, blocks_end_ci);
  if (end_ci > rt->nr_entries << k->g->rb_bits)
    return rt_finding (k, FINDING_RT_TOO_SMALL, rt->nr_entries,
                       DIV_ROUND_UP (end_ci, k->g->rb_entries), err);
  for (uint64_t i = 0; i < rt->nr_entries; ++i)
    if (covers_used (k, i)) {
      ++needed;
      usable += verdicts[i] == ENTRY_GOOD;
    }
  if (usable * 2 < needed)
    return rt_finding (k, FINDING_RT_UNTRUSTED, usable, needed, err);
  *ok = true;
  return 0;
}

/* Claim the table and its good blocks. */
static int
claim_structures (struct checker *k, const uint8_t *verdicts, struct err *err)
{
  const struct rt_state *rt = &k->c->rt;
  int r = ownermap_claim (k->c->owners, rt->host_off >> k->g->cluster_bits, rt->clusters, 1,
                          NULL, err);

  for (uint64_t i = 0; i < rt->nr_entries && r == 0; ++i)
    if (verdicts[i] == ENTRY_GOOD)
      r = ownermap_claim (k->c->owners, rt->entries[i] >> k->g->cluster_bits, 1, 1, NULL, err);
  return r;
}

static int
report_entries (struct checker *k, const uint8_t *verdicts, struct err *err)
{
  struct rt_state *rt = &k->c->rt;
  int r = 0;

  for (uint64_t i = 0; i < rt->nr_entries && r == 0; ++i)
    switch ((enum verdict) verdicts[i]) {
    case ENTRY_GOOD:
      rt->states[i] = RB_SOUND;
      break;
    case ENTRY_ZERO:
      rt->states[i] = covers_used (k, i) ? RB_LOST : RB_ABSENT;
      if (rt->states[i] == RB_LOST)
        r = rt_entry_finding (k, FINDING_RB_MISSING, i, err);
      break;
    case ENTRY_BAD:
      rt->states[i] = RB_LOST;
      r = rt_entry_finding (k, FINDING_RB_BAD_ENTRY, i, err);
      break;
    case ENTRY_OVERLAP:
      rt->states[i] = RB_LOST;
      r = rt_entry_finding (k, FINDING_RB_OVERLAP, i, err);
      break;
    }
  return r;
}

static int
check_table (struct checker *k, struct err *err)
{
  struct rt_state *rt = &k->c->rt;
  CLEANUP_FREE uint8_t *verdicts = NULL;
  uint64_t blocks_end_ci;
  bool ok;
  int r = check_place (k, &ok, err);

  if (r == 0 && ok)
    r = read_table (k, &ok, err);
  if (r < 0 || !ok)
    return r;
  verdicts = malloc (rt->nr_entries);
  if (verdicts == NULL)
    return err_set (err, ENOMEM, "out of memory");
  r = judge_entries (k, verdicts, &blocks_end_ci, err);
  if (r == 0)
    r = check_coverage (k, verdicts, blocks_end_ci, &ok, err);
  if (r < 0 || !ok)
    return r;
  rt->usable = true;
  r = claim_structures (k, verdicts, err);
  return r < 0 ? r : report_entries (k, verdicts, err);
}

/* --- inconsistent bitmaps */

/* Their clusters whose refcounts are lost get one, to be on the safe side.
 * (Those that have a refcount were claimed in the comparison.)
 */
static int
keep_soft_clusters (struct checker *k, struct err *err)
{
  const struct rt_state *rt = &k->c->rt;
  uint64_t ci = 0, end = k->end >> k->g->cluster_bits;
  int r = 0;

  while (k->soft && r == 0 && (ci = ownermap_find (k->soft, ci, end, true)) < end) {
    bool lost = !rt->usable || rt->states[ci >> k->g->rb_bits] == RB_LOST;

    if (lost && ownermap_get (k->c->owners, ci) == 0)
      r = ownermap_claim (k->c->owners, ci, 1, 1, NULL, err);
    ++ci;
  }
  return r;
}

int
check_refcounts (struct checker *k, struct err *err)
{
  struct check *c = k->c;
  uint64_t leaks_end_ci = 0;
  int r = 0;

  c->rt.host_off = c->header.rt_host_off;
  c->rt.clusters = c->header.rt_clusters;
  if (c->incomplete || c->keep_orphans)
    r = ownermap_new (k->memory_limit, &c->kept, err);
  if (r == 0)
    r = check_table (k, err);
  if (r == 0 && c->rt.usable)
    r = compare_refcounts (k, &leaks_end_ci, err);
  if (r == 0)
    r = keep_soft_clusters (k, err);
  c->stats.image_end_off = MAX (ownermap_end (c->owners), leaks_end_ci) << k->g->cluster_bits;
  return r;
}
