/* Compressed clusters: images made by qemu-img convert -c, under random
 * requests against a model, judged by QEMU afterwards.
 */
#include "img-test.h"

#include <pthread.h>

#include "fmt/entry.h"
#include "fmt/inflate.h"

static char *dir;

static int
make_dir (void **state)
{
  dir = make_folder ();
  return 0;
}

static int
remove_dir (void **state)
{
  remove_folder (dir);
  return 0;
}

/* Everything from what compresses to a few bytes (many streams in one host
 * cluster) to what does not compress at all, and holes.
 */
static void
fill_model (struct model *m)
{
  for (uint64_t i = 0; i < m->size; ++i) {
    uint64_t x = i / (m->cluster_size / 2 + 300) % 6;

    m->bytes[i] = x == 0 ? 0 : x == 1 ? i / 900 : x == 2 ? 'a' + i % 19 :
                  x == 3 ? 'a' + test_random (&m->rng) % 4 :
                  x == 4 ? test_random (&m->rng) % 100 : test_random (&m->rng);
  }
}

static struct bdev *
make_file (struct model *m, const char *options, bool snapshot)
{
  char raw[512], path[512];

  snprintf (raw, sizeof raw, "%s/source.raw", dir);
  snprintf (path, sizeof path, "%s/made.qcow2", dir);
  save_model (m, raw);
  assert_int_equal (run ("qemu-img convert -c -f raw -O qcow2 -o cluster_size=%llu,%s '%s' '%s'",
                         (unsigned long long) m->cluster_size, options, raw, path), 0);
  if (snapshot)
    assert_int_equal (run ("qemu-img snapshot -c before '%s'", path), 0);
  return load (path, true);
}

static void
one_config (unsigned cluster_bits, uint64_t size, const char *options, size_t cache_size,
            unsigned ops, bool snapshot)
{
  struct bdev *file, *view;
  struct model m;

  model_init (&m, size, cluster_bits, cluster_bits + cache_size);
  if (strstr (options, "extended_l2")) {
    m.trim_size = m.cluster_size / 32;
    m.trim_may_keep = true;
  }
  fill_model (&m);
  file = make_file (&m, options, snapshot);
  view = open_view (file, NULL, cache_size);
  check_all (view, &m);
  check_extents (view, &m, 0, m.size);
  for (unsigned i = 0; i < ops; ++i) {
    do_random (view, &m);
    if (i % 97 == 96) {
      bdev_unref (view);
      view = open_view (file, NULL, cache_size);
    }
  }
  check_all (view, &m);
  check_extents (view, &m, 0, m.size);
  bdev_unref (view);
  judge (dir, file, &m, CHECK_CLEAN);
  if (snapshot)                 /* what it reads has not changed */
    assert_int_equal (run ("cd '%s' && qemu-img convert -l snapshot.name=before -O raw "
                           "judged.qcow2 before.raw && cmp before.raw source.raw", dir), 0);
  bdev_unref (file);
  free (m.bytes);
}

static void
random_requests (void **state)
{
  static const struct { unsigned cluster_bits; uint64_t size; unsigned ops; } cases[] = {
    { 9, 600 << 10, 400 }, { 12, 3 << 20, 400 }, { 16, 12 << 20, 300 }, { 21, 40 << 20, 60 },
  };
  static const char *options[] = {
    "compat=0.10", "compat=1.1", "compression_type=zstd", "refcount_bits=64",
  };

  require_program ("qemu-img");
  for (unsigned c = 0; c < 4; ++c)
    for (unsigned o = 0; o < 4; ++o)
      one_config (cases[c].cluster_bits, cases[c].size, options[o], o == 1 ? 1 : 0, cases[c].ops,
                  false);
}

/* Compressed clusters have no subclusters; what becomes of them does. */
static void
subclusters (void **state)
{
  require_program ("qemu-img");
  one_config (14, 4 << 20, "extended_l2=on", 0, 400, false);
  one_config (16, 12 << 20, "extended_l2=on,compression_type=zstd", 1, 400, true);
  one_config (21, 40 << 20, "extended_l2=on", 0, 60, false);
}

static void
snapshots (void **state)
{
  require_program ("qemu-img");
  one_config (9, 600 << 10, "compat=1.1", 0, 400, true);
  one_config (12, 3 << 20, "compat=0.10", 1, 400, true);
  one_config (16, 12 << 20, "compression_type=zstd", 0, 300, true);
}

