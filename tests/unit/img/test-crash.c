/* At every instant, the file as a crash or a failing disk would leave it has at
 * worst leaks, and everything that was flushed is in it.
 *
 * A scripted workload (writes into new clusters and old, copy-on-write of what
 * snapshots share, zero, trim, growing tables, a growing disk, FUA, flushes)
 * runs
 *
 * - on a device whose Nth operation fails, once or for ever, for every N;
 * - on a device whose power is cut at every flush, with what was not flushed
 *   lost, there, reordered or torn, as ten seeds choose.
 *
 * While a flush is under way, the guest goes on: it reads all of its disk, and
 * writes to new clusters.
 *
 * Every sector that the workload writes says where it belongs and which write
 * it came from, so that what is found can be compared with what may be there:
 * the last thing flushed, or anything written since.
 */
#include "img-test.h"

#define SECTOR 512
#define SEEDS 10

static char *dir;
static unsigned states_checked, dirty_states;

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

/* --- what may be on the disk */

/* A version is the number of the write; 0 = zeros. */
struct version {
  uint32_t number;
  bool certain;                 /* the write succeeded */
};
DEFINE_VEC (version_vec, struct version);

struct history {
  uint64_t nr_sectors;
  struct version_vec *sectors;  /* oldest first: what each may hold */
  uint32_t next;
  uint64_t size_flushed;        /* bytes: the disk is at least that large */
};

static void
history_init (struct history *h, uint64_t size, uint64_t capacity)
{
  h->nr_sectors = capacity / SECTOR;
  h->sectors = calloc (h->nr_sectors, sizeof h->sectors[0]);
  for (uint64_t i = 0; i < h->nr_sectors; ++i)
    version_vec_push (&h->sectors[i], (struct version) { 0, true });
  h->next = 1;
  h->size_flushed = size;
}

static void
history_copy (struct history *to, const struct history *from)
{
  *to = *from;
  to->sectors = calloc (to->nr_sectors, sizeof to->sectors[0]);
  for (uint64_t i = 0; i < to->nr_sectors; ++i)
    for (size_t j = 0; j < from->sectors[i].len; ++j)
      version_vec_push (&to->sectors[i], from->sectors[i].ptr[j]);
}

static void
history_reset (struct history *h)
{
  for (uint64_t i = 0; i < h->nr_sectors; ++i)
    vec_reset (&h->sectors[i]);
  free (h->sectors);
}

/* Before the request: it may happen from now on. */
static void
history_try (struct history *h, uint64_t first, uint64_t n, uint32_t number)
{
  for (uint64_t i = first; i < first + n; ++i)
    version_vec_push (&h->sectors[i], (struct version) { number, false });
}

/* It succeeded. */
static void
history_done (struct history *h, uint64_t first, uint64_t n)
{
  for (uint64_t i = first; i < first + n; ++i)
    h->sectors[i].ptr[h->sectors[i].len - 1].certain = true;
}

/* What was certain is now on the disk; what it replaced is not. */
static void
history_durable (struct history *h, uint64_t first, uint64_t n)
{
  for (uint64_t i = first; i < first + n; ++i) {
    struct version_vec *v = &h->sectors[i];
    size_t last = 0;

    for (size_t j = 0; j < v->len; ++j)
      if (v->ptr[j].certain)
        last = j;
    memmove (v->ptr, v->ptr + last, (v->len - last) * sizeof v->ptr[0]);
    v->len -= last;
  }
}

static void
fill_sector (uint8_t *buf, uint64_t sector, uint32_t number)
{
  memset (buf, 0, SECTOR);
  for (unsigned j = 0; number && j < SECTOR; j += 16) {
    store_be64 (buf + j, sector + 1);
    store_be64 (buf + j + 8, number);
  }
}

