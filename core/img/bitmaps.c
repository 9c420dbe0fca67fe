/* Persistent dirty bitmaps: kept true while the guest writes, or left visibly
 * out of date.
 *
 * Before the first change of an image whose bitmaps are consistent (autoclear
 * bit 0), every bitmap that records writes by itself (`auto') is read into RAM
 * and marked in_use in the directory, durably: after a crash whoever opens the
 * image sees that it can't be trusted.  One that can't be kept (a kind or flags
 * of the future, extra data that forbids use, a damaged table, no memory) is
 * marked all the same, and stays so.  Bitmaps that are switched off, or in_use
 * already, are left as they are.
 *
 * Every request that may change what the guest reads sets the bits of its range
 * first.  A clean close writes the bitmaps back, into the clusters that they
 * had where they still need one; clusters that are all zeros or all ones need
 * none.  The order: data and the refcounts of new clusters, flush; table,
 * flush; and only then the mark in the directory goes, and with the next commit
 * the references to clusters that are not needed any more.
 *
 * If the extension or the directory can't be understood, the autoclear bit is
 * cleared instead (open.c): that makes all of them inconsistent.
 *
 * Deliberately not here: making, removing, merging or enlarging bitmaps.
 *
 * Invariants: I2 and I3 for the clusters of bitmaps, by the order above.
 */
#include <errno.h>
#include <string.h>

#include "base/log.h"
#include "img/image-int.h"

/* For all bitmaps of an image together: more are not kept. */
#define MAX_BITMAP_BYTES (UINT64_C (512) << 20)

enum {
  BITMAP_IN_USE      = 1,
  BITMAP_AUTO        = 2,
  BITMAP_EXTRA_COMPATIBLE = 4,
  BITMAP_FLAGS_KNOWN = 7,
};

#define BITMAP_OFF_FLAGS  12    /* in an entry of the directory */
#define BITMAP_TYPE_DIRTY 1

struct bitmap {
  uint64_t flags_off;           /* host bytes: where its flags are on disk */
  uint32_t flags;               /* without in_use */
  unsigned granularity_bits;
  uint64_t table_off;           /* host bytes */
  uint64_t nr_clusters;         /* = entries of the table */
  uint64_t *table;              /* host byte order, as on disk */
  uint64_t nr_bytes;            /* a multiple of the cluster size */
  _Atomic uint8_t *bytes;       /* as on disk: bit i is 1 << i % 8 of byte i / 8 */
};
DEFINE_VEC (bitmap_vec, struct bitmap);

struct bitmaps {
  struct bitmap_vec kept;       /* constant once the first change has begun */
  uint64_t nr_bytes;
};

/* --- the directory */

struct dir_entry {
  uint64_t table_off;
  uint32_t table_entries, flags, extra_len;
  uint8_t type, granularity_bits;
  uint64_t len;                 /* of the entry, with padding */
};

static bool
decode_dir_entry (const uint8_t *p, uint64_t left, struct dir_entry *e)
{
  if (left < BITMAP_DIR_FIXED_LENGTH)
    return false;
  e->table_off = load_be64 (p);
  e->table_entries = load_be32 (p + 8);
  e->flags = load_be32 (p + BITMAP_OFF_FLAGS);
  e->type = p[16];
  e->granularity_bits = p[17];
  e->extra_len = load_be32 (p + 20);
  e->len = ROUND_UP (UINT64_C (24) + e->extra_len + load_be16 (p + 18), 8);
  return e->len <= left;
}

/* The whole directory; NULL if there is none that can be understood. */
static uint8_t *
read_dir (struct image *img, uint64_t *dir_off, uint64_t *dir_len, uint32_t *nr)
{
  const struct header_ext *ext = header_find_ext (&img->header, EXT_BITMAPS);
  uint8_t raw[BITMAPS_EXT_LENGTH], *dir;

  if (ext == NULL || ext->len != sizeof raw ||
      bdev_pread_padded (img->file, raw, sizeof raw, ext->host_off, NULL) < 0)
    return NULL;
  *nr = load_be32 (raw);
  *dir_len = load_be64 (raw + 8);
  *dir_off = load_be64 (raw + 16);
  if (*nr == 0 || *nr > MAX_BITMAPS || load_be32 (raw + 4) != 0 ||
      *dir_len == 0 || *dir_len > MAX_BITMAP_DIR_BYTES || *dir_off == 0 ||
      !IS_ALIGNED (*dir_off, img->g.cluster_size) ||
      !range_fits (*dir_off, *dir_len, file_end (img)) ||
      regions_overlap (img, *dir_off, *dir_len))
    return NULL;
  dir = malloc (*dir_len);
  if (dir && bdev_pread_padded (img->file, dir, *dir_len, *dir_off, NULL) < 0) {
    free (dir);
    dir = NULL;
  }
  return dir;
}

