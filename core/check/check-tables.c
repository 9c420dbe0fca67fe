/* L1 tables and the L2 tables that they name: claims and judgement.
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
 * Deliberately not here: the contents of L2 tables (check-data.c), the COPIED
 * flags (check-copied.c).
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

static struct l2_table *
l2_find (const struct l2_set *set, uint64_t host_off)
{
  uint32_t slot = set->nr_slots ? *l2_slot (set, set->slots, set->nr_slots, host_off) : 0;

  return slot ? &set->tables.ptr[slot - 1] : NULL;
}

bool
l2_set_has (const struct l2_set *set, uint64_t host_off)
{
  return l2_find (set, host_off) != NULL;
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

struct l1_walk {
  struct checker *k;
  int32_t snapshot_index;
  uint64_t l1_host_off;
  struct finding_batch batch;
};

static int
l1_finding (struct l1_walk *w, enum finding_id id, enum bad_fix fix, uint64_t i, uint64_t raw,
            struct err *err)
{
  const struct geom *g = w->k->g;
  struct finding f = {
    .id = id, .snapshot_index = w->snapshot_index, .host_off = w->l1_host_off,
    .guest_off = i * g->l2_coverage, .guest_len = g->l2_coverage,
    .index = i, .found = raw, .count = 1,
  };

  if (finding_batch_add (&w->batch, &f) < 0)
    return err_set (err, ENOMEM, "out of memory");
  return bad_add (w->k, (struct bad_run) {
      .table_host_off = w->l1_host_off, .index = i, .count = 1, .in_l1 = true,
      .snapshot_index = w->snapshot_index, .why = id, .fix = fix }, err);
}

static int
claim_new_l2_table (struct l1_walk *w, uint64_t i, uint64_t raw, uint64_t host_off,
                    struct err *err)
{
  bool active = w->snapshot_index == FINDING_ACTIVE, conflict = false;
  struct l2_table t = {
    .host_off = host_off, .weight = 1, .active_weight = active,
    .snapshot_index = w->snapshot_index, .l1_index = i, .last_l1 = w->snapshot_index,
  };
  int r = claim_meta (w->k, host_off, w->k->g->cluster_size, &conflict, err);

  if (r < 0)
    return r;
  if (!conflict)
    return l2_insert (w->k, &t, err);
  set_incomplete (w->k);
  return l1_finding (w, FINDING_L1_ENTRY_OVERLAP, BAD_LOST, i, raw, err);
}

static int
claim_l2_table (struct l1_walk *w, uint64_t i, uint64_t raw, uint64_t host_off, struct err *err)
{
  struct l2_table *t = l2_find (&w->k->l2, host_off);

  if (t == NULL)
    return claim_new_l2_table (w, i, raw, host_off, err);
  t->weight++;
  t->active_weight += w->snapshot_index == FINDING_ACTIVE;
  if (t->last_l1 == w->snapshot_index)
    return l1_finding (w, FINDING_L2_TABLE_SHARED, BAD_LOST, i, raw, err);
  t->last_l1 = w->snapshot_index;
  return 0;
}

static int
check_l1_entry (struct l1_walk *w, uint64_t i, uint64_t raw, struct err *err)
{
  struct checker *k = w->k;
  uint64_t host_off = raw & L1E_OFF_MASK;
  int r = 0;

  /* COPIED without an offset says that something was there. */
  if ((raw & L1E_RESERVED_MASK) || host_off == 0) {
    set_incomplete (k);
    r = l1_finding (w, FINDING_L1_ENTRY_RESERVED, host_off ? BAD_RESERVED : BAD_LOST, i, raw, err);
  }
  if (r < 0 || host_off == 0)
    return r;
  if (!IS_ALIGNED (host_off, k->g->cluster_size)) {
    set_incomplete (k);
    return l1_finding (w, FINDING_L1_ENTRY_UNALIGNED, BAD_LOST, i, raw, err);
  }
  if (!table_fits (k, host_off, k->g->cluster_size)) {
    set_incomplete (k);
    return l1_finding (w, FINDING_L1_ENTRY_OUTSIDE, BAD_LOST, i, raw, err);
  }
  return claim_l2_table (w, i, raw, host_off, err);
}

int
claim_l2_tables (struct checker *k, const uint64_t *l1, uint64_t nr, int32_t snapshot_index,
                 uint64_t l1_host_off, struct err *err)
{
  struct l1_walk w = { .k = k, .snapshot_index = snapshot_index, .l1_host_off = l1_host_off };
  int r = 0;

  finding_batch_init (&w.batch, &k->c->findings, k->g->cluster_size);
  for (uint64_t i = 0; i < nr && r == 0; ++i)
    if (l1[i])
      r = check_l1_entry (&w, i, l1[i], err);
  if (r == 0 && finding_batch_flush (&w.batch) < 0)
    r = err_set (err, ENOMEM, "out of memory");
  return r;
}

/* --- the active L1 table */

static int
l1_problem (struct checker *k, enum finding_id id, uint64_t found, uint64_t expected,
            struct err *err)
{
  if (id != FINDING_L1_TOO_SMALL)
    set_incomplete (k);
  return add_finding (k, (struct finding) {
      .id = id, .snapshot_index = FINDING_ACTIVE, .host_off = k->c->header.l1_host_off,
      .guest_off = 0, .guest_len = k->c->header.size, .found = found, .expected = expected }, err);
}

static int
load_active_l1 (struct checker *k, uint64_t bytes, struct err *err)
{
  struct table_load load = { .host_off = k->c->header.l1_host_off, .len = bytes };
  int r;

  k->l1 = malloc (bytes);
  if (k->l1 == NULL)
    return err_set (err, ENOMEM, "out of memory");
  load.buf = (uint8_t *) k->l1;
  r = load_tables (k, &load, 1, err);
  if (r < 0)
    return r;
  if (load.r < 0)
    return l1_problem (k, FINDING_L1_UNREADABLE, 0, 0, err);
  k->nr_l1 = bytes / 8;
  for (uint64_t i = 0; i < k->nr_l1; ++i)
    k->l1[i] = load_be64 (&k->l1[i]);
  return 0;
}

int
check_active_l1 (struct checker *k, struct err *err)
{
  const struct header *h = &k->c->header;
  uint64_t bytes = (uint64_t) h->l1_entries * 8, needed = geom_l1_entries (k->g, h->size);
  int r = 0;

  progress_update (k->progress, "tables", 0, 1);
  if (bytes > MAX_L1_BYTES)
    return l1_problem (k, FINDING_L1_TOO_LARGE, h->l1_entries, needed, err);
  if (h->l1_entries < needed)
    r = l1_problem (k, FINDING_L1_TOO_SMALL, h->l1_entries, needed, err);
  if (r < 0 || h->l1_entries == 0)
    return r;
  if (!table_fits (k, h->l1_host_off, bytes))
    return l1_problem (k, FINDING_L1_OUTSIDE, h->l1_host_off, 0, err);
  r = claim_meta (k, h->l1_host_off, bytes, NULL, err);
  if (r == 0)
    r = load_active_l1 (k, bytes, err);
  if (r == 0)
    r = claim_l2_tables (k, k->l1, k->nr_l1, FINDING_ACTIVE, h->l1_host_off, err);
  return r;
}

/* --- when all L1 tables are known */

static int
compare_host_off (const void *pa, const void *pb)
{
  const struct l2_table *a = pa, *b = pb;

  return a->host_off < b->host_off ? -1 : a->host_off > b->host_off;
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
