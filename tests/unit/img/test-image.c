/* Images under random requests, against a model in RAM; afterwards QEMU says
 * whether the file is free of errors and leaks, and holds the right bytes.
 */
#include "img-test.h"

#include "dev/file.h"

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

static const char *
in_dir (const char *name)
{
  static char path[4][512];
  static unsigned next;

  next = (next + 1) % 4;
  snprintf (path[next], sizeof path[0], "%s/%s", dir, name);
  return path[next];
}

struct config {
  uint32_t version;
  unsigned cluster_bits, refcount_order;
  uint64_t size;
  unsigned ops;
  uint64_t backing_size;        /* 0 = none */
  size_t cache_size;
  bool by_qemu;
};

/* Half data, half holes. */
static struct bdev *
make_backing (struct model *m, uint64_t size)
{
  struct bdev *d = NULL;
  struct err err = { 0 };

  assert_ok (mem_new ("backing.raw", size, false, &d, &err), &err);
  for (uint64_t off = 0; off < size; off += 100000) {
    uint8_t buf[50000];
    size_t n = MIN (sizeof buf, size - off);

    for (size_t i = 0; i < n; ++i)
      buf[i] = test_random (&m->rng);
    assert_ok (bdev_pwrite (d, buf, n, off, 0, &err), &err);
    if (off < m->size)
      memcpy (m->bytes + off, buf, MIN (n, m->size - off));
  }
  save (d, in_dir ("backing.raw"));
  return d;
}

static struct bdev *
make_file (const struct config *c)
{
  const char *backing = c->backing_size ? in_dir ("backing.raw") : NULL;

  if (!c->by_qemu)
    return new_image (c->version, c->cluster_bits, c->refcount_order, c->size, backing);
  assert_int_equal (run ("qemu-img create -f qcow2 -o compat=%s,cluster_size=%llu,"
                         "refcount_bits=%u %s %s %s %llu", c->version < 3 ? "0.10" : "1.1",
                         1ull << c->cluster_bits, 1u << c->refcount_order,
                         backing ? "-F raw -b" : "", backing ? backing : "",
                         in_dir ("made.qcow2"), (unsigned long long) c->size), 0);
  return load (in_dir ("made.qcow2"), true);
}

static void
one_config (const struct config *c, uint64_t seed)
{
  struct bdev *backing = NULL, *file, *view;
  struct model m;

  model_init (&m, c->size, c->cluster_bits, seed);
  if (c->backing_size)
    backing = make_backing (&m, c->backing_size);
  m.trim_zeros = !(backing && c->version < 3);
  file = make_file (c);
  view = open_view (file, backing, c->cache_size);
  assert_int_equal (bdev_size (view), c->size);
  for (unsigned i = 0; i < c->ops; ++i) {
    do_random (view, &m);
    if (i % 97 == 96) {         /* what is in RAM must be on disk after closing */
      bdev_unref (view);
      view = open_view (file, backing, c->cache_size);
    }
  }
  check_all (view, &m);
  check_extents (view, &m, 0, m.size);
  bdev_unref (view);
  judge (dir, file, &m, CHECK_CLEAN);
  bdev_unref (file);
  bdev_unref (backing);
  free (m.bytes);
}

static void
random_requests (void **state)
{
  static const unsigned cluster_bits[] = { 9, 12, 16, 21 };
  static const unsigned orders[] = { 0, 4, 6 };
  static const uint64_t sizes[] = { (1 << 20) + 512, (4 << 20) - 1024, 20 << 20, 50 << 20 };

  require_program ("qemu-img");
  for (unsigned v = 2; v <= 3; ++v)
    for (unsigned b = 0; b < 4; ++b)
      for (unsigned o = 0; o < 3; ++o)
        for (unsigned qemu = 0; qemu < 2; ++qemu) {
          struct config c = {
            .version = v, .cluster_bits = cluster_bits[b], .refcount_order = orders[o],
            .size = sizes[b], .ops = b == 3 ? 150 : 400, .by_qemu = qemu,
            .cache_size = o == 1 ? 1 : 0,
          };

          if (v < 3 && o != 1)
            continue;           /* always 16 bits */
          one_config (&c, v * 1000 + b * 100 + o * 10 + qemu);
        }
}

