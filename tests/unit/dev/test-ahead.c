/* What a loop announces to a far device: all that it reads, soon enough, once, and no more
 * than some portions ahead.  And the devices that lie on a far one.
 */
#include "unit/unit.h"

#include "base/num.h"
#include "dev/ahead.h"
#include "dev/concat.h"
#include "dev/lossy.h"
#include "dev/mem.h"
#include "journeys.h"

#define SIZE (UINT64_C (64) << 20)

/* Its bytes tell where they are. */
static struct bdev *
far_disk (void)
{
  static uint8_t bytes[1 << 20];
  struct bdev *mem = NULL, *far = NULL;
  struct err err = { 0 };

  assert_ok (mem_new ("disk", SIZE, false, &mem, &err), &err);
  for (uint64_t off = 0; off < SIZE; off += sizeof bytes) {
    for (size_t i = 0; i < sizeof bytes; ++i)
      bytes[i] = (off + i) / 1000;
    assert_ok (bdev_pwrite (mem, bytes, sizeof bytes, off, 0, &err), &err);
  }
  assert_ok (journeys_new (mem, &far, &err), &err);
  bdev_unref (mem);
  return far;
}

static void
read_at (struct bdev *d, uint64_t off, size_t len)
{
  static uint8_t buf[1 << 20];
  struct err err = { 0 };

  assert_ok (bdev_pread_padded (d, buf, len, off, &err), &err);
  for (size_t i = 0; i < len; i += 100)
    assert_int_equal (buf[i], off + i < SIZE ? (uint8_t) ((off + i) / 1000) : 0);
}

struct loop {
  unsigned asked, scouted;
  struct bdev *d;
};

/* Every third step reads nothing; the last ones read past the end. */
static bool
range_of_step (void *opaque, uint64_t i, struct bdev_range *range)
{
  ++((struct loop *) opaque)->asked;
  *range = (struct bdev_range) { i * 65600, 4096 };
  return i % 3 != 2;
}

/* Each needs something else, too. */
static void
scout_step (void *opaque, uint64_t i)
{
  struct loop *loop = opaque;

  ++loop->scouted;
  read_at (loop->d, i * 65600, 4096);
  ahead_hint (loop->d, i * 65600 + 20000, 4096);
}

static void
test_loop (void **state)
{
  uint64_t nr = SIZE / 65600 + 5;
  struct bdev *d = far_disk ();

  for (unsigned scouts = 0; scouts < 2; ++scouts) {
    struct loop loop = { .d = d };
    struct ahead a;

    journeys_reset (d);
    ahead_init (&a, d, nr, range_of_step, &loop);
    a.scout = scouts ? scout_step : NULL;
    for (uint64_t i = 0; i < nr; ++i) {
      if (i % 3 == 2)
        continue;
      ahead_at (&a, i);
      ahead_at (&a, i / 2);     /* going back does nothing */
      assert_in_range (a.announced, MIN (i + 1, nr), i + 3 * 64 * 3 / 2);
      read_at (d, i * 65600, 4096);
      if (scouts)
        read_at (d, i * 65600 + 20000, 4096);
    }
    assert_in_range (journeys_made (d), 5, 25);         /* 686 reads, or twice as many */
    assert_in_range (loop.asked, nr, nr * 2);
    assert_int_equal (loop.scouted, scouts ? nr - nr / 3 : 0);
  }
  bdev_unref (d);
}

