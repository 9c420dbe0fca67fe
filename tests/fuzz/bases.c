/* Laid out here, from the specification, sharing nothing with core/img but the constants:
 * core creates no snapshots, bitmaps or compressed clusters, and a qemu-img of another version
 * would make other images, so that finds could not be replayed.  tests/t/fuzz-finds.t asks
 * qemu-img what it thinks of each.
 *
 * Guest cluster g is unallocated, zero, compressed or normal by its number, in every L2
 * table; the snapshot shares the first L2 table with the active disk.
 */
#include <assert.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#include "base/endian.h"
#include "base/num.h"
#include "bases.h"
#include "fmt/entry.h"
#include "fmt/refbits.h"

#define MAX_CLUSTERS 512

static const struct recipe {
  unsigned version, cluster_bits, refcount_order, tables, guest_clusters;
  bool extended_l2, data_file, compressed, snapshot, bitmap;
} recipes[] = {
  { 3,  9, 4, 3, 160, .compressed = true, .snapshot = true, .bitmap = true },
  { 2,  9, 4, 3, 160, .compressed = true, .snapshot = true },
  { 3,  9, 6, 2,  90, .compressed = true },
  { 3, 12, 0, 1,  24 },
  { 3, 12, 3, 1,  24, .compressed = true, .snapshot = true },
  { 3, 14, 4, 1,  16, .extended_l2 = true, .compressed = true, .snapshot = true, .bitmap = true },
  { 3, 16, 4, 1,  12, .compressed = true, .snapshot = true, .bitmap = true },
  { 3, 12, 4, 1,  24, .data_file = true },
};
const unsigned nr_bases = sizeof recipes / sizeof *recipes;

struct maker {
  const struct recipe *r;
  struct base *b;
  uint64_t refs[MAX_CLUSTERS];
  unsigned next_ci;
  uint64_t l1, rt, snapshots, bitmap_dir;       /* host offsets */
  uint64_t stream, stream_room;                 /* compressed data goes there next */
};

static uint8_t *
at (struct maker *m, uint64_t off)
{
  return m->b->bytes + off;
}

static uint64_t
take (struct maker *m, unsigned clusters)
{
  uint64_t ci = m->next_ci;

  m->next_ci += clusters;
  assert (m->next_ci <= MAX_CLUSTERS);
  for (unsigned i = 0; i < clusters; ++i)
    m->refs[ci + i] = 1;
  return ci << m->r->cluster_bits;
}

static void
region (struct maker *m, uint64_t off, uint64_t len)
{
  if (m->b->nr_regions < sizeof m->b->regions / sizeof *m->b->regions)
    m->b->regions[m->b->nr_regions++] = (struct base_region) { off, len };
}

static uint64_t
take_region (struct maker *m, unsigned clusters, uint64_t len)
{
  uint64_t off = take (m, clusters);

  region (m, off, len);
  return off;
}

/* --- the mapping */

/* Streams are packed, so that several share a host cluster. */
static uint64_t
add_compressed (struct maker *m, unsigned g)
{
  unsigned x = 62 - (m->r->cluster_bits - 8);
  uint64_t cs = m->b->cluster_size, off;
  uint8_t *plain = malloc (2 * cs), *packed = plain + cs;
  z_stream z = { .next_in = plain, .avail_in = cs, .next_out = packed, .avail_out = cs };

  assert (plain);
  for (uint64_t i = 0; i < cs; ++i)
    plain[i] = g + (i >> 5);
  assert (deflateInit2 (&z, 1, Z_DEFLATED, -12, 9, Z_DEFAULT_STRATEGY) == Z_OK);
  assert (deflate (&z, Z_FINISH) == Z_STREAM_END);
  deflateEnd (&z);
  if (m->stream_room < z.total_out) {
    m->stream = take (m, 1);
    m->stream_room = cs;
    m->refs[m->stream / cs] = 0;
  }
  off = m->stream;
  memcpy (at (m, off), packed, z.total_out);
  m->stream += z.total_out;
  m->stream_room -= z.total_out;
  m->refs[off / cs]++;
  free (plain);
  return L2E_COMPRESSED | ((m->stream - 1) / 512 - off / 512) << x | off;
}

