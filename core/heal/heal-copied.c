/* COPIED flags: bit 63 of an L1 or L2 entry of the active disk says that the
 * refcount is exactly one, so that a guest write may go in place.  Wrong ones are
 * as dangerous as a wrong refcount: a write would reach into a snapshot.
 *
 * Tables are rewritten in slices, so that one wrong flag in a 2 MiB table does
 * not pull 2 MiB into the overlay.  Entries that the check found wrong (misaligned,
 * outside the file, ...) are not touched here, and no flags at all where tables
 * lie on guest data or on each other: until that is mended, nobody may write.
 *
 * In tables of snapshots the flag means nothing until a snapshot is loaded, but no
 * compressed cluster may ever have it.
 */
#include <errno.h>
#include <stdlib.h>

#include "base/cleanup.h"
#include "base/endian.h"
#include "base/num.h"
#include "base/vec.h"
#include "fmt/entry.h"
#include "heal/heal-int.h"

#define SLICE 4096

enum kind { L1, L2, L2_OF_SNAPSHOT };

static bool
is_cluster_inside (const struct heal *h, uint64_t host_off)
{
  return host_off != 0 && IS_ALIGNED (host_off, h->g.cluster_size)
         && host_off < h->c->file_size;
}

/* What the entry should be: only bit 63 can differ. */
static uint64_t
with_right_flag (const struct heal *h, uint64_t raw, uint64_t host_off)
{
  return check_copied (h->c, host_off >> h->g.cluster_bits) ? raw | ENTRY_COPIED : raw & ~ENTRY_COPIED;
}

static uint64_t
right_l2_entry (const struct heal *h, uint64_t raw, uint64_t bitmap)
{
  struct l2_entry e = l2_entry_decode (raw, bitmap, &h->g);

  if (e.kind == CLUSTER_COMPRESSED)
    return raw & ~ENTRY_COPIED;
  /* In a data file each guest cluster has a place of its own. */
  if (h->g.data_file)
    return e.host_off && IS_ALIGNED (e.host_off, h->g.cluster_size) ? raw | ENTRY_COPIED : raw;
  if (!is_cluster_inside (h, e.host_off))
    return raw;
  return with_right_flag (h, raw, e.host_off);
}

/* What the entry at p should be. */
static uint64_t
right_entry (const struct heal *h, const uint8_t *p, enum kind kind)
{
  uint64_t raw = load_be64 (p);

  if (kind == L2_OF_SNAPSHOT)
    return raw & L2E_COMPRESSED ? raw & ~ENTRY_COPIED : raw;
  if (kind == L2)
    return right_l2_entry (h, raw, h->g.extended_l2 ? load_be64 (p + 8) : 0);
  return is_cluster_inside (h, raw & L1E_OFF_MASK) ? with_right_flag (h, raw, raw & L1E_OFF_MASK)
                                                   : raw;
}

/* buf holds len bytes of a table of entries that lie at host_off. */
static int
fix_slice (struct heal *h, uint8_t *buf, uint64_t len, uint64_t host_off, enum kind kind,
           struct err *err)
{
  unsigned step = kind == L1 ? 8 : h->g.l2e_size;
  uint64_t fixed = 0;

  for (uint64_t i = 0; i < len; i += step) {
    uint64_t right = right_entry (h, buf + i, kind);

    if (right != load_be64 (buf + i)) {
      store_be64 (buf + i, right);
      fixed++;
    }
  }
  if (fixed == 0)
    return 0;
  h->res->copied_fixed += fixed;
  /* The file may end inside the table; behind that there are no entries, and no flags. */
  len = MIN (len, bdev_size (h->d) - host_off);
  return bdev_pwrite (h->d, buf, len, host_off, 0, err);
}

static int
fix_table (struct heal *h, uint8_t *table, uint64_t len, uint64_t host_off, enum kind kind,
           struct err *err)
{
  int r = 0;

  for (uint64_t i = 0; r == 0 && i < len; i += SLICE)
    r = fix_slice (h, table + i, MIN (SLICE, len - i), host_off + i, kind, err);
  return r;
}

/* --- from afar */

/* Announce the slices that fix_table is going to write. */
static void
announce_table (const struct heal *h, const uint8_t *table, uint64_t len, uint64_t host_off,
                enum kind kind)
{
  unsigned step = kind == L1 ? 8 : h->g.l2e_size;
  uint64_t next = 0;            /* what lies before it is announced */

  for (uint64_t i = 0; i < len; i += step)
    if (host_off + i >= next && right_entry (h, table + i, kind) != load_be64 (table + i)) {
      heal_announce_write (h, host_off + i, step);
      next = ROUND_DOWN (host_off + i, COPY_GRAIN) + COPY_GRAIN;
    }
}

struct tables {
  struct heal *h;
  const uint8_t *l1;
  enum kind kind;
};

static bool
range_of_table (void *opaque, uint64_t i, struct bdev_range *range)
{
  const struct tables *t = opaque;

  *range = (struct bdev_range) { load_be64 (t->l1 + i * 8) & L1E_OFF_MASK, t->h->g.cluster_size };
  return is_cluster_inside (t->h, range->off);
}

/* heal_copied_flags is between two tables, so h->buf is free. */
static void
scout_table (void *opaque, uint64_t i)
{
  const struct tables *t = opaque;
  struct heal *h = t->h;
  uint64_t host_off = load_be64 (t->l1 + i * 8) & L1E_OFF_MASK;

  if (bdev_pread_padded (h->d, h->buf, h->g.cluster_size, host_off, NULL) == 0)
    announce_table (h, h->buf, h->g.cluster_size, host_off, t->kind);
}

