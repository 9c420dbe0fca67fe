/* L1, L2 and refcount table entries: pure decoding, no judgement.  Raw values
 * are in host byte order.
 */
#ifndef QR_FMT_ENTRY_H
#define QR_FMT_ENTRY_H

#include "base/endian.h"
#include "fmt/header.h"

enum cluster_kind {
  CLUSTER_UNALLOCATED,          /* reads from the backing file, or zeros */
  CLUSTER_ZERO_PLAIN,           /* reads as zeros, no host cluster */
  CLUSTER_ZERO_ALLOC,           /* reads as zeros, host cluster reserved */
  CLUSTER_NORMAL,
  CLUSTER_COMPRESSED,
};

/* An entry as it is on disk; bitmap is the second word of an extended entry, else 0. */
struct l2_pair {
  uint64_t raw, bitmap;
};

#define SUBCLUSTER_BITS 5       /* log2 of subclusters in a cluster, with extended L2 entries */
#define BITMAP_ALL_ALLOC UINT64_C (0x00000000ffffffff)
#define BITMAP_ALL_ZERO  UINT64_C (0xffffffff00000000)

struct l2_entry {
  enum cluster_kind kind;
  bool copied;                  /* refcount is exactly one: may be written in place */
  uint64_t host_off;            /* bytes; compressed: of the stream, any alignment */
  uint64_t host_len;            /* bytes claimed in the file: a cluster, or the stream's sectors */
  uint64_t reserved;            /* reserved bits that are set */
};

/* Bits of a compressed descriptor: x = 62 - (cluster_bits - 8), section
 * "Compressed Clusters Descriptor".
 */
static inline void
l2_entry_decode_compressed (uint64_t raw, const struct geom *g, struct l2_entry *e)
{
  unsigned x = 62 - (g->cluster_bits - 8);
  uint64_t sectors = ((raw & ~(L2E_COMPRESSED | ENTRY_COPIED)) >> x) + 1;

  e->kind = CLUSTER_COMPRESSED;
  e->host_off = raw & ((UINT64_C (1) << x) - 1);
  e->host_len = sectors * 512 - (e->host_off & 511);
  /* Offsets stay below 2^56 even where the field is wider. */
  e->reserved = x > 56 ? e->host_off & ~(MAX_HOST_OFF - 1) : 0;
}

/* The compressed descriptor raw with a count of sectors that ends at host offset end, a multiple of 512
 * that lies behind the stream's begin, and not behind its end.
 */
static inline uint64_t
l2_compressed_ending_at (uint64_t raw, uint64_t end, const struct geom *g)
{
  unsigned x = 62 - (g->cluster_bits - 8);
  uint64_t host_off = raw & ((UINT64_C (1) << x) - 1);
  uint64_t sectors = (end - (host_off & ~UINT64_C (511))) / 512;

  return (raw & (L2E_COMPRESSED | ENTRY_COPIED)) | (sectors - 1) << x | host_off;
}

/* A standard entry of an image without extended L2 entries, or any compressed
 * one.  bitmap is the second word of an extended entry, 0 otherwise.
 *
 * Data files map guest to host one to one, so that host offset 0 with COPIED
 * set is an allocated cluster there.
 */
static inline struct l2_entry
l2_entry_decode (uint64_t raw, uint64_t bitmap, const struct geom *g)
{
  struct l2_entry e = { .copied = !!(raw & ENTRY_COPIED) };
  bool has_host, zero;

  if (raw & L2E_COMPRESSED) {
    l2_entry_decode_compressed (raw, g, &e);
    return e;
  }
  e.host_off = raw & L2E_OFF_MASK;
  e.host_len = g->cluster_size;
  e.reserved = raw & L2E_STD_RESERVED_MASK;
  has_host = e.host_off != 0 || (g->data_file && e.copied);
  if (g->extended_l2) {
    e.reserved |= raw & L2E_ZERO;
    zero = (uint32_t) bitmap == 0 && (bitmap >> 32) != 0;
    /* Any subcluster in use makes it a normal cluster for counting. */
    if (has_host && !zero) {
      e.kind = (uint32_t) bitmap ? CLUSTER_NORMAL : CLUSTER_ZERO_ALLOC;
      return e;
    }
  }
  else
    zero = !!(raw & L2E_ZERO);
  if (zero)
    e.kind = has_host ? CLUSTER_ZERO_ALLOC : CLUSTER_ZERO_PLAIN;
  else
    e.kind = has_host ? CLUSTER_NORMAL : CLUSTER_UNALLOCATED;
  return e;
}

/* Does a standard (not compressed) entry name a host cluster? */
static inline bool
l2_has_host (uint64_t raw, const struct geom *g)
{
  return !(raw & L2E_COMPRESSED) &&
         ((raw & L2E_OFF_MASK) || (g->data_file && (raw & ENTRY_COPIED)));
}

/* The entry as subcluster sc sees it: its kind is the subcluster's, host_off is
 * still the cluster's.  Compressed clusters, and those of images without
 * extended L2 entries, are one piece.
 */
static inline struct l2_entry
l2_entry_decode_sub (struct l2_pair p, unsigned sc, const struct geom *g)
{
  struct l2_entry e = l2_entry_decode (p.raw, p.bitmap, g);

  if (!g->extended_l2 || e.kind == CLUSTER_COMPRESSED)
    return e;
  if (p.bitmap >> (32 + sc) & 1)
    e.kind = l2_has_host (p.raw, g) ? CLUSTER_ZERO_ALLOC : CLUSTER_ZERO_PLAIN;
  else
    e.kind = p.bitmap >> sc & 1 ? CLUSTER_NORMAL : CLUSTER_UNALLOCATED;
  return e;
}

/* The i-th entry of a raw table as it is on disk, and its subcluster bitmap. */
static inline uint64_t
l2_raw (const void *table, uint64_t i, const struct geom *g)
{
  return load_be64 ((const uint8_t *) table + i * g->l2e_size);
}

static inline uint64_t
l2_bitmap (const void *table, uint64_t i, const struct geom *g)
{
  return g->extended_l2 ? load_be64 ((const uint8_t *) table + i * 16 + 8) : 0;
}

#endif /* QR_FMT_ENTRY_H */