static void
random_requests_over_backing (void **state)
{
  static const unsigned cluster_bits[] = { 9, 12, 16, 21 };

  require_program ("qemu-img");
  for (unsigned v = 2; v <= 3; ++v)
    for (unsigned b = 0; b < 4; ++b)
      for (unsigned longer = 0; longer < 2; ++longer) {
        struct config c = {
          .version = v, .cluster_bits = cluster_bits[b], .refcount_order = 4,
          .size = b == 3 ? 20 << 20 : 3 << 20, .ops = 300,
          .backing_size = longer ? (22 << 20) + 77 : (2 << 20) + 12345,
          .cache_size = longer,
        };

        one_config (&c, v * 1000 + b * 100 + longer);
      }
}

/* The last sector, the last cluster and the disk end in different places. */
static void
odd_sizes (void **state)
{
  static const uint64_t sizes[] = { 1, 511, 65535, 65537, 1000001 };

  require_program ("qemu-img");
  for (unsigned i = 0; i < sizeof sizes / sizeof sizes[0]; ++i) {
    struct config c = { .version = 3, .cluster_bits = 12, .refcount_order = 4, .size = sizes[i],
                        .ops = 300 };

    one_config (&c, i);
  }
}

/* Sequential writes far past what the first refcount table covers: it is
 * replaced, several times with 64 bits; nothing of the old ones may leak.
 */
static void
table_growth (void **state)
{
  static const struct { unsigned order; uint64_t mib; } cases[] = {
    { 6, 24 }, { 5, 24 }, { 4, 24 }, { 3, 40 }, { 0, 150 },
  };

  require_program ("qemu-img");
  for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    struct model m;
    struct bdev *file, *view;
    uint8_t before[12], after[12];
    uint64_t step = 300000;

    model_init (&m, cases[i].mib << 20, 9, i);
    file = new_image (3, 9, cases[i].order, m.size, NULL);
    assert_int_equal (bdev_pread (file, before, 12, 48, NULL), 0);
    view = open_view (file, NULL, i % 2 ? 0 : 65536);
    for (uint64_t off = 0; off < m.size; off += step)
      do_write (view, &m, off, MIN (step, m.size - off), 0);
    do_trim (view, &m, 1 << 20, 1 << 20, 0);
    bdev_unref (view);
    assert_int_equal (bdev_pread (file, after, 12, 48, NULL), 0);
    assert_memory_not_equal (before, after, 12);
    judge (dir, file, &m, CHECK_CLEAN);
    bdev_unref (file);
    free (m.bytes);
  }
}

/* Bytes of snapshot i as QEMU reads them. */
static void
convert_snapshot (unsigned i, const char *to)
{
  assert_int_equal (run ("qemu-img convert -f qcow2 -O raw -l snapshot.name=s%u %s %s", i,
                         in_dir ("snap.qcow2"), to), 0);
}

static void
with_snapshots (uint32_t version, unsigned cluster_bits, unsigned order, uint64_t seed)
{
  struct bdev *file, *view;
  struct err err = { 0 };
  uint64_t size = cluster_bits == 21 ? 40 << 20 : 4 << 20;
  struct model m;

  assert_int_equal (run ("qemu-img create -f qcow2 -o compat=%s,cluster_size=%u,refcount_bits=%u "
                         "%s %llu", version < 3 ? "0.10" : "1.1", 1u << cluster_bits, 1u << order,
                         in_dir ("snap.qcow2"), (unsigned long long) size), 0);
  for (unsigned i = 0; i < 3; ++i)
    assert_int_equal (run ("qemu-io -f qcow2 -c 'write -P %u %u 1M' -c 'write -P %u 3000k 100k' %s "
                           "&& qemu-img snapshot -c s%u %s", i + 1, 300000 * i / 512 * 512, i + 10,
                           in_dir ("snap.qcow2"), i, in_dir ("snap.qcow2")), 0);
  for (unsigned i = 0; i < 3; ++i) {
    char name[32];

    snprintf (name, sizeof name, "before%u", i);
    convert_snapshot (i, in_dir (name));
  }
  model_init (&m, size, cluster_bits, seed);
  file = load (in_dir ("snap.qcow2"), true);
  view = open_view (file, NULL, 0);
  assert_ok (bdev_pread (view, m.bytes, m.size, 0, &err), &err);
  for (unsigned i = 0; i < 300; ++i)
    do_random (view, &m);
  bdev_unref (view);
  judge (dir, file, &m, CHECK_CLEAN);
  save (file, in_dir ("snap.qcow2"));
  for (unsigned i = 0; i < 3; ++i) {
    char name[32];

    snprintf (name, sizeof name, "before%u", i);
    convert_snapshot (i, in_dir ("after"));
    assert_int_equal (run ("cmp %s %s", in_dir (name), in_dir ("after")), 0);
  }
  /* They can still be gone back to and deleted. */
  assert_int_equal (run ("qemu-img snapshot -a s1 %s && qemu-img snapshot -d s0 %s && "
                         "qemu-img check %s", in_dir ("snap.qcow2"), in_dir ("snap.qcow2"),
                         in_dir ("snap.qcow2")), 0);
  bdev_unref (file);
  free (m.bytes);
}

