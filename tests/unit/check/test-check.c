/* Damage in header, mapping, snapshots, bitmaps and encryption header: each is
 * found, and nothing else is.
 */
#include "unit/check/images.h"

#define COPIED ENTRY_COPIED
#define FAR (UINT64_C (1) << 40)

/* 1 MiB of data at the start, one cluster at 4 MiB. */
static struct bdev *
plain (void)
{
  return make_image ("cluster_size=65536", "8M",
                     "qemu-io -f qcow2 -c 'write -P 1 0 1M' -c 'write -P 2 4M 64k' \"$f\"");
}

/* Check d, which must show want; d is gone afterwards. */
static struct check *
check_and_drop (struct bdev *d, const char *want)
{
  struct check *c = check_image (d);

  assert_findings (c, want);
  bdev_unref (d);
  return c;
}

static void
expect (struct bdev *d, const char *want, bool incomplete)
{
  struct check *c = check_and_drop (d, want);

  assert_int_equal (c->incomplete, incomplete);
  check_free (c);
}

/* --- sound */

static void
test_sound (void **state)
{
  struct check *c = check_and_drop (plain (), "");

  assert_true (check_sound (c));
  assert_true (c->rt.usable);
  assert_int_equal (c->rt.states[0], RB_SOUND);
  assert_false (c->incomplete);
  assert_null (c->kept);
  assert_null (c->backing_name);
  assert_int_equal (c->stats.total_clusters, 128);
  assert_int_equal (c->stats.allocated_clusters, 17);
  assert_int_equal (c->stats.l2_tables, 1);
  assert_int_equal (ownermap_get (c->owners, 0), 1);
  assert_int_equal (ownermap_end (c->owners) * 65536, c->stats.image_end_off);
  check_free (c);
}

static void
test_not_qcow2 (void **state)
{
  struct bdev *d = plain ();
  struct err err = { 0 };
  struct check *c = NULL;

  put32 (d, 0, 0);
  assert_int_equal (check_run (d, NULL, &c, &err), -EINVAL);
  assert_non_null (strstr (err.msg, "magic"));
  assert_null (c);
  err_clear (&err);
  put32 (d, 0, HEADER_MAGIC);
  put64 (d, HEADER_OFF_INCOMPATIBLE, 1 << 9);
  assert_int_equal (check_run (d, NULL, &c, &err), -ENOTSUP);
  bdev_unref (d);
  for (uint64_t size = 0; size < 200; size += 50) {
    err_clear (&err);
    assert_ok (mem_new ("small", size, false, &d, &err), &err);
    assert_int_equal (check_run (d, NULL, &c, &err), -EINVAL);
    bdev_unref (d);
  }
}

static void
test_cancel_and_limits (void **state)
{
  struct bdev *d = plain ();
  struct progress p = { .cancelled = true };
  struct check_options opts = { .progress = &p };
  struct err err = { 0 };
  struct check *c = NULL;

  assert_int_equal (check_run (d, &opts, &c, &err), -ECANCELED);
  err_clear (&err);
  opts = (struct check_options) { .memory_limit = 20000 };
  assert_int_equal (check_run (d, &opts, &c, &err), -ENOMEM);
  assert_non_null (strstr (err.msg, "limit"));
  bdev_unref (d);
}

/* --- header */

static void
test_header_bits (void **state)
{
  struct bdev *d = plain ();

  put64 (d, HEADER_OFF_INCOMPATIBLE, INCOMPAT_DIRTY | INCOMPAT_CORRUPT);
  expect (d, "H01:1 H02:1", false);
  d = plain ();
  put64 (d, HEADER_OFF_AUTOCLEAR, 1 << 5);
  expect (d, "H08:1", true);
  d = plain ();
  put64 (d, HEADER_OFF_COMPATIBLE, 1 << 5);
  expect (d, "", true);
}

static void
test_extensions (void **state)
{
  struct bdev *d = plain ();
  uint32_t off = get32 (d, HEADER_OFF_HEADER_LENGTH);

  put32 (d, off, EXT_FEATURE_NAMES);
  put32 (d, off + 4, 65536);
  expect (d, "H03:1", true);
  d = plain ();
  put32 (d, off, 0x12345678);           /* unknown: may own clusters */
  put32 (d, off + 4, 8);
  put64 (d, off + 16, 0);
  expect (d, "", true);
}

