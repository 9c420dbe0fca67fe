/* Clusters with a refcount and no reference: leaks, or evidence?
 *
 * A writer that is killed leaves leaks, and an image with leaks is sound.  But a
 * lost L1 entry or L2 table leaves leaks as well, and they are then all that
 * there is of the data.  Told apart are they by what a writer that keeps to
 * I2..I4 (QEMU does, and so do we) cannot leave behind:
 *
 *   O01  A table that nothing names, but that names orphans itself.  Writers link
 *        a new table while it is empty, or a copy of one that is still in use.
 *   O02  Leaks beside an entry that was lost: they may be what it named.  And leaks
 *        in one stretch as long as one table maps (at least 64 MiB, at most 512
 *        MiB): they were a table's that has been overwritten.
 *
 * A refcount table that was replaced by a larger one names refcount blocks, each of which mostly lies
 * in the stretch of the file that it covers: its entries keep step with that.
 *
 * A leaked bitmap table or the L1 table of a snapshot is an array
 * of offsets too.  In an L2 table of the active disk an entry for a cluster of
 * its own is COPIED, in those never; without that flag (tables that only a
 * snapshot had), it takes many entries to be convincing.  A leaked cluster with
 * guest data that is itself an L2 table, of an image inside the guest, names
 * clusters that are in use here, or outside: at least half of what is named must have
 * lost a reference.
 *
 * LIMIT: a snapshot deletion or a shrinking that was cut off leaves what a lost
 * snapshot leaves; nothing in the image tells them apart, so it is O01.
 *
 * It costs nothing without leaks.  With them, the first 512 bytes of up to
 * MAX_HEADS clusters are read, spread evenly over all of them (tables are one in
 * some thousand, so where there are too many clusters there are many tables), and
 * whole clusters only where these bytes could be a table's.
 *
 * Where refcounts are lost, everything without reference that is not a hole in the
 * file is a candidate; only tables and what they name are then called orphans.
 *
 * Deliberately not here: regions and their order (core/heal/orphans.c).
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "check/check-int.h"

#define MAX_HEADS  65536u
#define FULL_BYTES (UINT64_C (256) << 20)       /* of whole clusters, at the most */
#define FEW_NAMED  256u                         /* entries: too few without COPIED */
#define MIN_STRETCH (UINT64_C (64) << 20)       /* bytes */
#define MAX_STRETCH (UINT64_C (512) << 20)

/* --- questions */

uint64_t
orphan_findings (const struct check *c)
{
  return c->findings.totals[FINDING_ORPHANED_TABLES] + c->findings.totals[FINDING_ORPHANED_DATA];
}

bool
orphan_unknown (const struct check *c, uint64_t ci)
{
  uint64_t index = ci >> c->geom.rb_bits;

  return !c->rt.usable || (index < c->rt.nr_entries && c->rt.states[index] == RB_LOST);
}

bool
orphan_is (const struct check *c, uint64_t ci)
{
  if (c->excess && ownermap_get (c->excess, ci) == EXCESS_ORPHAN)
    return true;
  return orphan_unknown (c, ci) && ownermap_get (c->owners, ci) == 0;
}

uint64_t
orphan_next (const struct check *c, uint64_t ci, uint64_t end, uint64_t *stop)
{
  *stop = end;
  if (!c->excess)
    return end;
  do
    ci = ownermap_find (c->excess, ci, end, true);
  while (ci < end && ownermap_get (c->excess, ci) != EXCESS_ORPHAN && ++ci < end);
  if (ci < end) {
    uint64_t n = 1;

    while (ci + n < end && ownermap_get (c->excess, ci + n) == EXCESS_ORPHAN)
      ++n;
    *stop = ci + n;
  }
  return ci;
}

/* --- does it look like a table? */

static bool
all_orphans (const struct check *c, uint64_t ci, uint64_t n)
{
  for (uint64_t i = 0; i < n; ++i)
    if (!orphan_is (c, ci + i))
      return false;
  return true;
}

static bool
any_excess (const struct check *c, uint64_t ci)
{
  return (c->excess && ownermap_get (c->excess, ci) > 0) || orphan_is (c, ci);
}

/* With an external data file, offsets lie in that, usually where the guest's do. */
static void
tally_in_data_file (struct l2_tally *t, const struct check *c, const struct l2_entry *e,
                    uint64_t index)
{
  bool in_place = (e->host_off >> c->geom.cluster_bits) % c->geom.l2_entries == index;

  t->bad += e->host_off >= c->header.size;
  t->named++;
  t->orphans += in_place;
  t->excess += in_place;
  t->copied += e->copied;
}

