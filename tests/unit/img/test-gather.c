/* Reading many ranges of a view at once, from near and from afar, gives what reading them one
 * by one gives, errors included; a callback may do what it likes; and how many journeys it takes.
 */
#include <pthread.h>

#include "img-test.h"
#include "journeys.h"

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

/* --- a device with bad sectors */

#define MAX_BAD 64

struct sick {
  struct bdev d;
  struct bdev *under;
  unsigned nr_bad;
  uint64_t bad[MAX_BAD];        /* bytes that cannot be read */
};

static int
sick_pread (struct bdev *d, void *buf, size_t len, uint64_t off, struct err *err)
{
  struct sick *s = (struct sick *) d;

  for (unsigned i = 0; i < s->nr_bad; ++i)
    if (s->bad[i] >= off && s->bad[i] - off < len)
      return err_set (err, EIO, "%s: bad byte %llu", d->name, (unsigned long long) s->bad[i]);
  return bdev_pread (s->under, buf, len, off, err);
}

static int
sick_pwrite (struct bdev *d, const void *buf, size_t len, uint64_t off, unsigned flags,
             struct err *err)
{
  return bdev_pwrite (((struct sick *) d)->under, buf, len, off, flags, err);
}

static int
sick_resize (struct bdev *d, uint64_t size, uint64_t ahead, struct err *err)
{
  int r = bdev_grow (((struct sick *) d)->under, size, ahead, err);

  if (r == 0)
    atomic_store (&d->size, size);
  return r;
}

static int
sick_cache (struct bdev *d, uint64_t off, uint64_t len, struct err *err)
{
  return 0;
}

static void
sick_close (struct bdev *d)
{
  bdev_unref (((struct sick *) d)->under);
  free (d);
}

/* Takes over the reference. */
static struct bdev *
sick_new (struct bdev *under, bool far)
{
  static const struct bdev_ops ops = {
    .kind = "sick", .native_fua = true, .pread = sick_pread, .pwrite = sick_pwrite,
    .resize = sick_resize, .cache = sick_cache, .close = sick_close,
  };
  struct sick *s = calloc (1, sizeof *s);
  struct err err = { 0 };

  assert_ok (bdev_init (&s->d, &ops, under->name, bdev_size (under), true, true, &err), &err);
  s->under = under;
  s->d.far = far;
  return &s->d;
}

/* n bad bytes behind from, the same for both devices. */
static void
make_sick (struct bdev *a, struct bdev *b, unsigned n, uint64_t from, uint64_t *rng)
{
  struct sick *sa = (struct sick *) a, *sb = (struct sick *) b;

  sa->nr_bad = sb->nr_bad = bdev_size (a) > from ? n : 0;
  for (unsigned i = 0; i < sa->nr_bad; ++i)
    sa->bad[i] = sb->bad[i] = from + test_random (rng) % (bdev_size (a) - from);
}

/* --- images */

struct shape {
  const char *name, *options;
  const char *how;              /* makes $d/disk.qcow2, perhaps over $d/base.raw, of $o */
  uint64_t base_size;           /* 0: it has none */
  bool data_file;
};

#define DISK_SIZE (6 << 20)

/* The disk has all kinds of clusters.  Not a whole number of clusters, if those are large. */
#define PIECES "qemu-io -f qcow2 -c 'write -P 1 100k 300k' -c 'write -P 2 1M 70k' " \
               "-c 'write -P 3 3M 1000k' -c 'write -z 3100k 200k' -c 'discard 3500k 64k' " \
               "-c 'write -P 4 2M 4k' -c 'write -P 5 1900k 8k' -c 'write -P 6 5M 1M' disk.qcow2"
#define CREATE "qemu-img create -f qcow2 -o $o disk.qcow2 6M && " PIECES
#define OVER   "qemu-img create -f qcow2 -b base.raw -F raw -o $o disk.qcow2 6M && " PIECES
#define PACKED "qemu-img convert -c -f raw -O qcow2 -o $o noise.raw disk.qcow2 && " PIECES

