/* Who is right, and what becomes of the entries that are not: check->bad and
 * check->conflicts for each rule of the check.
 */
#include "unit/check/images.h"

#include "base/cleanup.h"

#define COPIED ENTRY_COPIED
#define FAR (UINT64_C (1) << 40)

/* Four L2 tables of 2 MiB each; 256 KiB in the first, 64 KiB in each of the others. */
static struct bdev *
four_tables (const char *more_opts)
{
  char opts[200];

  snprintf (opts, sizeof opts, "cluster_size=4096%s", more_opts);
  return make_image (opts, "8M",
                     "qemu-io -f qcow2 -c 'write -P 1 0 256k' -c 'write -P 2 2M 64k' "
                     "-c 'write -P 3 4M 64k' -c 'write -P 4 6M 64k' \"$f\"");
}

/* Bytes that are nothing. */
static void
put_noise (struct bdev *d, uint64_t off, size_t n, uint64_t seed)
{
  for (size_t i = 0; i < n; i += 8)
    put64 (d, off + i, test_random (&seed) | 2);
}

/* The run of table (host offset) that covers that entry, or NULL. */
static const struct bad_run *
bad_at (const struct check *c, bool in_l1, uint64_t table, uint64_t index)
{
  const struct bad_run *found = NULL;

  for (size_t i = 0; i < c->bad.len; ++i) {
    const struct bad_run *b = &c->bad.ptr[i];

    if (b->in_l1 != in_l1 || b->table_host_off != table || index < b->index ||
        index >= b->index + (uint64_t) b->count)
      continue;
    assert_null (found);        /* each entry has one fate */
    found = b;
  }
  return found;
}

#define assert_bad(c, in_l1, table, index, id, what)                    \
  do {                                                                  \
    const struct bad_run *b_ = bad_at (c, in_l1, table, index);         \
    if (!b_)                                                            \
      print_error ("%s\n", findings_text (c));                          \
    assert_non_null (b_);                                               \
    assert_string_equal (finding_kinds[b_->why].code, id);              \
    assert_int_equal (b_->fix, what);                                   \
  } while (0)

static uint64_t
l1_table (struct bdev *d)
{
  return get64 (d, HEADER_OFF_L1_TABLE);
}

static uint64_t
host_of (struct bdev *d, uint64_t i, uint64_t j)
{
  return get64 (d, l2_place (d, i, j)) & L2E_OFF_MASK;
}

/* --- L1 entries */

/* An L1 entry leads into guest data: it loses, the data stays. */
static void
test_l1_into_data (void **state)
{
  struct bdev *d = four_tables ("");
  uint64_t data = host_of (d, 0, 7);
  struct check *c;

  put_noise (d, data, 4096, 5);
  put64 (d, l1_place (d, 2), COPIED | data);
  c = check_image (d);
  assert_true (findings_has (&c->findings, FINDING_L2_TABLE_NONSENSE));
  assert_false (findings_has (&c->findings, FINDING_L2_ENTRY_OVERLAP));
  assert_bad (c, true, l1_table (d), 2, "T08", BAD_LOST);
  assert_int_equal (c->bad.len, 1);     /* nothing about its 512 entries */
  assert_int_equal (c->nr_conflicts, 1);
  assert_int_equal (c->conflicts.ptr[0].host_off, data);
  assert_int_equal (c->conflicts.ptr[0].winner.kind, OWNER_DATA);
  assert_int_equal (c->conflicts.ptr[0].winner.guest_off, 7 * 4096);
  assert_int_equal (c->conflicts.ptr[0].loser.kind, OWNER_L2_TABLE);
  assert_int_equal (c->conflicts.ptr[0].loser.index, 2);
  assert_true (c->incomplete);
  check_free (c);
  bdev_unref (d);
}

