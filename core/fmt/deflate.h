/* Raw deflate by a library that is quicker than zlib, if this was built with one. */
#ifndef QR_FMT_DEFLATE_H
#define QR_FMT_DEFLATE_H

#include <stdbool.h>
#include <stddef.h>

#if defined HAVE_ISAL
#define DEFLATE_LIBRARY "isa-l"
#elif defined HAVE_LIBDEFLATE
#define DEFLATE_LIBRARY "libdeflate"
#else
#define DEFLATE_LIBRARY "zlib"
#endif

/* True: the stream at the start of in begins with out_len bytes, which are in out now.
 * False: ask zlib, which knows best what is wrong with a stream, if anything is; out is
 * undefined.  Never reads more than in_len bytes or writes more than out_len.  Thread-safe.
 */
bool deflate_fast (const void *in, size_t in_len, void *out, size_t out_len);

#endif /* QR_FMT_DEFLATE_H */
