/* Who is right where two structures claim one cluster, now that all are known.
 *
 * The rule is that metadata beats data, and what was claimed first beats what
 * came later (header, active tables, snapshots, bitmaps: the order of the
 * phases).  It has two exceptions.  A table whose contents are nonsense, i.e. has
 * more entries that are impossible than entries that are possible, loses to
 * whatever else lies there, since that it is read as a table is the doing of one
 * wrong L1 entry.  Then all L1 entries that name it are lost (T08), the other
 * owner keeps the cluster, and nothing that its entries say counts.  Nonsense
 * without a rival is kept: its possible entries may be all that is left.  And the data of a
 * bitmap gives way to an entry of a guest that is in line with its neighbours, or if the bitmap
 * is lost anyway: a bitmap can be made again.
 *
 * An entry with reserved bits is believed otherwise, if nothing speaks against
 * the rest of it: an L1 entry if it leads to a table that is none of that
 * nonsense, an L2 entry if its table is not and nobody else has its cluster
 * (with snapshots, others may).
 *
 * Level "refcounts" does not act on any of this; for it the mapping is right.
 *
 * Deliberately not here: refcount structures, which are weighed by their own
 * contents (check-evidence.c).
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/num.h"
#include "check/check-int.h"

/* --- owners */

struct owner
l2_owner (const struct l2_table *t)
{
  return (struct owner) { .kind = OWNER_L2_TABLE, .snapshot_index = t->snapshot_index,
                          .index = t->l1_index };
}

struct owner
data_owner (const struct checker *k, const struct l2_table *t, uint64_t i, uint64_t n)
{
  uint64_t guest_ci = ((uint64_t) t->l1_index << k->g->l2_bits) + i;

  return (struct owner) { .kind = OWNER_DATA, .snapshot_index = t->snapshot_index,
                          .guest_off = guest_ci << k->g->cluster_bits,
                          .guest_len = n << k->g->cluster_bits };
}

static bool
lies_in (const struct checker *k, uint64_t ci, uint64_t off, uint64_t len)
{
  return len > 0 && ranges_overlap (ci << k->g->cluster_bits, k->g->cluster_size, off, len);
}

static bool
is_but (const struct owner *but, enum owner_kind kind, int32_t snapshot_index)
{
  return but && but->kind == kind && but->snapshot_index == snapshot_index;
}

static bool
snapshot_l1_at (const struct checker *k, uint64_t ci, const struct owner *but, struct owner *o)
{
  for (size_t i = 0; i < k->c->snapshots.len; ++i) {
    const struct snapshot *s = &k->c->snapshots.ptr[i];

    if (is_but (but, OWNER_L1_TABLE, i) || !lies_in (k, ci, s->l1_host_off,
                                                     s->l1_entries * UINT64_C (8)))
      continue;
    *o = (struct owner) { .kind = OWNER_L1_TABLE, .snapshot_index = i };
    return true;
  }
  return false;
}

bool
owner_at (const struct checker *k, uint64_t ci, const struct owner *but, struct owner *o)
{
  const struct header *h = &k->c->header;
  const struct l2_table *t = l2_table_at (k, ci << k->g->cluster_bits);

  *o = (struct owner) { .kind = OWNER_HEADER, .snapshot_index = FINDING_ACTIVE };
  if (ci == 0)
    return true;
  o->kind = OWNER_L1_TABLE;
  if (lies_in (k, ci, h->l1_host_off, k->nr_l1 * 8))
    return true;
  if (t && t->fate != FINDING_L2_TABLE_NONSENSE) {
    *o = l2_owner (t);
    return true;
  }
  o->kind = OWNER_SNAPSHOT_TABLE;
  if (lies_in (k, ci, h->snapshots_host_off, k->snaptab_len) &&
      !is_but (but, OWNER_SNAPSHOT_TABLE, FINDING_ACTIVE))
    return true;
  /* Once enough have been named, a long list of snapshots is not searched again and again. */
  if (k->c->nr_conflicts < MAX_CONFLICTS && snapshot_l1_at (k, ci, but, o))
    return true;
  o->kind = OWNER_CRYPTO_HEADER;
  if (lies_in (k, ci, k->crypto_off, k->crypto_len))
    return true;
  o->kind = OWNER_BITMAP;
  /* Nothing else is metadata; a dropped table is claimed as such, too. */
  return t == NULL && ownermap_get (k->meta, ci) > 0;
}

/* --- tables that are none */

/* Something else has cluster ci, too: does an L2 table lose it? */
static void
rival (struct checker *k, uint64_t ci, const struct l2_table *by)
{
  struct l2_table *t = l2_table_at (k, ci << k->g->cluster_bits);

  if (t && t != by && t->fate == 0 && l2_is_nonsense (t))
    t->fate = FINDING_L2_TABLE_NONSENSE;
}

