/* Images made to hurt: the check ends, soon, within its memory, and says the
 * same twice.  Most of the worth of these comes from the sanitizers.
 */
#include "unit/check/images.h"

#include "base/cleanup.h"

#define COPIED ENTRY_COPIED

/* --- a device that counts how often a place is read */

struct count_dev {
  struct bdev d;
  struct bdev *under;
  uint64_t place;
  unsigned reads;
};

static int
count_pread (struct bdev *d, void *buf, size_t len, uint64_t off, struct err *err)
{
  struct count_dev *c = (struct count_dev *) d;

  c->reads += ranges_overlap (off, len, c->place, 1);
  return bdev_pread (c->under, buf, len, off, err);
}

static void
count_close (struct bdev *d)
{
  bdev_unref (((struct count_dev *) d)->under);
  free (d);
}

static struct count_dev *
count_reads (struct bdev *under, uint64_t place)
{
  static const struct bdev_ops ops = { .kind = "count", .pread = count_pread,
                                       .close = count_close };
  struct count_dev *c = calloc (1, sizeof *c);
  struct err err = { 0 };

  assert_non_null (c);
  assert_ok (bdev_init (&c->d, &ops, "count", bdev_size (under), false, false, &err), &err);
  c->under = bdev_ref (under);
  c->place = place;
  return c;
}

static struct bdev *
plain (const char *opts)
{
  return make_image (opts, "8M", "qemu-io -f qcow2 -c 'write 0 1M' \"$f\"");
}

/* --- much work from few bytes */

static void
test_one_l2_table_65536_times (void **state)
{
  struct bdev *d = plain ("cluster_size=65536");
  uint64_t l1 = ROUND_UP (bdev_size (d), 65536), entry = get64 (d, l1_place (d, 0)) & ~COPIED;
  CLEANUP_FREE uint8_t *table = malloc (8 * 65536);
  struct err err = { 0 };
  struct count_dev *cd;
  struct check *c;

  assert_ok (bdev_resize (d, l1 + 8 * 65536, &err), &err);
  for (unsigned i = 0; i < 65536; ++i)
    store_be64 (table + i * 8, entry);
  put_bytes (d, l1, table, 8 * 65536);
  put64 (d, HEADER_OFF_L1_TABLE, l1);
  put32 (d, HEADER_OFF_L1_SIZE, 65536);
  cd = count_reads (d, entry);
  c = check_image (&cd->d);
  assert_int_equal (c->findings.totals[FINDING_L2_TABLE_SHARED], 65535);
  assert_int_equal (c->findings.nr_runs[FINDING_L2_TABLE_SHARED], 1);
  assert_int_equal (c->stats.l2_tables, 1);
  assert_true (cd->reads <= 2);         /* for its data, and for its flags */
  assert_int_equal (ownermap_get (c->owners, entry >> 16), 65536);
  assert_int_equal (c->stats.allocated_clusters, 16 * 65536);
  assert_int_equal (first_run (c, FINDING_REFCOUNT_LOW)->expected, 65535);
  assert_true (findings_has (&c->findings, FINDING_REFCOUNT_OVERFLOW));
  check_free (c);
  bdev_unref (&cd->d);
  bdev_unref (d);
}

/* A thousand snapshots of one state: one walk, and nothing wrong. */
static void
test_thousand_snapshots (void **state)
{
  struct bdev *d = plain ("cluster_size=65536");
  uint64_t at = ROUND_UP (bdev_size (d), 65536), table = at + 1000 * 65536;
  uint64_t entry = get64 (d, l1_place (d, 0)) & ~COPIED;
  struct err err = { 0 };
  struct count_dev *cd;
  struct check *c;

  assert_ok (bdev_resize (d, table + 65536, &err), &err);
  put64 (d, l1_place (d, 0), entry);
  put_refcount (d, entry >> 16, 1001);
  for (unsigned i = 0; i < 16; ++i) {
    uint64_t raw = get64 (d, l2_place (d, 0, i)) & ~COPIED;

    put64 (d, l2_place (d, 0, i), raw);
    put_refcount (d, raw >> 16, 1001);
  }
  for (unsigned i = 0; i < 1000; ++i) {
    put64 (d, at + i * 65536, entry);
    put_refcount (d, (at >> 16) + i, 1);
    put64 (d, table + i * 56, at + i * 65536);
    put32 (d, table + i * 56 + 8, 1);
    put32 (d, table + i * 56 + 36, 16);
  }
  put_refcount (d, table >> 16, 1);
  put64 (d, HEADER_OFF_SNAPSHOTS, table);
  put32 (d, HEADER_OFF_NB_SNAPSHOTS, 1000);
  cd = count_reads (d, entry);
  c = check_image (&cd->d);
  assert_findings (c, "");
  assert_int_equal (c->snapshots.len, 1000);
  assert_int_equal (c->stats.l2_tables, 1);
  assert_true (cd->reads <= 2);
  check_free (c);
  bdev_unref (&cd->d);
  bdev_unref (d);
}

