/* A folder for each test, and the name of a file in it: what the tests of file devices share. */
#ifndef QR_TESTS_DEV_FILE_TEST_H
#define QR_TESTS_DEV_FILE_TEST_H

#include "unit/unit.h"

#include "dev/file.h"

static char *folder;
static char path[4096];         /* of a file in it */

static inline int
setup (void **state)
{
  folder = make_folder ();
  snprintf (path, sizeof path, "%s/disk", folder);
  return 0;
}

/* The file, with so many bytes. */
static inline __attribute__ ((unused)) struct bdev *
create (uint64_t size)
{
  struct err err = { 0 };
  struct bdev *d = NULL;

  assert_ok (file_create (path, &d, &err), &err);
  assert_ok (bdev_resize (d, size, &err), &err);
  return d;
}

#endif /* QR_TESTS_DEV_FILE_TEST_H */
