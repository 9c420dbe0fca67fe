/* Decompressing a cluster with zlib or zstd.
 *
 * The descriptor says where a stream begins and how many sectors it touches,
 * not where it ends: both decoders are given all of that and stop when the
 * cluster is full.  The output is bounded by the caller's buffer, the input by
 * the descriptor, and the decoder's own memory by a limit on zstd's window, as
 * the stream may be anything.
 *
 * A decoder is costly to set up, so those not in use wait in two short lists
 * (as many as requests ever ran at once, up to MAX_IDLE), freed when the
 * library is unloaded.
 *
 * Deliberately not here: finding the stream, and what to do about a broken one.
 */
#include <errno.h>
#include <stdbool.h>
#include <zlib.h>
#include <zstd.h>

#include "base/cleanup.h"
#include "fmt/inflate.h"

#define MAX_IDLE 16

/* Four times the largest cluster: more is needed by no writer of clusters. */
#define MAX_ZSTD_WINDOW_LOG 23

struct idle {
  void *ptr[MAX_IDLE];
  unsigned n;
};

static pthread_mutex_t idle_lock = PTHREAD_MUTEX_INITIALIZER;
static struct idle idle_zlib, idle_zstd;        /* protected by idle_lock */

static void *
idle_take (struct idle *idle)
{
  LOCK_SCOPE (&idle_lock);

  return idle->n > 0 ? idle->ptr[--idle->n] : NULL;
}

static bool
idle_give (struct idle *idle, void *p)
{
  LOCK_SCOPE (&idle_lock);

  if (idle->n == MAX_IDLE)
    return false;
  idle->ptr[idle->n++] = p;
  return true;
}

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
  if (inflateReset2 (z, -15) != Z_OK || !idle_give (&idle_zlib, z))
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
  if (ZSTD_isError (ZSTD_DCtx_reset (z, ZSTD_reset_session_only)) || !idle_give (&idle_zstd, z))
    ZSTD_freeDCtx (z);
  return what ? err_set (err, EIO, "the zstd stream is broken: %s", what) : 0;
}

/* --- both */

int
inflate_cluster (uint8_t type, const void *in, size_t in_len, void *out, size_t out_len,
                 struct err *err)
{
  switch (type) {
  case COMPRESSION_ZLIB:
    return inflate_zlib (in, in_len, out, out_len, err);
  case COMPRESSION_ZSTD:
    return inflate_zstd (in, in_len, out, out_len, err);
  }
  return err_set (err, ENOTSUP, "compression type %u is not known", type);
}

__attribute__ ((destructor)) static void
free_idle (void)
{
  while (idle_zlib.n > 0)
    zlib_free (idle_zlib.ptr[--idle_zlib.n]);
  while (idle_zstd.n > 0)
    ZSTD_freeDCtx (idle_zstd.ptr[--idle_zstd.n]);
}