static const struct shape shapes[] = {
  { "plain", "cluster_size=64k", CREATE, 0, false },
  { "version 2", "compat=0.10,cluster_size=4k", "qemu-img create -f qcow2 -o $o disk.qcow2 6M && "
    "qemu-io -f qcow2 -c 'write -P 1 1M 1234k' -c 'write -P 2 5M 1M' disk.qcow2", 0, false },
  { "small clusters", "cluster_size=512", CREATE, 0, false },
  { "short base", "cluster_size=4k", OVER, (3 << 20) + 1234, false },
  { "long base", "cluster_size=64k", OVER, 9 << 20, false },
  { "subclusters", "extended_l2=on,cluster_size=64k", OVER, 4 << 20, false },
  { "compressed", "cluster_size=64k", PACKED, 0, false },
  { "compressed, small", "cluster_size=4k,compression_type=zstd", PACKED, 0, false },
  { "data file", "cluster_size=64k,data_file=disk.data", CREATE, 0, true },
};
#define NR_SHAPES (sizeof shapes / sizeof shapes[0])

/* One image, from near and from afar. */
struct pair {
  struct bdev *file[2], *base[2], *data[2], *view[2];   /* [1]: far */
};

static void
pair_open (struct pair *p, const struct shape *s)
{
  char path[3][512];

  for (unsigned i = 0; i < 3; ++i)
    snprintf (path[i], sizeof path[i], "%s/%s", dir,
              i == 0 ? "disk.qcow2" : i == 1 ? "base.raw" : "disk.data");
  assert_int_equal (run ("set -e; cd %s; o=%s; rm -f disk.*; "
                         "head -c %llu /dev/urandom >base.raw; "
                         "{ head -c 3M /dev/zero; head -c 1M /dev/urandom; yes | head -c 2M; } "
                         ">noise.raw; %s", dir, s->options,
                         (unsigned long long) MAX (s->base_size, 1), s->how), 0);
  for (unsigned far = 0; far < 2; ++far) {
    struct image_options opts = { 0 };
    struct err err = { 0 };

    p->file[far] = sick_new (load (path[0], true), far);
    p->base[far] = s->base_size ? sick_new (load (path[1], true), far) : NULL;
    p->data[far] = s->data_file ? sick_new (load (path[2], true), far) : NULL;
    opts.backing = p->base[far];
    opts.data_file = p->data[far];
    opts.cache_size = 1;        /* so that tables are read again and again */
    assert_ok (image_open (p->file[far], &opts, &p->view[far], &err), &err);
    assert_int_equal (p->view[far]->far, far);
  }
}

static void
pair_close (struct pair *p)
{
  for (unsigned far = 0; far < 2; ++far) {
    bdev_unref (p->view[far]);
    bdev_unref (p->file[far]);
    bdev_unref (p->base[far]);
    bdev_unref (p->data[far]);
  }
}

/* --- the same as one by one */

#define MAX_RANGES 300

struct expected {
  const struct bdev_range *ranges;
  uint8_t *bytes[MAX_RANGES];
  int r[MAX_RANGES];
  atomic_uint calls[MAX_RANGES];
};

static int
compare (void *opaque, size_t i, const void *buf, int r, const struct err *why)
{
  struct expected *e = opaque;

  /* cmocka's asserts are for the test's own thread. */
  if (atomic_fetch_add (&e->calls[i], 1) != 0 || r != e->r[i] ||
      (r < 0 && (!why || why->code != -r || !why->msg[0])) ||
      (r == 0 && memcmp (buf, e->bytes[i], e->ranges[i].len) != 0)) {
    fprintf (stderr, "range %zu: %d instead of %d, or other bytes\n", i, r, e->r[i]);
    return -EBADMSG;
  }
  return 0;
}

static size_t
random_ranges (struct bdev_range *ranges, uint64_t size, uint64_t *rng)
{
  static const unsigned most[] = { 1, 5000, 70000, 400000 };
  size_t nr = 1 + test_random (rng) % MAX_RANGES;

  for (size_t i = 0; i < nr; ++i) {
    ranges[i].off = test_random (rng) % (size + 100000);
    ranges[i].len = test_random (rng) % (most[test_random (rng) % 4] + 1);
    if (i && test_random (rng) % 3 == 0)
      ranges[i].off = ranges[i - 1].off + ranges[i - 1].len;
    if (test_random (rng) % 50 == 0)
      ranges[i].off = UINT64_MAX - test_random (rng) % 1000000 - 1000000;
  }
  return nr;
}