static void
test_backing_name (void **state)
{
  struct bdev *d = make_image ("cluster_size=4096", "1M",
                               "qemu-img create -q -f raw base.raw 1M; "
                               "qemu-img rebase -u -f qcow2 -F raw -b base.raw \"$f\"");
  struct check *c = check_image (d);

  assert_findings (c, "");
  assert_string_equal (c->backing_name, "base.raw");
  check_free (c);
  put64 (d, HEADER_OFF_BACKING_OFF, 4090);
  expect (bdev_ref (d), "H04:1", false);
  put64 (d, HEADER_OFF_BACKING_OFF, UINT64_MAX - 3);
  expect (bdev_ref (d), "H04:1", false);
  put64 (d, HEADER_OFF_BACKING_OFF, 1024);
  put32 (d, HEADER_OFF_BACKING_OFF + 8, 1024);
  expect (d, "H04:1", false);
}

/* Without its L1 table the image holds only header and refcount structures. */
static void
test_l1_place (void **state)
{
  static const uint64_t places[] = { 0x30001, 0x30200, FAR, UINT64_MAX - 65535, 0,
                                     UINT64_C (1) << 63 };

  for (unsigned i = 0; i < sizeof places / sizeof *places; ++i) {
    struct bdev *d = plain ();
    struct check *c;

    put64 (d, HEADER_OFF_L1_TABLE, places[i]);
    c = check_and_drop (d, "H05:1 R02:19 O01:2 O02:1");
    assert_true (c->incomplete);
    assert_true (findings_any (&c->findings, SEV_FATAL));
    assert_int_equal (ownermap_end (c->kept), ownermap_end (c->owners) + 19);
    check_free (c);
  }
}

static void
test_l1_size (void **state)
{
  struct bdev *d = plain ();

  put32 (d, HEADER_OFF_L1_SIZE, (MAX_L1_BYTES / 8) + 1);
  expect (bdev_ref (d), "H07:1", true);
  put32 (d, HEADER_OFF_L1_SIZE, UINT32_MAX);
  expect (bdev_ref (d), "H07:1", true);
  put32 (d, HEADER_OFF_L1_SIZE, 0);
  expect (bdev_ref (d), "H06:1", false);
  put32 (d, HEADER_OFF_L1_SIZE, 1);
  put64 (d, HEADER_OFF_SIZE, UINT64_C (1) << 33);
  expect (bdev_ref (d), "H06:1", false);
  put64 (d, HEADER_OFF_SIZE, UINT64_MAX);
  expect (d, "H06:1", false);
}

/* --- L1 entries */

static void
test_l1_entries (void **state)
{
  struct bdev *d = plain ();
  uint64_t at = l1_place (d, 0), good = get64 (d, at);
  struct check *c;

  put64 (d, at, good | 1);
  expect (bdev_ref (d), "T01:1", true);
  put64 (d, at, good | UINT64_C (1) << 60);
  expect (bdev_ref (d), "T01:1", true);
  put64 (d, at, COPIED);
  expect (bdev_ref (d), "T01:1 R02:18 O01:1 O02:1", true);
  put64 (d, at, good + 512);
  expect (bdev_ref (d), "T02:1 R02:18 O01:1 O02:1", true);
  put64 (d, at, COPIED | FAR);
  c = check_image (d);
  assert_findings (c, "T03:1 R02:18 O01:1 O02:1");
  assert_int_equal (first_run (c, FINDING_L1_ENTRY_OUTSIDE)->found, COPIED | FAR);
  assert_int_equal (first_run (c, FINDING_L1_ENTRY_OUTSIDE)->guest_len, UINT64_C (1) << 29);
  check_free (c);
  /* Its own L1 table: claimed, not followed, and now referenced twice. */
  put64 (d, at, COPIED | get64 (d, HEADER_OFF_L1_TABLE));
  expect (bdev_ref (d), "T04:1 T21:1 R01:1 R02:18 O01:1 O02:1", true);
  bdev_unref (d);
}

static void
test_l2_table_shared (void **state)
{
  struct bdev *d = make_image ("cluster_size=4096", "8M",
                               "qemu-io -f qcow2 -c 'write 0 64k' -c 'write 2M 4k' \"$f\"");
  uint64_t good = get64 (d, l1_place (d, 0));
  struct check *c;

  put64 (d, l1_place (d, 1), good & ~COPIED);
  put64 (d, l1_place (d, 0), good & ~COPIED);
  /* The second table and its cluster leak; the first and its 16 have two references. */
  c = check_and_drop (d, "T05:1 T22:16 R01:17 R02:2 O01:1 O02:1");
  assert_int_equal (first_run (c, FINDING_L2_TABLE_SHARED)->index, 1);
  assert_int_equal (first_run (c, FINDING_L2_COPIED_WRONG)->count, 16);
  assert_int_equal (c->stats.l2_tables, 1);
  assert_int_equal (c->stats.allocated_clusters, 32);
  check_free (c);
}

/* --- L2 entries */

