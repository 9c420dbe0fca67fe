/* Images that are far away: how many journeys a check and a repair wait for.  The bounds
 * are some times smaller than one journey for each table, block or snapshot.
 */
#include "unit/heal/heal-test.h"

#include "heal/fingerprint.h"
#include "heal/journal.h"
#include "heal/orphans.h"
#include "heal/overlay.h"
#include "img/image.h"
#include "journeys.h"

struct far {
  struct bdev *source, *healed;
};

/* d, whose reference is taken over, far away, and an overlay in RAM over it. */
static struct far
far_away (struct bdev *d)
{
  struct overlay_options opts = { .source_path = "far", .max_size = bdev_size (d) + (64 << 20) };
  struct err err = { 0 };
  struct far f;

  assert_ok (journeys_new (d, &f.source, &err), &err);
  assert_ok (overlay_in_memory (f.source, &opts, &f.healed, &err), &err);
  assert_true (f.healed->far);
  bdev_unref (d);
  journeys_reset (f.source);
  return f;
}

static void
far_free (struct far *f)
{
  bdev_unref (f->healed);
  bdev_unref (f->source);
}

#define assert_journeys(f, what, most) \
  assert_journeys_at (f, what, most, __FILE__, __LINE__)
static void
assert_journeys_at (const struct far *f, const char *what, uint64_t most, const char *file,
                    int line)
{
  uint64_t n = journeys_made (f->source);

  print_message ("%s: %llu journeys\n", what, (unsigned long long) n);
  if (n > most) {
    print_error ("%s: %llu journeys, at most %llu expected\n", what, (unsigned long long) n,
                 (unsigned long long) most);
    _fail (file, line);
  }
  journeys_reset (f->source);
}

static struct check *
check (struct bdev *d)
{
  struct err err = { 0 };
  struct check *c;

  assert_ok (check_run (d, NULL, &c, &err), &err);
  return c;
}

/* Check, heal, check again; most: journeys of the healing alone. */
static void
heal (struct far *f, const char *what, const char *findings, struct heal_result *res, uint64_t most)
{
  struct check *before = check (f->healed), *after;
  struct err err = { 0 };

  assert_findings (before, findings);
  journeys_reset (f->source);
  memset (res, 0, sizeof *res);
  assert_ok (heal_run (f->healed, before, REPAIR_REFCOUNTS, NULL, res, &err), &err);
  assert_journeys (f, what, most);
  after = check (f->healed);
  assert_findings (after, "");
  check_free (after);
  check_free (before);
}

/* 500 L2 tables and as many gigabytes, of 64 KiB clusters; or of small ones. */
static struct bdev *
many_tables (const char *options, const char *size)
{
  char all[256];

  snprintf (all, sizeof all, "preallocation=metadata,%s", options);
  return make_image (all, size, "");
}

#define LARGE "cluster_size=64k", "250G"        /* 500 tables, 125 blocks */
#define SMALL "cluster_size=4k,refcount_bits=64", "1G"  /* 512 tables, 514 blocks */

static void
test_plain (void **state)
{
  struct far f = far_away (make_image ("compat=1.1", "8M", "qemu-io -f qcow2 -c 'write 0 4M' $f"));
  struct image_options opts = { .read_only = false };
  struct err err = { 0 };
  struct bdev *view;

  check_free (check (f.source));
  assert_journeys (&f, "check of a plain image", 4);
  check_free (check (f.healed));
  assert_journeys (&f, "check of its healed view", 4);
  assert_ok (image_open (f.healed, &opts, &view, &err), &err);
  assert_journeys (&f, "opening it", 3);
  assert_ok (bdev_pwrite (f.healed, "x", 1, 2000000, 0, &err), &err);
  assert_journeys (&f, "a write to the overlay", 1);    /* it copies what is around that */
  bdev_unref (view);
  far_free (&f);
}

static void
test_check (void **state)
{
  struct far large = far_away (many_tables (LARGE)), small = far_away (many_tables (SMALL));

  check_free (check (large.source));
  assert_journeys (&large, "check of 500 tables", 40);
  check_free (check (large.healed));
  assert_journeys (&large, "check of 500 tables through an overlay", 40);
  check_free (check (small.healed));
  assert_journeys (&small, "check of 512 small tables through an overlay", 60);
  far_free (&large);
  far_free (&small);
}