static unsigned
compare_round (struct pair *p, uint64_t *rng)
{
  static struct bdev_range ranges[MAX_RANGES];
  static struct expected e;
  size_t nr = random_ranges (ranges, bdev_size (p->view[0]), rng);
  struct err err = { 0 };
  unsigned bad = 0;

  e.ranges = ranges;
  for (size_t i = 0; i < nr; ++i) {
    e.bytes[i] = malloc (ranges[i].len + 1);
    e.r[i] = bdev_pread_padded (p->view[0], e.bytes[i], ranges[i].len, ranges[i].off, NULL);
    bad += e.r[i] < 0;
  }
  for (unsigned far = 0; far < 2; ++far) {
    for (size_t i = 0; i < nr; ++i)
      atomic_store (&e.calls[i], 0);
    assert_ok (bdev_read_many (p->view[far], ranges, nr, compare, &e, &err), &err);
    for (size_t i = 0; i < nr; ++i)
      assert_int_equal (atomic_load (&e.calls[i]), 1);
  }
  for (size_t i = 0; i < nr; ++i) {             /* and pread from afar */
    uint8_t *buf = malloc (ranges[i].len + 1);
    int r = bdev_pread_padded (p->view[1], buf, ranges[i].len, ranges[i].off, &err);

    assert_int_equal (r, e.r[i]);
    assert_true (r < 0 ? err.code == -r && err.msg[0]
                       : memcmp (buf, e.bytes[i], ranges[i].len) == 0);
    err_clear (&err);
    free (buf);
    free (e.bytes[i]);
  }
  return bad;
}

static void
test_random_ranges (void **state)
{
  require_program ("qemu-io");
  for (size_t i = 0; i < NR_SHAPES; ++i) {
    uint64_t rng = i;
    struct pair p;
    unsigned bad = 0;

    pair_open (&p, &shapes[i]);
    for (unsigned round = 0; round < 20; ++round)
      assert_int_equal (compare_round (&p, &rng), 0);
    for (unsigned round = 0; round < 20; ++round) {
      /* The header was read already, all else may go. */
      make_sick (p.file[0], p.file[1], 8, 65536, &rng);
      if (p.base[0])
        make_sick (p.base[0], p.base[1], 4, 0, &rng);
      if (p.data[0])
        make_sick (p.data[0], p.data[1], 4, 0, &rng);
      bad += compare_round (&p, &rng);
    }
    if (bad == 0)
      fail_msg ("%s: nothing failed", shapes[i].name);
    pair_close (&p);
  }
}

static int
count (void *opaque, size_t i, const void *buf, int r, const struct err *why)
{
  atomic_fetch_add ((atomic_uint *) opaque, 1);
  return r;
}

static int
stop_at_once (void *opaque, size_t i, const void *buf, int r, const struct err *why)
{
  atomic_fetch_add ((atomic_uint *) opaque, 1);
  return -ENOSPC;
}

/* More than one batch, and a range that is larger than one. */
static void
test_batches (void **state)
{
  enum { NR = 9000 };
  static struct bdev_range ranges[NR];
  static atomic_uint calls;
  struct err err = { 0 };
  struct pair p;
  int r;

  require_program ("qemu-io");
  pair_open (&p, &shapes[3]);
  for (size_t i = 0; i < NR; ++i)
    ranges[i] = (struct bdev_range) { i * 700 % DISK_SIZE, i == 4500 ? 20 << 20 : 3000 };
  for (unsigned far = 0; far < 2; ++far) {
    atomic_store (&calls, 0);
    assert_ok (bdev_read_many (p.view[far], ranges, NR, count, &calls, &err), &err);
    assert_int_equal (atomic_load (&calls), NR);
    atomic_store (&calls, 0);
    r = bdev_read_many (p.view[far], ranges, NR, stop_at_once, &calls, &err);
    assert_int_equal (r, -ENOSPC);
    assert_true (atomic_load (&calls) < 10);
    err_clear (&err);
  }
  pair_close (&p);
}

/* --- callbacks that write, and others who do */

struct writing {
  struct bdev *view;
  atomic_uint done;
};

