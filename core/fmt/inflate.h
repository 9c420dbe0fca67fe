/* One compressed cluster -> its bytes.  Pure: no I/O. */
#ifndef QR_FMT_INFLATE_H
#define QR_FMT_INFLATE_H

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

#endif /* QR_FMT_INFLATE_H */
