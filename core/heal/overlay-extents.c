/* What an overlay itself holds, as opposed to what it shows of its source: see overlay.h.
 *
 * Found out by looking at it over a device that calls all its bytes "a hole that does not read as
 * zeros", which no other device says.
 */
#include <errno.h>
#include <stdlib.h>

#include "heal/overlay.h"
#include "img/image.h"

static int
marker_pread (struct bdev *d, void *buf, size_t len, uint64_t off, struct err *err)
{
  return err_set (err, EIO, "%s: it has no bytes", d->name);
}

static int
marker_extents (struct bdev *d, uint64_t off, uint64_t len, bdev_extent_fn fn, void *opaque,
                struct err *err)
{
  return fn (opaque, off, len, BDEV_HOLE);
}

static void
marker_close (struct bdev *d)
{
  free (d);
}

static const struct bdev_ops marker_ops = {
  .kind = "marker",
  .pread = marker_pread,
  .extents = marker_extents,
  .close = marker_close,
};

/* The overlay over nothing: *ret tells what comes from the source as BDEV_HOLE alone. */
static int
open_alone (struct bdev *file, struct bdev **ret, struct err *err)
{
  struct bdev *marker = calloc (1, sizeof *marker);
  struct image_options opts = { .read_only = true };
  int r;

  if (!marker)
    return err_set (err, ENOMEM, "out of memory");
  r = bdev_init (marker, &marker_ops, "what the overlay does not hold", INT64_MAX, false, false,
                 err);
  if (r < 0) {
    free (marker);
    return r;
  }
  opts.backing = marker;
  r = image_open (file, &opts, ret, err);
  bdev_unref (marker);
  return r;
}

int
overlay_extents (struct bdev *file, uint64_t size, bdev_extent_fn fn, void *opaque, struct err *err)
{
  struct bdev *alone;
  int r = open_alone (file, &alone, err);

  if (r < 0)
    return r;
  r = bdev_extents (alone, 0, size, fn, opaque, err);
  bdev_unref (alone);
  return r;
}
