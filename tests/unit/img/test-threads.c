/* Many threads on one view, with caches as small as they get, so that slices
 * come and go, commits overlap with writes, and clusters are freed and reused
 * under the eyes of readers.
 *
 * On ranges of their own, each thread has an exact model.  On ranges that all
 * share, what is read must be something that somebody wrote there: every sector
 * says where it belongs, and a cluster of another place showing through (reused
 * too early, mapped twice) would say so.
 */
#include <pthread.h>
#include <sched.h>

#include "img-test.h"

#define THREADS 8
#define SECTOR 512

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

/* --- a device that takes its time: what was looked up may be gone by the time
 * that it is read, and what was read old by the time that it arrives
 */

struct slow {
  struct bdev d;
  struct bdev *under;
};

static int
slow_pread (struct bdev *d, void *buf, size_t len, uint64_t off, struct err *err)
{
  int r;

  for (unsigned i = 0; i < 4; ++i)
    sched_yield ();
  r = bdev_pread (((struct slow *) d)->under, buf, len, off, err);
  for (unsigned i = 0; i < 4; ++i)
    sched_yield ();
  return r;
}

static int
slow_pwrite (struct bdev *d, const void *buf, size_t len, uint64_t off, unsigned flags,
             struct err *err)
{
  sched_yield ();
  return bdev_pwrite (((struct slow *) d)->under, buf, len, off, flags, err);
}

static int
slow_trim (struct bdev *d, uint64_t off, uint64_t len, unsigned flags, struct err *err)
{
  return bdev_trim (((struct slow *) d)->under, off, len, flags, err);
}

static int
slow_resize (struct bdev *d, uint64_t size, uint64_t ahead, struct err *err)
{
  int r = bdev_grow (((struct slow *) d)->under, size, ahead, err);

  if (r == 0)
    atomic_store (&d->size, size);
  return r;
}

static void
slow_close (struct bdev *d)
{
  bdev_unref (((struct slow *) d)->under);
  free (d);
}

static const struct bdev_ops slow_ops = {
  .kind = "slow", .native_fua = true, .pread = slow_pread, .pwrite = slow_pwrite,
  .trim = slow_trim, .resize = slow_resize, .close = slow_close,
};

static struct bdev *
slow_new (struct bdev *under)
{
  struct slow *s = calloc (1, sizeof *s);

  assert_int_equal (bdev_init (&s->d, &slow_ops, under->name, bdev_size (under), true, true,
                               NULL), 0);
  s->under = bdev_ref (under);
  return &s->d;
}

/* --- threads */

struct worker {
  pthread_t thread;
  struct bdev *view;
  unsigned ops;
  uint64_t rng;
  uint64_t off, len;            /* of its own */
  uint8_t *model;               /* of the whole disk; own range used */
  uint64_t shared_off, shared_len;
  unsigned cluster_size;
  int r;
  struct err err;
};

/* --- ranges of their own */

static int
own_op (struct worker *w)
{
  uint64_t off = test_random (&w->rng) % w->len, max = w->len - off;
  uint64_t len = 1 + test_random (&w->rng) % MIN (max, 3 * w->cluster_size);
  unsigned what = test_random (&w->rng) % 12;
  unsigned flags = test_random (&w->rng) % 8 == 0 ? BDEV_FUA : 0;
  uint8_t *buf = malloc (len);
  int r = 0;

  off += w->off;
  if (what < 5) {
    memset (buf, 1 + test_random (&w->rng) % 255, len);
    r = bdev_pwrite (w->view, buf, len, off, flags, &w->err);
    memcpy (w->model + off, buf, len);
  }
  else if (what < 7) {
    flags |= test_random (&w->rng) % 2 ? BDEV_MAY_TRIM : 0;
    r = bdev_zero (w->view, off, len, flags, &w->err);
    memset (w->model + off, 0, len);
  }
  else if (what < 8) {
    /* The borders of own ranges are cluster borders. */
    uint64_t first = ROUND_UP (off, w->cluster_size);
    uint64_t last = ROUND_DOWN (off + len, w->cluster_size);

    r = bdev_trim (w->view, off, len, flags, &w->err);
    if (first < last)
      memset (w->model + first, 0, last - first);
  }
  else if (what < 11) {
    r = bdev_pread (w->view, buf, len, off, &w->err);
    if (r == 0 && memcmp (buf, w->model + off, len) != 0)
      r = err_set (&w->err, EBADMSG, "wrong bytes in %llu+%llu", (unsigned long long) off,
                   (unsigned long long) len);
  }
  else if (test_random (&w->rng) % 4 == 0)
    r = bdev_flush (w->view, &w->err);
  free (buf);
  return r;
}

