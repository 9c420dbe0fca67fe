/* Big-endian integers at any address.  qcow2 stores all numbers big-endian. */
#ifndef QR_BASE_ENDIAN_H
#define QR_BASE_ENDIAN_H

#include <endian.h>
#include <stdint.h>
#include <string.h>

#define DEFINE_BE(bits)                                                 \
  static inline uint##bits##_t                                          \
  load_be##bits (const void *p)                                         \
  {                                                                     \
    uint##bits##_t v;                                                   \
    memcpy (&v, p, sizeof v);                                           \
    return be##bits##toh (v);                                           \
  }                                                                     \
  static inline void                                                    \
  store_be##bits (void *p, uint##bits##_t v)                            \
  {                                                                     \
    v = htobe##bits (v);                                                \
    memcpy (p, &v, sizeof v);                                           \
  }

DEFINE_BE (16)
DEFINE_BE (32)
DEFINE_BE (64)

#undef DEFINE_BE

#endif /* QR_BASE_ENDIAN_H */