/* now: the guest itself is looking, who knows nothing of durability. */
static void
check_sectors (const struct history *h, const uint8_t *bytes, uint64_t nr_sectors, bool now,
               const char *what)
{
  uint8_t expected[SECTOR];

  for (uint64_t i = 0; i < nr_sectors; ++i) {
    const struct version_vec *v = &h->sectors[i];
    bool found = false, newer = true;

    for (size_t j = v->len; j > 0 && !found && newer; --j) {
      newer = !now || !v->ptr[j - 1].certain;
      fill_sector (expected, i, v->ptr[j - 1].number);
      found = memcmp (bytes + i * SECTOR, expected, SECTOR) == 0;
    }
    if (!found)
      fail_msg ("%s: sector %llu holds sector %lld of write %llu; may hold write %u%s", what,
                (unsigned long long) i, (long long) load_be64 (bytes + i * SECTOR) - 1,
                (unsigned long long) load_be64 (bytes + i * SECTOR + 8), v->ptr[0].number,
                v->len > 1 ? " and later ones" : "");
  }
}

/* --- the judgement of one state */

struct fixture {
  const char *name;
  struct bdev *file;            /* the image before the workload */
  struct bdev *backing;
  struct history history;
  unsigned nr_snapshots;        /* s0, s1, ...; their bytes are in the folder */
  unsigned cluster_size;
  unsigned ops;
  uint64_t burst_first, burst;  /* sectors written at once, to begin with */
  bool grows;
  bool lazy;                    /* lazy refcounts */
  bool writes_in_flush;         /* no table is about to grow, nor a cache to fill up */
};

static void
check_snapshots (const struct fixture *f, const char *path)
{
  for (unsigned i = 0; i < f->nr_snapshots; ++i)
    assert_int_equal (run ("qemu-img convert -f qcow2 -O raw -l snapshot.name=s%u %s %s/now && "
                           "cmp %s/now %s/s%u", i, path, dir, dir, dir, i), 0);
}

static bool
is_dirty (struct bdev *file)
{
  uint8_t raw[8];

  assert_int_equal (bdev_pread (file, raw, 8, HEADER_OFF_INCOMPATIBLE, NULL), 0);
  return load_be64 (raw) & INCOMPAT_DIRTY;
}

/* The bytes.  what: for messages. */
static void
check_healed (const struct fixture *f, const struct history *h, struct bdev *state,
              const char *what)
{
  struct image_options opts = { .backing = f->backing, .read_only = true };
  struct bdev *view = NULL;
  struct err err = { 0 };
  char path[512];
  uint8_t *bytes;
  uint64_t size;

  snprintf (path, sizeof path, "%s/state.qcow2", dir);
  assert_ok (image_open (state, &opts, &view, &err), &err);
  size = bdev_size (view);
  assert_true (size >= h->size_flushed && size <= h->nr_sectors * SECTOR);
  bytes = malloc (size);
  assert_ok (bdev_pread (view, bytes, size, 0, &err), &err);
  check_sectors (h, bytes, size / SECTOR, false, what);
  bdev_unref (view);
  /* Now and then, ask QEMU for the bytes as well. */
  if (++states_checked % 25 == 0) {
    FILE *fp;
    char raw[512];

    check_snapshots (f, path);
    snprintf (raw, sizeof raw, "%s/now.raw", dir);
    assert_int_equal (run ("qemu-img convert -f qcow2 -O raw %s %s", path, raw), 0);
    fp = fopen (raw, "r");
    assert_non_null (fp);
    assert_int_equal (fread (bytes, 1, size, fp), size);
    fclose (fp);
    check_sectors (h, bytes, size / SECTOR, false, what);
  }
  free (bytes);
}

static void
check_state (const struct fixture *f, const struct history *h, struct bdev *state,
             const char *what)
{
  char path[512];
  int r;

  snprintf (path, sizeof path, "%s/state.qcow2", dir);
  save (state, path);
  if (f->lazy && is_dirty (state)) {
    /* Refcounts may be anything; counted anew they are right, and nothing is lost. */
    ++dirty_states;
    run ("qemu-img check -f qcow2 -r all %s", path);
    r = qemu_check (path);
    if (r != CHECK_CLEAN)
      fail_msg ("%s: after its repair qemu-img check says %d", what, r);
    state = load (path, true);
    check_healed (f, h, state, what);
    bdev_unref (state);
    return;
  }
  r = qemu_check (path);
  if (r != CHECK_CLEAN && r != CHECK_LEAKS)
    fail_msg ("%s: qemu-img check says %d", what, r);
  check_healed (f, h, state, what);
}

