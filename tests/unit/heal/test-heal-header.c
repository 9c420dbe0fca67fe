/* The header at level all: fields, extensions, the backing file's name, and the
 * place and length of the active L1 table.
 */
#include "unit/heal/heal-test.h"

#define DATA "qemu-io -f qcow2 -c 'write -q -P 1 0 1M' -c 'write -q -P 2 7M 1M' $f"
#define BACKED "truncate -s 8M base.raw && qemu-img rebase -u -b base.raw -F raw $f && " \
               "qemu-img bitmap --add $f alpha"

static uint64_t
ext_place (struct bdev *d, uint32_t type)
{
  uint64_t off = get32 (d, HEADER_OFF_HEADER_LENGTH);
  uint32_t t;

  while ((t = get32 (d, off)) != type) {
    if (t == EXT_END)
      return 0;
    off += 8 + ROUND_UP (get32 (d, off + 4), 8);
  }
  return off + 8;
}

/* The guest's bytes: 1 MiB of 1, nothing, and 2 from 7 MiB up to end. */
static void
assert_guest (const struct patient *p, const char *end)
{
  assert_run (p, "qemu-img convert -f qcow2 -O raw disk.qcow2 g.raw && "
              "qemu-io -f raw -c 'read -P 1 0 1M' -c 'read -P 0 1M 6M' -c 'read -P 2 7M %s' g.raw >log && "
              "! grep -q failed log", end);
}

/* --- fields */

static void
test_header_length (void **state)
{
  static const uint32_t wrong[] = { 0, 72, 103, 113, 0x7fffffff };

  for (unsigned i = 0; i < sizeof wrong / sizeof wrong[0]; ++i) {
    struct bdev *d = make_image ("compat=1.1", "8M", DATA);
    struct patient p;

    put32 (d, HEADER_OFF_HEADER_LENGTH, wrong[i]);
    heal_patient (d, &p, "");
    assert_int_equal (get32 (d, HEADER_OFF_HEADER_LENGTH), 112);
    assert_guest (&p, "1M");
    patient_free (&p);
  }
}

/* QEMU opens no image that says its data file is raw and has none. */
static void
test_raw_without_data_file (void **state)
{
  struct bdev *d = make_image ("compat=1.1", "8M", DATA " && qemu-img bitmap --add $f alpha");
  struct patient p;

  put64 (d, HEADER_OFF_AUTOCLEAR, AUTOCLEAR_BITMAPS | AUTOCLEAR_DATA_FILE_RAW);
  heal_patient (d, &p, "");
  assert_int_equal (get64 (d, HEADER_OFF_AUTOCLEAR), AUTOCLEAR_BITMAPS);
  assert_guest (&p, "1M");
  patient_free (&p);
}

/* A place of the backing file's name without a length: there is none. */
static void
test_backing_without_length (void **state)
{
  static const uint64_t wrong[] = { 0x2000, 0x70, 0xfff8, UINT64_C (1) << 50 };

  for (unsigned i = 0; i < sizeof wrong / sizeof wrong[0]; ++i) {
    struct bdev *d = make_image ("compat=1.1", "8M", DATA);
    struct patient p;

    put64 (d, HEADER_OFF_BACKING_OFF, wrong[i]);
    heal_patient (d, &p, "");
    assert_int_equal (get64 (d, HEADER_OFF_BACKING_OFF), 0);
    assert_guest (&p, "1M");
    patient_free (&p);
  }
}

/* Only the length was lost: the name is there again. */
static void
test_backing_length_zeroed (void **state)
{
  struct bdev *d = make_image ("compat=1.1", "8M", BACKED);
  uint32_t len = get32 (d, HEADER_OFF_BACKING_LEN);
  uint64_t off = get64 (d, HEADER_OFF_BACKING_OFF);
  struct patient p;

  put32 (d, HEADER_OFF_BACKING_LEN, 0);
  heal_patient (d, &p, "");
  assert_int_equal (get64 (d, HEADER_OFF_BACKING_OFF), off);
  assert_int_equal (get32 (d, HEADER_OFF_BACKING_LEN), len);
  patient_free (&p);
}

/* --- extensions */

