/* A healthy qcow2 image on any block device, as a block device: the guest's view.
 *
 * The file must have passed a check (core/check): open validates what it needs
 * for memory safety, not the whole mapping.  What is met later and cannot be
 * right makes that request fail with EIO, never more.
 *
 * Order on disk (I2-I5, docs/DESIGN.md): at every instant, the file as a crash
 * would leave it has at worst leaks.
 */
#ifndef QR_IMG_IMAGE_H
#define QR_IMG_IMAGE_H

#include "dev/bdev.h"
#include "fmt/header.h"
#include "fmt/snaptab.h"

struct image_options {
  struct bdev *backing;         /* what unallocated clusters read from, or NULL = zeros;
                                   the image takes its own reference */
  size_t cache_size;            /* bytes for cached metadata; 0 = default (16 MiB);
                                   half as much again for decompressed clusters */
  bool careful;                 /* the image was damaged: compressed clusters are always decompressed
                                   whole, so that what is broken in them is noticed */
  bool read_only;               /* never write, even where the file is writable */
  struct bdev *data_file;       /* the external data file, for images that have one, and only
                                   for them; the image takes its own reference */
  const struct snapshot *snapshot;      /* serve this one's disk, read-only; copied at open */
};

/* Open the image in file and return the guest's view of its active disk as a
 * device of kind "image".  The view holds a reference to file.  The last
 * bdev_unref flushes and closes.  Writable unless the file or the options say
 * no, or the external data file, or if a snapshot is served.  Refused with -ENOTSUP
 * and the feature's name: an external data file without options.data_file, and what
 * cannot be served yet.
 *
 * The view supports pread, read_many, pwrite, zero, trim, flush, FUA, extents and cache.
 * can_grow is false; see image_set_growable.
 *
 * -EROFS after a metadata write failed: from then on nothing is written, reads go on.
 */
int image_open (struct bdev *file, const struct image_options *opts,
                struct bdev **view, struct err *err);

/* Allow bdev_resize (growing only) on the view, up to what its L1 table can map
 * (-ENOSPC past that).  For overlays.  Growing raises the header's size field
 * with the next write-out of metadata, before anything beyond the old size can
 * become durable.
 */
void image_set_growable (struct bdev *view, bool can_grow);

/* The header as it was at open. */
const struct header *image_header (struct bdev *view);

struct image_params {
  uint32_t version;             /* 2 or 3 */
  unsigned cluster_bits;
  unsigned refcount_order;
  uint64_t size;                /* bytes, virtual */
  uint64_t max_size;            /* the L1 table is made for this size; 0 = size */
  const char *backing_name, *backing_format;    /* or NULL */
  uint32_t private_ext_type;    /* 0 = none */
  const void *private_ext;
  uint32_t private_ext_len;
};

/* Write a new empty image into file (empty, writable, growable) and flush it.
 * No metadata is preallocated beyond header, refcount structures and L1 table.
 */
int image_create (struct bdev *file, const struct image_params *p, struct err *err);

#endif /* QR_IMG_IMAGE_H */