/* A table full of nonsense that is nobody else's keeps what can be right. */
static void
test_nonsense_without_rival (void **state)
{
  struct bdev *d = four_tables ("");
  uint64_t table = l2_place (d, 0, 0), first = host_of (d, 0, 0);
  struct check *c;

  put_noise (d, table + 8, 4096 - 8, 9);
  c = check_image (d);
  assert_false (findings_has (&c->findings, FINDING_L2_TABLE_NONSENSE));
  assert_null (bad_at (c, true, l1_table (d), 0));
  assert_null (bad_at (c, false, table, 0));
  assert_non_null (bad_at (c, false, table, 1));
  assert_int_equal (ownermap_get (c->owners, first / 4096), 1);
  check_free (c);
  bdev_unref (d);
}

static void
test_l1_into_metadata (void **state)
{
  struct bdev *d = four_tables ("");
  struct check *c;

  put64 (d, l1_place (d, 1), COPIED | l1_table (d));
  c = check_image (d);
  assert_bad (c, true, l1_table (d), 1, "T04", BAD_LOST);
  assert_int_equal (c->nr_conflicts, 1);
  assert_int_equal (c->conflicts.ptr[0].winner.kind, OWNER_L1_TABLE);
  assert_int_equal (c->conflicts.ptr[0].winner.snapshot_index, FINDING_ACTIVE);
  assert_int_equal (c->conflicts.ptr[0].loser.kind, OWNER_L2_TABLE);
  check_free (c);
  bdev_unref (d);
}

/* T05: order, then COPIED, then the first. */
static void
test_twins (void **state)
{
  struct bdev *d = four_tables ("");
  uint64_t e[4], l1 = l1_table (d);
  struct check *c;

  for (unsigned i = 0; i < 4; ++i)
    e[i] = get64 (d, l1_place (d, i));
  put64 (d, l1_place (d, 0), e[2]);     /* 2 0 . .: in order at its own place only */
  c = check_image (d);
  assert_bad (c, true, l1, 0, "T05", BAD_LOST);
  assert_null (bad_at (c, true, l1, 2));
  assert_int_equal (c->conflicts.ptr[0].winner.index, 2);
  assert_int_equal (c->conflicts.ptr[0].loser.index, 0);
  check_free (c);
  put64 (d, l1_place (d, 0), e[0]);
  put64 (d, l1_place (d, 3), e[1]);     /* 0 1 2 1 */
  c = check_image (d);
  assert_bad (c, true, l1, 3, "T05", BAD_LOST);
  assert_null (bad_at (c, true, l1, 1));
  check_free (c);
  put64 (d, l1_place (d, 3), e[3]);
  put64 (d, l1_place (d, 1), e[2] & ~COPIED);   /* 0 2 2 3: neither is in order */
  c = check_image (d);
  assert_bad (c, true, l1, 1, "T05", BAD_LOST);
  assert_null (bad_at (c, true, l1, 2));
  check_free (c);
  put64 (d, l1_place (d, 1), e[2]);
  c = check_image (d);
  assert_bad (c, true, l1, 2, "T05", BAD_LOST);
  assert_null (bad_at (c, true, l1, 1));
  check_free (c);
  for (unsigned i = 0; i < 4; ++i)
    put64 (d, l1_place (d, i), e[1]);
  c = check_image (d);
  assert_int_equal (c->findings.totals[FINDING_L2_TABLE_SHARED], 3);
  assert_int_equal (c->nr_conflicts, 3);
  check_free (c);
  bdev_unref (d);
}

static void
test_l1_reserved (void **state)
{
  struct bdev *d = four_tables ("");
  uint64_t at = l1_place (d, 0), good = get64 (d, at), l1 = l1_table (d);
  struct check *c;

  put64 (d, at, good | 1);
  c = check_image (d);
  assert_bad (c, true, l1, 0, "T01", BAD_RESERVED);
  assert_int_equal (c->bad.len, 1);
  check_free (c);
  put64 (d, at, (good | 1) + 512);
  c = check_image (d);
  assert_bad (c, true, l1, 0, "T02", BAD_LOST);
  check_free (c);
  put64 (d, at, good | 1);
  put_noise (d, good & L1E_OFF_MASK, 4096, 3);
  c = check_image (d);
  assert_bad (c, true, l1, 0, "T01", BAD_LOST);
  check_free (c);
  put64 (d, at, COPIED);
  c = check_image (d);
  assert_bad (c, true, l1, 0, "T01", BAD_LOST);
  check_free (c);
  bdev_unref (d);
}

