/* What every unit test includes: cmocka, and ways to ask programs that are not
 * ours for their opinion.
 */
#ifndef QR_TESTS_UNIT_H
#define QR_TESTS_UNIT_H

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

#include <cmocka.h>

#include "base/err.h"

/* r == 0, else print why. */
#define assert_ok(r, err)                                       \
  do {                                                          \
    int assert_ok_r = (r);                                      \
                                                                \
    if (assert_ok_r != 0)                                       \
      fail_msg ("%s: %d: %s", #r, assert_ok_r, (err)->msg);     \
  } while (0)

/* Run a shell command, quietly: its exit status. */
static inline __attribute__ ((unused, format (printf, 1, 2))) int
run (const char *fmt, ...)
{
  char cmd[4096], quiet[4200];
  va_list args;
  int r;

  va_start (args, fmt);
  vsnprintf (cmd, sizeof cmd, fmt, args);
  va_end (args);
  snprintf (quiet, sizeof quiet, "{ %s ; } </dev/null >/dev/null 2>&1", cmd);
  r = system (quiet);
  return WIFEXITED (r) ? WEXITSTATUS (r) : -1;
}

/* Leave the test, saying so, if a program is not installed. */
#define require_program(name)                                   \
  do {                                                          \
    if (run ("command -v %s", name) != 0) {                     \
      print_message ("SKIP: %s is not installed\n", name);      \
      skip ();                                                  \
    }                                                           \
  } while (0)

/* A new empty directory; remove_folder takes it away with what is in it. */
static inline __attribute__ ((unused)) char *
make_folder (void)
{
  const char *tmp = getenv ("TMPDIR");
  char *path;

  if (asprintf (&path, "%s/qcow2repair-unit-XXXXXX", tmp ? tmp : "/tmp") < 0 ||
      mkdtemp (path) == NULL)
    abort ();
  return path;
}

static inline __attribute__ ((unused)) void
remove_folder (char *path)
{
  run ("rm -rf -- '%s'", path);
  free (path);
}

/* splitmix64: the same numbers at every run. */
static inline __attribute__ ((unused)) uint64_t
test_random (uint64_t *state)
{
  uint64_t x = *state += UINT64_C (0x9e3779b97f4a7c15);

  x = (x ^ x >> 30) * UINT64_C (0xbf58476d1ce4e5b9);
  x = (x ^ x >> 27) * UINT64_C (0x94d049bb133111eb);
  return x ^ x >> 31;
}

#endif /* QR_TESTS_UNIT_H */
