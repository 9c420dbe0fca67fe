/* See concat.h.
 *
 * The start of every slice in the whole is kept beside it, so that the slice of an
 * offset is found by bisection: there may be millions of them.  All is constant
 * once made, hence no lock.
 *
 * Deliberately not here: joining slices that adjoin, which is cheaper where they are
 * found.
 */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "dev/concat.h"

struct concat {
  struct bdev d;
  struct bdev *under;
  struct slice_of *slices;
  uint64_t *starts;             /* of each slice in the whole */
  size_t nr;
};

/* The slice that holds off, which lies inside the device. */
static size_t
find_slice (const struct concat *c, uint64_t off)
{
  size_t low = 0, high = c->nr;

  while (high - low > 1) {
    size_t mid = low + (high - low) / 2;

    if (c->starts[mid] <= off)
      low = mid;
    else
      high = mid;
  }
  return low;
}

/* The piece of slice i from off on: its place below, and how much of len. */
static uint64_t
piece (const struct concat *c, size_t i, uint64_t off, uint64_t len, uint64_t *under_off)
{
  uint64_t in_slice = off - c->starts[i];

  *under_off = c->slices[i].off + in_slice;
  return MIN (c->slices[i].len - in_slice, len);
}

/* Slices that are being read into one buffer, each to its place. */
struct gathering {
  const struct bdev_range *ranges;
  uint8_t *const *to;
  pthread_mutex_t lock;
  struct err why;               /* protected by lock: of the first that failed */
};

static int
slice_read (void *opaque, size_t i, const void *buf, int r, const struct err *why)
{
  struct gathering *g = opaque;

  if (r == 0) {
    memcpy (g->to[i], buf, g->ranges[i].len);
    return 0;
  }
  LOCK_SCOPE (&g->lock);
  if (g->why.code == 0 && why)
    g->why = *why;
  return r;
}

#define MAX_GATHER 64

/* A far device is asked for many slices at once. */
static int
pread_far (struct concat *c, uint8_t *p, size_t len, uint64_t off, struct err *err)
{
  struct bdev_range ranges[MAX_GATHER];
  uint8_t *to[MAX_GATHER];
  struct gathering g = { .ranges = ranges, .to = to };
  struct err why = { 0 };
  int r = 0;

  pthread_mutex_init (&g.lock, NULL);
  for (size_t i = find_slice (c, off), nr = 0; len > 0 && r == 0; ++i) {
    uint64_t under_off, n = piece (c, i, off, len, &under_off);

    ranges[nr] = (struct bdev_range) { under_off, n };
    to[nr++] = p;
    p += n;
    off += n;
    len -= n;
    if (nr == MAX_GATHER || len == 0) {
      r = bdev_read_many (c->under, ranges, nr, slice_read, &g, &why);
      nr = 0;
    }
  }
  pthread_mutex_destroy (&g.lock);
  return r < 0 ? err_set (err, -r, "%s", g.why.code ? g.why.msg : why.msg) : 0;
}

static int
concat_pread (struct bdev *d, void *buf, size_t len, uint64_t off, struct err *err)
{
  struct concat *c = (struct concat *) d;
  uint8_t *p = buf;

  if (d->far)
    return pread_far (c, buf, len, off, err);
  for (size_t i = find_slice (c, off); len > 0; ++i) {
    uint64_t under_off, n = piece (c, i, off, len, &under_off);
    int r = bdev_pread (c->under, p, n, under_off, err);

    if (r < 0)
      return r;
    p += n;
    off += n;
    len -= n;
  }
  return 0;
}

static int
concat_cache (struct bdev *d, uint64_t off, uint64_t len, struct err *err)
{
  struct concat *c = (struct concat *) d;

  for (size_t i = find_slice (c, off); len > 0; ++i) {
    uint64_t under_off, n = piece (c, i, off, len, &under_off);
    int r = bdev_cache (c->under, under_off, n, err);

    if (r < 0)
      return r;
    off += n;
    len -= n;
  }
  return 0;
}

/* --- extents */

struct walk {
  bdev_extent_fn fn;
  void *opaque;
  uint64_t shift;               /* from an offset below to one of ours, modulo 2^64 */
  bool stop;
};

static int
under_extent (void *opaque, uint64_t off, uint64_t len, unsigned kind)
{
  struct walk *w = opaque;
  int r = w->fn (w->opaque, off + w->shift, len, kind);

  w->stop = r > 0;
  return r;
}

static int
concat_extents (struct bdev *d, uint64_t off, uint64_t len, bdev_extent_fn fn, void *opaque,
                struct err *err)
{
  struct concat *c = (struct concat *) d;
  struct walk w = { .fn = fn, .opaque = opaque };

  for (size_t i = find_slice (c, off); len > 0 && !w.stop; ++i) {
    uint64_t under_off, n = piece (c, i, off, len, &under_off);
    int r;

    w.shift = off - under_off;
    r = bdev_extents (c->under, under_off, n, under_extent, &w, err);
    if (r < 0)
      return r;
    off += n;
    len -= n;
  }
  return 0;
}

/* --- life */

static void
concat_close (struct bdev *d)
{
  struct concat *c = (struct concat *) d;

  bdev_unref (c->under);
  free (c->slices);
  free (c->starts);
  free (c);
}

static const struct bdev_ops concat_ops = {
  .kind = "concat",
  .pread = concat_pread,
  .extents = concat_extents,
  .cache = concat_cache,
  .close = concat_close,
};

/* Where each slice starts in the whole, and how long that is. */
static int
lay_out (struct concat *c, uint64_t *size, struct err *err)
{
  c->starts = malloc (MAX (c->nr, (size_t) 1) * sizeof *c->starts);
  if (c->starts == NULL)
    return err_set (err, ENOMEM, "out of memory");
  for (size_t i = 0; i < c->nr; ++i) {
    const struct slice_of *s = &c->slices[i];

    c->starts[i] = *size;
    if (s->len == 0 || !range_fits (s->off, s->len, bdev_size (c->under)) ||
        add_overflows (*size, s->len, size) || *size > INT64_MAX)
      return err_set (err, EINVAL, "slice %zu of %s does not lie inside it", i, c->under->name);
  }
  return 0;
}

int
concat_new (const char *name, struct bdev *under, struct slice_of_vec *slices,
            struct bdev **ret, struct err *err)
{
  struct concat *c = calloc (1, sizeof *c);
  uint64_t size = 0;
  int r;

  if (c == NULL) {
    vec_reset (slices);
    return err_set (err, ENOMEM, "out of memory");
  }
  c->slices = slices->ptr;
  c->nr = slices->len;
  *slices = (struct slice_of_vec) VEC_INIT;
  c->under = bdev_ref (under);
  r = lay_out (c, &size, err);
  if (r == 0)
    r = bdev_init (&c->d, &concat_ops, name, size, false, false, err);
  if (r < 0) {
    concat_close (&c->d);
    return r;
  }
  c->d.far = under->far;
  *ret = &c->d;
  return 0;
}
