/* See orphans.h; core/check/check-orphans.c says what an orphan is and what makes
 * a cluster look like a lost table.
 *
 * The check wants to know whether there are tables; this wants all of them.  It goes
 * through the orphans in the order of the file, a few hundred at a time, and reads
 * the first bytes of each.  What a table names is data and need not be looked at,
 * and writers place a table before what it maps; so of a disk that has lost all its
 * tables, only a few hundred clusters for each table are read.
 *
 * The L1 table of a lost snapshot is an array of offsets too.  What it names are
 * tables, which is how it is told: then it is no region of its own.
 *
 * LIMITS: MAX_PIECES pieces are kept, FULL_BYTES of whole clusters are read to look
 * for tables, and ZERO_BYTES to leave out clusters of zeros, the later ones being
 * listed unseen.
 *
 * Deliberately not here: guessing where in the disk a table belongs, and
 * decompressing.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "dev/ahead.h"
#include "dev/concat.h"
#include "fmt/entry.h"
#include "heal/orphans.h"

#define BATCH      256u                         /* clusters */
#define FAR_BATCH  64u                          /* as many as go with one journey */
#define MAX_PIECES (UINT64_C (4) << 20)
#define FULL_BYTES (UINT64_C (1) << 30)
#define ZERO_BYTES (UINT64_C (1) << 30)
#define CHUNK_BYTES (UINT64_C (1) << 20)

struct finder {
  const struct check *c;
  const struct geom *g;
  struct bdev *source;
  struct progress *progress;
  struct orphans *o;
  uint64_t size, end_ci;        /* of the file: bytes; clusters, the last may be partial */
  struct ownermap *placed;      /* clusters that are in a table's region */
  uint64_t full_room, zero_room;/* bytes that may still be read */
  uint8_t *table, *buf;         /* a cluster; a chunk */
};

static int
no_memory (struct err *err)
{
  return err_set (err, ENOMEM, "out of memory");
}

static int
cancelled (struct finder *f, struct err *err)
{
  return progress_cancelled (f->progress) ? err_set (err, ECANCELED, "cancelled") : 0;
}

/* --- regions and pieces */

static int
begin_region (struct finder *f, enum orphan_kind kind, uint64_t table_host_off, struct err *err)
{
  struct orphan_region region = {
    .kind = kind, .off = f->o->size, .first_piece = f->o->pieces.len,
    .table_host_off = table_host_off,
  };

  return orphan_region_vec_push (&f->o->regions, region) < 0 ? no_memory (err) : 0;
}

/* Clusters [ci, ci+n), which the file may end in, to the last region. */
static int
add_piece (struct finder *f, uint64_t ci, uint64_t n, uint64_t window_off, struct err *err)
{
  struct orphans *o = f->o;
  struct orphan_region *region = &o->regions.ptr[o->regions.len - 1];
  struct orphan_piece *last = region->nr_pieces ? &o->pieces.ptr[o->pieces.len - 1] : NULL;
  struct orphan_piece p = { .host_off = ci << f->g->cluster_bits, .window_off = window_off };

  p.len = MIN (n << f->g->cluster_bits, f->size - p.host_off);
  if (last && last->host_off + last->len == p.host_off &&
      last->window_off + last->len == window_off)
    last->len += p.len;
  else if (o->pieces.len >= MAX_PIECES) {
    o->truncated = true;
    return 0;
  }
  else if (orphan_piece_vec_push (&o->pieces, p) < 0)
    return no_memory (err);
  else
    region->nr_pieces++;
  region->len += p.len;
  o->size += p.len;
  return 0;
}

/* A region of one piece. */
static int
add_run (struct finder *f, enum orphan_kind kind, uint64_t ci, uint64_t n, struct err *err)
{
  int r;

  if (f->o->pieces.len >= MAX_PIECES) {
    f->o->truncated = true;
    return 0;
  }
  r = begin_region (f, kind, 0, err);
  if (r == 0)
    r = add_piece (f, ci, n, 0, err);
  if (r == 0)
    ++*(kind == ORPHAN_DATA ? &f->o->data : &f->o->unreferenced);
  return r;
}

/* --- lost tables */

