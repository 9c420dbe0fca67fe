/* Streams that qemu-img compressed, and what damage makes of them. */
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#include "unit/unit.h"

#include "base/endian.h"
#include "base/num.h"
#include "fmt/entry.h"
#include "fmt/inflate.h"

struct stream {
  uint64_t guest_off;
  uint8_t *in;
  size_t in_len;
};
DEFINE_VEC (stream_vec, struct stream);

static char *dir;
static uint8_t *disk;
static const uint64_t disk_size = 3 << 20;

/* Text, runs and noise: what compresses well, badly and not at all. */
static int
make_disk (void **state)
{
  uint64_t rng = 7;
  char path[512];
  FILE *fp;

  dir = make_folder ();
  disk = calloc (1, disk_size);
  for (uint64_t i = 0; i < disk_size; ++i) {
    uint64_t x = i / 5000 % 4;

    disk[i] = x == 0 ? (uint8_t) "the quick brown fox "[i % 20] : x == 1 ? i / 700 :
              x == 2 ? 'a' + test_random (&rng) % 7 : test_random (&rng) % 64;
  }
  snprintf (path, sizeof path, "%s/disk.raw", dir);
  fp = fopen (path, "w");
  assert_non_null (fp);
  assert_int_equal (fwrite (disk, 1, disk_size, fp), disk_size);
  fclose (fp);
  return 0;
}

static int
remove_disk (void **state)
{
  free (disk);
  remove_folder (dir);
  return 0;
}

static uint8_t *
slurp (const char *path, size_t *len)
{
  FILE *fp = fopen (path, "r");
  uint8_t *buf;

  assert_non_null (fp);
  fseek (fp, 0, SEEK_END);
  *len = ftell (fp);
  rewind (fp);
  /* Padded like the last cluster of a file. */
  buf = calloc (1, *len + (4 << 20));
  assert_int_equal (fread (buf, 1, *len, fp), *len);
  fclose (fp);
  return buf;
}

/* The compressed clusters of an image that qemu-img made. */
static struct stream_vec
streams_of (const char *type, uint64_t cluster_size)
{
  struct stream_vec v = VEC_INIT;
  struct header h;
  struct geom g;
  char path[512];
  uint8_t *img;
  size_t len;

  snprintf (path, sizeof path, "%s/%s.qcow2", dir, type);
  assert_int_equal (run ("qemu-img convert -c -f raw -O qcow2 -o compression_type=%s,"
                         "cluster_size=%llu '%s/disk.raw' '%s'", type,
                         (unsigned long long) cluster_size, dir, path), 0);
  img = slurp (path, &len);
  header_decode (img, len, &h);
  geom_init (&g, &h);
  for (uint64_t off = 0; off < disk_size; off += cluster_size) {
    uint64_t l1 = load_be64 (img + h.l1_host_off + off / g.l2_coverage * 8) & L1E_OFF_MASK;
    uint64_t raw = l1 ? l2_raw (img + l1, off / cluster_size % g.l2_entries, &g) : 0;
    struct l2_entry e = l2_entry_decode (raw, 0, &g);

    if (e.kind == CLUSTER_COMPRESSED) {
      struct stream s = { off, malloc (e.host_len), e.host_len };

      memcpy (s.in, img + e.host_off, e.host_len);
      assert_int_equal (stream_vec_push (&v, s), 0);
    }
  }
  free (img);
  assert_true (v.len > 0);
  return v;
}

static void
streams_free (struct stream_vec *v)
{
  for (size_t i = 0; i < v->len; ++i)
    free (v->ptr[i].in);
  vec_reset (v);
}

static void
qemus_streams (void **state)
{
  static const char *types[] = { "zlib", "zstd" };
  static const uint64_t sizes[] = { 512, 4096, 65536, 2 << 20 };

  require_program ("qemu-img");
  for (unsigned t = 0; t < 2; ++t)
    for (unsigned s = 0; s < 4; ++s) {
      struct stream_vec v = streams_of (types[t], sizes[s]);
      uint8_t *out = malloc (sizes[s] + 16);
      struct err err = { 0 };

      memset (out + sizes[s], 0x5a, 16);
      for (size_t i = 0; i < v.len; ++i) {
        uint64_t left = MIN (sizes[s], disk_size - v.ptr[i].guest_off);

        assert_ok (inflate_cluster (t, v.ptr[i].in, v.ptr[i].in_len, out, sizes[s], &err), &err);
        assert_memory_equal (out, disk + v.ptr[i].guest_off, left);
      }
      for (unsigned i = 0; i < 16; ++i)
        assert_int_equal (out[sizes[s] + i], 0x5a);
      free (out);
      streams_free (&v);
    }
}