/* Every known extension with lengths that reach out: all of them are there again. */
static void
test_extension_lengths (void **state)
{
  static const uint32_t types[] = { EXT_BACKING_FORMAT, EXT_FEATURE_NAMES, EXT_BITMAPS };
  static const uint32_t lens[] = { 0x7fffffff, 0xffffffff, 0x1000000, 70000 };

  for (unsigned t = 0; t < 3; ++t)
    for (unsigned i = 0; i < 4; ++i) {
      struct bdev *d = make_image ("compat=1.1", "8M", BACKED);
      uint64_t off = ext_place (d, types[t]);
      uint32_t right = get32 (d, off - 4), name_len = get32 (d, HEADER_OFF_BACKING_LEN);
      uint64_t name = get64 (d, HEADER_OFF_BACKING_OFF);
      struct patient p;

      put32 (d, off - 4, lens[i]);
      heal_patient (d, &p, "");
      assert_int_equal (ext_place (d, types[t]), off);
      assert_int_equal (get32 (d, off - 4), right);
      assert_int_equal (get64 (d, HEADER_OFF_BACKING_OFF), name);
      assert_int_equal (get32 (d, HEADER_OFF_BACKING_LEN), name_len);
      assert_run (&p, "qemu-img info disk.qcow2 >info && grep -q alpha info && "
                  "grep -q 'backing file format: raw' info");
      patient_free (&p);
    }
}

/* A format of eight letters runs into the type of the feature names, whose first is one, too. */
static void
test_format_runs_on (void **state)
{
  struct bdev *d = make_image ("compat=1.1", "8M", BACKED);
  uint64_t off = ext_place (d, EXT_BACKING_FORMAT);
  struct err err = { 0 };
  struct check *c;
  struct heal_result res;
  struct lost lost;

  put_bytes (d, off, "quorum12", 8);
  assert_int_equal (get32 (d, off + 8), EXT_FEATURE_NAMES);
  put32 (d, off - 4, 0x40000000);
  lost_init (&lost);
  assert_ok (heal_fully (d, &c, &res, &lost, &err), &err);
  assert_findings (c, "");
  assert_int_equal (get32 (d, off - 4), 8);
  check_free (c);
  lost_reset (&lost);
  bdev_unref (d);
}

/* Nothing says how long an unknown extension is, but what follows it may.  Else the list ends. */
static void
test_unknown_extension (void **state)
{
  struct bdev *d = make_image ("compat=1.1", "8M", BACKED);
  uint64_t features = ext_place (d, EXT_FEATURE_NAMES), bitmaps = ext_place (d, EXT_BITMAPS);
  struct patient p;

  put32 (d, features - 8, 0x12345678);
  put32 (d, features - 4, 0x7fffffff);
  heal_patient (d, &p, "");
  assert_int_equal (get32 (d, features - 4), bitmaps - 8 - features);
  assert_int_equal (ext_place (d, EXT_BITMAPS), bitmaps);
  patient_free (&p);

  d = make_image ("compat=1.1", "8M", DATA);
  features = ext_place (d, EXT_FEATURE_NAMES);
  put32 (d, features - 8, 0x12345678);
  put32 (d, features - 4, 0x7fffffff);
  heal_patient (d, &p, "");
  assert_int_equal (get32 (d, features - 8), EXT_END);
  assert_guest (&p, "1M");
  patient_free (&p);
}

/* Bytes in the contents that can be no format: the extension goes, the others are kept. */
static void
test_extension_taken_out (void **state)
{
  struct bdev *d = make_image ("compat=1.1", "8M", BACKED);
  uint64_t off = ext_place (d, EXT_BACKING_FORMAT), features = ext_place (d, EXT_FEATURE_NAMES);
  struct patient p;

  put32 (d, off - 4, 0x7fffffff);
  put32 (d, off, 0x01020304);
  heal_patient (d, &p, "");
  assert_int_equal (ext_place (d, EXT_BACKING_FORMAT), 0);
  assert_int_equal (ext_place (d, EXT_FEATURE_NAMES), off);
  assert_true (features > off);
  assert_run (&p, "qemu-img info disk.qcow2 >info && grep -q alpha info && grep -q base.raw info");
  patient_free (&p);
}

static void
test_crosvm_format (void **state)
{
  for (unsigned both = 0; both < 2; ++both) {
    struct bdev *d = make_image ("compat=1.1", "8M", BACKED);
    uint64_t off = ext_place (d, EXT_BACKING_FORMAT), features = ext_place (d, EXT_FEATURE_NAMES);
    struct patient p;

    put32 (d, off - 8, EXT_BACKING_FORMAT_CROSVM);
    if (both) {
      put32 (d, features - 8, EXT_BACKING_FORMAT);
      put32 (d, features - 4, 3);
      put_bytes (d, features, "raw", 3);
      zero_bytes (d, features + 3, 5);
      zero_bytes (d, features + 8, 16);
    }
    heal_patient (d, &p, "");
    assert_int_equal (ext_place (d, EXT_BACKING_FORMAT), off);
    assert_int_equal (ext_place (d, EXT_BACKING_FORMAT_CROSVM), 0);
    assert_run (&p, "qemu-img info disk.qcow2 | grep 'backing file format: raw'");
    patient_free (&p);
  }
}