/* Does the cluster that is in buf say so?  Its entries are counted in *t. */
static bool
is_lost_table (struct finder *f, const uint8_t *buf, struct l2_tally *t)
{
  memset (t, 0, sizeof *t);
  l2_tally_add (t, f->c, buf, f->g->cluster_size);
  return l2_tally_lost_table (t, f->c);
}

/* The orphan that a standard entry names, whose bytes the guest would read; or 0. */
static uint64_t
named_orphan (struct finder *f, const uint8_t *table, uint64_t i)
{
  struct l2_entry e = l2_entry_decode (l2_raw (table, i, f->g), l2_bitmap (table, i, f->g), f->g);
  uint64_t ci = e.host_off >> f->g->cluster_bits;

  if (f->g->data_file || e.kind != CLUSTER_NORMAL || e.reserved ||
      !IS_ALIGNED (e.host_off, f->g->cluster_size) || ci == 0 || ci >= f->end_ci ||
      !orphan_is (f->c, ci))
    return 0;
  return ci;
}

/* Read a whole cluster, if that is still allowed; one that can't be read is listed
 * all the same, and fails again when it is served.
 */
static bool
read_whole (struct finder *f, uint8_t *buf, uint64_t host_off)
{
  if (f->full_room < f->g->cluster_size) {
    f->o->sampled = true;
    return false;
  }
  f->full_room -= f->g->cluster_size;
  return bdev_pread_padded (f->source, buf, f->g->cluster_size, host_off, NULL) == 0;
}

/* Most data is told by its first bytes. */
static bool
head_possible (struct finder *f, const uint8_t *buf)
{
  struct l2_tally t = { 0 };

  l2_tally_add (&t, f->c, buf, MIN (ORPHAN_HEAD_BYTES, f->g->cluster_size));
  return l2_tally_possible (&t);
}

#define MAX_NAMED 4             /* clusters that a table names and that are looked at */

/* The first clusters that the table names; returns how many. */
static unsigned
first_named (struct finder *f, const uint8_t *table, uint64_t cis[MAX_NAMED])
{
  unsigned n = 0;

  for (uint64_t i = 0; i < f->g->l2_entries && n < MAX_NAMED; ++i) {
    cis[n] = named_orphan (f, table, i);
    n += cis[n] != 0;
  }
  return n;
}

/* Are the first clusters that the table names tables themselves, most of them? */
static int
names_tables (struct finder *f, bool *yes, struct err *err)
{
  CLEANUP_FREE uint8_t *named = malloc (f->g->cluster_size);
  uint64_t cis[MAX_NAMED];
  unsigned looked = first_named (f, f->table, cis), tables = 0;

  if (named == NULL)
    return no_memory (err);
  for (unsigned i = 0; i < looked; ++i) {
    uint64_t ci = cis[i];
    struct l2_tally t;

    if (bdev_pread_padded (f->source, named, MIN (ORPHAN_HEAD_BYTES, f->g->cluster_size),
                           ci << f->g->cluster_bits, NULL) == 0 &&
        head_possible (f, named) && read_whole (f, named, ci << f->g->cluster_bits))
      tables += is_lost_table (f, named, &t);
  }
  *yes = looked > 0 && tables * 2 >= looked;
  return 0;
}

/* The table is in f->table. */
static int
place_table (struct finder *f, uint64_t table_host_off, const struct l2_tally *t,
             struct err *err)
{
  struct orphan_region *region;
  int r = begin_region (f, ORPHAN_TABLE, table_host_off, err);

  for (uint64_t i = 0; r == 0 && i < f->g->l2_entries && !f->o->truncated; ++i) {
    uint64_t ci = named_orphan (f, f->table, i);
    bool before = false;

    if (ci == 0)
      continue;
    r = ownermap_claim (f->placed, ci, 1, 1, &before, err);
    if (r == 0 && !before)
      r = add_piece (f, ci, 1, i << f->g->cluster_bits, err);
  }
  if (r < 0)
    return r;
  region = &f->o->regions.ptr[f->o->regions.len - 1];
  region->used = t->used;
  region->compressed = t->compressed;
  f->o->tables++;
  return 0;
}

