/* Splitting shared clusters where things fail: a device without room, and one on which
 * any write fails.  (That the bytes are right is tests/t/heal-shared-clusters.t's.)
 */
#include "unit/heal/heal-test.h"

#include "img/image.h"

#define CS 4096

/* Eight guest clusters, 20 to 27, on the host clusters of 0 to 7, whose refcounts
 * and flags are right, as after heal_run.
 */
static struct bdev *
shared (void)
{
  struct bdev *d = make_image ("cluster_size=4k", "8M", "qemu-io -f qcow2 "
                               "-c 'write -q -P 1 0 16k' -c 'write -q -P 2 16k 16k' $f");
  struct heal_result res;
  struct err err = { 0 };
  struct check *c;
  struct lost lost;

  for (unsigned i = 0; i < 8; ++i)
    put64 (d, l2_place (d, 0, 20 + i), get64 (d, l2_place (d, 0, i)));
  lost_init (&lost);
  assert_ok (heal_fully (d, &c, &res, &lost, &err), &err);
  assert_findings (c, "T15:8");
  check_free (c);
  lost_reset (&lost);
  return d;
}

static int
split (struct bdev *d, struct heal_result *res, struct check **c, struct err *err)
{
  int r = check_run (d, NULL, c, err);

  memset (res, 0, sizeof *res);
  assert_int_equal (r, 0);
  /* What an earlier one that failed left: leaks, and flags that cost a copy, at worst. */
  assert_int_equal ((*c)->findings.per_severity[SEV_FATAL], 0);
  assert_int_equal ((*c)->findings.per_severity[SEV_CORRUPT],
                    (*c)->findings.totals[FINDING_L2_COPIED_WRONG]);
  r = heal_run (d, *c, REPAIR_REFCOUNTS, NULL, res, err);
  if (r == 0) {
    check_free (*c);
    *c = NULL;
    r = check_run (d, NULL, c, err);
  }
  return r < 0 ? r : heal_split (d, c, NULL, res, err);
}

/* Both the first user and the second read as before. */
static void
assert_guest (struct bdev *d)
{
  struct image_options iopts = { .read_only = true };
  struct err err = { 0 };
  struct bdev *view;
  uint8_t b[CS];

  assert_ok (image_open (d, &iopts, &view, &err), &err);
  for (unsigned i = 0; i < 28; i = i == 7 ? 20 : i + 1) {
    uint8_t want = i % 20 < 4 ? 1 : 2;

    assert_ok (bdev_pread (view, b, CS, (uint64_t) i * CS, &err), &err);
    assert_true (b[0] == want && b[CS - 1] == want);
  }
  bdev_unref (view);
}

static void
splits_all (void **state)
{
  struct bdev *d = shared ();
  struct heal_result res;
  struct err err = { 0 };
  struct check *c;

  assert_ok (split (d, &res, &c, &err), &err);
  assert_int_equal (res.clusters_split, 8);
  assert_int_equal (res.clusters_unsplit, 0);
  assert_findings (c, "");
  assert_guest (d);
  check_free (c);
  bdev_unref (d);
}

/* A device that has room for so many more clusters only. */
static void
no_room (void **state)
{
  struct bdev *d = shared ();

  for (unsigned room = 0; room < 9; ++room) {
    struct bdev *fixed;
    struct heal_result res;
    struct err err = { 0 };
    struct check *c;
    uint64_t size = ROUND_UP (bdev_size (d), CS) + (uint64_t) room * CS;
    CLEANUP_FREE uint8_t *bytes = calloc (1, size);

    assert_ok (bdev_pread (d, bytes, bdev_size (d), 0, &err), &err);
    assert_ok (mem_new ("fixed", size, false, &fixed, &err), &err);
    assert_ok (bdev_pwrite (fixed, bytes, size, 0, 0, &err), &err);
    assert_ok (split (fixed, &res, &c, &err), &err);
    assert_int_equal (res.clusters_split + res.clusters_unsplit, 8);
    assert_true (res.clusters_split >= MIN (room, 8));
    assert_true (room > 0 || res.clusters_unsplit > 0);
    assert_int_equal (c->findings.totals[FINDING_CLUSTER_SHARED], res.clusters_unsplit);
    assert_false (findings_any (&c->findings, SEV_LEAK));
    assert_guest (fixed);
    check_free (c);
    bdev_unref (fixed);
  }
  bdev_unref (d);
}

/* Every write fails once: no guest byte has changed, and the next start ends well. */
static void
faults (void **state)
{
  struct bdev *d = shared ();
  bool fired = true;

  for (unsigned n = 1; fired; ++n) {
    struct bdev *copy, *faulty;
    struct heal_result res;
    struct err err = { 0 };
    struct check *c = NULL;
    int r;

    assert_ok (mem_copy_of (d, &copy, &err), &err);
    assert_ok (fault_new (copy, n, FAULT_ONCE, &faulty, &err), &err);
    r = split (faulty, &res, &c, &err);
    fired = fault_fired (faulty);
    assert_true (fired || r == 0);
    check_free (c);
    bdev_unref (faulty);
    err_clear (&err);
    assert_guest (copy);
    assert_ok (split (copy, &res, &c, &err), &err);
    assert_findings (c, "");
    assert_guest (copy);
    check_free (c);
    bdev_unref (copy);
    assert_true (n < 1000);
  }
  bdev_unref (d);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (splits_all),
    cmocka_unit_test (no_room),
    cmocka_unit_test (faults),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