static void
rivals (struct checker *k, uint64_t ci, uint64_t n, const struct l2_table *by)
{
  for (uint64_t i = 0; i < n; ++i)
    rival (k, ci + i, by);
}

/* A table of zeros that is lost reads as it did, unless a backing file is behind it. */
static bool
maps_nothing (const struct checker *k, const struct rt_doubt *d)
{
  return d->zeros && k->c->header.backing_off == 0;
}

static void
drop_nonsense (struct checker *k)
{
  for (size_t i = 0; i < k->l2_doubts.len; ++i) {
    const struct l2_doubt *d = &k->l2_doubts.ptr[i];
    const struct l2_table *t = &k->l2.tables.ptr[d->table];

    if (!l2_is_nonsense (t) && t->fate == 0)
      rivals (k, d->ci, d->n, t);
  }
  for (size_t i = 0; i < k->bitmap_doubts.len; ++i)
    rivals (k, k->bitmap_doubts.ptr[i].ci, k->bitmap_doubts.ptr[i].n, NULL);
  if (k->crypto_len)
    rivals (k, k->crypto_off >> k->g->cluster_bits,
            DIV_ROUND_UP (k->crypto_len, k->g->cluster_size), NULL);
  for (size_t i = 0; i < k->rt_doubts.len; ++i) {
    const struct rt_doubt *d = &k->rt_doubts.ptr[i];
    struct l2_table *t = l2_table_at (k, d->ci << k->g->cluster_bits);

    if (t && t->fate == 0 && (d->sound || l2_is_nonsense (t) || maps_nothing (k, d)))
      t->fate = FINDING_L2_TABLE_NONSENSE;
  }
}

/* --- entries of L2 tables */

/* Entries [i, i+n) of t; raw is the first. */
static int
l2_finding (struct checker *k, struct finding_batch *b, const struct l2_table *t, enum finding_id id,
            uint64_t i, uint64_t n, uint64_t raw, struct err *err)
{
  struct owner o = data_owner (k, t, i, n);
  struct finding f = {
    .id = id, .snapshot_index = t->snapshot_index, .host_off = t->host_off,
    .guest_off = o.guest_off, .guest_len = o.guest_len,
    .index = o.guest_off >> k->g->cluster_bits, .found = raw, .count = n,
  };

  return finding_batch_add (b, &f) < 0 ? err_set (err, ENOMEM, "out of memory") : 0;
}

int
lose_entries (struct checker *k, struct finding_batch *b, const struct l2_table *t,
              enum finding_id id, uint64_t i, uint64_t n, uint64_t raw, struct err *err)
{
  int r = l2_finding (k, b, t, id, i, n, raw, err);

  return r < 0 ? r : bad_add (k, (struct bad_run) {
      .table_host_off = t->host_off, .index = i, .count = n, .snapshot_index = FINDING_ACTIVE,
      .why = id, .fix = BAD_LOST }, err);
}

int
shorten_stream (struct checker *k, const struct l2_table *t, enum finding_id id, uint64_t i,
                uint64_t end, struct err *err)
{
  return bad_add (k, (struct bad_run) { .table_host_off = t->host_off, .index = i, .count = 1,
                                        .snapshot_index = FINDING_ACTIVE, .why = id,
                                        .fix = BAD_SECTORS, .end = end }, err);
}

/* --- bitmaps: they say nothing about the disk */

static int
lose_bitmap (struct checker *k, const struct bitmap_doubt *d, struct err *err)
{
  bool directory = d->bitmap == UINT32_MAX;

  if (directory && k->c->bitmap_dir_damaged)
    return 0;
  if (!directory && (k->c->bitmap_dir_damaged || k->c->bitmaps.ptr[d->bitmap].damaged))
    return 0;
  if (directory) {
    k->c->bitmap_dir_damaged = true;
    k->c->bitmaps.len = 0;
  }
  else
    k->c->bitmaps.ptr[d->bitmap].damaged = true;
  return add_finding (k, (struct finding) {
      .id = directory ? FINDING_BITMAPS_DAMAGED : FINDING_BITMAP_DAMAGED,
      .snapshot_index = FINDING_ACTIVE, .host_off = d->table_host_off,
      .guest_off = FINDING_NO_OFF, .index = directory ? 0 : d->bitmap, .found = d->found }, err);
}

static int
compare_ci (const void *pa, const void *pb)
{
  const struct bitmap_doubt *a = pa, *b = pb;

  return a->ci < b->ci ? -1 : a->ci > b->ci;
}

