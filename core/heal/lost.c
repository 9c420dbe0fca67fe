/* See lost.h.  What an entry maps depends on who names its table: an L2 table that
 * five snapshots share loses its range in each of them.  So the L1 tables are walked,
 * and the check's list is looked up for each table that they name.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/endian.h"
#include "base/num.h"
#include "dev/ahead.h"
#include "fmt/entry.h"
#include "heal/lost.h"

void
lost_init (struct lost *l)
{
  memset (l, 0, sizeof *l);
}

void
lost_reset (struct lost *l)
{
  for (size_t i = 0; i < l->names.len; ++i)
    free (l->names.ptr[i]);
  for (size_t i = 0; i < l->snapshots.len; ++i) {
    free (l->snapshots.ptr[i].id);
    free (l->snapshots.ptr[i].name);
  }
  vec_reset (&l->names);
  vec_reset (&l->snapshots);
  vec_reset (&l->ranges);
  lost_init (l);
}

/* A copy that lives as long as l.  Ranges come disk by disk, so the last two
 * names are nearly always the right ones.
 */
static const char *
intern (struct lost *l, const char *s)
{
  char *copy;

  for (size_t i = l->names.len, n = 0; i > 0 && n < 2; --i, ++n)
    if (strcmp (l->names.ptr[i - 1], s) == 0)
      return l->names.ptr[i - 1];
  copy = strdup (s);
  if (copy && lost_name_vec_push (&l->names, copy) < 0) {
    free (copy);
    copy = NULL;
  }
  return copy;
}

int
lost_add (struct lost *l, const struct snapshot *snapshot, uint64_t guest_off, uint64_t guest_len,
          int why)
{
  struct lost_range r = { .guest_off = guest_off, .guest_len = guest_len, .why = why };
  struct lost_range *last = l->ranges.len ? &l->ranges.ptr[l->ranges.len - 1] : NULL;

  if (guest_len == 0)
    return 0;
  if (snapshot) {
    r.snapshot_id = intern (l, snapshot->id);
    r.snapshot_name = r.snapshot_id ? intern (l, snapshot->name) : NULL;
    if (!r.snapshot_name)
      return -ENOMEM;
  }
  if (last && last->why == why && last->snapshot_id == r.snapshot_id
      && last->snapshot_name == r.snapshot_name
      && last->guest_off + last->guest_len == guest_off) {
    last->guest_len += guest_len;
    return 0;
  }
  return lost_range_vec_push (&l->ranges, r);
}

int
lost_add_snapshot (struct lost *l, const char *id, const char *name, int why)
{
  struct lost_snapshot s = { strdup (id ? id : ""), strdup (name ? name : ""), why };

  if (s.id && s.name && lost_snapshot_vec_push (&l->snapshots, s) == 0)
    return 0;
  free (s.id);
  free (s.name);
  return -ENOMEM;
}

/* --- in order */

static int
compare_names (const char *a, const char *b)
{
  return a == b ? 0 : !a ? -1 : !b ? 1 : strcmp (a, b);
}

static int
compare_disks (const struct lost_range *a, const struct lost_range *b)
{
  int r = compare_names (a->snapshot_id, b->snapshot_id);

  return r ? r : compare_names (a->snapshot_name, b->snapshot_name);
}

static int
compare_ranges (const void *pa, const void *pb)
{
  const struct lost_range *a = pa, *b = pb;
  int r = compare_disks (a, b);

  if (r)
    return r;
  return a->guest_off < b->guest_off ? -1 : a->guest_off > b->guest_off;
}

/* Of two that overlap, the first keeps what both have. */
static bool
joins (struct lost_range *last, const struct lost_range *r)
{
  uint64_t last_end = last->guest_off + last->guest_len, end = r->guest_off + r->guest_len;

  if (compare_disks (last, r) != 0 || r->guest_off > last_end)
    return false;
  if (last->why != r->why && end > last_end)
    return false;
  last->guest_len = MAX (last_end, end) - last->guest_off;
  return true;
}

