/* Damage in the refcount structures: what is lost, what is merely wrong. */
#include "unit/check/images.h"
#include "check/words.h"

#define COPIED ENTRY_COPIED
#define FAR (UINT64_C (1) << 40)

/* 512-byte clusters: a refcount block covers 256 clusters, so there are many. */
static struct bdev *
many_blocks (void)
{
  return make_image ("cluster_size=512", "1M", "qemu-io -f qcow2 -c 'write -P 1 0 600k' \"$f\"");
}

static struct bdev *
plain (void)
{
  return make_image ("cluster_size=65536", "8M", "qemu-io -f qcow2 -c 'write 0 1M' \"$f\"");
}

static struct check *
expect_keep (struct bdev *d, const char *want)
{
  struct check *c = check_image (d);

  assert_findings (c, want);
  assert_false (c->incomplete);
  return c;
}

static void
expect (struct bdev *d, const char *want)
{
  check_free (expect_keep (d, want));
}

/* --- values */

static void
test_values (void **state)
{
  struct bdev *d = plain ();
  uint64_t data = (get64 (d, l2_place (d, 0, 0)) & L2E_OFF_MASK) >> 16;
  uint64_t end = bdev_size (d) >> 16;
  struct check *c;

  put_refcount (d, 0, 0);
  put_refcount (d, data, 0);
  put_refcount (d, data + 1, 0);
  put_refcount (d, data + 2, 7);
  put_refcount (d, end + 5, 1);
  put_refcount (d, 20000, 65535);
  c = expect_keep (d, "R01:3 R02:1 R03:2");
  assert_int_equal (c->findings.nr_runs[FINDING_REFCOUNT_LOW], 2);
  assert_int_equal (c->findings.runs.ptr[1].host_off, data << 16);
  assert_int_equal (c->findings.runs.ptr[1].count, 2);
  assert_int_equal (first_run (c, FINDING_REFCOUNT_HIGH)->found, 7);
  assert_int_equal (first_run (c, FINDING_REFCOUNT_HIGH)->expected, 1);
  assert_int_equal (first_run (c, FINDING_REFCOUNT_PAST_END)->host_off, (end + 5) << 16);
  assert_int_equal (c->rt.states[0], RB_SOUND);
  check_free (c);
  bdev_unref (d);
}

static void
test_leaks (void **state)
{
  struct bdev *d = plain ();
  struct err err = { 0 };
  uint64_t end = bdev_size (d) >> 16;
  struct check *c;

  assert_ok (bdev_resize (d, bdev_size (d) + (100 << 16), &err), &err);
  for (unsigned i = 0; i < 10; ++i)
    put_refcount (d, end + 20 + i, 1);
  c = expect_keep (d, "R02:10");
  assert_true (check_sound (c));
  assert_int_equal (c->findings.nr_runs[FINDING_REFCOUNT_HIGH], 1);
  assert_int_equal (c->stats.image_end_off, (end + 30) << 16);
  check_free (c);
  bdev_unref (d);
}

/* Every width: too high, too low, and the highest value. */
static void
test_widths (void **state)
{
  for (unsigned order = 0; order <= 6; ++order) {
    struct bdev *d;
    char opts[64];

    snprintf (opts, sizeof opts, "cluster_size=4096,refcount_bits=%u", 1u << order);
    d = make_image (opts, "8M", "qemu-io -f qcow2 -c 'write 0 1M' \"$f\"");
    expect (d, "");
    put_refcount (d, 100, 0);
    put_refcount (d, 101, 0);
    put_refcount (d, (bdev_size (d) >> 12) - 1, 0);
    expect (d, "R01:3");
    put_refcount (d, 100, 1);
    if (order > 0) {
      put_refcount (d, 101, order == 6 ? UINT64_MAX : (UINT64_C (1) << (1 << order)) - 1);
      expect (d, "R01:1 R02:1");
    }
    bdev_unref (d);
  }
}

