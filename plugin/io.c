/* Requests: nbdkit's callbacks -> the guest disk's operations.
 *
 * nbdkit has checked the ranges and calls these from many threads at once; the
 * device below is made for that, so nothing is locked here.  At the end nbdkit
 * waits only so long for requests that are running; each of them is in a grace
 * section, so that io_stop can wait for the last before the image is closed.
 *
 * Errors: the client gets ENOSPC, EIO and EROFS as they are, ENOTSUP where a
 * fast zero was asked for and would not be fast, and EIO for all else, since no
 * other number means anything to a guest.  What really happened stands in the
 * one message that fail prints.
 */
#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "base/grace.h"
#include "plugin/plugin.h"

static struct grace running;
static atomic_bool stopped;

int
io_start (void)
{
  return grace_init (&running);
}

void
io_stop (void)
{
  atomic_store (&stopped, true);
  grace_wait (&running);
}

/* Report that a request failed with r = -errno.  Always -1. */
static int
fail (const char *what, uint32_t count, uint64_t guest_off, int r, const struct err *err)
{
  nbdkit_error ("%s of %" PRIu32 " bytes at guest offset 0x%" PRIx64 ": %s",
                what, count, guest_off, err->code ? err->msg : strerror (-r));
  nbdkit_set_error (r == -ENOSPC || r == -EROFS ? -r : EIO);
  return -1;
}

/* The device behind a connection, kept until end; NULL if the image is being closed. */
static struct bdev *
begin (void *handle, unsigned *token)
{
  const struct export *e = handle;

  *token = grace_enter (&running);
  if (!atomic_load (&stopped))
    return e->d;
  grace_leave (&running, *token);
  nbdkit_set_error (ESHUTDOWN);
  return NULL;
}

static void
end (unsigned token)
{
  grace_leave (&running, token);
}

static unsigned
fua (uint32_t flags)
{
  return flags & NBDKIT_FLAG_FUA ? BDEV_FUA : 0;
}

int
io_pread (void *handle, void *buf, uint32_t count, uint64_t guest_off, uint32_t flags)
{
  unsigned token;
  struct bdev *d = begin (handle, &token);
  struct err err = { 0 };
  int r;

  if (!d)
    return -1;
  r = bdev_pread (d, buf, count, guest_off, &err);
  end (token);
  return r < 0 ? fail ("read", count, guest_off, r, &err) : 0;
}

int
io_pwrite (void *handle, const void *buf, uint32_t count, uint64_t guest_off, uint32_t flags)
{
  unsigned token;
  struct bdev *d = begin (handle, &token);
  struct err err = { 0 };
  int r;

  if (!d)
    return -1;
  r = bdev_pwrite (d, buf, count, guest_off, fua (flags), &err);
  end (token);
  return r < 0 ? fail ("write", count, guest_off, r, &err) : 0;
}

int
io_zero (void *handle, uint32_t count, uint64_t guest_off, uint32_t flags)
{
  unsigned token;
  struct bdev *d = begin (handle, &token);
  struct err err = { 0 };
  unsigned f = fua (flags);
  int r;

  if (!d)
    return -1;
  if (flags & NBDKIT_FLAG_MAY_TRIM)
    f |= BDEV_MAY_TRIM;
  if (flags & NBDKIT_FLAG_FAST_ZERO)
    f |= BDEV_FAST;
  r = bdev_zero (d, guest_off, count, f, &err);
  end (token);
  if (r == -ENOTSUP && (flags & NBDKIT_FLAG_FAST_ZERO)) {
    nbdkit_set_error (ENOTSUP);         /* an answer, not a failure: no message */
    return -1;
  }
  return r < 0 ? fail ("zeroing", count, guest_off, r, &err) : 0;
}

int
io_trim (void *handle, uint32_t count, uint64_t guest_off, uint32_t flags)
{
  unsigned token;
  struct bdev *d = begin (handle, &token);
  struct err err = { 0 };
  int r;

  if (!d)
    return -1;
  r = bdev_trim (d, guest_off, count, fua (flags), &err);
  end (token);
  return r < 0 ? fail ("trim", count, guest_off, r, &err) : 0;
}

int
io_flush (void *handle, uint32_t flags)
{
  unsigned token;
  struct bdev *d = begin (handle, &token);
  struct err err = { 0 };
  int r;

  if (!d)
    return -1;
  r = bdev_flush (d, &err);
  end (token);
  if (r < 0) {
    nbdkit_error ("flush: %s", err.code ? err.msg : strerror (-r));
    nbdkit_set_error (r == -ENOSPC || r == -EROFS ? -r : EIO);
    return -1;
  }
  return 0;
}

struct extent_list {
  struct nbdkit_extents *list;
  bool only_first;              /* the client wants the first extent, as long as it is */
  bool have_first;
  unsigned first_kind;
};

static int
add_extent (void *opaque, uint64_t off, uint64_t len, unsigned kind)
{
  struct extent_list *l = opaque;
  uint32_t type = (kind & BDEV_HOLE ? NBDKIT_EXTENT_HOLE : 0) |
                  (kind & BDEV_ZERO ? NBDKIT_EXTENT_ZERO : 0);

  if (l->only_first && l->have_first && kind != l->first_kind)
    return 1;
  l->have_first = true;
  l->first_kind = kind;
  return nbdkit_add_extent (l->list, off, len, type) == -1 ? -ENOMEM : 0;
}

int
io_extents (void *handle, uint32_t count, uint64_t guest_off, uint32_t flags,
            struct nbdkit_extents *extents)
{
  struct extent_list l = { .list = extents, .only_first = flags & NBDKIT_FLAG_REQ_ONE };
  unsigned token;
  struct bdev *d = begin (handle, &token);
  struct err err = { 0 };
  int r;

  if (!d)
    return -1;
  r = bdev_extents (d, guest_off, count, add_extent, &l, &err);
  end (token);
  return r < 0 ? fail ("block status", count, guest_off, r, &err) : 0;
}

int
io_cache (void *handle, uint32_t count, uint64_t guest_off, uint32_t flags)
{
  struct err err = { 0 };
  unsigned token;
  struct bdev *d;
  int r;

  if (flags != 0) {             /* a future requirement that we would not meet */
    nbdkit_error ("cache: unknown flags 0x%" PRIx32, flags);
    nbdkit_set_error (EINVAL);
    return -1;
  }
  d = begin (handle, &token);
  if (!d)
    return -1;
  r = bdev_cache (d, guest_off, count, &err);
  end (token);
  /* A hint for which there is no room. */
  return r < 0 && r != -EAGAIN ? fail ("cache", count, guest_off, r, &err) : 0;
}