void
lost_finish (struct lost *l)
{
  struct lost_range_vec *v = &l->ranges;
  size_t kept = 0;

  if (v->len)
    qsort (v->ptr, v->len, sizeof *v->ptr, compare_ranges);
  for (size_t i = 0; i < v->len; ++i) {
    struct lost_range r = v->ptr[i], *last = kept ? &v->ptr[kept - 1] : NULL;
    uint64_t last_end;

    if (last && joins (last, &r))
      continue;
    last_end = last ? last->guest_off + last->guest_len : 0;
    if (last && compare_disks (last, &r) == 0 && r.guest_off < last_end) {
      r.guest_len -= last_end - r.guest_off;
      r.guest_off = last_end;
    }
    v->ptr[kept++] = r;
  }
  v->len = kept;
  l->active_bytes = 0;
  for (size_t i = 0; i < kept && !v->ptr[i].snapshot_id; ++i)
    l->active_bytes += v->ptr[i].guest_len;
}

/* --- from the check's list */

struct collector {
  struct lost *l;
  struct bdev *d;
  const struct check *c;
  const struct snapshot *snapshot;      /* NULL: the active disk */
  int32_t snapshot_index;
  uint64_t size;                        /* of that disk, bytes */
  struct ahead runs;                    /* of c->bad; tables mostly come in its order */
};

static int
add_clipped (struct collector *k, uint64_t guest_off, uint64_t len, int why, struct err *err)
{
  if (guest_off >= k->size)
    return 0;
  len = MIN (len, k->size - guest_off);
  return lost_add (k->l, k->snapshot, guest_off, len, why) < 0
         ? err_set (err, ENOMEM, "out of memory") : 0;
}

/* The subclusters of one entry that contradict themselves. */
static int
add_subclusters (struct collector *k, const struct bad_run *run, uint64_t i, uint64_t guest_off,
                 struct err *err)
{
  const struct geom *g = &k->c->geom;
  unsigned bits = g->cluster_bits - SUBCLUSTER_BITS;
  uint8_t buf[16];
  uint64_t raw, bitmap, bad;
  int r = bdev_pread_padded (k->d, buf, sizeof buf, run->table_host_off + i * 16, err);

  if (r < 0)
    return r;
  raw = load_be64 (buf);
  bitmap = load_be64 (buf + 8);
  bad = bitmap & BITMAP_ALL_ALLOC & (l2_has_host (raw, g) ? bitmap >> 32 : UINT64_MAX);
  for (unsigned sc = 0; r == 0 && sc < 32; ++sc)
    if (bad >> sc & 1)
      r = add_clipped (k, guest_off + ((uint64_t) sc << bits), UINT64_C (1) << bits, run->why, err);
  return r;
}

/* A run in an L2 table that maps guest bytes from table_guest_off on. */
static int
add_l2_run (struct collector *k, const struct bad_run *run, uint64_t table_guest_off,
            struct err *err)
{
  unsigned bits = k->c->geom.cluster_bits;
  uint64_t guest_off = table_guest_off + ((uint64_t) run->index << bits);
  uint64_t cut = k->c->file_size & (k->c->geom.cluster_size - 1);
  int r = 0;

  if (run->fix == BAD_CUT)
    return add_clipped (k, guest_off + cut, k->c->geom.cluster_size - cut, run->why, err);
  if (run->fix == BAD_LOST || run->fix == BAD_UNREADABLE)
    return add_clipped (k, guest_off, (uint64_t) run->count << bits, run->why, err);
  for (uint32_t i = 0; run->fix == BAD_SUBCLUSTERS && r == 0 && i < run->count; ++i)
    r = add_subclusters (k, run, run->index + i, guest_off + ((uint64_t) i << bits), err);
  return r;
}

/* The first run of that table. */
static size_t
find_table (const struct bad_run_vec *v, uint64_t table_host_off)
{
  size_t low = 0, high = v->len;

  while (low < high) {
    size_t mid = low + (high - low) / 2;

    if (v->ptr[mid].table_host_off < table_host_off)
      low = mid + 1;
    else
      high = mid;
  }
  return low;
}

/* Entries that add_subclusters will read. */
static bool
range_of_run (void *opaque, uint64_t i, struct bdev_range *range)
{
  const struct bad_run *run = &((const struct collector *) opaque)->c->bad.ptr[i];

  *range = (struct bdev_range) { run->table_host_off + run->index * UINT64_C (16),
                                 run->count * UINT64_C (16) };
  return run->fix == BAD_SUBCLUSTERS;
}

