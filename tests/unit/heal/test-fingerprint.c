/* The checksums of a source decide whether an overlay that somebody has still fits: they
 * must stay what they were when it was made.
 */
#include "unit/unit.h"

#include "base/num.h"
#include "dev/mem.h"
#include "heal/fingerprint.h"
#include "journeys.h"

/* size bytes that no two places share. */
static struct bdev *
make_source (uint64_t size)
{
  static uint8_t buf[65536];
  struct err err = { 0 };
  uint64_t rng = 1;
  struct bdev *d;

  assert_ok (mem_new ("source", size, false, &d, &err), &err);
  for (uint64_t off = 0; off < size; off += sizeof buf) {
    for (size_t i = 0; i < sizeof buf; i += 8) {
      uint64_t x = test_random (&rng);

      for (unsigned k = 0; k < 8; ++k)          /* the same on every machine */
        buf[i + k] = x >> 8 * k;
    }
    assert_ok (bdev_pwrite (d, buf, MIN (sizeof buf, size - off), off, 0, &err), &err);
  }
  return d;
}

/* As computed by the first version that made overlays. */
static const struct {
  uint64_t size;
  uint32_t edges, samples;
} known[] = {
  { 0, 0, 0 },
  { 1, 0x3e611dab, 0 },
  { 4097, 0x59cbfb70, 0 },
  { 1 << 20, 0x0f206eba, 0 },
  { (1 << 20) + 1, 0x9b0a0667, 0 },
  { 2 << 20, 0x474a53de, 0 },
  { (2 << 20) + 1, 0x94f8f987, 0x3fa4b704 },
  { (9 << 20) + 12345, 0x8f265af2, 0x3790cf0d },
  { 64 << 20, 0xa6f259ff, 0xf0a69fda },
};

static void
test_known_sums (void **state)
{
  for (size_t i = 0; i < sizeof known / sizeof known[0]; ++i) {
    struct bdev *d = make_source (known[i].size);
    struct fingerprint f = { 0 };
    struct err err = { 0 };

    assert_ok (fingerprint_sums (d, &f, &err), &err);
    if (f.edges_crc != known[i].edges || f.samples_crc != known[i].samples)
      fail_msg ("%llu bytes: 0x%08x, 0x%08x", (unsigned long long) known[i].size, f.edges_crc,
                f.samples_crc);
    bdev_unref (d);
  }
}

/* From afar, all that is looked at comes at once. */
static void
test_journeys (void **state)
{
  struct bdev *d = make_source (known[8].size), *far;
  struct fingerprint f = { 0 };
  struct err err = { 0 };

  assert_ok (journeys_new (d, &far, &err), &err);
  assert_ok (fingerprint_sums (far, &f, &err), &err);
  assert_int_equal (f.edges_crc, known[8].edges);
  assert_int_equal (f.samples_crc, known[8].samples);
  assert_true (journeys_made (far) <= 5);       /* 258 ranges */
  bdev_unref (far);
  bdev_unref (d);
}

/* One range that cannot be read, and the error says why. */
static int
bad_pread (struct bdev *d, void *buf, size_t len, uint64_t off, struct err *err)
{
  return err_set (err, EIO, "a bad sector");
}

static void
bad_close (struct bdev *d)
{
}

static void
test_unreadable (void **state)
{
  static const struct bdev_ops ops = { .kind = "bad", .pread = bad_pread, .close = bad_close };
  struct fingerprint f = { 0 };
  struct err err = { 0 };
  struct bdev d;

  assert_ok (bdev_init (&d, &ops, "bad", 64 << 20, false, false, &err), &err);
  assert_int_equal (fingerprint_sums (&d, &f, &err), -EIO);
  assert_string_equal (err.msg, "a bad sector");
  bdev_unref (&d);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_known_sums),
    cmocka_unit_test (test_journeys),
    cmocka_unit_test (test_unreadable),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
