/* See recorder.h. */
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "dev/many.h"
#include "recorder.h"

struct bad {
  uint64_t off, len;
  int error;
};
DEFINE_VEC (bad_vec, struct bad);

struct recorder {
  struct bdev d;
  struct bdev *under;
  pthread_mutex_t lock;
  struct recorded_vec list;     /* protected by lock */
  struct bad_vec bad;           /* protected by lock */
  atomic_bool refuses;
  void (*first) (void *opaque); /* see recorder_refuse_after; one thread */
  void *opaque;
};

static struct bdev *
record (struct bdev *d, enum recorded_op op, uint64_t off, uint64_t len, unsigned flags)
{
  struct recorder *rec = (struct recorder *) d;
  LOCK_SCOPE (&rec->lock);

  if (recorded_vec_push (&rec->list, (struct recorded) { op, off, len, flags }) < 0)
    abort ();
  return rec->under;
}

static int
error_at (struct recorder *rec, uint64_t off, uint64_t len)
{
  LOCK_SCOPE (&rec->lock);
  for (size_t i = 0; i < rec->bad.len; ++i)
    if (ranges_overlap (rec->bad.ptr[i].off, rec->bad.ptr[i].len, off, len))
      return rec->bad.ptr[i].error;
  return 0;
}

static int
recorder_pread (struct bdev *d, void *buf, size_t len, uint64_t off, struct err *err)
{
  struct bdev *under = record (d, REC_READ, off, len, 0);
  int error = error_at ((struct recorder *) d, off, len);

  return error ? err_set (err, error, "%s: bad on purpose", d->name)
               : bdev_pread (under, buf, len, off, err);
}

static int
recorder_pwrite (struct bdev *d, const void *buf, size_t len, uint64_t off, unsigned flags,
                 struct err *err)
{
  return bdev_pwrite (record (d, REC_WRITE, off, len, flags), buf, len, off, flags, err);
}

static int
recorder_zero (struct bdev *d, uint64_t off, uint64_t len, unsigned flags, struct err *err)
{
  return bdev_zero (record (d, REC_ZERO, off, len, flags), off, len, flags, err);
}

static int
recorder_trim (struct bdev *d, uint64_t off, uint64_t len, unsigned flags, struct err *err)
{
  return bdev_trim (record (d, REC_TRIM, off, len, flags), off, len, flags, err);
}

static int
recorder_flush (struct bdev *d, struct err *err)
{
  return bdev_flush (record (d, REC_FLUSH, 0, 0, 0), err);
}

static int
recorder_resize (struct bdev *d, uint64_t size, uint64_t ahead, struct err *err)
{
  int r = bdev_grow (record (d, REC_RESIZE, size, 0, 0), size, ahead, err);

  atomic_store (&d->size, bdev_size (((struct recorder *) d)->under));
  return r;
}

static int
recorder_extents (struct bdev *d, uint64_t off, uint64_t len, bdev_extent_fn fn, void *opaque,
                  struct err *err)
{
  return bdev_extents (record (d, REC_EXTENTS, off, len, 0), off, len, fn, opaque, err);
}

static int
recorder_cache (struct bdev *d, uint64_t off, uint64_t len, struct err *err)
{
  struct recorder *rec = (struct recorder *) d;
  void (*first) (void *) = rec->first;

  if (first) {
    rec->first = NULL;
    first (rec->opaque);
    return -EAGAIN;
  }
  if (atomic_load (&rec->refuses))
    return -EAGAIN;
  return bdev_cache (record (d, REC_CACHE, off, len, 0), off, len, err);
}

static int
recorder_make_writable (struct bdev *d, struct err *err)
{
  int r = bdev_make_writable (((struct recorder *) d)->under, err);

  d->writable = d->writable || r == 0;
  return r;
}

static int
recorder_identity (struct bdev *d, struct bdev_identity *id, struct err *err)
{
  return bdev_identity (((struct recorder *) d)->under, id, err);
}

static void
recorder_close (struct bdev *d)
{
  struct recorder *rec = (struct recorder *) d;

  bdev_unref (rec->under);
  vec_reset (&rec->list);
  vec_reset (&rec->bad);
  pthread_mutex_destroy (&rec->lock);
  free (rec);
}