/* Its head could be a table's: is the whole? */
static int
judge_cluster (struct finder *f, uint64_t host_off, struct err *err)
{
  struct l2_tally t;
  bool of_tables = false;
  int r;

  if (ownermap_get (f->placed, host_off >> f->g->cluster_bits) > 0)
    return 0;                   /* in a table that was found meanwhile */
  if (f->o->truncated || !read_whole (f, f->table, host_off) || !is_lost_table (f, f->table, &t))
    return 0;
  r = names_tables (f, &of_tables, err);
  return r < 0 || of_tables ? r : place_table (f, host_off, &t, err);
}

struct heads {
  struct finder *f;
  bool possible[BATCH];         /* each written by one callback */
  const struct bdev_range *ranges;
};

static int
head_read (void *opaque, size_t i, const void *buf, int r, const struct err *why)
{
  struct heads *h = opaque;

  h->possible[i] = r == 0 && head_possible (h->f, buf);
  return 0;
}

/* A cluster whose head could be a table's is read whole... */
static bool
range_of_possible (void *opaque, uint64_t i, struct bdev_range *range)
{
  const struct heads *h = opaque;

  *range = (struct bdev_range) { h->ranges[i].off, h->f->g->cluster_size };
  return h->possible[i];
}

/* ...and if the whole is one, so are the heads of some that it names. */
static void
scout_possible (void *opaque, uint64_t i)
{
  const struct heads *h = opaque;
  struct finder *f = h->f;
  uint64_t cis[MAX_NAMED];
  struct l2_tally t;

  if (f->full_room < f->g->cluster_size ||
      bdev_pread_padded (f->source, f->table, f->g->cluster_size, h->ranges[i].off, NULL) < 0 ||
      !is_lost_table (f, f->table, &t))
    return;
  for (unsigned n = first_named (f, f->table, cis); n > 0; --n)
    ahead_hint (f->source, cis[n - 1] << f->g->cluster_bits, ORPHAN_HEAD_BYTES);
}

static int
judge_batch (struct finder *f, const struct bdev_range *ranges, size_t n, struct err *err)
{
  struct heads h = { .f = f, .ranges = ranges };
  struct ahead ahead;
  int r = cancelled (f, err);

  if (r == 0)
    r = bdev_read_many (f->source, ranges, n, head_read, &h, err);
  ahead_init (&ahead, f->source, n, range_of_possible, &h);
  ahead.scout = scout_possible;
  for (size_t i = 0; r == 0 && i < n; ++i)
    if (h.possible[i]) {
      ahead_at (&ahead, i);
      r = judge_cluster (f, ranges[i].off, err);
    }
  return r;
}

static int
find_tables (struct finder *f, struct err *err)
{
  struct bdev_range ranges[BATCH];
  size_t n = 0, most = f->source->far ? FAR_BATCH : BATCH;
  uint64_t ci, stop = 0;
  int r = 0;

  while (r == 0 && (ci = orphan_next (f->c, stop, f->end_ci, &stop)) < f->end_ci) {
    f->o->clusters += stop - ci;
    for (; r == 0 && (ci = ownermap_find (f->placed, ci, stop, false)) < stop; ++ci) {
      ranges[n++] = (struct bdev_range) {
        ci << f->g->cluster_bits, MIN (ORPHAN_HEAD_BYTES, f->g->cluster_size),
      };
      if (n < most)
        continue;
      progress_update (f->progress, "orphans", ci, f->end_ci);
      r = judge_batch (f, ranges, n, err);
      n = 0;
    }
  }
  return r == 0 && n > 0 ? judge_batch (f, ranges, n, err) : r;
}

/* --- everything else */

static int
find_data (struct finder *f, struct err *err)
{
  uint64_t ci, stop = 0, next;
  int r = 0;

  while (r == 0 && (ci = orphan_next (f->c, stop, f->end_ci, &stop)) < f->end_ci)
    for (; r == 0 && (ci = ownermap_find (f->placed, ci, stop, false)) < stop; ci = next) {
      next = ownermap_find (f->placed, ci, stop, true);
      r = add_run (f, ORPHAN_DATA, ci, next - ci, err);
    }
  return r;
}

static bool
all_zero (const uint8_t *p, size_t len)
{
  return len == 0 || (p[0] == 0 && memcmp (p, p + 1, len - 1) == 0);
}