/* Every cluster written, fully or in part, zeroed or trimmed: nothing compressed
 * is left, every stream's space is free again and was used again.
 */
static void
all_overwritten (void **state)
{
  struct model m;
  struct bdev *file, *view;
  struct err err = { 0 };
  uint64_t before;

  require_program ("qemu-img");
  model_init (&m, 6 << 20, 12, 5);
  fill_model (&m);
  file = make_file (&m, "compat=1.1", false);
  view = open_view (file, NULL, 0);
  for (unsigned round = 0; round < 3; ++round)
    for (uint64_t off = 0; off < m.size; off += 4096) {
      unsigned what = (off / 4096 + round) % 4;

      if (what == 0)
        do_write (view, &m, off, 4096, 0);
      else if (what == 1)
        do_write (view, &m, off + 100, 700, 0);
      else if (what == 2)
        do_zero (view, &m, off, 4096, round & 1 ? BDEV_MAY_TRIM : 0);
      else
        do_trim (view, &m, off, 4096, 0);
      if (off % (1 << 19) == 0) {
        assert_ok (bdev_flush (view, &err), &err);
        check_all (view, &m);
      }
    }
  check_all (view, &m);
  bdev_unref (view);
  judge (dir, file, &m, CHECK_CLEAN);
  assert_int_equal (run ("qemu-img check --output=json '%s/judged.qcow2' | "
                         "grep -q compressed-clusters", dir), 1);
  before = bdev_size (file);
  /* As much again fits into what was freed. */
  view = open_view (file, NULL, 0);
  do_trim (view, &m, 0, m.size, 0);
  assert_ok (bdev_flush (view, &err), &err);
  do_write (view, &m, 0, 2 << 20, 0);
  bdev_unref (view);
  assert_int_equal (bdev_size (file), before);
  judge (dir, file, &m, CHECK_CLEAN);
  bdev_unref (file);
  free (m.bytes);
}

/* --- damage */

/* The n-th compressed entry of the active disk: where it is on disk, and what it says. */
static uint64_t
find_entry (struct bdev *file, unsigned n, uint64_t *guest_off, struct l2_entry *e)
{
  uint8_t fixed[HEADER_FIXED_LENGTH], raw[8];
  struct header h;
  struct geom g;

  assert_int_equal (bdev_pread (file, fixed, sizeof fixed, 0, NULL), 0);
  header_decode (fixed, sizeof fixed, &h);
  geom_init (&g, &h);
  for (*guest_off = 0; *guest_off < h.size; *guest_off += g.cluster_size) {
    uint64_t at;

    assert_int_equal (bdev_pread (file, raw, 8, h.l1_host_off + *guest_off / g.l2_coverage * 8,
                                  NULL), 0);
    at = load_be64 (raw) & L1E_OFF_MASK;
    if (at == 0)
      continue;
    at += *guest_off / g.cluster_size % g.l2_entries * 8;
    assert_int_equal (bdev_pread_padded (file, raw, 8, at, NULL), 0);
    *e = l2_entry_decode (load_be64 (raw), 0, &g);
    if (e->kind == CLUSTER_COMPRESSED && n-- == 0)
      return at;
  }
  fail_msg ("not that many compressed clusters");
  return 0;
}

/* A broken stream fails its own cluster and nothing else, and a write that
 * covers it all replaces it.
 */
static void
broken_stream (void **state)
{
  uint8_t *buf = malloc (65536), junk[64];
  uint64_t guest_off, other_off;
  struct err err = { 0 };
  struct l2_entry e, other;
  struct bdev *file, *view;
  struct model m;

  require_program ("qemu-img");
  model_init (&m, 4 << 20, 16, 6);
  fill_model (&m);
  file = make_file (&m, "compat=1.1", false);
  find_entry (file, 3, &guest_off, &e);
  find_entry (file, 5, &other_off, &other);
  memset (junk, 0xff, sizeof junk);
  assert_ok (bdev_pwrite (file, junk, sizeof junk, e.host_off, 0, &err), &err);
  view = open_view (file, NULL, 0);
  for (unsigned i = 0; i < 2; ++i) {    /* the second is no hit in the cache */
    err_clear (&err);
    assert_int_equal (bdev_pread (view, buf, 512, guest_off + 1000, &err), -EIO);
    assert_non_null (strstr (err.msg, "compressed cluster"));
  }
  check_read (view, &m, other_off, 65536);
  assert_int_equal (bdev_pwrite (view, buf, 512, guest_off + 1000, 0, NULL), -EIO);
  do_write (view, &m, guest_off, 65536, 0);
  check_all (view, &m);
  bdev_unref (view);
  judge (dir, file, &m, CHECK_CLEAN);
  bdev_unref (file);
  free (m.bytes);
  free (buf);
}