/* --- the workload */

struct workload {
  const struct fixture *f;
  struct bdev *view;
  struct history *h;
  uint64_t rng;
  bool flushing;
};

/* What was certain when the flush began is durable: drop what is older. */
static void
flushed (struct workload *w, uint64_t size, const struct history *before)
{
  for (uint64_t i = 0; i < w->h->nr_sectors; ++i) {
    size_t newer = w->h->sectors[i].len - before->sectors[i].len;

    w->h->sectors[i].len -= newer;
    history_durable (w->h, i, 1);
    memmove (w->h->sectors[i].ptr + w->h->sectors[i].len,
             w->h->sectors[i].ptr + before->sectors[i].len,
             newer * sizeof w->h->sectors[i].ptr[0]);
    w->h->sectors[i].len += newer;
  }
  w->h->size_flushed = size;
}

static void
one_write (struct workload *w, uint64_t first, uint64_t n, unsigned flags)
{
  uint8_t *buf = malloc (n * SECTOR);
  uint32_t number = w->h->next++;

  for (uint64_t i = 0; i < n; ++i)
    fill_sector (buf + i * SECTOR, first + i, number);
  history_try (w->h, first, n, number);
  if (bdev_pwrite (w->view, buf, n * SECTOR, first * SECTOR, flags, NULL) == 0) {
    history_done (w->h, first, n);
    if (flags & BDEV_FUA)
      history_durable (w->h, first, n);
  }
  free (buf);
}

/* Zero or trim, of whole clusters so that a trim is certain. */
static void
one_discard (struct workload *w, uint64_t first, uint64_t n, unsigned what)
{
  uint64_t per = w->f->cluster_size / SECTOR, end;
  int r;

  end = MIN (ROUND_UP (first + n, per), bdev_size (w->view) / SECTOR);
  first = ROUND_DOWN (first, per);
  n = end - first;
  history_try (w->h, first, n, 0);
  if (what == 0)
    r = bdev_trim (w->view, first * SECTOR, n * SECTOR, 0, NULL);
  else
    r = bdev_zero (w->view, first * SECTOR, n * SECTOR, what == 1 ? BDEV_MAY_TRIM : 0, NULL);
  if (r == 0)
    history_done (w->h, first, n);
}

static void
one_flush (struct workload *w)
{
  uint64_t size = bdev_size (w->view);
  struct history before;

  /* What is written during the flush is not in it. */
  history_copy (&before, w->h);
  w->flushing = true;
  if (bdev_flush (w->view, NULL) == 0)
    flushed (w, size, &before);
  w->flushing = false;
  history_reset (&before);
}

static void
one_op (struct workload *w)
{
  uint64_t nr = bdev_size (w->view) / SECTOR, per = w->f->cluster_size / SECTOR;
  uint64_t first = test_random (&w->rng) % nr, n, size;
  unsigned what = test_random (&w->rng) % 20;

  n = 1 + test_random (&w->rng) % MIN (nr - first, MAX (per * 4, 24));
  if (what < 9)
    one_write (w, first, n, 0);
  else if (what < 10) {
    /* Into clusters that the disk does not know of yet. */
    one_write (w, first, n, 0);
    one_write (w, first, n, BDEV_FUA);
  }
  else if (what < 15)
    one_discard (w, first, n, what % 3);
  else if (what < 18 || !w->f->grows)
    one_flush (w);
  else {
    /* Alone between two flushes: the size is all there is to write. */
    one_flush (w);
    size = MIN (bdev_size (w->view) + n * SECTOR, w->h->nr_sectors * SECTOR);
    bdev_resize (w->view, size, NULL);
    one_flush (w);
  }
}