static void
snapshots (void **state)
{
  require_program ("qemu-img");
  require_program ("qemu-io");
  with_snapshots (2, 12, 4, 1);
  with_snapshots (3, 9, 6, 2);
  with_snapshots (3, 12, 3, 3);
  with_snapshots (3, 16, 4, 4);
  with_snapshots (3, 21, 4, 5);
}

/* A device that can't grow, and ends in the middle of a cluster: full is
 * ENOSPC, and what is trimmed can be written again, without a flush in between.
 */
static void
fixed_device (void **state)
{
  struct bdev *made = new_image (3, 12, 4, 16 << 20, NULL), *file = NULL, *view;
  struct err err = { 0 };
  static uint8_t buf[4096];
  uint64_t size = (1 << 20) + 1000, written = 0;
  struct model m;
  int r = 0;

  require_program ("qemu-img");
  model_init (&m, 16 << 20, 12, 1);
  assert_ok (mem_new ("fixed", size, false, &file, &err), &err);
  for (uint64_t off = 0; off < bdev_size (made); off += sizeof buf) {
    assert_ok (bdev_pread (made, buf, sizeof buf, off, &err), &err);
    assert_ok (bdev_pwrite (file, buf, sizeof buf, off, 0, &err), &err);
  }
  bdev_unref (made);
  view = open_view (file, NULL, 0);
  memset (buf, 0x55, sizeof buf);
  for (; r == 0; written += sizeof buf) {
    r = bdev_pwrite (view, buf, sizeof buf, written, 0, &err);
    if (r == 0)
      memcpy (m.bytes + written, buf, sizeof buf);
  }
  written -= sizeof buf;
  assert_int_equal (r, -ENOSPC);
  assert_true (written > 200 * sizeof buf);     /* of 256: it was really full */
  for (unsigned i = 0; i < 10; ++i) {
    do_trim (view, &m, 0, 102 * 4096, 0);
    do_write (view, &m, 8 << 20, 50 * 4096, 0);
    do_write (view, &m, 0, 50 * 4096, 0);
    do_trim (view, &m, 8 << 20, 50 * 4096, 0);
    do_write (view, &m, 50 * 4096, 50 * 4096, 0);
  }
  bdev_unref (view);
  assert_int_equal (bdev_size (file), size);
  judge (dir, file, &m, CHECK_CLEAN);
  bdev_unref (file);
  free (m.bytes);
}

/* On a real file, with punched holes. */
static void
on_a_file (void **state)
{
  struct bdev *made = new_image (3, 16, 4, 32 << 20, NULL), *file = NULL, *view;
  struct err err = { 0 };
  struct model m;

  require_program ("qemu-img");
  model_init (&m, 32 << 20, 16, 5);
  save (made, in_dir ("real.qcow2"));
  bdev_unref (made);
  assert_ok (file_open (in_dir ("real.qcow2"), FILE_WRITE, &file, &err), &err);
  view = open_view (file, NULL, 0);
  for (unsigned i = 0; i < 500; ++i)
    do_random (view, &m);
  bdev_unref (view);
  bdev_unref (file);
  file = load (in_dir ("real.qcow2"), true);
  judge (dir, file, &m, CHECK_CLEAN);
  bdev_unref (file);
  free (m.bytes);
}

/* --- growing */