/* What waits for all sections that were entered before: it must not wait for ours. */
static int
write_and_flush (void *opaque, size_t i, const void *buf, int r, const struct err *why)
{
  struct writing *w = opaque;
  uint64_t off = i * 40000 % (DISK_SIZE - 4096);
  uint8_t bytes[4096];

  memset (bytes, i, sizeof bytes);
  if (r == 0)
    r = i % 3 ? bdev_pwrite (w->view, bytes, sizeof bytes, off, 0, NULL)
              : bdev_trim (w->view, off, sizeof bytes, 0, NULL);
  if (r == 0 && i % 8 == 0)
    r = bdev_flush (w->view, NULL);
  atomic_fetch_add (&w->done, 1);
  return r;
}

static void
test_callbacks_write (void **state)
{
  struct bdev_range ranges[200];
  struct pair p;

  require_program ("qemu-io");
  for (size_t i = 0; i < 200; ++i)
    ranges[i] = (struct bdev_range) { i * 30000, 50000 };
  pair_open (&p, &shapes[3]);
  alarm (300);                  /* a deadlock must not go unnoticed */
  for (unsigned far = 0; far < 2; ++far) {
    struct writing w = { .view = p.view[far] };
    struct err err = { 0 };

    assert_ok (bdev_read_many (w.view, ranges, 200, write_and_flush, &w, &err), &err);
    assert_int_equal (atomic_load (&w.done), 200);
  }
  alarm (0);
  pair_close (&p);
}

#define STABLE (3 << 20)        /* nobody writes behind it */

struct busy {
  pthread_t thread;
  struct bdev *view;
  uint64_t rng;
  unsigned rounds;
  const uint8_t *expected;      /* of the disk behind STABLE */
  const struct bdev_range *ranges;
  int r;
};

static void *
busy_writer (void *opaque)
{
  struct busy *b = opaque;
  static const uint8_t bytes[100000] = { 1, 2, 3 };

  for (unsigned i = 0; i < b->rounds && b->r == 0; ++i) {
    uint64_t len = 1 + test_random (&b->rng) % sizeof bytes;
    uint64_t off = test_random (&b->rng) % (STABLE - len);

    switch (test_random (&b->rng) % 6) {
    case 0: b->r = bdev_flush (b->view, NULL); break;
    case 1: b->r = bdev_trim (b->view, off, len, 0, NULL); break;
    case 2: b->r = bdev_zero (b->view, off, len, BDEV_MAY_TRIM, NULL); break;
    default: b->r = bdev_pwrite (b->view, bytes, len, off, 0, NULL); break;
    }
  }
  return NULL;
}

static int
see_stable (void *opaque, size_t i, const void *buf, int r, const struct err *why)
{
  const struct busy *b = opaque;
  const struct bdev_range *range = &b->ranges[i];

  if (r == 0 && range->off >= STABLE &&
      memcmp (buf, b->expected + (range->off - STABLE), range->len) != 0)
    r = -EBADMSG;
  return r;
}

static void *
busy_reader (void *opaque)
{
  struct busy *b = opaque;
  struct bdev_range ranges[100];

  b->ranges = ranges;
  for (unsigned i = 0; i < b->rounds / 10 && b->r == 0; ++i) {
    for (size_t k = 0; k < 100; ++k) {
      ranges[k].len = test_random (&b->rng) % 100000;
      ranges[k].off = test_random (&b->rng) % (DISK_SIZE - ranges[k].len);
    }
    b->r = bdev_read_many (b->view, ranges, 100, see_stable, b, NULL);
  }
  return NULL;
}

static void
test_others_write (void **state)
{
  uint8_t *expected = malloc (DISK_SIZE - STABLE);
  struct busy b[4] = { 0 };
  struct err err = { 0 };
  struct pair p;

  require_program ("qemu-io");
  pair_open (&p, &shapes[3]);
  alarm (300);
  for (unsigned far = 0; far < 2; ++far) {
    assert_ok (bdev_pread (p.view[far], expected, DISK_SIZE - STABLE, STABLE, &err), &err);
    for (unsigned i = 0; i < 4; ++i) {
      b[i] = (struct busy) { .view = p.view[far], .rng = i, .rounds = 300, .expected = expected };
      assert_int_equal (pthread_create (&b[i].thread, NULL, i < 2 ? busy_writer : busy_reader,
                                        &b[i]), 0);
    }
    for (unsigned i = 0; i < 4; ++i) {
      pthread_join (b[i].thread, NULL);
      assert_int_equal (b[i].r, 0);
    }
  }
  alarm (0);
  free (expected);
  pair_close (&p);
}

