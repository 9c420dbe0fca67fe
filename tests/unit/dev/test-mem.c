/* Sparse RAM: like an array, at any offset, for any number of threads, and with
 * no more memory than what was written.
 */
#include <pthread.h>
#include <sched.h>

#include "unit/unit.h"

#include "base/num.h"
#include "dev/mem.h"

#define PAGE 65536

static struct bdev *
new_mem (uint64_t size)
{
  struct err err = { 0 };
  struct bdev *d = NULL;

  assert_ok (mem_new ("ram", size, true, &d, &err), &err);
  return d;
}

struct extent_check {
  uint64_t next;                /* where the next one must begin */
  uint64_t data;                /* bytes that are not holes */
  unsigned nr, last_kind;
};

static int
check_extent (void *opaque, uint64_t off, uint64_t len, unsigned kind)
{
  struct extent_check *c = opaque;

  assert_true (off == c->next && len > 0);
  assert_true (kind == 0 || kind == (BDEV_HOLE | BDEV_ZERO));
  if (c->nr > 0)
    assert_int_not_equal (kind, c->last_kind);  /* neighbours are joined */
  c->next += len;
  c->data += kind ? 0 : len;
  c->last_kind = kind;
  c->nr++;
  return 0;
}

/* Random changes to a window that crosses a boundary of the tree, against an array. */
static void
like_an_array (void **state)
{
  static const uint64_t bases[] = {
    0, (UINT64_C (1) << 62) - 5 * PAGE - 3, (UINT64_C (1) << 24) - 3 * PAGE,
  };
  enum { WINDOW = 10 * PAGE };
  uint8_t *model = malloc (WINDOW), *buf = malloc (WINDOW);

  for (size_t b = 0; b < sizeof bases / sizeof bases[0]; ++b) {
    struct bdev *d = new_mem (UINT64_C (1) << 63);
    struct extent_check ec = { .next = bases[b] };
    uint64_t rng = b;

    memset (model, 0, WINDOW);
    for (unsigned n = 0; n < 1500; ++n) {
      uint64_t at = test_random (&rng) % WINDOW;
      uint64_t len = test_random (&rng) % (n % 3 ? 5000 : 3 * PAGE);

      len = MIN (len, WINDOW - at);
      if (n % 2) {
        memset (buf, n & 0xff, len);
        memcpy (model + at, buf, len);
        assert_int_equal (bdev_pwrite (d, buf, len, bases[b] + at, BDEV_FUA, NULL), 0);
      }
      else {
        memset (model + at, 0, len);
        assert_int_equal (n % 4 ? bdev_zero (d, bases[b] + at, len, BDEV_FAST, NULL)
                                : bdev_trim (d, bases[b] + at, len, 0, NULL), 0);
      }
      at = test_random (&rng) % WINDOW;
      len = test_random (&rng) % (WINDOW - at);
      assert_int_equal (bdev_pread (d, buf, len, bases[b] + at, NULL), 0);
      assert_memory_equal (buf, model + at, len);
    }
    assert_int_equal (bdev_extents (d, bases[b], WINDOW, check_extent, &ec, NULL), 0);
    assert_true (ec.next == bases[b] + WINDOW);
    assert_true (ec.data <= mem_used (d));
    bdev_unref (d);
  }
  free (model);
  free (buf);
}