/* Does some table lie where guest data or other metadata lies too?  Then a flag
 * set in it could be a byte of the guest's.
 */
static bool
tables_are_doubtful (const struct check *c)
{
  return findings_has (&c->findings, FINDING_L1_ENTRY_OVERLAP)
         || findings_has (&c->findings, FINDING_L2_ENTRY_OVERLAP)
         || findings_has (&c->findings, FINDING_L2_TABLE_NONSENSE)
         || findings_has (&c->findings, FINDING_SNAPSHOT_OVERLAP);
}

static int
fix_l2_tables (struct heal *h, const uint8_t *l1, uint64_t l1_entries, enum kind kind,
               struct err *err)
{
  struct tables t = { h, l1, kind };
  struct ahead ahead;
  int r = 0;

  ahead_init (&ahead, h->d, l1_entries, range_of_table, &t);
  if (h->g.cluster_size < COPY_GRAIN)
    ahead.scout = scout_table;
  for (uint64_t i = 0; r == 0 && i < l1_entries; ++i) {
    uint64_t l2_host_off = load_be64 (l1 + i * 8) & L1E_OFF_MASK;

    if (!is_cluster_inside (h, l2_host_off))
      continue;
    progress_update (h->progress, "mending COPIED flags", i, l1_entries);
    ahead_at (&ahead, i);
    r = bdev_pread_padded (h->d, h->buf, h->g.cluster_size, l2_host_off, NULL);
    if (r < 0) {
      r = 0;                    /* the check reported it; its flags stay as they are */
      continue;
    }
    r = fix_table (h, h->buf, h->g.cluster_size, l2_host_off, kind, err);
  }
  return r;
}

static int
fix_active (struct heal *h, struct err *err)
{
  uint64_t host_off = h->c->header.l1_host_off, entries = h->c->l1_entries_followed;
  CLEANUP_FREE uint8_t *l1 = malloc (entries * 8);
  int r;

  if (!l1)
    return err_set (err, ENOMEM, "out of memory");
  r = bdev_pread_padded (h->d, l1, entries * 8, host_off, err);
  if (r == 0)
    r = fix_l2_tables (h, l1, entries, L2, err);
  if (r == 0 && h->d->far)
    announce_table (h, l1, entries * 8, host_off, L1);
  if (r == 0)
    r = fix_table (h, l1, entries * 8, host_off, L1, err);
  return r;
}

DEFINE_VEC (table_vec, uint64_t);

/* Where the L2 tables of a snapshot are. */
static int
add_tables (struct heal *h, const struct snapshot *s, struct table_vec *v, struct err *err)
{
  uint64_t len = s->unusable ? 0 : (uint64_t) s->l1_entries * 8;
  CLEANUP_FREE uint8_t *l1 = malloc (MAX (len, 1));
  int r = 0;

  if (!l1)
    return err_set (err, ENOMEM, "out of memory");
  if (bdev_pread_padded (h->d, l1, len, s->l1_host_off, NULL) < 0)
    return 0;                   /* as for L2 tables */
  for (uint64_t i = 0; r == 0 && i < len; i += 8)
    if (load_be64 (l1 + i) & L1E_OFF_MASK)
      r = table_vec_push (v, load_be64 (l1 + i) & L1E_OFF_MASK);
  return r < 0 ? err_set (err, ENOMEM, "out of memory") : 0;
}

static int
compare_offsets (const void *pa, const void *pb)
{
  uint64_t a = *(const uint64_t *) pa, b = *(const uint64_t *) pb;

  return a < b ? -1 : a > b;
}

/* Snapshots share most of their tables.  v becomes an L1 table that names each once. */
static size_t
make_l1 (struct table_vec *v)
{
  size_t n = 0;

  if (v->len)
    qsort (v->ptr, v->len, sizeof *v->ptr, compare_offsets);
  for (size_t i = 0; i < v->len; ++i)
    if (i == 0 || v->ptr[i] != v->ptr[i - 1])
      v->ptr[n++] = v->ptr[i];
  for (size_t i = 0; i < n; ++i)
    store_be64 ((uint8_t *) &v->ptr[i], v->ptr[i]);
  return n;
}

static int
fix_snapshots (struct heal *h, struct err *err)
{
  struct table_vec v = VEC_INIT;
  int r = 0;

  for (size_t i = 0; r == 0 && i < h->c->snapshots.len; ++i)
    r = add_tables (h, &h->c->snapshots.ptr[i], &v, err);
  if (r == 0) {
    size_t n = make_l1 (&v);

    r = fix_l2_tables (h, (const uint8_t *) v.ptr, n, L2_OF_SNAPSHOT, err);
  }
  vec_reset (&v);
  return r;
}

int
heal_copied_flags (struct heal *h, struct err *err)
{
  const struct check *c = h->c;
  int r;

  if (!c->copied_follows && !findings_has (&c->findings, FINDING_L1_COPIED_WRONG)
      && !findings_has (&c->findings, FINDING_L2_COPIED_WRONG))
    return 0;
  if (tables_are_doubtful (c))
    return 0;
  r = fix_active (h, err);
  return r == 0 && c->copied_in_snapshots ? fix_snapshots (h, err) : r;
}
