/* See journeys.h.  Time is counted in journeys; now moves when somebody waits. */
#include <pthread.h>
#include <stdlib.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "base/vec.h"
#include "journeys.h"

#define AT_ONCE    64
#define KEPT_BYTES (UINT64_C (32) << 20)

/* Announced bytes, there from then on. */
struct announced {
  uint64_t off, end, then;
};
DEFINE_VEC (announced_vec, struct announced);

struct journeys {
  struct bdev d;
  struct bdev *under;
  pthread_mutex_t lock;
  /* protected by lock */
  uint64_t now;
  uint64_t sent;                /* announcements since now moved */
  uint64_t bytes;               /* in the list */
  struct announced_vec list;    /* oldest first */
};

static struct journeys *
journeys_of (struct bdev *d)
{
  return (struct journeys *) d;
}

static void
move_to_locked (struct journeys *j, uint64_t then)
{
  if (then <= j->now)
    return;
  j->now = then;
  j->sent = 0;
}

/* Was all of the range announced?  Then *then is when it is there. */
static bool
find_locked (const struct journeys *j, uint64_t off, uint64_t len, uint64_t *then)
{
  uint64_t end = off + MIN (len, bdev_size (&j->d) - MIN (off, bdev_size (&j->d)));

  while (off < end) {
    const struct announced *a = NULL;

    for (size_t i = j->list.len; i > 0 && !a; --i)
      if (j->list.ptr[i - 1].off <= off && j->list.ptr[i - 1].end > off)
        a = &j->list.ptr[i - 1];
    if (!a)
      return false;
    *then = MAX (*then, a->then);
    off = a->end;
  }
  return true;
}

static void
wait_for (struct journeys *j, const struct bdev_range *ranges, size_t nr)
{
  uint64_t then = 0, asked = 0;
  LOCK_SCOPE (&j->lock);

  for (size_t i = 0; i < nr; ++i)
    asked += ranges[i].len > 0 && !find_locked (j, ranges[i].off, ranges[i].len, &then);
  move_to_locked (j, MAX (then, j->now + DIV_ROUND_UP (asked, AT_ONCE)));
}

static int
journeys_pread (struct bdev *d, void *buf, size_t len, uint64_t off, struct err *err)
{
  struct bdev_range range = { off, len };

  wait_for (journeys_of (d), &range, 1);
  return bdev_pread (journeys_of (d)->under, buf, len, off, err);
}

static int
journeys_read_many (struct bdev *d, const struct bdev_range *ranges, size_t nr, bdev_many_fn fn,
                    void *opaque, struct err *err)
{
  wait_for (journeys_of (d), ranges, nr);
  return bdev_read_many (journeys_of (d)->under, ranges, nr, fn, opaque, err);
}

static int
journeys_pwrite (struct bdev *d, const void *buf, size_t len, uint64_t off, unsigned flags,
                 struct err *err)
{
  return bdev_pwrite (journeys_of (d)->under, buf, len, off, flags, err);
}

static int
journeys_zero (struct bdev *d, uint64_t off, uint64_t len, unsigned flags, struct err *err)
{
  return bdev_zero (journeys_of (d)->under, off, len, flags, err);
}

static int
journeys_flush (struct bdev *d, struct err *err)
{
  return bdev_flush (journeys_of (d)->under, err);
}

static int
journeys_extents (struct bdev *d, uint64_t off, uint64_t len, bdev_extent_fn fn, void *opaque,
                  struct err *err)
{
  struct journeys *j = journeys_of (d);

  {
    LOCK_SCOPE (&j->lock);
    move_to_locked (j, j->now + 1);
  }
  return bdev_extents (j->under, off, len, fn, opaque, err);
}

static int
journeys_cache (struct bdev *d, uint64_t off, uint64_t len, struct err *err)
{
  struct journeys *j = journeys_of (d);
  uint64_t then = 0;
  size_t gone = 0;
  LOCK_SCOPE (&j->lock);

  if (find_locked (j, off, len, &then))
    return 0;                   /* on its way already */
  if (announced_vec_push (&j->list, (struct announced) {
        off, off + len, j->now + 1 + j->sent++ / AT_ONCE }) < 0)
    return err_set (err, ENOMEM, "out of memory");
  for (j->bytes += len; j->bytes > KEPT_BYTES; ++gone)
    j->bytes -= j->list.ptr[gone].end - j->list.ptr[gone].off;
  j->list.len -= gone;
  memmove (j->list.ptr, j->list.ptr + gone, j->list.len * sizeof *j->list.ptr);
  return 0;
}

static void
journeys_close (struct bdev *d)
{
  struct journeys *j = journeys_of (d);

  bdev_unref (j->under);
  vec_reset (&j->list);
  pthread_mutex_destroy (&j->lock);
  free (j);
}

static const struct bdev_ops journeys_ops = {
  .kind = "journeys",
  .pread = journeys_pread,
  .read_many = journeys_read_many,
  .pwrite = journeys_pwrite,
  .zero = journeys_zero,
  .flush = journeys_flush,
  .extents = journeys_extents,
  .cache = journeys_cache,
  .close = journeys_close,
};

int
journeys_new (struct bdev *under, struct bdev **ret, struct err *err)
{
  struct journeys *j = calloc (1, sizeof *j);
  int r = j ? bdev_init (&j->d, &journeys_ops, under->name, bdev_size (under), under->writable,
                         false, err)
            : err_set (err, ENOMEM, "out of memory");

  if (r < 0) {
    free (j);
    return r;
  }
  pthread_mutex_init (&j->lock, NULL);
  j->under = bdev_ref (under);
  j->d.far = true;
  *ret = &j->d;
  return 0;
}

uint64_t
journeys_made (struct bdev *d)
{
  LOCK_SCOPE (&journeys_of (d)->lock);
  return journeys_of (d)->now;
}

void
journeys_reset (struct bdev *d)
{
  struct journeys *j = journeys_of (d);
  LOCK_SCOPE (&j->lock);

  j->now = j->sent = j->bytes = 0;
  j->list.len = 0;
}