static void
test_l2_entries (void **state)
{
  struct bdev *d = plain ();
  uint64_t at = l2_place (d, 0, 3), good = get64 (d, at);
  struct check *c;

  put64 (d, at, good | 4);
  expect (bdev_ref (d), "T11:1", true);
  put64 (d, at, 4);                     /* reserved bits where nothing is allocated */
  expect (bdev_ref (d), "T11:1 R02:1", true);
  put64 (d, at, good + 512);
  expect (bdev_ref (d), "T12:1 R02:1 O02:1", true);
  put64 (d, at, COPIED | FAR);
  expect (bdev_ref (d), "T13:1 R02:1 O02:1", true);
  put64 (d, at, COPIED | FAR | L2E_ZERO);
  expect (bdev_ref (d), "T13:1 R02:1 O02:1", true);
  put64 (d, at, COPIED | bdev_size (d));
  expect (bdev_ref (d), "T13:1 R02:1 O02:1", true);
  put64 (d, at, L2E_ZERO);              /* sound, but what it had leaks */
  expect (bdev_ref (d), "R02:1", false);
  put64 (d, at, good | L2E_ZERO);       /* preallocated zero cluster */
  expect (bdev_ref (d), "", false);
  put64 (d, at, L2E_COMPRESSED | FAR);
  expect (bdev_ref (d), "T13:1 R02:1 O02:1", true);
  put64 (d, at, COPIED | get64 (d, HEADER_OFF_L1_TABLE));
  c = check_image (d);
  assert_findings (c, "T14:1 T22:1 R01:1 R02:1 O02:1");
  assert_int_equal (first_run (c, FINDING_L2_ENTRY_OVERLAP)->guest_off, 3 * 65536);
  assert_int_equal (first_run (c, FINDING_L2_ENTRY_OVERLAP)->index, 3);
  assert_false (c->incomplete);
  check_free (c);
  put64 (d, at, L2E_COMPRESSED | 100);  /* a stream in the header */
  expect (bdev_ref (d), "T14:1 R01:1 R02:1 O02:1", false);
  bdev_unref (d);
}

/* A run of entries that crosses the end of the file, and one over the offsets' end. */
static void
test_runs_at_the_end (void **state)
{
  struct bdev *d = plain ();
  uint64_t last = bdev_size (d) - 65536;
  struct check *c;

  for (unsigned i = 0; i < 20; ++i)
    put64 (d, l2_place (d, 0, 100 + i), (last + i * 65536));
  c = check_image (d);
  assert_int_equal (first_run (c, FINDING_L2_ENTRY_OUTSIDE)->index, 101);
  assert_int_equal (first_run (c, FINDING_L2_ENTRY_OUTSIDE)->count, 19);
  assert_int_equal (c->findings.totals[FINDING_L2_ENTRY_OUTSIDE], 19);
  check_free (c);
  for (unsigned i = 0; i < 20; ++i)
    put64 (d, l2_place (d, 0, 100 + i), L2E_OFF_MASK + 512 - 65536 * (10 - (uint64_t) i));
  c = check_image (d);
  assert_int_equal (first_run (c, FINDING_L2_ENTRY_OUTSIDE)->index, 100);
  assert_int_equal (first_run (c, FINDING_L2_ENTRY_OUTSIDE)->count, 10);
  assert_int_equal (first_run (c, FINDING_L2_ENTRY_RESERVED)->index, 110);
  assert_int_equal (first_run (c, FINDING_L2_ENTRY_RESERVED)->count, 10);
  check_free (c);
  bdev_unref (d);
}

static void
test_partial_last_cluster (void **state)
{
  struct bdev *d = plain ();
  struct err err = { 0 };
  uint64_t size = bdev_size (d);

  assert_ok (bdev_resize (d, size - 65535, &err), &err);
  expect (bdev_ref (d), "T10:1", false);
  assert_ok (bdev_resize (d, size - 65536, &err), &err);
  expect (d, "T13:1 R03:1", true);
}

static void
test_version_2_zero_flag (void **state)
{
  struct bdev *d = make_image ("compat=0.10", "8M", "qemu-io -f qcow2 -c 'write 0 1M' \"$f\"");
  uint64_t at = l2_place (d, 0, 5), good = get64 (d, at);

  put64 (d, at, good | L2E_ZERO);
  expect (bdev_ref (d), "T11:1", true);
  put64 (d, at, L2E_ZERO);
  expect (d, "T11:1 R02:1", true);
}

