/* The snapshot table at level all: what cannot be right goes, what is right stays
 * byte for byte, and QEMU lists, reads and deletes what is left.
 */
#include "unit/heal/heal-test.h"

#define THREE "qemu-io -f qcow2 -c 'write -q -P 1 0 1M' $f && qemu-img snapshot -c one $f && " \
              "qemu-io -f qcow2 -c 'write -q -P 2 512k 1M' $f && qemu-img snapshot -c two $f && " \
              "qemu-io -f qcow2 -c 'write -q -P 3 1M 1M' $f && qemu-img snapshot -c three $f && " \
              "qemu-io -f qcow2 -c 'write -q -P 4 1536k 1M' $f"

static uint64_t
table (struct bdev *d)
{
  return get64 (d, HEADER_OFF_SNAPSHOTS);
}

/* Host offset of entry i, and its length with padding. */
static uint64_t
entry (struct bdev *d, unsigned i, uint64_t *len)
{
  uint64_t off = table (d);

  for (;; --i, off += *len) {
    uint32_t lens = get32 (d, off + 12);

    *len = ROUND_UP (40 + get32 (d, off + 36) + (lens >> 16) + (lens & 0xffff), 8);
    if (i == 0)
      return off;
  }
}

/* The guest bytes of snapshot n, or of the active disk, have that pattern at off. */
static void
assert_pattern (const struct patient *p, const char *snapshot, unsigned pattern, const char *off)
{
  if (snapshot)
    assert_run (p, "qemu-img convert -f qcow2 -O raw -l snapshot.name=%s disk.qcow2 s.raw", snapshot);
  else
    assert_run (p, "qemu-img convert -f qcow2 -O raw disk.qcow2 s.raw");
  assert_run (p, "qemu-io -f raw -c 'read -P %u %s 64k' s.raw >log && ! grep -q failed log", pattern,
              off);
}

static void
assert_names (const struct patient *p, const char *names)
{
  assert_run (p, "test \"$(qemu-img snapshot -l disk.qcow2 | sed 1,2d | awk '{ printf \"%%s \", $2 }')\" "
              "= '%s'", names);
}

/* Drop the one in the middle; the others must stay as they are. */
static void
test_middle_goes (void **state)
{
  static const char *const kinds[] = { "compat=1.1", "compat=0.10", "compat=1.1,cluster_size=512" };

  for (unsigned k = 0; k < 3; ++k) {
    struct bdev *d = make_image (kinds[k], "8M", THREE);
    uint8_t first[256], last[256], now[256];
    uint64_t first_len, middle_len, last_len, len, off;
    struct err err = { 0 };
    struct patient p;

    off = entry (d, 0, &first_len);
    assert_ok (bdev_pread (d, first, first_len, off, &err), &err);
    off = entry (d, 2, &last_len);
    assert_ok (bdev_pread (d, last, last_len, off, &err), &err);
    put64 (d, entry (d, 1, &middle_len), UINT64_C (1) << 40);
    heal_patient (d, &p, "");
    assert_names (&p, "one three ");
    assert_pattern (&p, "one", 1, "512k");
    assert_pattern (&p, "three", 3, "1M");
    assert_pattern (&p, NULL, 4, "2M");
    assert_int_equal (p.lost.snapshots.len, 1);
    assert_string_equal (p.lost.snapshots.ptr[0].name, "two");
    assert_string_equal (p.lost.snapshots.ptr[0].id, "2");
    assert_int_equal (p.lost.snapshots.ptr[0].why, FINDING_SNAPSHOT_L1_OUTSIDE);
    off = entry (d, 0, &len);
    assert_int_equal (len, first_len);
    assert_ok (bdev_pread (d, now, len, off, &err), &err);
    assert_memory_equal (now, first, len);
    off = entry (d, 1, &len);
    assert_int_equal (len, last_len);
    assert_ok (bdev_pread (d, now, len, off, &err), &err);
    assert_memory_equal (now, last, len);
    assert_run (&p, "qemu-img snapshot -d one disk.qcow2 && qemu-img check -f qcow2 disk.qcow2");
    patient_free (&p);
  }
}

