/* The guest's clusters: the entries of every L2 table, each table once.
 *
 * The common case is a table that maps one long run of host clusters, so runs
 * of entries that follow each other are found first and claimed as one range;
 * what is not part of a plain run is decoded and judged entry by entry.  All
 * metadata has been claimed before: only where a claim met another one is it
 * looked up whether that was metadata (T14) or just a shared cluster.
 *
 * Callbacks run on several threads at once; each gathers its findings and
 * figures by itself.  Figures are those of qemu-img check: taken from the
 * tables of the active disk, as often as its L1 table names them.
 *
 * What cannot be decided from one table alone is put off until all are known
 * (check-contests.c): entries that point at metadata, which may be none, and
 * entries with reserved bits, whose cluster may be somebody else's.  For that
 * each table's possible and impossible entries are counted.
 *
 * Deliberately not here: COPIED flags of standard entries, which depend on the
 * sum of all this (check-copied.c).
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "check/check-int.h"

/* Figures of all threads together. */
struct totals {
  _Atomic uint64_t allocated, compressed, fragmented, compressed_anywhere;
};

/* One L2 table on its way. */
struct walk {
  struct checker *k;
  const struct geom *g;
  const struct l2_table *t;
  uint64_t next_off;            /* where the next cluster would not be fragmented; 0 = unknown */
  uint64_t allocated, compressed, fragmented;
  uint32_t good, bad;           /* entries that are not 0 */
  bool uncopied;                /* saw a standard entry without COPIED */
  struct err *err;
  struct finding_batch batch;
};

uint64_t
zero_words (const uint8_t *p, uint64_t nr)
{
  uint64_t i = 0, w[8];

  for (; i + 8 <= nr; i += 8) {
    memcpy (w, p + i * 8, sizeof w);
    if (w[0] | w[1] | w[2] | w[3] | w[4] | w[5] | w[6] | w[7])
      break;
  }
  for (; i < nr; ++i) {
    memcpy (w, p + i * 8, 8);
    if (w[0])
      break;
  }
  return i;
}

uint64_t
entries_in_a_row (const uint8_t *p, uint64_t nr, uint64_t raw, const struct geom *g)
{
  uint64_t step = g->cluster_size, i = 1;
  /* Beyond these the offset would run over into the flags. */
  uint64_t limit = MIN (nr, (MAX_HOST_OFF - (raw & L2E_OFF_MASK)) >> g->cluster_bits);

  for (; i + 8 <= limit; i += 8) {
    uint64_t differ = 0, want = raw + i * step;

    for (unsigned j = 0; j < 8; ++j)
      differ |= load_be64 (p + (i + j) * 8) ^ (want + j * step);
    if (differ)
      break;
  }
  while (i < limit && load_be64 (p + i * 8) == raw + i * step)
    ++i;
  return i;
}

static uint64_t
guest_offset (const struct walk *w, uint64_t i)
{
  return (((uint64_t) w->t->l1_index << w->g->l2_bits) + i) << w->g->cluster_bits;
}

/* --- findings */

/* Entries [i, i+n) of the table; raw is the first. */
static int
entry_finding (struct walk *w, enum finding_id id, uint64_t i, uint64_t n, uint64_t raw,
               uint64_t expected)
{
  uint64_t guest_ci = ((uint64_t) w->t->l1_index << w->g->l2_bits) + i;
  struct finding f = {
    .id = id, .snapshot_index = w->t->snapshot_index, .host_off = w->t->host_off,
    .guest_off = guest_ci << w->g->cluster_bits, .guest_len = n << w->g->cluster_bits,
    .index = guest_ci, .found = raw, .expected = expected, .count = n,
  };

  if (finding_batch_add (&w->batch, &f) < 0)
    return err_set (w->err, ENOMEM, "out of memory");
  return 0;
}

/* Entries that are to be mended. */
static int
bad_entries (struct walk *w, enum finding_id id, enum bad_fix fix, uint64_t i, uint64_t n,
             uint64_t raw)
{
  int r = entry_finding (w, id, i, n, raw, 0);

  return r < 0 ? r : bad_add (w->k, (struct bad_run) {
      .table_host_off = w->t->host_off, .index = i, .count = n,
      .snapshot_index = FINDING_ACTIVE, .why = id, .fix = fix }, w->err);
}

