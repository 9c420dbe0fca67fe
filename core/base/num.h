/* Small arithmetic that must never overflow silently. */
#ifndef QR_BASE_NUM_H
#define QR_BASE_NUM_H

#include <stdbool.h>
#include <stdint.h>

/* Each argument is evaluated once; the result has their common type. */
#define MIN(a, b) MIN_1 (a, b, __COUNTER__)
#define MAX(a, b) MAX_1 (a, b, __COUNTER__)
#define MIN_1(a, b, n) MIN_2 (a, b, n)
#define MAX_1(a, b, n) MAX_2 (a, b, n)
#define MIN_2(a, b, n)                                                  \
  ({ __typeof__ ((a) + (b)) min_a_##n = (a), min_b_##n = (b);           \
     min_a_##n < min_b_##n ? min_a_##n : min_b_##n; })
#define MAX_2(a, b, n)                                                  \
  ({ __typeof__ ((a) + (b)) max_a_##n = (a), max_b_##n = (b);           \
     max_a_##n > max_b_##n ? max_a_##n : max_b_##n; })

/* n must be a power of two in ROUND_UP, ROUND_DOWN and IS_ALIGNED. */
#define ROUND_UP(x, n)     (((uint64_t) (x) + (uint64_t) (n) - 1) & ~((uint64_t) (n) - 1))
#define ROUND_DOWN(x, n)   ((uint64_t) (x) & ~((uint64_t) (n) - 1))
#define IS_ALIGNED(x, n)   (((uint64_t) (x) & ((uint64_t) (n) - 1)) == 0)
#define DIV_ROUND_UP(x, n) ((x) / (n) + ((x) % (n) != 0))

static inline bool
is_power_of_2 (uint64_t x)
{
  return x != 0 && (x & (x - 1)) == 0;
}

/* True if [off, off+len) lies inside [0, limit).  The only range test in the
 * tree: it cannot overflow, whatever a damaged image says.
 */
static inline bool
range_fits (uint64_t off, uint64_t len, uint64_t limit)
{
  return off <= limit && len <= limit - off;
}

static inline bool
ranges_overlap (uint64_t a_off, uint64_t a_len, uint64_t b_off, uint64_t b_len)
{
  return a_off < b_off ? b_off - a_off < a_len : a_off - b_off < b_len;
}

/* Return true (and leave *r undefined) on overflow. */
static inline bool
add_overflows (uint64_t a, uint64_t b, uint64_t *r)
{
  return __builtin_add_overflow (a, b, r);
}

static inline bool
mul_overflows (uint64_t a, uint64_t b, uint64_t *r)
{
  return __builtin_mul_overflow (a, b, r);
}

#endif /* QR_BASE_NUM_H */