/* --- L2 entries */

static void
test_l2_reserved (void **state)
{
  struct bdev *d = four_tables ("");
  uint64_t at = l2_place (d, 0, 3), good = get64 (d, at), table = l2_place (d, 0, 0);
  struct check *c;

  put64 (d, at, good | 4);
  c = check_image (d);
  assert_bad (c, false, table, 3, "T11", BAD_RESERVED);
  check_free (c);
  put64 (d, at, get64 (d, l2_place (d, 0, 4)) | 4);     /* somebody else's */
  c = check_image (d);
  assert_bad (c, false, table, 3, "T11", BAD_LOST);
  check_free (c);
  put64 (d, at, 4);
  c = check_image (d);
  assert_bad (c, false, table, 3, "T11", BAD_LOST);
  check_free (c);
  put64 (d, at, (good + 512) | 4);
  c = check_image (d);
  assert_bad (c, false, table, 3, "T12", BAD_LOST);
  check_free (c);
  put64 (d, at, FAR | 4);
  c = check_image (d);
  assert_bad (c, false, table, 3, "T13", BAD_LOST);
  check_free (c);
  put64 (d, at, l1_table (d) | 4);
  c = check_image (d);
  assert_bad (c, false, table, 3, "T14", BAD_LOST);
  assert_int_equal (c->conflicts.ptr[0].winner.kind, OWNER_L1_TABLE);
  assert_int_equal (c->conflicts.ptr[0].loser.guest_off, 3 * 4096);
  check_free (c);
  bdev_unref (d);
}

static void
test_l2_into_l2 (void **state)
{
  struct bdev *d = four_tables ("");
  uint64_t table = l2_place (d, 0, 0), other = l2_place (d, 1, 0);
  struct check *c;

  put64 (d, l2_place (d, 0, 3), COPIED | other);
  put64 (d, l2_place (d, 2, 5), L2E_COMPRESSED | other);
  c = check_image (d);
  assert_bad (c, false, table, 3, "T14", BAD_LOST);
  assert_bad (c, false, l2_place (d, 2, 0), 5, "T14", BAD_LOST);
  assert_null (bad_at (c, true, l1_table (d), 1));
  assert_int_equal (c->nr_conflicts, 2);
  assert_int_equal (c->conflicts.ptr[0].winner.kind, OWNER_L2_TABLE);
  assert_int_equal (c->conflicts.ptr[0].winner.index, 1);
  check_free (c);
  bdev_unref (d);
}

static void
test_subclusters_and_worse (void **state)
{
  struct bdev *d = make_image ("extended_l2=on,cluster_size=65536", "8M",
                               "qemu-io -f qcow2 -c 'write 0 1M' \"$f\"");
  uint64_t at = l2_place (d, 0, 3), table = l2_place (d, 0, 0);
  struct check *c;

  put64 (d, at + 8, UINT64_MAX);
  c = check_image (d);
  assert_bad (c, false, table, 3, "T16", BAD_SUBCLUSTERS);
  check_free (c);
  put64 (d, at, FAR);
  c = check_image (d);
  assert_bad (c, false, table, 3, "T13", BAD_LOST);
  check_free (c);
  bdev_unref (d);
}

static void
test_data_file (void **state)
{
  struct bdev *d = make_image ("data_file=data.raw", "8M",
                               "qemu-io -f qcow2 -c 'write 0 1M' -c 'write 2M 64k' \"$f\"");
  uint64_t at = l2_place (d, 0, 3), table = l2_place (d, 0, 0), good = get64 (d, at);
  static const uint64_t wrong[] = { 65536, 512, 4, L2E_COMPRESSED };
  static const char *const why[] = { "T17", "T12", "T11", "T11" };

  assert_int_equal (good & L2E_OFF_MASK, 3 * 65536);
  for (unsigned i = 0; i < 4; ++i) {
    struct check *c;

    put64 (d, at, i < 2 ? good + wrong[i] : good | wrong[i]);
    c = check_image (d);
    assert_bad (c, false, table, 3, why[i], BAD_PLACE);
    assert_int_equal (c->bad.len, 1);
    check_free (c);
  }
  bdev_unref (d);
}