static bool
dir_is_sound (const uint8_t *dir, uint64_t len, uint32_t nr)
{
  struct dir_entry e;
  uint64_t off = 0;

  for (uint32_t i = 0; i < nr; ++i, off += e.len)
    if (!decode_dir_entry (dir + off, len - off, &e))
      return false;
  return off == len;
}

/* --- loading */

static void
bitmap_reset (struct bitmap *b)
{
  free (b->table);
  free (b->bytes);
}

/* Room for it, if it is one that we can keep: 0, or -errno. */
static int
bitmap_init (struct image *img, const struct dir_entry *e, struct bitmap *b)
{
  uint64_t size = img->header.size, bits, table_bytes = (uint64_t) e->table_entries * 8;

  if ((e->flags & ~BITMAP_FLAGS_KNOWN) || e->type != BITMAP_TYPE_DIRTY ||
      e->granularity_bits > 63 || (e->extra_len && !(e->flags & BITMAP_EXTRA_COMPATIBLE)))
    return -ENOTSUP;
  bits = (size >> e->granularity_bits) +
         ((size & ((UINT64_C (1) << e->granularity_bits) - 1)) != 0);
  b->nr_bytes = ROUND_UP (DIV_ROUND_UP (bits, 8), img->g.cluster_size);
  b->nr_clusters = b->nr_bytes >> img->g.cluster_bits;
  if (b->nr_bytes > MAX_BITMAP_BYTES - img->bitmaps->nr_bytes)
    return -ENOMEM;
  if (e->table_entries != b->nr_clusters || e->table_off == 0 ||
      !IS_ALIGNED (e->table_off, img->g.cluster_size) ||
      !range_fits (e->table_off, table_bytes, file_end (img)) ||
      regions_overlap (img, e->table_off, table_bytes))
    return -EIO;
  b->flags = e->flags & ~BITMAP_IN_USE;
  b->granularity_bits = e->granularity_bits;
  b->table_off = e->table_off;
  b->table = malloc (MAX (table_bytes, 1));
  b->bytes = calloc (1, MAX (b->nr_bytes, 1));
  return b->table && b->bytes ? 0 : -ENOMEM;
}

static int
load_cluster (struct image *img, struct bitmap *b, uint64_t i)
{
  uint64_t raw = b->table[i], host_off = raw & BITMAP_TABLE_OFF_MASK;
  uint8_t *to = (uint8_t *) b->bytes + (i << img->g.cluster_bits);

  if ((raw & BITMAP_TABLE_RESERVED_MASK) || (host_off && (raw & 1)) ||
      !IS_ALIGNED (host_off, img->g.cluster_size))
    return -EIO;
  if (host_off == 0) {
    if (raw)
      memset (to, 0xff, img->g.cluster_size);
    return 0;
  }
  if (!range_fits (host_off, img->g.cluster_size, file_end (img)) ||
      regions_overlap (img, host_off, img->g.cluster_size))
    return -EIO;
  return bdev_pread_padded (img->file, to, img->g.cluster_size, host_off, NULL);
}

static int
bitmap_load (struct image *img, const struct dir_entry *e, uint64_t flags_off)
{
  struct bitmap b = { .flags_off = flags_off };
  int r = bitmap_init (img, e, &b);

  if (r == 0)
    r = bdev_pread_padded (img->file, b.table, b.nr_clusters * 8, b.table_off, NULL);
  for (uint64_t i = 0; r == 0 && i < b.nr_clusters; ++i) {
    b.table[i] = load_be64 (&b.table[i]);
    r = load_cluster (img, &b, i);
  }
  if (r == 0)
    r = bitmap_vec_push (&img->bitmaps->kept, b);
  if (r == 0)
    img->bitmaps->nr_bytes += b.nr_bytes;
  else
    bitmap_reset (&b);
  return r;
}

