/* Refcounts of every width: a plain array is the model; and a few bytes written
 * out by hand, since a wrong order of bits would agree with itself.
 */
#include "unit/unit.h"

#include "fmt/refbits.h"

#define BLOCK 512

static void
every_width_against_an_array (void **state)
{
  static uint64_t model[BLOCK * 8];
  uint8_t block[BLOCK + 1];

  for (unsigned order = 0; order <= 6; ++order) {
    unsigned nr = BLOCK * 8 >> order;
    uint64_t max = order == 6 ? UINT64_MAX : (UINT64_C (1) << (1u << order)) - 1;
    uint64_t rng = order;

    memset (block, 0, sizeof block);
    memset (model, 0, sizeof model);
    block[BLOCK] = 0xa5;
    for (unsigned n = 0; n < 20000; ++n) {
      uint64_t i = test_random (&rng) % nr, v = test_random (&rng) & max;

      if (n % 5 == 0)
        i = n % 2 ? 0 : nr - 1;
      if (n % 7 == 0)
        v = n % 2 ? max : 0;
      refbits_set (block, order, i, v);
      model[i] = v;
      assert_true (refbits_get (block, order, i) == v);
    }
    for (unsigned i = 0; i < nr; ++i)
      assert_true (refbits_get (block, order, i) == model[i]);
    assert_int_equal (block[BLOCK], 0xa5);
  }
}

/* "Refcounts of less than 8 bits: the least significant bits first." */
static void
bytes_by_hand (void **state)
{
  uint8_t b[16] = { 0 };

  refbits_set (b, 0, 0, 1);
  refbits_set (b, 0, 9, 1);
  assert_int_equal (b[0], 0x01);
  assert_int_equal (b[1], 0x02);
  memset (b, 0, sizeof b);
  refbits_set (b, 1, 1, 3);
  assert_int_equal (b[0], 0x0c);
  memset (b, 0, sizeof b);
  refbits_set (b, 2, 0, 0xa);
  refbits_set (b, 2, 1, 0x5);
  assert_int_equal (b[0], 0x5a);
  refbits_set (b, 4, 1, 0x1234);
  assert_int_equal (b[2], 0x12);
  assert_int_equal (b[3], 0x34);
  refbits_set (b, 6, 1, 2);
  assert_int_equal (b[15], 2);
  assert_int_equal (b[8], 0);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (every_width_against_an_array),
    cmocka_unit_test (bytes_by_hand),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
