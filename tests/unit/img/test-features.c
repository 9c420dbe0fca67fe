/* Extended L2 entries, external data files and views of snapshots, against a
 * model in RAM; QEMU makes the images, and says afterwards whether they are free
 * of errors and leaks and hold the right bytes.
 */
#include "fmt/entry.h"
#include "img-test.h"

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
  static char path[8][512];
  static unsigned next;

  next = (next + 1) % 8;
  snprintf (path[next], sizeof path[0], "%s/%s", dir, name);
  return path[next];
}

static uint64_t
peek64 (struct bdev *d, uint64_t off)
{
  uint8_t raw[8];

  assert_int_equal (bdev_pread (d, raw, 8, off, NULL), 0);
  return load_be64 (raw);
}

static void
poke64 (struct bdev *d, uint64_t off, uint64_t value)
{
  uint8_t raw[8];

  store_be64 (raw, value);
  assert_int_equal (bdev_pwrite (d, raw, 8, off, 0, NULL), 0);
}

/* --- extended L2 entries */

struct config {
  unsigned cluster_bits;
  uint64_t size;
  uint64_t backing_size;        /* 0 = none */
  unsigned nr_snapshots;
  bool compressed;              /* all of it, at first */
  size_t cache_size;
  unsigned ops;
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

/* QEMU writes and zeroes at places of all alignments; the model gets to know by
 * what QEMU reads back.
 */
static void
qemu_writes (struct model *m, const char *path, unsigned n)
{
  char script[8192];
  size_t len = 0;

  for (unsigned i = 0; i < n; ++i) {
    uint64_t off = below (m, m->size / 512 - 1) * 512;
    uint64_t max = MIN (m->size - off, m->cluster_size * 3);
    uint64_t bytes = (1 + below (m, max / 512)) * 512;

    len += snprintf (script + len, sizeof script - len, " -c '%s %llu %llu'",
                     below (m, 4) ? "write -P 0x5a" : below (m, 2) ? "write -z" : "write -z -u",
                     (unsigned long long) off, (unsigned long long) bytes);
    assert_true (len < sizeof script - 200);
  }
  assert_int_equal (run ("qemu-io -f qcow2 %s %s", script, path), 0);
}

static void
read_model (struct model *m, const char *path)
{
  FILE *fp;

  assert_int_equal (run ("qemu-img convert -f qcow2 -O raw %s %s", path, in_dir ("read.raw")), 0);
  fp = fopen (in_dir ("read.raw"), "r");
  assert_non_null (fp);
  assert_int_equal (fread (m->bytes, 1, m->size, fp), m->size);
  fclose (fp);
}

static void
convert_snapshot (unsigned i, const char *from, const char *to)
{
  assert_int_equal (run ("qemu-img convert -f qcow2 -O raw -l snapshot.name=s%u %s %s", i, from,
                         to), 0);
}

static void
one_extended (const struct config *c, uint64_t seed)
{
  struct bdev *backing = NULL, *file, *view;
  const char *path = strdup (in_dir ("ext.qcow2"));
  struct model m;

  model_init (&m, c->size, c->cluster_bits, seed);
  m.trim_size = m.cluster_size / 32;
  m.trim_may_keep = c->compressed;
  if (c->backing_size)
    backing = make_backing (&m, c->backing_size);
  assert_int_equal (run ("qemu-img create -f qcow2 -o extended_l2=on,cluster_size=%u %s %s %s %llu",
                         1u << c->cluster_bits, backing ? "-F raw -b" : "",
                         backing ? in_dir ("backing.raw") : "", path,
                         (unsigned long long) c->size), 0);
  if (c->compressed) {
    for (uint64_t i = 0; i < m.size; ++i)
      m.bytes[i] = i >> 10;
    save_model (&m, in_dir ("plain.raw"));
    assert_int_equal (run ("qemu-img convert -n -c -f raw -O qcow2 %s %s", in_dir ("plain.raw"),
                           path), 0);
  }
  for (unsigned i = 0; i < c->nr_snapshots; ++i) {
    char name[32];

    qemu_writes (&m, path, 12);
    assert_int_equal (run ("qemu-img snapshot -c s%u %s", i, path), 0);
    snprintf (name, sizeof name, "before%u", i);
    convert_snapshot (i, path, in_dir (name));
  }
  qemu_writes (&m, path, 12);
  read_model (&m, path);
  file = load (path, true);
  view = open_view (file, backing, c->cache_size);
  check_all (view, &m);
  for (unsigned i = 0; i < c->ops; ++i) {
    do_random (view, &m);
    if (i % 97 == 96) {
      bdev_unref (view);
      view = open_view (file, backing, c->cache_size);
    }
  }
  check_all (view, &m);
  check_extents (view, &m, 0, m.size);
  bdev_unref (view);
  judge (dir, file, &m, CHECK_CLEAN);
  /* And back: QEMU goes on with it, then we read. */
  save (file, path);
  for (unsigned i = 0; i < c->nr_snapshots; ++i) {
    char name[32];

    snprintf (name, sizeof name, "before%u", i);
    convert_snapshot (i, path, in_dir ("after"));
    assert_int_equal (run ("cmp %s %s", in_dir (name), in_dir ("after")), 0);
  }
  bdev_unref (file);
  qemu_writes (&m, path, 20);
  read_model (&m, path);
  assert_int_equal (qemu_check (path), CHECK_CLEAN);
  file = load (path, true);
  view = open_view (file, backing, c->cache_size);
  check_all (view, &m);
  bdev_unref (view);
  bdev_unref (file);
  bdev_unref (backing);
  free (m.bytes);
  free ((char *) path);
}

static void
extended_l2 (void **state)
{
  static const unsigned cluster_bits[] = { 14, 16, 18, 21 };

  require_program ("qemu-img");
  require_program ("qemu-io");
  for (unsigned b = 0; b < 4; ++b)
    for (unsigned backed = 0; backed < 3; ++backed)
      for (unsigned snapshots = 0; snapshots < 2; ++snapshots) {
        struct config c = {
          .cluster_bits = cluster_bits[b], .size = b == 3 ? (20 << 20) + 512 : (6 << 20) - 1536,
          .backing_size = backed == 0 ? 0 : backed == 1 ? (7 << 20) + 77 : (2 << 20) + 12345,
          .nr_snapshots = snapshots * 2, .cache_size = snapshots ? 0 : 1, .ops = 300,
        };

        one_extended (&c, b * 100 + backed * 10 + snapshots);
      }
}

/* Compressed clusters have no subclusters. */
static void
extended_l2_compressed (void **state)
{
  static const unsigned cluster_bits[] = { 14, 16, 21 };

  require_program ("qemu-img");
  require_program ("qemu-io");
  for (unsigned b = 0; b < 3; ++b)
    for (unsigned snapshots = 0; snapshots < 2; ++snapshots) {
      struct config c = { .cluster_bits = cluster_bits[b], .compressed = true, .ops = 150,
                          .size = b == 2 ? 20 << 20 : (4 << 20) - 1536,
                          .nr_snapshots = snapshots };

      one_extended (&c, 1000 + b * 10 + snapshots);
    }
}

static struct bdev *
make_extended (unsigned cluster_bits, uint64_t size)
{
  assert_int_equal (run ("qemu-img create -f qcow2 -o extended_l2=on,cluster_size=%u %s %llu",
                         1u << cluster_bits, in_dir ("made.qcow2"), (unsigned long long) size), 0);
  return load (in_dir ("made.qcow2"), true);
}

/* The pair of the first guest cluster. */
static uint64_t
first_pair (struct bdev *file)
{
  return peek64 (file, peek64 (file, HEADER_OFF_L1_TABLE)) & L1E_OFF_MASK;
}

#define K 1024

/* Bits by hand, for what each request should have done to them. */
static void
only_what_is_touched (void **state)
{
  struct bdev *file, *view;
  struct err err = { 0 };
  static uint8_t buf[65536];
  uint64_t at, host;

  require_program ("qemu-img");
  file = make_extended (16, 1 << 20);           /* subclusters of 2 KiB */
  view = open_view (file, NULL, 0);
  memset (buf, 0x77, sizeof buf);
  assert_ok (bdev_pwrite (view, buf, 100, 5 * K, 0, &err), &err);
  assert_ok (bdev_flush (view, &err), &err);
  at = first_pair (file);
  host = peek64 (file, at);
  assert_true (host & ENTRY_COPIED);
  assert_true (peek64 (file, at + 8) == 1 << 2);
  /* Two more, in the same host cluster. */
  assert_ok (bdev_pwrite (view, buf, 2 * K, 7 * K, 0, &err), &err);
  assert_ok (bdev_flush (view, &err), &err);
  assert_true (peek64 (file, at) == host);
  assert_true (peek64 (file, at + 8) == (1 << 2 | 1 << 3 | 1 << 4));
  /* Trimmed: back to nothing where that reads as zeros; zeroed: zero where it was data. */
  assert_ok (bdev_trim (view, 4 * K, 2 * K, 0, &err), &err);
  assert_ok (bdev_zero (view, 6 * K, 2 * K, 0, &err), &err);
  assert_ok (bdev_flush (view, &err), &err);
  assert_true (peek64 (file, at) == host);
  assert_true (peek64 (file, at + 8) == (UINT64_C (1) << 35 | 1 << 4));
  /* The last one takes the host cluster with it. */
  assert_ok (bdev_trim (view, 0, 64 * K, 0, &err), &err);
  assert_ok (bdev_flush (view, &err), &err);
  assert_true (peek64 (file, at) == 0);
  assert_true ((peek64 (file, at + 8) & BITMAP_ALL_ALLOC) == 0);
  bdev_unref (view);
  save (file, in_dir ("made.qcow2"));
  assert_int_equal (qemu_check (in_dir ("made.qcow2")), CHECK_CLEAN);
  bdev_unref (file);
}

static void
bad_bitmaps (void **state)
{
  static const struct { bool has_host; uint64_t bitmap; const char *word; } cases[] = {
    { true, UINT64_C (1) << 37 | 1 << 5, "both allocated and zero" },
    { false, 1 << 7, "in no cluster" },
  };

  require_program ("qemu-img");
  for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    struct bdev *file = make_extended (16, 1 << 20), *view = open_view (file, NULL, 0);
    struct err err = { 0 };
    uint8_t buf[16] = { 1 };
    struct model m;
    uint64_t at;

    model_init (&m, 1 << 20, 16, 1);
    do_write (view, &m, 0, 192 * K, 0);
    bdev_unref (view);
    at = first_pair (file);
    if (!cases[i].has_host)
      poke64 (file, at + 16, 0);
    poke64 (file, at + 24, cases[i].bitmap);
    view = open_view (file, NULL, 0);
    assert_int_equal (bdev_pread (view, buf, 16, 64 * K + 5, &err), -EIO);
    if (!strstr (err.msg, cases[i].word) || !strstr (err.msg, "guest offset 0x10000"))
      fail_msg ("case %u: %s", i, err.msg);
    assert_int_equal (bdev_pwrite (view, buf, 16, 64 * K + 5, 0, NULL), -EIO);
    assert_int_equal (bdev_trim (view, 64 * K, 64 * K, 0, NULL), -EIO);
    assert_int_equal (bdev_pread (view, m.bytes, 65 * K, 0, NULL), -EIO);
    assert_int_equal (bdev_pread (view, m.bytes, 64 * K, 0, NULL), 0);
    assert_int_equal (bdev_pread (view, m.bytes, 64 * K, 128 * K, NULL), 0);
    bdev_unref (view);
    bdev_unref (file);
    free (m.bytes);
  }
}

