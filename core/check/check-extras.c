/* What else owns clusters: persistent bitmaps and the encryption header.
 *
 * Bitmaps whose autoclear bit is set are in force: their directory, tables and
 * data are claimed like everything else.  With the bit clear they count as
 * inconsistent, and some writer may have freed or reused parts of them, so
 * nothing about them is a finding; their clusters are collected in k->soft and
 * only keep the refcounts that they have (check-refcounts.c).
 *
 * A bitmap's table says nothing about the disk: damage in it costs the bitmap.
 * All tables together are read up to MAX_TABLES_BYTES, which bounds the work.
 *
 * Deliberately not here: what the bitmaps say, and the keys.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "check/check-int.h"
#include "dev/ahead.h"

#define MAX_CRYPTO_BYTES (UINT64_C (64) << 20)  /* LUKS needs 2 MiB or so */
#define MAX_TABLES_BYTES (UINT64_C (4) << 30)
#define BITMAP_TABLE_ALL_ONES UINT64_C (1)      /* only without an offset */
#define DIRECTORY UINT32_MAX
#define PIECE_BYTES (UINT64_C (1) << 20)
/* LIMIT: no more clusters are remembered (a bit for each 512 bytes of 16 TiB, in clusters of 64 KiB);
 * the others keep what they have, whoever else names them.
 */
#define MAX_BITMAP_DATA 65536

struct bitmap {
  uint64_t table_host_off;
  uint32_t table_entries;
  bool impossible;              /* its fields, beside the place of its table */
};
DEFINE_VEC (bitmap_vec, struct bitmap);

struct bitmaps {
  struct checker *k;
  bool soft;                    /* inconsistent: no findings */
  uint64_t dir_host_off;
  struct bitmap_vec list;
  pthread_mutex_t lock;
};

/* --- findings and claims, hard or soft */

static int
directory_damaged (struct bitmaps *b, struct err *err)
{
  set_incomplete (b->k);
  if (b->soft)
    return 0;
  b->k->c->bitmap_dir_damaged = true;
  b->k->c->bitmaps.len = 0;
  return add_finding (b->k, (struct finding) {
      .id = FINDING_BITMAPS_DAMAGED, .snapshot_index = FINDING_ACTIVE,
      .host_off = b->dir_host_off, .guest_off = FINDING_NO_OFF }, err);
}

/* Bitmap i, once.  found is the entry that is wrong. */
static int
bitmap_damaged (struct bitmaps *b, size_t i, uint64_t found, struct err *err)
{
  const struct bitmap *bm = &b->list.ptr[i];
  struct bitmap_state *state;

  set_incomplete (b->k);
  LOCK_SCOPE (&b->lock);
  if (b->soft)
    return 0;
  state = &b->k->c->bitmaps.ptr[i];
  if (state->damaged)
    return 0;
  state->damaged = true;
  return add_finding (b->k, (struct finding) {
      .id = FINDING_BITMAP_DAMAGED, .snapshot_index = FINDING_ACTIVE,
      .host_off = bm->table_host_off, .guest_off = FINDING_NO_OFF, .index = i,
      .found = found }, err);
}

/* What the device cannot read may be right: it is no reason to drop anything. */
static int
bitmaps_unreadable (struct bitmaps *b, uint64_t host_off, struct err *err)
{
  set_incomplete (b->k);
  if (b->soft)
    return 0;
  return add_finding (b->k, (struct finding) {
      .id = FINDING_BITMAP_UNREADABLE, .snapshot_index = FINDING_ACTIVE,
      .host_off = host_off, .guest_off = FINDING_NO_OFF }, err);
}

/* Bitmap i (DIRECTORY: all of them) lies on metadata in [off, off + len): who is right
 * is known later (check-contests.c).
 */
static int
bitmap_overlaps (struct bitmaps *b, uint32_t i, uint64_t off, uint64_t len, uint64_t found,
                 struct err *err)
{
  uint64_t ci = off >> b->k->g->cluster_bits;
  struct bitmap_doubt d = { .ci = ci, .bitmap = i, .found = found,
                            .table_host_off = i == DIRECTORY ? off : b->list.ptr[i].table_host_off,
                            .n = ((off + len - 1) >> b->k->g->cluster_bits) - ci + 1 };
  int r = 1;

