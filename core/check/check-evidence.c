/* Refcount structures that lie where the mapping has something: which of the two
 * is wrong?  Their contents tell.
 *
 * A refcount block can be checked against what it should say: it is sound if
 * nearly all clusters that are in use have the refcount that was computed for
 * them, the others none, but for few of all clusters, and nearly nothing past the
 * end of the file has one.  A refcount may be higher by one for each disk, since
 * the very entry that leads here has lost its table, and all references of that are
 * missing.  Guest data does not look
 * like that by accident.  A refcount table is sound if all its entries are
 * possible and most of the blocks that it names (a sample) are sound.
 *
 * Where the structure is sound, the pointer of the mapping that leads into it is
 * wrong, and lost (T14, T08).  At level "all" that comes before the refcounts are
 * mended, so the next check finds the structure in its place.  At level
 * "refcounts" the mapping is not touched, and the structure is made anew
 * elsewhere as if nothing had been said here (R14, R23): both findings stand.
 *
 * Where it is not, it gives way, with two exceptions that cost the guest nothing:
 * a data cluster of zeros reads the same once it is lost, and a compressed stream
 * that does not decode holds no data.
 *
 * Deliberately not here: structures on other metadata than L2 tables; they lose.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "check/check-int.h"
#include "dev/ahead.h"
#include "fmt/inflate.h"
#include "fmt/refbits.h"

#define SAMPLE   8              /* blocks of a table that are looked at */
#define PAST_END 4096           /* refcounts past the end of the file that are */

int
rt_doubt_add (struct checker *k, uint64_t ci, uint64_t index, struct err *err)
{
  struct rt_doubt d = { .ci = ci, .index = index };

  if (k->rt_doubts.len >= MAX_RT_DOUBTS)
    return 0;
  return rt_doubt_vec_push (&k->rt_doubts, d) < 0 ? err_set (err, ENOMEM, "out of memory") : 0;
}

/* --- contents */

/* How many agree, of how many. */
struct tally {
  uint64_t agree, all;
};

static void
count (struct tally *t, bool agrees)
{
  t->agree += agrees;
  t->all++;
}

/* At least nine of ten? */
static bool
mostly (const struct tally *t)
{
  return t->agree >= t->all - t->all / 10;
}

/* Is buf the refcount block of refcount table entry i? */
static bool
block_is_sound (const struct checker *k, uint64_t i, const uint8_t *buf)
{
  const struct geom *g = k->g;
  uint64_t first = i << g->rb_bits, file_clusters = k->end >> g->cluster_bits;
  uint64_t more = 1 + k->c->snapshots.len;
  struct tally used = { 0 }, inside = { 0 }, past = { 0 };

  for (uint64_t j = 0; j < g->rb_entries && first + j < file_clusters; ++j) {
    uint64_t stored = refbits_get (buf, g->refcount_order, j);
    uint64_t refs = ownermap_get (k->c->owners, first + j);
    bool agrees = stored >= MIN (refs, g->refcount_max) && stored <= refs + more;

    if (refs)
      count (&used, agrees);
    count (&inside, agrees);
  }
  for (uint64_t j = file_clusters - MIN (file_clusters, first);
       j < g->rb_entries && past.all < PAST_END; ++j)
    count (&past, refbits_get (buf, g->refcount_order, j) == 0);
  return used.agree > 0 && mostly (&used) && mostly (&inside) && mostly (&past);
}

static int
weigh_block (struct checker *k, uint64_t i, uint64_t host_off, bool *sound, struct err *err)
{
  CLEANUP_FREE uint8_t *buf = malloc (k->g->cluster_size);

  *sound = false;
  if (buf == NULL)
    return err_set (err, ENOMEM, "out of memory");
  if (bdev_pread_padded (k->d, buf, k->g->cluster_size, host_off, NULL) == 0)
    *sound = block_is_sound (k, i, buf);
  return check_cancelled (k, err);
}

/* Can these all be entries of a refcount table?  *used: how many are not 0. */
static bool
entries_possible (const struct checker *k, const uint8_t *p, uint64_t nr, uint64_t *used)
{
  *used = 0;
  for (uint64_t i = zero_words (p, nr); i < nr; ++i) {
    uint64_t raw = load_be64 (p + i * 8);

    if ((raw & RTE_RESERVED_MASK) || (raw && !table_fits (k, raw, k->g->cluster_size)))
      return false;
    *used += raw != 0;
  }
  return *used > 0;
}

/* Every step-th block of a table of nr entries that are possible. */
static void
announce_blocks (const struct checker *k, const uint8_t *table, uint64_t nr, uint64_t step)
{
  for (uint64_t i = 0, seen = 0; i < nr; ++i)
    if (load_be64 (table + i * 8) && seen++ % step == 0)
      ahead_hint (k->d, load_be64 (table + i * 8), k->g->cluster_size);
}

