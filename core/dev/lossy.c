/* Lost ranges over another device: see lossy.h.
 *
 * Two structures say the same.  The list of ranges, sorted and apart from each
 * other, under a lock, is exact.  The map, one bit for each of at most 65536 equal
 * parts of the disk, is what every request looks at first, without a lock: a
 * clear bit says that nothing is lost in that part.  Bits are set when the device is made
 * and only ever cleared, after the range that they spoke of has left the list.
 *
 * What is lost only becomes less.  So a read may ask first and read then: at
 * worst it fails although a write that runs at the same time would just have saved it.
 * A write tells the list after it succeeded: nobody reads what was not written yet.
 *
 * Deliberately not here: what is lost and why (core/heal/lost.c).
 */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "base/vec.h"
#include "dev/lossy.h"
#include "dev/many.h"

#define ULL(n) ((unsigned long long) (n))
#define MAX_PARTS UINT64_C (65536)
#define MIN_PART_BITS 16

/* [off, end) */
struct gap {
  uint64_t off, end;
};
DEFINE_VEC (gap_vec, struct gap);

struct lossy {
  struct bdev d;
  struct bdev *under;           /* constant */
  unsigned part_bits;           /* constant: a part of the map is 2^this bytes */
  _Atomic uint64_t *map;        /* owned */
  pthread_rwlock_t lock;
  struct gap_vec gaps;          /* protected by lock; sorted, not empty, apart */
};

static struct lossy *
lossy_of (struct bdev *d)
{
  return (struct lossy *) d;
}

/* --- the map */

/* May anything be lost in [off, off + len)? */
static bool
near_gap (struct lossy *l, uint64_t off, uint64_t len)
{
  uint64_t first = off >> l->part_bits, last = (off + len - 1) >> l->part_bits;

  for (uint64_t w = first / 64; w <= last / 64; ++w) {
    uint64_t mask = UINT64_MAX;

    if (w == first / 64)
      mask &= UINT64_MAX << first % 64;
    if (w == last / 64)
      mask &= UINT64_MAX >> (63 - last % 64);
    if (atomic_load_explicit (&l->map[w], memory_order_acquire) & mask)
      return true;
  }
  return false;
}

static void
mark (struct lossy *l, const struct gap *g)
{
  for (uint64_t p = g->off >> l->part_bits; p <= (g->end - 1) >> l->part_bits; ++p)
    atomic_fetch_or_explicit (&l->map[p / 64], UINT64_C (1) << p % 64, memory_order_relaxed);
}

static void
unmark (struct lossy *l, uint64_t part)
{
  atomic_fetch_and_explicit (&l->map[part / 64], ~(UINT64_C (1) << part % 64),
                             memory_order_release);
}

/* --- the list */

/* The first gap that ends after off; gaps.len if none does. */
static size_t
find_locked (const struct lossy *l, uint64_t off)
{
  size_t lo = 0, hi = l->gaps.len;

  while (lo < hi) {
    size_t mid = lo + (hi - lo) / 2;

    if (l->gaps.ptr[mid].end <= off)
      lo = mid + 1;
    else
      hi = mid;
  }
  return lo;
}

/* The first gap that touches [off, end), as it is now. */
static bool
first_gap (struct lossy *l, uint64_t off, uint64_t end, struct gap *ret)
{
  bool found;
  size_t i;

  pthread_rwlock_rdlock (&l->lock);
  i = find_locked (l, off);
  found = i < l->gaps.len && l->gaps.ptr[i].off < end;
  if (found)
    *ret = l->gaps.ptr[i];
  pthread_rwlock_unlock (&l->lock);
  return found;
}

/* Take [off, end) out of the list.  Only where a gap goes on at both sides does
 * that need memory.
 */