static void
test_cluster_shared (void **state)
{
  struct bdev *d = plain ();
  struct check *c;

  for (unsigned i = 0; i < 2; ++i) {
    put64 (d, l2_place (d, 0, 3 + i), get64 (d, l2_place (d, 0, 3 + i)) & ~COPIED);
    put64 (d, l2_place (d, 0, 200 + i), get64 (d, l2_place (d, 0, 3 + i)));
  }
  c = check_and_drop (d, "T15:2 R01:2");
  assert_int_equal (c->findings.nr_runs[FINDING_CLUSTER_SHARED], 1);
  assert_int_equal (first_run (c, FINDING_CLUSTER_SHARED)->guest_off, 200 * 65536);
  assert_int_equal (first_run (c, FINDING_CLUSTER_SHARED)->guest_len, 2 * 65536);
  assert_int_equal (first_run (c, FINDING_CLUSTER_SHARED)->expected, 3 * 65536);
  assert_false (c->incomplete);
  check_free (c);
}

/* Snapshots share clusters as they should; a second user is seen all the same. */
static void
test_cluster_shared_beside_snapshots (void **state)
{
  struct bdev *d = make_image ("cluster_size=65536", "8M",
                               "qemu-io -f qcow2 -c 'write 0 1M' \"$f\"; "
                               "qemu-img snapshot -c a \"$f\"; "
                               "qemu-io -f qcow2 -c 'write 0 128k' \"$f\"");
  struct check *c = check_image (d);

  assert_findings (c, "");
  check_free (c);
  put64 (d, l2_place (d, 0, 50), get64 (d, l2_place (d, 0, 10)));
  c = check_and_drop (d, "T15:1 R01:1");
  assert_int_equal (first_run (c, FINDING_CLUSTER_SHARED)->guest_off, 50 * 65536);
  assert_int_equal (first_run (c, FINDING_CLUSTER_SHARED)->expected, 10 * 65536);
  check_free (c);
}

static void
test_subclusters (void **state)
{
  struct bdev *d = make_image ("extended_l2=on,cluster_size=65536", "8M",
                               "qemu-io -f qcow2 -c 'write 0 1M' -c 'write 2M 2k' \"$f\"");
  uint64_t at = l2_place (d, 0, 3), good = get64 (d, at);

  expect (bdev_ref (d), "", false);
  put64 (d, at + 8, UINT64_MAX);
  expect (bdev_ref (d), "T16:1", false);
  put64 (d, at + 8, 0);                 /* allocated, nothing in it: sound */
  expect (bdev_ref (d), "", false);
  put64 (d, at, 0);
  put64 (d, at + 8, 1);                 /* a subcluster of nothing */
  expect (bdev_ref (d), "T16:1 R02:1", false);
  put64 (d, at + 8, UINT64_C (1) << 32);
  expect (bdev_ref (d), "R02:1", false);
  put64 (d, at, good + 512);
  expect (bdev_ref (d), "T12:1 R02:1 O02:1", true);
  put64 (d, at, good | 1);              /* bit 0 is reserved here */
  expect (d, "T11:1", true);
}

static void
test_data_file (void **state)
{
  struct bdev *d = make_image ("data_file=data.raw", "8M",
                               "qemu-io -f qcow2 -c 'write 0 1M' -c 'write 2M 64k' \"$f\"");
  uint64_t at = l2_place (d, 0, 3), good = get64 (d, at);
  struct check *c = check_image (d);

  assert_findings (c, "");
  assert_int_equal (c->stats.allocated_clusters, 17);
  check_free (c);
  put64 (d, at, good & ~COPIED);
  expect (bdev_ref (d), "T22:1", false);
  put64 (d, at, L2E_COMPRESSED | 65536);
  expect (d, "T11:1", true);
}

static void
test_copied_flags (void **state)
{
  struct bdev *d = plain ();
  uint64_t at = l1_place (d, 0);
  struct check *c;

  put64 (d, at, get64 (d, at) & ~COPIED);
  for (unsigned i = 2; i < 7; ++i)
    put64 (d, l2_place (d, 0, i), get64 (d, l2_place (d, 0, i)) & ~COPIED);
  c = check_and_drop (d, "T21:1 T22:5");
  assert_int_equal (c->findings.nr_runs[FINDING_L2_COPIED_WRONG], 1);
  assert_int_equal (first_run (c, FINDING_L2_COPIED_WRONG)->guest_off, 2 * 65536);
  assert_int_equal (first_run (c, FINDING_L2_COPIED_WRONG)->expected, 1);
  check_free (c);

  d = make_image ("cluster_size=65536", "8M",
                  "qemu-io -f qcow2 -c 'write 0 1M' \"$f\"; qemu-img snapshot -c a \"$f\"");
  expect (bdev_ref (d), "", false);
  put64 (d, l1_place (d, 0), get64 (d, l1_place (d, 0)) | COPIED);
  put64 (d, l2_place (d, 0, 9), get64 (d, l2_place (d, 0, 9)) | COPIED);
  expect (d, "T21:1 T22:1", false);
}