/* --- a range of all */

/* Sector n holds n and a stamp, over and over; or zeros. */
static void
stamp (uint8_t *buf, uint64_t sector, uint64_t nr, uint64_t value)
{
  for (uint64_t i = 0; i < nr; ++i)
    for (unsigned j = 0; j < SECTOR; j += 16) {
      store_be64 (buf + i * SECTOR + j, sector + i + 1);
      store_be64 (buf + i * SECTOR + j + 8, value);
    }
}

/* Writes race with reads, so stamps may be mixed; places may not. */
static int
check_stamp (struct worker *w, const uint8_t *buf, uint64_t sector, uint64_t nr)
{
  for (uint64_t i = 0; i < nr; ++i)
    for (unsigned j = 0; j < SECTOR; j += 16) {
      uint64_t place = load_be64 (buf + i * SECTOR + j);

      if (place != 0 && place != sector + i + 1)
        return err_set (&w->err, EBADMSG, "sector %llu shows bytes of sector %llu",
                        (unsigned long long) (sector + i), (unsigned long long) place - 1);
    }
  return 0;
}

static int
shared_op (struct worker *w)
{
  uint64_t nr_sectors = w->shared_len / SECTOR, first = test_random (&w->rng) % nr_sectors;
  uint64_t nr = 1 + test_random (&w->rng) % MIN (nr_sectors - first,
                                                 3 * w->cluster_size / SECTOR);
  uint64_t sector = w->shared_off / SECTOR + first;
  unsigned what = test_random (&w->rng) % 10;
  uint8_t *buf = malloc (nr * SECTOR);
  int r;

  if (what < 4) {
    stamp (buf, sector, nr, test_random (&w->rng));
    r = bdev_pwrite (w->view, buf, nr * SECTOR, sector * SECTOR, 0, &w->err);
  }
  else if (what < 6)
    r = bdev_zero (w->view, sector * SECTOR, nr * SECTOR, what == 4 ? BDEV_MAY_TRIM : 0, &w->err);
  else if (what < 7)
    r = bdev_trim (w->view, sector * SECTOR, nr * SECTOR, 0, &w->err);
  else {
    r = bdev_pread (w->view, buf, nr * SECTOR, sector * SECTOR, &w->err);
    if (r == 0)
      r = check_stamp (w, buf, sector, nr);
  }
  free (buf);
  return r;
}

static void *
work (void *opaque)
{
  struct worker *w = opaque;

  for (unsigned i = 0; i < w->ops && w->r == 0; ++i)
    w->r = w->shared_len && i % 2 ? shared_op (w) : own_op (w);
  return NULL;
}

static void
run_threads (struct bdev *file, struct bdev *backing, struct model *m, unsigned ops, bool shared)
{
  struct bdev *slow = slow_new (file), *view = open_view (slow, backing, 1);
  struct worker w[THREADS] = { 0 };
  uint64_t part = ROUND_DOWN (m->size / (THREADS + 1), m->cluster_size);
  uint8_t *buf;

  for (unsigned i = 0; i < THREADS; ++i) {
    w[i] = (struct worker) {
      .view = view, .ops = ops, .rng = i, .off = i * part, .len = part, .model = m->bytes,
      .shared_off = THREADS * part, .shared_len = shared ? part : 0,
      .cluster_size = m->cluster_size,
    };
    assert_int_equal (pthread_create (&w[i].thread, NULL, work, &w[i]), 0);
  }
  for (unsigned i = 0; i < THREADS; ++i)
    pthread_join (w[i].thread, NULL);
  for (unsigned i = 0; i < THREADS; ++i)
    assert_ok (w[i].r, &w[i].err);
  /* What the race on the shared range came to is taken as it is; QEMU must see the same. */
  if (shared) {
    buf = malloc (part);
    assert_int_equal (bdev_pread (view, buf, part, THREADS * part, NULL), 0);
    assert_int_equal (check_stamp (&w[0], buf, THREADS * part / SECTOR, part / SECTOR), 0);
    memcpy (m->bytes + THREADS * part, buf, part);
    free (buf);
  }
  check_all (view, m);
  bdev_unref (view);
  bdev_unref (slow);
  judge (dir, file, m, CHECK_CLEAN);
}