  set_incomplete (b->k);
  {
    LOCK_SCOPE (&b->lock);
    if (b->k->bitmap_doubts.len < MAX_CONFLICTS)
      r = bitmap_doubt_vec_push (&b->k->bitmap_doubts, d);
  }
  if (r > 0)
    return bitmap_damaged (b, i, found, err);
  return r < 0 ? err_set (err, ENOMEM, "out of memory") : 0;
}

static int
bitmap_claim (struct bitmaps *b, uint64_t off, uint64_t len, bool *conflict, struct err *err)
{
  uint64_t ci = off >> b->k->g->cluster_bits;

  if (len == 0)
    return 0;
  if (!b->soft)
    return claim_meta (b->k, off, len, conflict, err);
  return ownermap_claim (b->k->soft, ci, ((off + len - 1) >> b->k->g->cluster_bits) - ci + 1, 1,
                         NULL, err);
}

/* Should a guest's entry name that cluster too, it is asked whose it is (check-contests.c). */
static int
remember_data (struct bitmaps *b, size_t i, uint64_t off, uint64_t raw, struct err *err)
{
  struct bitmap_doubt d = { .ci = off >> b->k->g->cluster_bits, .n = 1, .bitmap = i, .found = raw,
                            .table_host_off = b->list.ptr[i].table_host_off };
  LOCK_SCOPE (&b->lock);

  if (b->soft || b->k->bitmap_data.len >= MAX_BITMAP_DATA)
    return 0;
  return bitmap_doubt_vec_push (&b->k->bitmap_data, d) < 0 ? err_set (err, ENOMEM, "out of memory") : 0;
}

/* --- the directory */

/* Can the fields of an entry, 24 bytes, be what they are?  (Section "Bitmap
 * directory"; QEMU does not open an image with one that it cannot use.)  The table
 * of a bitmap in use may be behind a resize.
 */
static bool
fields_possible (const struct bitmaps *b, const uint8_t *entry)
{
  uint32_t table_entries = load_be32 (entry + 8), flags = load_be32 (entry + 12);
  uint16_t name_len = load_be16 (entry + 18);
  uint8_t type = entry[16], granularity_bits = entry[17];
  uint64_t bits, per_entry = b->k->g->cluster_size * 8;

  if (table_entries == 0 || (flags & BITMAP_FLAGS_RESERVED) || type != BITMAP_TYPE_TRACKING
      || granularity_bits < BITMAP_MIN_GRANULARITY || granularity_bits > BITMAP_MAX_GRANULARITY
      || name_len == 0 || name_len > MAX_BITMAP_NAME)
    return false;
  bits = DIV_ROUND_UP (b->k->c->header.size, UINT64_C (1) << granularity_bits);
  return (flags & BITMAP_FLAG_IN_USE) || table_entries == DIV_ROUND_UP (MAX (bits, 1), per_entry);
}

/* Decode its entries; false if they don't add up. */
static bool
decode_directory (struct bitmaps *b, const uint8_t *dir, uint64_t len, uint32_t nr)
{
  uint64_t off = 0;

  for (uint32_t i = 0; i < nr; ++i) {
    struct bitmap bm = { 0 };
    uint64_t size;

    if (!range_fits (off, BITMAP_DIR_FIXED_LENGTH, len))
      return false;
    bm.table_host_off = load_be64 (dir + off);
    bm.table_entries = load_be32 (dir + off + 8);
    bm.impossible = !fields_possible (b, dir + off);
    size = BITMAP_DIR_FIXED_LENGTH + (uint64_t) load_be16 (dir + off + 18) +
           load_be32 (dir + off + 20);
    size = ROUND_UP (size, 8);
    if (!range_fits (off, size, len))
      return false;
    /* There is room: read_directory made it. */
    b->list.ptr[b->list.len++] = bm;
    if (!b->soft)
      b->k->c->bitmaps.ptr[b->k->c->bitmaps.len++] = (struct bitmap_state) { off, size, false };
    off += size;
  }
  return off == len;
}