/* --- external data files */

struct data_image {
  struct bdev *file, *data, *backing, *view;
};

static void
open_data (struct data_image *d, size_t cache_size)
{
  struct image_options opts = { .data_file = d->data, .backing = d->backing,
                                .cache_size = cache_size };
  struct err err = { 0 };

  assert_ok (image_open (d->file, &opts, &d->view, &err), &err);
}

/* Real files, since QEMU's image names its data file. */
static void
judge_data (struct data_image *d, const struct model *m, bool raw)
{
  save (d->file, in_dir ("data.qcow2"));
  save (d->data, in_dir ("data.bin"));
  save_model (m, in_dir ("model.raw"));
  assert_int_equal (qemu_check (in_dir ("data.qcow2")), CHECK_CLEAN);
  assert_int_equal (run ("qemu-img compare -f qcow2 -F raw %s %s", in_dir ("data.qcow2"),
                         in_dir ("model.raw")), 0);
  if (raw)
    assert_int_equal (run ("qemu-img compare -f raw -F raw %s %s", in_dir ("data.bin"),
                           in_dir ("model.raw")), 0);
}

static void
one_data_file (unsigned cluster_bits, bool raw, bool backed, bool extended, uint64_t seed)
{
  uint64_t size = cluster_bits == 21 ? (20 << 20) + 512 : (4 << 20) - 1536;
  struct data_image d = { 0 };
  uint64_t before;
  struct model m;

  model_init (&m, size, cluster_bits, seed);
  if (extended)
    m.trim_size = m.cluster_size / 32;
  if (backed)
    d.backing = make_backing (&m, (3 << 20) + 77);
  assert_int_equal (run ("rm -f %s && qemu-img create -f qcow2 -o data_file=%s,data_file_raw=%s,"
                         "extended_l2=%s,cluster_size=%u %s %s %s %llu", in_dir ("data.bin"),
                         in_dir ("data.bin"), raw ? "on" : "off", extended ? "on" : "off",
                         1u << cluster_bits, backed ? "-F raw -b" : "",
                         backed ? in_dir ("backing.raw") : "", in_dir ("data.qcow2"),
                         (unsigned long long) size), 0);
  qemu_writes (&m, in_dir ("data.qcow2"), 12);
  read_model (&m, in_dir ("data.qcow2"));
  d.file = load (in_dir ("data.qcow2"), true);
  d.data = load (in_dir ("data.bin"), true);
  before = bdev_size (d.data);
  open_data (&d, 0);
  check_all (d.view, &m);
  for (unsigned i = 0; i < 300; ++i) {
    do_random (d.view, &m);
    if (i % 97 == 96) {
      bdev_unref (d.view);
      open_data (&d, 1);
    }
  }
  check_all (d.view, &m);
  check_extents (d.view, &m, 0, m.size);
  bdev_unref (d.view);
  /* It ends where the disk does, unless QEMU made it longer. */
  assert_true (bdev_size (d.data) <= MAX (size, before));
  judge_data (&d, &m, raw);
  bdev_unref (d.file);
  bdev_unref (d.data);
  qemu_writes (&m, in_dir ("data.qcow2"), 12);
  read_model (&m, in_dir ("data.qcow2"));
  d.file = load (in_dir ("data.qcow2"), true);
  d.data = load (in_dir ("data.bin"), true);
  open_data (&d, 0);
  check_all (d.view, &m);
  bdev_unref (d.view);
  bdev_unref (d.file);
  bdev_unref (d.data);
  bdev_unref (d.backing);
  free (m.bytes);
}

