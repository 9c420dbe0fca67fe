/* Whoever reads from front to back finds the bytes announced; nobody else causes traffic.
 */
#include <pthread.h>

#include "unit/unit.h"

#include "base/num.h"
#include "dev/mem.h"
#include "dev/readahead.h"
#include "recorder.h"

#define MIB  (UINT64_C (1) << 20)
#define SIZE (UINT64_C (4096) * MIB)

struct disk {
  struct bdev *mem, *under, *d;
};

static struct disk
new_disk (uint64_t size)
{
  struct err err = { 0 };
  struct disk k;

  assert_ok (mem_new ("disk", size, true, &k.mem, &err), &err);
  assert_ok (recorder_new (k.mem, true, &k.under, &err), &err);
  assert_ok (readahead_new (k.under, READAHEAD_WINDOW, &k.d, &err), &err);
  assert_true (k.d->far);
  assert_int_equal (bdev_size (k.d), size);
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
read_at (const struct disk *k, uint64_t off, uint64_t len)
{
  static __thread uint8_t buf[2 << 20];
  struct err err = { 0 };

  assert_ok (bdev_pread (k->d, buf, len, off, &err), &err);
}

/* How the reads of a range fared, from the list: bytes that were announced before, and how far
 * ahead of the reads announcements ran at most.
 */
struct fate {
  uint64_t read, announced, ahead;
};

static struct fate
fate_of (const struct recorded_vec *v, uint64_t from, uint64_t to)
{
  uint64_t begin = to, end = to;        /* announced, in one piece */
  struct fate f = { 0 };

  for (size_t i = 0; i < v->len; ++i) {
    const struct recorded *r = &v->ptr[i];

    if (r->off < from || r->off >= to)
      continue;
    if (r->op == REC_CACHE) {
      if (begin == to)
        begin = end = r->off;
      assert_int_equal (r->off, MAX (end, r->off));     /* nothing is announced twice */
      end = r->off + r->len;
    }
    else {
      f.read += r->len;
      f.announced += r->off >= begin && r->off + r->len <= end ? r->len : 0;
      f.ahead = MAX (f.ahead, end > r->off && begin < to ? end - r->off : 0);
    }
  }
  return f;
}

static void
one_after_the_other (void **state)
{
  static const uint64_t lens[] = { 4096, 65536, 262144, 512 * 3 };

  for (size_t i = 0; i < 4; ++i) {
    struct disk k = new_disk (SIZE);
    uint64_t from = 100 * MIB, bytes = MIN (lens[i] * 3000, 300 * MIB);
    struct recorded_vec v;
    struct fate f;

    for (uint64_t at = 0; at < bytes; at += lens[i])
      read_at (&k, from + at, lens[i]);
    v = recorder_take (k.under);
    f = fate_of (&v, from, SIZE);
    assert_int_equal (f.announced, f.read - 3 * lens[i]);       /* all but the first */
    assert_in_range (f.ahead, MIB, 49 * MIB);
    vec_reset (&v);
    free_disk (&k);
  }
}

/* What was announced to a reader that stops is a waste: it grows with what was read. */
static void
who_stops_early (void **state)
{
  for (unsigned n = 1; n <= 64; n *= 2) {
    struct disk k = new_disk (SIZE);
    uint64_t ahead;

    for (unsigned i = 0; i < n; ++i)
      read_at (&k, i * 65536, 65536);
    ahead = recorder_bytes (k.under, REC_CACHE);
    assert_true (n < 3 ? ahead == 0 : ahead <= MAX (MIB, n * 65536 * 8));
    free_disk (&k);
  }
}

static void
at_the_end (void **state)
{
  for (uint64_t size = 5 * MIB + 1; size < 5 * MIB + 70000; size += 8191) {
    struct disk k = new_disk (size);
    struct recorded_vec v;

    for (uint64_t at = 0; at < size; at += 65536)
      read_at (&k, at, MIN (65536, size - at));
    v = recorder_take (k.under);
    for (size_t i = 0; i < v.len; ++i)
      assert_true (range_fits (v.ptr[i].off, v.ptr[i].len, size) && v.ptr[i].len > 0);
    assert_int_equal (fate_of (&v, 0, size).announced, size - 3 * 65536);
    vec_reset (&v);
    free_disk (&k);
  }
}

static void
at_random (void **state)
{
  struct disk k = new_disk (SIZE);
  uint64_t seed = 5;

  for (unsigned i = 0; i < 5000; ++i)
    read_at (&k, test_random (&seed) % (SIZE - 8192), 4096);
  assert_in_range (recorder_bytes (k.under, REC_CACHE), 0, 5000 * 4096 / 2);
  free_disk (&k);
}

/* The order in which the requests of a client with some in flight arrive. */
static void
out_of_order (void **state)
{
  struct disk k = new_disk (SIZE);
  uint64_t order[16], seed = 3;
  struct recorded_vec v;
  struct fate f;

  for (unsigned group = 0; group < 64; ++group) {
    for (unsigned i = 0; i < 16; ++i) {
      unsigned j = test_random (&seed) % (i + 1);

      order[i] = order[j];
      order[j] = i;
    }
    for (unsigned i = 0; i < 16; ++i)
      read_at (&k, (group * 16 + order[i]) * 262144, 262144);
  }
  v = recorder_take (k.under);
  f = fate_of (&v, 0, SIZE);
  assert_true (f.announced >= f.read - 32 * 262144);    /* but for the beginning */
  assert_in_range (f.ahead, MIB, 56 * MIB);
  vec_reset (&v);
  free_disk (&k);
}

#define FAR_APART (100 * MIB)

/* Streams side by side: each finds its bytes, and together they announce no more than is kept. */
static void
several (void **state)
{
  for (unsigned nr = 2; nr <= 32; nr *= 2) {
    struct disk k = new_disk (SIZE);
    uint64_t all = 0, furthest[32] = { 0 };
    struct recorded_vec v;

    for (unsigned i = 0; i < 200; ++i)
      for (unsigned s = 0; s < nr; ++s)
        read_at (&k, s * FAR_APART + i * 131072, 131072);
    v = recorder_take (k.under);
    for (unsigned s = 0; s < nr; ++s) {
      struct fate f = fate_of (&v, s * FAR_APART, (s + 1) * FAR_APART);

      assert_int_equal (f.read, 200 * 131072);
      assert_int_equal (f.announced, f.read - 3 * 131072);
    }
    for (size_t i = 0; i < v.len; ++i) {        /* outstanding at any time */
      unsigned s = v.ptr[i].off / FAR_APART;
      uint64_t end = v.ptr[i].off + v.ptr[i].len;

      if (v.ptr[i].op == REC_READ)
        all -= MIN (v.ptr[i].len, furthest[s] > v.ptr[i].off ? furthest[s] - v.ptr[i].off : 0);
      else
        all += v.ptr[i].len;
      furthest[s] = MAX (furthest[s], v.ptr[i].op == REC_CACHE ? end : 0);
      assert_true (all <= 100 * MIB);
    }
    vec_reset (&v);
    free_disk (&k);
  }
}

struct reader {
  const struct disk *k;
  uint64_t from;
  pthread_barrier_t *together;
};

static void *
read_on (void *opaque)
{
  struct reader *r = opaque;

  for (unsigned i = 0; i < 300; ++i) {
    /* Who falls far behind the others is right to have it announced again: goes_on_later. */
    if (i % 16 == 0)
      pthread_barrier_wait (r->together);
    read_at (r->k, r->from + i * 65536, 65536);
  }
  return NULL;
}

static void
threads (void **state)
{
  struct disk k = new_disk (SIZE);
  struct reader readers[8];
  pthread_barrier_t together;
  struct recorded_vec v;
  pthread_t ids[8];

  assert_int_equal (pthread_barrier_init (&together, NULL, 8), 0);
  for (unsigned i = 0; i < 8; ++i) {
    readers[i] = (struct reader) { &k, i * FAR_APART, &together };
    pthread_create (&ids[i], NULL, read_on, &readers[i]);
  }
  for (unsigned i = 0; i < 8; ++i)
    pthread_join (ids[i], NULL);
  pthread_barrier_destroy (&together);
  v = recorder_take (k.under);
  for (unsigned i = 0; i < 8; ++i) {
    struct fate f = fate_of (&v, i * FAR_APART, (i + 1) * FAR_APART);

    assert_int_equal (f.read, 300 * 65536);
    assert_int_equal (f.announced, f.read - 3 * 65536);
  }
  vec_reset (&v);
  free_disk (&k);
}

/* A place that a reader comes back to is no stream, and one that was left is forgotten. */
static void
back_and_forth (void **state)
{
  struct disk k = new_disk (SIZE);
  uint64_t before;

  for (unsigned i = 0; i < 1000; ++i)
    read_at (&k, 500 * MIB + i % 2 * 65536, 65536);
  assert_int_equal (recorder_bytes (k.under, REC_CACHE), 0);
  for (unsigned i = 0; i < 10; ++i)
    read_at (&k, i * 65536, 65536);
  before = recorder_bytes (k.under, REC_CACHE);
  for (unsigned i = 0; i < 10; ++i)             /* the same once more: it is there */
    read_at (&k, i * 65536, 65536);
  assert_int_equal (recorder_bytes (k.under, REC_CACHE), before);
  free_disk (&k);
}

/* Bytes of the range that were announced since the last time. */
static uint64_t
announced (const struct disk *k, uint64_t from, uint64_t to)
{
  struct recorded_vec v = recorder_take (k->under);
  uint64_t sum = 0;

  for (size_t i = 0; i < v.len; ++i)
    if (v.ptr[i].op == REC_CACHE && v.ptr[i].off >= from)
      sum += v.ptr[i].off < to ? MIN (v.ptr[i].len, to - v.ptr[i].off) : 0;
  vec_reset (&v);
  return sum;
}

static void
read_range (const struct disk *k, uint64_t from, uint64_t to)
{
  for (; from < to; from += 262144)
    read_at (k, from, 262144);
}

/* A copy in several places at once: what one of them reads, another does not announce, nor does
 * one have less of a window because others have come to their ends.
 */
static void
copied_in_places (void **state)
{
  struct disk k = new_disk (SIZE);

  for (unsigned i = 0; i < 10; ++i) {
    read_range (&k, i * 128 * MIB, (i * 128 + 1) * MIB);        /* the next one has begun */
    if (i == 0)
      continue;
    announced (&k, 0, SIZE);
    read_range (&k, ((i - 1) * 128 + 1) * MIB, i * 128 * MIB);
    assert_int_equal (announced (&k, i * 128 * MIB, SIZE), 0);
  }
  read_range (&k, (9 * 128 + 1) * MIB, (9 * 128 + 20) * MIB);
  assert_in_range (announced (&k, (9 * 128 + 20) * MIB, SIZE), 47 * MIB, 49 * MIB);
  free_disk (&k);
}

/* Long after it was announced, it may not be kept any more. */
static void
goes_on_later (void **state)
{
  struct disk k = new_disk (SIZE);

  read_range (&k, 0, 20 * MIB);
  announced (&k, 0, SIZE);
  read_range (&k, 1000 * MIB, 1100 * MIB);
  announced (&k, 0, SIZE);
  read_range (&k, 20 * MIB, 21 * MIB);
  assert_true (announced (&k, 21 * MIB, 60 * MIB) >= 38 * MIB);
  free_disk (&k);
}

/* Who reads a little now and then, beside one who reads much, does not have a whole window announced
 * each time.
 */
static void
now_and_then (void **state)
{
  struct disk k = new_disk (SIZE);

  read_range (&k, 0, 20 * MIB);
  for (unsigned i = 0; i < 20; ++i) {
    read_range (&k, (1000 + i * 75) * MIB, (1000 + (i + 1) * 75) * MIB);
    announced (&k, 0, SIZE);
    read_at (&k, 20 * MIB + i * 65536, 65536);
    assert_in_range (announced (&k, 0, 1000 * MIB), 0, i ? MIB : 49 * MIB);
  }
  free_disk (&k);
}

/* Reading the same again and again, here and there, leaves nothing behind that catches reads. */
static void
over_and_over (void **state)
{
  struct disk k = new_disk (SIZE);
  struct recorded_vec v;
  struct fate f;

  for (unsigned round = 0; round < 20; ++round) {
    for (unsigned i = 0; i < 16; ++i)
      read_range (&k, (i * 13 + round) * MIB, (i * 13 + round) * MIB + 9 * MIB);
    recorder_forget (k.under);
    read_range (&k, 0, 256 * MIB);
    v = recorder_take (k.under);
    f = fate_of (&v, 0, SIZE);
    assert_true (f.announced >= f.read - 24 * 262144);  /* but where the others began */
    vec_reset (&v);
  }
  free_disk (&k);
}

/* What there was no room for is announced again. */
static void
no_room (void **state)
{
  struct disk k = new_disk (SIZE);

  recorder_refuse (k.under, true);
  read_range (&k, 0, 20 * MIB);
  assert_int_equal (announced (&k, 0, SIZE), 0);
  recorder_refuse (k.under, false);
  read_range (&k, 20 * MIB, 21 * MIB);
  assert_in_range (announced (&k, 20 * MIB, SIZE), 47 * MIB, 50 * MIB);
  free_disk (&k);
}

static void
read_one_more (void *opaque)
{
  read_range (opaque, 20 * MIB, 21 * MIB);
}

/* Also if another thread has announced what comes after it before that was known. */
static void
no_room_for_one (void **state)
{
  struct disk k = new_disk (SIZE);
  uint64_t at = 20 * MIB - 524288, end = 0;
  struct recorded_vec v;

  read_range (&k, 0, at);
  recorder_refuse_after (k.under, read_one_more, &k);
  read_range (&k, at, 20 * MIB);
  read_range (&k, 21 * MIB, 23 * MIB);
  v = recorder_take (k.under);
  for (unsigned pass = 0; pass < 64; ++pass)    /* what is announced without a gap from the first on */
    for (size_t i = 0; i < v.len; ++i)
      if (v.ptr[i].op == REC_CACHE && (v.ptr[i].off <= end || end == 0))
        end = MAX (end, v.ptr[i].off + v.ptr[i].len);
  assert_true (end >= 70 * MIB);
  vec_reset (&v);
  free_disk (&k);
}

static int
ignore_extent (void *opaque, uint64_t off, uint64_t len, unsigned kind)
{
  return 0;
}

static void
passes_on (void **state)
{
  static const enum recorded_op want[] = {
    REC_WRITE, REC_ZERO, REC_TRIM, REC_FLUSH, REC_EXTENTS, REC_CACHE, REC_READ,
  };
  struct disk k = new_disk (SIZE);
  struct recorded_vec got;
  struct err err = { 0 };
  uint8_t b[2] = { 0 };

  assert_ok (bdev_pwrite (k.d, "xy", 2, 7, BDEV_FUA, &err), &err);
  assert_ok (bdev_zero (k.d, 8, 9, BDEV_FUA | BDEV_MAY_TRIM, &err), &err);
  assert_ok (bdev_trim (k.d, 100, 10, BDEV_FUA, &err), &err);
  assert_ok (bdev_flush (k.d, &err), &err);
  assert_ok (bdev_extents (k.d, 0, SIZE, ignore_extent, NULL, &err), &err);
  assert_ok (bdev_cache (k.d, 5, 10, &err), &err);
  assert_ok (bdev_pread (k.d, b, 2, 7, &err), &err);
  assert_int_equal (b[0] << 8 | b[1], 'x' << 8);
  recorder_fail (k.under, 0, 10, EIO);
  assert_int_equal (bdev_pread (k.d, b, 2, 7, &err), -EIO);
  got = recorder_take (k.under);
  assert_int_equal (got.len, 8);
  for (size_t i = 0; i < 7; ++i)
    assert_int_equal (got.ptr[i].op, want[i]);
  assert_int_equal (got.ptr[0].flags, BDEV_FUA);
  assert_int_equal (got.ptr[1].flags, BDEV_FUA | BDEV_MAY_TRIM);
  vec_reset (&got);
  free_disk (&k);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (one_after_the_other),
    cmocka_unit_test (who_stops_early),
    cmocka_unit_test (at_the_end),
    cmocka_unit_test (at_random),
    cmocka_unit_test (out_of_order),
    cmocka_unit_test (several),
    cmocka_unit_test (threads),
    cmocka_unit_test (back_and_forth),
    cmocka_unit_test (copied_in_places),
    cmocka_unit_test (goes_on_later),
    cmocka_unit_test (now_and_then),
    cmocka_unit_test (over_and_over),
    cmocka_unit_test (no_room),
    cmocka_unit_test (no_room_for_one),
    cmocka_unit_test (passes_on),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