/* Entries that hide which clusters they use. */
static int
bad_entry (struct walk *w, enum finding_id id, enum bad_fix fix, uint64_t i, uint64_t n,
           uint64_t raw)
{
  w->bad += n;
  set_incomplete (w->k);
  return bad_entries (w, id, fix, i, n, raw);
}

/* Entries [i, i+n) name the clusters [ci, ci+nr) and wait for a decision. */
static int
put_off (struct walk *w, enum finding_id why, uint64_t i, uint64_t n, uint64_t ci, uint64_t nr,
         uint64_t raw)
{
  struct l2_doubt d = { .table = w->t - w->k->l2.tables.ptr, .index = i, .count = n,
                        .ci = ci, .n = nr, .raw = raw, .why = why };
  int r = 1;

  {
    LOCK_SCOPE (&w->k->bad_lock);
    if (w->k->l2_doubts.len < bad_limit (w->k))
      r = l2_doubt_vec_push (&w->k->l2_doubts, d);
  }
  if (r < 0)
    return err_set (w->err, ENOMEM, "out of memory");
  /* Too many to wait: the next check has fewer. */
  if (r > 0 && why == FINDING_L2_ENTRY_OVERLAP)
    return bad_entries (w, why, BAD_LOST, i, n, raw);
  if (r > 0)
    w->k->c->bad_truncated = true;
  return 0;
}

/* Reserved bits, and the rest seems right.  The finding is certain, the fate is not. */
static int
reserved_bits (struct walk *w, uint64_t i, uint64_t ci, uint64_t nr, uint64_t raw)
{
  int r = entry_finding (w, FINDING_L2_ENTRY_RESERVED, i, 1, raw, 0);

  w->bad++;
  set_incomplete (w->k);
  return r < 0 ? r : put_off (w, FINDING_L2_ENTRY_RESERVED, i, 1, ci, nr, raw);
}

/* --- claims */

/* Some of the clusters [ci, ci+n) that entries i... name have another owner:
 * put off those where that is metadata.
 */
static int
report_overlaps (struct walk *w, uint64_t i, uint64_t ci, uint64_t n, uint64_t raw)
{
  uint64_t at = ci, stop;
  int r = 0;

  while (r == 0 && (at = ownermap_find (w->k->meta, at, ci + n, true)) < ci + n) {
    stop = ownermap_find (w->k->meta, at, ci + n, false);
    r = put_off (w, FINDING_L2_ENTRY_OVERLAP, i + (at - ci), stop - at, at, stop - at,
                 raw + ((at - ci) << w->g->cluster_bits));
    at = stop;
  }
  return r;
}

/* In an external data file each guest cluster has its one place. */
static int
check_place (struct walk *w, uint64_t i, uint64_t n, uint64_t host_off, uint64_t raw)
{
  if (host_off == guest_offset (w, i)) {
    w->good += n;
    return 0;
  }
  w->bad += n;
  return bad_entries (w, FINDING_DATA_FILE_PLACE_WRONG, BAD_PLACE, i, n, raw);
}

/* Entry i names the cluster in whose midst the file ends.  That is nothing to speak of
 * where the rest of it lies past the end of the disk or is not read.
 */
static int
report_cut (struct walk *w, uint64_t i, uint64_t raw, uint64_t bitmap)
{
  uint64_t guest_ci = ((uint64_t) w->t->l1_index << w->g->l2_bits) + i;
  uint64_t cut = w->k->c->file_size & (w->g->cluster_size - 1);
  unsigned first = cut >> (w->g->cluster_bits - SUBCLUSTER_BITS);

  if (w->g->extended_l2 && !((bitmap & BITMAP_ALL_ALLOC) >> first))
    return 0;
  if ((raw & L2E_ZERO) || (guest_ci << w->g->cluster_bits) + cut >= w->k->c->header.size)
    return 0;
  return bad_entries (w, FINDING_CLUSTER_CUT, BAD_CUT, i, 1, raw);
}