/* Two bits hold 3: with four references 3 is the right value, and is said. */
static void
test_overflow (void **state)
{
  struct bdev *d = make_image ("cluster_size=4096,refcount_bits=2", "8M",
                               "qemu-io -f qcow2 -c 'write 0 64k' \"$f\"");
  uint64_t entry = get64 (d, l2_place (d, 0, 0)) & L2E_OFF_MASK;
  struct check *c;

  for (unsigned i = 0; i < 4; ++i)
    put64 (d, l2_place (d, 0, i ? 100 + i : 0), entry);
  put_refcount (d, entry >> 12, 3);
  c = expect_keep (d, "T15:3 R04:1");
  assert_int_equal (first_run (c, FINDING_REFCOUNT_OVERFLOW)->found, 3);
  assert_int_equal (first_run (c, FINDING_REFCOUNT_OVERFLOW)->expected, 4);
  check_free (c);
  put_refcount (d, entry >> 12, 2);
  c = expect_keep (d, "T15:3 R01:1 R04:1");
  assert_int_equal (first_run (c, FINDING_REFCOUNT_LOW)->expected, 3);
  check_free (c);
  bdev_unref (d);
}

/* --- the table as a whole */

static void
expect_rebuild (struct bdev *d, const char *want)
{
  struct check *c = expect_keep (d, want);

  assert_false (c->rt.usable);
  assert_int_equal (c->findings.runs.len, 1);
  /* No refcount structure is claimed: header, L1, L2 and 16 clusters. */
  assert_int_equal (ownermap_find (c->owners, 0, 1000, true), 0);
  check_free (c);
}

static void
test_table_lost (void **state)
{
  static const struct {
    uint64_t host_off;
    uint32_t clusters;
    const char *want;
  } cases[] = {
    { 0, 0, "R11:1" },
    { 0, 1, "R11:1" },
    { 0x10000, 0, "R11:1" },
    { 0x10001, 1, "R12:1" },
    { 0x10200, 1, "R12:1" },
    { FAR, 1, "R12:1" },
    { UINT64_MAX - 65535, 1, "R12:1" },
    { UINT64_MAX - 65535, 128, "R12:1" },
    { UINT64_C (0x7fffffffffff0000), 2, "R12:1" },
    { UINT64_C (0x8000000000000000), 1, "R12:1" },
    { 0x10000, 128, "R12:1" },
    { 0x10000, 129, "R13:1" },
    { 0x10000, UINT32_MAX, "R13:1" },
    { 0x30000, 1, "R14:1" },            /* the L1 table */
    { 0x10000, 3, "R14:1" },            /* too long: into the L1 table */
  };
  struct bdev *d = plain ();

  assert_int_equal (get64 (d, HEADER_OFF_RT), 0x10000);
  assert_int_equal (get64 (d, HEADER_OFF_L1_TABLE), 0x30000);
  for (unsigned i = 0; i < sizeof cases / sizeof *cases; ++i) {
    put64 (d, HEADER_OFF_RT, cases[i].host_off);
    put32 (d, HEADER_OFF_RT_CLUSTERS, cases[i].clusters);
    expect_rebuild (d, cases[i].want);
  }
  put64 (d, HEADER_OFF_RT, 0x10000);
  put32 (d, HEADER_OFF_RT_CLUSTERS, 1);
  zero_bytes (d, 0x10000, 65536);
  expect_rebuild (d, "R16:1");
  bdev_unref (d);
}

static void
test_table_untrusted (void **state)
{
  struct bdev *d = many_blocks ();
  uint64_t blocks = DIV_ROUND_UP (bdev_size (d), 512 * 256);
  struct check *c;

  expect (d, "");
  assert_true (blocks >= 4);
  /* Half of the blocks is enough to go on with. */
  for (uint64_t i = 0; i < blocks / 2; ++i)
    put64 (d, rt_place (d, i), FAR + i * 512);
  c = check_image (d);
  assert_true (c->rt.usable);
  assert_int_equal (c->findings.totals[FINDING_RB_BAD_ENTRY], blocks / 2);
  assert_int_equal (c->findings.nr_runs[FINDING_RB_BAD_ENTRY], 1);
  check_free (c);
  put64 (d, rt_place (d, blocks / 2), 1);
  if (blocks % 2)
    put64 (d, rt_place (d, blocks / 2 + 1), 1);
  c = expect_keep (d, "R16:1");
  assert_int_equal (first_run (c, FINDING_RT_UNTRUSTED)->expected, blocks);
  assert_int_equal (first_run (c, FINDING_RT_UNTRUSTED)->found, blocks - blocks / 2 - 1 -
                    blocks % 2);
  check_free (c);
  bdev_unref (d);
}