static void
bad_descriptors (void **state)
{
  static const struct { bool relative; uint64_t add; const char *why; } cases[] = {
    { true, UINT64_C (1) << 40, "past the end" },
    { false, 0, "inside metadata" },
    { false, UINT64_C (0x3fffffffffffff), "past the end" },
  };
  uint8_t raw[8], buf[512];
  uint64_t guest_off, at;
  struct bdev *file, *view;
  struct err err = { 0 };
  struct l2_entry e;
  struct model m;

  require_program ("qemu-img");
  model_init (&m, 4 << 20, 16, 7);
  fill_model (&m);
  file = make_file (&m, "compat=1.1", false);
  at = find_entry (file, 2, &guest_off, &e);
  for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    store_be64 (raw, L2E_COMPRESSED | (cases[i].add + (cases[i].relative ? e.host_off : 0)));
    assert_ok (bdev_pwrite (file, raw, 8, at, 0, &err), &err);
    view = open_view (file, NULL, 0);
    assert_int_equal (bdev_pread (view, buf, 512, guest_off, &err), -EIO);
    assert_non_null (strstr (err.msg, cases[i].why));
    assert_int_equal (bdev_pwrite (view, buf, 512, guest_off, 0, NULL), -EIO);
    assert_int_equal (bdev_trim (view, guest_off, 65536, 0, NULL), -EIO);
    err_clear (&err);
    bdev_unref (view);
  }
  bdev_unref (file);
  free (m.bytes);
}

/* --- threads */

/* Counts reads on their way to the file. */
struct counter {
  struct bdev dev;
  struct bdev *under;
  atomic_uint reads;
};

static int
counter_pread (struct bdev *d, void *buf, size_t len, uint64_t off, struct err *err)
{
  struct counter *c = (struct counter *) d;

  c->reads++;
  return bdev_pread (c->under, buf, len, off, err);
}

static void
counter_close (struct bdev *d)
{
  bdev_unref (((struct counter *) d)->under);
  free (d);
}

static const struct bdev_ops counter_ops = {
  .kind = "counter", .pread = counter_pread, .close = counter_close,
};

struct reader {
  struct bdev *view;
  const struct model *m;
  uint64_t off, len, seed;
};

static void *
read_one (void *opaque)
{
  struct reader *t = opaque;
  uint8_t *buf = malloc (t->len);

  if (bdev_pread (t->view, buf, t->len, t->off, NULL) < 0 ||
      memcmp (buf, t->m->bytes + t->off, t->len) != 0)
    abort ();
  free (buf);
  return NULL;
}

static void
decompressed_once (void **state)
{
  struct counter *c = calloc (1, sizeof *c);
  struct err err = { 0 };
  struct reader t[8];
  pthread_t id[8];
  uint64_t guest_off;
  struct l2_entry e;
  struct bdev *view;
  struct model m;
  uint8_t byte;
  unsigned before;

  require_program ("qemu-img");
  model_init (&m, 16 << 20, 21, 8);
  fill_model (&m);
  c->under = make_file (&m, "compat=1.1", false);
  find_entry (c->under, 1, &guest_off, &e);
  assert_ok (bdev_init (&c->dev, &counter_ops, "counter", bdev_size (c->under), false, false,
                        &err), &err);
  view = open_view (&c->dev, NULL, 0);
  assert_ok (bdev_pread (view, &byte, 1, 0, &err), &err);       /* the L2 table */
  find_entry (c->under, 2, &guest_off, &e);
  before = c->reads;
  for (unsigned i = 0; i < 8; ++i) {
    t[i] = (struct reader) { .view = view, .m = &m, .off = guest_off + i * 777, .len = 1 << 20 };
    assert_int_equal (pthread_create (&id[i], NULL, read_one, &t[i]), 0);
  }
  for (unsigned i = 0; i < 8; ++i)
    pthread_join (id[i], NULL);
  assert_int_equal (c->reads, before + 1);
  bdev_unref (view);
  bdev_unref (&c->dev);
  free (m.bytes);
}

