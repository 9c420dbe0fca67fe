/* Entries of L1 tables and the L2 tables that they name: claims and judgement.
 *
 * Every L2 table is kept once, with the number of L1 entries that name it, so
 * that a thousand snapshots sharing their tables (or one hostile L1 table that
 * names one table everywhere) cost one walk each.  The active L1 table comes
 * first: what it names is known when the snapshots are looked at.
 *
 * An entry with reserved bits whose offset is good is claimed all the same: it
 * is safer to keep a cluster than to hand it out.  One that points at other
 * metadata is claimed too, but what lies there is not read as an L2 table.
 *
 * Where several entries of one L1 table name the same L2 table, one keeps it
 * (T05): the one that is in order with the nearest entries around it (the one
 * before it smaller, the one after it larger, as tables are allocated), else the
 * one that has the COPIED flag, else the first.
 *
 * Deliberately not here: how long the active L1 table is (check-l1.c), the
 * contents of L2 tables (check-data.c), which decide on entries with reserved
 * bits and on tables that are none (check-contests.c), the COPIED flags
 * (check-copied.c).
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/num.h"
#include "check/check-int.h"

/* --- the set of L2 tables */

static size_t
hash_off (uint64_t host_off)
{
  host_off = (host_off >> MIN_CLUSTER_BITS) * UINT64_C (0x9e3779b97f4a7c15);
  return host_off ^ host_off >> 32;
}

/* The slot where host_off is or would be. */
static uint32_t *
l2_slot (const struct l2_set *set, uint32_t *slots, size_t nr_slots, uint64_t host_off)
{
  size_t i = hash_off (host_off) & (nr_slots - 1);

  while (slots[i] && set->tables.ptr[slots[i] - 1].host_off != host_off)
    i = (i + 1) & (nr_slots - 1);
  return &slots[i];
}

struct l2_table *
l2_set_find (const struct l2_set *set, uint64_t host_off)
{
  uint32_t slot = set->nr_slots ? *l2_slot (set, set->slots, set->nr_slots, host_off) : 0;

  return slot ? &set->tables.ptr[slot - 1] : NULL;
}

static int
l2_grow (struct checker *k, struct err *err)
{
  struct l2_set *set = &k->l2;
  size_t n = set->nr_slots ? set->nr_slots * 2 : 1024;
  uint32_t *fresh;

  if (n > UINT32_MAX ||
      set->tables.cap * sizeof *set->tables.ptr + n * sizeof *fresh > k->memory_limit / 2)
    return err_set (err, ENOMEM, "this image's %zu L2 tables need more than the limit of "
                    "%llu bytes of memory", set->tables.len,
                    (unsigned long long) k->memory_limit / 2);
  fresh = calloc (n, sizeof *fresh);
  if (fresh == NULL)
    return err_set (err, ENOMEM, "out of memory");
  for (size_t i = 0; i < set->tables.len; ++i)
    *l2_slot (set, fresh, n, set->tables.ptr[i].host_off) = i + 1;
  free (set->slots);
  set->slots = fresh;
  set->nr_slots = n;
  return 0;
}

static int
l2_insert (struct checker *k, const struct l2_table *t, struct err *err)
{
  struct l2_set *set = &k->l2;

  if (set->tables.len >= set->nr_slots / 2) {
    int r = l2_grow (k, err);

    if (r < 0)
      return r;
  }
  if (l2_table_vec_push (&set->tables, *t) < 0)
    return err_set (err, ENOMEM, "out of memory");
  *l2_slot (set, set->slots, set->nr_slots, t->host_off) = set->tables.len;
  return 0;
}

/* --- entries of an L1 table */

/* An entry that names a table which another entry of the same L1 table names. */
struct twin {
  uint64_t host_off;
  uint32_t index;
};
DEFINE_VEC (twin_vec, struct twin);

struct l1_walk {
  struct checker *k;
  const uint64_t *l1;
  uint64_t first, nr;           /* entries [first, nr) of l1 are judged */
  int32_t snapshot_index;
  uint64_t l1_host_off;
  bool shared;                  /* some table is named twice */
  struct finding_batch batch;
};

static int
l1_finding (struct l1_walk *w, enum finding_id id, uint64_t i, uint64_t raw, struct err *err)
{
  const struct geom *g = w->k->g;
  struct finding f = {
    .id = id, .snapshot_index = w->snapshot_index, .host_off = w->l1_host_off,
    .guest_off = i * g->l2_coverage, .guest_len = g->l2_coverage,
    .index = i, .found = raw, .count = 1,
  };

  return finding_batch_add (&w->batch, &f) < 0 ? err_set (err, ENOMEM, "out of memory") : 0;
}