static void
size_costs_nothing (void **state)
{
  uint64_t size = UINT64_C (1) << 63;
  struct bdev *d = new_mem (size);
  struct extent_check ec = { 0 };
  uint8_t b = 1;
  uint8_t *big = malloc (8 << 20);

  assert_int_equal (mem_used (d), 0);
  assert_int_equal (bdev_pwrite (d, &b, 1, size - 1, 0, NULL), 0);
  assert_int_equal (bdev_pwrite (d, &b, 1, UINT64_C (1) << 62, 0, NULL), 0);
  assert_int_equal (mem_used (d), 2 * PAGE);
  assert_int_equal (bdev_extents (d, 0, size, check_extent, &ec, NULL), 0);
  assert_int_equal (ec.nr, 4);
  assert_true (ec.next == size);
  assert_int_equal (ec.data, 2 * PAGE);
  /* Reads of holes make no pages. */
  memset (big, 1, 8 << 20);
  assert_int_equal (bdev_pread (d, big, 8 << 20, (UINT64_C (1) << 61) - 7, NULL), 0);
  for (unsigned i = 0; i < 8 << 20; i += 4093)
    assert_int_equal (big[i], 0);
  assert_int_equal (mem_used (d), 2 * PAGE);
  /* All of it at once; and whole pages are given back. */
  assert_int_equal (bdev_zero (d, 0, size - 1, 0, NULL), 0);
  assert_int_equal (mem_used (d), PAGE);
  assert_int_equal (bdev_pread (d, &b, 1, size - 1, NULL), 0);
  assert_int_equal (b, 1);
  assert_int_equal (bdev_trim (d, size - PAGE, PAGE, 0, NULL), 0);
  assert_int_equal (mem_used (d), 0);
  bdev_unref (d);
  /* The largest that a 64-bit size can say. */
  d = new_mem (UINT64_MAX);
  assert_int_equal (bdev_pwrite (d, big, 100, UINT64_MAX - 100, 0, NULL), 0);
  assert_int_equal (bdev_resize (d, 5, NULL), 0);
  assert_int_equal (mem_used (d), 0);
  bdev_unref (d);
  free (big);
}

static void
what_was_cut_off_reads_zeros (void **state)
{
  static const uint64_t cuts[] = { 0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 777 };
  uint8_t ff[4 * PAGE], buf[4 * PAGE];

  memset (ff, 0xff, sizeof ff);
  for (size_t i = 0; i < sizeof cuts / sizeof cuts[0]; ++i) {
    struct bdev *d = new_mem (4 * PAGE);

    assert_int_equal (bdev_pwrite (d, ff, sizeof ff, 0, 0, NULL), 0);
    assert_int_equal (bdev_resize (d, cuts[i], NULL), 0);
    assert_true (bdev_size (d) == cuts[i]);
    assert_int_equal (bdev_pread (d, buf, 1, cuts[i], NULL), -EINVAL);
    assert_int_equal (mem_used (d), ROUND_UP (cuts[i], PAGE));
    assert_int_equal (bdev_resize (d, 4 * PAGE, NULL), 0);
    assert_int_equal (bdev_pread (d, buf, sizeof buf, 0, NULL), 0);
    for (uint64_t j = 0; j < sizeof buf; ++j)
      assert_int_equal (buf[j], j < cuts[i] ? 0xff : 0);
    bdev_unref (d);
  }
}

static void
fixed_size (void **state)
{
  struct bdev *d;

  assert_int_equal (mem_new ("ram", 100, false, &d, NULL), 0);
  assert_int_equal (bdev_resize (d, 101, NULL), -ENOSPC);
  assert_int_equal (bdev_resize (d, 99, NULL), 0);
  assert_int_equal (bdev_resize (d, 100, NULL), -ENOSPC);
  bdev_unref (d);
}

/* --- threads: each owns every fourth 100-byte piece, and sees only itself there */

enum { THREADS = 4, PIECE = 100, PIECES = 8000, ROUNDS = 3 };

struct worker {
  struct bdev *d;
  unsigned index;
  bool bad;
};

static void *
work (void *opaque)
{
  struct worker *w = opaque;
  uint8_t mine[PIECE], seen[PIECE];

  for (unsigned round = 1; round <= ROUNDS; ++round) {
    memset (mine, w->index * 16 + round, PIECE);
    for (unsigned i = w->index; i < PIECES; i += THREADS) {
      uint64_t off = (uint64_t) i * PIECE;

      if (round == 2 && bdev_zero (w->d, off, PIECE, 0, NULL) < 0)
        w->bad = true;
      if (bdev_pwrite (w->d, mine, PIECE, off, 0, NULL) < 0 ||
          bdev_pread (w->d, seen, PIECE, off, NULL) < 0 || memcmp (mine, seen, PIECE))
        w->bad = true;
    }
  }
  return NULL;
}