static void
test_table_too_small (void **state)
{
  struct bdev *d = many_blocks ();
  struct err err = { 0 };
  struct check *c;
  /* A table of one cluster reaches 64 * 256 clusters, 8 MiB. */
  uint64_t far = UINT64_C (9) << 20;

  assert_ok (bdev_resize (d, far + 512, &err), &err);
  expect (d, "");
  put64 (d, l2_place (d, 0, 0), COPIED | far);
  c = expect_keep (d, "R15:1");
  assert_false (c->rt.usable);
  assert_int_equal (first_run (c, FINDING_RT_TOO_SMALL)->found, 64);
  assert_int_equal (first_run (c, FINDING_RT_TOO_SMALL)->expected, 73);
  check_free (c);
  put64 (d, l2_place (d, 0, 0), 0);
  put64 (d, rt_place (d, 10), far);             /* only one of its own blocks */
  expect (d, "R15:1");
  bdev_unref (d);
}

/* Room to spare, zero entries, and blocks for what is past the end are sound. */
static void
test_room_to_spare (void **state)
{
  struct bdev *d = many_blocks ();
  struct err err = { 0 };
  uint64_t end = ROUND_UP (bdev_size (d), 512), rt = end, block = end + 512 * 4;

  assert_ok (bdev_resize (d, end + 512 * 5, &err), &err);
  for (unsigned i = 0; i < 64; ++i)
    put64 (d, rt + i * 8, get64 (d, rt_place (d, i)));
  put64 (d, rt + 200 * 8, block);
  for (unsigned i = 0; i < 5; ++i)
    put_refcount (d, end / 512 + i, 1);
  put_refcount (d, get64 (d, HEADER_OFF_RT) / 512, 0);
  put64 (d, HEADER_OFF_RT, rt);
  put32 (d, HEADER_OFF_RT_CLUSTERS, 4);
  expect (d, "");
  bdev_unref (d);
}

/* --- blocks */

static void
test_blocks (void **state)
{
  struct bdev *d = many_blocks ();
  uint64_t at = rt_place (d, 2), good = get64 (d, at);
  struct check *c;

  put64 (d, at, 0);
  c = expect_keep (d, "R21:1");         /* the block lay in its own range */
  assert_true (c->rt.usable);
  assert_int_equal (c->rt.states[1], RB_SOUND);
  assert_int_equal (c->rt.states[2], RB_LOST);
  assert_int_equal (first_run (c, FINDING_RB_MISSING)->index, 2);
  assert_int_equal (first_run (c, FINDING_RB_MISSING)->host_off, 2 * 256 * 512);
  assert_int_equal (ownermap_get (c->owners, good / 512), 0);
  check_free (c);
  put64 (d, at, good | 1);
  expect (d, "R22:1");
  put64 (d, at, good + 1024 * 1024 * 1024);
  expect (d, "R22:1");
  put64 (d, at, UINT64_MAX - 511);
  expect (d, "R22:1");
  put64 (d, at, get64 (d, l1_place (d, 0)) & L1E_OFF_MASK);     /* an L2 table */
  expect (d, "R23:1");
  put64 (d, at, get64 (d, HEADER_OFF_RT));
  expect (d, "R23:1");
  put64 (d, at, get64 (d, rt_place (d, 1)));    /* twice: the first one has it */
  c = expect_keep (d, "R23:1");
  assert_int_equal (c->rt.states[1], RB_SOUND);
  assert_int_equal (first_run (c, FINDING_RB_OVERLAP)->index, 2);
  check_free (c);
  put64 (d, at, good);
  put64 (d, rt_place (d, 60), FAR);             /* bad where nothing is in use */
  expect (d, "R22:1");
  bdev_unref (d);
}

static void
test_zeroed_block (void **state)
{
  struct bdev *d = many_blocks ();

  zero_bytes (d, get64 (d, rt_place (d, 2)), 512);
  expect (d, "R01:256");
  bdev_unref (d);
}

/* A mapping entry on the refcount structures: the mapping wins. */
static void
test_mapping_wins (void **state)
{
  struct bdev *d = many_blocks ();
  uint64_t block = get64 (d, rt_place (d, 2)), old = get64 (d, l2_place (d, 0, 5));
  struct check *c;

  put64 (d, l2_place (d, 0, 5), COPIED | block);
  c = expect_keep (d, "T14:1 R02:1 R23:1 O02:1");
  assert_int_equal (ownermap_get (c->owners, block / 512), 1);
  check_free (c);
  put64 (d, l2_place (d, 0, 5), COPIED | get64 (d, HEADER_OFF_RT));
  c = expect_keep (d, "T14:1 R14:1");
  assert_false (c->rt.usable);
  check_free (c);
  put64 (d, l2_place (d, 0, 5), old);
  expect (d, "");
  bdev_unref (d);
}