/* --- the name of the backing file */

static void
test_backing_name (void **state)
{
  static const struct { uint64_t off; uint32_t len; bool known; } wrong[] = {
    { UINT64_C (0x7fffff00), 8, true },         /* the place */
    { 65530, 8, true },                         /* ends outside */
    { 0, 5000, true },                          /* 0 = as it was: the length */
    { UINT64_C (0x7fffff00), 5000, false },     /* both */
    { UINT64_C (0x7fffff00), 7, false },
    { 200, 8, true },                           /* in the midst of the extensions */
    { 138, 8, true },                           /* and at text */
  };

  for (unsigned i = 0; i < sizeof wrong / sizeof wrong[0]; ++i) {
    struct bdev *d = make_image ("compat=1.1", "8M", BACKED);
    uint64_t off = get64 (d, HEADER_OFF_BACKING_OFF);
    struct patient p;

    put64 (d, HEADER_OFF_BACKING_OFF, wrong[i].off ? wrong[i].off : off);
    put32 (d, HEADER_OFF_BACKING_LEN, wrong[i].len);
    heal_patient (d, &p, "");
    assert_int_equal (get64 (d, HEADER_OFF_BACKING_OFF), wrong[i].known ? off : 0);
    assert_int_equal (get32 (d, HEADER_OFF_BACKING_LEN), wrong[i].known ? 8 : 0);
    assert_run (&p, "qemu-img info disk.qcow2 >info && grep -q alpha info");
    assert_int_equal (run ("grep -q 'backing file: base.raw' %s/info", p.folder), !wrong[i].known);
    patient_free (&p);
  }
}

/* --- the L1 table */

/* 8 MiB in clusters of 512 bytes: 256 entries. */
static void
test_l1_too_small (void **state)
{
  static const uint32_t sizes[] = { 1, 64, 100, 255 };

  for (unsigned i = 0; i < 4; ++i) {
    struct bdev *d = make_image ("compat=1.1,cluster_size=512", "8M", DATA);
    uint64_t was = get64 (d, HEADER_OFF_L1_TABLE);
    struct patient p;

    put32 (d, HEADER_OFF_L1_SIZE, sizes[i]);
    heal_patient (d, &p, "");
    assert_int_equal (get32 (d, HEADER_OFF_L1_SIZE), 256);
    assert_int_equal (get64 (d, HEADER_OFF_L1_TABLE), was);
    assert_guest (&p, "1M");
    patient_free (&p);
  }
}

/* The disk is larger than it was made: there is no room behind the table. */
static void
test_l1_moves (void **state)
{
  for (unsigned v3 = 0; v3 < 2; ++v3) {
    struct bdev *d = make_image (v3 ? "compat=1.1,cluster_size=512" : "compat=0.10,cluster_size=512",
                                 "8M", DATA);
    uint64_t was = get64 (d, HEADER_OFF_L1_TABLE);
    struct patient p;

    put64 (d, HEADER_OFF_SIZE, 32 << 20);
    heal_patient (d, &p, "");
    assert_int_equal (get32 (d, HEADER_OFF_L1_SIZE), 1024);
    assert_true (get64 (d, HEADER_OFF_L1_TABLE) != was);
    assert_guest (&p, "1M");
    assert_run (&p, "qemu-io -f qcow2 -c 'write -q -P 3 31M 1M' disk.qcow2 && qemu-img check disk.qcow2");
    patient_free (&p);
  }
}

static void
test_l1_moves_on_full_device (void **state)
{
  struct bdev *d = make_image ("compat=1.1,cluster_size=512", "8M", DATA), *fixed;
  struct heal_result res;
  struct err err = { 0 };
  struct check *c;
  struct lost lost;

  put64 (d, HEADER_OFF_SIZE, 32 << 20);
  assert_ok (mem_copy_of (d, &fixed, &err), &err);
  bdev_unref (d);
  fixed->can_grow = false;
  lost_init (&lost);
  assert_int_equal (heal_fully (fixed, &c, &res, &lost, &err), -ENOSPC);
  assert_non_null (strstr (err.msg, "no room for 16 clusters"));
  assert_int_equal (get32 (fixed, HEADER_OFF_L1_SIZE), 256);
  lost_reset (&lost);
  bdev_unref (fixed);
}

