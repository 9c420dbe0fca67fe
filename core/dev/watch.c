/* See watch.h.  Ranges are kept sorted and joined; a range that is read well later (a disk may
 * change its mind) stays noted, since somebody was told that it could not be read.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "dev/watch.h"

#define SECTOR    512
#define PARTS     64            /* that a range is cut into to be looked at closer */
#define MAX_FOUND 256           /* bad parts of one range; more are noted as a whole */
#define MAX_KEPT  65536         /* ranges; what fails beyond these is counted each time */

struct watch {
  struct bdev d;
  struct bdev *under;
  bool narrow;
  pthread_mutex_t lock;
  struct watch_notes notes;     /* protected by lock */
};

/* --- notes */

static bool
out_of_reach (int r)
{
  return r == -ENOTCONN || r == -ESHUTDOWN || r == -ETIMEDOUT;
}

/* The first range that ends at or behind off. */
static size_t
find_locked (const struct unread_vec *v, uint64_t off)
{
  size_t low = 0, high = v->len;

  while (low < high) {
    size_t mid = low + (high - low) / 2;

    if (v->ptr[mid].off + v->ptr[mid].len < off)
      low = mid + 1;
    else
      high = mid;
  }
  return low;
}

static void
note (struct watch *w, uint64_t off, uint64_t len)
{
  struct unread_vec *v = &w->notes.ranges;
  uint64_t end = off + len, known = 0;
  size_t i, n = 0;

  LOCK_SCOPE (&w->lock);
  i = find_locked (v, off);
  for (; i + n < v->len && v->ptr[i + n].off <= end; ++n) {
    off = MIN (off, v->ptr[i + n].off);
    end = MAX (end, v->ptr[i + n].off + v->ptr[i + n].len);
    known += v->ptr[i + n].len;
  }
  w->notes.bytes += end - off - known;
  if (n == 0 && (v->len >= MAX_KEPT || unread_vec_reserve (v, 1) < 0))
    return;
  memmove (v->ptr + i + 1, v->ptr + i + n, (v->len - i - n) * sizeof *v->ptr);
  v->ptr[i] = (struct unread_range) { off, end - off };
  v->len = v->len + 1 - n;
}

/* --- looking closer */

struct parts {
  const struct bdev_range *ranges;
  pthread_mutex_t lock;
  struct unread_vec *bad;       /* protected by lock */
};

static int
part_read (void *opaque, size_t i, const void *buf, int r, const struct err *why)
{
  struct parts *p = opaque;

  if (r == 0)
    return 0;
  if (out_of_reach (r))
    return r;
  LOCK_SCOPE (&p->lock);
  return unread_vec_push (p->bad, (struct unread_range) { p->ranges[i].off, p->ranges[i].len });
}

static bool
in_one_sector (uint64_t off, uint64_t len)
{
  return off / SECTOR == (off + len - 1) / SECTOR;
}

/* Add the parts of the range that cannot be read. */
static int
bad_parts (struct bdev *under, uint64_t off, uint64_t len, struct unread_vec *bad)
{
  uint64_t step = ROUND_UP (MAX (len / PARTS, (uint64_t) SECTOR), SECTOR), end = off + len;
  struct bdev_range ranges[PARTS + 2];
  struct parts p = { .ranges = ranges, .bad = bad };
  size_t nr = 0;
  int r;

  while (off < end) {           /* parts begin where sectors do */
    uint64_t to = MIN (ROUND_DOWN (off, SECTOR) + step, end);

    ranges[nr++] = (struct bdev_range) { off, to - off };
    off = to;
  }
  pthread_mutex_init (&p.lock, NULL);
  r = bdev_read_many (under, ranges, nr, part_read, &p, NULL);
  pthread_mutex_destroy (&p.lock);
  return r;
}

/* The bad sectors of a range of which something could not be read. */
static void
look_closer (struct watch *w, uint64_t off, uint64_t len)
{
  struct unread_vec bad = VEC_INIT, finer = VEC_INIT;
  int r = unread_vec_push (&bad, (struct unread_range) { off, len });
  bool coarse = r == 0;

  while (coarse && r == 0) {
    finer.len = 0;
    coarse = false;
    for (size_t i = 0; i < bad.len && r == 0; ++i)
      r = in_one_sector (bad.ptr[i].off, bad.ptr[i].len)
            ? unread_vec_push (&finer, bad.ptr[i])
            : bad_parts (w->under, bad.ptr[i].off, bad.ptr[i].len, &finer);
    if (r < 0 || finer.len > MAX_FOUND)
      break;
    for (size_t i = 0; i < finer.len; ++i)
      coarse = coarse || !in_one_sector (finer.ptr[i].off, finer.ptr[i].len);
    bad.len = 0;
    for (size_t i = 0; i < finer.len && r == 0; ++i)
      r = unread_vec_push (&bad, finer.ptr[i]);
  }
  for (size_t i = 0; i < bad.len; ++i)
    note (w, bad.ptr[i].off, bad.ptr[i].len);
  vec_reset (&bad);
  vec_reset (&finer);
}

static void
read_failed (struct watch *w, uint64_t off, uint64_t len, int r)
{
  if (out_of_reach (r)) {
    LOCK_SCOPE (&w->lock);
    w->notes.unreachable++;
  }
  else if (r == -EIO && w->narrow && !in_one_sector (off, len))
    look_closer (w, off, len);
  else if (r == -EIO)
    note (w, off, len);
}

/* --- the device */