/* --- reports */

static void
test_report_is_short (void **state)
{
  struct bdev *d = many_blocks ();
  struct check *c;
  char *text;
  unsigned lines = 0;

  for (unsigned i = 0; i < 300; ++i)
    put_refcount (d, 256 + 2 * i, 0);
  zero_bytes (d, get64 (d, rt_place (d, 4)), 512);
  c = check_image (d);
  text = findings_text (c);
  for (char *p = text; *p; ++p)
    lines += *p == '\n';
  assert_true (lines < 30);
  assert_non_null (strstr (text, "R01 refcounts are below the number of references: "));
  assert_non_null (strstr (text, "host [0x20000, 0x20200), found 0, expected 1\n"));
  assert_non_null (strstr (text, "more places ("));
  assert_non_null (strstr (text, "repair=refcounts"));
  assert_non_null (strstr (text, " corruptions\n"));
  free (text);
  check_free (c);
  bdev_unref (d);
}

static void
test_json (void **state)
{
  struct bdev *d = plain ();
  char *folder = make_folder (), path[4096];
  struct check *c;
  FILE *fp;

  put64 (d, l2_place (d, 0, 3), COPIED | FAR);
  put_refcount (d, 0, 0);
  c = check_image (d);
  snprintf (path, sizeof path, "%s/report.json", folder);
  fp = fopen (path, "w");
  assert_non_null (fp);
  fputs ("[\n", fp);
  report_json_findings (fp, c, NULL, "  ");
  fputs ("]\n", fp);
  fclose (fp);
  if (run ("command -v python3") == 0) {
    assert_int_equal (run ("python3 -c 'import json,sys; a = json.load(open(sys.argv[1]));"
                           "by = {f[\"code\"]: f for f in a};"
                           "assert sorted(by) == [\"O02\", \"R01\", \"R02\", \"T13\"], by;"
                           "t = by[\"T13\"];"
                           "assert t[\"entry\"] == \"0x8000010000000000\", t;"
                           "assert t[\"guest-offset\"] == 3 * 65536, t;"
                           "assert t[\"guest-length\"] == 65536 and t[\"index\"] == 3, t;"
                           "assert t[\"severity\"] == \"corruption\", t;"
                           "assert t[\"mended-by\"] == \"all\" and t[\"count\"] == 1, t;"
                           "assert not any(f[\"mended\"] for f in a), a;"
                           "r = by[\"R01\"];"
                           "assert r[\"host-offset\"] == 0 and r[\"host-length\"] == 65536, r;"
                           "assert r[\"found\"] == 0 and r[\"expected\"] == 1, r;"
                           "assert \"guest-offset\" not in r and \"snapshot\" not in r, r;' '%s'",
                           path), 0);
  }
  check_free (c);
  bdev_unref (d);
  remove_folder (folder);
}

static void
test_json_string (void **state)
{
  char *text = NULL;
  size_t len;
  FILE *fp = open_memstream (&text, &len);

  report_json_string (fp, "a\"b\\c\n\x1b\xc3\xa9~");
  fclose (fp);
  assert_string_equal (text, "\"a\\\"b\\\\c\\u000a\\u001b\\u00c3\\u00a9~\"");
  free (text);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_values),
    cmocka_unit_test (test_leaks),
    cmocka_unit_test (test_widths),
    cmocka_unit_test (test_overflow),
    cmocka_unit_test (test_table_lost),
    cmocka_unit_test (test_table_untrusted),
    cmocka_unit_test (test_table_too_small),
    cmocka_unit_test (test_room_to_spare),
    cmocka_unit_test (test_blocks),
    cmocka_unit_test (test_zeroed_block),
    cmocka_unit_test (test_mapping_wins),
    cmocka_unit_test (test_report_is_short),
    cmocka_unit_test (test_json),
    cmocka_unit_test (test_json_string),
  };

  if (run ("command -v qemu-img && command -v qemu-io") != 0) {
    print_message ("SKIP: qemu-img or qemu-io is not installed\n");
    return 0;
  }
  return cmocka_run_group_tests_name ("refcounts", tests, NULL, NULL);
}
