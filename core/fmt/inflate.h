/* One compressed cluster -> its bytes.  Pure: no I/O. */
#ifndef QR_FMT_INFLATE_H
#define QR_FMT_INFLATE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

/* Values of the header's compression_type. */
enum {
  COMPRESSION_ZLIB = 0,         /* raw deflate, without zlib's header */
  COMPRESSION_ZSTD = 1,
};

/* Decompress the stream at the start of in to exactly out_len bytes; what
 * follows the stream is ignored, since a descriptor counts whole sectors.
 * Never reads more than in_len bytes, writes more than out_len, or uses more
 * than a few MiB besides, whatever the stream says.  Thread-safe.
 * -EIO: the stream is broken, or short, or holds more than out_len bytes and
 * can't be a cluster; -ENOTSUP: unknown type; -ENOMEM.  out is undefined then.
 */
int inflate_cluster (uint8_t type, const void *in, size_t in_len, void *out, size_t out_len,
                     struct err *err);

/* The first want bytes of a cluster, of a type that can stop there.  What follows
 * them in the stream is not looked at: that it is broken there, nobody learns.
 */
int inflate_part (uint8_t type, const void *in, size_t in_len, void *out, size_t want,
                  struct err *err);

/* Can it stop there, and is that quicker than to decompress it all? */
bool inflate_part_pays (uint8_t type, size_t want, size_t cluster_size);

/* "isa-l", "libdeflate" or "zlib": who decompresses deflate. */
const char *inflate_library (void);

#endif /* QR_FMT_INFLATE_H */