static int
cut_locked (struct lossy *l, uint64_t off, uint64_t end)
{
  struct gap_vec *v = &l->gaps;
  size_t first = find_locked (l, off), after;

  if (first < v->len && v->ptr[first].off < off && v->ptr[first].end > end) {
    if (gap_vec_reserve (v, 1) < 0)
      return -ENOMEM;
    memmove (v->ptr + first + 1, v->ptr + first, (v->len - first) * sizeof *v->ptr);
    ++v->len;
    v->ptr[first].end = off;
    v->ptr[first + 1].off = end;
    return 0;
  }
  if (first < v->len && v->ptr[first].off < off)
    v->ptr[first++].end = off;
  for (after = first; after < v->len && v->ptr[after].end <= end; ++after)
    ;
  if (after < v->len && v->ptr[after].off < end)
    v->ptr[after].off = end;
  if (after > first) {
    memmove (v->ptr + first, v->ptr + after, (v->len - after) * sizeof *v->ptr);
    v->len -= after - first;
  }
  return 0;
}

/* [off, off + len) was written.  Out of memory only keeps its bytes lost, which the
 * caller may try again.
 */
static int
save (struct lossy *l, uint64_t off, uint64_t len, struct err *err)
{
  uint64_t end = off + len;
  int r;

  pthread_rwlock_wrlock (&l->lock);
  r = cut_locked (l, off, end);
  for (uint64_t p = off >> l->part_bits; r == 0 && p <= (end - 1) >> l->part_bits; ++p) {
    size_t i = find_locked (l, p << l->part_bits);

    if (i == l->gaps.len || l->gaps.ptr[i].off >> l->part_bits > p)
      unmark (l, p);
  }
  pthread_rwlock_unlock (&l->lock);
  return r < 0 ? err_set (err, ENOMEM, "out of memory") : 0;
}

/* --- requests */

static int
lossy_pread (struct bdev *d, void *buf, size_t len, uint64_t off, struct err *err)
{
  struct lossy *l = lossy_of (d);
  struct gap g;

  if (near_gap (l, off, len) && first_gap (l, off, off + len, &g))
    return err_set (err, EIO, "%s: bytes 0x%llx to 0x%llx of the disk are lost (the report says "
                    "why); with lost=zero they read as zeros", d->name, ULL (g.off),
                    ULL (g.end - 1));
  return bdev_pread (l->under, buf, len, off, err);
}

/* Where nothing asked for can be lost, as under it; else range by range. */
static int
lossy_read_many (struct bdev *d, const struct bdev_range *ranges, size_t nr, bdev_many_fn fn,
                 void *opaque, struct err *err)
{
  struct lossy *l = lossy_of (d);
  uint64_t size = bdev_size (d);
  bool whole = size == bdev_size (l->under);    /* what is past the end is zeros in both */

  for (size_t i = 0; i < nr && whole; ++i) {
    uint64_t off = ranges[i].off, len = off < size ? MIN (ranges[i].len, size - off) : 0;

    whole = len == 0 || !near_gap (l, off, len);
  }
  return whole ? bdev_read_many (l->under, ranges, nr, fn, opaque, err)
               : many_read (d, ranges, nr, fn, opaque, err);
}

static int
lossy_pwrite (struct bdev *d, const void *buf, size_t len, uint64_t off, unsigned flags,
              struct err *err)
{
  struct lossy *l = lossy_of (d);
  int r = bdev_pwrite (l->under, buf, len, off, flags, err);

  return r == 0 && near_gap (l, off, len) ? save (l, off, len, err) : r;
}

static int
lossy_zero (struct bdev *d, uint64_t off, uint64_t len, unsigned flags, struct err *err)
{
  struct lossy *l = lossy_of (d);
  int r = bdev_zero (l->under, off, len, flags, err);

  return r == 0 && near_gap (l, off, len) ? save (l, off, len, err) : r;
}

/* Whoever trims no longer cares what was there. */
static int
lossy_trim (struct bdev *d, uint64_t off, uint64_t len, unsigned flags, struct err *err)
{
  struct lossy *l = lossy_of (d);
  int r = bdev_trim (l->under, off, len, flags, err);

  return r == 0 && near_gap (l, off, len) ? save (l, off, len, err) : r;
}

static int
lossy_flush (struct bdev *d, struct err *err)
{
  return bdev_flush (lossy_of (d)->under, err);
}

static int
lossy_cache (struct bdev *d, uint64_t off, uint64_t len, struct err *err)
{
  return bdev_cache (lossy_of (d)->under, off, len, err);
}