/* Called in the middle of a flush: nobody may notice that there is one. */
static void
meanwhile (struct workload *w)
{
  uint64_t size = bdev_size (w->view);
  uint8_t *bytes = malloc (size);

  w->flushing = false;
  if (w->f->writes_in_flush)
    for (unsigned i = 0; i < 3; ++i)
      one_write (w, test_random (&w->rng) % (size / SECTOR - 8), 8, 0);
  assert_int_equal (bdev_pread (w->view, bytes, size, 0, NULL), 0);
  check_sectors (w->h, bytes, size / SECTOR, true, "during a flush");
  free (bytes);
  w->flushing = true;
}

/* All of it on file, which may fail from the first operation on. */
static void
workload_run (const struct fixture *f, struct bdev *file, struct history *h,
              struct workload *w, uint64_t seed)
{
  *w = (struct workload) { .f = f, .h = h, .rng = seed };
  w->view = open_view (file, f->backing, 1);
  image_set_growable (w->view, f->grows);
  if (f->burst)
    one_write (w, f->burst_first, f->burst, 0);
  for (unsigned i = 0; i < f->ops; ++i)
    one_op (w);
  bdev_unref (w->view);
}

/* --- fixtures */

static void
prefill (struct fixture *f, uint64_t nr_sectors)
{
  struct workload w = { .f = f, .h = &f->history, .rng = 77 };

  w.view = open_view (f->file, f->backing, 0);
  for (uint64_t i = 0; i < nr_sectors; i += 100)
    one_write (&w, i, MIN (100, nr_sectors - i), 0);
  one_flush (&w);
  bdev_unref (w.view);
}

static void
take_snapshot (struct fixture *f)
{
  char path[512];

  snprintf (path, sizeof path, "%s/fixture.qcow2", dir);
  save (f->file, path);
  assert_int_equal (run ("qemu-img snapshot -c s%u %s && qemu-img convert -f qcow2 -O raw "
                         "-l snapshot.name=s%u %s %s/s%u", f->nr_snapshots, path,
                         f->nr_snapshots, path, dir, f->nr_snapshots), 0);
  ++f->nr_snapshots;
  bdev_unref (f->file);
  f->file = load (path, true);
}

/* The first write needs several refcount blocks and then a larger table. */
static struct fixture
fixture_growth (void)
{
  struct fixture f = { .name = "growth", .cluster_size = 512, .ops = 60,
                       .burst_first = 3700, .burst = 300 };

  f.file = new_image (3, 9, 6, 2500 << 10, NULL);
  history_init (&f.history, 2500 << 10, 2500 << 10);
  prefill (&f, 3700);
  return f;
}

static struct fixture
fixture_snapshots (void)
{
  struct fixture f = { .name = "snapshots", .cluster_size = 4096, .ops = 50,
                       .writes_in_flush = true };

  f.file = new_image (3, 12, 4, 5 << 20, NULL);
  history_init (&f.history, 5 << 20, 5 << 20);
  prefill (&f, 4500);
  take_snapshot (&f);
  prefill (&f, 1000);
  take_snapshot (&f);
  return f;
}

static struct fixture
fixture_v2 (void)
{
  struct fixture f = { .name = "v2", .cluster_size = 4096, .ops = 60,
                       .writes_in_flush = true };

  f.file = new_image (2, 12, 4, 4 << 20, NULL);
  history_init (&f.history, 4 << 20, 4 << 20);
  return f;
}

/* An overlay: a disk that grows, over a backing file. */
static struct fixture
fixture_overlay (void)
{
  struct fixture f = { .name = "overlay", .cluster_size = 16384, .ops = 60, .grows = true,
                       .writes_in_flush = true };
  struct image_params p = { .version = 3, .cluster_bits = 14, .refcount_order = 4,
                            .size = 1 << 20, .max_size = 3 << 20, .backing_format = "raw" };
  struct err err = { 0 };
  uint8_t sector[SECTOR];
  char path[512];

  history_init (&f.history, 1 << 20, 3 << 20);
  assert_ok (mem_new ("backing", 1 << 20, false, &f.backing, &err), &err);
  for (uint64_t i = 0; i < (1 << 20) / SECTOR; ++i) {
    f.history.sectors[i].ptr[0].number = i % 300 < 200;
    fill_sector (sector, i, f.history.sectors[i].ptr[0].number);
    assert_ok (bdev_pwrite (f.backing, sector, SECTOR, i * SECTOR, 0, &err), &err);
  }
  f.history.next = 2;
  snprintf (path, sizeof path, "%s/backing.raw", dir);
  save (f.backing, path);
  p.backing_name = path;
  assert_ok (mem_new ("overlay", 0, true, &f.file, &err), &err);
  assert_ok (image_create (f.file, &p, &err), &err);
  return f;
}