/* --- refcount structures */

/* Entries that lead into sound ones are wrong; sound or not, the structure is
 * made anew at level refcounts.
 */
static void
test_into_refcounts (void **state)
{
  struct bdev *d = four_tables ("");
  uint64_t rt = get64 (d, HEADER_OFF_RT), block = get64 (d, rt), table = l2_place (d, 0, 0);
  uint64_t old = get64 (d, l2_place (d, 0, 9)), old_l1 = get64 (d, l1_place (d, 3));
  struct check *c;

  put64 (d, l2_place (d, 0, 9), COPIED | block);
  c = check_image (d);
  assert_bad (c, false, table, 9, "T14", BAD_LOST);
  assert_int_equal (c->conflicts.ptr[0].winner.kind, OWNER_REFCOUNT_BLOCK);
  assert_false (c->rt.usable);
  check_free (c);
  put64 (d, l2_place (d, 0, 9), COPIED | rt);
  c = check_image (d);
  assert_true (findings_has (&c->findings, FINDING_RT_OVERLAP));
  assert_bad (c, false, table, 9, "T14", BAD_LOST);
  assert_int_equal (c->conflicts.ptr[0].winner.kind, OWNER_REFCOUNT_TABLE);
  check_free (c);
  put64 (d, l2_place (d, 0, 9), old);
  put64 (d, l1_place (d, 3), COPIED | block);
  c = check_image (d);
  assert_bad (c, true, l1_table (d), 3, "T08", BAD_LOST);
  assert_int_equal (c->conflicts.ptr[0].winner.kind, OWNER_REFCOUNT_BLOCK);
  check_free (c);
  put64 (d, l1_place (d, 3), old_l1);
  /* The table says that its block is where guest data is: no refcounts there. */
  put64 (d, rt, old & L2E_OFF_MASK);
  c = check_image (d);
  assert_null (bad_at (c, false, table, 9));
  assert_int_equal (c->conflicts.ptr[0].winner.kind, OWNER_DATA);
  assert_int_equal (c->conflicts.ptr[0].winner.guest_off, 9 * 4096);
  assert_int_equal (c->conflicts.ptr[0].loser.kind, OWNER_REFCOUNT_BLOCK);
  check_free (c);
  bdev_unref (d);
}

/* --- the end of the file */

static void
test_l2_cut (void **state)
{
  struct bdev *d = four_tables ("");
  uint64_t at = ROUND_UP (bdev_size (d), 4096), table = l2_place (d, 3, 0);
  CLEANUP_FREE uint8_t *copy = malloc (4096);
  struct err err = { 0 };
  struct check *c;

  assert_ok (bdev_pread (d, copy, 4096, table, &err), &err);
  assert_ok (bdev_resize (d, at + 8 * 8 + 512, &err), &err);
  put_bytes (d, at, copy, 8 * 8 + 512);
  put64 (d, l1_place (d, 3), COPIED | at);
  c = check_image (d);
  assert_true (findings_has (&c->findings, FINDING_L2_TABLE_CUT));
  assert_null (bad_at (c, false, at, 71));
  assert_bad (c, false, at, 72, "T09", BAD_LOST);
  assert_int_equal (bad_at (c, false, at, 72)->count, 512 - 72);
  assert_true (c->incomplete);
  check_free (c);
  bdev_unref (d);
}

