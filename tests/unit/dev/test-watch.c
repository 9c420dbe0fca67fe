/* What could not be read: each bad sector is noted once, and nothing else is.
 */
#include <pthread.h>
#include <unistd.h>

#include "unit/unit.h"

#include "base/num.h"
#include "dev/mem.h"
#include "dev/watch.h"
#include "recorder.h"

#define SIZE (UINT64_C (16) << 20)

struct disk {
  struct bdev *mem, *under, *d; /* the watch is d */
};

static struct disk
new_disk (uint64_t size, bool narrow)
{
  struct err err = { 0 };
  struct disk k;

  assert_ok (mem_new ("disk", size, true, &k.mem, &err), &err);
  assert_ok (recorder_new (k.mem, narrow, &k.under, &err), &err);
  assert_ok (watch_new (k.under, narrow, &k.d, &err), &err);
  assert_int_equal (k.d->far, narrow);
  return k;
}

static void
free_disk (struct disk *k)
{
  bdev_unref (k->d);
  bdev_unref (k->under);
  bdev_unref (k->mem);
}

static void
fails (const struct disk *k, uint64_t off, uint64_t len, int error)
{
  uint8_t *buf = malloc (len);
  struct err err = { 0 };

  assert_int_equal (bdev_pread (k->d, buf, len, off, &err), -error);
  assert_int_not_equal (err.msg[0], 0);
  free (buf);
}

/* The notes are these ranges, given as pairs of offset and length up to a pair of zeros. */
static void
assert_notes (const struct disk *k, const uint64_t *want)
{
  struct watch_notes notes;
  uint64_t bytes = 0;
  size_t n = 0;

  assert_int_equal (watch_notes (k->d, &notes, NULL), 0);
  for (; want[2 * n + 1]; ++n) {
    assert_true (n < notes.ranges.len);
    assert_int_equal (notes.ranges.ptr[n].off, want[2 * n]);
    assert_int_equal (notes.ranges.ptr[n].len, want[2 * n + 1]);
    bytes += want[2 * n + 1];
  }
  assert_int_equal (notes.ranges.len, n);
  assert_int_equal (notes.bytes, bytes);
  vec_reset (&notes.ranges);
}

#define NOTES(k, ...) assert_notes (k, (const uint64_t[]) { __VA_ARGS__, 0, 0 })

static uint64_t
unreachable (const struct disk *k)
{
  struct watch_notes notes;

  assert_int_equal (watch_notes (k->d, &notes, NULL), 0);
  vec_reset (&notes.ranges);
  return notes.unreachable;
}

/* --- noting */

static void
joined_and_sorted (void **state)
{
  struct disk k = new_disk (SIZE, false);

  recorder_fail (k.under, 0, SIZE, EIO);
  NOTES (&k, 0, 0);
  fails (&k, 5000, 100, EIO);
  fails (&k, 1000, 100, EIO);
  fails (&k, 9000, 100, EIO);
  NOTES (&k, 1000, 100, 5000, 100, 9000, 100);
  fails (&k, 5000, 100, EIO);                   /* again */
  fails (&k, 5010, 10, EIO);
  NOTES (&k, 1000, 100, 5000, 100, 9000, 100);
  fails (&k, 4900, 100, EIO);                   /* touches, from below and from above */
  fails (&k, 5100, 100, EIO);
  NOTES (&k, 1000, 100, 4900, 300, 9000, 100);
  fails (&k, 4950, 300, EIO);                   /* overlaps */
  NOTES (&k, 1000, 100, 4900, 350, 9000, 100);
  fails (&k, 1099, 7902, EIO);                  /* all of them */
  NOTES (&k, 1000, 8100);
  fails (&k, 0, 1, EIO);
  fails (&k, SIZE - 1, 1, EIO);
  NOTES (&k, 0, 1, 1000, 8100, SIZE - 1, 1);
  fails (&k, 0, SIZE, EIO);
  NOTES (&k, 0, SIZE);
  recorder_heal (k.under);
  assert_int_equal (bdev_pread (k.d, (char[9]) { 0 }, 9, 0, NULL), 0);
  NOTES (&k, 0, SIZE);
  free_disk (&k);
}