/* Standard entries [i, i+n) name the n clusters from host_off on; bitmap is the first's. */
static int
claim_standard (struct walk *w, uint64_t i, uint64_t n, uint64_t host_off, uint64_t raw,
                uint64_t bitmap)
{
  uint64_t ci = host_off >> w->g->cluster_bits, room = 0;
  bool conflict = false;
  int r = 0;

  if (w->g->data_file)
    return check_place (w, i, n, host_off, raw);
  if (host_off < w->k->end)
    room = (w->k->end - host_off) >> w->g->cluster_bits;
  if (n > room) {
    r = bad_entry (w, FINDING_L2_ENTRY_OUTSIDE, BAD_LOST, i + room, n - room,
                   raw + (room << w->g->cluster_bits));
    n = room;
  }
  if (r < 0 || n == 0)
    return r;
  w->good += n;
  r = ownermap_claim (w->k->c->owners, ci, n, w->t->weight, &conflict, w->err);
  if (r == 0 && w->k->cut_ci - ci < n)
    r = report_cut (w, i + (w->k->cut_ci - ci), raw, bitmap);
  return r == 0 && conflict ? report_overlaps (w, i, ci, n, raw) : r;
}

static int
claim_compressed (struct walk *w, uint64_t i, struct l2_entry *e, uint64_t raw, uint64_t bitmap)
{
  uint64_t ci, n;
  bool conflict = false;
  int r = 0;

  if (!range_fits (e->host_off, e->host_len, w->k->end)) {
    if (!clip_whole_stream (w->k, e, w->k->end))
      return bad_entry (w, FINDING_L2_ENTRY_OUTSIDE, BAD_LOST, i, 1, raw);
    r = entry_finding (w, FINDING_L2_ENTRY_OUTSIDE, i, 1, raw, 0);
    if (r == 0)
      r = shorten_stream (w->k, w->t, FINDING_L2_ENTRY_OUTSIDE, i, w->k->end, w->err);
    if (r < 0)
      return r;
  }
  ci = e->host_off >> w->g->cluster_bits;
  n = ((e->host_off + e->host_len - 1) >> w->g->cluster_bits) - ci + 1;
  r = ownermap_claim (w->k->c->owners, ci, n, w->t->weight, &conflict, w->err);
  if (r == 0 && bitmap)
    r = reserved_bits (w, i, ci, n, raw);
  else
    w->good++;
  if (r == 0 && conflict && ownermap_find (w->k->meta, ci, ci + n, true) < ci + n)
    r = put_off (w, FINDING_L2_ENTRY_OVERLAP, i, 1, ci, n, raw);
  return r;
}

/* --- figures */

static void
count_standard (struct walk *w, uint64_t n, uint64_t host_off)
{
  w->allocated += n;
  if (w->next_off && host_off != w->next_off)
    w->fragmented++;
  w->next_off = host_off + (n << w->g->cluster_bits);
}

/* --- entries */

static int
check_compressed (struct walk *w, uint64_t i, uint64_t raw, uint64_t bitmap,
                  struct l2_entry *e)
{
  int r = 0;

  w->compressed++;
  w->fragmented++;              /* by nature, says qemu-img */
  w->allocated++;
  if (e->copied) {
    r = entry_finding (w, FINDING_L2_COPIED_WRONG, i, 1, raw, 0);
    if (!w->t->active_weight)
      atomic_store (&w->k->copied_in_snapshots, true);
  }
  if (r < 0)
    return r;
  if (w->g->data_file)          /* it can hold none: one bit too many, and the place is known */
    return bad_entry (w, FINDING_L2_ENTRY_RESERVED, BAD_PLACE, i, 1, raw);
  if (e->reserved)
    return bad_entry (w, FINDING_L2_ENTRY_RESERVED, BAD_LOST, i, 1, raw);
  return claim_compressed (w, i, e, raw, bitmap);
}

