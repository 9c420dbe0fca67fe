/* Slices as one device: bytes, borders, extents, many slices. */
#include "unit/unit.h"

#include "base/num.h"
#include "dev/concat.h"
#include "dev/mem.h"

#define SIZE (UINT64_C (1) << 20)

static uint8_t whole[SIZE];

/* Random bytes, and a hole in the second quarter. */
static struct bdev *
make_under (void)
{
  uint64_t seed = 1;
  struct bdev *d;
  struct err err = { 0 };

  assert_ok (mem_new ("under", SIZE, false, &d, &err), &err);
  memset (whole, 0, sizeof whole);
  for (size_t i = 0; i < SIZE; ++i)
    if (i / (SIZE / 4) != 1)
      whole[i] = test_random (&seed);
  assert_ok (bdev_pwrite (d, whole, SIZE / 4, 0, 0, &err), &err);
  assert_ok (bdev_pwrite (d, whole + SIZE / 2, SIZE / 2, SIZE / 2, 0, &err), &err);
  return d;
}

static struct bdev *
make_concat (const struct slice_of *slices, size_t nr)
{
  struct slice_of_vec v = VEC_INIT;
  struct bdev *under = make_under (), *d;
  struct err err = { 0 };

  for (size_t i = 0; i < nr; ++i)
    assert_int_equal (slice_of_vec_push (&v, slices[i]), 0);
  assert_ok (concat_new ("all", under, &v, &d, &err), &err);
  assert_null (v.ptr);
  bdev_unref (under);
  return d;
}

static void
test_bytes (void **state)
{
  static const struct slice_of slices[] = {
    { 700000, 1000 }, { 5, 1 }, { SIZE - 7, 7 }, { 0, 70000 }, { 700500, 1000 },
  };
  struct bdev *d = make_concat (slices, 5);
  uint8_t want[73008], got[73008];
  size_t n = 0;
  struct err err = { 0 };

  for (size_t i = 0; i < 5; ++i) {
    memcpy (want + n, whole + slices[i].off, slices[i].len);
    n += slices[i].len;
  }
  assert_int_equal (bdev_size (d), n);
  /* From around every border, across some or all of them. */
  for (size_t i = 0, at = 0; i < 5; at += slices[i++].len)
    for (size_t from = at ? at - 1 : 0; from <= at + 1; ++from)
      for (size_t len = 1; len <= n - from; len = len * 3 + 1) {
        memset (got, 0xee, sizeof got);
        assert_ok (bdev_pread (d, got, len, from, &err), &err);
        assert_memory_equal (got, want + from, len);
      }
  assert_false (d->writable);
  assert_int_equal (bdev_pwrite (d, got, 1, 0, 0, NULL), -EROFS);
  assert_int_equal (bdev_pread (d, got, 2, n - 1, NULL), -EINVAL);
  bdev_unref (d);
}

static int
sum_kinds (void *opaque, uint64_t off, uint64_t len, unsigned kind)
{
  uint64_t *sums = opaque;      /* data, hole, end */

  assert_int_equal (off, sums[2]);
  sums[kind & BDEV_HOLE ? 1 : 0] += len;
  sums[2] += len;
  return sums[2] >= sums[3] ? 1 : 0;
}

static void
test_extents (void **state)
{
  static const struct slice_of slices[] = {
    { SIZE / 4, 65536 }, { 0, 65536 }, { SIZE / 4 + 65536, 65536 },
  };
  struct bdev *d = make_concat (slices, 3);
  uint64_t sums[4] = { 0, 0, 100, UINT64_MAX }, early[4] = { 0, 0, 0, 1 };
  struct err err = { 0 };

  assert_ok (bdev_extents (d, 100, 3 * 65536 - 200, sum_kinds, sums, &err), &err);
  assert_int_equal (sums[0], 65536);
  assert_int_equal (sums[1], 2 * 65536 - 200);
  assert_int_equal (sums[2], 3 * 65536 - 100);
  /* One that has seen enough is asked no more. */
  assert_ok (bdev_extents (d, 0, 3 * 65536, sum_kinds, early, &err), &err);
  assert_int_equal (early[2], 65536);
  bdev_unref (d);
}

/* Half a million single bytes, backwards. */
static void
test_many (void **state)
{
  struct slice_of_vec v = VEC_INIT;
  struct bdev *under = make_under (), *d;
  struct err err = { 0 };
  uint64_t seed = 2;

  for (uint64_t i = 0; i < SIZE / 2; ++i)
    assert_int_equal (slice_of_vec_push (&v, (struct slice_of) { SIZE - 1 - i, 1 }), 0);
  assert_ok (concat_new ("all", under, &v, &d, &err), &err);
  for (unsigned i = 0; i < 100000; ++i) {
    uint64_t off = test_random (&seed) % (SIZE / 2);
    uint8_t got;

    assert_ok (bdev_pread (d, &got, 1, off, &err), &err);
    assert_int_equal (got, whole[SIZE - 1 - off]);
  }
  bdev_unref (d);
  bdev_unref (under);
}

static void
test_none_and_outside (void **state)
{
  static const struct slice_of bad[] = {
    { SIZE, 1 }, { SIZE - 1, 2 }, { UINT64_MAX, 2 }, { 0, 0 }, { 1, UINT64_MAX },
  };
  struct bdev *d = make_concat (NULL, 0), *under = make_under (), *none = NULL;
  struct err err = { 0 };
  uint8_t b;

  assert_int_equal (bdev_size (d), 0);
  assert_int_equal (bdev_pread (d, &b, 1, 0, NULL), -EINVAL);
  bdev_unref (d);
  for (size_t i = 0; i < sizeof bad / sizeof *bad; ++i) {
    struct slice_of_vec v = VEC_INIT;

    assert_int_equal (slice_of_vec_push (&v, bad[i]), 0);
    assert_int_equal (concat_new ("all", under, &v, &none, &err), -EINVAL);
    assert_null (none);
    assert_null (v.ptr);
    err_clear (&err);
  }
  bdev_unref (under);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_bytes),
    cmocka_unit_test (test_extents),
    cmocka_unit_test (test_many),
    cmocka_unit_test (test_none_and_outside),
  };

  return cmocka_run_group_tests_name ("concat", tests, NULL, NULL);
}