/* An entry that is lost. */
static int
l1_lost (struct l1_walk *w, enum finding_id id, uint64_t i, uint64_t raw, struct err *err)
{
  int r = l1_finding (w, id, i, raw, err);

  return r < 0 ? r : bad_add (w->k, (struct bad_run) {
      .table_host_off = w->l1_host_off, .index = i, .count = 1, .in_l1 = true,
      .snapshot_index = w->snapshot_index, .why = id, .fix = BAD_LOST }, err);
}

/* Reserved bits, and the rest seems right: what lies there decides, later. */
static int
l1_doubtful (struct l1_walk *w, uint64_t i, uint64_t host_off, struct err *err)
{
  struct l1_doubt d = { .l1_host_off = w->l1_host_off, .l2_host_off = host_off, .index = i,
                        .snapshot_index = w->snapshot_index };

  return l1_doubt_vec_push (&w->k->l1_doubts, d) < 0 ? err_set (err, ENOMEM, "out of memory") : 0;
}

static int
claim_new_l2_table (struct l1_walk *w, uint64_t i, uint64_t raw, uint64_t host_off, bool *lost,
                    struct err *err)
{
  bool active = w->snapshot_index == FINDING_ACTIVE;
  struct l2_table t = {
    .host_off = host_off, .weight = 1, .active_weight = active,
    .snapshot_index = w->snapshot_index, .l1_index = i, .last_l1 = w->snapshot_index,
  };
  int r = claim_meta (w->k, host_off, w->k->g->cluster_size, lost, err);

  if (r < 0)
    return r;
  if (!*lost)
    return l2_insert (w->k, &t, err);
  set_incomplete (w->k);
  r = l1_lost (w, FINDING_L1_ENTRY_OVERLAP, i, raw, err);
  return r < 0 ? r : overlap_add (w->k, (struct overlap) {
      .ci = host_off >> w->k->g->cluster_bits, .n = 1,
      .loser = { .kind = OWNER_L2_TABLE, .index = i, .snapshot_index = w->snapshot_index } }, err);
}

static int
claim_l2_table (struct l1_walk *w, uint64_t i, uint64_t raw, uint64_t host_off, bool *lost,
                struct err *err)
{
  struct l2_table *t = l2_set_find (&w->k->l2, host_off);

  if (t == NULL)
    return claim_new_l2_table (w, i, raw, host_off, lost, err);
  t->weight++;
  t->active_weight += w->snapshot_index == FINDING_ACTIVE;
  if (t->last_l1 == w->snapshot_index)
    w->shared = t->shared = true;
  t->last_l1 = w->snapshot_index;
  return 0;
}

static int
check_l1_entry (struct l1_walk *w, uint64_t i, uint64_t raw, struct err *err)
{
  struct checker *k = w->k;
  uint64_t host_off = raw & L1E_OFF_MASK;
  bool lost = false;
  int r = 0;

  if ((raw & L1E_RESERVED_MASK) || !table_fits (k, host_off, k->g->cluster_size))
    set_incomplete (k);
  /* COPIED without an offset says that something was there. */
  if (host_off == 0)
    return l1_lost (w, FINDING_L1_ENTRY_RESERVED, i, raw, err);
  if (raw & L1E_RESERVED_MASK)
    r = l1_finding (w, FINDING_L1_ENTRY_RESERVED, i, raw, err);
  if (r < 0)
    return r;
  if (!IS_ALIGNED (host_off, k->g->cluster_size))
    return l1_lost (w, FINDING_L1_ENTRY_UNALIGNED, i, raw, err);
  if (!table_fits (k, host_off, k->g->cluster_size))
    return l1_lost (w, FINDING_L1_ENTRY_OUTSIDE, i, raw, err);
  r = claim_l2_table (w, i, raw, host_off, &lost, err);
  if (r == 0 && (raw & L1E_RESERVED_MASK) && !lost)
    r = l1_doubtful (w, i, host_off, err);
  return r;
}

/* --- tables that one L1 table names twice */

static int
compare_twins (const void *pa, const void *pb)
{
  const struct twin *a = pa, *b = pb;

  if (a->host_off != b->host_off)
    return a->host_off < b->host_off ? -1 : 1;
  return a->index < b->index ? -1 : a->index > b->index;
}

/* How good the claim of entry i is. */
static unsigned
claim_rank (const struct l1_walk *w, uint32_t i)
{
  uint64_t off = w->l1[i] & L1E_OFF_MASK, before = 0, after = UINT64_MAX;

  for (uint32_t j = i; j > 0 && before == 0; --j)
    before = w->l1[j - 1] & L1E_OFF_MASK;
  for (uint64_t j = i + 1; j < w->nr && after == UINT64_MAX; ++j)
    if (w->l1[j] & L1E_OFF_MASK)
      after = w->l1[j] & L1E_OFF_MASK;
  return 2 * (before < off && off < after) + !!(w->l1[i] & ENTRY_COPIED);
}