static void
test_bytes (void **state)
{
  struct bdev *d = far_disk ();
  struct ahead a;

  journeys_reset (d);
  ahead_init_bytes (&a, d, 12345, 20 << 20, 100000);
  for (uint64_t done = 0; done < 20 << 20; done += 100000) {
    ahead_at (&a, done / 100000);
    read_at (d, 12345 + done, MIN (100000, (20 << 20) - done));
  }
  assert_in_range (journeys_made (d), 2, 6);
  /* Nothing is announced to who does not need it, and nothing is no loop. */
  journeys_reset (d);
  d->far = false;
  ahead_init_bytes (&a, d, 0, 1 << 20, 100000);
  ahead_at (&a, 0);
  read_at (d, 0, 1000);
  assert_int_equal (journeys_made (d), 1);
  d->far = true;
  ahead_init_bytes (&a, d, 0, 0, 100000);
  ahead_at (&a, 0);
  ahead_init_bytes (&a, d, SIZE - 5, 1000, 100000);
  ahead_at (&a, 0);
  ahead_init_bytes (&a, d, UINT64_MAX - 5000, 1000, 100);
  ahead_at (&a, 0);
  bdev_unref (d);
}

/* 500 pieces of the disk as one device. */
static void
test_concat (void **state)
{
  struct slice_of_vec v = VEC_INIT;
  struct bdev *far = far_disk (), *d = NULL;
  static uint8_t buf[500 * 3000];
  struct err err = { 0 };

  for (uint64_t i = 0; i < 500; ++i)
    assert_int_equal (slice_of_vec_push (&v, (struct slice_of) { (500 - i) * 100000, 3000 }), 0);
  assert_ok (concat_new ("all", far, &v, &d, &err), &err);
  assert_true (d->far);
  for (uint64_t off = 0; off < 9000; off += 1100) {
    journeys_reset (far);
    assert_ok (bdev_pread (d, buf, sizeof buf - off, off, &err), &err);
    assert_in_range (journeys_made (far), 1, 8);
    for (uint64_t i = off; i < sizeof buf; i += 50)
      assert_int_equal (buf[i - off], (uint8_t) (((500 - i / 3000) * 100000 + i % 3000) / 1000));
  }
  bdev_unref (d);
  bdev_unref (far);
}

/* --- lost ranges */

struct seen {
  const struct bdev_range *ranges;
  atomic_uint failed, read;
};

static int
see (void *opaque, size_t i, const void *buf, int r, const struct err *why)
{
  struct seen *s = opaque;
  const uint8_t *p = buf;
  uint64_t off = s->ranges[i].off;

  atomic_fetch_add (r < 0 ? &s->failed : &s->read, 1);
  if (r < 0)
    return r == -EIO && strstr (why->msg, "lost") ? 0 : r;
  for (size_t k = 0; k < s->ranges[i].len; ++k)
    if (p[k] != (off + k < SIZE ? (uint8_t) ((off + k) / 1000) : 0))
      return -EBADMSG;
  return 0;
}

static void
test_lossy (void **state)
{
  struct lossy_range lost = { 5 << 20, 100 };
  struct bdev *far = far_disk (), *d = NULL;
  struct bdev_range ranges[100];
  struct seen s = { .ranges = ranges };
  struct err err = { 0 };

  assert_ok (lossy_new (far, &lost, 1, &d, &err), &err);
  assert_true (d->far);
  for (uint64_t i = 0; i < 100; ++i)
    ranges[i] = (struct bdev_range) { (6 << 20) + i * 100000, 3000 };
  ranges[7].off = SIZE - 100;
  ranges[8].off = UINT64_MAX - 5000;
  ranges[9].len = 0;
  journeys_reset (far);
  assert_ok (bdev_read_many (d, ranges, 100, see, &s, &err), &err);
  assert_int_equal (atomic_load (&s.read), 100);
  assert_in_range (journeys_made (far), 1, 2);
  ranges[50] = (struct bdev_range) { (5 << 20) - 10, 20 };
  ranges[51] = (struct bdev_range) { (5 << 20) - 10, 10 };
  atomic_store (&s.read, 0);
  assert_ok (bdev_read_many (d, ranges, 100, see, &s, &err), &err);
  assert_int_equal (atomic_load (&s.read), 99);
  assert_int_equal (atomic_load (&s.failed), 1);
  bdev_unref (d);
  bdev_unref (far);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_loop),
    cmocka_unit_test (test_bytes),
    cmocka_unit_test (test_concat),
    cmocka_unit_test (test_lossy),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
