/* Persistent bitmaps at level all: QEMU fails to open an image with one that is
 * damaged, so what is wrong goes, and the others must still be there for it.
 */
#include "unit/heal/heal-test.h"

#define TWO "qemu-io -f qcow2 -c 'write -q -P 1 0 1M' $f && " \
            "qemu-img bitmap --add $f alpha && qemu-img bitmap --add $f beta && " \
            "qemu-io -f qcow2 -c 'write -q -P 2 512k 1M' $f"
#define ONE "qemu-io -f qcow2 -c 'write -q -P 1 0 1M' $f && qemu-img bitmap --add $f alpha"

/* Where the data of an extension lie; its length is before it. */
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

static uint64_t
directory (struct bdev *d)
{
  return get64 (d, ext_place (d, EXT_BITMAPS) + 16);
}

/* Entry i of the directory, and its length. */
static uint64_t
entry (struct bdev *d, unsigned i, uint64_t *len)
{
  uint64_t off = directory (d);

  for (;; --i, off += *len) {
    *len = ROUND_UP (24 + (get32 (d, off + 16) & 0xffff) + get32 (d, off + 20), 8);
    if (i == 0)
      return off;
  }
}

static void
assert_bitmaps (const struct patient *p, const char *names)
{
  assert_run (p, "test \"$(qemu-img info disk.qcow2 | awk '$1 == \"name:\" { printf \"%%s \", $2 }')\" "
              "= '%s'", names);
}

static void
assert_none_left (struct bdev *d, const struct patient *p)
{
  assert_bitmaps (p, "");
  assert_int_equal (ext_place (d, EXT_BITMAPS), 0);
  assert_int_equal (get64 (d, HEADER_OFF_AUTOCLEAR) & AUTOCLEAR_BITMAPS, 0);
  assert_run (p, "qemu-img bitmap --add disk.qcow2 new && qemu-img check -f qcow2 disk.qcow2");
}

/* Each of the two goes alone: the first moves the other, the last does not. */
static void
test_one_goes (void **state)
{
  static const char *const left[] = { "beta ", "alpha " };
  static const char *const sizes[] = { "cluster_size=64k", "cluster_size=512" };

  for (unsigned k = 0; k < 4; ++k) {
    struct bdev *d = make_image (sizes[k / 2], "8M", TWO);
    uint64_t was = directory (d), len, len_left;
    uint8_t before[256], after[256];
    struct err err = { 0 };
    struct patient p;

    entry (d, !(k % 2), &len_left);
    assert_ok (bdev_pread (d, before, len_left, entry (d, !(k % 2), &len), &err), &err);
    put64 (d, entry (d, k % 2, &len), UINT64_C (1) << 40);
    heal_patient (d, &p, "");
    assert_bitmaps (&p, left[k % 2]);
    assert_int_equal (directory (d) == was, k % 2 == 1);
    assert_ok (bdev_pread (d, after, len_left, entry (d, 0, &len), &err), &err);
    assert_memory_equal (before, after, len_left);
    assert_run (&p, "qemu-img bitmap --remove disk.qcow2 %s && qemu-img check -f qcow2 disk.qcow2",
                left[k % 2]);
    patient_free (&p);
  }
}

static void
test_last_one_goes (void **state)
{
  struct bdev *d = make_image ("cluster_size=64k", "8M", ONE);
  struct patient p;
  uint64_t len;

  put64 (d, entry (d, 0, &len), 0x10001);
  heal_patient (d, &p, "");
  assert_none_left (d, &p);
  patient_free (&p);
}

/* Offset, count and length that cannot be, or a directory that does not add up. */
static void
test_directory_damaged (void **state)
{
  for (unsigned k = 0; k < 4; ++k) {
    struct bdev *d = make_image ("cluster_size=4k", "8M", TWO);
    uint64_t ext = ext_place (d, EXT_BITMAPS), len;
    struct patient p;

    if (k == 0)
      put64 (d, ext + 16, UINT64_C (1) << 44);
    else if (k == 1)
      put32 (d, ext, 0);
    else if (k == 2)
      put64 (d, ext + 8, 40);
    else
      put32 (d, entry (d, 0, &len) + 20, 0x1000000);
    heal_patient (d, &p, "");
    assert_none_left (d, &p);
    patient_free (&p);
  }
}

/* Unknown extensions behind it and the backing file's name stay as they are. */
static void
test_other_extensions_stay (void **state)
{
  static const uint8_t unknown[] = { 'Q', 'R', 'S', 'T', 0, 0, 0, 5, 1, 2, 3, 4, 5, 0, 0, 0 };
  struct bdev *d = make_image ("cluster_size=4k", "8M",
                               "truncate -s 8M base.raw && qemu-img bitmap --add $f alpha && "
                               "qemu-img rebase -u -b base.raw -F raw $f");
  uint64_t ext, name = get64 (d, HEADER_OFF_BACKING_OFF), at;
  uint32_t name_len = get32 (d, HEADER_OFF_BACKING_LEN);
  struct err err = { 0 };
  uint8_t buf[64];

  /* Put one more behind the bitmaps: all that follows moves down by 16 bytes. */
  ext = ext_place (d, EXT_BITMAPS);
  at = ext + 24;
  {
    uint8_t rest[512];

    assert_ok (bdev_pread (d, rest, sizeof rest, at, &err), &err);
    put_bytes (d, at + 16, rest, sizeof rest);
    put_bytes (d, at, unknown, 16);
    put64 (d, HEADER_OFF_BACKING_OFF, name + 16);
  }
  put64 (d, ext + 16, UINT64_C (1) << 44);
  {
    struct heal_result res;
    struct lost lost;
    struct check *c;

    lost_init (&lost);
    assert_ok (heal_fully (d, &c, &res, &lost, &err), &err);
    check_free (c);
    lost_reset (&lost);
  }
  assert_int_equal (ext_place (d, EXT_BITMAPS), 0);
  at = ext_place (d, 0x51525354);
  assert_true (at != 0);
  assert_ok (bdev_pread (d, buf, 16, at - 8, &err), &err);
  assert_memory_equal (buf, unknown, 16);
  assert_int_equal (get64 (d, HEADER_OFF_BACKING_OFF), name + 16);
  assert_ok (bdev_pread (d, buf, name_len, name + 16, &err), &err);
  assert_memory_equal (buf, "base.raw", name_len);
  bdev_unref (d);
}

static void
test_full_device (void **state)
{
  struct bdev *d = make_image ("cluster_size=64k", "8M", TWO), *fixed;
  struct err err = { 0 };
  struct patient p;
  uint64_t len;

  put64 (d, entry (d, 0, &len), UINT64_C (1) << 40);
  assert_ok (mem_copy_of (d, &fixed, &err), &err);
  bdev_unref (d);
  fixed->can_grow = false;
  heal_patient (fixed, &p, "");
  assert_bitmaps (&p, "beta ");
  patient_free (&p);
}

static void
test_faults (void **state)
{
  for (unsigned k = 0; k < 2; ++k) {
    struct bdev *d = make_image ("cluster_size=4k", "8M", TWO);
    uint64_t len;

    put64 (d, k ? ext_place (d, EXT_BITMAPS) + 16 : entry (d, 0, &len), UINT64_C (1) << 40);
    sweep_faults (d);
    bdev_unref (d);
  }
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_one_goes),
    cmocka_unit_test (test_last_one_goes),
    cmocka_unit_test (test_directory_damaged),
    cmocka_unit_test (test_other_extensions_stay),
    cmocka_unit_test (test_full_device),
    cmocka_unit_test (test_faults),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