/* A write over a bad sector saves it: only what lies around the write is read. */
static void
test_write_over_bad (void **state)
{
  uint8_t bytes[512], buf[512];
  struct err err = { 0 };
  struct pair p;

  require_program ("qemu-io");
  pair_open (&p, &shapes[4]);           /* 64 KiB clusters, a base behind all of it */
  memset (bytes, 7, sizeof bytes);
  for (unsigned far = 0; far < 2; ++far) {
    struct sick *base = (struct sick *) p.base[far];

    base->nr_bad = 1;
    base->bad[0] = (4 << 20) + 70000;
    assert_int_equal (bdev_pread (p.view[far], buf, 512, (4 << 20) + 69888, NULL), -EIO);
    assert_ok (bdev_pwrite (p.view[far], bytes, 512, (4 << 20) + 69888, 0, &err), &err);
    assert_ok (bdev_pread (p.view[far], buf, 512, (4 << 20) + 69888, &err), &err);
    assert_memory_equal (buf, bytes, 512);
  }
  pair_close (&p);
}

/* --- journeys */

static int
see_length (void *opaque, uint64_t off, uint64_t len, unsigned kind)
{
  uint64_t *next = opaque;

  *next = off + len;
  return 0;
}

/* The disk of an image that is far away itself, in 512-byte clusters: a table for 32 KiB. */
static void
test_journeys (void **state)
{
  struct bdev *file, *far, *view;
  static uint8_t buf[1 << 20];
  uint64_t next = 0;
  struct err err = { 0 };

  require_program ("qemu-io");
  assert_int_equal (run ("set -e; cd %s; rm -f disk.*; "
                         "qemu-img create -f qcow2 -o cluster_size=512 disk.qcow2 6M; "
                         "for i in 5 3 1 0 2 4; do for k in 700 100 500; do "
                         "qemu-io -f qcow2 -c \"write -P $i ${i}${k}k 77k\" disk.qcow2; done; done",
                         dir), 0);
  snprintf ((char *) buf, sizeof buf, "%s/disk.qcow2", dir);
  file = load ((char *) buf, true);
  assert_ok (journeys_new (file, &far, &err), &err);
  view = open_view (far, NULL, 0);
  journeys_reset (far);
  for (uint64_t off = 0; off < DISK_SIZE; off += sizeof buf)
    assert_ok (bdev_pread (view, buf, sizeof buf, off, &err), &err);
  print_message ("6 reads of many pieces: %llu journeys\n",
                 (unsigned long long) journeys_made (far));
  assert_true (journeys_made (far) <= 18);      /* tables, then pieces */
  bdev_unref (view);
  view = open_view (far, NULL, 0);
  journeys_reset (far);
  assert_ok (bdev_extents (view, 0, DISK_SIZE, see_length, &next, &err), &err);
  assert_int_equal (next, DISK_SIZE);
  print_message ("extents: %llu journeys\n", (unsigned long long) journeys_made (far));
  assert_true (journeys_made (far) <= 6);
  bdev_unref (view);
  bdev_unref (far);
  bdev_unref (file);
}

/* A table of 64 KiB is read in slices, but comes as a whole. */
static void
test_slices (void **state)
{
  struct bdev *file = new_image (3, 16, 4, UINT64_C (512) << 20, NULL), *far, *view;
  struct err err = { 0 };
  uint8_t b = 1;

  view = open_view (file, NULL, 0);
  assert_ok (bdev_pwrite (view, &b, 1, 0, 0, &err), &err);
  bdev_unref (view);
  assert_ok (journeys_new (file, &far, &err), &err);
  view = open_view (far, NULL, 0);
  journeys_reset (far);
  for (uint64_t i = 0; i < 16; ++i)
    assert_ok (bdev_pread (view, &b, 1, (i << 25) + 70000, &err), &err);
  assert_int_equal (journeys_made (far), 1);
  bdev_unref (view);
  bdev_unref (far);
  bdev_unref (file);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_random_ranges),
    cmocka_unit_test (test_batches),
    cmocka_unit_test (test_callbacks_write),
    cmocka_unit_test (test_others_write),
    cmocka_unit_test (test_write_over_bad),
    cmocka_unit_test (test_journeys),
    cmocka_unit_test (test_slices),
  };

  return cmocka_run_group_tests (tests, make_dir, remove_dir);
}
