/* See readahead.h.
 *
 * A stream is a place that reads go on from.  Clients keep several requests in flight, which
 * arrive in any order, so a read belongs to a stream if it is near its end, before or behind; how
 * near, depends on its length, or else small reads here and there would look like streams.
 * From the third read that takes the end further on, a window before it is kept announced: up to
 * four times what the stream has read so far, so that a reader who stops has not cost much more
 * than he read.  All streams together announce no more than a device is likely to keep until it is
 * read.
 *
 * Deliberately not here: bytes.  What was announced is with the device below.
 */
#include <errno.h>
#include <stdlib.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/num.h"
#include "dev/readahead.h"

#define NR_STREAMS 32
#define NEAR       (UINT64_C (4) << 20)         /* bytes around the end of a stream, at most, ... */
#define NEAR_READS 32           /* ... and in lengths of the read */
#define FIRST      (UINT64_C (1) << 20)         /* bytes of the first window, and of two steps */
#define ALL        (UINT64_C (96) << 20)        /* bytes of all windows together */
#define LARGEST    (UINT64_C (32) << 20)        /* bytes of one */
#define STEPS      3            /* reads that make a stream of a place */
#define ACTIVE_MS  1000

struct stream {
  uint64_t begin;               /* of the first read */
  uint64_t end;                 /* of the furthest read */
  uint64_t ahead;               /* announced up to here */
  bool announced;               /* anything */
  uint64_t used_ms;
  unsigned steps;
};

struct readahead {
  struct bdev d;
  struct bdev *under;
  pthread_mutex_t lock;
  struct stream streams[NR_STREAMS];    /* protected by lock */
};

static struct stream *
stream_of_locked (struct readahead *a, uint64_t off, uint64_t len, uint64_t now)
{
  struct stream *oldest = &a->streams[0];
  uint64_t near = MIN (NEAR, len * NEAR_READS);

  for (unsigned i = 0; i < NR_STREAMS; ++i) {
    struct stream *s = &a->streams[i];

    if (s->steps && off <= s->end + near && s->end <= off + near)
      return s;
    if (s->used_ms < oldest->used_ms)
      oldest = s;
  }
  *oldest = (struct stream) { .begin = off, .end = off, .ahead = off, .used_ms = now };
  return oldest;
}

static uint64_t
largest_window_locked (const struct readahead *a, uint64_t now)
{
  unsigned active = 0;

  for (unsigned i = 0; i < NR_STREAMS; ++i)
    active += a->streams[i].announced && now - a->streams[i].used_ms < ACTIVE_MS;
  return MIN (ALL / MAX (active, 1u), LARGEST);
}

/* What is to be announced now that [off, off+len) is read: *from to *to, or nothing. */
static bool
step (struct readahead *a, uint64_t off, uint64_t len, uint64_t *from, uint64_t *to)
{
  uint64_t now = clock_ms (), size = bdev_size (&a->d);
  uint64_t window;
  struct stream *s;
  LOCK_SCOPE (&a->lock);

  s = stream_of_locked (a, off, len, now);
  s->used_ms = now;
  if (off + len <= s->end)
    return false;
  s->end = off + len;
  if (++s->steps < STEPS)
    return false;
  window = MIN (MAX (4 * (s->end - s->begin), FIRST), largest_window_locked (a, now));
  *from = MAX (s->ahead, s->end);
  *to = MIN (s->end + window, size);
  /* In steps worth a request, but for the last. */
  if (*to <= *from || (*to - *from < FIRST / 2 && *to < size))
    return false;
  s->announced = true;
  s->ahead = *to;
  return true;
}

static int
readahead_pread (struct bdev *d, void *buf, size_t len, uint64_t off, struct err *err)
{
  struct readahead *a = (struct readahead *) d;
  uint64_t from, to;

  if (step (a, off, len, &from, &to))
    bdev_cache (a->under, from, to - from, NULL);       /* a hint: errors show when it is read */
  return bdev_pread (a->under, buf, len, off, err);
}

static int
readahead_read_many (struct bdev *d, const struct bdev_range *ranges, size_t nr, bdev_many_fn fn,
                     void *opaque, struct err *err)
{
  return bdev_read_many (((struct readahead *) d)->under, ranges, nr, fn, opaque, err);
}

static int
readahead_pwrite (struct bdev *d, const void *buf, size_t len, uint64_t off, unsigned flags,
                  struct err *err)
{
  return bdev_pwrite (((struct readahead *) d)->under, buf, len, off, flags, err);
}

static int
readahead_zero (struct bdev *d, uint64_t off, uint64_t len, unsigned flags, struct err *err)
{
  return bdev_zero (((struct readahead *) d)->under, off, len, flags, err);
}

static int
readahead_trim (struct bdev *d, uint64_t off, uint64_t len, unsigned flags, struct err *err)
{
  return bdev_trim (((struct readahead *) d)->under, off, len, flags, err);
}

static int
readahead_flush (struct bdev *d, struct err *err)
{
  return bdev_flush (((struct readahead *) d)->under, err);
}

static int
readahead_extents (struct bdev *d, uint64_t off, uint64_t len, bdev_extent_fn fn, void *opaque,
                   struct err *err)
{
  return bdev_extents (((struct readahead *) d)->under, off, len, fn, opaque, err);
}

static int
readahead_cache (struct bdev *d, uint64_t off, uint64_t len, struct err *err)
{
  return bdev_cache (((struct readahead *) d)->under, off, len, err);
}

static void
readahead_close (struct bdev *d)
{
  struct readahead *a = (struct readahead *) d;

  bdev_unref (a->under);
  pthread_mutex_destroy (&a->lock);
  free (a);
}

static const struct bdev_ops readahead_ops = {
  .kind = "readahead",
  .native_fua = true,
  .pread = readahead_pread,
  .read_many = readahead_read_many,
  .pwrite = readahead_pwrite,
  .zero = readahead_zero,
  .trim = readahead_trim,
  .flush = readahead_flush,
  .extents = readahead_extents,
  .cache = readahead_cache,
  .close = readahead_close,
};

int
readahead_new (struct bdev *under, struct bdev **ret, struct err *err)
{
  struct readahead *a = calloc (1, sizeof *a);
  int r;

  if (!a)
    return err_set (err, ENOMEM, "out of memory");
  r = bdev_init (&a->d, &readahead_ops, under->name, bdev_size (under), under->writable, false, err);
  if (r < 0) {
    free (a);
    return r;
  }
  a->d.far = under->far;
  a->under = bdev_ref (under);
  pthread_mutex_init (&a->lock, NULL);
  *ret = &a->d;
  return 0;
}