static void
test_l1_cut (void **state)
{
  struct bdev *d = four_tables ("");
  uint64_t at = ROUND_UP (bdev_size (d), 4096), e[4];
  struct err err = { 0 };
  struct check *c;

  for (unsigned i = 0; i < 4; ++i)
    e[i] = get64 (d, l1_place (d, i));
  assert_ok (bdev_resize (d, at + 24, &err), &err);
  for (unsigned i = 0; i < 3; ++i)
    put64 (d, at + i * 8, e[i]);
  put64 (d, HEADER_OFF_L1_TABLE, at);
  c = check_image (d);
  assert_true (findings_has (&c->findings, FINDING_L1_CUT));
  assert_false (findings_any (&c->findings, SEV_FATAL));
  assert_int_equal (c->l1_entries_followed, 3);
  assert_int_equal (c->l1_entries_right, 4);
  assert_false (c->l1_must_move);       /* its last cluster has room */
  assert_bad (c, true, at, 3, "H09", BAD_LOST);
  check_free (c);
  bdev_unref (d);
}

/* --- the length of the L1 table */

static void
test_l1_size (void **state)
{
  struct bdev *d = four_tables ("");
  struct check *c;
  uint64_t other;

  put32 (d, HEADER_OFF_L1_SIZE, 1);
  c = check_image (d);
  assert_findings (c, "H06:1");         /* the other tables are no leaks */
  assert_int_equal (c->l1_entries_right, 4);
  assert_int_equal (c->l1_entries_followed, 4);
  assert_false (c->l1_must_move);
  check_free (c);
  put64 (d, l1_place (d, 2), 0x1234567);        /* no L1 entry, but its neighbours are */
  c = check_image (d);
  assert_true (findings_has (&c->findings, FINDING_L1_TOO_SMALL));
  assert_int_equal (c->l1_entries_followed, 4);
  assert_false (c->l1_must_move);
  check_free (c);
  other = get64 (d, l1_place (d, 3));
  put64 (d, l1_place (d, 3), 0x1234567);        /* mostly none: not the table's */
  c = check_image (d);
  assert_int_equal (c->l1_entries_followed, 1);
  assert_true (c->l1_must_move);
  assert_bad (c, true, l1_place (d, 0), 1, "H06", BAD_UNREADABLE);
  check_free (c);
  put64 (d, l1_place (d, 3), other);
  put32 (d, HEADER_OFF_L1_SIZE, 4);
  put64 (d, HEADER_OFF_SIZE, UINT64_C (2) << 20);       /* now this is past what is needed */
  c = check_image (d);
  assert_true (findings_has (&c->findings, FINDING_L1_TOO_LARGE));
  assert_false (findings_has (&c->findings, FINDING_L1_ENTRY_RESERVED));
  assert_int_equal (c->l1_entries_right, 1);
  assert_int_equal (c->l1_entries_followed, 1);
  check_free (c);
  bdev_unref (d);
}

/* The cluster behind the table is an L2 table, which looks like an L1 table. */
static void
test_l1_runs_into_l2 (void **state)
{
  struct bdev *d = make_image ("cluster_size=4096", "8M", "qemu-io -f qcow2 -c 'write 0 2M' \"$f\"");
  uint64_t l1 = l1_table (d);
  struct check *c;

  assert_int_equal (l2_place (d, 0, 0), l1 + 4096);
  put32 (d, HEADER_OFF_L1_SIZE, 700);
  c = check_image (d);
  assert_findings (c, "H07:1");
  assert_int_equal (c->l1_entries_right, 4);
  check_free (c);
  put32 (d, HEADER_OFF_L1_SIZE, 4);
  put64 (d, HEADER_OFF_SIZE, UINT64_C (700) << 21);
  c = check_image (d);
  assert_findings (c, "H06:1");
  assert_int_equal (c->l1_entries_right, 700);
  assert_int_equal (c->l1_entries_followed, 512);       /* zeros in its own cluster */
  assert_true (c->l1_must_move);
  check_free (c);
  bdev_unref (d);
}