static void
test_compressed_copied (void **state)
{
  struct bdev *d = make_image ("cluster_size=65536", "8M",
                               "qemu-io -f qcow2 -c 'write -c -P 3 0 64k' \"$f\"");
  uint64_t at = l2_place (d, 0, 0);

  expect (bdev_ref (d), "", false);
  put64 (d, at, get64 (d, at) | COPIED);
  expect (d, "T22:1", false);
}

/* What could not be followed may share a cluster whose refcount is too high, so
 * its entry must not have the flag.
 */
static void
test_copied_when_incomplete (void **state)
{
  struct bdev *d = plain ();
  uint64_t at = l2_place (d, 0, 3), ci = (get64 (d, at) & L2E_OFF_MASK) >> 16;
  struct check *c;

  put_refcount (d, ci, 2);
  expect (bdev_ref (d), "R02:1", false);
  put64 (d, l2_place (d, 0, 200), COPIED | FAR);
  c = check_image (d);
  assert_findings (c, "T13:1 T22:1 R02:1");
  assert_int_equal (first_run (c, FINDING_L2_COPIED_WRONG)->expected, 0);
  assert_false (check_copied (c, ci));
  assert_true (check_copied (c, ci + 1));
  check_free (c);
  put64 (d, at, get64 (d, at) & ~COPIED);
  expect (d, "T13:1 R02:1", true);
}

/* --- snapshots */

static struct bdev *
with_snapshots (void)
{
  return make_image ("cluster_size=65536", "8M",
                     "qemu-io -f qcow2 -c 'write 0 1M' \"$f\"; qemu-img snapshot -c one \"$f\"; "
                     "qemu-io -f qcow2 -c 'write 0 64k' \"$f\"; qemu-img snapshot -c two \"$f\"; "
                     "qemu-io -f qcow2 -c 'write 64k 64k' \"$f\"");
}

/* The tables are A (snapshot one), B (two) and C (active); 16 clusters D0..D15
 * are A's, of which B has E0 instead of D0, and C F1 instead of D1 too.
 */
static void
test_snapshots (void **state)
{
  struct bdev *d = with_snapshots ();
  uint64_t table = get64 (d, HEADER_OFF_SNAPSHOTS), second;
  uint64_t l1[2], entry[2];
  struct check *c = check_image (d);

  assert_findings (c, "");
  assert_int_equal (c->snapshots.len, 2);
  assert_string_equal (c->snapshots.ptr[1].name, "two");
  assert_int_equal (c->stats.l2_tables, 3);
  second = table + c->snapshots.ptr[1].entry_off;
  check_free (c);
  l1[0] = get64 (d, table);
  l1[1] = get64 (d, second);
  for (unsigned i = 0; i < 2; ++i)
    entry[i] = get64 (d, l1[i]);

  /* A bad entry in its L1 table: what the snapshot had loses an owner. */
  put64 (d, l1[0], entry[0] + 512);
  c = check_image (d);
  assert_findings (c, "T02:1 R02:17 O02:1");          /* A, D0 - D15 */
  assert_int_equal (first_run (c, FINDING_L1_ENTRY_UNALIGNED)->snapshot_index, 0);
  assert_true (c->incomplete);
  check_free (c);
  put64 (d, l1[0], entry[0]);
  put64 (d, l1[1], entry[1] + 512);
  expect (bdev_ref (d), "T02:1 R02:17 O02:1", true);  /* B, E0, D1 - D15; no T22 for E0 */
  put64 (d, l1[1], entry[1]);

  put64 (d, table, l1[0] + 512);
  expect (bdev_ref (d), "S03:1 R02:18 O01:1 O02:1", true);
  put64 (d, table, FAR);
  expect (bdev_ref (d), "S03:1 R02:18 O01:1 O02:1", true);
  put64 (d, table, UINT64_MAX - 65535);
  expect (bdev_ref (d), "S03:1 R02:18 O01:1 O02:1", true);
  put64 (d, table, get64 (d, l1_place (d, 0)) & L1E_OFF_MASK);  /* on C: not followed */
  expect (bdev_ref (d), "T21:1 S04:1 R01:1 R02:18 O01:1 O02:1", true);
  put64 (d, table, l1[0]);
  put64 (d, second, l1[0]);                     /* on another L1 table: followed */
  expect (bdev_ref (d), "S04:1 R01:3 R02:3 O01:1 O02:1", true);
  put64 (d, second, l1[1]);
  put32 (d, table + 8, MAX_L1_BYTES / 8 + 1);
  expect (bdev_ref (d), "S03:1 R02:18 O01:1 O02:1", true);
  bdev_unref (d);
}

