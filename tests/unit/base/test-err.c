/* Messages: the first cause wins, and nothing is too long for them. */
#include "unit/unit.h"

static void
first_cause_wins (void **state)
{
  struct err e = { 0 };

  assert_int_equal (err_set (&e, EIO, "disk %d", 7), -EIO);
  assert_int_equal (err_set (&e, ENOSPC, "later"), -ENOSPC);
  assert_int_equal (e.code, EIO);
  assert_string_equal (e.msg, "disk 7");
  err_clear (&e);
  assert_int_equal (e.code, 0);
  assert_string_equal (e.msg, "");
  assert_int_equal (err_set (NULL, EINVAL, "nobody listens"), -EINVAL);
  err_clear (NULL);
  err_prefix (NULL, "x");
}

static void
prefix_goes_in_front (void **state)
{
  struct err e = { 0 };

  err_prefix (&e, "nothing happened");
  assert_string_equal (e.msg, "");
  err_set (&e, EIO, "read failed");
  err_prefix (&e, "opening %s", "a.qcow2");
  err_prefix (&e, "starting");
  assert_string_equal (e.msg, "starting: opening a.qcow2: read failed");
  assert_int_equal (e.code, EIO);
}

/* Whatever the lengths: the text ends inside the buffer, begins with the prefix
 * and goes on with as much of the cause as fits.  A canary lies behind it.
 */
static void
long_messages_are_cut (void **state)
{
  struct { struct err e; char canary[16]; } s;
  char text[3 * sizeof s.e.msg];

  for (size_t cause = 1000; cause <= 1100; cause += 7)
    for (size_t prefix = 0; prefix <= 1100; prefix += prefix < 1000 ? 100 : 1) {
      memset (&s, 0, sizeof s);
      memset (s.canary, 0x5a, sizeof s.canary);
      memset (text, 'c', sizeof text);
      err_set (&s.e, EIO, "%.*s", (int) cause, text);
      assert_int_equal (strlen (s.e.msg), cause < sizeof s.e.msg ? cause : sizeof s.e.msg - 1);
      memset (text, 'p', sizeof text);
      err_prefix (&s.e, "%.*s", (int) prefix, text);
      assert_true (memchr (s.e.msg, 0, sizeof s.e.msg) != NULL);
      if (prefix > 0)
        assert_int_equal (s.e.msg[0], 'p');
      if (prefix < sizeof s.e.msg - 3) {
        assert_int_equal (s.e.msg[prefix], ':');
        assert_int_equal (s.e.msg[prefix + 2], 'c');
      }
      for (size_t i = 0; i < sizeof s.canary; ++i)
        assert_int_equal (s.canary[i], 0x5a);
    }
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (first_cause_wins),
    cmocka_unit_test (prefix_goes_in_front),
    cmocka_unit_test (long_messages_are_cut),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