/* The two words of guest cluster g's entry. */
static void
add_cluster (struct maker *m, unsigned g, uint64_t words[2])
{
  const struct recipe *r = m->r;
  bool extended = r->extended_l2;

  words[0] = words[1] = 0;
  if (g % 5 == 4)
    return;
  if (g % 7 == 6 && r->version == 3)
    words[extended] = extended ? BITMAP_ALL_ZERO : L2E_ZERO;
  else if (g % 3 == 1 && r->compressed)
    words[0] = add_compressed (m, g);
  else {
    words[0] = r->data_file ? (uint64_t) g << r->cluster_bits | ENTRY_COPIED : take (m, 1);
    words[1] = extended ? g % 2 ? BITMAP_ALL_ALLOC : UINT64_C (0xff00000000ff) : 0;
    if (!r->data_file)
      memset (at (m, words[0]), g | 1, m->b->cluster_size);
  }
}

static void
add_mapping (struct maker *m)
{
  const struct recipe *r = m->r;
  uint64_t cs = m->b->cluster_size, l2e = r->extended_l2 ? 16 : 8, words[2];

  for (unsigned t = 0; t < r->tables; ++t)
    store_be64 (at (m, m->l1 + t * 8), take_region (m, 1, cs));
  for (unsigned g = 0; g < r->guest_clusters; ++g) {
    uint8_t *l2 = at (m, load_be64 (at (m, m->l1 + g / (cs / l2e) * 8))) + g % (cs / l2e) * l2e;

    add_cluster (m, g, words);
    store_be64 (l2, words[0]);
    if (r->extended_l2)
      store_be64 (l2 + 8, words[1]);
  }
  if (m->stream)
    region (m, ROUND_DOWN (m->stream - 1, 512), 512);
}

/* --- what else there is */

static void
add_snapshot (struct maker *m)
{
  uint64_t cs = m->b->cluster_size, l1 = take_region (m, 1, 8 * m->r->tables);
  uint64_t l2 = load_be64 (at (m, m->l1));
  uint8_t *e;

  m->snapshots = take_region (m, 1, 64);
  store_be64 (at (m, l1), l2);
  m->refs[l2 / cs]++;
  for (unsigned i = 0; i < cs; i += m->r->extended_l2 ? 16 : 8) {
    uint64_t raw = load_be64 (at (m, l2 + i)), x = 62 - (m->r->cluster_bits - 8);
    uint64_t off = raw & L2E_COMPRESSED ? raw & ((UINT64_C (1) << x) - 1) : raw & L2E_OFF_MASK;
    uint64_t end = off + 1;

    if (raw & L2E_COMPRESSED)
      end = ROUND_DOWN (off, 512) + (((raw & ~L2E_COMPRESSED) >> x) + 1) * 512;
    for (uint64_t ci = off / cs; off && ci <= (end - 1) / cs; ++ci)
      m->refs[ci]++;
  }
  e = at (m, m->snapshots);
  store_be64 (e, l1);
  store_be32 (e + 8, m->r->tables);
  store_be16 (e + 12, 1);                       /* ID, name */
  store_be16 (e + 14, 4);
  store_be32 (e + 36, 16);                      /* extra data: VM state, size of the disk */
  store_be64 (e + 48, (uint64_t) m->r->guest_clusters * cs);
  memcpy (e + 56, "1snap", 5);
}

static void
add_bitmap (struct maker *m)
{
  uint64_t table = take_region (m, 1, 8), data = take_region (m, 1, 64);
  uint8_t *e;

  m->bitmap_dir = take_region (m, 1, 32);
  store_be64 (at (m, table), data);
  memset (at (m, data), 0x5a, 2);
  e = at (m, m->bitmap_dir);
  store_be64 (e, table);
  store_be32 (e + 8, 1);
  store_be32 (e + 12, 2);                       /* flags: auto */
  e[16] = BITMAP_TYPE_TRACKING;
  e[17] = 16;                                   /* granularity */
  store_be16 (e + 18, 3);
  memcpy (e + 24, "map", 3);
}

/* --- what describes it all */

static uint8_t *
add_ext (uint8_t *p, uint32_t type, uint32_t len)
{
  store_be32 (p, type);
  store_be32 (p + 4, len);
  return p + 8;
}