static const struct bdev_ops recorder_ops = {
  .kind = "recorder",
  .native_fua = true,
  .pread = recorder_pread,
  .read_many = many_read,
  .pwrite = recorder_pwrite,
  .zero = recorder_zero,
  .trim = recorder_trim,
  .flush = recorder_flush,
  .resize = recorder_resize,
  .extents = recorder_extents,
  .cache = recorder_cache,
  .make_writable = recorder_make_writable,
  .identity = recorder_identity,
  .close = recorder_close,
};

int
recorder_new (struct bdev *under, bool far, struct bdev **ret, struct err *err)
{
  struct recorder *rec = calloc (1, sizeof *rec);
  int r = rec ? bdev_init (&rec->d, &recorder_ops, under->name, bdev_size (under),
                           under->writable, under->can_grow, err)
              : err_set (err, ENOMEM, "out of memory");

  if (r < 0) {
    free (rec);
    return r;
  }
  pthread_mutex_init (&rec->lock, NULL);
  rec->under = bdev_ref (under);
  rec->d.far = far;
  *ret = &rec->d;
  return 0;
}

struct recorded_vec
recorder_take (struct bdev *d)
{
  struct recorder *rec = (struct recorder *) d;
  LOCK_SCOPE (&rec->lock);
  struct recorded_vec v = rec->list;

  rec->list = (struct recorded_vec) VEC_INIT;
  return v;
}

void
recorder_forget (struct bdev *d)
{
  struct recorded_vec v = recorder_take (d);

  vec_reset (&v);
}

static uint64_t
sum (struct bdev *d, enum recorded_op op, bool bytes)
{
  struct recorder *rec = (struct recorder *) d;
  uint64_t n = 0;
  LOCK_SCOPE (&rec->lock);

  for (size_t i = 0; i < rec->list.len; ++i)
    if (rec->list.ptr[i].op == op)
      n += bytes ? rec->list.ptr[i].len : 1;
  return n;
}

uint64_t
recorder_count (struct bdev *d, enum recorded_op op)
{
  return sum (d, op, false);
}

uint64_t
recorder_bytes (struct bdev *d, enum recorded_op op)
{
  return sum (d, op, true);
}

static int
compare (const void *pa, const void *pb)
{
  const struct recorded *a = pa, *b = pb;

  return a->off < b->off ? -1 : a->off > b->off;
}

bool
recorder_read_twice (struct bdev *d)
{
  struct recorder *rec = (struct recorder *) d;
  struct recorded_vec reads = VEC_INIT;
  bool twice = false;

  {
    LOCK_SCOPE (&rec->lock);
    for (size_t i = 0; i < rec->list.len; ++i)
      if (rec->list.ptr[i].op == REC_READ && recorded_vec_push (&reads, rec->list.ptr[i]) < 0)
        abort ();
  }
  if (reads.len)
    qsort (reads.ptr, reads.len, sizeof *reads.ptr, compare);
  for (size_t i = 1; i < reads.len && !twice; ++i) {
    const struct recorded *a = &reads.ptr[i - 1], *b = &reads.ptr[i];

    twice = b->off < a->off + a->len;
    if (twice)
      fprintf (stderr, "read twice: %" PRIu64 " bytes at byte %" PRIu64 ", and %" PRIu64
               " at %" PRIu64 "\n", a->len, a->off, b->len, b->off);
  }
  vec_reset (&reads);
  return twice;
}

void
recorder_fail (struct bdev *d, uint64_t off, uint64_t len, int error)
{
  struct recorder *rec = (struct recorder *) d;
  LOCK_SCOPE (&rec->lock);

  if (bad_vec_push (&rec->bad, (struct bad) { off, len, error }) < 0)
    abort ();
}

void
recorder_refuse (struct bdev *d, bool on)
{
  atomic_store (&((struct recorder *) d)->refuses, on);
}

void
recorder_refuse_after (struct bdev *d, void (*fn) (void *opaque), void *opaque)
{
  struct recorder *rec = (struct recorder *) d;

  rec->opaque = opaque;
  rec->first = fn;
}

void
recorder_heal (struct bdev *d)
{
  struct recorder *rec = (struct recorder *) d;
  LOCK_SCOPE (&rec->lock);

  rec->bad.len = 0;
}