/* Blocks of 64 refcounts, of which few fit into the cache: most wait, some are
 * written.
 */
static struct fixture
fixture_lazy (void)
{
  struct fixture f = { .name = "lazy", .cluster_size = 512, .ops = 30, .lazy = true };
  uint8_t raw[8];

  f.file = new_image (3, 9, 6, 600 << 10, NULL);
  history_init (&f.history, 600 << 10, 600 << 10);
  prefill (&f, 300);
  take_snapshot (&f);
  store_be64 (raw, COMPAT_LAZY_REFCOUNTS);
  assert_int_equal (bdev_pwrite (f.file, raw, 8, HEADER_OFF_COMPATIBLE, 0, NULL), 0);
  return f;
}

/* Subclusters of a sector: most requests change a bitmap and no more, or copy
 * some of what a snapshot shares.
 */
static struct fixture
fixture_extended (void)
{
  struct fixture f = { .name = "extended", .cluster_size = 2048, .ops = 60,
                       .writes_in_flush = true };
  char path[512];

  snprintf (path, sizeof path, "%s/extended.qcow2", dir);
  assert_int_equal (run ("qemu-img create -f qcow2 -o extended_l2=on,cluster_size=16k %s 1M",
                         path), 0);
  f.file = load (path, true);
  history_init (&f.history, 1 << 20, 1 << 20);
  prefill (&f, 900);
  take_snapshot (&f);
  prefill (&f, 200);
  return f;
}

/* Many streams in one host cluster, which the workload pulls apart. */
static struct fixture
fixture_compressed (void)
{
  struct fixture f = { .name = "compressed", .cluster_size = 4096, .ops = 35,
                       .writes_in_flush = true };
  uint64_t nr = (1 << 20) / SECTOR;
  uint8_t sector[SECTOR];
  char raw[512], path[512];
  FILE *fp;

  history_init (&f.history, 1 << 20, 1 << 20);
  snprintf (raw, sizeof raw, "%s/source.raw", dir);
  snprintf (path, sizeof path, "%s/compressed.qcow2", dir);
  fp = fopen (raw, "w");
  assert_non_null (fp);
  for (uint64_t i = 0; i < nr; ++i) {
    f.history.sectors[i].ptr[0].number = i % 100 < 90;
    fill_sector (sector, i, f.history.sectors[i].ptr[0].number);
    assert_int_equal (fwrite (sector, SECTOR, 1, fp), 1);
  }
  fclose (fp);
  f.history.next = 2;
  assert_int_equal (run ("qemu-img convert -c -f raw -O qcow2 -o cluster_size=4096 %s %s", raw,
                         path), 0);
  f.file = load (path, true);
  take_snapshot (&f);
  return f;
}

static void
fixture_reset (struct fixture *f)
{
  bdev_unref (f->file);
  bdev_unref (f->backing);
  history_reset (&f->history);
}

/* --- the sweeps */

static void
sweep_faults (struct fixture f, enum fault_kind kind)
{
  bool fired = true;
  unsigned n;

  for (n = 1; fired; ++n) {
    struct bdev *under = NULL, *file = NULL;
    struct err err = { 0 };
    struct history h;
    struct workload w;
    char what[100];

    snprintf (what, sizeof what, "%s: operation %u failing %s", f.name, n,
              kind == FAULT_ONCE ? "once" : "for ever");
    history_copy (&h, &f.history);
    assert_ok (mem_copy_of (f.file, &under, &err), &err);
    assert_ok (fault_new (under, n, kind, &file, &err), &err);
    workload_run (&f, file, &h, &w, 1);
    fired = fault_fired (file);
    bdev_unref (file);
    check_state (&f, &h, under, what);
    bdev_unref (under);
    history_reset (&h);
  }
  assert_true (n > 50);         /* it did something */
  fixture_reset (&f);
}