static void
data_file (void **state)
{
  static const unsigned cluster_bits[] = { 12, 16, 21 };

  require_program ("qemu-img");
  require_program ("qemu-io");
  for (unsigned b = 0; b < 3; ++b) {
    one_data_file (cluster_bits[b], false, false, false, b * 10 + 1);
    one_data_file (cluster_bits[b], false, true, false, b * 10 + 2);
    one_data_file (cluster_bits[b], true, false, false, b * 10 + 3);
    if (cluster_bits[b] >= 14) {
      one_data_file (cluster_bits[b], false, true, true, b * 10 + 4);
      one_data_file (cluster_bits[b], true, false, true, b * 10 + 5);
    }
  }
}

static void
make_data (struct data_image *d)
{
  assert_int_equal (run ("rm -f %s && qemu-img create -f qcow2 -o data_file=%s %s 1M && "
                         "qemu-io -f qcow2 -c 'write -P 1 0 256k' %s", in_dir ("data.bin"),
                         in_dir ("data.bin"), in_dir ("data.qcow2"), in_dir ("data.qcow2")), 0);
  d->file = load (in_dir ("data.qcow2"), true);
  d->data = load (in_dir ("data.bin"), true);
}

static void
data_file_is_needed (void **state)
{
  struct image_options opts = { 0 };
  struct data_image d = { 0 };
  struct err err = { 0 };
  struct bdev *other;

  require_program ("qemu-io");
  make_data (&d);
  assert_int_equal (image_open (d.file, &opts, &d.view, &err), -ENOTSUP);
  assert_non_null (strstr (err.msg, "external data file"));
  err_clear (&err);
  other = new_image (3, 16, 4, 1 << 20, NULL);
  opts.data_file = d.data;
  assert_int_equal (image_open (other, &opts, &d.view, &err), -EINVAL);
  bdev_unref (other);
  bdev_unref (d.file);
  bdev_unref (d.data);
}

