/* The overlay: an ordinary qcow2 v3 image whose raw backing file is the damaged
 * image.  Its guest view is the healed bytes of the file: outer guest offset ==
 * inner host offset.
 */
#ifndef QR_HEAL_OVERLAY_H
#define QR_HEAL_OVERLAY_H

#include "dev/bdev.h"

#define OVERLAY_CLUSTER_BITS 16

struct overlay_options {
  const char *source_path;      /* recorded as the backing file name; may be the URI of an export */
  uint64_t max_size;            /* bytes the healed file may ever need */
  size_t cache_size;
  bool direct;                  /* make it under its own name at once: nobody else can be making
                                   it, and a part of one (fingerprint_read: -ENODATA) is known
                                   for what it is */
  bool cache;                   /* it holds the source's own bytes: see cache-file.h */
  struct bdev **file;           /* if not NULL: gets a reference to the overlay's own file */
};

/* Open the overlay at path over source, or create it if nothing is there
 * (appearing whole or not at all).  An existing one is refused (-EINVAL, with what to do) if it is
 * no overlay of ours, was made for another image, or if the source changed
 * since.  *created tells which it was.  *healed takes over no reference of the caller's.
 * The healed device can grow if the source can (image_set_growable changes that).
 */
int overlay_open (const char *path, struct bdev *source, const struct overlay_options *opts,
                  struct bdev **healed, bool *created, struct err *err);

/* The overlay in file, whatever its fingerprint says (the caller has judged it),
 * over source: -EINVAL if it is damaged.
 */
int overlay_reopen (struct bdev *file, struct bdev *source, struct bdev **healed,
                    struct err *err);

/* Tell what the overlay in file holds itself, up to size bytes: all that comes from its source is
 * BDEV_HOLE alone.
 */
int overlay_extents (struct bdev *file, uint64_t size, bdev_extent_fn fn, void *opaque,
                     struct err *err);

/* A new overlay in RAM, gone with the last reference. */
int overlay_in_memory (struct bdev *source, const struct overlay_options *opts,
                       struct bdev **healed, struct err *err);

#endif /* QR_HEAL_OVERLAY_H */