/* Is the subcluster bitmap one that can't be? */
static bool
bitmap_invalid (const struct geom *g, const struct l2_entry *e, uint64_t bitmap)
{
  uint32_t allocated = bitmap, zero = bitmap >> 32;
  bool has_host = e->kind == CLUSTER_NORMAL || e->kind == CLUSTER_ZERO_ALLOC;

  return g->extended_l2 && ((has_host && (allocated & zero)) || (!has_host && allocated));
}

/* An entry of an image with an external data file that has a place there. */
static int
check_data_file_entry (struct walk *w, uint64_t i, uint64_t raw, uint64_t reserved,
                       uint64_t host_off)
{
  if (reserved)
    return bad_entry (w, FINDING_L2_ENTRY_RESERVED, BAD_PLACE, i, 1, raw);
  if (!IS_ALIGNED (host_off, w->g->cluster_size))
    return bad_entry (w, FINDING_L2_ENTRY_UNALIGNED, BAD_PLACE, i, 1, raw);
  return check_place (w, i, 1, host_off, raw);
}

static int
check_entry (struct walk *w, uint64_t i, uint64_t raw, uint64_t bitmap)
{
  struct l2_entry e = l2_entry_decode (raw, bitmap, w->g);
  uint64_t reserved = e.reserved;
  int r = 0;

  if (e.kind == CLUSTER_COMPRESSED)
    return check_compressed (w, i, raw, bitmap, &e);
  if (w->g->version < 3)
    reserved |= raw & L2E_ZERO;
  if (bitmap_invalid (w->g, &e, bitmap))
    r = bad_entries (w, FINDING_SUBCLUSTERS_INVALID, BAD_SUBCLUSTERS, i, 1, raw);
  if (r < 0)
    return r;
  if (e.kind == CLUSTER_UNALLOCATED || e.kind == CLUSTER_ZERO_PLAIN || !l2_has_host (raw, w->g)) {
    w->good += !reserved;
    return reserved ? bad_entry (w, FINDING_L2_ENTRY_RESERVED, BAD_LOST, i, 1, raw) : 0;
  }
  count_standard (w, 1, e.host_off);
  w->uncopied |= !e.copied;
  if (w->g->data_file)
    return check_data_file_entry (w, i, raw, reserved, e.host_off);
  if (!IS_ALIGNED (e.host_off, w->g->cluster_size)) {
    if (reserved)
      r = entry_finding (w, FINDING_L2_ENTRY_RESERVED, i, 1, raw, 0);
    return r < 0 ? r : bad_entry (w, FINDING_L2_ENTRY_UNALIGNED, BAD_LOST, i, 1, raw);
  }
  r = claim_standard (w, i, 1, e.host_off, raw, bitmap);
  if (r < 0 || !reserved)
    return r;
  w->good -= e.host_off < w->k->end;
  return e.host_off < w->k->end
           ? reserved_bits (w, i, e.host_off >> w->g->cluster_bits, 1, raw)
           : entry_finding (w, FINDING_L2_ENTRY_RESERVED, i, 1, raw, 0);
}

/* A plain entry, of which there may be many in a row. */
static inline bool
is_plain (const struct geom *g, uint64_t raw)
{
  uint64_t flags = raw & ~(L2E_OFF_MASK | ENTRY_COPIED), host_off = raw & L2E_OFF_MASK;

  return (flags == 0 || (flags == L2E_ZERO && g->version >= 3)) && host_off != 0 &&
         IS_ALIGNED (host_off, g->cluster_size);
}

static int
walk_standard (struct walk *w, const uint8_t *table, uint64_t nr)
{
  uint64_t i = 0, n;
  int r = 0;

  while (i < nr && r == 0) {
    uint64_t raw = load_be64 (table + i * 8);

    n = 1;
    if (raw == 0)
      n = zero_words (table + i * 8, nr - i);
    else if (is_plain (w->g, raw)) {
      n = entries_in_a_row (table + i * 8, nr - i, raw, w->g);
      count_standard (w, n, raw & L2E_OFF_MASK);
      w->uncopied |= !(raw & ENTRY_COPIED);
      r = claim_standard (w, i, n, raw & L2E_OFF_MASK, raw, 0);
    }
    else if (raw == L2E_ZERO && w->g->version >= 3)
      w->good++;
    else
      r = check_entry (w, i, raw, 0);
    i += n;
  }
  return r;
}