static unsigned
scaled (unsigned ops)
{
  const char *s = getenv ("TEST_SCALE");

  return s ? ops * atoi (s) : ops;
}

static void
disjoint (void **state)
{
  static const struct { unsigned bits, order; uint64_t size; } c[] = {
    { 9, 6, 3 << 20 }, { 12, 4, 24 << 20 }, { 16, 4, 60 << 20 },
  };

  require_program ("qemu-img");
  for (unsigned i = 0; i < 3; ++i) {
    struct model m;
    struct bdev *file = new_image (3, c[i].bits, c[i].order, c[i].size, NULL);

    model_init (&m, c[i].size, c[i].bits, 0);
    run_threads (file, NULL, &m, scaled (1500), false);
    bdev_unref (file);
    free (m.bytes);
  }
}

static void
overlapping (void **state)
{
  static const struct { unsigned bits, order; uint64_t size; } c[] = {
    { 9, 6, 1 << 20 }, { 12, 4, 6 << 20 }, { 16, 4, 20 << 20 },
  };

  require_program ("qemu-img");
  for (unsigned i = 0; i < 3; ++i) {
    struct model m;
    struct bdev *file = new_image (3, c[i].bits, c[i].order, c[i].size, NULL);

    model_init (&m, c[i].size, c[i].bits, 0);
    run_threads (file, NULL, &m, scaled (2500), true);
    bdev_unref (file);
    free (m.bytes);
  }
}

/* Everything is shared with a snapshot at first: L2 tables and clusters are
 * copied by all threads at once.
 */
static void
snapshot_copies (void **state)
{
  char path[512];
  struct model m;
  struct bdev *file, *view;
  uint64_t size = 12 << 20;

  require_program ("qemu-img");
  require_program ("qemu-io");
  snprintf (path, sizeof path, "%s/snap.qcow2", dir);
  assert_int_equal (run ("qemu-img create -f qcow2 -o cluster_size=4k %s %llu && "
                         "qemu-io -f qcow2 -c 'write -P 7 0 %llu' %s && "
                         "qemu-img snapshot -c s %s && qemu-img convert -f qcow2 "
                         "-l snapshot.name=s -O raw %s %s/before", path,
                         (unsigned long long) size, (unsigned long long) size, path, path, path,
                         dir), 0);
  file = load (path, true);
  model_init (&m, size, 12, 0);
  view = open_view (file, NULL, 0);
  assert_int_equal (bdev_pread (view, m.bytes, size, 0, NULL), 0);
  bdev_unref (view);
  run_threads (file, NULL, &m, scaled (1500), false);
  save (file, path);
  assert_int_equal (run ("qemu-img convert -f qcow2 -l snapshot.name=s -O raw %s %s/after && "
                         "cmp %s/before %s/after", path, dir, dir, dir), 0);
  bdev_unref (file);
  free (m.bytes);
}

/* The borders between the threads are borders of subclusters, not of clusters:
 * neighbours change the same entries, each its bits.
 */
static void
subclusters (void **state)
{
  static const struct { unsigned bits; uint64_t size; bool shared; } c[] = {
    { 14, (1 << 20) + 41 * 512, false }, { 14, 1 << 20, true }, { 16, 8 << 20, true },
  };
  char path[512];

  require_program ("qemu-img");
  snprintf (path, sizeof path, "%s/ext.qcow2", dir);
  for (unsigned i = 0; i < 3; ++i) {
    struct model m;
    struct bdev *file;

    assert_int_equal (run ("qemu-img create -f qcow2 -o extended_l2=on,cluster_size=%u %s %llu",
                           1u << c[i].bits, path, (unsigned long long) c[i].size), 0);
    file = load (path, true);
    model_init (&m, c[i].size, c[i].bits - 5, 0);
    run_threads (file, NULL, &m, scaled (2500), c[i].shared);
    bdev_unref (file);
    free (m.bytes);
  }
}