static const struct bitmap_doubt *
bitmap_data_at (const struct checker *k, uint64_t ci)
{
  const struct bitmap_doubt_vec *v = &k->bitmap_data;
  struct bitmap_doubt key = { .ci = ci };

  return v->len ? bsearch (&key, v->ptr, v->len, sizeof key, compare_ci) : NULL;
}

/* Does entry i of t name cluster ci, and nothing but guests' entries? */
static bool
names_data (const struct checker *k, const struct l2_table *t, uint64_t i, uint64_t ci)
{
  uint8_t entry[8];

  if (i >= k->g->l2_entries || ci == 0 || ownermap_get (k->meta, ci) > 0
      || bdev_pread_padded (k->d, entry, sizeof entry, t->host_off + i * k->g->l2e_size, NULL) < 0)
    return false;
  return (load_be64 (entry) & (L2E_COMPRESSED | L2E_OFF_MASK)) == ci << k->g->cluster_bits;
}

/* Entry i of t names a cluster that a bitmap's table names too: one of the two is wrong. */
static const struct bitmap_doubt *
bitmap_gives_way (const struct checker *k, const struct l2_table *t, uint64_t i, uint64_t ci)
{
  const struct bitmap_doubt *b = ownermap_get (k->meta, ci) == 1 ? bitmap_data_at (k, ci) : NULL;

  if (b == NULL)
    return NULL;
  return k->c->bitmap_dir_damaged || k->c->bitmaps.ptr[b->bitmap].damaged
         || names_data (k, t, i - 1, ci - 1) || names_data (k, t, i + 1, ci + 1) ? b : NULL;
}

/* --- entries that name metadata */

/* The cluster at ci, which entry i of t names, is metadata too.  *lost: of somebody
 * who is believed.
 */
static int
settle_cluster (struct checker *k, const struct l2_table *t, uint64_t i, uint64_t ci, bool *lost,
                struct err *err)
{
  const struct bitmap_doubt *bitmap = bitmap_gives_way (k, t, i, ci);
  struct owner winner, data = data_owner (k, t, i, 1);
  uint64_t off = ci << k->g->cluster_bits;
  const struct l2_table *none;

  if (bitmap) {
    struct owner loser = { .kind = OWNER_BITMAP, .snapshot_index = FINDING_ACTIVE,
                           .index = bitmap->bitmap };
    int r = conflict_add (k, off, k->g->cluster_size, data, loser, err);

    return r < 0 ? r : lose_bitmap (k, bitmap, err);
  }
  if (owner_at (k, ci, NULL, &winner)) {
    *lost = true;
    return conflict_add (k, off, k->g->cluster_size, winner, data, err);
  }
  none = l2_table_at (k, off);
  return none ? conflict_add (k, off, k->g->cluster_size, data, l2_owner (none), err) : 0;
}

/* The first of its d->n clusters that is metadata of somebody who is believed; d->n: none is. */
static uint64_t
first_metadata (const struct checker *k, const struct l2_doubt *d)
{
  struct owner o;

  for (uint64_t i = 0; i < d->n; ++i)
    if (ownermap_get (k->meta, d->ci + i) > 0 && owner_at (k, d->ci + i, NULL, &o))
      return i;
  return d->n;
}

static int
settle_overlap (struct checker *k, struct finding_batch *b, const struct l2_doubt *d,
                struct err *err)
{
  const struct l2_table *t = &k->l2.tables.ptr[d->table];
  struct l2_entry e = l2_entry_decode (d->raw, 0, k->g);
  bool compressed = d->raw & L2E_COMPRESSED, any = false;
  uint64_t first = compressed ? first_metadata (k, d) : d->n;
  uint64_t end = (d->ci + first) << k->g->cluster_bits;
  int r = 0;

  if (first < d->n && clip_whole_stream (k, &e, end)) {
    r = l2_finding (k, b, t, FINDING_L2_ENTRY_OVERLAP, d->index, 1, d->raw, err);
    return r < 0 ? r : shorten_stream (k, t, FINDING_L2_ENTRY_OVERLAP, d->index, end, err);
  }
  for (uint64_t j = 0; j < d->n && r == 0; ++j) {
    bool lost = false;

    if (compressed && ownermap_get (k->meta, d->ci + j) == 0)
      continue;
    r = settle_cluster (k, t, d->index + (compressed ? 0 : j), d->ci + j, &lost, err);
    any |= lost;
    if (r == 0 && lost && !compressed)
      r = lose_entries (k, b, t, FINDING_L2_ENTRY_OVERLAP, d->index + j, 1,
                        d->raw + (j << k->g->cluster_bits), err);
  }
  if (r == 0 && compressed && any)
    r = lose_entries (k, b, t, FINDING_L2_ENTRY_OVERLAP, d->index, 1, d->raw, err);
  return r;
}