static void
test_last_goes_in_place (void **state)
{
  struct bdev *d = make_image ("compat=1.1", "8M", THREE);
  uint64_t was = table (d), len;
  struct patient p;

  put64 (d, entry (d, 2, &len), 12345);
  heal_patient (d, &p, "");
  assert_int_equal (table (d), was);
  assert_names (&p, "one two ");
  assert_pattern (&p, "two", 2, "1M");
  patient_free (&p);
}

static void
test_all_go (void **state)
{
  struct bdev *d = make_image ("compat=1.1", "8M", THREE);
  struct patient p;
  uint64_t len;

  for (unsigned i = 0; i < 3; ++i)
    put64 (d, entry (d, i, &len), UINT64_C (7) << 40);
  heal_patient (d, &p, "");
  assert_int_equal (table (d), 0);
  assert_int_equal (get32 (d, HEADER_OFF_NB_SNAPSHOTS), 0);
  assert_int_equal (p.lost.snapshots.len, 3);
  assert_pattern (&p, NULL, 4, "2M");
  patient_free (&p);
}

static void
test_table_outside (void **state)
{
  struct bdev *d = make_image ("compat=1.1", "8M", THREE);
  struct patient p;

  put64 (d, HEADER_OFF_SNAPSHOTS, UINT64_C (1) << 40);
  heal_patient (d, &p, "");
  assert_int_equal (table (d), 0);
  assert_int_equal (p.lost.snapshots.len, 1);
  assert_int_equal (p.lost.snapshots.ptr[0].why, FINDING_SNAPSHOT_TABLE_OUTSIDE);
  assert_pattern (&p, NULL, 4, "2M");
  patient_free (&p);
}

/* An absurd count: the entries that are there are found all the same. */
/* QEMU opens no image with such a field, even if there are none. */
static void
test_place_without_count (void **state)
{
  static const uint64_t wrong[] = { 1, 0x10008, UINT64_C (1) << 63 };

  for (unsigned i = 0; i < sizeof wrong / sizeof wrong[0]; ++i)
    for (unsigned v2 = 0; v2 < 2; ++v2) {
      struct bdev *d = make_image (v2 ? "compat=0.10" : "compat=1.1", "8M",
                                   "qemu-io -f qcow2 -c 'write -q -P 1 0 1M' $f");
      struct patient p;

      put64 (d, HEADER_OFF_SNAPSHOTS, wrong[i]);
      heal_patient (d, &p, "");
      assert_int_equal (get64 (d, HEADER_OFF_SNAPSHOTS), 0);
      patient_free (&p);
    }
}

static void
test_count_absurd (void **state)
{
  struct bdev *d = make_image ("compat=1.1", "8M", THREE);
  struct patient p;

  put32 (d, HEADER_OFF_NB_SNAPSHOTS, 0x80000003);
  heal_patient (d, &p, "");
  assert_int_equal (get32 (d, HEADER_OFF_NB_SNAPSHOTS), 3);
  assert_int_equal (p.lost.snapshots.len, 0);
  assert_names (&p, "one two three ");
  assert_pattern (&p, "one", 1, "512k");
  patient_free (&p);

  /* Without a table there is nothing to find, and nothing lost. */
  d = make_image ("compat=1.1", "8M", "qemu-io -f qcow2 -c 'write -q -P 4 2M 64k' $f");
  put32 (d, HEADER_OFF_NB_SNAPSHOTS, 0x7fffffff);
  heal_patient (d, &p, "");
  assert_int_equal (get32 (d, HEADER_OFF_NB_SNAPSHOTS), 0);
  assert_int_equal (p.lost.snapshots.len, 0);
  patient_free (&p);
}

/* An entry that is no entry: that one goes, what is behind it is found. */
static void
test_entry_bad (void **state)
{
  struct bdev *d = make_image ("compat=1.1", "8M", THREE);
  struct patient p;
  uint64_t len;

  put32 (d, entry (d, 1, &len) + 36, 0xffffff00);
  heal_patient (d, &p, "");
  assert_names (&p, "one three ");
  assert_pattern (&p, "three", 3, "1M");
  assert_int_equal (p.lost.snapshots.len, 1);
  assert_int_equal (p.lost.snapshots.ptr[0].why, FINDING_SNAPSHOT_ENTRY_BAD);
  patient_free (&p);
}