/* 65,536 snapshots that all name one large L1 table: not followed for long. */
static void
test_overlapping_snapshots (void **state)
{
  struct bdev *d = plain ("cluster_size=65536");
  uint64_t table = ROUND_UP (bdev_size (d), 65536), l1 = table + 48 * 65536;
  CLEANUP_FREE uint8_t *buf = calloc (65536, 40);
  struct err err = { 0 };
  struct check *c;

  assert_ok (bdev_resize (d, l1 + 65536, &err), &err);
  for (unsigned i = 0; i < 65536; ++i) {
    store_be64 (buf + i * 40, l1);
    store_be32 (buf + i * 40 + 8, 8192);
  }
  put_bytes (d, table, buf, 65536 * 40);
  put64 (d, HEADER_OFF_SNAPSHOTS, table);
  put32 (d, HEADER_OFF_NB_SNAPSHOTS, 65536);
  c = check_image (d);
  assert_int_equal (c->snapshots.len, 65536);
  assert_true (findings_has (&c->findings, FINDING_SNAPSHOT_OVERLAP));
  assert_true (c->findings.totals[FINDING_SNAPSHOT_OVERLAP] < 200);
  assert_true (c->incomplete);
  check_free (c);
  bdev_unref (d);
}

/* --- far away */

static void
test_far_references (void **state)
{
  struct bdev *d = plain ("cluster_size=65536"), *big;
  CLEANUP_FREE uint8_t *bytes = malloc (bdev_size (d));
  struct err err = { 0 };
  struct check *c;

  assert_ok (bdev_pread (d, bytes, bdev_size (d), 0, &err), &err);
  assert_ok (mem_new ("big", UINT64_C (1) << 62, false, &big, &err), &err);
  put_bytes (big, 0, bytes, bdev_size (d));
  bdev_unref (d);
  c = check_image (big);
  assert_findings (c, "");
  check_free (c);
  put64 (big, l2_place (big, 0, 100), COPIED | UINT64_C (1) << 55);
  put64 (big, l2_place (big, 0, 101), COPIED | (MAX_HOST_OFF - 65536));
  put64 (big, l1_place (big, 0) + 8, COPIED | (MAX_HOST_OFF - 3 * 65536));
  put32 (big, HEADER_OFF_L1_SIZE, MAX_L1_BYTES / 8);    /* the rest of it is in a hole */
  zero_bytes (big, l2_place (big, 0, 0), 8 * 16);
  c = check_image (big);
  assert_true (findings_has (&c->findings, FINDING_RT_TOO_SMALL));
  assert_int_equal (ownermap_end (c->owners), MAX_HOST_OFF >> 16);
  assert_true (ownermap_memory (c->owners) < 1 << 20);
  check_free (c);
  bdev_unref (big);
}

static void
test_largest_device (void **state)
{
  static const uint64_t sizes[] = { UINT64_MAX, UINT64_MAX - 511, UINT64_C (1) << 63 };
  struct bdev *d = plain ("cluster_size=65536"), *big;
  CLEANUP_FREE uint8_t *bytes = malloc (bdev_size (d));
  struct err err = { 0 };

  assert_ok (bdev_pread (d, bytes, bdev_size (d), 0, &err), &err);
  for (unsigned i = 0; i < 3; ++i) {
    assert_ok (mem_new ("big", sizes[i], false, &big, &err), &err);
    put_bytes (big, 0, bytes, bdev_size (d));
    for (unsigned j = 0; j < 4; ++j) {
      static const unsigned fields[] = { HEADER_OFF_RT, HEADER_OFF_L1_TABLE,
                                         HEADER_OFF_SNAPSHOTS, HEADER_OFF_NB_SNAPSHOTS };
      struct check *c = check_image (big);

      check_free (c);
      put64 (big, fields[j], UINT64_C (0xffffffffffff0000));
    }
    bdev_unref (big);
  }
  bdev_unref (d);
}

