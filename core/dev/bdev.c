/* What all block devices share: see bdev.h.
 *
 * Every request goes through here once, so that a device's own functions can
 * rely on sane arguments: bounds are tested in one place, with arithmetic that
 * cannot overflow, and an operation that a device lacks is made of those that
 * it has.  A device never sees a request of no bytes, one that leaves it, or a
 * change to a device that is read-only.
 *
 * Deliberately not here: locks (a device knows best what excludes what),
 * caches, splitting of large requests.
 *
 * Invariants: I1 begins here; whatever was opened read-only is refused with
 * -EROFS before the device is asked.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "dev/ahead.h"
#include "dev/bdev.h"

#define ZERO_CHUNK (256 * 1024)

/* Never written; not const, so that it lies in .bss and not in the file. */
static uint8_t zeros[ZERO_CHUNK];

int
bdev_init (struct bdev *d, const struct bdev_ops *ops, const char *name,
           uint64_t size, bool writable, bool can_grow, struct err *err)
{
  d->name = strdup (name);
  if (d->name == NULL)
    return err_set (err, ENOMEM, "out of memory");
  d->ops = ops;
  d->writable = writable;
  d->can_grow = can_grow;
  d->far = false;
  atomic_init (&d->refs, 1);
  atomic_init (&d->size, size);
  return 0;
}

struct bdev *
bdev_ref (struct bdev *d)
{
  if (d) {
    unsigned before = atomic_fetch_add_explicit (&d->refs, 1, memory_order_relaxed);

    assert (before > 0);
    (void) before;
  }
  return d;
}

void
bdev_unref (struct bdev *d)
{
  unsigned before;
  char *name;

  if (d == NULL)
    return;
  before = atomic_fetch_sub_explicit (&d->refs, 1, memory_order_acq_rel);
  assert (before > 0);
  if (before > 1)
    return;
  name = d->name;               /* close may still want it for messages */
  d->ops->close (d);
  free (name);
}

/* A device that failed without a word still gets a message that names it. */
static int
finish (struct bdev *d, int r, const char *what, struct err *err)
{
  if (r >= 0)
    return 0;
  return err_set (err, -r, "%s: %s: %s", d->name, what, strerror (-r));
}

static int
check_range (struct bdev *d, uint64_t off, uint64_t len, const char *what, struct err *err)
{
  uint64_t size = bdev_size (d);

  if (range_fits (off, len, size))
    return 0;
  return err_set (err, EINVAL, "%s: %s of %llu bytes at byte %llu reaches past the end of "
                  "the device (%llu bytes)", d->name, what, (unsigned long long) len,
                  (unsigned long long) off, (unsigned long long) size);
}

static int
check_change (struct bdev *d, uint64_t off, uint64_t len, const char *what, struct err *err)
{
  if (!d->writable)
    return err_set (err, EROFS, "%s: %s refused: it is open read-only", d->name, what);
  return check_range (d, off, len, what, err);
}

/* What is left of flags for the device itself; *flush says whether durability
 * has to come from a flush afterwards.
 */
static unsigned
split_fua (struct bdev *d, unsigned flags, bool *flush)
{
  *flush = (flags & BDEV_FUA) && !d->ops->native_fua;
  return *flush ? flags & ~BDEV_FUA : flags;
}

int
bdev_pread (struct bdev *d, void *buf, size_t len, uint64_t off, struct err *err)
{
  int r = check_range (d, off, len, "read", err);

  if (r < 0 || len == 0)
    return r;
  return finish (d, d->ops->pread (d, buf, len, off, err), "read", err);
}

int
bdev_pread_padded (struct bdev *d, void *buf, size_t len, uint64_t off, struct err *err)
{
  uint64_t size = bdev_size (d);
  size_t inside = off < size ? MIN (len, size - off) : 0;

  if (len > inside)
    memset ((uint8_t *) buf + inside, 0, len - inside);
  return inside ? bdev_pread (d, buf, inside, off, err) : 0;
}

static bool
range_of_list (void *opaque, uint64_t i, struct bdev_range *range)
{
  *range = ((const struct bdev_range *) opaque)[i];
  return true;
}

/* One range after the other, through one buffer. */
static int
read_many_emulated (struct bdev *d, const struct bdev_range *ranges, size_t nr,
                    bdev_many_fn fn, void *opaque)
{
  CLEANUP_FREE uint8_t *buf = NULL;
  struct ahead ahead;
  size_t cap = 0;

  ahead_init (&ahead, d, nr, range_of_list, (void *) ranges);
  for (size_t i = 0; i < nr; ++i) {
    struct err why = { 0 };
    int r = 0;

    ahead_at (&ahead, i);
    if (buf == NULL || ranges[i].len > cap) {
      free (buf);
      cap = MAX (ranges[i].len, 1);
      buf = malloc (cap);
      if (buf == NULL)
        r = err_set (&why, ENOMEM, "out of memory");
    }
    if (r == 0)
      r = bdev_pread_padded (d, buf, ranges[i].len, ranges[i].off, &why);
    r = fn (opaque, i, buf, r, &why);
    if (r < 0)
      return r;
  }
  return 0;
}

