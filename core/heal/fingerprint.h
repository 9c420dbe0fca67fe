/* What an overlay knows about the image that it was made for: 40 bytes in a
 * private header extension of the overlay, big-endian.
 *
 *   0  version      1, or 2 if the state is not OVERLAY_PLAIN or something was unread:
 *                   programs that only know plain overlays then refuse it
 *   4  flags        1: the time below is one; 2, 4: part of the edges, or samples, could not
 *                   be read when the overlay was made: that checksum says nothing
 *   8  source_size  bytes of the image when the overlay was made
 *  16  mtime_sec, 24 mtime_nsec
 *  28  edges_crc    CRC-32 of the first and the last MiB
 *  32  samples_crc  CRC-32 of 256 samples between them
 *  36  state        enum overlay_state
 *
 * A plain overlay's checksums are the source's.  Once it is being written into
 * the source, they are those of the healed bytes: these are the same before,
 * during and after the copy, while the source and its time change.
 * LIMIT: on a block device, which has no usable time, and while an overlay is
 * being written into its source, a change outside the sampled bytes goes
 * unnoticed.
 */
#ifndef QR_HEAL_FINGERPRINT_H
#define QR_HEAL_FINGERPRINT_H

#include "dev/bdev.h"

#define FINGERPRINT_EXT    UINT32_C (0x71637266)        /* "qcrf" */
#define FINGERPRINT_LENGTH 40

enum overlay_state {
  OVERLAY_PLAIN,                /* the source is as it was */
  OVERLAY_COMMITTING,           /* the source may hold any part of the overlay's bytes */
  OVERLAY_DONE,                 /* the source holds them all, durably */
  OVERLAY_CACHE,                /* no overlay: it holds bytes of the source, unchanged */
};

struct fingerprint {
  enum overlay_state state;
  bool has_mtime;
  bool edges_unread, samples_unread;
  uint64_t source_size;         /* bytes */
  uint64_t mtime_sec;
  uint32_t mtime_nsec;
  uint32_t edges_crc, samples_crc;
};

void fingerprint_encode (const struct fingerprint *f, uint8_t buf[FINGERPRINT_LENGTH]);

/* That of the source as it is now, for a plain overlay.  Bad sectors (-EIO) cost a checksum, no more. */
int fingerprint_of_source (struct bdev *source, struct fingerprint *f, struct err *err);

/* The checksums over d alone; all of it must be readable. */
int fingerprint_sums (struct bdev *d, struct fingerprint *f, struct err *err);

/* That of the overlay in file, and where it lies in it.  -EINVAL: no overlay of
 * ours, or of a newer version.  -ENODATA: the file does not even have a qcow2
 * header; the making of an overlay that was cut off leaves such a file.
 */
int fingerprint_read (struct bdev *file, struct fingerprint *f, uint64_t *host_off,
                      struct err *err);

/* 0, or -EINVAL with what to do: a plain overlay does not fit the source. */
int fingerprint_compare (const struct fingerprint *then, const struct fingerprint *now,
                         const char *path, const char *source, struct err *err);

/* Always -EINVAL: a file in that state is not what it was named as (overlay or cache). */
int fingerprint_refuse_state (const struct fingerprint *f, const char *path, const char *source,
                              struct err *err);

#endif /* QR_HEAL_FINGERPRINT_H */