static int
read_directory (struct bitmaps *b, uint64_t len, uint32_t nr, struct err *err)
{
  CLEANUP_FREE uint8_t *dir = malloc (len);
  struct table_load load = { .host_off = b->dir_host_off, .len = len, .buf = dir };
  bool conflict = false;
  int r;

  if (dir == NULL || bitmap_vec_reserve (&b->list, nr) < 0 ||
      bitmap_state_vec_reserve (&b->k->c->bitmaps, nr) < 0)
    return err_set (err, ENOMEM, "out of memory");
  r = bitmap_claim (b, b->dir_host_off, len, &conflict, err);
  if (r == 0)
    r = load_tables (b->k, &load, 1, err);
  if (r < 0)
    return r;
  if (load.r < 0)
    return bitmaps_unreadable (b, b->dir_host_off, err);
  if (!decode_directory (b, dir, len, nr))
    return directory_damaged (b, err);
  return conflict ? bitmap_overlaps (b, DIRECTORY, b->dir_host_off, len, 0, err) : 0;
}

/* --- the tables */

struct table_piece {
  size_t bitmap;
  uint64_t entries;
};

struct table_reading {
  struct bitmaps *b;
  const struct table_piece *pieces;
};

static int
check_bitmap_entry (struct bitmaps *b, size_t i, uint64_t raw, struct err *err)
{
  uint64_t off = raw & BITMAP_TABLE_OFF_MASK;
  bool conflict = false;
  int r;

  if ((raw & BITMAP_TABLE_RESERVED_MASK) || (off && (raw & BITMAP_TABLE_ALL_ONES)) ||
      (off && !table_fits (b->k, off, b->k->g->cluster_size)))
    return bitmap_damaged (b, i, raw, err);
  r = off ? bitmap_claim (b, off, b->k->g->cluster_size, &conflict, err) : 0;
  if (r == 0 && off)
    r = remember_data (b, i, off, raw, err);
  return r == 0 && conflict ? bitmap_overlaps (b, i, off, 1, raw, err) : r;
}

static int
table_read (void *opaque, size_t i, const void *buf, int r, const struct err *why)
{
  struct table_reading *t = opaque;
  const struct table_piece *p = &t->pieces[i];

  if (progress_cancelled (t->b->k->progress))
    return -ECANCELED;
  if (r < 0)
    return bitmaps_unreadable (t->b, t->b->list.ptr[p->bitmap].table_host_off, NULL);
  for (uint64_t j = zero_words (buf, p->entries); j < p->entries && r == 0; ++j) {
    uint64_t raw = load_be64 ((const uint8_t *) buf + j * 8);

    if (raw & ~BITMAP_TABLE_ALL_ONES)
      r = check_bitmap_entry (t->b, p->bitmap, raw, NULL);
  }
  return r;
}

static int
read_pieces (struct bitmaps *b, const struct bdev_range *ranges, const struct table_piece *pieces,
             size_t nr, struct err *err)
{
  struct table_reading t = { b, pieces };

  return nr ? bdev_read_many (b->k->d, ranges, nr, table_read, &t, err) : 0;
}

static int
read_table (struct bitmaps *b, size_t i, struct err *err)
{
  uint64_t off = b->list.ptr[i].table_host_off, len = b->list.ptr[i].table_entries * UINT64_C (8);
  struct bdev_range ranges[64];
  struct table_piece pieces[64];
  size_t n = 0;
  int r = 0;

  for (; len > 0 && r == 0; ++n) {
    if (n == 64) {
      r = read_pieces (b, ranges, pieces, n, err);
      n = 0;
    }
    ranges[n] = (struct bdev_range) { off, MIN (len, PIECE_BYTES) };
    pieces[n] = (struct table_piece) { i, ranges[n].len / 8 };
    off += ranges[n].len;
    len -= ranges[n].len;
  }
  return r == 0 ? read_pieces (b, ranges, pieces, n, err) : r;
}