static void
test_snapshot_table (void **state)
{
  struct bdev *d = with_snapshots ();
  uint64_t table = get64 (d, HEADER_OFF_SNAPSHOTS), second;
  struct check *c;

  put64 (d, HEADER_OFF_SNAPSHOTS, table + 8);
  expect (bdev_ref (d), "S01:1 R02:22 O01:2 O02:1", true);
  put64 (d, HEADER_OFF_SNAPSHOTS, FAR);
  expect (bdev_ref (d), "S01:1 R02:22 O01:2 O02:1", true);
  put64 (d, HEADER_OFF_SNAPSHOTS, 0);
  expect (bdev_ref (d), "S01:1 R02:22 O01:2 O02:1", true);
  put64 (d, HEADER_OFF_SNAPSHOTS, table);
  put32 (d, HEADER_OFF_NB_SNAPSHOTS, 65537);
  expect (bdev_ref (d), "S05:1", true);
  put32 (d, HEADER_OFF_NB_SNAPSHOTS, 2);
  c = check_image (d);
  second = table + c->snapshots.ptr[1].entry_off;
  check_free (c);
  put32 (d, second + 36, 15);
  expect (bdev_ref (d), "S06:1", false);
  put32 (d, second + 36, 16);
  put32 (d, table + 36, 1025);
  c = check_image (d);
  assert_findings (c, "S02:1 R02:21 O01:2 O02:1");
  assert_int_equal (first_run (c, FINDING_SNAPSHOT_ENTRY_BAD)->index, 0);
  assert_int_equal (c->snapshots.len, 0);
  check_free (c);
  bdev_unref (d);
}

/* A table that ends with the file, and a count that is too high: zeros are no snapshots. */
static void
test_snapshot_table_cut (void **state)
{
  struct bdev *d = with_snapshots ();
  uint64_t size = bdev_size (d);
  struct check *c;
  struct err err = { 0 };

  assert_ok (bdev_resize (d, size + 65536, &err), &err);
  put64 (d, HEADER_OFF_SNAPSHOTS, size);
  put32 (d, HEADER_OFF_NB_SNAPSHOTS, 2000);
  c = check_image (d);
  assert_int_equal (first_run (c, FINDING_SNAPSHOT_ENTRY_BAD)->index, 0);
  assert_int_equal (c->findings.totals[FINDING_SNAPSHOT_ENTRY_BAD], 1);
  assert_int_equal (c->snapshots.len, 0);
  check_free (c);
  bdev_unref (d);
}

/* --- bitmaps and encryption */

static struct bdev *
with_bitmap (void)
{
  return make_image ("cluster_size=65536", "8M",
                     "qemu-io -f qcow2 -c 'write 0 1M' \"$f\"; "
                     "qemu-img bitmap --add -g 512 \"$f\" b0; "
                     "qemu-io -f qcow2 -c 'write 2M 64k' \"$f\"; "
                     "qemu-img bitmap --add -g 65536 \"$f\" b1");
}

/* Where the data of an extension lies. */
static uint64_t
ext_place (struct bdev *d, uint32_t type)
{
  struct check *c = check_image (d);
  const struct header_ext *ext = header_find_ext (&c->header, type);
  uint64_t off = ext ? ext->host_off : 0;

  check_free (c);
  assert_true (off > 0);
  return off;
}

static void
test_bitmaps (void **state)
{
  struct bdev *d = with_bitmap ();
  uint64_t ext = ext_place (d, EXT_BITMAPS), dir = get64 (d, ext + 16), table = get64 (d, dir);
  uint64_t data = get64 (d, table);
  struct check *c = check_image (d);

  assert_findings (c, "");
  assert_int_equal (ownermap_get (c->owners, dir >> 16), 1);
  assert_int_equal (ownermap_get (c->owners, table >> 16), 1);
  if (data)
    assert_int_equal (ownermap_get (c->owners, data >> 16), 1);
  check_free (c);

  put64 (d, ext + 16, dir + 512);
  c = check_image (d);
  assert_true (findings_has (&c->findings, FINDING_BITMAPS_DAMAGED));
  assert_true (findings_has (&c->findings, FINDING_REFCOUNT_HIGH));
  assert_true (c->incomplete);
  check_free (c);
  put64 (d, ext + 16, dir);
  put64 (d, dir, table + 512);
  c = check_image (d);
  assert_int_equal (first_run (c, FINDING_BITMAP_DAMAGED)->index, 0);
  assert_true (c->incomplete);
  check_free (c);
  put64 (d, dir, table);
  put64 (d, table, 2);                  /* a reserved bit */
  c = check_image (d);
  assert_int_equal (first_run (c, FINDING_BITMAP_DAMAGED)->found, 2);
  check_free (c);
  put64 (d, table, get64 (d, HEADER_OFF_L1_TABLE));     /* data on the L1 table */
  c = check_image (d);
  assert_true (findings_has (&c->findings, FINDING_BITMAP_DAMAGED));
  assert_true (findings_has (&c->findings, FINDING_REFCOUNT_LOW));
  assert_false (findings_has (&c->findings, FINDING_L1_OUTSIDE));
  check_free (c);
  bdev_unref (d);
}