/* The end of the address space, where sums could wrap. */
static void
at_the_end_of_all (void **state)
{
  uint64_t size = INT64_MAX;
  struct disk k = new_disk (size, true);

  recorder_fail (k.under, size - 600, 600, EIO);
  fails (&k, size - 5000, 5000, EIO);
  NOTES (&k, ROUND_DOWN (size - 600, 512), size - ROUND_DOWN (size - 600, 512));
  free_disk (&k);
}

static void
more_than_are_listed (void **state)
{
  struct disk k = new_disk (SIZE, false);
  struct watch_notes notes;
  unsigned nr = WATCH_MAX_RANGES + 500;

  recorder_fail (k.under, 0, SIZE, EIO);
  for (unsigned round = 0; round < 2; ++round)  /* a client tries again */
    for (unsigned i = 0; i < nr; ++i)
      fails (&k, (uint64_t) (i * 7 % nr) * 1000, 10, EIO);
  assert_int_equal (watch_notes (k.d, &notes, NULL), 0);
  assert_int_equal (notes.ranges.len, WATCH_MAX_RANGES);
  assert_int_equal (notes.bytes, nr * 10);
  for (size_t i = 1; i < notes.ranges.len; ++i)
    assert_true (notes.ranges.ptr[i - 1].off + 10 <= notes.ranges.ptr[i].off);
  vec_reset (&notes.ranges);
  fails (&k, 0, nr * 1000, EIO);
  NOTES (&k, 0, nr * 1000);
  free_disk (&k);
}

static void
other_errors (void **state)
{
  struct disk k = new_disk (SIZE, true);

  recorder_fail (k.under, 0, 512, ENOTCONN);
  recorder_fail (k.under, 512, 512, ESHUTDOWN);
  recorder_fail (k.under, 1024, 512, ETIMEDOUT);
  recorder_fail (k.under, 1536, 512, ENOMEM);
  fails (&k, 0, 5000, ENOTCONN);
  fails (&k, 512, 512, ESHUTDOWN);
  assert_int_equal (unreachable (&k), 2);
  fails (&k, 1024, 700, ETIMEDOUT);
  assert_int_equal (unreachable (&k), 3);
  fails (&k, 1536, 1, ENOMEM);                  /* no property of the disk */
  assert_int_equal (unreachable (&k), 3);
  NOTES (&k, 0, 0);
  free_disk (&k);
}

/* --- looking closer */

static void
narrow (void **state)
{
  struct disk k = new_disk (SIZE, true);

  recorder_fail (k.under, 70000, 1, EIO);       /* in sector 136 */
  fails (&k, 65536, 65536, EIO);
  NOTES (&k, 136 * 512, 512);
  fails (&k, 0, SIZE, EIO);                     /* however large the read is */
  NOTES (&k, 136 * 512, 512);
  fails (&k, 69999, 3, EIO);                    /* no larger than what was asked for */
  NOTES (&k, 136 * 512, 512);
  recorder_fail (k.under, 500000, 1, EIO);
  fails (&k, 499999, 3, EIO);
  NOTES (&k, 136 * 512, 512, 499999, 3);
  fails (&k, 499999, 1000, EIO);                /* begins inside a sector */
  NOTES (&k, 136 * 512, 512, 499999, 500224 - 499999);
  recorder_fail (k.under, SIZE - 1, 1, EIO);
  fails (&k, SIZE - 100, 100, EIO);
  fails (&k, SIZE - 100001, 100001, EIO);
  NOTES (&k, 136 * 512, 512, 499999, 500224 - 499999, SIZE - 512, 512);
  free_disk (&k);
}

/* Every length around the powers, at every offset inside a sector: one bad sector is found. */
static void
any_length (void **state)
{
  static const uint64_t around[] = { 513, 1024, 32 * 1024, 32 * 1024 + 63, 64 * 512 + 512, 65 * 512,
                                     1 << 20, (1 << 20) + 63, 4097 * 512 };

  for (size_t i = 0; i < sizeof around / sizeof *around; ++i)
    for (uint64_t shift = 0; shift < 512; shift += 73) {
      uint64_t len = around[i], off = 4096 + shift, bad = ROUND_DOWN (off + len - 1, 512);
      uint64_t from = MAX (bad, off);
      struct disk k = new_disk (SIZE, true);

      recorder_fail (k.under, off + len - 1, 1, EIO);
      fails (&k, off, len, EIO);
      NOTES (&k, from, off + len - from);
      free_disk (&k);
    }
}

