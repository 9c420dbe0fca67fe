/* The growable array: keeps what is pushed, refuses what memory cannot hold. */
#include "unit/unit.h"

#include "base/vec.h"

struct item { uint64_t a; char b[17]; };
DEFINE_VEC (itemvec, struct item);

static void
keeps_what_is_pushed (void **state)
{
  struct itemvec v = VEC_INIT;

  for (uint64_t i = 0; i < 10000; ++i) {
    struct item it = { .a = i };

    snprintf (it.b, sizeof it.b, "%llu", (unsigned long long) i);
    assert_int_equal (itemvec_push (&v, it), 0);
    assert_int_equal (v.len, i + 1);
    assert_true (v.cap >= v.len);
  }
  for (uint64_t i = 0; i < v.len; ++i) {
    assert_int_equal (v.ptr[i].a, i);
    assert_int_equal (atoi (v.ptr[i].b), i);
  }
  vec_reset (&v);
  assert_null (v.ptr);
  assert_int_equal (v.len + v.cap, 0);
}

static void
impossible_sizes_are_refused (void **state)
{
  struct itemvec v = VEC_INIT;
  struct item it = { .a = 1 };

  assert_int_equal (itemvec_push (&v, it), 0);
  assert_int_equal (itemvec_reserve (&v, SIZE_MAX), -ENOMEM);           /* len + n wraps */
  assert_int_equal (itemvec_reserve (&v, SIZE_MAX / 8), -ENOMEM);       /* bytes wrap */
  assert_int_equal (v.len, 1);
  assert_int_equal (v.ptr[0].a, 1);
  assert_int_equal (itemvec_reserve (&v, 100), 0);
  assert_true (v.cap >= 101);
  assert_int_equal (v.ptr[0].a, 1);
  vec_reset (&v);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (keeps_what_is_pushed),
    cmocka_unit_test (impossible_sizes_are_refused),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