static int
write_flags (struct image *img, uint64_t flags_off, uint32_t flags, struct err *err)
{
  uint8_t raw[4];

  store_be32 (raw, flags);
  return commit_write (img, raw, sizeof raw, flags_off, err);
}

int
bitmaps_begin (struct image *img, bool *consistent, struct err *err)
{
  uint64_t dir_off, dir_len, off = 0;
  CLEANUP_FREE uint8_t *dir = NULL;
  uint32_t nr;

  *consistent = false;
  if (img->header.version < 3 || !(img->header.autoclear & AUTOCLEAR_BITMAPS))
    return 0;
  dir = read_dir (img, &dir_off, &dir_len, &nr);
  if (dir == NULL || !dir_is_sound (dir, dir_len, nr))
    return 0;
  if (img->bitmaps == NULL)
    img->bitmaps = calloc (1, sizeof *img->bitmaps);
  if (img->bitmaps == NULL)
    return err_set (err, ENOMEM, "out of memory");
  /* Again after an attempt that failed: what is kept is in_use by then, or not
   * kept at all; so start anew.
   */
  bitmaps_drop (img);
  for (uint32_t i = 0; i < nr; ++i) {
    uint64_t flags_off = dir_off + off + BITMAP_OFF_FLAGS;
    struct dir_entry e;
    int r;

    if (!decode_dir_entry (dir + off, dir_len - off, &e))
      return err_set (err, EIO, "a bitmap directory changed under us");
    off += e.len;
    if ((e.flags & BITMAP_IN_USE) || !(e.flags & BITMAP_AUTO))
      continue;
    r = bitmap_load (img, &e, flags_off);
    if (r < 0)
      log_debug ("%s: bitmap %u can't be kept up to date: %s", img->view.name, i, strerror (-r));
    r = write_flags (img, flags_off, e.flags | BITMAP_IN_USE, err);
    if (r < 0)
      return r;
  }
  *consistent = true;
  return 0;
}

/* --- setting bits */

static void
set_bits (_Atomic uint8_t *byte, uint8_t mask)
{
  if (~atomic_load_explicit (byte, memory_order_relaxed) & mask)
    atomic_fetch_or_explicit (byte, mask, memory_order_relaxed);
}

static void
set_range (struct bitmap *b, uint64_t first, uint64_t last)
{
  uint8_t head = 0xff << first % 8, tail = 0xff >> (7 - last % 8);

  if (first / 8 == last / 8) {
    set_bits (&b->bytes[first / 8], head & tail);
    return;
  }
  set_bits (&b->bytes[first / 8], head);
  for (uint64_t i = first / 8 + 1; i < last / 8; ++i)
    set_bits (&b->bytes[i], 0xff);
  set_bits (&b->bytes[last / 8], tail);
}

void
bitmaps_mark (struct image *img, uint64_t guest_off, uint64_t len)
{
  uint64_t size = img->header.size;

  if (img->bitmaps == NULL || guest_off >= size || len == 0)
    return;
  len = MIN (len, size - guest_off);
  for (size_t i = 0; i < img->bitmaps->kept.len; ++i) {
    struct bitmap *b = &img->bitmaps->kept.ptr[i];

    set_range (b, guest_off >> b->granularity_bits, (guest_off + len - 1) >> b->granularity_bits);
  }
}

/* --- storing */

/* May the cluster be written again?  It must be the bitmap's alone. */
static bool
is_ours_alone (struct image *img, uint64_t host_off)
{
  uint64_t value = 0;
  LOCK_SCOPE (&img->alloc_lock);

  return refcount_get_locked (img, host_off >> img->g.cluster_bits, &value, NULL) == 0 &&
         value == 1;
}

/* Write one cluster of the bitmap to where *entry, its old entry, says, or to a
 * new one, or to none; *entry is the new one then.
 */