static void
add_header (struct maker *m)
{
  const struct recipe *r = m->r;
  uint8_t *h = at (m, 0), *ext;

  store_be32 (h, HEADER_MAGIC);
  store_be32 (h + HEADER_OFF_VERSION, r->version);
  store_be32 (h + HEADER_OFF_CLUSTER_BITS, r->cluster_bits);
  store_be64 (h + HEADER_OFF_SIZE, (uint64_t) r->guest_clusters << r->cluster_bits);
  store_be32 (h + HEADER_OFF_L1_SIZE, r->tables);
  store_be64 (h + HEADER_OFF_L1_TABLE, m->l1);
  store_be64 (h + HEADER_OFF_RT, m->rt);
  store_be32 (h + HEADER_OFF_RT_CLUSTERS, 1);
  store_be32 (h + HEADER_OFF_NB_SNAPSHOTS, r->snapshot);
  store_be64 (h + HEADER_OFF_SNAPSHOTS, m->snapshots);
  if (r->version == 2)
    return;
  store_be64 (h + HEADER_OFF_INCOMPATIBLE, (r->extended_l2 ? INCOMPAT_EXTENDED_L2 : 0) |
                                           (r->data_file ? INCOMPAT_DATA_FILE : 0));
  store_be64 (h + HEADER_OFF_AUTOCLEAR, r->bitmap ? AUTOCLEAR_BITMAPS : 0);
  store_be32 (h + HEADER_OFF_REFCOUNT_ORDER, r->refcount_order);
  store_be32 (h + HEADER_OFF_HEADER_LENGTH, 112);
  ext = h + 112;
  if (r->bitmap) {
    ext = add_ext (ext, EXT_BITMAPS, BITMAPS_EXT_LENGTH);
    store_be32 (ext, 1);
    store_be64 (ext + 8, 32);
    store_be64 (ext + 16, m->bitmap_dir);
    ext += BITMAPS_EXT_LENGTH;
  }
  if (r->data_file)
    memcpy (add_ext (ext, EXT_DATA_FILE, 4), "data", 4);
}

static void
set_copied (struct maker *m)
{
  const struct recipe *r = m->r;
  uint64_t cs = m->b->cluster_size;

  for (unsigned t = 0; t < r->tables; ++t) {
    uint64_t l2 = load_be64 (at (m, m->l1 + t * 8));

    if (m->refs[l2 / cs] == 1)
      store_be64 (at (m, m->l1 + t * 8), l2 | ENTRY_COPIED);
    for (unsigned i = 0; i < cs; i += r->extended_l2 ? 16 : 8) {
      uint64_t raw = load_be64 (at (m, l2 + i));

      if (!(raw & L2E_COMPRESSED) && (raw & L2E_OFF_MASK) && !r->data_file &&
          m->refs[(raw & L2E_OFF_MASK) / cs] == 1)
        store_be64 (at (m, l2 + i), raw | ENTRY_COPIED);
    }
  }
}

/* Blocks for MAX_CLUSTERS at the most, all of them there. */
static void
add_refcounts (struct maker *m, unsigned blocks)
{
  uint64_t per_block = m->b->cluster_size * 8 >> m->r->refcount_order;

  for (unsigned i = 0; i < blocks; ++i) {
    uint64_t block = load_be64 (at (m, m->rt + i * 8));

    for (uint64_t j = 0; j < per_block && i * per_block + j < m->next_ci; ++j)
      refbits_set (at (m, block), m->r->refcount_order, j, m->refs[i * per_block + j]);
  }
}

static void
make (const struct recipe *r, struct base *b)
{
  struct maker m = { .r = r, .b = b };
  unsigned blocks;

  b->cluster_size = UINT64_C (1) << r->cluster_bits;
  b->bytes = calloc (MAX_CLUSTERS, b->cluster_size);
  assert (b->bytes);
  blocks = DIV_ROUND_UP (r->guest_clusters + 32, b->cluster_size * 8 >> r->refcount_order);
  take_region (&m, 1, 160);                     /* the header */
  m.rt = take_region (&m, 1, blocks * 8 + 8);
  for (unsigned i = 0; i < blocks; ++i)
    store_be64 (at (&m, m.rt + i * 8),
                i == 0 ? take_region (&m, 1, MIN (b->cluster_size, 128)) : take (&m, 1));
  m.l1 = take_region (&m, 1, r->tables * 8);
  add_mapping (&m);
  if (r->snapshot)
    add_snapshot (&m);
  if (r->bitmap)
    add_bitmap (&m);
  set_copied (&m);
  add_refcounts (&m, blocks);
  add_header (&m);
  b->len = m.next_ci * b->cluster_size;
  b->bytes = realloc (b->bytes, b->len);
  assert (b->bytes);
}

const struct base *
base_get (unsigned i)
{
  static struct base bases[sizeof recipes / sizeof *recipes];

  if (!bases[i].bytes)
    make (&recipes[i], &bases[i]);
  return &bases[i];
}