/* A small read costs nothing that the next read needs; who is met again is kept. */
static void
kept_when_met_again (void **state)
{
  static const char *types[] = { "zlib", "zstd" };

  require_program ("qemu-img");
  for (unsigned t = 0; t < 2; ++t) {
    struct counter *c = calloc (1, sizeof *c);
    struct err err = { 0 };
    uint64_t guest_off;
    struct l2_entry e;
    struct bdev *view;
    struct model m;
    char options[40];
    unsigned before;

    model_init (&m, 4 << 20, 16, 8);
    fill_model (&m);
    snprintf (options, sizeof options, "compression_type=%s", types[t]);
    c->under = make_file (&m, options, false);
    assert_ok (bdev_init (&c->dev, &counter_ops, "counter", bdev_size (c->under), false, false,
                          &err), &err);
    view = open_view (&c->dev, NULL, 0);
    find_entry (c->under, 2, &guest_off, &e);
    check_read (view, &m, guest_off + 65536, 65536);      /* the L2 table */
    before = c->reads;
    check_read (view, &m, guest_off + 20000, 3000);
    assert_int_equal (c->reads, before + 1);
    check_read (view, &m, guest_off + 60000, 3000);
    assert_int_equal (c->reads, before + (t == 0 ? 2 : 1));
    before = c->reads;
    check_read (view, &m, guest_off + 100, 4096);
    check_read (view, &m, guest_off, 65536);
    assert_int_equal (c->reads, before);
    /* The other one was read as a whole, and is kept from now on. */
    check_read (view, &m, guest_off + 65536, 65536);
    assert_int_equal (c->reads, before + 1);
    check_read (view, &m, guest_off + 65536, 65536);
    assert_int_equal (c->reads, before + 1);
    bdev_unref (view);
    bdev_unref (&c->dev);
    free (m.bytes);
  }
}

/* What lies before the damage may be read, by a small read, and is right then; whoever needs
 * the whole cluster is told.
 */
static void
broken_behind (void **state)
{
  uint8_t *buf = malloc (65536), *in = malloc (131072), *junk;
  struct bdev *file, *view;
  struct err err = { 0 };
  struct l2_entry e;
  struct model m;
  uint64_t guest_off;
  unsigned n = 0;
  struct image_options careful = { .careful = true };

  require_program ("qemu-img");
  model_init (&m, 4 << 20, 16, 6);
  fill_model (&m);
  file = make_file (&m, "compat=1.1", false);
  do
    find_entry (file, ++n, &guest_off, &e);
  while (e.host_len < 20000);
  assert_ok (bdev_pread (file, in, e.host_len, e.host_off, &err), &err);
  junk = in + e.host_len / 2;
  do                            /* most junk is a valid stream for a while, some to the end */
    for (unsigned i = 0; i < 2048; ++i)
      junk[i] = test_random (&m.rng);
  while (inflate_cluster (COMPRESSION_ZLIB, in, e.host_len, buf, 65536, NULL) == 0);
  assert_ok (bdev_pwrite (file, in, e.host_len, e.host_off, 0, &err), &err);
  view = open_view (file, NULL, 0);
  check_read (view, &m, guest_off, 700);
  assert_int_equal (bdev_pread (view, buf, 700, guest_off, NULL), -EIO);
  assert_int_equal (bdev_pread (view, buf, 4096, guest_off + 61440, NULL), -EIO);
  assert_int_equal (bdev_pread (view, buf, 65536, guest_off, NULL), -EIO);
  check_read (view, &m, guest_off - 65536, 65536);
  /* A write to a part of it needs the rest. */
  assert_int_equal (bdev_pwrite (view, buf, 512, guest_off + 1000, 0, NULL), -EIO);
  bdev_unref (view);
  /* In an image that was damaged, nobody is given what may be broken. */
  assert_ok (image_open (file, &careful, &view, &err), &err);
  assert_int_equal (bdev_pread (view, buf, 700, guest_off, NULL), -EIO);
  check_read (view, &m, guest_off - 65536, 700);
  bdev_unref (view);
  bdev_unref (file);
  free (m.bytes);
  free (in);
  free (buf);
}