static void
many_bad_sectors (void **state)
{
  struct disk k = new_disk (SIZE, true);
  uint64_t want[2 * 102] = { 0 };

  for (unsigned i = 0; i < 100; ++i) {
    want[2 * i] = i * 40960;
    want[2 * i + 1] = 512;
    recorder_fail (k.under, i * 40960, 512, EIO);
  }
  fails (&k, 0, 4 << 20, EIO);
  assert_notes (&k, want);
  /* All of it is bad: that is soon seen. */
  recorder_heal (k.under);
  recorder_fail (k.under, 8 << 20, 8 << 20, EIO);
  recorder_forget (k.under);
  fails (&k, 8 << 20, 8 << 20, EIO);
  assert_true (recorder_count (k.under, REC_READ) < 10000);
  want[200] = want[201] = 8 << 20;
  assert_notes (&k, want);
  free_disk (&k);
}

/* It goes out of reach while it is looked at: what failed is noted as it was asked for, or
 * closer, and the search ends.
 */
static void
lost_while_looking (void **state)
{
  struct disk k = new_disk (SIZE, true);
  struct watch_notes notes;

  recorder_fail (k.under, 512 * 1000, 512, EIO);
  recorder_fail (k.under, 0, 512, ENOTCONN);
  recorder_fail (k.under, 512 * 1001, 512, ENOTCONN);
  fails (&k, 512 * 999, 512 * 8, EIO);          /* the first that the recorder finds */
  assert_int_equal (watch_notes (k.d, &notes, NULL), 0);
  assert_int_equal (notes.ranges.len, 1);
  assert_int_equal (notes.bytes, 512 * 8);
  vec_reset (&notes.ranges);
  free_disk (&k);
}

/* --- many at once */

struct heard {
  atomic_uint good, bad, others;
  int answer;
};

static int
hear (void *opaque, size_t i, const void *buf, int r, const struct err *why)
{
  struct heard *h = opaque;

  atomic_fetch_add (r == 0 ? &h->good : r == -EIO ? &h->bad : &h->others, 1);
  return r == 0 ? 0 : h->answer;
}

static void
many_ranges (void **state)
{
  struct disk k = new_disk (SIZE, true);
  struct bdev_range ranges[100];
  struct heard h = { 0 };
  struct err err = { 0 };

  recorder_fail (k.under, 20 * 65536 + 5, 1, EIO);
  recorder_fail (k.under, 30 * 65536 + 600, 1, EIO);
  recorder_fail (k.under, 40 * 65536, 1, ENOTCONN);
  recorder_fail (k.under, SIZE - 1, 1, EIO);
  for (size_t i = 0; i < 100; ++i)
    ranges[i] = (struct bdev_range) { i * 65536, 65536 };
  ranges[97] = (struct bdev_range) { SIZE - 100, 5000 };        /* past the end */
  ranges[98] = (struct bdev_range) { SIZE + 100, 5000 };
  ranges[99] = (struct bdev_range) { 20 * 65536 + 5, 0 };
  assert_ok (bdev_read_many (k.d, ranges, 100, hear, &h, &err), &err);
  assert_int_equal (h.good, 96);
  assert_int_equal (h.bad, 3);
  assert_int_equal (h.others, 1);
  assert_int_equal (unreachable (&k), 1);
  NOTES (&k, 20 * 65536, 512, 30 * 65536 + 512, 512, SIZE - 100, 100);
  /* A callback that ends it all. */
  h.answer = -ECANCELED;
  assert_int_equal (bdev_read_many (k.d, ranges, 100, hear, &h, &err), -ECANCELED);
  free_disk (&k);
  k = new_disk (SIZE, false);
  recorder_fail (k.under, SIZE - 1, 1, EIO);
  assert_ok (bdev_read_many (k.d, ranges + 97, 1, hear, &(struct heard) { 0 }, &err), &err);
  NOTES (&k, SIZE - 100, 100);
  free_disk (&k);
}

struct reader {
  const struct disk *k;
  uint64_t seed;
};