static void
grows_up_to_its_l1_table (void **state)
{
  struct image_params p = { .version = 3, .cluster_bits = 12, .refcount_order = 4, .size = 5000,
                            .max_size = 8 << 20 };
  struct bdev *file = NULL, *view, *backing;
  struct err err = { 0 };
  struct model m;
  char name[512];

  require_program ("qemu-img");
  model_init (&m, 8 << 20, 12, 7);
  m.size = 5000;
  backing = make_backing (&m, 20000);   /* longer than the disk: must not show through */
  snprintf (name, sizeof name, "%s", in_dir ("backing.raw"));
  p.backing_name = name;
  p.backing_format = "raw";
  assert_ok (mem_new ("grows", 0, true, &file, &err), &err);
  assert_ok (image_create (file, &p, &err), &err);
  view = open_view (file, backing, 0);
  assert_int_equal (bdev_resize (view, 6000, &err), -ENOSPC);
  err_clear (&err);
  image_set_growable (view, true);
  /* In small steps, then large ones; partial writes at the end in between. */
  memset (m.bytes + 5000, 0, (8 << 20) - 5000);
  while (m.size < (8 << 20) - 300000) {
    m.size += 1 + below (&m, m.size < 50000 ? 3000 : 300000);
    assert_ok (bdev_resize (view, m.size, &err), &err);
    check_read (view, &m, 0, m.size);
    do_random (view, &m);
    check_read (view, &m, 0, m.size);
    if (below (&m, 8) == 0) {
      bdev_unref (view);
      view = open_view (file, backing, 0);
      assert_int_equal (bdev_size (view), m.size);
      image_set_growable (view, true);
    }
  }
  assert_int_equal (bdev_resize (view, UINT64_C (1) << 40, &err), -ENOSPC);
  err_clear (&err);
  m.size = 8 << 20;
  assert_ok (bdev_resize (view, m.size, &err), &err);
  do_write (view, &m, m.size - 10, 10, 0);
  bdev_unref (view);
  judge (dir, file, &m, CHECK_CLEAN);
  bdev_unref (file);
  bdev_unref (backing);
  free (m.bytes);
}

/* An image inside an overlay: all that the inner one does goes to the outer. */
static void
image_in_an_image (void **state)
{
  struct image_params p = { .version = 3, .cluster_bits = 16, .refcount_order = 4,
                            .max_size = 100 << 20, .backing_format = "raw" };
  struct bdev *source, *outer = NULL, *healed, *guest;
  struct err err = { 0 };
  struct model m;
  char name[512], overlay[512];

  require_program ("qemu-img");
  model_init (&m, 30 << 20, 9, 3);
  source = new_image (3, 9, 5, m.size, NULL);
  guest = open_view (source, NULL, 0);
  for (unsigned i = 0; i < 200; ++i)
    do_random (guest, &m);
  bdev_unref (guest);
  snprintf (name, sizeof name, "%s", in_dir ("source.qcow2"));
  snprintf (overlay, sizeof overlay, "%s", in_dir ("overlay.qcow2"));
  save (source, name);
  p.size = bdev_size (source);
  p.backing_name = name;
  assert_ok (mem_new ("overlay", 0, true, &outer, &err), &err);
  assert_ok (image_create (outer, &p, &err), &err);
  healed = open_view (outer, source, 0);
  image_set_growable (healed, true);
  guest = open_view (healed, NULL, 100000);
  for (unsigned i = 0; i < 2000; ++i)
    do_random (guest, &m);
  check_all (guest, &m);
  bdev_unref (guest);
  bdev_unref (healed);
  assert_true (bdev_size (outer) > 1 << 20);
  save (outer, overlay);
  save_model (&m, in_dir ("model.raw"));
  assert_int_equal (qemu_check (overlay), CHECK_CLEAN);
  assert_int_equal (run ("qemu-img commit -f qcow2 %s && qemu-img check -f qcow2 %s && "
                         "qemu-img compare -f qcow2 -F raw %s %s", overlay, name, name,
                         in_dir ("model.raw")), 0);
  bdev_unref (outer);
  bdev_unref (source);
  free (m.bytes);
}

/* --- zero and extents, one by one */

struct seen {
  unsigned nr;
  struct { uint64_t off, len; unsigned kind; } e[16];
};

static int
note (void *opaque, uint64_t off, uint64_t len, unsigned kind)
{
  struct seen *s = opaque;

  assert_true (s->nr < 16);
  s->e[s->nr].off = off;
  s->e[s->nr].len = len;
  s->e[s->nr++].kind = kind;
  return 0;
}

static int
stop_at_once (void *opaque, uint64_t off, uint64_t len, unsigned kind)
{
  ++*(unsigned *) opaque;
  return 1;
}

#define K 4096

