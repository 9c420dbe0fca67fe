/* See readahead.h.
 *
 * A stream is a place that reads go on from.  Clients keep several requests in flight, which
 * arrive in any order, so a read belongs to a stream if it is near its end, before or behind; how
 * near, depends on its length, or else small reads here and there would look like streams.
 * From the third read that takes the end further on, a window before it is kept announced: up to
 * four times what the stream has read so far, so that a reader who stops has not cost much more
 * than he read.  It ends where another stream began: that has been read by somebody, as when a disk is
 * copied in several places at once.  All streams that have something before them announce together no more
 * than a device is likely to keep until it is read.
 *
 * Deliberately not here: bytes.  What was announced is with the device below.
 */
#include <errno.h>
#include <stdlib.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "dev/readahead.h"

#define NR_STREAMS 32
#define NEAR       (UINT64_C (8) << 20)         /* bytes around the end of a stream, at most, ... */
#define NEAR_READS 32           /* ... and in lengths of the read */
#define FIRST      (UINT64_C (1) << 20)         /* bytes of the first window, and of two steps */
#define STEPS      3            /* reads that make a stream of a place */
#define RECENT     (8 * NR_STREAMS)     /* reads, of all streams */

struct stream {
  uint64_t begin;               /* of the first read */
  uint64_t end;                 /* of the furthest read */
  uint64_t ahead;               /* announced up to here */
  uint64_t resumed;             /* its end when it was last read again after a long time, or begin */
  uint64_t grown;               /* the window grows with what was read from here on */
  uint64_t used;                /* the last read, by number */
  unsigned steps;
};

struct readahead {
  struct bdev d;
  struct bdev *under;
  uint64_t window;              /* bytes of all windows together */
  pthread_mutex_t lock;
  /* protected by lock */
  struct stream streams[NR_STREAMS];
  uint64_t nr_reads;
};

static bool
is_recent_locked (const struct readahead *a, const struct stream *s)
{
  return a->nr_reads - s->used < RECENT;
}

/* The stream that a read belongs to: of those near, the one that was used last.  Old ones that it passes by
 * are forgotten, lest they catch its reads.
 */
static struct stream *
stream_of_locked (struct readahead *a, uint64_t off, uint64_t len)
{
  struct stream *oldest = &a->streams[0], *found = NULL;
  uint64_t near = MIN (NEAR, len * NEAR_READS);

  for (unsigned i = 0; i < NR_STREAMS; ++i) {
    struct stream *s = &a->streams[i], *other = s;

    if (s->steps && off <= s->end + near && s->end <= off + near) {
      if (!found || s->used > found->used) {
        other = found;
        found = s;
      }
      if (other && other->begin <= off && !is_recent_locked (a, other))
        *other = (struct stream) { 0 };
    }
    if (s->used < oldest->used)
      oldest = s;
  }
  if (found)
    return found;
  *oldest = (struct stream) { .begin = off, .end = off, .ahead = off, .resumed = off, .grown = off,
                                .used = a->nr_reads };
  return oldest;
}

/* After so long what was announced may not be kept any more: it is announced again.  For a reader who reads
 * a little at a time, with much between, the window grows anew with what he has read since the last time: or
 * else each of his reads might cost a whole one.
 */
static void
resume_locked (struct stream *s)
{
  s->ahead = s->end;
  s->grown = s->resumed;
  s->resumed = s->end;
}

static uint64_t
largest_window_locked (const struct readahead *a)
{
  unsigned active = 0;

  for (unsigned i = 0; i < NR_STREAMS; ++i) {
    const struct stream *s = &a->streams[i];

    active += s->ahead > s->end && is_recent_locked (a, s);
  }
  return a->window / MAX (active, 2u);
}

/* Where a window from there is to end. */
static uint64_t
end_of_window_locked (const struct readahead *a, uint64_t from, uint64_t to)
{
  for (unsigned i = 0; i < NR_STREAMS; ++i)
    if (a->streams[i].steps >= STEPS && a->streams[i].begin >= from)
      to = MIN (to, a->streams[i].begin);
  return to;
}

/* What is to be announced now that [off, off+len) is read: *from to *to, for that stream; NULL: nothing. */
static struct stream *
step (struct readahead *a, uint64_t off, uint64_t len, uint64_t *from, uint64_t *to)
{
  uint64_t size = bdev_size (&a->d);
  uint64_t window, last;
  struct stream *s;
  LOCK_SCOPE (&a->lock);

  s = stream_of_locked (a, off, len);
  if (!is_recent_locked (a, s))
    resume_locked (s);
  s->used = ++a->nr_reads;
  if (off + len <= s->end)
    return NULL;
  s->end = off + len;
  if (++s->steps < STEPS)
    return NULL;
  window = MIN (MAX (4 * (s->end - s->grown), FIRST), largest_window_locked (a));
  *from = MAX (s->ahead, s->end);
  last = end_of_window_locked (a, s->end, size);
  *to = MIN (s->end + window, last);
  /* In steps worth a request, but for the last. */
  if (*to <= *from || (*to - *from < FIRST / 2 && *to < last))
    return NULL;
  s->ahead = *to;
  return s;
}

/* There is no room for what begins at from: the next read announces it again.  Meanwhile another read may
 * have announced more, beyond to: from there on it is announced twice, lest what is before is forgotten.
 */
static void
take_back (struct readahead *a, struct stream *s, uint64_t from, uint64_t to)
{
  LOCK_SCOPE (&a->lock);

  if (s->begin <= from && s->ahead >= to)       /* not another one in its place */
    s->ahead = from;
}

static void
announce (struct readahead *a, struct stream *s, uint64_t from, uint64_t to)
{
  for (uint64_t at = from; at < to; at += MIN (FIRST, to - at))
    /* A hint: other errors show when it is read. */
    if (bdev_cache (a->under, at, MIN (FIRST, to - at), NULL) == -EAGAIN) {
      take_back (a, s, at, to);
      return;
    }
}

static int
readahead_pread (struct bdev *d, void *buf, size_t len, uint64_t off, struct err *err)
{
  struct readahead *a = (struct readahead *) d;
  uint64_t from, to;
  struct stream *s = step (a, off, len, &from, &to);

  if (s)
    announce (a, s, from, to);
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
readahead_new (struct bdev *under, uint64_t window, struct bdev **ret, struct err *err)
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
  a->window = window;
  pthread_mutex_init (&a->lock, NULL);
  *ret = &a->d;
  return 0;
}