/* A table of several clusters whose length the header has wrong. */
static void
test_l1_of_several_clusters (void **state)
{
  struct bdev *d = make_image ("cluster_size=512", "16M",
                               "qemu-io -f qcow2 -c 'write 0 64k' -c 'write 15M 64k' \"$f\"");
  struct check *c;

  assert_int_equal (get32 (d, HEADER_OFF_L1_SIZE), 512);
  put32 (d, HEADER_OFF_L1_SIZE, 10);
  c = check_image (d);
  assert_findings (c, "H06:1");
  assert_int_equal (c->l1_entries_followed, 512);
  assert_false (c->l1_must_move);
  check_free (c);
  bdev_unref (d);
}

/* --- header */

static void
test_header (void **state)
{
  struct bdev *d = four_tables ("");
  uint32_t length = get32 (d, HEADER_OFF_HEADER_LENGTH);
  struct check *c;

  put32 (d, length, EXT_BACKING_FORMAT_CROSVM);
  put32 (d, length + 4, 3);
  put_bytes (d, length + 8, "raw", 3);
  c = check_image (d);
  assert_findings (c, "H11:1");
  assert_false (c->incomplete);
  assert_true (check_sound (c));
  check_free (c);
  put32 (d, HEADER_OFF_HEADER_LENGTH, 8);
  c = check_image (d);
  assert_findings (c, "H10:1 H11:1");
  assert_int_equal (c->header.header_length, length);
  assert_int_equal (c->header.header_length_found, 8);
  check_free (c);
  bdev_unref (d);
}

/* --- snapshots and bitmaps */

static struct bdev *
three_snapshots (void)
{
  return make_image ("cluster_size=4096", "8M",
                     "qemu-io -f qcow2 -c 'write 0 64k' \"$f\"; qemu-img snapshot -c one \"$f\"; "
                     "qemu-io -f qcow2 -c 'write 0 4k' \"$f\"; qemu-img snapshot -c two \"$f\"; "
                     "qemu-io -f qcow2 -c 'write 4k 4k' \"$f\"; qemu-img snapshot -c three \"$f\"");
}

static void
test_snapshot_entries (void **state)
{
  struct bdev *d = three_snapshots ();
  uint64_t table = get64 (d, HEADER_OFF_SNAPSHOTS), at[3];
  uint32_t extra;
  struct check *c = check_image (d);

  assert_findings (c, "");
  for (unsigned i = 0; i < 3; ++i)
    at[i] = table + c->snapshots.ptr[i].entry_off;
  check_free (c);
  extra = get32 (d, at[1] + 36);
  put32 (d, at[1] + 36, UINT32_MAX);    /* extra data without end */
  c = check_image (d);
  assert_true (findings_has (&c->findings, FINDING_SNAPSHOT_ENTRY_BAD));
  assert_int_equal (first_run (c, FINDING_SNAPSHOT_ENTRY_BAD)->index, 1);
  assert_int_equal (first_run (c, FINDING_SNAPSHOT_ENTRY_BAD)->host_off, at[1]);
  assert_int_equal (c->snapshots.len, 2);
  assert_string_equal (c->snapshots.ptr[1].name, "three");
  assert_int_equal (table + c->snapshots.ptr[1].entry_off, at[2]);
  assert_true (c->incomplete);
  check_free (c);
  put32 (d, at[1] + 36, extra);
  put32 (d, at[0] + 12, 0x00010040);    /* the first one's name swallows the second */
  c = check_image (d);
  assert_int_equal (c->snapshots.len, 2);
  assert_string_equal (c->snapshots.ptr[0].name, "two");
  check_free (c);
  put32 (d, at[0] + 12, 0x00010003);
  put32 (d, HEADER_OFF_NB_SNAPSHOTS, 1 << 30);
  c = check_image (d);
  assert_findings (c, "S05:1");
  assert_int_equal (c->snapshots.len, 3);
  check_free (c);
  put32 (d, HEADER_OFF_NB_SNAPSHOTS, 3000);
  c = check_image (d);
  assert_findings (c, "S02:1");
  assert_int_equal (c->snapshots.len, 3);
  check_free (c);
  put32 (d, HEADER_OFF_NB_SNAPSHOTS, 3);
  put64 (d, at[1], FAR);
  c = check_image (d);
  assert_int_equal (c->snapshots.len, 3);
  assert_true (c->snapshots.ptr[1].unusable);
  assert_false (c->snapshots.ptr[0].unusable);
  assert_false (c->snapshots.ptr[2].unusable);
  check_free (c);
  put64 (d, at[1], l2_place (d, 0, 0));
  c = check_image (d);
  assert_true (c->snapshots.ptr[1].unusable);
  assert_int_equal (c->conflicts.ptr[0].winner.kind, OWNER_L2_TABLE);
  assert_int_equal (c->conflicts.ptr[0].loser.kind, OWNER_L1_TABLE);
  assert_int_equal (c->conflicts.ptr[0].loser.snapshot_index, 1);
  check_free (c);
  bdev_unref (d);
}