static int
check_bitmap_table (struct bitmaps *b, size_t i, uint64_t *total, struct err *err)
{
  const struct bitmap *bm = &b->list.ptr[i];
  uint64_t len = bm->table_entries * UINT64_C (8);
  bool conflict = false;
  int r;

  if (bm->impossible)
    return bitmap_damaged (b, i, 0, err);
  *total += len;
  if (*total > MIN (b->k->end, MAX_TABLES_BYTES) ||
      !table_fits (b->k, bm->table_host_off, len))
    return bitmap_damaged (b, i, 0, err);
  r = bitmap_claim (b, bm->table_host_off, len, &conflict, err);
  if (r < 0)
    return r;
  /* On something else it is not a bitmap table, and would claim at random. */
  return conflict ? bitmap_overlaps (b, i, bm->table_host_off, len, 0, err)
                  : read_table (b, i, err);
}

static bool
range_of_bitmap (void *opaque, uint64_t i, struct bdev_range *range)
{
  const struct bitmap *bm = &((const struct bitmaps *) opaque)->list.ptr[i];

  *range = (struct bdev_range) { bm->table_host_off, bm->table_entries * UINT64_C (8) };
  return !bm->impossible;
}

static int
check_bitmaps (struct checker *k, const struct header_ext *ext, struct err *err)
{
  struct bitmaps b = { .k = k, .soft = !(k->c->header.autoclear & AUTOCLEAR_BITMAPS) };
  uint8_t data[BITMAPS_EXT_LENGTH] = { 0 };
  uint64_t dir_len, total = 0;
  struct ahead ahead;
  uint32_t nr;
  int r = bdev_pread_padded (k->d, data, MIN (ext->len, sizeof data), ext->host_off, err);

  if (r == 0 && b.soft)
    r = ownermap_new (k->memory_limit, &k->soft, err);
  if (r < 0)
    return r;
  nr = load_be32 (data);
  dir_len = load_be64 (data + 8);
  b.dir_host_off = load_be64 (data + 16);
  if (ext->len < sizeof data || nr == 0 || nr > MAX_BITMAPS || dir_len == 0 ||
      dir_len > MAX_BITMAP_DIR_BYTES || !table_fits (k, b.dir_host_off, dir_len))
    return directory_damaged (&b, err);
  pthread_mutex_init (&b.lock, NULL);
  r = read_directory (&b, dir_len, nr, err);
  ahead_init (&ahead, k->d, b.list.len, range_of_bitmap, &b);
  for (size_t i = 0; i < b.list.len && r == 0; ++i) {
    ahead_at (&ahead, i);
    r = check_cancelled (k, err);
    if (r == 0)
      r = check_bitmap_table (&b, i, &total, err);
  }
  vec_reset (&b.list);
  pthread_mutex_destroy (&b.lock);
  return r;
}

/* --- encryption header */

static int
check_crypto_header (struct checker *k, const struct header_ext *ext, struct err *err)
{
  uint8_t data[CRYPTO_EXT_LENGTH] = { 0 };
  uint64_t off = 0, len = 0;
  int r = 0;

  if (ext)
    r = bdev_pread_padded (k->d, data, MIN (ext->len, sizeof data), ext->host_off, err);
  if (r < 0)
    return r;
  if (ext && ext->len >= sizeof data) {
    off = load_be64 (data);
    len = load_be64 (data + 8);
  }
  if (len > 0 && len <= MAX_CRYPTO_BYTES && table_fits (k, off, len)) {
    k->crypto_off = off;
    k->crypto_len = len;
    return claim_meta (k, off, len, NULL, err);
  }
  set_incomplete (k);
  return add_finding (k, (struct finding) {
      .id = FINDING_CRYPTO_HEADER_DAMAGED, .snapshot_index = FINDING_ACTIVE,
      .host_off = off, .guest_off = FINDING_NO_OFF, .found = off }, err);
}

int
check_extras (struct checker *k, struct err *err)
{
  const struct header_ext *bitmaps = header_find_ext (&k->c->header, EXT_BITMAPS);
  const struct header_ext *crypto = header_find_ext (&k->c->header, EXT_CRYPTO_HEADER);
  int r = 0;

  if (bitmaps)
    r = check_bitmaps (k, bitmaps, err);
  if (r == 0 && (crypto || k->c->header.crypt_method == CRYPT_LUKS))
    r = check_crypto_header (k, crypto, err);
  return r;
}