int
bdev_read_many (struct bdev *d, const struct bdev_range *ranges, size_t nr,
                bdev_many_fn fn, void *opaque, struct err *err)
{
  int r;

  if (nr == 0)
    return 0;
  if (d->ops->read_many)
    r = d->ops->read_many (d, ranges, nr, fn, opaque, err);
  else
    r = read_many_emulated (d, ranges, nr, fn, opaque);
  return finish (d, r, "reading", err);
}

int
bdev_pwrite (struct bdev *d, const void *buf, size_t len, uint64_t off,
             unsigned flags, struct err *err)
{
  bool flush;
  int r = check_change (d, off, len, "write", err);

  if (r < 0 || len == 0)
    return r;
  flags = split_fua (d, flags, &flush);
  r = d->ops->pwrite (d, buf, len, off, flags, err);
  if (r == 0 && flush)
    return bdev_flush (d, err);
  return finish (d, r, "write", err);
}

static int
write_zeros (struct bdev *d, uint64_t off, uint64_t len, struct err *err)
{
  while (len > 0) {
    size_t n = MIN (len, sizeof zeros);
    int r = d->ops->pwrite (d, zeros, n, off, 0, err);

    if (r < 0)
      return r;
    off += n;
    len -= n;
  }
  return 0;
}

int
bdev_zero (struct bdev *d, uint64_t off, uint64_t len, unsigned flags, struct err *err)
{
  bool fast = flags & BDEV_FAST, fua = flags & BDEV_FUA, flush;
  int r = check_change (d, off, len, "zero", err);

  if (r < 0 || len == 0)
    return r;
  flags = split_fua (d, flags, &flush);
  r = -ENOTSUP;
  if (d->ops->zero) {
    struct err why = { 0 };     /* kept apart: the fallback may yet succeed */

    r = d->ops->zero (d, off, len, flags, &why);
    if (r < 0 && (r != -ENOTSUP || fast) && why.code)
      return err_set (err, -r, "%s", why.msg);
  }
  if (r == -ENOTSUP && !fast) {
    r = write_zeros (d, off, len, err);
    flush = fua;                /* one for all the chunks */
  }
  if (r == 0 && flush)
    return bdev_flush (d, err);
  return finish (d, r, "zero", err);
}

int
bdev_trim (struct bdev *d, uint64_t off, uint64_t len, unsigned flags, struct err *err)
{
  bool flush;
  int r = check_change (d, off, len, "trim", err);

  if (r < 0 || len == 0 || d->ops->trim == NULL)
    return r;
  flags = split_fua (d, flags, &flush);
  r = d->ops->trim (d, off, len, flags, err);
  if (r == 0 && flush)
    return bdev_flush (d, err);
  return finish (d, r, "trim", err);
}

int
bdev_flush (struct bdev *d, struct err *err)
{
  if (d->ops->flush == NULL || !d->writable)
    return 0;                   /* nothing can have been written */
  return finish (d, d->ops->flush (d, err), "flush", err);
}

static int
resize (struct bdev *d, uint64_t size, uint64_t ahead, struct err *err)
{
  uint64_t now = bdev_size (d);

  if (!d->writable)
    return err_set (err, EROFS, "%s: resize refused: it is open read-only", d->name);
  if (size == now)
    return 0;
  if (size > now && !d->can_grow)
    return err_set (err, ENOSPC, "%s: cannot grow from %llu to %llu bytes: its size is fixed",
                    d->name, (unsigned long long) now, (unsigned long long) size);
  if (d->ops->resize == NULL)
    return err_set (err, ENOTSUP, "%s: cannot be resized", d->name);
  return finish (d, d->ops->resize (d, size, ahead, err), "resize", err);
}

int
bdev_resize (struct bdev *d, uint64_t size, struct err *err)
{
  return resize (d, size, 0, err);
}

int
bdev_grow (struct bdev *d, uint64_t size, uint64_t ahead, struct err *err)
{
  return resize (d, MAX (size, bdev_size (d)), ahead, err);
}

int
bdev_extents (struct bdev *d, uint64_t off, uint64_t len, bdev_extent_fn fn,
              void *opaque, struct err *err)
{
  int r = check_range (d, off, len, "query", err);

  if (r < 0 || len == 0)
    return r;
  if (d->ops->extents)
    r = d->ops->extents (d, off, len, fn, opaque, err);
  else
    r = fn (opaque, off, len, 0);
  return finish (d, r, "query", err);
}

int
bdev_cache (struct bdev *d, uint64_t off, uint64_t len, struct err *err)
{
  int r = check_range (d, off, len, "cache", err);

  if (r < 0 || len == 0 || d->ops->cache == NULL)
    return r;
  return finish (d, d->ops->cache (d, off, len, err), "cache", err);
}

int
bdev_make_writable (struct bdev *d, struct err *err)
{
  if (d->writable)
    return 0;
  if (d->ops->make_writable == NULL)
    return err_set (err, EROFS, "%s: it cannot be written to", d->name);
  return finish (d, d->ops->make_writable (d, err), "opening for writing", err);
}

int
bdev_identity (struct bdev *d, struct bdev_identity *id, struct err *err)
{
  memset (id, 0, sizeof *id);
  return d->ops->identity ? finish (d, d->ops->identity (d, id, err), "identity", err) : 0;
}
