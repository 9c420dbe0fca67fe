/* The guest's view of an image as a block device, and how it grows.
 *
 * Growing is for overlays, whose virtual disk is a file that gets longer.  The
 * grown part must read as zeros, while the disk may hold anything past its end:
 * the rest of the last cluster, or a backing file that is longer.  So that is
 * zeroed before the new size can be seen.  Once the rest of a cluster is zeros,
 * it stays so (nothing writes past the end of the disk but zeros), and zero_end
 * remembers it, since a file may grow in many small steps.
 */
#include <errno.h>

#include "dev/many.h"
#include "img/image-int.h"

static int
view_pread (struct bdev *d, void *buf, size_t len, uint64_t off, struct err *err)
{
  return read_range (view_image (d), buf, len, off, err);
}

static int
view_read_many (struct bdev *d, const struct bdev_range *ranges, size_t nr, bdev_many_fn fn,
                void *opaque, struct err *err)
{
  return d->far ? gather_many (view_image (d), ranges, nr, fn, opaque)
                : many_read (d, ranges, nr, fn, opaque, err);
}

static int
view_pwrite (struct bdev *d, const void *buf, size_t len, uint64_t off, unsigned flags,
             struct err *err)
{
  return write_range (view_image (d), buf, len, off, flags, err);
}

static int
view_zero (struct bdev *d, uint64_t off, uint64_t len, unsigned flags, struct err *err)
{
  return discard_zero (view_image (d), off, len, bdev_size (d), flags, err);
}

static int
view_trim (struct bdev *d, uint64_t off, uint64_t len, unsigned flags, struct err *err)
{
  return discard_trim (view_image (d), off, len, flags, err);
}

static int
view_flush (struct bdev *d, struct err *err)
{
  return commit_flush (view_image (d), err);
}

static int
view_extents (struct bdev *d, uint64_t off, uint64_t len, bdev_extent_fn fn, void *opaque,
              struct err *err)
{
  return read_extents (view_image (d), off, len, fn, opaque, err);
}

static int
view_cache (struct bdev *d, uint64_t off, uint64_t len, struct err *err)
{
  return read_cache (view_image (d), off, len, err);
}

static int
view_resize (struct bdev *d, uint64_t size, uint64_t ahead, struct err *err)
{
  struct image *img = view_image (d);
  uint64_t now, from, to, max = img->l1_len * img->g.l2_coverage;
  int r;
  LOCK_SCOPE (&img->resize_lock);

  now = bdev_size (d);
  if (size < now)
    return err_set (err, ENOTSUP, "%s: the virtual disk can't be made smaller", d->name);
  if (img->g.data_file)
    return err_set (err, ENOTSUP, "%s: an image with an external data file can't be made larger",
                    d->name);
  if (size > max)
    return err_set (err, ENOSPC, "%s: the virtual disk can't grow to %llu bytes: its L1 table "
                    "was made for at most %llu", d->name, ULL (size), ULL (max));
  r = image_begin_change (img, err);
  if (r < 0)
    return r;
  if (img->bitmaps)
    return err_set (err, ENOTSUP, "%s: a disk with dirty bitmaps can't grow", d->name);
  from = MAX (now, img->zero_end);
  to = ROUND_UP (now, img->g.cluster_size);
  if (img->backing)
    to = MAX (to, MIN (size, bdev_size (img->backing)));
  if (from < to) {
    r = discard_zero (img, from, to - from, UINT64_MAX, 0, err);
    if (r < 0)
      return r;
    img->zero_end = to;
  }
  atomic_store_explicit (&d->size, size, memory_order_release);
  return 0;
}

const struct bdev_ops image_ops = {
  .kind = "image",
  .native_fua = true,
  .pread = view_pread,
  .read_many = view_read_many,
  .pwrite = view_pwrite,
  .zero = view_zero,
  .trim = view_trim,
  .flush = view_flush,
  .resize = view_resize,
  .extents = view_extents,
  .cache = view_cache,
  .close = image_close,
};