/* A descriptor that counts more sectors than the file has: where nothing is written, the
 * stream is read as QEMU reads it; elsewhere it is refused.  One that begins behind the end is
 * refused everywhere.
 */
static void
too_many_sectors (void **state)
{
  struct image_options read_only = { .read_only = true };
  uint64_t guest_off, at, behind = UINT64_C (1) << 62 | UINT64_C (1) << 40;
  struct bdev *file, *view;
  struct err err = { 0 };
  uint8_t raw[8], buf[512];
  struct l2_entry e;
  struct model m;

  require_program ("qemu-img");
  model_init (&m, 1 << 20, 16, 6);
  fill_model (&m);
  file = make_file (&m, "compat=1.1", false);
  for (unsigned n = 0;; ++n) {  /* one near the end of the file */
    at = find_entry (file, n, &guest_off, &e);
    if (e.host_off + 100000 > bdev_size (file))
      break;
  }
  store_be64 (raw, UINT64_C (1) << 62 | UINT64_C (255) << 54 | e.host_off);
  assert_ok (bdev_pwrite (file, raw, 8, at, 0, &err), &err);
  view = open_view (file, NULL, 0);
  assert_int_equal (bdev_pread (view, buf, 512, guest_off, NULL), -EIO);
  bdev_unref (view);
  assert_ok (image_open (file, &read_only, &view, &err), &err);
  check_all (view, &m);
  bdev_unref (view);
  store_be64 (raw, behind);
  assert_ok (bdev_pwrite (file, raw, 8, at, 0, &err), &err);
  assert_ok (image_open (file, &read_only, &view, &err), &err);
  assert_int_equal (bdev_pread (view, buf, 512, guest_off, NULL), -EIO);
  bdev_unref (view);
  bdev_unref (file);
  free (m.bytes);
}

/* Readers of one half of the disk while the other half, whose streams share
 * host clusters with it, is overwritten and the space used again.
 */
static void *
read_many (void *opaque)
{
  struct reader *t = opaque;

  for (unsigned i = 0; i < 400; ++i) {
    uint64_t ci = test_random (&t->seed) % (t->m->size / t->m->cluster_size / 2) * 2;
    struct reader one = { t->view, t->m, ci * t->m->cluster_size, t->m->cluster_size };

    read_one (&one);
  }
  return NULL;
}

static void
neighbours_kept (void **state)
{
  struct err err = { 0 };
  struct reader t[4];
  struct bdev *file, *view;
  pthread_t id[4];
  struct model m;

  require_program ("qemu-img");
  model_init (&m, 4 << 20, 12, 9);
  fill_model (&m);
  file = make_file (&m, "compression_type=zstd", false);
  view = open_view (file, NULL, 65536);
  for (unsigned i = 0; i < 4; ++i) {
    t[i] = (struct reader) { .view = view, .m = &m, .seed = i };
    assert_int_equal (pthread_create (&id[i], NULL, read_many, &t[i]), 0);
  }
  for (unsigned n = 0; n < 3; ++n)
    for (uint64_t off = 4096; off < m.size; off += 8192) {
      do_write (view, &m, off + (n == 1) * 5, n == 1 ? 3000 : 4096, 0);
      if (off / 8192 % 16 == 0)
        assert_ok (bdev_flush (view, &err), &err);
      if (off / 8192 % 7 == 0)
        do_trim (view, &m, off, 4096, 0);
    }
  for (unsigned i = 0; i < 4; ++i)
    pthread_join (id[i], NULL);
  check_all (view, &m);
  bdev_unref (view);
  judge (dir, file, &m, CHECK_CLEAN);
  bdev_unref (file);
  free (m.bytes);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (random_requests),
    cmocka_unit_test (subclusters),
    cmocka_unit_test (snapshots),
    cmocka_unit_test (all_overwritten),
    cmocka_unit_test (broken_stream),
    cmocka_unit_test (bad_descriptors),
    cmocka_unit_test (decompressed_once),
    cmocka_unit_test (kept_when_met_again),
    cmocka_unit_test (broken_behind),
    cmocka_unit_test (too_many_sectors),
    cmocka_unit_test (neighbours_kept),
  };

  return cmocka_run_group_tests (tests, make_dir, remove_dir);
}