static void
zero_keeps_or_frees (void **state)
{
  struct bdev *file = new_image (3, 12, 4, 1 << 20, NULL), *view = open_view (file, NULL, 0);
  struct err err = { 0 };
  struct model m;
  struct seen s = { 0 };
  unsigned calls = 0;

  model_init (&m, 1 << 20, 12, 1);
  do_write (view, &m, 0, 8 * K, 0);
  /* Kept, freed, and one that would have to be written. */
  assert_ok (bdev_zero (view, 1 * K, K, BDEV_FAST, &err), &err);
  assert_ok (bdev_zero (view, 3 * K, K, BDEV_FAST | BDEV_MAY_TRIM, &err), &err);
  assert_int_equal (bdev_zero (view, 5 * K + 1, K, BDEV_FAST, &err), -ENOTSUP);
  err_clear (&err);
  assert_ok (bdev_trim (view, 6 * K + 1, K, 0, &err), &err);    /* no whole cluster in it */
  memset (m.bytes + K, 0, K);
  memset (m.bytes + 3 * K, 0, K);
  check_all (view, &m);
  assert_ok (bdev_extents (view, 0, 1 << 20, note, &s, &err), &err);
  assert_int_equal (s.nr, 6);
  assert_int_equal (s.e[0].len, K);
  assert_int_equal (s.e[0].kind, 0);
  assert_int_equal (s.e[1].kind, BDEV_ZERO);
  assert_int_equal (s.e[2].kind, 0);
  assert_int_equal (s.e[3].kind, BDEV_ZERO | BDEV_HOLE);
  assert_int_equal (s.e[4].len, 4 * K);
  assert_int_equal (s.e[5].kind, BDEV_ZERO | BDEV_HOLE);
  assert_ok (bdev_extents (view, 0, 1 << 20, stop_at_once, &calls, &err), &err);
  assert_int_equal (calls, 1);
  bdev_unref (view);
  bdev_unref (file);
  free (m.bytes);
}

/* Reading and asking must leave every byte alone. */
static void
nothing_is_written_unasked (void **state)
{
  struct bdev *file = new_image (3, 16, 4, 1 << 30, NULL), *view, *copy = NULL;
  struct err err = { 0 };
  uint8_t a[4096], b[4096];

  assert_ok (mem_copy_of (file, &copy, &err), &err);
  view = open_view (file, NULL, 0);
  assert_ok (bdev_pread (view, a, sizeof a, 12345, &err), &err);
  assert_ok (bdev_flush (view, &err), &err);
  bdev_unref (view);
  assert_int_equal (bdev_size (file), bdev_size (copy));
  for (uint64_t off = 0; off < bdev_size (file); off += sizeof a) {
    assert_ok (bdev_pread (file, a, sizeof a, off, &err), &err);
    assert_ok (bdev_pread (copy, b, sizeof b, off, &err), &err);
    assert_memory_equal (a, b, sizeof a);
  }
  bdev_unref (copy);
  bdev_unref (file);
}

/* A write into a new cluster of a growable file writes its own bytes only. */
static void
small_writes_stay_small (void **state)
{
  struct bdev *file = new_image (3, 21, 4, 1 << 30, NULL), *view = open_view (file, NULL, 0);
  struct err err = { 0 };
  uint64_t used = mem_used (file);

  assert_ok (bdev_pwrite (view, "x", 1, 5 << 20, 0, &err), &err);
  /* And a new L2 table in full. */
  assert_true (mem_used (file) - used <= (2 << 20) + 3 * 65536);
  bdev_unref (view);
  bdev_unref (file);
}

/* --- headers and hostile entries */

static void
poke64 (struct bdev *d, uint64_t off, uint64_t value)
{
  uint8_t raw[8];

  store_be64 (raw, value);
  assert_int_equal (bdev_pwrite (d, raw, 8, off, 0, NULL), 0);
}

static uint64_t
peek64 (struct bdev *d, uint64_t off)
{
  uint8_t raw[8];

  assert_int_equal (bdev_pread (d, raw, 8, off, NULL), 0);
  return load_be64 (raw);
}