/* Every length short of the whole either fails or gives the right bytes (the
 * last bytes may be padding); most of them fail.  The copy is exactly as long
 * as told, so that a sanitizer sees a byte too much.
 */
static void
cut_short (void **state)
{
  static const char *types[] = { "zlib", "zstd" };
  uint8_t out[4096];

  require_program ("qemu-img");
  for (unsigned t = 0; t < 2; ++t) {
    struct stream_vec v = streams_of (types[t], 4096);
    unsigned failed = 0;

    for (size_t i = 0; i < v.len; i += 37) {
      const struct stream *s = &v.ptr[i];

      for (size_t len = 0; len < s->in_len; len += 1 + len / 16) {
        uint8_t *in = malloc (len);
        struct err err = { 0 };
        int r;

        memcpy (in, s->in, len);
        r = inflate_cluster (t, in, len, out, sizeof out, &err);
        if (r == 0)
          assert_memory_equal (out, disk + s->guest_off, sizeof out);
        else {
          assert_int_equal (r, -EIO);
          assert_true (err.msg[0] != 0);
          ++failed;
        }
        free (in);
      }
    }
    assert_true (failed > v.len / 4);
    streams_free (&v);
  }
}

/* Any bytes: an answer, never a crash; and a good stream works right after. */
static void
corrupted (void **state)
{
  static const char *types[] = { "zlib", "zstd" };
  uint8_t out[65536];
  uint64_t rng = 3;

  require_program ("qemu-img");
  for (unsigned t = 0; t < 2; ++t) {
    struct stream_vec v = streams_of (types[t], 65536);
    const struct stream *good = &v.ptr[0];
    uint8_t *in = malloc (good->in_len);
    unsigned failed = 0;

    for (unsigned n = 0; n < 600; ++n) {
      int r;

      memcpy (in, good->in, good->in_len);
      for (unsigned j = 0; j < 1 + n % 5; ++j)
        in[test_random (&rng) % (n < 300 ? 64 : good->in_len)] = test_random (&rng);
      r = inflate_cluster (t, in, good->in_len, out, sizeof out, NULL);
      assert_true (r == 0 || r == -EIO);
      failed += r < 0;
      if (n % 50 == 0) {
        assert_int_equal (inflate_cluster (t, good->in, good->in_len, out, sizeof out, NULL), 0);
        assert_memory_equal (out, disk + good->guest_off, sizeof out);
      }
    }
    assert_true (failed > 50);
    free (in);
    streams_free (&v);
  }
}

/* Streams that hold far more than a cluster: no byte past it, and no memory for
 * a window that only a bomb would ask for.
 */
static void
bombs (void **state)
{
  size_t huge = 300 << 20;
  uint8_t *zeros = calloc (1, huge), *in = malloc (1 << 20), *out = malloc (65536 + 16);
  struct err err = { 0 };
  ZSTD_CCtx *c = ZSTD_createCCtx ();
  ZSTD_inBuffer src = { zeros, huge, 0 };
  ZSTD_outBuffer dst = { in, 1 << 20, 0 };
  z_stream z = { 0 };

  memset (out, 0x5a, 65536 + 16);
  assert_int_equal (deflateInit2 (&z, 9, Z_DEFLATED, -15, 9, Z_DEFAULT_STRATEGY), Z_OK);
  z.next_in = zeros;
  z.avail_in = huge;
  z.next_out = in;
  z.avail_out = 1 << 20;
  assert_int_equal (deflate (&z, Z_FINISH), Z_STREAM_END);
  /* A full cluster came of it, as it does for QEMU. */
  assert_ok (inflate_cluster (COMPRESSION_ZLIB, in, z.total_out, out, 65536, &err), &err);
  assert_int_equal (out[65536], 0x5a);
  deflateEnd (&z);

  memset (out, 0x5a, 65536 + 16);
  ZSTD_CCtx_setParameter (c, ZSTD_c_windowLog, 27);
  assert_false (ZSTD_isError (ZSTD_compressStream2 (c, &dst, &src, ZSTD_e_continue)));
  assert_int_equal (ZSTD_compressStream2 (c, &dst, &src, ZSTD_e_end), 0);
  assert_int_equal (inflate_cluster (COMPRESSION_ZSTD, in, dst.pos, out, 65536, &err), -EIO);
  assert_non_null (strstr (err.msg, "memory"));
  assert_int_equal (out[65536], 0x5a);

  /* A small window, but more than a cluster. */
  err_clear (&err);
  ZSTD_CCtx_reset (c, ZSTD_reset_session_and_parameters);
  src.size = 1 << 20;
  src.pos = dst.pos = 0;
  assert_int_equal (ZSTD_compressStream2 (c, &dst, &src, ZSTD_e_end), 0);
  assert_int_equal (inflate_cluster (COMPRESSION_ZSTD, in, dst.pos, out, 65536, &err), -EIO);
  assert_non_null (strstr (err.msg, "more than a cluster"));
  assert_int_equal (out[65536], 0x5a);
  ZSTD_freeCCtx (c);
  free (zeros);
  free (in);
  free (out);
}