/* The first entry of each L2 table says what it should not. */
static struct bdev *
wrong_copied (struct bdev *d)
{
  uint64_t l1 = get64 (d, HEADER_OFF_L1_TABLE), n = get32 (d, HEADER_OFF_L1_SIZE);

  for (uint64_t i = 0; i < n; ++i) {
    uint64_t l2 = get64 (d, l1 + i * 8) & L1E_OFF_MASK;

    put64 (d, l2, get64 (d, l2) & ~ENTRY_COPIED);
  }
  return d;
}

static void
test_copied (void **state)
{
  struct far large = far_away (wrong_copied (many_tables (LARGE)));
  struct far small = far_away (wrong_copied (many_tables (SMALL)));
  struct heal_result res;

  heal (&large, "COPIED flags in 500 tables", "T22:500", &res, 30);
  assert_int_equal (res.copied_fixed, 500);
  heal (&small, "COPIED flags in 512 small tables", "T22:512", &res, 40);
  assert_int_equal (res.copied_fixed, 512);
  far_free (&large);
  far_free (&small);
}

/* Refcount 0 for a cluster in use of each block. */
static struct bdev *
low_refcounts (struct bdev *d, unsigned entry_bytes)
{
  uint64_t rt = get64 (d, HEADER_OFF_RT);

  for (uint64_t i = 0, block; get64 (d, rt + (i + 1) * 8) != 0; ++i) {
    static const uint8_t none[8];
    struct err err = { 0 };

    block = get64 (d, rt + i * 8);
    assert_ok (bdev_pwrite (d, none, entry_bytes, block + 300 * entry_bytes, 0, &err), &err);
  }
  return d;
}

static void
test_refcounts (void **state)
{
  struct far large = far_away (low_refcounts (many_tables (LARGE), 2));
  struct far small = far_away (low_refcounts (many_tables (SMALL), 8));
  struct heal_result res;

  heal (&large, "raising refcounts in 125 blocks", "R01:125", &res, 15);
  assert_true (res.refcounts_raised > 100);
  heal (&small, "raising refcounts in 514 small blocks", "R01:514", &res, 40);
  assert_true (res.refcounts_raised > 500);
  far_free (&large);
  far_free (&small);
}

static void
test_rebuild (void **state)
{
  struct bdev *d = many_tables (SMALL);
  struct heal_result res;
  struct far f;

  put64 (d, HEADER_OFF_RT, 12345);
  f = far_away (d);
  heal (&f, "new refcount structures for a small-cluster image", "R12:1", &res, 40);
  assert_true (res.rebuilt);
  far_free (&f);
}

/* The first writes to the disk look for free clusters, here behind 514 blocks. */
static void
test_allocation (void **state)
{
  static const uint8_t zeros[1 << 20];
  struct bdev *d = make_image ("preallocation=metadata,cluster_size=4k,refcount_bits=64", "1G",
                               "qemu-img resize $f 1100M"), *view;
  struct image_options opts = { .read_only = false };
  struct err err = { 0 };
  struct far f;

  assert_ok (bdev_resize (d, bdev_size (d) + (8 << 20), &err), &err);   /* an export cannot grow */
  f = far_away (d);
  assert_ok (image_open (f.healed, &opts, &view, &err), &err);
  journeys_reset (f.source);
  assert_ok (bdev_pwrite (view, zeros, sizeof zeros, 1050 << 20, 0, &err), &err);
  assert_journeys (&f, "first writes to a full image", 50);
  bdev_unref (view);
  far_free (&f);
}

/* An image that has lost its L1 table: all 512 L2 tables are found again.  Each says where not to
 * look for the next, so here it is two journeys for each.
 */
static void
test_orphans (void **state)
{
  struct bdev *d = many_tables (SMALL);
  uint64_t l1 = get64 (d, HEADER_OFF_L1_TABLE), n = get32 (d, HEADER_OFF_L1_SIZE);
  struct err err = { 0 };
  struct orphans *o;
  struct check *c;
  struct far f;

  for (uint64_t i = 0; i < n; ++i)
    put64 (d, l1 + i * 8, 0);
  f = far_away (d);
  c = check (f.source);
  journeys_reset (f.source);
  assert_ok (orphans_find (c, f.source, false, NULL, &o, &err), &err);
  assert_int_equal (o->tables, 512);
  assert_journeys (&f, "finding 512 lost tables", 1200);
  orphans_free (o);
  check_free (c);
  far_free (&f);
}

/* --- snapshots */

#define SNAPSHOTS "qemu-io -f qcow2 -c 'write 0 1M' $f; for i in $(seq 100); do " \
                  "qemu-io -f qcow2 -c \"write ${i}k 1k\" $f; qemu-img snapshot -c s$i $f; done"