/* An L1 entry of the active disk leads into the L1 table of a snapshot, which reads
 * as an L2 table that maps L2 tables: the snapshot stays.
 */
static void
test_l1_into_snapshot_l1 (void **state)
{
  struct bdev *d = three_snapshots ();
  uint64_t l1 = get64 (d, get64 (d, HEADER_OFF_SNAPSHOTS));
  struct check *c;

  put64 (d, l1_place (d, 1), COPIED | l1);
  c = check_image (d);
  assert_bad (c, true, l1_table (d), 1, "T08", BAD_LOST);
  assert_int_equal (c->bad.len, 1);
  assert_false (c->snapshots.ptr[0].unusable);
  assert_false (findings_has (&c->findings, FINDING_SNAPSHOT_OVERLAP));
  assert_int_equal (c->nr_conflicts, 1);
  assert_int_equal (c->conflicts.ptr[0].winner.kind, OWNER_L1_TABLE);
  assert_int_equal (c->conflicts.ptr[0].winner.snapshot_index, 0);
  check_free (c);
  bdev_unref (d);
}

/* The active disk uses a cluster that a snapshot has, somewhere else. */
static void
test_snapshot_cluster_reused (void **state)
{
  struct bdev *d = three_snapshots ();
  uint64_t snapshots = host_of (d, 0, 0), first = get64 (d, get64 (d, HEADER_OFF_SNAPSHOTS));
  struct check *c;

  /* What snapshot one has at guest cluster 0. */
  snapshots = get64 (d, get64 (d, first) & L1E_OFF_MASK) & L2E_OFF_MASK;
  assert_true (snapshots != host_of (d, 0, 0));
  put64 (d, l2_place (d, 0, 100), snapshots);
  c = check_image (d);
  assert_int_equal (c->findings.totals[FINDING_SNAPSHOT_CLUSTER_REUSED], 1);
  assert_int_equal (first_run (c, FINDING_SNAPSHOT_CLUSTER_REUSED)->snapshot_index, 0);
  assert_int_equal (first_run (c, FINDING_SNAPSHOT_CLUSTER_REUSED)->guest_off, 0);
  assert_int_equal (first_run (c, FINDING_SNAPSHOT_CLUSTER_REUSED)->host_off, snapshots);
  assert_int_equal (first_run (c, FINDING_SNAPSHOT_CLUSTER_REUSED)->expected, 100 * 4096);
  assert_false (findings_has (&c->findings, FINDING_CLUSTER_SHARED));
  check_free (c);
  bdev_unref (d);
}