/* Does what the entry names lie as many stretches of a refcount block behind what the one before
 * names as it does entries?
 */
static void
tally_step (struct l2_tally *t, const struct geom *g, uint64_t host_off, uint64_t index)
{
  uint64_t step = (host_off >> (g->cluster_bits + g->rb_bits)) - index * (g->l2e_size / 8);

  t->in_step += t->named == 1 || step == t->last_step;
  t->last_step = step;
}

static void
tally_entry (struct l2_tally *t, const struct check *c, uint64_t raw, uint64_t bitmap,
             uint64_t index)
{
  const struct geom *g = &c->geom;
  struct l2_entry e = l2_entry_decode (raw, bitmap, g);
  uint64_t end = ROUND_UP (c->file_size, g->cluster_size), ci, n;
  bool compressed = e.kind == CLUSTER_COMPRESSED;

  t->used++;
  if (e.kind == CLUSTER_ZERO_PLAIN && !e.reserved && !e.copied && g->version >= 3)
    return;
  if (e.reserved || e.kind == CLUSTER_ZERO_PLAIN || e.kind == CLUSTER_UNALLOCATED ||
      (compressed ? e.copied || g->data_file : !IS_ALIGNED (e.host_off, g->cluster_size) ||
                                               raw == t->last_raw)) {
    t->bad++;
    return;
  }
  if (g->data_file) {
    tally_in_data_file (t, c, &e, index);
    return;
  }
  if (e.host_off < g->cluster_size || !range_fits (e.host_off, e.host_len, end)) {
    t->bad++;
    return;
  }
  ci = e.host_off >> g->cluster_bits;
  n = ((e.host_off + e.host_len - 1) >> g->cluster_bits) - ci + 1;
  t->named++;
  tally_step (t, g, e.host_off, index);
  t->copied += e.copied;
  t->compressed += compressed;
  t->orphans += all_orphans (c, ci, n);
  t->excess += any_excess (c, ci);
}

void
l2_tally_add (struct l2_tally *t, const struct check *c, const uint8_t *buf, uint64_t len)
{
  uint64_t nr = len / c->geom.l2e_size;

  for (uint64_t i = 0; i < nr; ++i) {
    uint64_t raw = l2_raw (buf, i, &c->geom), bitmap = l2_bitmap (buf, i, &c->geom);

    if (raw | bitmap)
      tally_entry (t, c, raw, bitmap, i);
    t->last_raw = raw;
  }
}

/* Some of its entries may have rotted. */
bool
l2_tally_possible (const struct l2_tally *t)
{
  return t->bad * 4 <= t->used;
}

bool
l2_tally_lost_table (const struct l2_tally *t, const struct check *c)
{
  uint64_t many = MIN (FEW_NAMED, c->geom.l2_entries / 2);

  /* An old refcount table: at least half of three or more entries keep step. */
  if (t->copied == 0 && t->compressed == 0 && t->named > 2 && t->in_step * 2 >= t->named)
    return false;
  return l2_tally_possible (t) && t->orphans > 0 && t->excess * 2 >= t->named &&
         (t->copied > 0 || t->compressed > 0 || t->orphans >= many);
}

/* --- candidates */

typedef int (*run_fn) (void *opaque, uint64_t ci, uint64_t n);

struct extents_walk {
  struct checker *k;
  run_fn fn;
  void *opaque;
};

/* Of an extent with data: what has no reference, where refcounts are lost. */
static int
unknown_extent (void *opaque, uint64_t off, uint64_t len, unsigned kind)
{
  struct extents_walk *w = opaque;
  const struct check *c = w->k->c;
  unsigned bits = w->k->g->cluster_bits;
  uint64_t ci = off >> bits, end = ((off + len - 1) >> bits) + 1, stop;
  int r = 0;

  if (progress_cancelled (w->k->progress))
    return -ECANCELED;
  if (kind & (BDEV_HOLE | BDEV_ZERO))
    return 0;
  for (; r == 0 && (ci = ownermap_find (c->owners, ci, end, false)) < end; ci = stop) {
    uint64_t block_end = ((ci >> w->k->g->rb_bits) + 1) << w->k->g->rb_bits;

    stop = ownermap_find (c->owners, ci, MIN (end, block_end), true);
    if (orphan_unknown (c, ci))
      r = w->fn (w->opaque, ci, stop - ci);
  }
  return r;
}