/* Inconsistent bitmaps keep what they have and are no finding, whatever state
 * they are in.
 */
static void
test_inconsistent_bitmaps (void **state)
{
  struct bdev *d = with_bitmap ();
  uint64_t ext = ext_place (d, EXT_BITMAPS), dir = get64 (d, ext + 16), table = get64 (d, dir);
  struct check *c;

  put64 (d, HEADER_OFF_AUTOCLEAR, 0);
  c = check_image (d);
  assert_findings (c, "");
  assert_false (c->incomplete);
  assert_int_equal (ownermap_get (c->owners, dir >> 16), 1);
  assert_int_equal (ownermap_get (c->owners, table >> 16), 1);
  check_free (c);
  put_refcount (d, table >> 16, 0);
  c = check_image (d);
  assert_findings (c, "");
  assert_int_equal (ownermap_get (c->owners, table >> 16), 0);
  check_free (c);
  put_refcount (d, table >> 16, 1);
  zero_bytes (d, rt_place (d, 0), 8);   /* no refcounts: they are not handed out */
  c = check_image (d);
  assert_findings (c, "R16:1");
  assert_int_equal (ownermap_get (c->owners, table >> 16), 1);
  check_free (c);
  bdev_unref (d);
  d = with_bitmap ();
  put64 (d, HEADER_OFF_AUTOCLEAR, 0);
  put64 (d, dir, FAR);                  /* what it owned is unknown */
  c = check_image (d);
  assert_true (c->incomplete);
  assert_false (findings_has (&c->findings, FINDING_BITMAP_DAMAGED));
  assert_true (findings_has (&c->findings, FINDING_REFCOUNT_HIGH));
  check_free (c);
  bdev_unref (d);
}

static void
test_encryption_header (void **state)
{
  struct bdev *d = make_image ("encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=200 "
                               "--object secret,id=s,data=abc", "8M", "");
  uint64_t ext = ext_place (d, EXT_CRYPTO_HEADER), len = get64 (d, ext + 8);
  uint64_t clusters = DIV_ROUND_UP (len, 65536);
  char want[64];

  snprintf (want, sizeof want, "X03:1 R02:%llu", (unsigned long long) clusters);
  expect (bdev_ref (d), "", false);
  put64 (d, ext, get64 (d, ext) + 512);
  expect (bdev_ref (d), want, true);
  put64 (d, ext, FAR);
  expect (bdev_ref (d), want, true);
  put64 (d, ext + 8, UINT64_MAX);
  expect (bdev_ref (d), want, true);
  put32 (d, ext - 8, EXT_BACKING_FORMAT);       /* the extension is gone */
  expect (d, want, true);
}

/* --- what cannot be read */

/* A device that fails to read [bad_off, bad_off + bad_len). */
struct bad_dev {
  struct bdev d;
  struct bdev *under;
  uint64_t bad_off, bad_len;
};

static int
bad_pread (struct bdev *d, void *buf, size_t len, uint64_t off, struct err *err)
{
  struct bad_dev *b = (struct bad_dev *) d;

  if (ranges_overlap (off, len, b->bad_off, b->bad_len))
    return err_set (err, EIO, "bad sector");
  return bdev_pread (b->under, buf, len, off, err);
}

static void
bad_close (struct bdev *d)
{
  bdev_unref (((struct bad_dev *) d)->under);
  free (d);
}

static struct bdev *
with_bad_range (struct bdev *under, uint64_t off, uint64_t len)
{
  static const struct bdev_ops ops = { .kind = "bad", .pread = bad_pread, .close = bad_close };
  struct bad_dev *b = calloc (1, sizeof *b);
  struct err err = { 0 };

  assert_non_null (b);
  assert_ok (bdev_init (&b->d, &ops, "bad", bdev_size (under), false, false, &err), &err);
  b->under = bdev_ref (under);
  b->bad_off = off;
  b->bad_len = len;
  return &b->d;
}