static int
weigh_table (struct checker *k, bool *sound, struct err *err)
{
  uint64_t len = (uint64_t) k->c->rt.clusters << k->g->cluster_bits, used, seen = 0, step;
  CLEANUP_FREE uint8_t *buf = malloc (len);
  struct tally blocks = { 0 };
  int r = 0;

  *sound = false;
  if (buf == NULL)
    return err_set (err, ENOMEM, "out of memory");
  if (bdev_pread_padded (k->d, buf, len, k->c->rt.host_off, NULL) < 0 ||
      !entries_possible (k, buf, len / 8, &used))
    return 0;
  step = DIV_ROUND_UP (used, SAMPLE);
  announce_blocks (k, buf, len / 8, step);
  for (uint64_t i = 0; i < len / 8 && r == 0; ++i) {
    uint64_t raw = load_be64 (buf + i * 8);
    bool yes;

    if (raw == 0 || seen++ % step)
      continue;
    r = weigh_block (k, i, raw, &yes, err);
    count (&blocks, yes);
  }
  *sound = blocks.agree * 2 >= blocks.all && blocks.agree > 0;
  return r;
}

static int
weigh_zeros (struct checker *k, struct rt_doubt *d, struct err *err)
{
  CLEANUP_FREE uint8_t *buf = malloc (k->g->cluster_size);
  uint64_t words = k->g->cluster_size / 8;

  if (buf == NULL)
    return err_set (err, ENOMEM, "out of memory");
  d->zeros = bdev_pread_padded (k->d, buf, k->g->cluster_size, d->ci << k->g->cluster_bits,
                                NULL) == 0
             && zero_words (buf, words) == words;
  return 0;
}

static int
compare_rt_doubts (const void *pa, const void *pb)
{
  const struct rt_doubt *a = pa, *b = pb;

  if (a->ci != b->ci)
    return a->ci < b->ci ? -1 : 1;
  return a->index < b->index ? -1 : a->index > b->index;
}

static bool
range_of_doubt (void *opaque, uint64_t i, struct bdev_range *range)
{
  const struct checker *k = opaque;

  *range = (struct bdev_range) { k->rt_doubts.ptr[i].ci << k->g->cluster_bits, k->g->cluster_size };
  return true;
}

int
weigh_rt_doubts (struct checker *k, struct err *err)
{
  struct rt_doubt_vec *v = &k->rt_doubts;
  bool table_weighed = false, table_sound = false;
  struct ahead ahead;
  int r = 0;

  ahead_init (&ahead, k->d, v->len, range_of_doubt, k);
  for (size_t i = 0; i < v->len && r == 0; ++i) {
    struct rt_doubt *d = &v->ptr[i];

    ahead_at (&ahead, i);
    if (d->index != RT_DOUBT_TABLE)
      r = weigh_block (k, d->index, d->ci << k->g->cluster_bits, &d->sound, err);
    else if (!table_weighed) {
      r = weigh_table (k, &table_sound, err);
      table_weighed = true;
    }
    if (d->index == RT_DOUBT_TABLE)
      d->sound = table_sound;
    if (r == 0 && !d->sound)
      r = weigh_zeros (k, d, err);
  }
  if (v->len)
    qsort (v->ptr, v->len, sizeof *v->ptr, compare_rt_doubts);
  return r;
}

/* --- who loses */

static struct owner
structure_owner (const struct rt_doubt *d)
{
  struct owner o = { .kind = OWNER_REFCOUNT_TABLE, .snapshot_index = FINDING_ACTIVE };

  if (d->index != RT_DOUBT_TABLE) {
    o.kind = OWNER_REFCOUNT_BLOCK;
    o.index = d->index;
  }
  return o;
}

static bool
stream_decodes (struct checker *k, const struct l2_entry *e)
{
  CLEANUP_FREE uint8_t *in = malloc (e->host_len), *out = malloc (k->g->cluster_size);

  return in && out && bdev_pread_padded (k->d, in, e->host_len, e->host_off, NULL) == 0
         && inflate_cluster (k->c->header.compression_type, in, e->host_len, out,
                             k->g->cluster_size, NULL) == 0;
}

/* There are few of them unless somebody means harm: each costs a read and the decompression of a cluster. */
#define MAX_CLIPPED 1024