/* One thread changes a cluster, the other looks, or writes beside it. */
struct pair_race {
  struct bdev *view;
  atomic_bool stop;
  int r;
  struct err err;
};

#define SUB 2048                /* bytes in a subcluster, of clusters of 64 KiB */

static struct bdev *
open_extended (void)
{
  char path[512];
  struct bdev *file, *view;

  snprintf (path, sizeof path, "%s/pairs.qcow2", dir);
  assert_int_equal (run ("qemu-img create -f qcow2 -o extended_l2=on %s 1M", path), 0);
  file = load (path, true);
  view = open_view (file, NULL, 0);
  bdev_unref (file);
  return view;
}

/* The whole cluster comes and goes. */
static void *
come_and_go (void *opaque)
{
  struct pair_race *p = opaque;
  uint8_t buf[SUB];

  memset (buf, 0x11, sizeof buf);
  while (p->r == 0 && !atomic_load (&p->stop)) {
    p->r = bdev_pwrite (p->view, buf, sizeof buf, 0, 0, &p->err);
    if (p->r == 0)
      p->r = bdev_trim (p->view, 0, 32 * SUB, 0, &p->err);
  }
  return NULL;
}

/* An entry of one moment with the bitmap of another can't be right, and says so. */
static void
entry_and_bitmap (void **state)
{
  struct pair_race p = { 0 };
  struct err err = { 0 };
  uint8_t buf[SUB];
  pthread_t thread;

  require_program ("qemu-img");
  p.view = open_extended ();
  assert_int_equal (pthread_create (&thread, NULL, come_and_go, &p), 0);
  for (unsigned i = 0; i < scaled (3000000); ++i) {
    assert_ok (bdev_pread (p.view, buf, SUB, 0, &err), &err);
    assert_true (buf[0] == 0 || buf[0] == 0x11);
  }
  atomic_store (&p.stop, true);
  pthread_join (thread, NULL);
  assert_ok (p.r, &p.err);
  bdev_unref (p.view);
}

/* The second subcluster's first sector, together with the one before it, which
 * has to be allocated again each time.
 */
static void *
fill_before (void *opaque)
{
  struct pair_race *p = opaque;
  uint8_t buf[SUB + SECTOR];

  memset (buf, 0x22, sizeof buf);
  while (p->r == 0 && !atomic_load (&p->stop)) {
    p->r = bdev_trim (p->view, 0, SUB, 0, &p->err);
    if (p->r == 0)
      p->r = bdev_pwrite (p->view, buf, sizeof buf, 0, 0, &p->err);
  }
  return NULL;
}

/* Nobody else writes to the second sector: what is written there stays. */
static void
beside_a_fill (void **state)
{
  struct pair_race p = { 0 };
  struct err err = { 0 };
  uint8_t buf[SECTOR], back[SECTOR];
  pthread_t thread;

  require_program ("qemu-img");
  p.view = open_extended ();
  memset (buf, 1, sizeof buf);
  assert_ok (bdev_pwrite (p.view, buf, SECTOR, SUB + SECTOR, 0, &err), &err);
  assert_int_equal (pthread_create (&thread, NULL, fill_before, &p), 0);
  for (unsigned i = 0; i < scaled (100000); ++i) {
    memset (buf, i, sizeof buf);
    assert_ok (bdev_pwrite (p.view, buf, SECTOR, SUB + SECTOR, 0, &err), &err);
    assert_ok (bdev_pread (p.view, back, SECTOR, SUB + SECTOR, &err), &err);
    assert_memory_equal (buf, back, SECTOR);
  }
  atomic_store (&p.stop, true);
  pthread_join (thread, NULL);
  assert_ok (p.r, &p.err);
  bdev_unref (p.view);
}

/* --- one reader, and the cluster under it is freed and written again */

