/* The devices that other tests trust to fail and to crash: they must fail where
 * they say, and show every state that a disk could be left in and no other.
 */
#include "unit/unit.h"

#include "dev/mem.h"
#include "fault.h"

#define SECTOR 512
#define SECTORS 64
#define SIZE (SECTORS * SECTOR)

static struct bdev *
new_mem (void)
{
  struct bdev *d;

  assert_int_equal (mem_new ("ram", SIZE, true, &d, NULL), 0);
  return d;
}

static void
fill (struct bdev *d, uint64_t off, uint64_t len, uint8_t c, unsigned flags)
{
  uint8_t buf[SIZE];
  struct err err = { 0 };

  memset (buf, c, len);
  assert_ok (bdev_pwrite (d, buf, len, off, flags, &err), &err);
}

static void
assert_filled (struct bdev *d, uint64_t off, uint64_t len, uint8_t c)
{
  uint8_t buf[SIZE];

  assert_int_equal (bdev_pread (d, buf, len, off, NULL), 0);
  for (uint64_t i = 0; i < len; ++i)
    assert_int_equal (buf[i], c);
}

static struct bdev *
crashed (struct bdev *d, unsigned seed)
{
  struct err err = { 0 };
  struct bdev *state = NULL;

  assert_ok (crash_now (d, seed, &state, &err), &err);
  return state;
}

/* --- failing */

/* Write, zero, trim, flush, resize, FUA (a write and a flush): seven operations. */
static unsigned
seven_operations (struct bdev *d)
{
  unsigned failed = 0;

  failed |= (bdev_pwrite (d, "x", 1, 0, 0, NULL) == -EIO) << 0;
  failed |= (bdev_zero (d, 0, 10, BDEV_MAY_TRIM, NULL) == -EIO) << 1;
  failed |= (bdev_trim (d, 0, 10, 0, NULL) == -EIO) << 2;
  failed |= (bdev_flush (d, NULL) == -EIO) << 3;
  failed |= (bdev_resize (d, SIZE * 2, NULL) == -EIO) << 4;
  failed |= (bdev_pwrite (d, "y", 1, 1, BDEV_FUA, NULL) == -EIO) << 5;
  assert_int_equal (bdev_pread (d, (char[1]) { 0 }, 1, 0, NULL), 0);
  return failed;
}

static void
fails_the_nth (void **state)
{
  /* Which of the six calls fail, if the nth operation does. */
  static const unsigned once[9] = { 0, 1, 2, 4, 8, 16, 32, 32, 0 };
  static const unsigned sticky[9] = { 0, 63, 62, 60, 56, 48, 32, 32, 0 };

  for (unsigned n = 0; n <= 8; ++n)
    for (unsigned kind = FAULT_ONCE; kind <= FAULT_STICKY; ++kind) {
      struct bdev *under = new_mem (), *d;

      assert_int_equal (fault_new (under, n, kind, &d, NULL), 0);
      assert_int_equal (seven_operations (d), (kind == FAULT_ONCE ? once : sticky)[n]);
      assert_int_equal (fault_fired (d), n >= 1 && n <= 7);
      if (n == 0 || n > 6)
        assert_int_equal (fault_count (d), 7);
      assert_true (bdev_size (d) == bdev_size (under));
      assert_int_equal (bdev_size (d) == SIZE, n == 5 || (kind == FAULT_STICKY && n && n < 5));
      bdev_unref (d);
      bdev_unref (under);
    }
}

/* --- crashing */

static void
seeds_zero_and_one (void **state)
{
  struct bdev *mem = new_mem (), *d, *s;

  fill (mem, 0, SIZE, 1, 0);
  assert_int_equal (crash_new (mem, &d, NULL), 0);
  fill (d, 1000, 5000, 2, 0);
  assert_int_equal (bdev_flush (d, NULL), 0);
  fill (d, 3000, 5000, 3, 0);
  assert_int_equal (bdev_zero (d, 7000, 100, 0, NULL), 0);
  assert_int_equal (bdev_resize (d, SIZE + 100, NULL), 0);
  fill (d, SIZE, 100, 4, 0);

  s = crashed (d, 0);
  assert_true (bdev_size (s) == SIZE);
  assert_filled (s, 0, 1000, 1);
  assert_filled (s, 1000, 5000, 2);
  assert_filled (s, 6000, SIZE - 6000, 1);
  assert_true (s->writable && s->can_grow);
  bdev_unref (s);

  s = crashed (d, 1);
  assert_true (bdev_size (s) == SIZE + 100);
  assert_filled (s, 1000, 2000, 2);
  assert_filled (s, 3000, 4000, 3);
  assert_filled (s, 7000, 100, 0);
  assert_filled (s, 7100, 900, 3);
  assert_filled (s, SIZE, 100, 4);
  /* What is done to the state is not done to the disk. */
  fill (s, 0, SIZE, 9, 0);
  bdev_unref (s);
  assert_filled (d, 0, 1000, 1);
  s = crashed (d, 0);
  assert_filled (s, 0, 1000, 1);
  bdev_unref (s);
  bdev_unref (d);
  assert_filled (mem, 3000, 4000, 3);           /* it was passed through */
  bdev_unref (mem);
}