static void
test_bitmaps (void **state)
{
  struct bdev *d = make_image ("cluster_size=4096", "8M",
                               "qemu-io -f qcow2 -c 'write 0 64k' -c 'write 2M 64k' \"$f\"; "
                               "qemu-img bitmap --add \"$f\" b0; qemu-img bitmap --add \"$f\" b1");
  struct check *c = check_image (d);
  uint64_t ext = header_find_ext (&c->header, EXT_BITMAPS)->host_off;
  uint64_t dir = get64 (d, ext + 16), second = dir + c->bitmaps.ptr[1].dir_off;
  uint64_t table = get64 (d, second);

  assert_int_equal (c->bitmaps.len, 2);
  assert_int_equal (c->bitmaps.ptr[0].dir_off, 0);
  assert_int_equal (c->bitmaps.ptr[1].dir_off, c->bitmaps.ptr[0].dir_len);
  check_free (c);
  put64 (d, second, table + 512);
  c = check_image (d);
  assert_false (c->bitmaps.ptr[0].damaged);
  assert_true (c->bitmaps.ptr[1].damaged);
  assert_false (c->bitmap_dir_damaged);
  check_free (c);
  put64 (d, second, l2_place (d, 0, 0));        /* on a sound L2 table: the bitmap loses */
  c = check_image (d);
  assert_true (c->bitmaps.ptr[1].damaged);
  assert_int_equal (c->conflicts.ptr[0].winner.kind, OWNER_L2_TABLE);
  assert_int_equal (c->conflicts.ptr[0].loser.kind, OWNER_BITMAP);
  assert_int_equal (c->conflicts.ptr[0].loser.index, 1);
  check_free (c);
  put64 (d, second, table);
  put64 (d, ext + 8, get64 (d, ext + 8) - 8);   /* the entries are longer than the directory */
  c = check_image (d);
  assert_true (c->bitmap_dir_damaged);
  assert_int_equal (c->bitmaps.len, 0);
  check_free (c);
  bdev_unref (d);
}

/* An L1 entry that leads into a bitmap directory: it was claimed first, but what
 * lies there is no L2 table.
 */
static void
test_l1_into_bitmap (void **state)
{
  struct bdev *d = make_image ("cluster_size=4096", "8M",
                               "qemu-io -f qcow2 -c 'write 0 64k' -c 'write 2M 64k' \"$f\"; "
                               "qemu-img bitmap --add \"$f\" a_name_that_is_no_l2_entry_for_sure");
  struct check *c = check_image (d);
  uint64_t dir = get64 (d, header_find_ext (&c->header, EXT_BITMAPS)->host_off + 16);

  check_free (c);
  put64 (d, l1_place (d, 1), COPIED | dir);
  c = check_image (d);
  assert_bad (c, true, l1_table (d), 1, "T08", BAD_LOST);
  assert_false (c->bitmap_dir_damaged);
  assert_false (findings_has (&c->findings, FINDING_BITMAPS_DAMAGED));
  assert_int_equal (c->conflicts.ptr[0].winner.kind, OWNER_BITMAP);
  assert_int_equal (c->conflicts.ptr[0].loser.kind, OWNER_L2_TABLE);
  check_free (c);
  bdev_unref (d);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_l1_into_data),
    cmocka_unit_test (test_nonsense_without_rival),
    cmocka_unit_test (test_l1_into_metadata),
    cmocka_unit_test (test_twins),
    cmocka_unit_test (test_l1_reserved),
    cmocka_unit_test (test_l2_reserved),
    cmocka_unit_test (test_l2_into_l2),
    cmocka_unit_test (test_subclusters_and_worse),
    cmocka_unit_test (test_data_file),
    cmocka_unit_test (test_into_refcounts),
    cmocka_unit_test (test_l2_cut),
    cmocka_unit_test (test_l1_cut),
    cmocka_unit_test (test_l1_size),
    cmocka_unit_test (test_l1_runs_into_l2),
    cmocka_unit_test (test_l1_of_several_clusters),
    cmocka_unit_test (test_header),
    cmocka_unit_test (test_snapshot_entries),
    cmocka_unit_test (test_l1_into_snapshot_l1),
    cmocka_unit_test (test_snapshot_cluster_reused),
    cmocka_unit_test (test_bitmaps),
    cmocka_unit_test (test_l1_into_bitmap),
  };

  if (run ("command -v qemu-img && command -v qemu-io") != 0) {
    print_message ("SKIP: qemu-img or qemu-io is not installed\n");
    return 0;
  }
  return cmocka_run_group_tests_name ("decide", tests, NULL, NULL);
}
