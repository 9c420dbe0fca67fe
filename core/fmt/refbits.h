/* Refcounts of 1, 2, 4, 8, 16, 32 and 64 bits in a refcount block (section
 * "Host cluster management").  Widths below a byte fill it from the least
 * significant bit; wider ones are big-endian.
 */
#ifndef QR_FMT_REFBITS_H
#define QR_FMT_REFBITS_H

#include "base/endian.h"

static inline uint64_t
refbits_get (const void *block, unsigned order, uint64_t i)
{
  const uint8_t *p = block;

  switch (order) {
  case 3: return p[i];
  case 4: return load_be16 (p + i * 2);
  case 5: return load_be32 (p + i * 4);
  case 6: return load_be64 (p + i * 8);
  default: {
    unsigned bits = 1u << order, per_byte = 8 >> order;

    return (p[i / per_byte] >> (i % per_byte * bits)) & ((1u << bits) - 1);
  }
  }
}

/* v must fit in the width. */
static inline void
refbits_set (void *block, unsigned order, uint64_t i, uint64_t v)
{
  uint8_t *p = block;

  switch (order) {
  case 3: p[i] = v; return;
  case 4: store_be16 (p + i * 2, v); return;
  case 5: store_be32 (p + i * 4, v); return;
  case 6: store_be64 (p + i * 8, v); return;
  default: {
    unsigned bits = 1u << order, per_byte = 8 >> order;
    unsigned shift = i % per_byte * bits, mask = ((1u << bits) - 1) << shift;

    p[i / per_byte] = (p[i / per_byte] & ~mask) | (v << shift & mask);
  }
  }
}

#endif /* QR_FMT_REFBITS_H */