/* Three overlapping writes and a trim.  In every state each sector is as one of
 * them left it or as it was; over many states each of these is seen, torn writes
 * are, and an earlier write is found where a later one was lost.
 */
static void
every_honest_state (void **state)
{
  struct bdev *mem = new_mem (), *d;
  unsigned seen[SECTORS] = { 0 }, torn = 0, whole = 0, overtaken = 0;

  fill (mem, 0, SIZE, 1, 0);
  assert_int_equal (crash_new (mem, &d, NULL), 0);
  fill (d, 0, 32 * SECTOR, 2, 0);
  fill (d, 16 * SECTOR, 32 * SECTOR, 3, 0);
  assert_int_equal (bdev_trim (d, 40 * SECTOR, 16 * SECTOR, 0, NULL), 0);
  fill (d, 60 * SECTOR + 100, 600, 4, 0);               /* torn at the boundary, nowhere else */
  for (unsigned seed = 2; seed < 400; ++seed) {
    struct bdev *s = crashed (d, seed);
    unsigned twos = 0;
    uint8_t b[SECTOR];

    for (unsigned i = 0; i < SECTORS; ++i) {
      assert_int_equal (bdev_pread (s, b, SECTOR, i * SECTOR, NULL), 0);
      if (i == 60 || i == 61) {
        unsigned from = i == 60 ? 100 : 0, to = i == 60 ? SECTOR : 188;

        seen[i] |= 1u << b[from];
        for (unsigned j = 0; j < SECTOR; ++j)
          assert_int_equal (b[j], j >= from && j < to ? b[from] : 1);
        continue;
      }
      for (unsigned j = 1; j < SECTOR; ++j)
        assert_int_equal (b[j], b[0]);
      seen[i] |= 1u << b[0];
      twos += i < 16 && b[0] == 2;
      overtaken += i >= 16 && i < 32 && b[0] == 2;
    }
    torn += twos > 0 && twos < 16;
    whole += twos == 16;
    bdev_unref (s);
  }
  for (unsigned i = 0; i < SECTORS; ++i)
    assert_int_equal (seen[i], 1u << 1 | (i < 32) << 2 | (i >= 16 && i < 48) << 3 |
                      (i >= 40 && i < 56) << 0 | (i == 60 || i == 61) << 4);
  assert_true (torn > 50 && whole > 50 && overtaken > 50);
  bdev_unref (d);
  bdev_unref (mem);
}

/* --- flushes */

struct during {
  struct bdev *d;
  unsigned calls;
  uint8_t seen;
};

static void
write_during_flush (void *opaque)
{
  struct during *w = opaque;
  struct bdev *s = crashed (w->d, 0);

  /* The flush has not taken effect. */
  assert_int_equal (bdev_pread (s, &w->seen, 1, 0, NULL), 0);
  bdev_unref (s);
  if (w->calls++ == 0)
    fill (w->d, 10 * SECTOR, SECTOR, 5, 0);
}

static void
a_flush_covers_what_was_before_it (void **state)
{
  struct bdev *mem = new_mem (), *d, *s;
  struct during w = { 0 };

  assert_int_equal (crash_new (mem, &d, NULL), 0);
  w.d = d;
  crash_set_hook (d, write_during_flush, &w);
  fill (d, 0, SECTOR, 7, 0);
  assert_int_equal (bdev_flush (d, NULL), 0);
  assert_int_equal (w.calls, 1);
  assert_int_equal (w.seen, 0);
  s = crashed (d, 0);
  assert_filled (s, 0, SECTOR, 7);
  assert_filled (s, 10 * SECTOR, SECTOR, 0);    /* came after the flush began */
  bdev_unref (s);
  s = crashed (d, 1);
  assert_filled (s, 10 * SECTOR, SECTOR, 5);
  bdev_unref (s);
  assert_int_equal (bdev_flush (d, NULL), 0);
  assert_int_equal (w.seen, 7);
  s = crashed (d, 0);
  assert_filled (s, 10 * SECTOR, SECTOR, 5);
  bdev_unref (s);
  crash_set_hook (d, NULL, NULL);
  assert_int_equal (bdev_flush (d, NULL), 0);
  assert_int_equal (w.calls, 2);
  bdev_unref (d);
  bdev_unref (mem);
}