/* Consecutive clusters that are listed become one region. */
struct unreferenced {
  struct finder *f;
  uint64_t ci, n;               /* found, not yet added; n may be 0 */
  struct err *err;
};

static int
flush_unreferenced (struct unreferenced *u)
{
  int r = u->n > 0 ? add_run (u->f, ORPHAN_UNREFERENCED, u->ci, u->n, u->err) : 0;

  u->n = 0;
  return r;
}

static int
add_unreferenced (struct unreferenced *u, uint64_t ci, uint64_t n)
{
  int r = 0;

  if (u->n > 0 && u->ci + u->n != ci)
    r = flush_unreferenced (u);
  if (u->n == 0)
    u->ci = ci;
  u->n += n;
  return r;
}

/* Clusters [ci, ci+n) have neither refcount nor reference. */
static int
look_at_free (struct unreferenced *u, uint64_t ci, uint64_t n)
{
  struct finder *f = u->f;
  unsigned bits = f->g->cluster_bits;
  uint64_t most = MAX (CHUNK_BYTES >> bits, UINT64_C (1)), first = ci;
  struct ahead ahead;
  int r = 0;

  ahead_init_bytes (&ahead, f->source, ci << bits, MIN (n << bits, f->zero_room), most << bits);
  for (uint64_t now; r == 0 && n > 0; ci += now, n -= now) {
    now = MIN (n, most);
    ahead_at (&ahead, (ci - first) / most);
    if (progress_cancelled (f->progress))
      return err_set (u->err, ECANCELED, "cancelled");
    if (f->zero_room < now << bits)
      return add_unreferenced (u, ci, n);
    f->zero_room -= now << bits;
    if (bdev_pread_padded (f->source, f->buf, now << bits, ci << bits, NULL) < 0) {
      r = add_unreferenced (u, ci, now);
      continue;
    }
    for (uint64_t i = 0; r == 0 && i < now; ++i)
      if (!all_zero (f->buf + (i << bits), f->g->cluster_size))
        r = add_unreferenced (u, ci + i, 1);
  }
  return r;
}

static int
free_extent (void *opaque, uint64_t off, uint64_t len, unsigned kind)
{
  struct unreferenced *u = opaque;
  const struct check *c = u->f->c;
  unsigned bits = u->f->g->cluster_bits;
  uint64_t ci = off >> bits, end = ((off + len - 1) >> bits) + 1, stop;
  int r = 0;

  if (kind & (BDEV_HOLE | BDEV_ZERO))
    return 0;
  /* Extents may be finer than clusters: the one that two share comes once. */
  if (u->n > 0 && ci < u->ci + u->n)
    ci = u->ci + u->n;
  for (; r == 0 && (ci = ownermap_find (c->owners, ci, end, false)) < end; ci = stop) {
    uint64_t used = ownermap_find (c->owners, ci, end, true);

    stop = ownermap_find (c->excess, ci, used, true);
    if (stop > ci)
      r = look_at_free (u, ci, stop - ci);
    else
      stop = ownermap_find (c->excess, ci, used, false);
  }
  return r;
}

static int
find_unreferenced (struct finder *f, struct err *err)
{
  struct unreferenced u = { .f = f, .err = err };
  int r = 0;

  if (f->size > 0)
    r = bdev_extents (f->source, 0, f->size, free_extent, &u, err);
  return r < 0 ? r : flush_unreferenced (&u);
}

/* --- all together */

static int
find_all (struct finder *f, bool unreferenced, struct err *err)
{
  int r = ownermap_new (UINT64_MAX, &f->placed, err);

  if (r < 0)
    return r;
  f->table = malloc (f->g->cluster_size);
  f->buf = malloc (MAX (CHUNK_BYTES, f->g->cluster_size));
  if (f->table == NULL || f->buf == NULL)
    return no_memory (err);
  r = find_tables (f, err);
  if (r == 0)
    r = find_data (f, err);
  if (r == 0 && unreferenced)
    r = find_unreferenced (f, err);
  return r;
}

