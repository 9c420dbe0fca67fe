/* For the tests of level all: heal in memory what qemu-img made and the test
 * damaged, and ask qemu-img what it thinks of the result.
 */
#ifndef QR_TESTS_HEAL_TEST_H
#define QR_TESTS_HEAL_TEST_H

#include "unit/check/images.h"

#include "base/cleanup.h"
#include "fault.h"
#include "heal/heal.h"
#include "heal/lost.h"

/* Everything that the layer does at level all; *c is the last check. */
static inline __attribute__ ((unused)) int
heal_fully (struct bdev *d, struct check **c, struct heal_result *res, struct lost *lost,
            struct err *err)
{
  struct heal_result refcounts = { 0 };
  struct check *first, *last, *after = NULL;
  int r = check_run (d, NULL, &first, err);

  memset (res, 0, sizeof *res);
  *c = NULL;
  if (r < 0)
    return r;
  last = first;
  r = heal_all (d, &last, NULL, res, lost, err);
  if (r == 0)
    r = heal_run (d, last, REPAIR_ALL, NULL, &refcounts, err);
  if (r == 0)
    r = check_run (d, NULL, &after, err);
  if (r == 0)
    r = heal_finish (d, after, &refcounts, err);
  if (last != first)
    check_free (last);
  check_free (first);
  if (r == 0)
    *c = after;
  else
    check_free (after);
  return r;
}

/* One image under test: the folder for qemu-img's opinion, and the healed bytes. */
struct patient {
  struct bdev *d;
  struct lost lost;
  struct heal_result res;
  char *folder;
};

static inline __attribute__ ((unused)) void
patient_free (struct patient *p)
{
  lost_reset (&p->lost);
  bdev_unref (p->d);
  remove_folder (p->folder);
}

/* Heal d (its reference is taken over); want: findings that may stay.  qemu-img check
 * must be content, of which "disk.qcow2" in the folder is the file; "base.raw" is there,
 * too, 8 MiB of zeros.
 */
#define heal_patient(d, p, want) heal_patient_at (d, p, want, __FILE__, __LINE__)
static inline __attribute__ ((unused)) void
heal_patient_at (struct bdev *d, struct patient *p, const char *want, const char *file, int line)
{
  struct err err = { 0 };
  struct check *c;
  char path[4096];

  p->d = d;
  p->folder = make_folder ();
  lost_init (&p->lost);
  if (heal_fully (d, &c, &p->res, &p->lost, &err) != 0) {
    print_error ("%s\n", err.msg);
    _fail (file, line);
  }
  assert_findings_at (c, want, file, line);
  check_free (c);
  snprintf (path, sizeof path, "%s/disk.qcow2", p->folder);
  save_image (d, path);
  if (run ("cd %s && truncate -s 8M base.raw && "
           "qemu-img check -f qcow2 disk.qcow2 >check.log 2>&1", p->folder) != 0) {
    char *cmd;

    if (asprintf (&cmd, "cat %s/check.log >&2", p->folder) > 0 && system (cmd) != 0)
      print_error ("qemu-img said nothing\n");
    print_error ("qemu-img check is not content\n");
    _fail (file, line);
  }
}

/* A shell command in the folder must succeed. */
#define assert_run(p, ...) \
  do { \
    char assert_cmd[2048]; \
    snprintf (assert_cmd, sizeof assert_cmd, __VA_ARGS__); \
    if (run ("cd %s && %s", (p)->folder, assert_cmd) != 0) \
      fail_msg ("%s", assert_cmd); \
  } while (0)

/* Let every write fail once, until none is left to fail: an error comes back each time, and
 * healing again ends well.  damaged is copied for each.
 */
static inline __attribute__ ((unused)) void
sweep_faults (struct bdev *damaged)
{
  bool fired = true;

  for (unsigned n = 1; fired; ++n) {
    struct bdev *copy, *faulty;
    struct heal_result res;
    struct err err = { 0 };
    struct check *c;
    struct lost lost;
    int r;

    assert_ok (mem_copy_of (damaged, &copy, &err), &err);
    assert_ok (fault_new (copy, n, FAULT_ONCE, &faulty, &err), &err);
    lost_init (&lost);
    r = heal_fully (faulty, &c, &res, &lost, &err);
    fired = fault_fired (faulty);
    if (fired)
      assert_int_equal (r, -EIO);
    else
      assert_ok (r, &err);
    check_free (c);
    lost_reset (&lost);
    bdev_unref (faulty);
    err_clear (&err);
    lost_init (&lost);
    assert_ok (heal_fully (copy, &c, &res, &lost, &err), &err);         /* I6 */
    assert_findings (c, "");
    check_free (c);
    lost_reset (&lost);
    bdev_unref (copy);
    assert_true (n < 1000);
  }
}

#endif /* QR_TESTS_HEAL_TEST_H */