static bool
any_unknown (const struct check *c)
{
  if (!c->rt.usable)
    return true;
  return memchr (c->rt.states, RB_LOST, c->rt.nr_entries) != NULL;
}

/* Call fn for runs of all candidates, in two ascending sequences. */
static int
each_candidate (struct checker *k, run_fn fn, void *opaque, struct err *err)
{
  struct extents_walk w = { .k = k, .fn = fn, .opaque = opaque };
  uint64_t end = k->end >> k->g->cluster_bits, stop = 0, ci;
  int r = 0;

  while (r == 0 && (ci = orphan_next (k->c, stop, end, &stop)) < end)
    r = fn (opaque, ci, stop - ci);
  if (r < 0)
    return err_set (err, -r, r == -ECANCELED ? "the check was cancelled" : "out of memory");
  if (k->c->file_size > 0 && any_unknown (k->c)) {
    r = bdev_extents (k->d, 0, k->c->file_size, unknown_extent, &w, err);
    if (r == -ECANCELED || r == -ENOMEM)
      err_set (err, -r, r == -ECANCELED ? "the check was cancelled" : "out of memory");
  }
  return r;
}

/* An even choice of nr among all: one from each nr-th part, somewhere in it, since
 * tables often come at equal distances.
 */
struct sample {
  uint64_t total, nr;
  uint64_t seen, taken;         /* candidates gone by, and chosen of them */
  struct u64_vec offs;          /* bytes: the chosen ones */
  unsigned cluster_bits;
};

static uint64_t
sample_target (const struct sample *s)
{
  uint64_t per = s->total / s->nr, rest = s->total % s->nr, i = s->taken;
  uint64_t first = i * per + MIN (i, rest), width = per + (i < rest);

  return first + (i * UINT64_C (0x9e3779b97f4a7c15) >> 32) % width;
}

static int
sample_run (void *opaque, uint64_t ci, uint64_t n)
{
  struct sample *s = opaque;
  uint64_t target;

  while (s->taken < s->nr && (target = sample_target (s)) < s->seen + n) {
    if (u64_vec_push (&s->offs, (ci + (target - s->seen)) << s->cluster_bits) < 0)
      return -ENOMEM;
    s->taken++;
  }
  s->seen += n;
  return 0;
}

static int
count_run (void *opaque, uint64_t ci, uint64_t n)
{
  struct sample *s = opaque;

  s->total += n;
  return 0;
}

/* --- looking at them */

struct scan {
  struct checker *k;
  const uint64_t *offs;         /* what is being read */
  pthread_mutex_t lock;
  /* protected by lock */
  struct u64_vec likely, zeros; /* clusters whose head is a table's, or zeros */
  struct u64_vec tables;        /* clusters that are lost tables */
};

static int
head_read (void *opaque, size_t i, const void *buf, int r, const struct err *why)
{
  struct scan *s = opaque;
  struct l2_tally t = { 0 };

  if (progress_cancelled (s->k->progress))
    return -ECANCELED;
  if (r < 0)
    return 0;                   /* nothing to see there */
  l2_tally_add (&t, s->k->c, buf, MIN (ORPHAN_HEAD_BYTES, s->k->g->cluster_size));
  if (!l2_tally_possible (&t))
    return 0;
  LOCK_SCOPE (&s->lock);
  return u64_vec_push (t.used ? &s->likely : &s->zeros, s->offs[i]);
}

static int
read_heads (struct scan *s, const struct u64_vec *offs, struct err *err)
{
  size_t len = MIN (ORPHAN_HEAD_BYTES, s->k->g->cluster_size);
  struct bdev_range ranges[1024];
  int r = 0;

  for (size_t i = 0; r == 0 && i < offs->len; i += 1024) {
    size_t n = MIN (offs->len - i, (size_t) 1024);

    progress_update (s->k->progress, "orphans", i, offs->len);
    for (size_t j = 0; j < n; ++j)
      ranges[j] = (struct bdev_range) { offs->ptr[i + j], len };
    s->offs = offs->ptr + i;
    r = bdev_read_many (s->k->d, ranges, n, head_read, s, err);
  }
  if (r == -ECANCELED)
    err_set (err, ECANCELED, "the check was cancelled");
  return r;
}

static int
judge_cluster (struct checker *k, void *opaque, size_t i, const uint8_t *buf, int r,
               struct err *err)
{
  struct scan *s = opaque;
  struct l2_tally t = { 0 };