/* Take the extra data of all entries of the snapshot table away. */
static void
cut_extra_data (struct bdev *d)
{
  uint64_t table = get64 (d, HEADER_OFF_SNAPSHOTS), from = 0, to = 0;
  struct err err = { 0 };
  uint8_t buf[65536];

  assert_ok (bdev_pread_padded (d, buf, sizeof buf, table, &err), &err);
  for (uint32_t i = get32 (d, HEADER_OFF_NB_SNAPSHOTS); i > 0; --i) {
    uint32_t strings = load_be16 (buf + from + 12) + load_be16 (buf + from + 14);
    uint32_t extra = load_be32 (buf + from + 36);

    memmove (buf + to, buf + from, 40);
    store_be32 (buf + to + 36, 0);
    memmove (buf + to + 40, buf + from + 40 + extra, strings);
    from = ROUND_UP (from + 40 + extra + strings, 8);
    to = ROUND_UP (to + 40 + strings, 8);
  }
  assert_ok (bdev_pwrite (d, buf, to, table, 0, &err), &err);
}

/* Level all: an entry that is lost, and a table that is to be written anew. */
static void
test_snapshots (void **state)
{
  struct bdev *d = make_image ("cluster_size=4k", "64M", SNAPSHOTS);
  uint64_t l2 = get64 (d, get64 (d, HEADER_OFF_L1_TABLE)) & L1E_OFF_MASK;
  struct err err = { 0 };
  struct heal_result res;
  struct lost lost;
  struct check *c;
  struct far f;

  put64 (d, l2, 12345);
  cut_extra_data (d);
  f = far_away (d);
  lost_init (&lost);
  check_free (check (f.healed));
  assert_journeys (&f, "check of 100 snapshots", 20);
  assert_ok (heal_fully (f.healed, &c, &res, &lost, &err), &err);
  assert_journeys (&f, "mending an image with 100 snapshots, and four checks", 50);
  assert_int_equal (lost.active_bytes, 4096);
  assert_findings (c, "");
  check_free (c);
  lost_reset (&lost);
  far_free (&f);
}

/* --- into the image */

#define NR_CHANGES 2000         /* more than are listed at once */

static void
test_journal (void **state)
{
  uint64_t size = NR_CHANGES * UINT64_C (200000);
  uint8_t ext[FINGERPRINT_LENGTH];
  struct fingerprint print = { .state = OVERLAY_PLAIN, .source_size = size };
  struct image_params p = {
    .version = 3, .cluster_bits = 16, .refcount_order = 4, .size = size,
    .private_ext_type = FINGERPRINT_EXT, .private_ext = ext, .private_ext_len = sizeof ext,
  };
  struct journal_result res;
  struct err err = { 0 };
  struct bdev *mem, *file;
  struct far f;

  assert_ok (mem_new ("source", size, false, &mem, &err), &err);
  assert_ok (mem_new ("journal", 0, true, &file, &err), &err);
  assert_ok (journeys_new (mem, &f.source, &err), &err);
  fingerprint_encode (&print, ext);
  assert_ok (image_create (file, &p, &err), &err);
  assert_ok (overlay_reopen (file, f.source, &f.healed, &err), &err);
  for (unsigned i = 0; i < NR_CHANGES; ++i)
    assert_ok (bdev_pwrite (f.healed, &i, sizeof i, i * UINT64_C (200000) + 100, 0, &err), &err);
  assert_ok (journal_mark (file, f.healed, f.source, OVERLAY_COMMITTING, &err), &err);
  journeys_reset (f.source);
  assert_ok (journal_copy (file, f.healed, f.source, false, NULL, &res, &err), &err);
  assert_journeys (&f, "writing 2000 changes into a far image", 50);
  for (unsigned i = 0, now; i < NR_CHANGES; ++i) {
    assert_ok (bdev_pread (mem, &now, sizeof now, i * UINT64_C (200000) + 100, &err), &err);
    assert_int_equal (now, i);
  }
  bdev_unref (mem);
  bdev_unref (file);
  far_free (&f);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_plain),
    cmocka_unit_test (test_check),
    cmocka_unit_test (test_copied),
    cmocka_unit_test (test_refcounts),
    cmocka_unit_test (test_rebuild),
    cmocka_unit_test (test_allocation),
    cmocka_unit_test (test_orphans),
    cmocka_unit_test (test_snapshots),
    cmocka_unit_test (test_journal),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