static int
watch_pread (struct bdev *d, void *buf, size_t len, uint64_t off, struct err *err)
{
  struct watch *w = (struct watch *) d;
  int r = bdev_pread (w->under, buf, len, off, err);

  if (r < 0)
    read_failed (w, off, len, r);
  return r;
}

struct many {
  struct watch *w;
  const struct bdev_range *ranges;
  bdev_many_fn fn;
  void *opaque;
  pthread_mutex_t lock;
  struct unread_vec failed;     /* protected by lock; looked at when all is read */
};

static int
many_read (void *opaque, size_t i, const void *buf, int r, const struct err *why)
{
  struct many *m = opaque;
  uint64_t size = bdev_size (&m->w->d), off = m->ranges[i].off;

  if (out_of_reach (r))
    read_failed (m->w, off, 0, r);
  else if (r == -EIO && off < size) {
    LOCK_SCOPE (&m->lock);
    unread_vec_push (&m->failed, (struct unread_range) { off, MIN (m->ranges[i].len, size - off) });
  }
  return m->fn (m->opaque, i, buf, r, why);
}

static int
watch_read_many (struct bdev *d, const struct bdev_range *ranges, size_t nr, bdev_many_fn fn,
                 void *opaque, struct err *err)
{
  struct watch *w = (struct watch *) d;
  struct many m = { .w = w, .ranges = ranges, .fn = fn, .opaque = opaque, .failed = VEC_INIT };
  int r;

  pthread_mutex_init (&m.lock, NULL);
  r = bdev_read_many (w->under, ranges, nr, many_read, &m, err);
  for (size_t i = 0; i < m.failed.len; ++i)
    read_failed (w, m.failed.ptr[i].off, m.failed.ptr[i].len, -EIO);
  vec_reset (&m.failed);
  pthread_mutex_destroy (&m.lock);
  return r;
}

static int
watch_pwrite (struct bdev *d, const void *buf, size_t len, uint64_t off, unsigned flags,
              struct err *err)
{
  return bdev_pwrite (((struct watch *) d)->under, buf, len, off, flags, err);
}

static int
watch_zero (struct bdev *d, uint64_t off, uint64_t len, unsigned flags, struct err *err)
{
  return bdev_zero (((struct watch *) d)->under, off, len, flags, err);
}

static int
watch_trim (struct bdev *d, uint64_t off, uint64_t len, unsigned flags, struct err *err)
{
  return bdev_trim (((struct watch *) d)->under, off, len, flags, err);
}

static int
watch_flush (struct bdev *d, struct err *err)
{
  return bdev_flush (((struct watch *) d)->under, err);
}

static int
watch_resize (struct bdev *d, uint64_t size, uint64_t ahead, struct err *err)
{
  struct watch *w = (struct watch *) d;
  int r = bdev_grow (w->under, size, ahead, err);

  atomic_store (&d->size, bdev_size (w->under));
  return r;
}

static int
watch_extents (struct bdev *d, uint64_t off, uint64_t len, bdev_extent_fn fn, void *opaque,
               struct err *err)
{
  return bdev_extents (((struct watch *) d)->under, off, len, fn, opaque, err);
}

static int
watch_cache (struct bdev *d, uint64_t off, uint64_t len, struct err *err)
{
  return bdev_cache (((struct watch *) d)->under, off, len, err);
}

static int
watch_make_writable (struct bdev *d, struct err *err)
{
  int r = bdev_make_writable (((struct watch *) d)->under, err);

  d->writable = d->writable || r == 0;
  return r;
}

static int
watch_identity (struct bdev *d, struct bdev_identity *id, struct err *err)
{
  return bdev_identity (((struct watch *) d)->under, id, err);
}

static void
watch_close (struct bdev *d)
{
  struct watch *w = (struct watch *) d;

  bdev_unref (w->under);
  vec_reset (&w->notes.ranges);
  pthread_mutex_destroy (&w->lock);
  free (w);
}

static const struct bdev_ops watch_ops = {
  .kind = "watch",
  .native_fua = true,
  .pread = watch_pread,
  .read_many = watch_read_many,
  .pwrite = watch_pwrite,
  .zero = watch_zero,
  .trim = watch_trim,
  .flush = watch_flush,
  .resize = watch_resize,
  .extents = watch_extents,
  .cache = watch_cache,
  .make_writable = watch_make_writable,
  .identity = watch_identity,
  .close = watch_close,
};

int
watch_new (struct bdev *under, bool narrow, struct bdev **ret, struct err *err)
{
  struct watch *w = calloc (1, sizeof *w);
  int r;

  if (!w)
    return err_set (err, ENOMEM, "out of memory");
  r = bdev_init (&w->d, &watch_ops, under->name, bdev_size (under), under->writable,
                 under->can_grow, err);
  if (r < 0) {
    free (w);
    return r;
  }
  w->d.far = under->far;
  w->under = bdev_ref (under);
  w->narrow = narrow;
  pthread_mutex_init (&w->lock, NULL);
  *ret = &w->d;
  return 0;
}

int
watch_notes (struct bdev *d, struct watch_notes *notes, struct err *err)
{
  struct watch *w = (struct watch *) d;
  LOCK_SCOPE (&w->lock);
  size_t nr = MIN (w->notes.ranges.len, (size_t) WATCH_MAX_RANGES);

  *notes = w->notes;
  notes->ranges = (struct unread_vec) VEC_INIT;
  if (unread_vec_reserve (&notes->ranges, nr) < 0)
    return err_set (err, ENOMEM, "out of memory");
  for (size_t i = 0; i < nr; ++i)
    unread_vec_push (&notes->ranges, w->notes.ranges.ptr[i]);
  return 0;
}