static void
refuses_what_it_cannot_serve (void **state)
{
  static const struct { uint64_t off, value; int r, r_read_only; const char *word; } cases[] = {
    { 0, 0, -EINVAL, -EINVAL, "magic" },
    { 72, INCOMPAT_DATA_FILE, -ENOTSUP, -ENOTSUP, "data file" },
    { 72, INCOMPAT_DIRTY, -EROFS, 0, "dirty" },
    { 72, INCOMPAT_CORRUPT, -EROFS, 0, "corrupt" },
    { 72, UINT64_C (1) << 40, -ENOTSUP, -ENOTSUP, "features" },
    { 32, UINT64_C (1) << 32 | 16, -ENOTSUP, -ENOTSUP, "AES" },
    { 32, UINT64_C (2) << 32 | 16, -ENOTSUP, -ENOTSUP, "LUKS" },
    { 32, UINT64_C (0xffffffff), -EINVAL, -EINVAL, "L1 table" },
    { 32, 1, -EINVAL, -EINVAL, "L1 table" },
    { 24, UINT64_MAX, -EINVAL, -EINVAL, "L1 table" },
    { 40, 12345, -EINVAL, -EINVAL, "L1 table" },
    { 40, UINT64_C (0xffffffffffff0000), -EINVAL, -EINVAL, "L1 table" },
    { 48, UINT64_C (0xffffffffffff0000), -EINVAL, 0, "refcount table" },
    { 48, 512, -EINVAL, 0, "refcount table" },
    { 56, 0, -EINVAL, 0, "refcount table" },
    { 56, UINT64_C (0xffffffff00000000), -EINVAL, 0, "refcount table" },
    { 56, UINT64_C (1) << 32 | 70000, -EINVAL, 0, "snapshot" },
    { 60, UINT64_C (5) << 32, -EINVAL, 0, "snapshot" },
  };

  for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; ++i)
    for (unsigned ro = 0; ro < 2; ++ro) {
      /* 16 L1 entries. */
      struct bdev *file = new_image (3, 16, 4, UINT64_C (16) << 29, NULL), *view = NULL;
      struct image_options opts = { .read_only = ro };
      struct err err = { 0 };
      int r;

      poke64 (file, cases[i].off, cases[i].value);
      r = image_open (file, &opts, &view, &err);
      if (r != (ro ? cases[i].r_read_only : cases[i].r))
        fail_msg ("case %u, read-only %u: %d %s", i, ro, r, err.msg);
      if (r < 0 && strstr (err.msg, cases[i].word) == NULL)
        fail_msg ("case %u: %s", i, err.msg);
      if (r == 0)
        assert_int_equal (bdev_pwrite (view, "x", 1, 0, 0, NULL), -EROFS);
      bdev_unref (view);
      bdev_unref (file);
    }
}

static void
clears_autoclear_bits_at_the_first_change (void **state)
{
  struct bdev *file = new_image (3, 16, 4, 1 << 20, NULL), *view;
  struct err err = { 0 };

  poke64 (file, HEADER_OFF_AUTOCLEAR, UINT64_C (0xf0f3));
  poke64 (file, HEADER_OFF_COMPATIBLE, UINT64_C (0xf0f1));
  view = open_view (file, NULL, 0);
  assert_ok (bdev_flush (view, &err), &err);
  assert_int_equal (peek64 (file, HEADER_OFF_AUTOCLEAR), 0xf0f3);
  assert_ok (bdev_trim (view, 0, 512, 0, &err), &err);
  assert_int_equal (peek64 (file, HEADER_OFF_AUTOCLEAR), AUTOCLEAR_DATA_FILE_RAW);
  bdev_unref (view);
  assert_int_equal (peek64 (file, HEADER_OFF_COMPATIBLE), 0xf0f1);
  bdev_unref (file);
}

/* Entries that can't be right fail the requests that meet them, with both
 * offsets in the message, and no others.
 */