static void
data_elsewhere (void **state)
{
  struct data_image d = { 0 };
  struct err err = { 0 };
  uint8_t buf[16];
  uint64_t at;

  require_program ("qemu-io");
  make_data (&d);
  at = first_pair (d.file);     /* L2 table */
  poke64 (d.file, at + 8, ENTRY_COPIED | 0x20000);
  open_data (&d, 0);
  assert_int_equal (bdev_pread (d.view, buf, 16, 0x10000, &err), -EIO);
  assert_non_null (strstr (err.msg, "another place in the external data file"));
  assert_int_equal (bdev_pread (d.view, buf, 16, 0, NULL), 0);
  assert_int_equal (buf[7], 1);
  bdev_unref (d.view);
  bdev_unref (d.file);
  bdev_unref (d.data);
}

/* An L1 entry without COPIED means a table to be copied, but not that anything in
 * the data file is shared: there COPIED says that cluster 0 exists.
 */
static void
data_of_a_shared_table (void **state)
{
  struct data_image d = { 0 };
  struct err err = { 0 };
  struct model m;
  uint64_t l1;

  require_program ("qemu-io");
  model_init (&m, 1 << 20, 16, 1);
  memset (m.bytes, 1, 256 * K);
  make_data (&d);
  l1 = peek64 (d.file, HEADER_OFF_L1_TABLE);
  poke64 (d.file, l1, peek64 (d.file, l1) & ~ENTRY_COPIED);
  open_data (&d, 0);
  check_all (d.view, &m);
  do_write (d.view, &m, 300 * K, 1000, 0);
  assert_ok (bdev_flush (d.view, &err), &err);
  check_all (d.view, &m);
  bdev_unref (d.view);
  assert_true (peek64 (d.file, l1) & ENTRY_COPIED);
  judge_data (&d, &m, false);
  bdev_unref (d.file);
  bdev_unref (d.data);
  free (m.bytes);
}