/* May the rest of an entry with reserved bits be believed? */
static bool
reserved_believed (const struct checker *k, const struct l2_doubt *d)
{
  const struct l2_table *t = &k->l2.tables.ptr[d->table];
  const struct l2_table *none = l2_table_at (k, d->ci << k->g->cluster_bits);
  uint64_t refs = ownermap_get (k->c->owners, d->ci);

  if (l2_is_nonsense (t))
    return false;
  if ((d->raw & L2E_COMPRESSED) || k->c->snapshots.len > 0)
    return true;
  return refs - (none ? none->weight : 0) <= t->weight;
}

static int
compare_doubts (const void *pa, const void *pb)
{
  const struct l2_doubt *a = pa, *b = pb;

  if (a->table != b->table)
    return a->table < b->table ? -1 : 1;
  if (a->index != b->index)
    return a->index < b->index ? -1 : 1;
  return a->why < b->why ? -1 : a->why > b->why;
}

static int
settle_l2_doubts (struct checker *k, struct err *err)
{
  struct finding_batch b;
  int r = 0;

  finding_batch_init (&b, &k->c->findings, k->g->cluster_size);
  for (size_t i = 0; i < k->l2_doubts.len && r == 0; ++i) {
    const struct l2_doubt *d = &k->l2_doubts.ptr[i];
    const struct l2_table *t = &k->l2.tables.ptr[d->table];

    if (t->fate == FINDING_L2_TABLE_NONSENSE)
      continue;
    if (d->why == FINDING_L2_ENTRY_OVERLAP)
      r = settle_overlap (k, &b, d, err);
    else if (first_metadata (k, d) == d->n)    /* or it has its run as such */
      r = bad_add (k, (struct bad_run) {
          .table_host_off = t->host_off, .index = d->index, .count = d->count,
          .snapshot_index = FINDING_ACTIVE, .why = d->why,
          .fix = reserved_believed (k, d) ? BAD_RESERVED : BAD_LOST }, err);
    if (r == 0 && i % 4096 == 0)
      r = check_cancelled (k, err);
  }
  if (finding_batch_flush (&b) < 0 && r == 0)
    r = err_set (err, ENOMEM, "out of memory");
  return r;
}

/* --- entries of L1 tables */

/* The entries of one L1 table that name tables which are none or can't be read. */
static int
lose_tables_of (struct checker *k, void *opaque, const uint64_t *l1, uint64_t nr,
                int32_t snapshot_index, uint64_t l1_host_off, struct err *err)
{
  struct finding_batch *b = opaque;
  int r = 0;

  for (uint64_t i = 0; i < nr && r == 0; ++i) {
    const struct l2_table *t = l1[i] ? l2_table_at (k, l1[i] & L1E_OFF_MASK) : NULL;
    struct finding f = {
      .id = FINDING_L2_TABLE_NONSENSE, .snapshot_index = snapshot_index, .host_off = l1_host_off,
      .guest_off = i * k->g->l2_coverage, .guest_len = k->g->l2_coverage,
      .index = i, .found = l1[i], .count = 1,
    };

    if (!t || !t->fate)
      continue;
    if (t->fate == FINDING_L2_TABLE_NONSENSE && finding_batch_add (b, &f) < 0)
      return err_set (err, ENOMEM, "out of memory");
    r = bad_add (k, (struct bad_run) {
        .table_host_off = l1_host_off, .index = i, .count = 1, .in_l1 = true,
        .snapshot_index = snapshot_index, .why = t->fate,
        .fix = t->fate == FINDING_L2_TABLE_UNREADABLE ? BAD_UNREADABLE : BAD_LOST }, err);
  }
  return r;
}

static int
lose_tables (struct checker *k, struct err *err)
{
  const struct l2_table_vec *v = &k->l2.tables;
  struct finding_batch b;
  size_t i = 0;
  int r;

  while (i < v->len && !v->ptr[i].fate)
    ++i;
  if (i == v->len)
    return 0;
  set_incomplete (k);
  finding_batch_init (&b, &k->c->findings, k->g->cluster_size);
  r = for_each_l1 (k, lose_tables_of, &b, err);
  if (finding_batch_flush (&b) < 0 && r == 0)
    r = err_set (err, ENOMEM, "out of memory");
  return r;
}

