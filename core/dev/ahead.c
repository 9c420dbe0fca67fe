/* See ahead.h.  What lies ahead is announced in portions: two of them before the first
 * step, and one more whenever the loop comes to the last that it has announced.  So while it
 * works on one portion, the next is on its way.
 */
#include "base/num.h"
#include "dev/ahead.h"

#define PORTION       64        /* reads */
#define PORTION_BYTES (UINT64_C (4) << 20)

void
ahead_init (struct ahead *a, struct bdev *d, uint64_t nr, ahead_fn fn, void *opaque)
{
  *a = (struct ahead) { .d = d, .nr = nr, .fn = fn, .opaque = opaque };
}

void
ahead_init_bytes (struct ahead *a, struct bdev *d, uint64_t off, uint64_t len, uint64_t step)
{
  *a = (struct ahead) { .d = d, .nr = DIV_ROUND_UP (len, step), .off = off, .end = off + len,
                        .step = step };
}

void
ahead_hint (struct bdev *d, uint64_t off, uint64_t len)
{
  uint64_t size = bdev_size (d);

  if (d->far && off < size)
    bdev_cache (d, off, MIN (len, size - off), NULL);
}

static bool
range_of (const struct ahead *a, uint64_t i, struct bdev_range *range)
{
  if (a->fn)
    return a->fn (a->opaque, i, range) && range->len > 0;
  range->off = a->off + i * a->step;
  range->len = MIN (a->step, a->end - range->off);
  return true;
}

static bool
contains (const struct bdev_range *a, const struct bdev_range *b)
{
  return b->off >= a->off && b->off - a->off < a->len && b->len <= a->len - (b->off - a->off);
}

/* Announce one portion.  Ranges that touch are one request. */
static void
announce (struct ahead *a)
{
  struct bdev_range joined = { 0, 0 }, range;
  uint64_t bytes = 0;

  for (unsigned n = 0; n < PORTION && bytes < PORTION_BYTES && a->announced < a->nr;
       ++a->announced) {
    if (!range_of (a, a->announced, &range))
      continue;
    range.len = MIN (range.len, PORTION_BYTES);         /* more is no matter of journeys */
    if (contains (&joined, &range))
      continue;
    ++n;
    bytes += range.len;
    if (joined.len && joined.off + joined.len == range.off) {
      joined.len += range.len;
      continue;
    }
    ahead_hint (a->d, joined.off, joined.len);
    joined = range;
  }
  ahead_hint (a->d, joined.off, joined.len);
}

void
ahead_at (struct ahead *a, uint64_t i)
{
  struct bdev_range range;

  if (!a->d->far || i < a->trigger || a->trigger >= a->nr)
    return;
  if (a->announced <= i) {
    a->announced = i;           /* what was passed over is not read any more */
    announce (a);
  }
  a->trigger = a->announced;
  announce (a);
  for (uint64_t k = i; a->scout && k < a->trigger; ++k)
    if (range_of (a, k, &range))
      a->scout (a->opaque, k);
}