/* --- nonsense */

/* Whatever check_run says, it says it twice, and in little memory too. */
static void
check_twice (struct bdev *d)
{
  struct check_options opts[3] = { { 0 }, { 0 }, { .memory_limit = 250 * 1024 } };
  char *text[3] = { NULL, NULL, NULL };
  int r[3];

  for (unsigned i = 0; i < 3; ++i) {
    struct err err = { 0 };
    struct check *c = NULL;

    r[i] = check_run (d, &opts[i], &c, &err);
    if (r[i] == 0)
      text[i] = findings_text (c);
    else
      assert_true (err.msg[0]);
    check_free (c);
  }
  assert_int_equal (r[0], r[1]);
  if (text[0])
    assert_string_equal (text[0], text[1]);
  for (unsigned i = 0; i < 3; ++i)
    free (text[i]);
}

static struct bdev *
rich (const char *opts)
{
  return make_image (opts, "2M",
                     "qemu-io -f qcow2 -c 'write 0 200k' -c 'write -c 320k 64k' \"$f\"; "
                     "qemu-img snapshot -c one \"$f\"; "
                     "qemu-io -f qcow2 -c 'write 0 20k' -c 'write 1M 64k' \"$f\"; "
                     "qemu-img bitmap --add -g 512 \"$f\" b0; "
                     "qemu-img snapshot -c two \"$f\"; "
                     "qemu-io -f qcow2 -c 'write 512k 20k' \"$f\"");
}

static struct bdev *
copy_of (struct bdev *d)
{
  CLEANUP_FREE uint8_t *bytes = malloc (bdev_size (d));
  struct err err = { 0 };
  struct bdev *copy;

  assert_ok (bdev_pread (d, bytes, bdev_size (d), 0, &err), &err);
  assert_ok (mem_new ("copy", bdev_size (d), true, &copy, &err), &err);
  put_bytes (copy, 0, bytes, bdev_size (d));
  return copy;
}

static void
test_header_of_all_ones (void **state)
{
  struct bdev *d = rich ("cluster_size=4096");

  for (unsigned off = 8; off < 120; off += 4) {
    for (unsigned bytes = 1; bytes <= 8; bytes *= 2) {
      struct bdev *copy = copy_of (d);

      for (unsigned i = 0; i < bytes; ++i)
        put_bytes (copy, off + i, "\xff", 1);
      check_twice (copy);
      bdev_unref (copy);
    }
  }
  bdev_unref (d);
}

static void
test_truncated (void **state)
{
  static const char *const opts[] = { "cluster_size=512", "cluster_size=65536" };

  for (unsigned i = 0; i < 2; ++i) {
    struct bdev *d = rich (opts[i]);
    struct check *c = check_image (d);
    uint64_t end = c->stats.image_end_off, step = c->geom.cluster_size == 512 ? 1024 : 16384;
    struct err err = { 0 };

    assert_findings (c, "");
    check_free (c);
    for (uint64_t size = ROUND_DOWN (bdev_size (d), step); size >= step; size -= step) {
      assert_ok (bdev_resize (d, size, &err), &err);
      c = check_image (d);
      /* A cluster is gone, so somebody misses it. */
      assert_int_equal (check_sound (c), size + (i ? 65535 : 511) >= end);
      check_free (c);
    }
    bdev_unref (d);
  }
}

/* Places where the image's structures hold pointers and lengths. */
DEFINE_VEC (places, uint64_t);

static void
add_place (struct places *v, uint64_t off)
{
  assert_int_equal (places_push (v, off), 0);
}