static int
settle_l1_doubts (struct checker *k, struct err *err)
{
  int r = 0;

  for (size_t i = 0; i < k->l1_doubts.len && r == 0; ++i) {
    const struct l1_doubt *d = &k->l1_doubts.ptr[i];
    const struct l2_table *t = l2_table_at (k, d->l2_host_off);

    if (t == NULL || t->fate)
      continue;                 /* it has its run */
    r = bad_add (k, (struct bad_run) {
        .table_host_off = d->l1_host_off, .index = d->index, .count = 1, .in_l1 = true,
        .snapshot_index = d->snapshot_index, .why = FINDING_L1_ENTRY_RESERVED,
        .fix = l2_is_nonsense (t) ? BAD_LOST : BAD_RESERVED }, err);
  }
  return r;
}

/* What the entries of a table that is none say counts for nothing. */
static void
forget_dropped (struct checker *k)
{
  struct bad_run_vec *v = &k->c->bad;
  size_t n = 0;

  for (size_t i = 0; i < v->len; ++i) {
    const struct l2_table *t = v->ptr[i].in_l1 ? NULL : l2_table_at (k, v->ptr[i].table_host_off);

    if (!t || t->fate != FINDING_L2_TABLE_NONSENSE)
      v->ptr[n++] = v->ptr[i];
  }
  v->len = n;
}

/* --- bitmaps, snapshots and what else came too late */

static int
settle_bitmap (struct checker *k, const struct bitmap_doubt *d, struct err *err)
{
  struct owner bitmap = { .kind = OWNER_BITMAP, .snapshot_index = FINDING_ACTIVE,
                          .index = d->bitmap == UINT32_MAX ? 0 : d->bitmap }, winner;
  uint64_t end = d->ci + d->n;
  int r = 0;

  for (uint64_t ci = d->ci; ci < end && r == 0; ++ci) {
    const struct l2_table *none = l2_table_at (k, ci << k->g->cluster_bits);

    if (ownermap_get (k->meta, ci) < 2)
      continue;
    if (none && none->fate == FINDING_L2_TABLE_NONSENSE)
      r = conflict_add (k, ci << k->g->cluster_bits, k->g->cluster_size, bitmap, l2_owner (none),
                        err);
    else if (owner_at (k, ci, NULL, &winner)) {
      r = conflict_add (k, ci << k->g->cluster_bits, k->g->cluster_size, winner, bitmap, err);
      return r < 0 ? r : lose_bitmap (k, d, err);
    }
  }
  return r;
}

static int
compare_bitmap_doubts (const void *pa, const void *pb)
{
  const struct bitmap_doubt *a = pa, *b = pb;

  if (a->bitmap != b->bitmap)   /* the directory first */
    return a->bitmap + 1 < b->bitmap + 1 ? -1 : 1;
  return a->ci < b->ci ? -1 : a->ci > b->ci;
}

static int
settle_overlaps (struct checker *k, struct err *err)
{
  int r = 0;

  for (size_t i = 0; i < k->overlaps.len && r == 0; ++i) {
    const struct overlap *o = &k->overlaps.ptr[i];
    struct owner winner;

    for (uint64_t ci = o->ci; ci < o->ci + o->n; ++ci)
      if (ownermap_get (k->meta, ci) > 1 && owner_at (k, ci, &o->loser, &winner)) {
        r = conflict_add (k, ci << k->g->cluster_bits, k->g->cluster_size, winner, o->loser, err);
        break;
      }
  }
  return r;
}

int
check_contests (struct checker *k, struct err *err)
{
  int r = weigh_rt_doubts (k, err);

  if (k->l2_doubts.len)
    qsort (k->l2_doubts.ptr, k->l2_doubts.len, sizeof *k->l2_doubts.ptr, compare_doubts);
  if (k->bitmap_doubts.len)
    qsort (k->bitmap_doubts.ptr, k->bitmap_doubts.len, sizeof *k->bitmap_doubts.ptr,
           compare_bitmap_doubts);
  if (k->bitmap_data.len)
    qsort (k->bitmap_data.ptr, k->bitmap_data.len, sizeof *k->bitmap_data.ptr, compare_ci);
  if (r == 0)
    drop_nonsense (k);
  if (r == 0)
    r = settle_l2_doubts (k, err);
  if (r == 0)
    r = settle_rt_doubts (k, err);
  if (r == 0)
    r = lose_tables (k, err);
  if (r == 0)
    r = settle_l1_doubts (k, err);
  for (size_t i = 0; i < k->bitmap_doubts.len && r == 0; ++i)
    r = settle_bitmap (k, &k->bitmap_doubts.ptr[i], err);
  if (r == 0)
    r = settle_overlaps (k, err);
  if (r == 0)
    forget_dropped (k);
  return r;
}