static void
bad_l2_entries (void **state)
{
  static const struct { uint64_t raw; uint32_t version; const char *word; } cases[] = {
    { ENTRY_COPIED | 0x51200, 3, "0x51200: misaligned" },
    { ENTRY_COPIED | UINT64_C (0x10000000000), 3, "past the end" },
    { ENTRY_COPIED | UINT64_C (0xfffffffffff000), 3, "past the end" },
    { ENTRY_COPIED | 0x1000, 3, "inside metadata" },    /* refcount table */
    { ENTRY_COPIED | 0x3000, 3, "inside metadata" },    /* L1 table */
    { ENTRY_COPIED | 0x5002, 3, "reserved bits" },
    { UINT64_C (1) << 60 | 0x5000, 3, "reserved bits" },
    { L2E_ZERO, 2, "reserved bits" },
    { L2E_COMPRESSED | 0x3200, 3, "stream inside metadata" },
  };

  for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    struct bdev *file = new_image (cases[i].version, 12, 4, 1 << 20, NULL), *view;
    struct err err = { 0 };
    struct model m;
    uint64_t l2;
    uint8_t buf[16];

    model_init (&m, 1 << 20, 12, i);
    view = open_view (file, NULL, 0);
    do_write (view, &m, 0, 3 * K, 0);
    bdev_unref (view);
    l2 = peek64 (file, 0x3000) & L1E_OFF_MASK;
    poke64 (file, l2 + 8, cases[i].raw);
    view = open_view (file, NULL, 0);
    assert_int_equal (bdev_pread (view, buf, 16, K + 5, &err), -EIO);
    if (!strstr (err.msg, cases[i].word) || !strstr (err.msg, "guest offset 0x1000"))
      fail_msg ("case %u: %s", i, err.msg);
    assert_int_equal (bdev_pwrite (view, buf, 16, K + 5, 0, NULL), -EIO);
    assert_int_equal (bdev_pwrite (view, buf, 16, 2 * K - 5, 0, NULL), -EIO);
    assert_int_equal (bdev_zero (view, K, K, BDEV_MAY_TRIM, NULL), -EIO);
    assert_int_equal (bdev_trim (view, K, K, 0, NULL), -EIO);
    do_write (view, &m, 2 * K, K, 0);
    check_read (view, &m, 0, K);
    check_read (view, &m, 2 * K, K);
    bdev_unref (view);
    assert_true (peek64 (file, l2 + 8) == cases[i].raw);
    bdev_unref (file);
    free (m.bytes);
  }
}

static void
bad_l1_entries (void **state)
{
  static const uint64_t raws[] = {
    ENTRY_COPIED | 0x51200, ENTRY_COPIED | UINT64_C (0x1000000000000), ENTRY_COPIED | 0x3000,
    ENTRY_COPIED | 0x4001, UINT64_C (1) << 62, 0x1000,
  };

  for (unsigned i = 0; i < sizeof raws / sizeof raws[0]; ++i) {
    struct bdev *file = new_image (3, 12, 4, 4 << 20, NULL), *view;
    struct err err = { 0 };
    uint8_t buf[16] = { 1 };

    poke64 (file, 0x3000, raws[i]);
    view = open_view (file, NULL, 0);
    assert_int_equal (bdev_pread (view, buf, 16, 5, &err), -EIO);
    assert_non_null (strstr (err.msg, "L1 entry 0"));
    assert_int_equal (bdev_pwrite (view, buf, 16, 5, 0, NULL), -EIO);
    assert_int_equal (bdev_pwrite (view, buf, 16, 3 << 20, 0, NULL), 0);
    bdev_unref (view);
    assert_true (peek64 (file, 0x3000) == raws[i]);
    bdev_unref (file);
  }
}

/* The fixed metadata is never handed out, even if its refcount says it's free. */
static void
metadata_is_never_handed_out (void **state)
{
  struct bdev *file = new_image (3, 12, 4, 4 << 20, NULL), *view;
  struct model m;
  uint8_t zeros[K] = { 0 }, header[K], after[K];

  model_init (&m, 4 << 20, 12, 1);
  assert_int_equal (bdev_pread (file, header, K, 0, NULL), 0);
  assert_int_equal (bdev_pwrite (file, zeros, 8, 0x2000, 0, NULL), 0);  /* all four refcounts */
  view = open_view (file, NULL, 0);
  do_write (view, &m, 0, 1 << 20, 0);
  bdev_unref (view);
  assert_int_equal (bdev_pread (file, after, K, 0, NULL), 0);
  assert_memory_equal (header, after, K);
  assert_int_equal (peek64 (file, 0x1000), 0x2000);
  assert_true ((peek64 (file, 0x3000) & L1E_OFF_MASK) > 0x3000);
  bdev_unref (file);
  free (m.bytes);
}