/* Data is durable before the entry that exposes it, and a failing flush of the
 * data file is a failing flush.
 */
static void
data_before_entries (void **state)
{
  struct bdev *data = NULL, *crash = NULL, *left = NULL;
  struct data_image d = { 0 };
  struct err err = { 0 };
  uint8_t buf[4096], back[4096];
  bool fired = true;

  require_program ("qemu-io");
  make_data (&d);
  memset (buf, 0x33, sizeof buf);
  data = d.data;
  assert_ok (crash_new (data, &crash, &err), &err);
  d.data = crash;
  open_data (&d, 0);
  assert_ok (bdev_pwrite (d.view, buf, sizeof buf, 512 * K, 0, &err), &err);
  assert_ok (bdev_flush (d.view, &err), &err);
  assert_ok (crash_now (crash, 0, &left, &err), &err);
  assert_ok (bdev_pread (left, back, sizeof back, 512 * K, &err), &err);
  assert_memory_equal (buf, back, sizeof buf);
  bdev_unref (left);
  /* In place, with FUA and nothing to commit. */
  memset (buf, 0x44, sizeof buf);
  assert_ok (bdev_pwrite (d.view, buf, sizeof buf, 512 * K, BDEV_FUA, &err), &err);
  assert_ok (crash_now (crash, 0, &left, &err), &err);
  assert_ok (bdev_pread (left, back, sizeof back, 512 * K, &err), &err);
  assert_memory_equal (buf, back, sizeof buf);
  bdev_unref (left);
  bdev_unref (d.view);
  bdev_unref (crash);
  for (unsigned n = 1; fired; ++n) {
    uint64_t entry = first_pair (d.file) + 12 * 8;
    int r;

    poke64 (d.file, entry, 0);
    assert_ok (fault_new (data, n, FAULT_ONCE, &d.data, &err), &err);
    open_data (&d, 0);
    r = bdev_pwrite (d.view, buf, sizeof buf, 768 * K, 0, NULL);
    if (r == 0)
      r = bdev_flush (d.view, NULL);
    fired = fault_fired (d.data);
    assert_true ((r < 0) == fired);
    bdev_unref (d.view);
    bdev_unref (d.data);
    assert_true ((peek64 (d.file, entry) == 0) == fired);
  }
  bdev_unref (data);
  bdev_unref (d.file);
}