static int
add_l2_table (struct collector *k, uint64_t l2_host_off, uint64_t guest_off, struct err *err)
{
  const struct bad_run_vec *v = &k->c->bad;
  int r = 0;

  for (size_t i = find_table (v, l2_host_off);
       r == 0 && i < v->len && v->ptr[i].table_host_off == l2_host_off; ++i)
    if (!v->ptr[i].in_l1) {
      ahead_at (&k->runs, i);
      r = add_l2_run (k, &v->ptr[i], guest_off, err);
    }
  return r;
}

static bool
run_takes (const struct collector *k, const struct bad_run *run)
{
  return run->in_l1 && run->snapshot_index == k->snapshot_index
         && (run->fix == BAD_LOST || run->fix == BAD_UNREADABLE);
}

/* Entry i's own run, if it is in the list as lost; NULL if it can be followed.  *at is
 * where the search goes on: i only grows, and there may be millions of runs.
 */
static const struct bad_run *
l1_run (const struct collector *k, uint64_t l1_host_off, uint64_t i, size_t *at)
{
  const struct bad_run_vec *v = &k->c->bad;
  size_t j = *at;

  while (j < v->len && v->ptr[j].table_host_off == l1_host_off
         && (uint64_t) v->ptr[j].index + v->ptr[j].count <= i)
    ++j;
  *at = j;
  /* Runs of several fates may begin at one entry. */
  for (; j < v->len && v->ptr[j].table_host_off == l1_host_off && v->ptr[j].index <= i; ++j)
    if (run_takes (k, &v->ptr[j]) && i - v->ptr[j].index < v->ptr[j].count)
      return &v->ptr[j];
  return NULL;
}

static int
walk_l1 (struct collector *k, uint64_t l1_host_off, uint64_t nr, struct err *err)
{
  CLEANUP_FREE uint8_t *l1 = malloc (MAX (nr * 8, 1));
  uint64_t coverage = k->c->geom.l2_coverage;
  size_t at = find_table (&k->c->bad, l1_host_off);
  int r;

  if (!l1)
    return err_set (err, ENOMEM, "out of memory");
  if (bdev_pread_padded (k->d, l1, nr * 8, l1_host_off, NULL) < 0)
    return 0;                   /* the check said so */
  ahead_init (&k->runs, k->d, k->c->bad.len, range_of_run, k);
  r = 0;
  for (uint64_t i = 0; r == 0 && i < nr; ++i) {
    const struct bad_run *run = l1_run (k, l1_host_off, i, &at);
    uint64_t l2_host_off = load_be64 (l1 + i * 8) & L1E_OFF_MASK;

    if (run)
      r = add_clipped (k, i * coverage, coverage, run->why, err);
    else if (l2_host_off)
      r = add_l2_table (k, l2_host_off, i * coverage, err);
  }
  return r;
}

static bool
range_of_snapshot (void *opaque, uint64_t i, struct bdev_range *range)
{
  const struct snapshot *s = &((const struct collector *) opaque)->c->snapshots.ptr[i];

  *range = (struct bdev_range) { s->l1_host_off, MIN (s->l1_entries, MAX_L1_BYTES / 8)
                                                 * UINT64_C (8) };
  return true;
}

int
lost_collect (struct lost *l, struct bdev *d, const struct check *c, struct err *err)
{
  struct collector k = { .l = l, .d = d, .c = c, .snapshot_index = FINDING_ACTIVE,
                         .size = c->header.size };
  uint64_t most = MAX_L1_BYTES / 8;
  struct ahead ahead;
  int r = 0;

  if (c->bad.len == 0)
    return 0;
  r = walk_l1 (&k, c->header.l1_host_off, MIN (geom_l1_entries (&c->geom, k.size), most), err);
  ahead_init (&ahead, d, c->snapshots.len, range_of_snapshot, &k);
  for (size_t i = 0; r == 0 && i < c->snapshots.len; ++i) {
    const struct snapshot *s = &c->snapshots.ptr[i];

    ahead_at (&ahead, i);
    k.snapshot = s;
    k.snapshot_index = i;
    k.size = s->size ? s->size : c->header.size;
    r = walk_l1 (&k, s->l1_host_off, MIN (s->l1_entries, most), err);
  }
  return r;
}