static int
walk_extended (struct walk *w, const uint8_t *table, uint64_t nr)
{
  int r = 0;

  for (uint64_t i = 0; i < nr && r == 0; ++i) {
    uint64_t raw = l2_raw (table, i, w->g), bitmap = l2_bitmap (table, i, w->g);

    if (raw | bitmap)
      r = check_entry (w, i, raw, bitmap);
  }
  return r;
}

/* --- tables */

static int
report_unreadable (struct checker *k, struct l2_table *t, struct err *err)
{
  t->fate = FINDING_L2_TABLE_UNREADABLE;
  set_incomplete (k);
  return add_finding (k, (struct finding) {
      .id = FINDING_L2_TABLE_UNREADABLE, .snapshot_index = t->snapshot_index,
      .host_off = t->host_off, .guest_off = t->l1_index * k->g->l2_coverage,
      .guest_len = k->g->l2_coverage, .index = t->l1_index }, err);
}

/* The walk over a table of which only the first nr entries are in the file. */
static int
walk_table (struct walk *w, const uint8_t *table)
{
  uint64_t nr = w->g->l2_entries, room = w->k->c->file_size - w->t->host_off;
  int r = 0;

  if (room < w->g->cluster_size) {
    nr = room / w->g->l2e_size;
    r = bad_entry (w, FINDING_L2_TABLE_CUT, BAD_LOST, nr, w->g->l2_entries - nr, 0);
    w->bad = 0;                 /* they are missing, which says nothing against the others */
  }
  if (r < 0)
    return r;
  return w->g->extended_l2 ? walk_extended (w, table, nr) : walk_standard (w, table, nr);
}

static int
check_l2_table (struct checker *k, void *opaque, size_t i, const uint8_t *buf, int r,
                struct err *err)
{
  struct l2_table *t = &k->l2.tables.ptr[i];
  struct totals *sum = opaque;
  struct walk w;

  if (r < 0)
    return report_unreadable (k, t, err);
  w.k = k;
  w.g = k->g;
  w.t = t;
  w.next_off = w.allocated = w.compressed = w.fragmented = 0;
  w.good = w.bad = 0;
  w.uncopied = false;
  w.err = err;
  finding_batch_init (&w.batch, &k->c->findings, k->g->cluster_size);
  r = walk_table (&w, buf);
  t->good = w.good;
  t->bad = w.bad;
  if (finding_batch_flush (&w.batch) < 0 && r == 0)
    r = err_set (err, ENOMEM, "out of memory");
  atomic_fetch_add (&sum->allocated, w.allocated * t->active_weight);
  atomic_fetch_add (&sum->compressed, w.compressed * t->active_weight);
  atomic_fetch_add (&sum->fragmented, w.fragmented * t->active_weight);
  atomic_fetch_add (&sum->compressed_anywhere, w.compressed);
  if (w.uncopied && t->active_weight)
    atomic_store_explicit (&k->look_at_copied, true, memory_order_relaxed);
  return r;
}

int
check_data (struct checker *k, struct err *err)
{
  const struct l2_table_vec *v = &k->l2.tables;
  CLEANUP_FREE uint64_t *host_offs = NULL;
  struct totals sum = { 0 };
  int r;

  if (v->len == 0)
    return 0;
  host_offs = malloc (v->len * sizeof *host_offs);
  if (host_offs == NULL)
    return err_set (err, ENOMEM, "out of memory");
  for (size_t i = 0; i < v->len; ++i)
    host_offs[i] = v->ptr[i].host_off;
  r = read_clusters (k, host_offs, v->len, "data", check_l2_table, &sum, err);
  k->c->stats.allocated_clusters = sum.allocated;
  k->c->stats.compressed_clusters = sum.compressed;
  k->c->stats.fragmented_clusters = sum.fragmented;
  k->c->stats.compressed_anywhere = sum.compressed_anywhere;
  return r;
}