struct cut {
  const struct fixture *f;
  struct history *h;
  struct bdev *crash;
  struct workload w;
  unsigned flushes;
};

static void
cut_power (void *opaque)
{
  struct cut *c = opaque;

  ++c->flushes;
  if (c->w.flushing)
    meanwhile (&c->w);
  for (unsigned seed = 0; seed < SEEDS; ++seed) {
    struct bdev *state = NULL;
    struct err err = { 0 };
    char what[100];

    snprintf (what, sizeof what, "%s: power cut at flush %u, seed %u", c->f->name, c->flushes,
              seed);
    assert_ok (crash_now (c->crash, seed, &state, &err), &err);
    check_state (c->f, c->h, state, what);
    bdev_unref (state);
  }
}

static void
sweep_cuts (struct fixture f, uint64_t seed)
{
  struct cut c = { .f = &f };
  struct bdev *under = NULL;
  struct err err = { 0 };
  struct history h;

  history_copy (&h, &f.history);
  c.h = &h;
  assert_ok (mem_copy_of (f.file, &under, &err), &err);
  assert_ok (crash_new (under, &c.crash, &err), &err);
  crash_set_hook (c.crash, cut_power, &c);
  workload_run (&f, c.crash, &h, &c.w, seed);
  crash_set_hook (c.crash, NULL, NULL);
  assert_true (c.flushes > 15);
  bdev_unref (c.crash);
  check_state (&f, &h, under, "in the end");
  bdev_unref (under);
  history_reset (&h);
  fixture_reset (&f);
}