bool
clip_whole_stream (struct checker *k, struct l2_entry *e, uint64_t end)
{
  struct l2_entry clipped = *e;

  if (e->kind != CLUSTER_COMPRESSED || e->reserved || e->host_off >= end ||
      atomic_fetch_add (&k->nr_clipped, 1) >= MAX_CLIPPED)
    return false;
  clipped.host_len = end - e->host_off;
  if (!stream_decodes (k, &clipped))
    return false;
  *e = clipped;
  return true;
}

/* Is there nothing in it that the guest could lose? */
static bool
holds_nothing (struct checker *k, const struct rt_doubt *d, const struct l2_entry *e)
{
  return e->kind == CLUSTER_COMPRESSED ? !stream_decodes (k, e) : d->zeros;
}

/* Entry i of table t, decoded to e, names cluster d->ci. */
static int
settle_entry (struct checker *k, struct finding_batch *b, const struct rt_doubt *d,
              const struct l2_table *t, uint64_t i, const struct l2_entry *e, uint64_t raw,
              struct err *err)
{
  struct owner data = data_owner (k, t, i, 1), structure = structure_owner (d);
  uint64_t off = d->ci << k->g->cluster_bits;
  int r;

  if (!d->sound && !holds_nothing (k, d, e))
    return conflict_add (k, off, k->g->cluster_size, data, structure, err);
  r = conflict_add (k, off, k->g->cluster_size, structure, data, err);
  return r < 0 ? r : lose_entries (k, b, t, FINDING_L2_ENTRY_OVERLAP, i, 1, raw, err);
}

/* The first doubt at ci or behind it. */
static size_t
first_doubt (const struct checker *k, uint64_t ci)
{
  size_t lo = 0, hi = k->rt_doubts.len;

  while (lo < hi) {
    size_t mid = lo + (hi - lo) / 2;

    if (k->rt_doubts.ptr[mid].ci < ci)
      lo = mid + 1;
    else
      hi = mid;
  }
  return lo;
}

static int
settle_table (struct checker *k, void *opaque, size_t n, const uint8_t *buf, int r,
              struct err *err)
{
  const struct l2_table *t = &k->l2.tables.ptr[n];
  struct finding_batch b;

  if (r < 0 || t->fate)
    return 0;
  finding_batch_init (&b, &k->c->findings, k->g->cluster_size);
  for (uint64_t i = 0; i < k->g->l2_entries && r == 0; ++i) {
    uint64_t raw = l2_raw (buf, i, k->g), ci, last;
    struct l2_entry e;

    if (raw == 0)
      continue;
    e = l2_entry_decode (raw, l2_bitmap (buf, i, k->g), k->g);
    if (e.host_off == 0 ||
        (!range_fits (e.host_off, e.host_len, k->end) && !clip_whole_stream (k, &e, k->end)))
      continue;
    ci = e.host_off >> k->g->cluster_bits;
    last = (e.host_off + e.host_len - 1) >> k->g->cluster_bits;
    for (size_t j = first_doubt (k, ci); j < k->rt_doubts.len && r == 0 &&
         k->rt_doubts.ptr[j].ci <= last; ++j)
      r = settle_entry (k, &b, &k->rt_doubts.ptr[j], t, i, &e, raw, err);
  }
  if (finding_batch_flush (&b) < 0 && r == 0)
    r = err_set (err, ENOMEM, "out of memory");
  return r;
}

/* Doubts about other metadata; what is left is guest data's. */
static int
settle_metadata (struct checker *k, bool *data, struct err *err)
{
  int r = 0;

  for (size_t i = 0; i < k->rt_doubts.len && r == 0; ++i) {
    const struct rt_doubt *d = &k->rt_doubts.ptr[i];
    uint64_t off = d->ci << k->g->cluster_bits;
    const struct l2_table *t = l2_table_at (k, off);
    struct owner o;

    if (owner_at (k, d->ci, NULL, &o))
      r = conflict_add (k, off, k->g->cluster_size, o, structure_owner (d), err);
    else if (t)
      r = conflict_add (k, off, k->g->cluster_size, structure_owner (d), l2_owner (t), err);
    else
      *data = true;
  }
  return r;
}

int
settle_rt_doubts (struct checker *k, struct err *err)
{
  const struct l2_table_vec *v = &k->l2.tables;
  CLEANUP_FREE uint64_t *host_offs = NULL;
  bool data = false;
  int r = settle_metadata (k, &data, err);

  if (r < 0 || !data || v->len == 0 || k->g->data_file)
    return r;
  host_offs = malloc (v->len * sizeof *host_offs);
  if (host_offs == NULL)
    return err_set (err, ENOMEM, "out of memory");
  for (size_t i = 0; i < v->len; ++i)
    host_offs[i] = v->ptr[i].host_off;
  return read_clusters (k, host_offs, v->len, "data", settle_table, NULL, err);
}