/* They are not damaged, so no repair may drop them. */
static void
expect_unreadable_bitmaps (void)
{
  struct bdev *d = with_bitmap ();
  uint64_t dir = get64 (d, ext_place (d, EXT_BITMAPS) + 16);
  uint64_t places[] = { dir, get64 (d, dir) };

  for (size_t i = 0; i < 2; ++i) {
    struct bdev *bad = with_bad_range (d, places[i], 1);
    struct check *c = check_image (bad);

    assert_true (findings_has (&c->findings, FINDING_BITMAP_UNREADABLE));
    assert_false (findings_has (&c->findings, FINDING_BITMAPS_DAMAGED));
    assert_false (findings_has (&c->findings, FINDING_BITMAP_DAMAGED));
    assert_false (c->bitmap_dir_damaged);
    for (size_t j = 0; j < c->bitmaps.len; ++j)
      assert_false (c->bitmaps.ptr[j].damaged);
    assert_true (c->incomplete);
    check_free (c);
    bdev_unref (bad);
  }
  bdev_unref (d);
}

static void
test_unreadable (void **state)
{
  struct bdev *d = with_snapshots ();
  uint64_t snapshots = get64 (d, HEADER_OFF_SNAPSHOTS), rt = get64 (d, HEADER_OFF_RT);
  struct err err = { 0 };
  struct check *c = NULL;
  struct bdev *bad;

  expect (with_bad_range (d, l1_place (d, 0), 1), "T07:1 R02:17 O01:1 O02:1", true);
  expect (with_bad_range (d, l2_place (d, 0, 9), 1), "T06:1 R02:16 O02:1", true);
  expect (with_bad_range (d, snapshots, 1), "S08:1 R02:21 O01:2 O02:1", true);
  expect (with_bad_range (d, get64 (d, snapshots), 1), "S03:1 R02:17 O02:1", true);
  expect (with_bad_range (d, rt, 1), "R17:1", false);
  expect_unreadable_bitmaps ();
  expect (with_bad_range (d, get64 (d, rt), 1), "R24:1", false);
  bad = with_bad_range (d, 60, 1);
  assert_int_equal (check_run (bad, NULL, &c, &err), -EIO);
  bdev_unref (bad);
  bdev_unref (d);
}

/* Small tables are read together; one bad sector costs one of them. */
static void
test_bad_sector_costs_one_table (void **state)
{
  struct bdev *d = make_image ("cluster_size=512,preallocation=metadata", "1M", "");
  uint64_t second = get64 (d, l1_place (d, 1)) & L1E_OFF_MASK;
  struct check *c = check_image (d);
  struct bdev *bad;

  assert_findings (c, "");
  assert_int_equal (c->stats.l2_tables, 32);
  check_free (c);
  bad = with_bad_range (d, second, 1);
  c = check_and_drop (bad, "T06:1 R02:64 O02:1");
  assert_int_equal (first_run (c, FINDING_L2_TABLE_UNREADABLE)->guest_off, 32768);
  assert_int_equal (c->bad.len, 1);
  assert_true (c->bad.ptr[0].in_l1);
  assert_int_equal (c->bad.ptr[0].index, 1);
  assert_int_equal (c->bad.ptr[0].fix, BAD_UNREADABLE);
  check_free (c);
  bdev_unref (d);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_sound),
    cmocka_unit_test (test_not_qcow2),
    cmocka_unit_test (test_cancel_and_limits),
    cmocka_unit_test (test_header_bits),
    cmocka_unit_test (test_extensions),
    cmocka_unit_test (test_backing_name),
    cmocka_unit_test (test_l1_place),
    cmocka_unit_test (test_l1_size),
    cmocka_unit_test (test_l1_entries),
    cmocka_unit_test (test_l2_table_shared),
    cmocka_unit_test (test_l2_entries),
    cmocka_unit_test (test_runs_at_the_end),
    cmocka_unit_test (test_partial_last_cluster),
    cmocka_unit_test (test_version_2_zero_flag),
    cmocka_unit_test (test_cluster_shared),
    cmocka_unit_test (test_cluster_shared_beside_snapshots),
    cmocka_unit_test (test_subclusters),
    cmocka_unit_test (test_data_file),
    cmocka_unit_test (test_copied_flags),
    cmocka_unit_test (test_compressed_copied),
    cmocka_unit_test (test_copied_when_incomplete),
    cmocka_unit_test (test_snapshots),
    cmocka_unit_test (test_snapshot_table),
    cmocka_unit_test (test_snapshot_table_cut),
    cmocka_unit_test (test_bitmaps),
    cmocka_unit_test (test_inconsistent_bitmaps),
    cmocka_unit_test (test_encryption_header),
    cmocka_unit_test (test_unreadable),
    cmocka_unit_test (test_bad_sector_costs_one_table),
  };

  if (run ("command -v qemu-img && command -v qemu-io") != 0) {
    print_message ("SKIP: qemu-img or qemu-io is not installed\n");
    return 0;
  }
  return cmocka_run_group_tests_name ("check", tests, NULL, NULL);
}