/* What is under it, cut into lost and not lost. */
struct teller {
  struct lossy *l;
  bdev_extent_fn fn;
  void *opaque;
};

/* The lock is not held while others' functions run. */
static int
tell_parts (void *opaque, uint64_t off, uint64_t len, unsigned kind)
{
  struct teller *t = opaque;
  uint64_t end = off + len;
  int r = 0;

  while (r == 0 && off < end) {
    struct gap g = { end, end };
    bool lost = first_gap (t->l, off, end, &g) && g.off <= off;
    uint64_t stop = lost ? MIN (g.end, end) : MIN (g.off, end);

    r = t->fn (t->opaque, off, stop - off, lost ? 0 : kind);
    off = stop;
  }
  return r;
}

static int
lossy_extents (struct bdev *d, uint64_t off, uint64_t len, bdev_extent_fn fn, void *opaque,
               struct err *err)
{
  struct teller t = { .l = lossy_of (d), .fn = fn, .opaque = opaque };

  if (!near_gap (t.l, off, len))
    return bdev_extents (t.l->under, off, len, fn, opaque, err);
  return bdev_extents (t.l->under, off, len, tell_parts, &t, err);
}

static void
lossy_close (struct bdev *d)
{
  struct lossy *l = lossy_of (d);

  bdev_unref (l->under);
  pthread_rwlock_destroy (&l->lock);
  vec_reset (&l->gaps);
  free ((void *) l->map);
  free (l);
}

static const struct bdev_ops lossy_ops = {
  .kind = "lossy",
  .native_fua = true,           /* passed on, with all that it means there */
  .pread = lossy_pread,
  .read_many = lossy_read_many,
  .pwrite = lossy_pwrite,
  .zero = lossy_zero,
  .trim = lossy_trim,
  .flush = lossy_flush,
  .extents = lossy_extents,
  .cache = lossy_cache,
  .close = lossy_close,
};

/* --- making one */

static int
compare_gaps (const void *pa, const void *pb)
{
  const struct gap *a = pa, *b = pb;

  return a->off < b->off ? -1 : a->off > b->off;
}

static int
set_gaps (struct lossy *l, const struct lossy_range *ranges, size_t nr, uint64_t size)
{
  struct gap_vec *v = &l->gaps;
  size_t n = 0;

  if (gap_vec_reserve (v, nr) < 0)
    return -ENOMEM;
  for (size_t i = 0; i < nr; ++i)
    if (ranges[i].off < size && ranges[i].len)
      v->ptr[n++] = (struct gap) { ranges[i].off,
                                   ranges[i].off + MIN (ranges[i].len, size - ranges[i].off) };
  if (n)
    qsort (v->ptr, n, sizeof *v->ptr, compare_gaps);
  for (size_t i = 0; i < n; ++i) {
    struct gap *last = v->len ? &v->ptr[v->len - 1] : NULL;

    if (last && v->ptr[i].off <= last->end)
      last->end = MAX (last->end, v->ptr[i].end);
    else
      v->ptr[v->len++] = v->ptr[i];
  }
  for (size_t i = 0; i < v->len; ++i)
    mark (l, &v->ptr[i]);
  return 0;
}

int
lossy_new (struct bdev *d, const struct lossy_range *ranges, size_t nr, struct bdev **ret,
           struct err *err)
{
  struct lossy *l = calloc (1, sizeof *l);
  uint64_t size = bdev_size (d);

  if (l) {
    l->part_bits = MIN_PART_BITS;
    while (size >> l->part_bits >= MAX_PARTS)
      ++l->part_bits;
    l->map = calloc ((size >> l->part_bits) / 64 + 1, sizeof *l->map);
  }
  if (!l || !l->map || set_gaps (l, ranges, nr, size) < 0 ||
      bdev_init (&l->d, &lossy_ops, d->name, size, d->writable, false, NULL) < 0) {
    if (l) {
      vec_reset (&l->gaps);
      free ((void *) l->map);
    }
    free (l);
    return err_set (err, ENOMEM, "out of memory");
  }
  pthread_rwlock_init (&l->lock, NULL);
  l->under = bdev_ref (d);
  l->d.far = d->far;
  *ret = &l->d;
  return 0;
}
