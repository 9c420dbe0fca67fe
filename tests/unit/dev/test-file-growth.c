/* How a file grows ahead of its device.  ftruncate is replaced, to be counted and to fail on demand;
 * the judge is what stat says of the file.
 */
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/log.h"
#include "file-test.h"

static atomic_uint truncations;
static _Atomic off_t longest = INT64_MAX;       /* that a file may become */

int
ftruncate (int fd, off_t length)
{
  atomic_fetch_add (&truncations, 1);
  if (length > atomic_load (&longest)) {
    errno = EFBIG;
    return -1;
  }
  return syscall (SYS_ftruncate, fd, length);
}

static int
teardown (void **state)
{
  atomic_store (&longest, INT64_MAX);
  remove_folder (folder);
  return 0;
}

static off_t
length_seen_by_others (void)
{
  struct stat st;

  assert_int_equal (stat (path, &st), 0);
  return st.st_size;
}

/* Growing step by step takes few calls; its device never shows more than was asked
 * for, what it grows into is zeros whatever was there, and nothing of it is left.
 */
static void
grows_ahead (void **state)
{
  struct bdev *d = create (1000);
  uint8_t b[64];
  unsigned before = atomic_load (&truncations);

  for (unsigned size = 1064; size <= 1000 + 64 * 64; size += 64) {
    assert_int_equal (bdev_grow (d, size, 1600, NULL), 0);
    assert_int_equal (bdev_size (d), size);
    assert_true (length_seen_by_others () >= size && length_seen_by_others () <= size + 1600);
    assert_int_equal (bdev_pread (d, b, 64, size - 63, NULL), -EINVAL);
    assert_int_equal (bdev_pwrite (d, b, 64, size - 63, 0, NULL), -EINVAL);
    assert_int_equal (bdev_pread (d, b, 64, size - 64, NULL), 0);
    for (unsigned i = 0; i < 64; ++i)
      assert_int_equal (b[i], 0);
    memset (b, 0xee, 64);
    assert_int_equal (bdev_pwrite (d, b, 64, size - 64, 0, NULL), 0);
  }
  assert_int_equal (atomic_load (&truncations) - before, 3);
  /* Smaller, and back: what was cut off is gone. */
  assert_int_equal (bdev_resize (d, 2000, NULL), 0);
  assert_int_equal (length_seen_by_others (), 2000);
  assert_int_equal (bdev_grow (d, 2064, 1600, NULL), 0);
  assert_int_equal (bdev_pread (d, b, 64, 2000, NULL), 0);
  for (unsigned i = 0; i < 64; ++i)
    assert_int_equal (b[i], 0);
  /* Resizing is exact. */
  assert_int_equal (length_seen_by_others (), 3664);
  assert_int_equal (bdev_resize (d, 2100, NULL), 0);
  assert_int_equal (length_seen_by_others (), 2100);
  /* One that another thread overtook changes nothing. */
  assert_int_equal (bdev_grow (d, 2500, 1600, NULL), 0);
  assert_int_equal (bdev_grow (d, 2400, 1600, NULL), 0);
  assert_int_equal (d->ops->resize (d, 2400, 1600, NULL), 0);
  assert_int_equal (bdev_size (d), 2500);
  assert_int_equal (length_seen_by_others (), 4100);
  bdev_unref (d);
  assert_int_equal (length_seen_by_others (), 2500);
}

static void
grows_no_further_than_there_is_room (void **state)
{
  struct bdev *d = create (2100);
  unsigned before;

  atomic_store (&longest, 3000);
  assert_int_equal (bdev_grow (d, 2980, 1600, NULL), 0);
  assert_int_equal (length_seen_by_others (), 2980);
  before = atomic_load (&truncations);          /* it is not tried again */
  assert_int_equal (bdev_grow (d, 2990, 1600, NULL), 0);
  assert_int_equal (atomic_load (&truncations) - before, 1);
  assert_int_equal (bdev_grow (d, 3001, 1600, NULL), -ENOSPC);
  assert_int_equal (bdev_size (d), 2990);
  bdev_unref (d);
  assert_int_equal (length_seen_by_others (), 2990);

  atomic_store (&longest, INT64_MAX);
  unlink (path);
  d = create (100);
  assert_int_equal (bdev_grow (d, 3000, UINT64_MAX, NULL), 0);
  assert_int_equal (bdev_grow (d, 3010, 10, NULL), 0);
  bdev_unref (d);
  assert_int_equal (length_seen_by_others (), 3010);
}

/* To come near the limit of file sizes is no reason to be killed (SIGXFSZ). */
static void
grows_below_the_limit_of_the_process (void **state)
{
  struct bdev *d = create (1000);
  struct rlimit before, limit;

  assert_int_equal (getrlimit (RLIMIT_FSIZE, &before), 0);
  limit = (struct rlimit) { 5000, before.rlim_max };
  assert_int_equal (setrlimit (RLIMIT_FSIZE, &limit), 0);
  assert_int_equal (bdev_grow (d, 4000, 2000, NULL), 0);
  assert_int_equal (length_seen_by_others (), 5000);
  assert_int_equal (bdev_grow (d, 5000, 2000, NULL), 0);
  assert_int_equal (setrlimit (RLIMIT_FSIZE, &before), 0);
  bdev_unref (d);
}

static char heard[500];

static void
hear (const char *text)
{
  snprintf (heard, sizeof heard, "%s", text);
}

/* Who looks on without a lock goes on when the file gets its true length. */
static void
closing_is_no_error_for_others (void **state)
{
  struct bdev *d = create (1000), *other = NULL;
  struct err err = { 0 };
  uint8_t b[400];

  log_set_notice_hook (hear);

  assert_int_equal (bdev_grow (d, 1100, 500, NULL), 0);
  assert_int_equal (bdev_pwrite (d, "x", 1, 1099, 0, NULL), 0);
  assert_ok (file_open (path, FILE_NO_LOCK, &other, &err), &err);
  assert_int_equal (bdev_size (other), 1600);
  bdev_unref (d);
  memset (b, 0xee, sizeof b);
  assert_ok (bdev_pread (other, b, sizeof b, 1099, &err), &err);
  assert_int_equal (b[0], 'x');
  for (unsigned i = 1; i < sizeof b; ++i)
    assert_int_equal (b[i], 0);
  assert_non_null (strstr (heard, "shorter"));  /* he is told, once */
  heard[0] = '\0';
  assert_ok (bdev_pread (other, b, sizeof b, 1099, &err), &err);
  assert_string_equal (heard, "");
  log_set_notice_hook (NULL);
  bdev_unref (other);
}

/* What somebody else put behind our end is his. */
static void
cuts_off_only_its_own (void **state)
{
  struct bdev *d = create (1000);

  assert_int_equal (bdev_grow (d, 1100, 500, NULL), 0);
  assert_int_equal (length_seen_by_others (), 1600);
  assert_int_equal (truncate (path, 1700), 0);
  bdev_unref (d);
  assert_int_equal (length_seen_by_others (), 1700);
}

int
main (void)
{
#define TEST(f) cmocka_unit_test_setup_teardown (f, setup, teardown)
  const struct CMUnitTest tests[] = {
    TEST (grows_ahead),
    TEST (grows_no_further_than_there_is_room),
    TEST (grows_below_the_limit_of_the_process),
    TEST (closing_is_no_error_for_others),
    TEST (cuts_off_only_its_own),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