static void
collect_places (struct bdev *d, struct places *v)
{
  struct check *c = check_image (d);
  const struct header_ext *bitmaps = header_find_ext (&c->header, EXT_BITMAPS);

  for (unsigned off = 8; off < 112; off += 4)
    add_place (v, off);
  for (uint64_t i = 0; i < c->header.l1_entries && i < 8; ++i)
    add_place (v, l1_place (d, i));
  for (uint64_t i = 0; i < c->geom.l2_entries; i += 7)
    add_place (v, l2_place (d, 0, i));
  for (uint64_t i = 0; i < 16; ++i)
    add_place (v, rt_place (d, i));
  for (size_t i = 0; i < c->snapshots.len; ++i) {
    uint64_t at = c->header.snapshots_host_off + c->snapshots.ptr[i].entry_off;

    add_place (v, at);
    add_place (v, at + 8);
    add_place (v, at + 36);
    add_place (v, get64 (d, at));
  }
  if (bitmaps) {
    uint64_t dir = get64 (d, bitmaps->host_off + 16);

    for (unsigned off = 0; off < 24; off += 8) {
      add_place (v, bitmaps->host_off + off);
      add_place (v, dir + off);
      add_place (v, get64 (d, dir) + off);
    }
  }
  check_free (c);
}

/* Pointers at each other, past each other, and nonsense; a few at a time. */
static void
test_tables_on_tables (void **state)
{
  static const char *const opts[] = { "cluster_size=512", "cluster_size=4096,compat=0.10",
                                      "cluster_size=4096,refcount_bits=64",
                                      "cluster_size=16k,extended_l2=on" };
  uint64_t seed = 42;

  for (unsigned i = 0; i < 4; ++i) {
    /* Version 2 has no bitmaps. */
    struct bdev *d = i == 1 ? plain (opts[i]) : rich (opts[i]);
    struct places v = VEC_INIT;

    collect_places (d, &v);
    for (unsigned round = 0; round < 250; ++round) {
      struct bdev *copy = copy_of (d);

      for (unsigned n = test_random (&seed) % 3 + 1; n > 0; --n) {
        uint64_t at = v.ptr[test_random (&seed) % v.len];
        uint64_t other = v.ptr[test_random (&seed) % v.len], value;

        switch (test_random (&seed) % 6) {
        case 0: value = ROUND_DOWN (other, 512); break;
        case 1: value = get64 (d, ROUND_DOWN (other, 4)); break;
        case 2: value = get64 (d, at) + 512; break;
        case 3: value = test_random (&seed); break;
        case 4: value = get64 (d, at) ^ UINT64_C (1) << test_random (&seed) % 64; break;
        default: value = UINT64_MAX << test_random (&seed) % 64; break;
        }
        put64 (copy, MIN (at, bdev_size (copy) - 8), value);
      }
      check_twice (copy);
      bdev_unref (copy);
    }
    vec_reset (&v);
    bdev_unref (d);
  }
}

static void
test_random_bytes (void **state)
{
  struct bdev *d = rich ("cluster_size=4096");
  uint64_t seed = 7;

  for (unsigned round = 0; round < 200; ++round) {
    struct bdev *copy = copy_of (d);

    for (unsigned n = 0; n < 200; ++n) {
      uint8_t byte = test_random (&seed);

      put_bytes (copy, 8 + test_random (&seed) % (bdev_size (copy) - 8), &byte, 1);
    }
    check_twice (copy);
    bdev_unref (copy);
  }
  bdev_unref (d);
}

/* --- decisions, under attack */

/* Each entry of each table leads into metadata, or is nothing at all: every list
 * that the check keeps stays within bounds, and each entry has one fate.
 */
static void
assert_lists_sane (const struct check *c)
{
  assert_true (c->conflicts.len <= MAX_CONFLICTS);
  assert_true (c->conflicts.len <= c->nr_conflicts);
  for (size_t i = 0; i < c->bad.len; ++i) {
    const struct bad_run *b = &c->bad.ptr[i], *last = i ? b - 1 : NULL;

    assert_true (b->count > 0);
    assert_true (b->in_l1 || b->index + (uint64_t) b->count <= c->geom.l2_entries);
    if (last && last->table_host_off == b->table_host_off && last->in_l1 == b->in_l1 &&
        last->snapshot_index == b->snapshot_index)
      assert_true (last->index + (uint64_t) last->count <= b->index);
  }
}