/* A cluster of several frames, and padding after it. */
static void
several_frames (void **state)
{
  uint8_t text[8192], in[10000] = { 0 }, out[8192];
  struct err err = { 0 };
  size_t n;

  for (unsigned i = 0; i < sizeof text; ++i)
    text[i] = i / 3;
  n = ZSTD_compress (in, sizeof in, text, 5000, 3);
  assert_false (ZSTD_isError (n));
  n = ZSTD_compress (in + n, sizeof in - n, text + 5000, sizeof text - 5000, 3);
  assert_false (ZSTD_isError (n));
  assert_ok (inflate_cluster (COMPRESSION_ZSTD, in, sizeof in, out, sizeof out, &err), &err);
  assert_memory_equal (out, text, sizeof text);
  assert_int_equal (inflate_cluster (2, in, sizeof in, out, sizeof out, NULL), -ENOTSUP);
}

/* --- whoever decompresses deflate, against zlib alone */

/* n bytes at the end of which nothing can be read or written: libraries check their bounds in
 * assembler, where no sanitizer sees it.
 */
static uint8_t *
fenced (size_t n)
{
  size_t page = sysconf (_SC_PAGESIZE), len = ROUND_UP (n, page);
  uint8_t *p = mmap (NULL, len + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

  assert_true (p != MAP_FAILED);
  assert_int_equal (mprotect (p + len, page, PROT_NONE), 0);
  return p + len - n;
}

static void
unfence (uint8_t *p, size_t n)
{
  size_t page = sysconf (_SC_PAGESIZE), len = ROUND_UP (n, page);

  assert_int_equal (munmap (p + n - len, len + page), 0);
}

/* zlib's own opinion: NULL if it makes want bytes of it. */
static const char *
zlibs_opinion (const uint8_t *in, size_t in_len, uint8_t *out, size_t want)
{
  z_stream z = { .next_in = (Bytef *) in, .avail_in = in_len, .next_out = out,
                 .avail_out = want };
  const char *what;
  int r;

  assert_int_equal (inflateInit2 (&z, -15), Z_OK);
  r = inflate (&z, Z_FINISH);
  what = z.avail_out == 0 && (r == Z_STREAM_END || r == Z_BUF_ERROR) ? NULL :
         z.msg ? z.msg : "short";
  inflateEnd (&z);
  return what;
}

/* Streams that libraries are known to take although zlib refuses them for that reason:
 * codes that are incomplete, and symbols that mean nothing.
 */
static bool
laxer_than_zlib (const char *why)
{
  const char *library = inflate_library ();

  return (strcmp (library, "isa-l") == 0 && strstr (why, " set")) ||
         (strcmp (library, "libdeflate") == 0 && strstr (why, "invalid literal/length code"));
}

/* What it takes, is taken, with the same bytes, and nothing else is. */
static int
as_zlib_says (const uint8_t *bytes, size_t in_len, size_t want, bool part)
{
  uint8_t *in = fenced (in_len), *out = fenced (want), *expected = malloc (want);
  const char *why;
  int r;

  memcpy (in, bytes, in_len);
  why = zlibs_opinion (in, in_len, expected, want);
  r = part ? inflate_part (COMPRESSION_ZLIB, in, in_len, out, want, NULL)
           : inflate_cluster (COMPRESSION_ZLIB, in, in_len, out, want, NULL);
  if (why == NULL) {
    assert_int_equal (r, 0);
    assert_memory_equal (out, expected, want);
  }
  else if (!laxer_than_zlib (why))
    assert_int_equal (r, -EIO);
  free (expected);
  unfence (in, in_len);
  unfence (out, want);
  return r;
}

static size_t
deflate_raw (const uint8_t *text, size_t len, uint8_t *in, size_t max, int level, int strategy)
{
  z_stream z = { .next_in = (Bytef *) text, .avail_in = len, .next_out = in, .avail_out = max };

  assert_int_equal (deflateInit2 (&z, level, Z_DEFLATED, -12, 9, strategy), Z_OK);
  assert_int_equal (deflate (&z, Z_FINISH), Z_STREAM_END);
  deflateEnd (&z);
  return z.total_out;
}

/* Stored blocks, fixed and dynamic codes; whole, cut short, with bytes behind them, too
 * short for a cluster, too long for one, and with bytes changed.
 */
static void
zlib_is_right (void **state)
{
  static const struct { int level, strategy; } ways[] = {
    { 0, Z_DEFAULT_STRATEGY }, { 1, Z_FIXED }, { 6, Z_DEFAULT_STRATEGY }, { 9, Z_HUFFMAN_ONLY },
    { 9, Z_RLE },
  };
  uint8_t *in = malloc (300000);
  uint64_t rng = 11;
  unsigned taken = 0, refused = 0;

  for (unsigned n = 0; n < 3000; ++n) {
    const uint8_t *text = disk + test_random (&rng) % (disk_size - 140000);
    size_t len = n % 7 == 0 ? 1 + test_random (&rng) % 65536 : n % 7 == 1 ? 140000 : 65536;
    unsigned way = n % 5;
    size_t in_len = deflate_raw (text, len, in, 300000, ways[way].level, ways[way].strategy);
    size_t want = n % 3 == 0 ? 1 + test_random (&rng) % 65536 : 65536;
    int r;

    if (n % 4 == 1)
      in_len = test_random (&rng) % (in_len + 1);
    for (unsigned j = 0; n % 4 == 2 && j < 1 + n % 5; ++j)
      in[test_random (&rng) % (n % 8 == 2 ? MIN (in_len, 60) : in_len)] = test_random (&rng);
    for (unsigned j = 0; n % 4 == 3 && j < 512; ++j)
      in[in_len++] = test_random (&rng);
    r = as_zlib_says (in, in_len, want, n % 2);
    if (r < 0)
      ++refused;
    else
      ++taken;
  }
  assert_true (taken > 1000);
  assert_true (refused > 300);
  free (in);
}

/* The beginning of QEMU's streams, also if the rest is lost or overwritten. */
static void
parts (void **state)
{
  struct stream_vec v;
  uint8_t out[65536 + 16];
  uint64_t rng = 5;
  unsigned missed = 0;

  require_program ("qemu-img");
  assert_false (inflate_part_pays (COMPRESSION_ZLIB, 65536, 65536));
  assert_true (inflate_part_pays (COMPRESSION_ZLIB, 4096, 65536));
  assert_false (inflate_part_pays (COMPRESSION_ZSTD, 4096, 65536));
  v = streams_of ("zlib", 65536);
  for (size_t i = 0; i < v.len; ++i)
    for (size_t want = 1; want < 65536; want += 1 + test_random (&rng) % 9000) {
      const struct stream *s = &v.ptr[i];
      size_t cut = s->in_len * 3 / 4;
      uint8_t *in;

      memset (out + want, 0x5a, 16);
      assert_int_equal (inflate_part (COMPRESSION_ZLIB, s->in, s->in_len, out, want, NULL), 0);
      assert_memory_equal (out, disk + s->guest_off, want);
      for (unsigned j = 0; j < 16; ++j)
        assert_int_equal (out[want + j], 0x5a);
      in = fenced (cut);
      memcpy (in, s->in, cut);
      if (inflate_part (COMPRESSION_ZLIB, in, cut, out, want, NULL) == 0)
        assert_memory_equal (out, disk + s->guest_off, want);
      else
        ++missed;
      unfence (in, cut);
    }
  assert_true (missed > 0);
  streams_free (&v);
}

static struct stream_vec shared;
static uint8_t shared_type;

static void *
decompress_all (void *opaque)
{
  uint8_t *out = malloc (65536);

  for (unsigned n = 0; n < 5; ++n)
    for (size_t i = 0; i < shared.len; ++i) {
      const struct stream *s = &shared.ptr[i];

      if (inflate_cluster (shared_type, s->in, s->in_len, out, 65536, NULL) != 0 ||
          memcmp (out, disk + s->guest_off, 65536) != 0)
        abort ();
    }
  free (out);
  return NULL;
}

static void
threads (void **state)
{
  pthread_t t[20];              /* more than decoders are kept */

  require_program ("qemu-img");
  for (shared_type = COMPRESSION_ZLIB; shared_type <= COMPRESSION_ZSTD; ++shared_type) {
    shared = streams_of (shared_type == COMPRESSION_ZLIB ? "zlib" : "zstd", 65536);
    for (unsigned i = 0; i < 20; ++i)
      assert_int_equal (pthread_create (&t[i], NULL, decompress_all, NULL), 0);
    for (unsigned i = 0; i < 20; ++i)
      pthread_join (t[i], NULL);
    streams_free (&shared);
  }
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (qemus_streams),
    cmocka_unit_test (cut_short),
    cmocka_unit_test (corrupted),
    cmocka_unit_test (bombs),
    cmocka_unit_test (several_frames),
    cmocka_unit_test (zlib_is_right),
    cmocka_unit_test (parts),
    cmocka_unit_test (threads),
  };

  return cmocka_run_group_tests (tests, make_disk, remove_disk);
}