/* All but the best of twins that name the same table are lost. */
static int
judge_twins (struct l1_walk *w, const struct twin *t, size_t nr, struct err *err)
{
  size_t best = 0;
  unsigned best_rank = 0;
  int r = 0;

  for (size_t i = 0; i < nr && nr > 1; ++i) {
    unsigned rank = claim_rank (w, t[i].index);

    if (i == 0 || rank > best_rank) {
      best = i;
      best_rank = rank;
    }
  }
  for (size_t i = 0; i < nr && r == 0; ++i)
    if (i != best) {
      r = l1_lost (w, FINDING_L2_TABLE_SHARED, t[i].index, w->l1[t[i].index], err);
      if (r == 0)
        r = conflict_add (w->k, t[0].host_off, w->k->g->cluster_size,
                          (struct owner) { OWNER_L2_TABLE, w->snapshot_index, t[best].index, 0, 0 },
                          (struct owner) { OWNER_L2_TABLE, w->snapshot_index, t[i].index, 0, 0 },
                          err);
    }
  return r;
}

/* The entries before w->first were judged when they were seen; as twins of later
 * ones they count again.
 */
static int
judge_shared (struct l1_walk *w, struct err *err)
{
  struct twin_vec v = VEC_INIT;
  int r = 0;

  for (uint64_t i = 0; i < w->nr && r == 0; ++i) {
    uint64_t host_off = w->l1[i] & L1E_OFF_MASK;
    const struct l2_table *t = host_off ? l2_set_find (&w->k->l2, host_off) : NULL;

    if (t && t->shared)
      r = twin_vec_push (&v, (struct twin) { host_off, i });
  }
  if (r < 0)
    r = err_set (err, ENOMEM, "out of memory");
  if (v.len)
    qsort (v.ptr, v.len, sizeof *v.ptr, compare_twins);
  for (size_t i = 0, n; i < v.len && r == 0; i += n) {
    for (n = 1; i + n < v.len && v.ptr[i + n].host_off == v.ptr[i].host_off; ++n)
      ;
    r = judge_twins (w, v.ptr + i, n, err);
    l2_set_find (&w->k->l2, v.ptr[i].host_off)->shared = false;
  }
  vec_reset (&v);
  return r;
}

int
claim_l2_tables (struct checker *k, const uint64_t *l1, uint64_t first, uint64_t nr,
                 int32_t snapshot_index, uint64_t l1_host_off, struct err *err)
{
  struct l1_walk w = { .k = k, .l1 = l1, .first = first, .nr = nr,
                       .snapshot_index = snapshot_index, .l1_host_off = l1_host_off };
  int r = 0;

  finding_batch_init (&w.batch, &k->c->findings, k->g->cluster_size);
  for (uint64_t i = first; i < nr && r == 0; ++i)
    if (l1[i])
      r = check_l1_entry (&w, i, l1[i], err);
  if (r == 0 && w.shared)
    r = judge_shared (&w, err);
  if (r == 0 && finding_batch_flush (&w.batch) < 0)
    r = err_set (err, ENOMEM, "out of memory");
  return r;
}

/* --- when all L1 tables are known */

static int
compare_host_off (const void *pa, const void *pb)
{
  const struct l2_table *a = pa, *b = pb;

  return a->host_off < b->host_off ? -1 : a->host_off > b->host_off;
}

struct l2_table *
l2_table_at (const struct checker *k, uint64_t host_off)
{
  const struct l2_table_vec *v = &k->l2.tables;
  struct l2_table key = { .host_off = host_off };

  return v->len ? bsearch (&key, v->ptr, v->len, sizeof *v->ptr, compare_host_off) : NULL;
}

/* Each table was claimed once when it was first seen; add its other references,
 * and bring the tables into the order in which they are best read.
 */
int
check_l2_close (struct checker *k, struct err *err)
{
  struct l2_table_vec *v = &k->l2.tables;
  int r = 0;

  free (k->l2.slots);
  k->l2.slots = NULL;
  k->l2.nr_slots = 0;
  if (v->len)
    qsort (v->ptr, v->len, sizeof *v->ptr, compare_host_off);
  for (size_t i = 0; i < v->len && r == 0; ++i)
    r = ownermap_claim (k->c->owners, v->ptr[i].host_off >> k->g->cluster_bits, 1,
                        v->ptr[i].weight - 1, NULL, err);
  k->c->stats.l2_tables = v->len;
  return r;
}