static void
test_garbage_tables (void **state)
{
  static const char *const opts[] = { "cluster_size=512", "cluster_size=65536",
                                      "cluster_size=16k,extended_l2=on" };
  uint64_t seed = 11;

  for (unsigned i = 0; i < 3; ++i)
    for (unsigned kind = 0; kind < 4; ++kind) {
      struct bdev *d = rich (opts[i]);
      uint64_t cluster_size = cluster_size_of (d), l2 = l2_place (d, 0, 0);
      uint64_t n = get32 (d, HEADER_OFF_L1_SIZE), l1 = l1_place (d, 0);
      struct check *c;

      for (uint64_t at = l2; at < l2 + cluster_size; at += 8)
        switch (kind) {
        case 0: put64 (d, at, test_random (&seed)); break;
        case 1: put64 (d, at, COPIED | l1); break;
        case 2: put64 (d, at, COPIED | ROUND_DOWN (test_random (&seed) % bdev_size (d),
                                                   cluster_size)); break;
        case 3: put64 (d, at, at % 16 ? l2 | 4 : L2E_COMPRESSED | l2); break;
        }
      for (uint64_t j = 1; j < n && kind != 1; ++j)
        put64 (d, l1_place (d, j), kind == 0 ? test_random (&seed)
               : COPIED | ROUND_DOWN (test_random (&seed) % bdev_size (d), cluster_size));
      check_twice (d);
      c = check_image (d);
      assert_true (c->bad.len > 0);
      assert_lists_sane (c);
      check_free (c);
      bdev_unref (d);
    }
}

/* 16 tables with 8192 entries each, all of them in the L1 table. */
static void
test_many_conflicts (void **state)
{
  struct bdev *d = make_image ("cluster_size=65536,preallocation=metadata", "8G", "");
  CLEANUP_FREE uint8_t *table = malloc (65536);
  uint64_t l1 = get64 (d, HEADER_OFF_L1_TABLE);
  struct check_options small = { .memory_limit = 2 << 20 };
  struct err err = { 0 };
  struct check *c;

  for (unsigned i = 0; i < 8192; ++i)
    store_be64 (table + i * 8, COPIED | l1);
  for (unsigned i = 0; i < 16; ++i)
    put_bytes (d, l2_place (d, i, 0), table, 65536);
  c = check_image (d);
  assert_int_equal (c->findings.totals[FINDING_L2_ENTRY_OVERLAP], 16 * 8192);
  assert_int_equal (c->conflicts.len, MAX_CONFLICTS);
  assert_int_equal (c->nr_conflicts, 16 * 8192);
  assert_int_equal (c->bad.len, 16);    /* joined */
  assert_false (c->bad_truncated);
  assert_lists_sane (c);
  check_free (c);
  for (unsigned i = 0; i < 8192; i += 2)        /* nothing to join */
    store_be64 (table + i * 8, 0);
  for (unsigned i = 0; i < 16; ++i)
    put_bytes (d, l2_place (d, i, 0), table, 65536);
  assert_ok (check_run (d, &small, &c, &err), &err);
  assert_int_equal (c->findings.totals[FINDING_L2_ENTRY_OVERLAP], 16 * 4096);
  assert_true (c->bad_truncated);       /* the rest is for the next check */
  assert_lists_sane (c);
  check_free (c);
  bdev_unref (d);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_one_l2_table_65536_times),
    cmocka_unit_test (test_thousand_snapshots),
    cmocka_unit_test (test_overlapping_snapshots),
    cmocka_unit_test (test_far_references),
    cmocka_unit_test (test_largest_device),
    cmocka_unit_test (test_header_of_all_ones),
    cmocka_unit_test (test_truncated),
    cmocka_unit_test (test_tables_on_tables),
    cmocka_unit_test (test_random_bytes),
    cmocka_unit_test (test_garbage_tables),
    cmocka_unit_test (test_many_conflicts),
  };

  if (run ("command -v qemu-img && command -v qemu-io") != 0) {
    print_message ("SKIP: qemu-img or qemu-io is not installed\n");
    return 0;
  }
  return cmocka_run_group_tests_name ("hostile", tests, NULL, NULL);
}