  if (r < 0)
    return 0;
  l2_tally_add (&t, k->c, buf, k->g->cluster_size);
  if (!l2_tally_lost_table (&t, k->c))
    return 0;
  LOCK_SCOPE (&s->lock);
  return u64_vec_push (&s->tables, s->offs[i]) < 0 ? err_set (err, ENOMEM, "out of memory") : 0;
}

static int
compare_off (const void *pa, const void *pb)
{
  uint64_t a = *(const uint64_t *) pa, b = *(const uint64_t *) pb;

  return a < b ? -1 : a > b;
}

/* Read these clusters, or as many of them as *room allows, spread over all. */
static int
judge_clusters (struct scan *s, struct u64_vec *offs, uint64_t *room, struct err *err)
{
  size_t nr = MIN (offs->len, *room);

  if (nr == 0) {
    s->k->c->orphans.sampled |= offs->len > 0;
    return 0;
  }
  if (offs->len)
    qsort (offs->ptr, offs->len, sizeof *offs->ptr, compare_off);
  for (size_t i = 0; nr < offs->len && i < nr; ++i)
    offs->ptr[i] = offs->ptr[(uint64_t) i * offs->len / nr];
  s->k->c->orphans.sampled |= nr < offs->len;
  *room -= nr;
  s->offs = offs->ptr;
  return read_clusters (s->k, offs->ptr, nr, "orphans", judge_cluster, s, err);
}

/* --- findings */

static int
orphan_finding (struct checker *k, enum finding_id id, uint64_t ci, uint64_t found,
                struct err *err)
{
  return add_finding (k, (struct finding) {
      .id = id, .snapshot_index = FINDING_ACTIVE, .host_off = ci << k->g->cluster_bits,
      .guest_off = FINDING_NO_OFF, .found = found }, err);
}

/* One of a lost table's clusters whose refcount is lost, too. */
static int
mark_unknown (struct checker *k, uint64_t ci, struct err *err)
{
  if (!orphan_unknown (k->c, ci) || ownermap_get (k->c->owners, ci) > 0 ||
      ownermap_get (k->c->excess, ci) > 0)
    return 0;
  return ownermap_claim (k->c->excess, ci, 1, EXCESS_ORPHAN, NULL, err);
}

/* The table and what it names, where only the table says that these are used. */
static int
mark_table (struct checker *k, void *opaque, size_t i, const uint8_t *buf, int r,
            struct err *err)
{
  struct scan *s = opaque;
  const struct geom *g = k->g;
  LOCK_SCOPE (&s->lock);

  if (r < 0)
    return 0;
  r = mark_unknown (k, s->tables.ptr[i] >> g->cluster_bits, err);
  for (uint64_t j = 0; r == 0 && j < g->l2_entries && !g->data_file; ++j) {
    struct l2_entry e = l2_entry_decode (l2_raw (buf, j, g), l2_bitmap (buf, j, g), g);
    bool named = e.kind == CLUSTER_COMPRESSED || e.host_off != 0;

    if (!named || e.reserved || !range_fits (e.host_off, e.host_len, k->end))
      continue;
    for (uint64_t off = ROUND_DOWN (e.host_off, g->cluster_size);
         r == 0 && off < e.host_off + e.host_len; off += g->cluster_size)
      r = mark_unknown (k, off >> g->cluster_bits, err);
  }
  return r;
}

static int
report_tables (struct scan *s, struct err *err)
{
  struct checker *k = s->k;
  int r = 0;

  k->c->orphans.tables = s->tables.len;
  if (s->tables.len == 0)
    return 0;
  qsort (s->tables.ptr, s->tables.len, sizeof *s->tables.ptr, compare_off);
  for (size_t i = 0; r == 0 && i < s->tables.len; ++i)
    r = orphan_finding (k, FINDING_ORPHANED_TABLES, s->tables.ptr[i] >> k->g->cluster_bits, 0,
                        err);
  if (r == 0 && any_unknown (k->c))
    r = read_clusters (k, s->tables.ptr, s->tables.len, "orphans", mark_table, s, err);
  return r;
}