/* --- snapshots */

/* Entry i of the snapshot table. */
static struct snapshot
get_snapshot (struct bdev *file, unsigned i)
{
  uint64_t table_off = peek64 (file, HEADER_OFF_SNAPSHOTS), off = 0, need;
  static uint8_t table[4096];
  struct snapshot s;
  struct err err = { 0 };

  assert_ok (bdev_pread_padded (file, table, sizeof table, table_off, &err), &err);
  for (unsigned j = 0; ; ++j) {
    assert_ok (snapshot_decode (table, sizeof table, off, &s, &need, &err), &err);
    if (j == i)
      return s;
    off += s.entry_len;
    free (s.id);
    free (s.name);
  }
}

static struct bdev *
open_snapshot (struct bdev *file, struct bdev *backing, unsigned i, uint64_t size)
{
  struct snapshot s = get_snapshot (file, i);
  struct image_options opts = { .backing = backing, .snapshot = &s };
  struct bdev *view = NULL;
  struct err err = { 0 };

  if (size)
    s.size = size;
  assert_ok (image_open (file, &opts, &view, &err), &err);
  free (s.id);
  free (s.name);
  memset (&s, 0xff, sizeof s);
  return view;
}

/* The view's bytes are those that QEMU read, as far as both go. */
static void
same_bytes (struct bdev *view, const char *path)
{
  uint64_t size = bdev_size (view);
  uint8_t *a = malloc (size), *b = calloc (1, size);
  struct err err = { 0 };
  FILE *fp = fopen (path, "r");
  size_t n;

  assert_ok (bdev_pread (view, a, size, 0, &err), &err);
  assert_non_null (fp);
  n = fread (b, 1, size, fp);
  assert_true (n > 0);
  assert_memory_equal (a, b, n);
  fclose (fp);
  free (a);
  free (b);
}

static void
snapshot_views (const char *options, unsigned cluster_bits, unsigned trim_size, bool resize)
{
  static const uint64_t sizes[] = { 3 << 20, 9 << 20, 5 << 20 };
  struct bdev *file, *views[3], *active;
  struct err err = { 0 };
  struct model m;

  model_init (&m, 3 << 20, cluster_bits, 9);
  m.trim_size = trim_size;
  assert_int_equal (run ("qemu-img create -f qcow2 -o %s %s 3M", options, in_dir ("v.qcow2")), 0);
  for (unsigned i = 0; i < 3; ++i) {
    char name[32];

    if (resize && i)
      assert_int_equal (run ("qemu-img resize %s -f qcow2 %s %llu",
                             sizes[i] < sizes[i - 1] ? "--shrink" : "", in_dir ("v.qcow2"),
                             (unsigned long long) sizes[i]), 0);
    m.size = resize ? sizes[i] : 3 << 20;
    qemu_writes (&m, in_dir ("v.qcow2"), 15);
    /* What QEMU says it holds: the active disk at that moment. */
    snprintf (name, sizeof name, "then%u", i);
    assert_int_equal (run ("qemu-img convert -f qcow2 -O raw %s %s && qemu-img snapshot -c s%u %s",
                           in_dir ("v.qcow2"), in_dir (name), i, in_dir ("v.qcow2")), 0);
  }
  file = load (in_dir ("v.qcow2"), true);
  for (unsigned i = 0; i < 3; ++i) {
    char name[32];

    views[i] = open_snapshot (file, NULL, i, 0);
    assert_int_equal (bdev_size (views[i]), resize ? sizes[i] : 3 << 20);
    assert_false (views[i]->writable);
    assert_int_equal (bdev_pwrite (views[i], "x", 1, 0, 0, NULL), -EROFS);
    snprintf (name, sizeof name, "then%u", i);
    same_bytes (views[i], in_dir (name));
    convert_snapshot (i, in_dir ("v.qcow2"), in_dir ("converted"));
    same_bytes (views[i], in_dir ("converted"));
  }
  /* While the active disk is written to, they stay as they are. */
  active = open_view (file, NULL, 1);
  m.bytes = realloc (m.bytes, m.size + 1);
  assert_ok (bdev_pread (active, m.bytes, m.size, 0, &err), &err);
  for (unsigned i = 0; i < 200; ++i)
    do_random (active, &m);
  bdev_unref (active);
  for (unsigned i = 0; i < 3; ++i) {
    char name[32];

    snprintf (name, sizeof name, "then%u", i);
    same_bytes (views[i], in_dir (name));
    bdev_unref (views[i]);
    views[i] = open_snapshot (file, NULL, i, 0);
    same_bytes (views[i], in_dir (name));
    bdev_unref (views[i]);
  }
  judge (dir, file, &m, CHECK_CLEAN);
  bdev_unref (file);
  free (m.bytes);
}