static void *
read_at_random (void *opaque)
{
  struct reader *r = opaque;
  uint8_t buf[4096];

  for (int i = 0; i < 3000; ++i)
    bdev_pread (r->k->d, buf, 1 + test_random (&r->seed) % 4096,
                test_random (&r->seed) % (SIZE - 4096), NULL);
  return NULL;
}

static void
threads (void **state)
{
  struct disk k = new_disk (SIZE, true);
  struct reader readers[8];
  struct watch_notes notes;
  pthread_t ids[8];

  for (uint64_t i = 0; i < SIZE; i += 16384)
    recorder_fail (k.under, i, 512, EIO);
  for (unsigned i = 0; i < 8; ++i) {
    readers[i] = (struct reader) { &k, i };
    pthread_create (&ids[i], NULL, read_at_random, &readers[i]);
  }
  for (unsigned i = 0; i < 8; ++i)
    pthread_join (ids[i], NULL);
  assert_int_equal (watch_notes (k.d, &notes, NULL), 0);
  for (size_t i = 0; i < notes.ranges.len; ++i) {
    const struct unread_range *u = &notes.ranges.ptr[i];

    assert_true (u->off % 16384 < 512 && u->off % 16384 + u->len <= 512);
    assert_true (i == 0 || u[-1].off + u[-1].len < u->off);
  }
  assert_true (notes.ranges.len > 100);
  vec_reset (&notes.ranges);
  free_disk (&k);
}

/* --- all else */

static int
count_extents (void *opaque, uint64_t off, uint64_t len, unsigned kind)
{
  *(uint64_t *) opaque += kind & BDEV_ZERO ? len : 0;
  return 0;
}

/* All but the reads are the device's below, flags and all. */
static void
passes_on (void **state)
{
  static const enum recorded_op want[] = {
    REC_WRITE, REC_ZERO, REC_TRIM, REC_FLUSH, REC_RESIZE, REC_EXTENTS, REC_CACHE, REC_READ,
  };
  struct disk k = new_disk (SIZE, true);
  struct recorded_vec got;
  uint64_t zeros = 0;
  uint8_t b[2];

  assert_int_equal (bdev_pwrite (k.d, "x", 1, 7, BDEV_FUA, NULL), 0);
  assert_int_equal (bdev_zero (k.d, 8, 9, BDEV_FUA | BDEV_MAY_TRIM, NULL), 0);
  assert_int_equal (bdev_trim (k.d, 100, 10, BDEV_FUA, NULL), 0);
  assert_int_equal (bdev_flush (k.d, NULL), 0);
  assert_int_equal (bdev_resize (k.d, SIZE + 5, NULL), 0);
  assert_true (bdev_size (k.d) == SIZE + 5);
  assert_int_equal (bdev_extents (k.d, 0, SIZE + 5, count_extents, &zeros, NULL), 0);
  assert_true (zeros > SIZE / 2);
  assert_int_equal (bdev_cache (k.d, 5, 10, NULL), 0);
  assert_int_equal (bdev_pread (k.d, b, 2, 6, NULL), 0);
  assert_int_equal (b[1], 'x');
  got = recorder_take (k.under);
  assert_int_equal (got.len, 8);
  for (size_t i = 0; i < 8; ++i)
    assert_int_equal (got.ptr[i].op, want[i]);
  assert_int_equal (got.ptr[0].flags, BDEV_FUA);
  assert_int_equal (got.ptr[1].flags, BDEV_FUA | BDEV_MAY_TRIM);
  assert_int_equal (got.ptr[2].flags, BDEV_FUA);
  assert_int_equal (got.ptr[6].off, 5);
  assert_int_equal (got.ptr[6].len, 10);
  vec_reset (&got);
  free_disk (&k);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (joined_and_sorted),
    cmocka_unit_test (at_the_end_of_all),
    cmocka_unit_test (more_than_are_listed),
    cmocka_unit_test (other_errors),
    cmocka_unit_test (narrow),
    cmocka_unit_test (any_length),
    cmocka_unit_test (many_bad_sectors),
    cmocka_unit_test (lost_while_looking),
    cmocka_unit_test (many_ranges),
    cmocka_unit_test (threads),
    cmocka_unit_test (passes_on),
  };

  alarm (300);                  /* whoever looks closer for ever has failed */
  return cmocka_run_group_tests (tests, NULL, NULL);
}