/* Meanwhile the end of the device comes and goes. */
static void *
resize (void *opaque)
{
  struct worker *w = opaque;
  uint8_t b[3 * PAGE];

  for (unsigned i = 0; i < 300; ++i) {
    uint64_t end = PIECES * PIECE;

    memset (b, 0xee, sizeof b);
    if (bdev_resize (w->d, end + 5 * PAGE, NULL) < 0 ||
        bdev_pread (w->d, b, sizeof b, end, NULL) < 0)
      w->bad = true;
    for (unsigned j = 0; j < sizeof b; ++j)
      w->bad |= b[j] != 0;
    memset (b, 0xee, sizeof b);
    if (bdev_pwrite (w->d, b, sizeof b, end, 0, NULL) < 0 ||
        bdev_resize (w->d, end, NULL) < 0)
      w->bad = true;
  }
  return NULL;
}

static void
threads (void **state)
{
  struct bdev *d = new_mem (PIECES * PIECE);
  struct worker w[THREADS + 1];
  pthread_t t[THREADS + 1];

  for (unsigned i = 0; i <= THREADS; ++i) {
    w[i] = (struct worker) { d, i, false };
    assert_int_equal (pthread_create (&t[i], NULL, i < THREADS ? work : resize, &w[i]), 0);
  }
  for (unsigned i = 0; i <= THREADS; ++i) {
    pthread_join (t[i], NULL);
    assert_false (w[i].bad);
  }
  for (unsigned i = 0; i < PIECES; ++i) {
    uint8_t seen[PIECE];

    assert_int_equal (bdev_pread (d, seen, PIECE, (uint64_t) i * PIECE, NULL), 0);
    for (unsigned j = 0; j < PIECE; ++j)
      assert_int_equal (seen[j], i % THREADS * 16 + ROUNDS);
  }
  assert_int_equal (mem_used (d), ROUND_UP (PIECES * PIECE, PAGE));
  bdev_unref (d);
}

/* --- a long write meets a shrink half way: what it wrote behind the new end
 * must not come back with the next growth
 */
enum { LONG = 32 * PAGE };

struct race {
  struct bdev *d;
  uint8_t *ones;
  atomic_bool go, stop;
  atomic_bool idle;             /* the writer is between two writes and waits for go */
};

static void *
write_long (void *opaque)
{
  struct race *r = opaque;

  while (!atomic_load (&r->stop)) {
    if (!atomic_load (&r->go)) {
      atomic_store (&r->idle, true);
      sched_yield ();
      continue;
    }
    atomic_store (&r->idle, false);
    bdev_pwrite (r->d, r->ones, LONG, 0, 0, NULL);      /* -EINVAL is right, too */
  }
  return NULL;
}

static void
writes_that_meet_a_shrink (void **state)
{
  struct race r = { .d = new_mem (LONG), .ones = malloc (LONG) };
  uint8_t *buf = malloc (LONG);
  pthread_t t;

  memset (r.ones, 1, LONG);
  assert_int_equal (pthread_create (&t, NULL, write_long, &r), 0);
  for (unsigned i = 0; i < 200; ++i) {
    bool bad = false;

    atomic_store (&r.go, true);
    while (atomic_load (&r.idle))
      sched_yield ();
    assert_int_equal (bdev_resize (r.d, PAGE + i, NULL), 0);
    atomic_store (&r.go, false);
    while (!atomic_load (&r.idle))
      sched_yield ();
    assert_int_equal (bdev_resize (r.d, LONG, NULL), 0);
    assert_int_equal (bdev_pread (r.d, buf, LONG, 0, NULL), 0);
    for (unsigned j = PAGE + i; j < LONG; ++j)
      bad |= buf[j] != 0;
    assert_false (bad);
  }
  atomic_store (&r.stop, true);
  pthread_join (t, NULL);
  bdev_unref (r.d);
  free (r.ones);
  free (buf);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (like_an_array),
    cmocka_unit_test (size_costs_nothing),
    cmocka_unit_test (what_was_cut_off_reads_zeros),
    cmocka_unit_test (fixed_size),
    cmocka_unit_test (threads),
    cmocka_unit_test (writes_that_meet_a_shrink),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
