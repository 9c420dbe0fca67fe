/* Arithmetic at its edges, and big-endian loads and stores at odd addresses. */
#include "unit/unit.h"

#include "base/endian.h"
#include "base/num.h"

static void
ranges_at_the_edges (void **state)
{
  assert_true (range_fits (0, 0, 0));
  assert_true (range_fits (10, 0, 10));
  assert_false (range_fits (11, 0, 10));
  assert_true (range_fits (0, 10, 10));
  assert_false (range_fits (0, 11, 10));
  assert_true (range_fits (UINT64_MAX, 0, UINT64_MAX));
  assert_true (range_fits (1, UINT64_MAX - 1, UINT64_MAX));
  assert_false (range_fits (2, UINT64_MAX - 1, UINT64_MAX));    /* wraps to 0 */
  assert_false (range_fits (UINT64_MAX - 511, 512, 4096));

  assert_true (ranges_overlap (0, 10, 9, 1));
  assert_false (ranges_overlap (0, 10, 10, 1));
  assert_false (ranges_overlap (10, 1, 0, 10));
  assert_true (ranges_overlap (5, 1, 0, 10));
  assert_false (ranges_overlap (5, 0, 5, 0));
  /* The end of neither is representable. */
  assert_true (ranges_overlap (UINT64_MAX - 1, 512, UINT64_MAX, 512));
  assert_false (ranges_overlap (UINT64_MAX, 512, 0, 512));
}

static void
rounding (void **state)
{
  assert_int_equal (ROUND_UP (0, 512), 0);
  assert_int_equal (ROUND_UP (1, 512), 512);
  assert_int_equal (ROUND_UP (512, 512), 512);
  assert_int_equal (ROUND_DOWN (1023, 512), 512);
  /* An n of 32 bits must not cut the mask to 32 bits. */
  assert_true (ROUND_DOWN (UINT64_C (0x123456789abcd), 0x10000u) == UINT64_C (0x1234567890000));
  assert_true (ROUND_UP (UINT64_C (0x100000001), 512u) == UINT64_C (0x100000200));
  assert_true (IS_ALIGNED (UINT64_C (1) << 40, 1u << 21));
  assert_false (IS_ALIGNED ((UINT64_C (1) << 40) + 1, 2));
  assert_true (DIV_ROUND_UP (UINT64_MAX, UINT64_C (2)) == UINT64_C (1) << 63);
  assert_int_equal (DIV_ROUND_UP (0, 7), 0);
  assert_false (is_power_of_2 (0));
  assert_true (is_power_of_2 (1));
  assert_true (is_power_of_2 (UINT64_C (1) << 63));
  assert_false (is_power_of_2 (UINT64_MAX));
}

static void
overflow_is_told (void **state)
{
  uint64_t r;

  assert_false (add_overflows (UINT64_MAX - 1, 1, &r));
  assert_true (r == UINT64_MAX);
  assert_true (add_overflows (UINT64_MAX, 1, &r));
  assert_false (mul_overflows (UINT64_C (1) << 32, (UINT64_C (1) << 32) - 1, &r));
  assert_true (mul_overflows (UINT64_C (1) << 32, UINT64_C (1) << 32, &r));
}

static void
big_endian_anywhere (void **state)
{
  uint8_t buf[16];

  for (unsigned at = 0; at < 8; ++at) {
    static const uint8_t expected[8] = { 0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef };

    memset (buf, 0xee, sizeof buf);
    store_be64 (buf + at, UINT64_C (0x0123456789abcdef));
    assert_memory_equal (buf + at, expected, 8);
    assert_true (load_be64 (buf + at) == UINT64_C (0x0123456789abcdef));
    assert_int_equal (load_be32 (buf + at), 0x01234567);
    assert_int_equal (load_be16 (buf + at + 1), 0x2345);
    store_be32 (buf + at, 0xfedcba98);
    assert_int_equal (buf[at], 0xfe);
    assert_int_equal (buf[at + 3], 0x98);
    assert_int_equal (buf[at + 4], 0x89);       /* no more than four bytes */
    store_be16 (buf + at, 0x7856);
    assert_int_equal (buf[at], 0x78);
    assert_int_equal (buf[at + 2], 0xba);
    if (at > 0)
      assert_int_equal (buf[at - 1], 0xee);
  }
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (ranges_at_the_edges),
    cmocka_unit_test (rounding),
    cmocka_unit_test (overflow_is_told),
    cmocka_unit_test (big_endian_anywhere),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