/* Was something lost whose clusters the leaks may be? */
static bool
entries_lost (const struct check *c)
{
  static const enum finding_id lost[] = {
    FINDING_L1_OUTSIDE, FINDING_L1_TOO_SMALL, FINDING_L1_CUT, FINDING_L1_ENTRY_RESERVED,
    FINDING_L1_ENTRY_UNALIGNED, FINDING_L1_ENTRY_OUTSIDE, FINDING_L1_ENTRY_OVERLAP,
    FINDING_L2_TABLE_SHARED, FINDING_L2_TABLE_UNREADABLE, FINDING_L1_UNREADABLE,
    FINDING_L2_TABLE_NONSENSE, FINDING_L2_TABLE_CUT,
    FINDING_L2_ENTRY_UNALIGNED, FINDING_L2_ENTRY_OUTSIDE, FINDING_L2_ENTRY_OVERLAP,
    FINDING_SNAPSHOT_TABLE_OUTSIDE, FINDING_SNAPSHOT_TABLE_UNREADABLE, FINDING_SNAPSHOT_ENTRY_BAD, FINDING_SNAPSHOT_L1_OUTSIDE,
    FINDING_SNAPSHOT_OVERLAP, FINDING_TOO_MANY_SNAPSHOTS,
  };

  for (size_t i = 0; i < sizeof lost / sizeof *lost; ++i)
    if (findings_has (&c->findings, lost[i]))
      return true;
  return false;
}

/* Metadata that was written between (at most this much) does not end a stretch. */
#define STRETCH_GAP 4           /* clusters */

static int
report_data (struct checker *k, struct err *err)
{
  struct check *c = k->c;
  uint64_t end = k->end >> k->g->cluster_bits, stop = 0, ci, first = 0, last = 0, n = 0;
  uint64_t table = (uint64_t) k->g->l2_entries << k->g->cluster_bits;
  uint64_t enough = MIN (MAX (table, MIN_STRETCH), MAX_STRETCH) >> k->g->cluster_bits;
  int r = 0;

  if (c->orphans.clusters == 0)
    return 0;
  if (entries_lost (c))
    return orphan_finding (k, FINDING_ORPHANED_DATA, orphan_next (c, 0, end, &stop),
                           c->orphans.clusters, err);
  do {
    ci = orphan_next (c, stop, end, &stop);
    if (n > 0 && (ci == end || ci > last + STRETCH_GAP)) {
      if (n >= enough)
        r = orphan_finding (k, FINDING_ORPHANED_DATA, first, n, err);
      n = 0;
    }
    if (n == 0)
      first = ci;
    n += stop - ci;
    last = stop;
  } while (r == 0 && ci < end);
  return r;
}

/* --- all together */

static int
look (struct checker *k, struct scan *s, struct sample *sample, struct err *err)
{
  uint64_t room = MAX (FULL_BYTES >> k->g->cluster_bits, UINT64_C (64));
  int r = each_candidate (k, count_run, sample, err);

  if (r < 0 || sample->total == 0)
    return r;
  sample->nr = MIN (sample->total, MAX_HEADS);
  k->c->orphans.sampled = sample->nr < sample->total;
  r = each_candidate (k, sample_run, sample, err);
  if (r == 0)
    r = read_heads (s, &sample->offs, err);
  if (r == 0)
    r = judge_clusters (s, &s->likely, &room, err);
  if (r == 0)
    r = judge_clusters (s, &s->zeros, &room, err);
  return r;
}

/* With keep_leaks, or with orphans and keep_orphans, everything stays. */
static void
settle_kept (struct checker *k)
{
  struct check *c = k->c;

  if (c->kept && !c->incomplete && !k->keep_leaks && orphan_findings (c) == 0) {
    ownermap_free (c->kept);
    c->kept = NULL;
  }
}

int
check_orphans (struct checker *k, struct err *err)
{
  struct sample sample = { .cluster_bits = k->g->cluster_bits };
  struct scan s = { .k = k };
  uint64_t end = k->end >> k->g->cluster_bits, stop = 0, ci;
  int r = 0;

  if (k->c->excess == NULL)
    r = ownermap_new (k->memory_limit, &k->c->excess, err);
  if (r < 0)
    return r;
  while ((ci = orphan_next (k->c, stop, end, &stop)) < end)
    k->c->orphans.clusters += stop - ci;
  pthread_mutex_init (&s.lock, NULL);
  r = look (k, &s, &sample, err);
  if (r == 0)
    r = report_data (k, err);
  if (r == 0)
    r = report_tables (&s, err);
  pthread_mutex_destroy (&s.lock);
  vec_reset (&sample.offs);
  vec_reset (&s.likely);
  vec_reset (&s.zeros);
  vec_reset (&s.tables);
  settle_kept (k);
  return r;
}