/* Take the extra data out of every entry, as version 2 programs write them. */
static void
strip_extra_data (struct bdev *d, unsigned nr, unsigned keep)
{
  uint8_t buf[4096] = { 0 };
  uint64_t to = 0, len, off;
  struct err err = { 0 };

  for (unsigned i = 0; i < nr; ++i) {
    uint8_t e[1024];
    uint32_t extra, rest;

    off = entry (d, i, &len);
    assert_true (len <= sizeof e);
    assert_ok (bdev_pread_padded (d, e, len, off, &err), &err);
    extra = load_be32 (e + 36);
    rest = load_be16 (e + 12) + load_be16 (e + 14);
    memcpy (buf + to, e, 40);
    store_be32 (buf + to + 36, keep);
    memcpy (buf + to + 40, e + 40, keep);
    memcpy (buf + to + 40 + keep, e + 40 + extra, rest);
    to = ROUND_UP (to + 40 + keep + rest, 8);
  }
  put_bytes (d, table (d), buf, to);
}

static void
test_extra_data_is_added (void **state)
{
  for (unsigned keep = 0; keep <= 8; keep += 8) {
    struct bdev *d = make_image ("compat=1.1", "8M", THREE);
    uint64_t was = table (d), len;
    struct patient p;

    strip_extra_data (d, 3, keep);
    heal_patient (d, &p, "");
    assert_true (table (d) != was);
    for (unsigned i = 0; i < 3; ++i) {
      assert_int_equal (get32 (d, entry (d, i, &len) + 36), 16);
      assert_int_equal (get64 (d, entry (d, i, &len) + 48), 8 << 20);
    }
    assert_names (&p, "one two three ");
    assert_pattern (&p, "one", 1, "512k");
    assert_run (&p, "qemu-img snapshot -a two disk.qcow2 && qemu-img check -f qcow2 disk.qcow2");
    patient_free (&p);
  }
}

/* What the size was if the disk was resized since: larger, or smaller. */
static void
test_size_of_resized (void **state)
{
  struct bdev *d = make_image ("compat=1.1,cluster_size=512", "64k",
                               "qemu-img snapshot -c one $f && qemu-img resize -q $f 8M");
  struct patient p;
  uint64_t len;

  strip_extra_data (d, 1, 0);
  heal_patient (d, &p, "");
  /* What its L1 table can map; one L2 table of 64 entries maps 32 KiB. */
  assert_int_equal (get64 (d, entry (d, 0, &len) + 48),
                    get32 (d, entry (d, 0, &len) + 8) * UINT64_C (32768));
  patient_free (&p);

  d = make_image ("compat=1.1,cluster_size=512", "64k",
                  "qemu-io -f qcow2 -c 'write -q -P 5 50k 1k' $f && qemu-img snapshot -c one $f");
  put64 (d, HEADER_OFF_SIZE, 32768);
  strip_extra_data (d, 1, 0);
  heal_patient (d, &p, "");
  assert_int_equal (get64 (d, entry (d, 0, &len) + 48), 51 * 1024);
  patient_free (&p);
}

/* No room anywhere: the table is rewritten where it lies. */
static void
test_full_device (void **state)
{
  struct bdev *d = make_image ("compat=1.1", "8M", THREE), *fixed;
  struct err err = { 0 };
  struct patient p;
  uint64_t len;

  put64 (d, entry (d, 0, &len), UINT64_C (1) << 40);
  assert_ok (mem_copy_of (d, &fixed, &err), &err);
  bdev_unref (d);
  fixed->can_grow = false;
  heal_patient (fixed, &p, "");
  assert_names (&p, "two three ");
  assert_pattern (&p, "two", 2, "1M");
  patient_free (&p);
}

static void
test_faults (void **state)
{
  struct bdev *d = make_image ("compat=1.1,cluster_size=4k", "8M", THREE);
  uint64_t len;

  put64 (d, entry (d, 1, &len), UINT64_C (1) << 40);
  sweep_faults (d);
  bdev_unref (d);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_middle_goes),
    cmocka_unit_test (test_last_goes_in_place),
    cmocka_unit_test (test_all_go),
    cmocka_unit_test (test_table_outside),
    cmocka_unit_test (test_place_without_count),
    cmocka_unit_test (test_count_absurd),
    cmocka_unit_test (test_entry_bad),
    cmocka_unit_test (test_extra_data_is_added),
    cmocka_unit_test (test_size_of_resized),
    cmocka_unit_test (test_full_device),
    cmocka_unit_test (test_faults),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