struct gate {
  struct slow s;                /* first */
  pthread_mutex_t lock;
  pthread_cond_t cond;
  bool armed;                   /* hold up the next large read */
  bool reading, reused;
};

static int
gate_pread (struct bdev *d, void *buf, size_t len, uint64_t off, struct err *err)
{
  struct gate *g = (struct gate *) d;

  pthread_mutex_lock (&g->lock);
  if (g->armed && len == 65536) {
    struct timespec until;

    g->armed = false;
    g->reading = true;
    pthread_cond_broadcast (&g->cond);
    /* Until it is too late; where nothing is wrong that never comes. */
    clock_gettime (CLOCK_REALTIME, &until);
    until.tv_nsec += 200000000;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    while (!g->reused && pthread_cond_timedwait (&g->cond, &g->lock, &until) == 0)
      ;
  }
  pthread_mutex_unlock (&g->lock);
  return bdev_pread (g->s.under, buf, len, off, err);
}

static int
gate_pwrite (struct bdev *d, const void *buf, size_t len, uint64_t off, unsigned flags,
             struct err *err)
{
  struct gate *g = (struct gate *) d;
  int r = bdev_pwrite (g->s.under, buf, len, off, flags, err);

  pthread_mutex_lock (&g->lock);
  g->reused |= *(const uint8_t *) buf == 0xbb;
  pthread_cond_broadcast (&g->cond);
  pthread_mutex_unlock (&g->lock);
  return r;
}

static const struct bdev_ops gate_ops = {
  .kind = "gate", .native_fua = true, .pread = gate_pread, .pwrite = gate_pwrite,
  .resize = slow_resize, .close = slow_close,
};

static void *
read_one (void *opaque)
{
  static uint8_t buf[65536];

  assert_int_equal (bdev_pread (opaque, buf, sizeof buf, 0, NULL), 0);
  return buf;
}

static void
readers_keep_their_clusters (void **state)
{
  struct bdev *file = new_image (3, 16, 4, 1 << 20, NULL), *view;
  struct gate g = { .lock = PTHREAD_MUTEX_INITIALIZER, .cond = PTHREAD_COND_INITIALIZER };
  struct gate *on_heap = malloc (sizeof g);
  struct err err = { 0 };
  pthread_t reader;
  uint8_t buf[65536];
  void *seen;

  *on_heap = g;
  assert_int_equal (bdev_init (&on_heap->s.d, &gate_ops, "gate", bdev_size (file), true, true,
                               NULL), 0);
  on_heap->s.under = bdev_ref (file);
  view = open_view (&on_heap->s.d, NULL, 0);
  memset (buf, 0xaa, sizeof buf);
  assert_ok (bdev_pwrite (view, buf, sizeof buf, 0, BDEV_FUA, &err), &err);
  on_heap->armed = true;
  assert_int_equal (pthread_create (&reader, NULL, read_one, view), 0);
  pthread_mutex_lock (&on_heap->lock);
  while (!on_heap->reading)
    pthread_cond_wait (&on_heap->cond, &on_heap->lock);
  pthread_mutex_unlock (&on_heap->lock);
  /* It has looked the cluster up.  Free it, durably, and ask for another one. */
  assert_ok (bdev_trim (view, 0, sizeof buf, 0, &err), &err);
  assert_ok (bdev_flush (view, &err), &err);
  memset (buf, 0xbb, sizeof buf);
  assert_ok (bdev_pwrite (view, buf, sizeof buf, 1 << 19, 0, &err), &err);
  pthread_join (reader, &seen);
  assert_int_equal (((uint8_t *) seen)[12345], 0xaa);
  bdev_unref (view);
  bdev_unref (&on_heap->s.d);
  bdev_unref (file);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (readers_keep_their_clusters),
    cmocka_unit_test (disjoint),
    cmocka_unit_test (overlapping),
    cmocka_unit_test (snapshot_copies),
    cmocka_unit_test (subclusters),
    cmocka_unit_test (entry_and_bitmap),
    cmocka_unit_test (beside_a_fill),
  };

  return cmocka_run_group_tests (tests, make_dir, remove_dir);
}
