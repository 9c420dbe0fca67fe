/* Decompressing a cluster with zlib or zstd.
 *
 * The descriptor says where a stream begins and how many sectors it touches,
 * not where it ends: the decoders are given all of that and stop when the
 * cluster is full.  The output is bounded by the caller's buffer, the input by
 * the descriptor, and the decoder's own memory by a limit on zstd's window, as
 * the stream may be anything.
 *
 * Deflate is the work of a quicker library where there is one (deflate.c), and of zlib if
 * that one has any doubt, or cannot stop where it is told to.  A decoder of zstd
 * cannot stop early at all: a cluster is one block.
 *
 * Deliberately not here: finding the stream, and what to do about a broken one.
 */
#include <errno.h>
#include <stdbool.h>
#include <zlib.h>
#include <zstd.h>

#include "base/idle.h"
#include "fmt/deflate.h"
#include "fmt/inflate.h"

/* Four times the largest cluster: more is needed by no writer of clusters. */
#define MAX_ZSTD_WINDOW_LOG 23

static struct idle idle_zlib = IDLE_INIT, idle_zstd = IDLE_INIT;

/* --- zlib */

static z_stream *
zlib_new (void)
{
  z_stream *z = calloc (1, sizeof *z);

  /* Writers use small windows (-12); any size is understood. */
  if (z && inflateInit2 (z, -15) != Z_OK) {
    free (z);
    z = NULL;
  }
  return z;
}

static void
zlib_free (z_stream *z)
{
  inflateEnd (z);
  free (z);
}

static int
inflate_zlib (const void *in, size_t in_len, void *out, size_t out_len, struct err *err)
{
  z_stream *z = idle_take (&idle_zlib);
  const char *what;
  bool full;
  int zr;

  if (z == NULL)
    z = zlib_new ();
  if (z == NULL)
    return err_set (err, ENOMEM, "out of memory");
  z->next_in = (Bytef *) in;
  z->avail_in = in_len;
  z->next_out = out;
  z->avail_out = out_len;
  zr = inflate (z, Z_FINISH);
  full = z->avail_out == 0;
  what = zr == Z_DATA_ERROR && z->msg ? z->msg : "it ends too early";
  /* A full cluster is what counts, whether or not the stream's end was seen. */
  if (full && (zr == Z_STREAM_END || zr == Z_BUF_ERROR))
    zr = 0;
  else if (zr == Z_MEM_ERROR)
    zr = err_set (err, ENOMEM, "out of memory");
  else
    zr = err_set (err, EIO, "the zlib stream is broken: %s", what);
  if (inflateReset2 (z, -15) != Z_OK || !idle_give (&idle_zlib, z, MAX_IDLE))
    zlib_free (z);
  return zr;
}

/* --- zstd */

static ZSTD_DCtx *
zstd_new (void)
{
  ZSTD_DCtx *z = ZSTD_createDCtx ();

  if (z && ZSTD_isError (ZSTD_DCtx_setParameter (z, ZSTD_d_windowLogMax, MAX_ZSTD_WINDOW_LOG))) {
    ZSTD_freeDCtx (z);
    z = NULL;
  }
  return z;
}

static int
inflate_zstd (const void *in, size_t in_len, void *out, size_t out_len, struct err *err)
{
  ZSTD_inBuffer src = { in, in_len, 0 };
  ZSTD_outBuffer dst = { out, out_len, 0 };
  ZSTD_DCtx *z = idle_take (&idle_zstd);
  const char *what = NULL;
  size_t zr = 0;

  if (z == NULL)
    z = zstd_new ();
  if (z == NULL)
    return err_set (err, ENOMEM, "out of memory");
  /* There may be several frames; each call ends with one at the latest. */
  while (dst.pos < dst.size && what == NULL) {
    size_t in_before = src.pos, out_before = dst.pos;

    zr = ZSTD_decompressStream (z, &dst, &src);
    if (ZSTD_isError (zr))
      what = ZSTD_getErrorName (zr);
    else if (src.pos == in_before && dst.pos == out_before)
      what = "it ends too early";
  }
  if (what == NULL && zr != 0)
    what = "it holds more than a cluster";
  if (ZSTD_isError (ZSTD_DCtx_reset (z, ZSTD_reset_session_only)) ||
      !idle_give (&idle_zstd, z, MAX_IDLE))
    ZSTD_freeDCtx (z);
  return what ? err_set (err, EIO, "the zstd stream is broken: %s", what) : 0;
}

/* --- both */

const char *
inflate_library (void)
{
  return DEFLATE_LIBRARY;
}

/* libdeflate inflates the whole cluster while zlib is at two thirds of it. */
bool
inflate_part_pays (uint8_t type, size_t want, size_t cluster_size)
{
#if defined HAVE_LIBDEFLATE && !defined HAVE_ISAL
  return type == COMPRESSION_ZLIB && want < cluster_size / 3 * 2;
#else
  return type == COMPRESSION_ZLIB && want < cluster_size;
#endif
}

int
inflate_part (uint8_t type, const void *in, size_t in_len, void *out, size_t want,
              struct err *err)
{
  assert (type == COMPRESSION_ZLIB);
#ifdef HAVE_ISAL
  if (deflate_fast (in, in_len, out, want))
    return 0;
#endif
  return inflate_zlib (in, in_len, out, want, err);
}

int
inflate_cluster (uint8_t type, const void *in, size_t in_len, void *out, size_t out_len,
                 struct err *err)
{
  switch (type) {
  case COMPRESSION_ZLIB:
    if (deflate_fast (in, in_len, out, out_len))
      return 0;
    return inflate_zlib (in, in_len, out, out_len, err);
  case COMPRESSION_ZSTD:
    return inflate_zstd (in, in_len, out, out_len, err);
  }
  return err_set (err, ENOTSUP, "compression type %u is not known", type);
}

__attribute__ ((destructor)) static void
free_idle (void)
{
  void *p;

  while ((p = idle_take (&idle_zlib)) != NULL)
    zlib_free (p);
  while ((p = idle_take (&idle_zstd)) != NULL)
    ZSTD_freeDCtx (p);
}