int
orphans_find (const struct check *c, struct bdev *source, bool unreferenced,
              struct progress *progress, struct orphans **ret, struct err *err)
{
  struct finder f = {
    .c = c, .g = &c->geom, .source = source, .progress = progress,
    .size = MIN (bdev_size (source), c->file_size),
    .full_room = FULL_BYTES, .zero_room = ZERO_BYTES,
  };
  int r;

  f.end_ci = DIV_ROUND_UP (f.size, f.g->cluster_size);
  f.o = calloc (1, sizeof *f.o);
  if (f.o == NULL)
    return no_memory (err);
  f.o->cluster_size = f.g->cluster_size;
  r = find_all (&f, unreferenced, err);
  ownermap_free (f.placed);
  free (f.table);
  free (f.buf);
  if (r < 0)
    orphans_free (f.o);
  else
    *ret = f.o;
  return r;
}

void
orphans_free (struct orphans *o)
{
  if (o == NULL)
    return;
  vec_reset (&o->regions);
  vec_reset (&o->pieces);
  free (o);
}

int
orphans_device (const struct orphans *o, struct bdev *source, struct bdev **ret,
                struct err *err)
{
  struct slice_of_vec slices = VEC_INIT;

  if (slice_of_vec_reserve (&slices, o->pieces.len) < 0)
    return no_memory (err);
  for (size_t i = 0; i < o->pieces.len; ++i)
    slice_of_vec_push (&slices, (struct slice_of) { o->pieces.ptr[i].host_off,
                                                    o->pieces.ptr[i].len });
  return concat_new ("lost+found", source, &slices, ret, err);
}

/* --- the index */

static void
write_pieces (FILE *fp, const struct orphans *o, const struct orphan_region *region,
              const char *indent)
{
  uint64_t off = region->off;

  fprintf (fp, ", \"extents\": [");
  for (size_t i = 0; i < region->nr_pieces; ++i) {
    const struct orphan_piece *p = &o->pieces.ptr[region->first_piece + i];

    fprintf (fp, "%s\n%s      { \"offset\": %" PRIu64 ", \"length\": %" PRIu64
             ", \"host-offset\": %" PRIu64 ", \"window-offset\": %" PRIu64 " }",
             i ? "," : "", indent, off, p->len, p->host_off, p->window_off);
    off += p->len;
  }
  fprintf (fp, "]");
}

static void
write_region (FILE *fp, const struct orphans *o, const struct orphan_region *region,
              const char *indent)
{
  static const char *const kinds[] = { "table", "data", "unreferenced" };

  fprintf (fp, "{ \"kind\": \"%s\", \"offset\": %" PRIu64 ", \"length\": %" PRIu64,
           kinds[region->kind], region->off, region->len);
  if (region->kind == ORPHAN_TABLE) {
    fprintf (fp, ", \"table-host-offset\": %" PRIu64 ", \"entries\": %" PRIu32
             ", \"compressed\": %" PRIu32, region->table_host_off, region->used,
             region->compressed);
    write_pieces (fp, o, region, indent);
  }
  else
    fprintf (fp, ", \"host-offset\": %" PRIu64, o->pieces.ptr[region->first_piece].host_off);
  fprintf (fp, " }");
}

void
orphans_write_json (FILE *fp, const struct orphans *o, size_t max_regions, const char *indent)
{
  size_t n = MIN (o->regions.len, max_regions);

  fprintf (fp, "{\n%s  \"cluster-size\": %" PRIu64 ",\n%s  \"size\": %" PRIu64
           ",\n%s  \"clusters\": %" PRIu64 ",\n%s  \"tables\": %" PRIu64
           ",\n%s  \"data\": %" PRIu64 ",\n%s  \"unreferenced\": %" PRIu64
           ",\n%s  \"sampled\": %s,\n%s  \"truncated\": %s,\n%s  \"regions\": [",
           indent, o->cluster_size, indent, o->size, indent, o->clusters, indent, o->tables,
           indent, o->data, indent, o->unreferenced, indent, o->sampled ? "true" : "false",
           indent, o->truncated || n < o->regions.len ? "true" : "false", indent);
  for (size_t i = 0; i < n; ++i) {
    fprintf (fp, "%s\n%s    ", i ? "," : "", indent);
    write_region (fp, o, &o->regions.ptr[i], indent);
  }
  fprintf (fp, "]\n%s}", indent);
}