static void
snapshots_served (void **state)
{
  require_program ("qemu-img");
  require_program ("qemu-io");
  snapshot_views ("compat=0.10,cluster_size=4k", 12, 4096, false);
  snapshot_views ("compat=1.1,cluster_size=512", 9, 512, true);
  snapshot_views ("compat=1.1,cluster_size=64k", 16, 65536, true);
  snapshot_views ("compat=1.1,cluster_size=16k,extended_l2=on", 14, 512, true);
}

/* Its L1 table may be shorter than its size asks for, or longer; what can't be
 * right is refused.
 */
static void
snapshot_sizes (void **state)
{
  struct image_options opts = { 0 };
  struct bdev *file, *view = NULL;
  struct err err = { 0 };
  uint8_t buf[512], zeros[512] = { 0 };
  struct snapshot s;

  require_program ("qemu-io");
  assert_int_equal (run ("qemu-img create -f qcow2 -o cluster_size=4k %s 4M && "
                         "qemu-io -f qcow2 -c 'write -P 9 0 4M' %s && qemu-img snapshot -c s0 %s",
                         in_dir ("v.qcow2"), in_dir ("v.qcow2"), in_dir ("v.qcow2")), 0);
  file = load (in_dir ("v.qcow2"), true);
  view = open_snapshot (file, NULL, 0, 8 << 20);
  assert_int_equal (bdev_size (view), 8 << 20);
  assert_ok (bdev_pread (view, buf, 512, (8 << 20) - 512, &err), &err);
  assert_memory_equal (buf, zeros, 512);
  assert_ok (bdev_pread (view, buf, 512, (4 << 20) - 512, &err), &err);
  assert_int_equal (buf[0], 9);
  bdev_unref (view);
  view = open_snapshot (file, NULL, 0, 512);
  assert_int_equal (bdev_size (view), 512);
  bdev_unref (view);
  s = get_snapshot (file, 0);
  opts.snapshot = &s;
  s.size = UINT64_MAX;
  assert_int_equal (image_open (file, &opts, &view, &err), -EINVAL);
  err_clear (&err);
  s.size = 4096;
  s.l1_host_off += 512;
  assert_int_equal (image_open (file, &opts, &view, &err), -EINVAL);
  err_clear (&err);
  s.l1_host_off = UINT64_C (1) << 62;
  assert_int_equal (image_open (file, &opts, &view, &err), -EINVAL);
  err_clear (&err);
  s.l1_host_off = 0;
  s.l1_entries = UINT32_MAX;
  assert_int_equal (image_open (file, &opts, &view, &err), -EINVAL);
  free (s.id);
  free (s.name);
  bdev_unref (file);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (only_what_is_touched),
    cmocka_unit_test (bad_bitmaps),
    cmocka_unit_test (extended_l2),
    cmocka_unit_test (extended_l2_compressed),
    cmocka_unit_test (snapshots_served),
    cmocka_unit_test (snapshot_sizes),
    cmocka_unit_test (data_file_is_needed),
    cmocka_unit_test (data_elsewhere),
    cmocka_unit_test (data_of_a_shared_table),
    cmocka_unit_test (data_before_entries),
    cmocka_unit_test (data_file),
  };

  return cmocka_run_group_tests (tests, make_dir, remove_dir);
}