static void
a_failed_flush_covers_nothing (void **state)
{
  struct bdev *mem = new_mem (), *bad, *d, *s;

  assert_int_equal (fault_new (mem, 3, FAULT_ONCE, &bad, NULL), 0);
  assert_int_equal (crash_new (bad, &d, NULL), 0);
  fill (d, 0, SECTOR, 7, 0);
  fill (d, SECTOR, SECTOR, 8, 0);
  assert_int_equal (bdev_flush (d, NULL), -EIO);
  s = crashed (d, 0);
  assert_filled (s, 0, SIZE, 0);
  bdev_unref (s);
  bdev_unref (d);
  bdev_unref (bad);
  /* A write that failed and did nothing is in no state. */
  assert_int_equal (fault_new (mem, 1, FAULT_ONCE, &bad, NULL), 0);
  assert_int_equal (crash_new (bad, &d, NULL), 0);
  assert_int_equal (bdev_pwrite (d, "x", 1, 5000, 0, NULL), -EIO);
  s = crashed (d, 1);
  assert_filled (s, 5000, 1, 0);
  bdev_unref (s);
  bdev_unref (d);
  bdev_unref (bad);
  bdev_unref (mem);
}

static void
fua_is_durable_alone (void **state)
{
  struct bdev *mem = new_mem (), *d;

  assert_int_equal (crash_new (mem, &d, NULL), 0);
  fill (d, 0, 4 * SECTOR, 1, 0);
  fill (d, 2 * SECTOR, 4 * SECTOR, 2, BDEV_FUA);
  fill (d, 5 * SECTOR, 4 * SECTOR, 3, 0);
  for (unsigned seed = 0; seed < 200; ++seed) {
    struct bdev *s = crashed (d, seed);

    assert_filled (s, 2 * SECTOR, 3 * SECTOR, 2);       /* the earlier one never comes back */
    if (seed == 0) {
      assert_filled (s, 0, 2 * SECTOR, 0);
      assert_filled (s, 5 * SECTOR, SECTOR, 2);
      assert_filled (s, 6 * SECTOR, 3 * SECTOR, 0);
    }
    bdev_unref (s);
  }
  bdev_unref (d);
  bdev_unref (mem);
}

/* Shrunk and grown again: what was cut off is never seen in the grown file, and
 * sizes are taken on in the order in which they were set.
 */
static void
resizes_keep_their_order (void **state)
{
  struct bdev *mem = new_mem (), *d, *s;
  unsigned seen = 0;

  assert_int_equal (crash_new (mem, &d, NULL), 0);
  fill (d, 0, SIZE, 1, 0);
  assert_int_equal (bdev_resize (d, SIZE / 2, NULL), 0);
  assert_int_equal (bdev_resize (d, SIZE * 2, NULL), 0);
  for (unsigned seed = 0; seed < 300; ++seed) {
    uint64_t size;

    s = crashed (d, seed);
    size = bdev_size (s);
    assert_true (size == SIZE || size == SIZE / 2 || size == SIZE * 2);
    seen |= size == SIZE ? 1 : size == SIZE / 2 ? 2 : 4;
    if (size == SIZE * 2)
      assert_filled (s, SIZE / 2, SIZE / 2, 0);
    bdev_unref (s);
  }
  assert_int_equal (seen, 7);
  assert_int_equal (bdev_flush (d, NULL), 0);
  s = crashed (d, 0);
  assert_true (bdev_size (s) == SIZE * 2);
  bdev_unref (s);
  bdev_unref (d);
  bdev_unref (mem);
}

static void
large_zeros_end_soon (void **state)
{
  struct bdev *mem, *d;

  assert_int_equal (mem_new ("ram", UINT64_C (1) << 62, true, &mem, NULL), 0);
  assert_int_equal (bdev_pwrite (mem, "x", 1, UINT64_C (1) << 61, 0, NULL), 0);
  assert_int_equal (crash_new (mem, &d, NULL), 0);
  assert_int_equal (bdev_zero (d, 3, (UINT64_C (1) << 62) - 9, 0, NULL), 0);
  for (unsigned seed = 0; seed < 20; ++seed)
    bdev_unref (crashed (d, seed));
  bdev_unref (d);
  bdev_unref (mem);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (fails_the_nth),
    cmocka_unit_test (seeds_zero_and_one),
    cmocka_unit_test (every_honest_state),
    cmocka_unit_test (a_flush_covers_what_was_before_it),
    cmocka_unit_test (a_failed_flush_covers_nothing),
    cmocka_unit_test (fua_is_durable_alone),
    cmocka_unit_test (resizes_keep_their_order),
    cmocka_unit_test (large_zeros_end_soon),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