static void
creation_refuses_nonsense (void **state)
{
  static const struct image_params bad[] = {
    { .version = 4, .cluster_bits = 16, .refcount_order = 4, .size = 1 },
    { .version = 3, .cluster_bits = 8, .refcount_order = 4, .size = 1 },
    { .version = 3, .cluster_bits = 22, .refcount_order = 4, .size = 1 },
    { .version = 3, .cluster_bits = 16, .refcount_order = 7, .size = 1 },
    { .version = 2, .cluster_bits = 16, .refcount_order = 3, .size = 1 },
    { .version = 3, .cluster_bits = 9, .refcount_order = 4, .size = UINT64_C (1) << 40 },
    { .version = 3, .cluster_bits = 21, .refcount_order = 4, .size = UINT64_MAX },
  };

  for (unsigned i = 0; i < sizeof bad / sizeof bad[0]; ++i) {
    struct bdev *d = NULL;
    struct err err = { 0 };

    assert_ok (mem_new ("new", 0, true, &d, &err), &err);
    assert_true (image_create (d, &bad[i], &err) < 0);
    assert_true (err.msg[0] != 0);
    assert_int_equal (bdev_size (d), 0);
    bdev_unref (d);
  }
}

/* The largest L1 table, and metadata that needs many refcount blocks. */
static void
creation_at_the_limits (void **state)
{
  static const struct image_params good[] = {
    { .version = 3, .cluster_bits = 9, .refcount_order = 6, .size = UINT64_C (128) << 30 },
    { .version = 3, .cluster_bits = 9, .refcount_order = 0, .size = UINT64_C (128) << 30 },
    { .version = 2, .cluster_bits = 16, .refcount_order = 4, .size = UINT64_C (1) << 50 },
    { .version = 3, .cluster_bits = 21, .refcount_order = 4, .size = 0 },
  };

  require_program ("qemu-img");
  for (unsigned i = 0; i < sizeof good / sizeof good[0]; ++i) {
    struct bdev *d = NULL;
    struct err err = { 0 };

    assert_ok (mem_new ("new", 0, true, &d, &err), &err);
    assert_ok (image_create (d, &good[i], &err), &err);
    save (d, in_dir ("limits.qcow2"));
    assert_int_equal (qemu_check (in_dir ("limits.qcow2")), CHECK_CLEAN);
    bdev_unref (d);
  }
}

/* Refused with the names that the image has for them. */
static void
unknown_features_are_named (void **state)
{
  struct image_options opts = { 0 };
  struct bdev *file, *view = NULL;
  struct err err = { 0 };

  require_program ("qemu-img");
  assert_int_equal (run ("qemu-img create -f qcow2 %s 1M", in_dir ("named.qcow2")), 0);
  file = load (in_dir ("named.qcow2"), true);
  poke64 (file, HEADER_OFF_INCOMPATIBLE, UINT64_C (1) << 60);
  assert_int_equal (image_open (file, &opts, &view, &err), -ENOTSUP);
  assert_non_null (strstr (err.msg, "does not know: bit 60;"));
  /* The first entry of QEMU's table, made one of the future. */
  for (uint64_t off = 104; ; off += 8)
    if (peek64 (file, off) >> 32 == EXT_FEATURE_NAMES) {
      poke64 (file, off + 8, UINT64_C (60) << 48 | UINT64_C (0x77617270) << 16);
      break;
    }
  err_clear (&err);
  assert_int_equal (image_open (file, &opts, &view, &err), -ENOTSUP);
  assert_non_null (strstr (err.msg, "does not know: \"warp"));
  bdev_unref (file);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (random_requests),
    cmocka_unit_test (random_requests_over_backing),
    cmocka_unit_test (odd_sizes),
    cmocka_unit_test (table_growth),
    cmocka_unit_test (snapshots),
    cmocka_unit_test (fixed_device),
    cmocka_unit_test (on_a_file),
    cmocka_unit_test (grows_up_to_its_l1_table),
    cmocka_unit_test (image_in_an_image),
    cmocka_unit_test (zero_keeps_or_frees),
    cmocka_unit_test (nothing_is_written_unasked),
    cmocka_unit_test (small_writes_stay_small),
    cmocka_unit_test (refuses_what_it_cannot_serve),
    cmocka_unit_test (clears_autoclear_bits_at_the_first_change),
    cmocka_unit_test (bad_l2_entries),
    cmocka_unit_test (unknown_features_are_named),
    cmocka_unit_test (bad_l1_entries),
    cmocka_unit_test (metadata_is_never_handed_out),
    cmocka_unit_test (creation_refuses_nonsense),
    cmocka_unit_test (creation_at_the_limits),
  };

  return cmocka_run_group_tests (tests, make_dir, remove_dir);
}