static int
store_cluster (struct image *img, const uint8_t *bytes, uint64_t *entry, struct err *err)
{
  uint64_t host_off = *entry & BITMAP_TABLE_OFF_MASK, got = 0;
  bool fresh, same = memcmp (bytes, bytes + 1, img->g.cluster_size - 1) == 0;
  int r = 0;

  if (same && (bytes[0] == 0 || bytes[0] == 0xff)) {
    *entry = bytes[0] & 1;
    return 0;
  }
  if (host_off == 0 || !is_ours_alone (img, host_off))
    r = alloc_run (img, 1, &host_off, &got, &fresh, err);
  if (r == 0)
    r = bdev_pwrite (img->file, bytes, img->g.cluster_size, host_off, 0, err);
  if (r == 0)
    *entry = host_off;
  else if (got)
    alloc_release (img, host_off, 1);
  return r;
}

/* The clusters that the table named before and doesn't any more. */
static int
drop_clusters (struct image *img, const uint64_t *old, const uint64_t *now, uint64_t nr,
               struct err *err)
{
  LOCK_SCOPE (&img->state_lock);

  for (uint64_t i = 0; i < nr; ++i) {
    uint64_t host_off = old[i] & BITMAP_TABLE_OFF_MASK;

    if (host_off == 0 || host_off == (now[i] & BITMAP_TABLE_OFF_MASK))
      continue;
    if (u64_vec_push (&img->frees, host_off >> img->g.cluster_bits << 1 | 1) < 0)
      return err_set (err, ENOMEM, "out of memory");    /* leaks */
    atomic_fetch_add_explicit (&img->nr_frees, 1, memory_order_relaxed);
  }
  return 0;
}

/* Nothing was written that names the new clusters. */
static void
release_clusters (struct image *img, const uint64_t *old, const uint64_t *now, uint64_t nr)
{
  for (uint64_t i = 0; i < nr; ++i) {
    uint64_t host_off = now[i] & BITMAP_TABLE_OFF_MASK;

    if (host_off && host_off != (old[i] & BITMAP_TABLE_OFF_MASK))
      alloc_release (img, host_off, 1);
  }
}

static int
write_bitmap_table (struct image *img, const struct bitmap *b, const uint64_t *table,
                    struct err *err)
{
  CLEANUP_FREE uint8_t *raw = malloc (b->nr_clusters * 8);

  if (raw == NULL)
    return err_set (err, ENOMEM, "out of memory");
  for (uint64_t i = 0; i < b->nr_clusters; ++i)
    store_be64 (raw + i * 8, table[i]);
  return commit_write (img, raw, b->nr_clusters * 8, b->table_off, err);
}

/* Everything but the mark in the directory. */
static int
bitmap_store (struct image *img, struct bitmap *b, struct err *err)
{
  CLEANUP_FREE uint64_t *table = malloc (b->nr_clusters * 8);
  uint64_t done;
  int r = 0;

  if (table == NULL)
    return err_set (err, ENOMEM, "out of memory");
  memcpy (table, b->table, b->nr_clusters * 8);
  for (done = 0; r == 0 && done < b->nr_clusters; ++done)
    r = store_cluster (img, (const uint8_t *) b->bytes + (done << img->g.cluster_bits),
                       &table[done], err);
  if (r == 0)
    r = commit_flush (img, err);
  if (r < 0) {
    release_clusters (img, b->table, table, b->nr_clusters);
    return r;
  }
  r = write_bitmap_table (img, b, table, err);
  if (r == 0)
    r = commit_flush_file (img, err);
  return r < 0 ? r : drop_clusters (img, b->table, table, b->nr_clusters, err);
}

int
bitmaps_store (struct image *img, struct err *err)
{
  struct bitmap *b;
  int r = 0;

  for (size_t i = 0; img->bitmaps && i < img->bitmaps->kept.len; ++i) {
    b = &img->bitmaps->kept.ptr[i];
    if (b->nr_clusters > 0)
      r = bitmap_store (img, b, err);
    if (r == 0)
      r = write_flags (img, b->flags_off, b->flags, err);
    if (r < 0)
      break;                    /* that one, and those after it, stay in_use */
  }
  return r;
}

void
bitmaps_drop (struct image *img)
{
  struct bitmaps *bs = img->bitmaps;

  for (size_t i = 0; bs && i < bs->kept.len; ++i)
    bitmap_reset (&bs->kept.ptr[i]);
  if (bs) {
    vec_reset (&bs->kept);
    bs->nr_bytes = 0;
  }
}

void
bitmaps_free (struct image *img)
{
  bitmaps_drop (img);
  free (img->bitmaps);
}