static void
test_l1_too_large (void **state)
{
  static const uint32_t sizes[] = { 0x7fffffff, 1024, 300000 };

  for (unsigned i = 0; i < 3; ++i) {
    struct bdev *d = make_image ("compat=1.1,cluster_size=512", "8M", DATA);
    struct patient p;

    put32 (d, HEADER_OFF_L1_SIZE, sizes[i]);
    heal_patient (d, &p, "");
    assert_int_equal (get32 (d, HEADER_OFF_L1_SIZE), 256);
    assert_guest (&p, "1M");
    patient_free (&p);
  }
}

/* Move the L1 table to the end of the file, and cut that after entries. */
static void
cut_l1 (struct bdev *d, unsigned entries)
{
  uint64_t n = get32 (d, HEADER_OFF_L1_SIZE) * 8, end = ROUND_UP (bdev_size (d), cluster_size_of (d));
  CLEANUP_FREE uint8_t *l1 = malloc (n);
  struct err err = { 0 };

  assert_ok (bdev_pread (d, l1, n, get64 (d, HEADER_OFF_L1_TABLE), &err), &err);
  assert_ok (bdev_resize (d, end + n, &err), &err);
  put_bytes (d, end, l1, n);
  put64 (d, HEADER_OFF_L1_TABLE, end);
  assert_ok (bdev_resize (d, end + entries * 8, &err), &err);
}

/* In the last cluster of the file there is room, behind it the table moves. */
static void
test_l1_cut (void **state)
{
  static const struct { const char *opts; unsigned keep; uint64_t lost_off; } cuts[] = {
    { "compat=1.1,cluster_size=512", 125, 125 * 32768 },
    { "compat=1.1,cluster_size=512", 230, 230 * 32768 },
    { "compat=1.1,cluster_size=4k", 1, 2 << 20 },
    { "compat=0.10,cluster_size=4k", 2, 4 << 20 },
  };

  for (unsigned i = 0; i < sizeof cuts / sizeof cuts[0]; ++i)
    for (unsigned backed = 0; backed < 2; ++backed) {
      struct bdev *d = make_image (cuts[i].opts, "8M",
                                   backed ? DATA " && touch base.raw && qemu-img rebase -u -b base.raw "
                                            "-F raw $f" : DATA);
      unsigned kept = cuts[i].lost_off > 7 << 20 ? cuts[i].lost_off - (7 << 20) : 0;
      struct patient p;

      cut_l1 (d, cuts[i].keep);
      heal_patient (d, &p, "");
      assert_int_equal (p.lost.active_bytes, (8 << 20) - cuts[i].lost_off);
      assert_int_equal (p.lost.ranges.ptr[0].guest_off, cuts[i].lost_off);
      if (backed)
        assert_run (&p, "qemu-io -f raw -c 'write -q -P 9 0 8M' base.raw");
      assert_run (&p, "qemu-img convert -f qcow2 -O raw disk.qcow2 g.raw && qemu-io -f raw "
                  "-c 'read -P 1 0 1M' -c 'read -P %u 1M 1M' -c 'read -P 2 7M %u' "
                  "-c 'read -P 0 %llu %llu' g.raw >log && ! grep -q failed log", backed ? 9 : 0, kept,
                  (unsigned long long) cuts[i].lost_off,
                  (unsigned long long) (8 << 20) - cuts[i].lost_off);
      patient_free (&p);
    }
}

static void
test_faults (void **state)
{
  struct bdev *d = make_image ("compat=1.1,cluster_size=4k", "8M", BACKED);

  put64 (d, HEADER_OFF_SIZE, UINT64_C (4) << 30);       /* the table moves */
  put32 (d, ext_place (d, EXT_BITMAPS) - 4, 0x7fffffff);
  put32 (d, ext_place (d, EXT_BACKING_FORMAT) - 8, EXT_BACKING_FORMAT_CROSVM);
  put32 (d, HEADER_OFF_HEADER_LENGTH, 7);
  put64 (d, HEADER_OFF_BACKING_OFF, UINT64_C (1) << 60);
  sweep_faults (d);
  bdev_unref (d);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_header_length),
    cmocka_unit_test (test_raw_without_data_file),
    cmocka_unit_test (test_backing_without_length),
    cmocka_unit_test (test_backing_length_zeroed),
    cmocka_unit_test (test_extension_lengths),
    cmocka_unit_test (test_format_runs_on),
    cmocka_unit_test (test_unknown_extension),
    cmocka_unit_test (test_extension_taken_out),
    cmocka_unit_test (test_crosvm_format),
    cmocka_unit_test (test_backing_name),
    cmocka_unit_test (test_l1_too_small),
    cmocka_unit_test (test_l1_moves),
    cmocka_unit_test (test_l1_moves_on_full_device),
    cmocka_unit_test (test_l1_too_large),
    cmocka_unit_test (test_l1_cut),
    cmocka_unit_test (test_faults),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