#define TESTS(name, seeds)                                      \
  static void                                                   \
  name##_fails_once (void **state)                              \
  {                                                             \
    require_program ("qemu-img");                               \
    sweep_faults (fixture_##name (), FAULT_ONCE);               \
  }                                                             \
  static void                                                   \
  name##_fails_for_ever (void **state)                          \
  {                                                             \
    require_program ("qemu-img");                               \
    sweep_faults (fixture_##name (), FAULT_STICKY);             \
  }                                                             \
  static void                                                   \
  name##_loses_power (void **state)                             \
  {                                                             \
    require_program ("qemu-img");                               \
    for (unsigned seed = 1; seed <= seeds; ++seed)              \
      sweep_cuts (fixture_##name (), seed);                     \
  }
TESTS (growth, 2)
TESTS (snapshots, 2)
TESTS (v2, 2)
TESTS (overlay, 2)
TESTS (compressed, 1)
TESTS (lazy, 1)
TESTS (extended, 1)

/* The bit says what it must, when it must. */
static void
dirty_bit (void **state)
{
  struct fixture f = fixture_lazy ();
  struct image_options opts = { 0 };
  struct bdev *view, *again = NULL, *copy = NULL;
  struct err err = { 0 };
  uint8_t buf[512] = { 1 };

  require_program ("qemu-img");
  view = open_view (f.file, NULL, 0);
  assert_ok (bdev_pread (view, buf, sizeof buf, 0, &err), &err);
  assert_ok (bdev_flush (view, &err), &err);
  assert_false (is_dirty (f.file));
  assert_ok (bdev_pwrite (view, buf, sizeof buf, 400 << 10, 0, &err), &err);
  assert_ok (bdev_flush (view, &err), &err);
  assert_true (is_dirty (f.file));
  /* Killed here, nobody writes to it before it is healed. */
  assert_ok (mem_copy_of (f.file, &copy, &err), &err);
  assert_int_equal (image_open (copy, &opts, &again, NULL), -EROFS);
  bdev_unref (copy);
  bdev_unref (view);
  assert_false (is_dirty (f.file));
  assert_true (dirty_states > 20);
  fixture_reset (&f);
}

/* --- what a failure looks like from above */

static void
broken_is_read_only (void **state)
{
  struct bdev *under = new_image (3, 12, 4, 1 << 20, NULL), *file = NULL, *view;
  struct err err = { 0 };
  uint8_t buf[4096];

  /* Two resizes and the data; then the refcounts, and the flush that is to fail. */
  assert_ok (fault_new (under, 5, FAULT_ONCE, &file, &err), &err);
  view = open_view (file, NULL, 0);
  memset (buf, 0x11, sizeof buf);
  assert_ok (bdev_pwrite (view, buf, sizeof buf, 0, 0, &err), &err);
  while (!fault_fired (file)) {
    int r = bdev_flush (view, &err);

    assert_true (r == 0 || fault_fired (file));
  }
  assert_true (err.code == EIO);
  err_clear (&err);
  assert_int_equal (bdev_pwrite (view, buf, sizeof buf, 8192, 0, &err), -EROFS);
  assert_non_null (strstr (err.msg, "injected fault"));
  assert_int_equal (bdev_flush (view, NULL), -EROFS);
  assert_int_equal (bdev_trim (view, 0, 4096, 0, NULL), -EROFS);
  memset (buf, 0, sizeof buf);
  assert_int_equal (bdev_pread (view, buf, sizeof buf, 0, NULL), 0);
  assert_int_equal (buf[17], 0x11);
  bdev_unref (view);
  bdev_unref (file);
  bdev_unref (under);
}

/* A creation that is cut short is no image; one that is done is whole. */
static void
creation_is_all_or_nothing (void **state)
{
  struct image_params p = { .version = 3, .cluster_bits = 9, .refcount_order = 6,
                            .size = 10 << 20 };
  bool fired = true;
  char path[512];

  require_program ("qemu-img");
  snprintf (path, sizeof path, "%s/created.qcow2", dir);
  for (unsigned n = 1; fired; ++n) {
    struct bdev *under = NULL, *file = NULL, *crash = NULL;
    struct err err = { 0 };
    int r;

    assert_ok (mem_new ("created", 0, true, &under, &err), &err);
    assert_ok (crash_new (under, &crash, &err), &err);
    assert_ok (fault_new (crash, n, FAULT_STICKY, &file, &err), &err);
    r = image_create (file, &p, &err);
    fired = fault_fired (file);
    assert_true ((r < 0) == fired);
    for (unsigned seed = 0; seed < SEEDS; ++seed) {
      struct bdev *left = NULL;
      uint8_t magic[4] = { 0 };

      assert_int_equal (crash_now (crash, seed, &left, NULL), 0);
      bdev_pread_padded (left, magic, 4, 0, NULL);
      if (load_be32 (magic) == HEADER_MAGIC) {
        save (left, path);
        assert_int_equal (qemu_check (path), CHECK_CLEAN);
      }
      else
        assert_true (r < 0);
      bdev_unref (left);
    }
    bdev_unref (file);
    bdev_unref (crash);
    bdev_unref (under);
  }
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (growth_fails_once),
    cmocka_unit_test (growth_fails_for_ever),
    cmocka_unit_test (growth_loses_power),
    cmocka_unit_test (snapshots_fails_once),
    cmocka_unit_test (snapshots_fails_for_ever),
    cmocka_unit_test (snapshots_loses_power),
    cmocka_unit_test (v2_fails_once),
    cmocka_unit_test (v2_fails_for_ever),
    cmocka_unit_test (v2_loses_power),
    cmocka_unit_test (overlay_fails_once),
    cmocka_unit_test (overlay_fails_for_ever),
    cmocka_unit_test (overlay_loses_power),
    cmocka_unit_test (compressed_fails_once),
    cmocka_unit_test (compressed_fails_for_ever),
    cmocka_unit_test (compressed_loses_power),
    cmocka_unit_test (lazy_fails_once),
    cmocka_unit_test (lazy_fails_for_ever),
    cmocka_unit_test (lazy_loses_power),
    cmocka_unit_test (extended_fails_once),
    cmocka_unit_test (extended_fails_for_ever),
    cmocka_unit_test (extended_loses_power),
    cmocka_unit_test (dirty_bit),
    cmocka_unit_test (broken_is_read_only),
    cmocka_unit_test (creation_is_all_or_nothing),
  };

  return cmocka_run_group_tests (tests, make_dir, remove_dir);
}
