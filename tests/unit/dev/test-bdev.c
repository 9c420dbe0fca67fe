/* What bdev.c promises for every device, seen through one that only writes down
 * what it is asked.
 */
#include "unit/unit.h"

#include "dev/bdev.h"
#include "dev/many.h"
#include "dev/mem.h"

#define SIZE (UINT64_C (1) << 20)

/* A device over an array that counts, and fails when told to. */
struct toy {
  struct bdev d;
  uint8_t *bytes;
  atomic_uint preads, pwrites, zeros, trims, flushes, caches;
  unsigned last_flags;
  int zero_result;
  uint64_t bad_off;             /* reads that touch this byte fail; UINT64_MAX = none */
  bool *closed;
};

static int
toy_pread (struct bdev *d, void *buf, size_t len, uint64_t off, struct err *err)
{
  struct toy *t = (struct toy *) d;

  assert_true (len > 0 && off + len <= bdev_size (d));
  atomic_fetch_add (&t->preads, 1);
  if (t->bad_off >= off && t->bad_off < off + len)
    return -EIO;                /* without a message, to see that one is made */
  memcpy (buf, t->bytes + off, len);
  return 0;
}

static int
toy_pwrite (struct bdev *d, const void *buf, size_t len, uint64_t off, unsigned flags,
            struct err *err)
{
  struct toy *t = (struct toy *) d;

  assert_true (len > 0 && off + len <= bdev_size (d));
  atomic_fetch_add (&t->pwrites, 1);
  t->last_flags = flags;
  memcpy (t->bytes + off, buf, len);
  return 0;
}

static int
toy_zero (struct bdev *d, uint64_t off, uint64_t len, unsigned flags, struct err *err)
{
  struct toy *t = (struct toy *) d;

  atomic_fetch_add (&t->zeros, 1);
  t->last_flags = flags;
  if (t->zero_result < 0)
    return err_set (err, -t->zero_result, "toy says no");
  memset (t->bytes + off, 0, len);
  return 0;
}

static int
toy_trim (struct bdev *d, uint64_t off, uint64_t len, unsigned flags, struct err *err)
{
  struct toy *t = (struct toy *) d;

  atomic_fetch_add (&t->trims, 1);
  t->last_flags = flags;
  return 0;
}

static int
toy_flush (struct bdev *d, struct err *err)
{
  atomic_fetch_add (&((struct toy *) d)->flushes, 1);
  return 0;
}

static int
toy_cache (struct bdev *d, uint64_t off, uint64_t len, struct err *err)
{
  assert_true (len > 0 && off + len <= bdev_size (d));
  atomic_fetch_add (&((struct toy *) d)->caches, 1);
  return 0;
}

static void
toy_close (struct bdev *d)
{
  struct toy *t = (struct toy *) d;

  assert_string_equal (d->name, "toy");         /* still there for messages */
  if (t->closed)
    *t->closed = true;
  free (t->bytes);
  free (t);
}

static const struct bdev_ops bare_ops = {
  .kind = "toy", .pread = toy_pread, .pwrite = toy_pwrite, .flush = toy_flush,
  .close = toy_close,
};
static const struct bdev_ops full_ops = {
  .kind = "toy", .pread = toy_pread, .pwrite = toy_pwrite, .flush = toy_flush,
  .zero = toy_zero, .trim = toy_trim, .cache = toy_cache, .read_many = many_read,
  .close = toy_close,
};
static const struct bdev_ops fua_ops = {
  .kind = "toy", .native_fua = true, .pread = toy_pread, .pwrite = toy_pwrite,
  .flush = toy_flush, .trim = toy_trim, .close = toy_close,
};

static struct toy *
toy_new (const struct bdev_ops *ops, bool writable)
{
  struct toy *t = calloc (1, sizeof *t);

  assert_int_equal (bdev_init (&t->d, ops, "toy", SIZE, writable, false, NULL), 0);
  t->bytes = malloc (SIZE);
  for (uint64_t i = 0; i < SIZE; ++i)
    t->bytes[i] = i * 7 >> 3 | 1;               /* no zeros */
  t->bad_off = UINT64_MAX;
  return t;
}

static int
no_extent (void *opaque, uint64_t off, uint64_t len, unsigned kind)
{
  fail ();
  return 0;
}

static int
no_range (void *opaque, size_t i, const void *buf, int r, const struct err *why)
{
  fail ();
  return 0;
}

static void
bounds (void **state)
{
  static const struct { uint64_t off, len; } bad[] = {
    { SIZE, 1 }, { SIZE + 1, 0 }, { 0, SIZE + 1 }, { SIZE - 1, 2 }, { 1, SIZE },
    { UINT64_MAX, 1 }, { UINT64_MAX - 511, 512 }, { 512, UINT64_MAX - 511 },
    { 512, UINT64_MAX }, { UINT64_MAX, UINT64_MAX },
  };
  struct toy *t = toy_new (&full_ops, true);
  struct bdev *d = &t->d;
  char buf[16] = "";

  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; ++i) {
    uint64_t off = bad[i].off, len = bad[i].len;
    struct err err = { 0 };

    assert_int_equal (bdev_pread (d, buf, len, off, &err), -EINVAL);
    assert_int_equal (err.code, EINVAL);
    assert_non_null (strstr (err.msg, "toy"));
    assert_int_equal (bdev_pwrite (d, buf, len, off, 0, NULL), -EINVAL);
    assert_int_equal (bdev_zero (d, off, len, 0, NULL), -EINVAL);
    assert_int_equal (bdev_trim (d, off, len, 0, NULL), -EINVAL);
    assert_int_equal (bdev_cache (d, off, len, NULL), -EINVAL);
    assert_int_equal (bdev_extents (d, off, len, no_extent, NULL, NULL), -EINVAL);
  }
  /* No bytes: nothing happens, at the end of the device too. */
  assert_int_equal (bdev_pread (d, NULL, 0, SIZE, NULL), 0);
  assert_int_equal (bdev_pwrite (d, NULL, 0, SIZE, BDEV_FUA, NULL), 0);
  assert_int_equal (bdev_zero (d, SIZE, 0, 0, NULL), 0);
  assert_int_equal (bdev_trim (d, SIZE, 0, 0, NULL), 0);
  assert_int_equal (bdev_cache (d, SIZE, 0, NULL), 0);
  assert_int_equal (bdev_extents (d, SIZE, 0, no_extent, NULL, NULL), 0);
  assert_int_equal (bdev_read_many (d, NULL, 0, no_range, NULL, NULL), 0);
  assert_int_equal (t->preads + t->pwrites + t->zeros + t->trims + t->flushes + t->caches, 0);
  bdev_unref (d);
}

static void
read_only (void **state)
{
  struct toy *t = toy_new (&full_ops, false);
  struct bdev *d = &t->d;
  struct err err = { 0 };
  char buf[16] = "";

  assert_int_equal (bdev_pwrite (d, buf, 16, 0, 0, &err), -EROFS);
  assert_int_equal (err.code, EROFS);
  assert_int_equal (bdev_zero (d, 0, 16, 0, NULL), -EROFS);
  assert_int_equal (bdev_trim (d, 0, 16, 0, NULL), -EROFS);
  assert_int_equal (bdev_resize (d, 16, NULL), -EROFS);
  assert_int_equal (bdev_flush (d, NULL), 0);
  assert_int_equal (t->pwrites + t->zeros + t->trims + t->flushes, 0);
  assert_int_equal (bdev_pread (d, buf, 16, 0, NULL), 0);
  bdev_unref (d);
}

static void
references (void **state)
{
  bool closed = false;
  struct toy *t = toy_new (&bare_ops, true);

  t->closed = &closed;
  assert_ptr_equal (bdev_ref (&t->d), &t->d);
  bdev_unref (&t->d);
  assert_false (closed);
  bdev_unref (&t->d);
  assert_true (closed);
  assert_null (bdev_ref (NULL));
  bdev_unref (NULL);
}

static void
fua_becomes_a_flush (void **state)
{
  struct toy *t = toy_new (&full_ops, true);
  char buf[16] = "";

  assert_int_equal (bdev_pwrite (&t->d, buf, 16, 0, 0, NULL), 0);
  assert_int_equal (t->flushes, 0);
  assert_int_equal (bdev_pwrite (&t->d, buf, 16, 0, BDEV_FUA, NULL), 0);
  assert_int_equal (t->flushes, 1);
  assert_int_equal (t->last_flags, 0);
  assert_int_equal (bdev_zero (&t->d, 0, 16, BDEV_FUA | BDEV_MAY_TRIM, NULL), 0);
  assert_int_equal (t->flushes, 2);
  assert_int_equal (t->last_flags, BDEV_MAY_TRIM);
  assert_int_equal (bdev_trim (&t->d, 0, 16, BDEV_FUA, NULL), 0);
  assert_int_equal (t->flushes, 3);
  assert_int_equal (t->last_flags, 0);
  bdev_unref (&t->d);

  t = toy_new (&fua_ops, true);
  assert_int_equal (bdev_pwrite (&t->d, buf, 16, 0, BDEV_FUA, NULL), 0);
  assert_int_equal (t->last_flags, BDEV_FUA);
  assert_int_equal (bdev_trim (&t->d, 0, 16, BDEV_FUA, NULL), 0);
  assert_int_equal (t->last_flags, BDEV_FUA);
  assert_int_equal (t->flushes, 0);
  /* Zeros that had to be written: durable too, at the cost of one flush. */
  assert_int_equal (bdev_zero (&t->d, 0, SIZE, BDEV_FUA, NULL), 0);
  assert_true (t->pwrites > 2);
  assert_int_equal (t->flushes, 1);
  bdev_unref (&t->d);
}

static void
check_zeroed (struct toy *t, uint64_t off, uint64_t len)
{
  for (uint64_t i = 0; i < SIZE; ++i)
    assert_int_equal (t->bytes[i] == 0, i >= off && i < off + len);
}

static void
zero_is_written_where_it_must_be (void **state)
{
  struct toy *t = toy_new (&bare_ops, true);
  struct err err = { 0 };

  assert_int_equal (bdev_zero (&t->d, 5, SIZE - 9, BDEV_FAST, &err), -ENOTSUP);
  assert_int_equal (err.code, ENOTSUP);
  check_zeroed (t, 0, 0);
  assert_int_equal (bdev_zero (&t->d, 5, SIZE - 9, BDEV_MAY_TRIM, NULL), 0);
  check_zeroed (t, 5, SIZE - 9);
  bdev_unref (&t->d);

  /* A device that finds out only when asked. */
  t = toy_new (&full_ops, true);
  t->zero_result = -ENOTSUP;
  err_clear (&err);
  assert_int_equal (bdev_zero (&t->d, 7, 300000, BDEV_FAST, &err), -ENOTSUP);
  assert_string_equal (err.msg, "toy says no");
  check_zeroed (t, 0, 0);
  err_clear (&err);
  assert_int_equal (bdev_zero (&t->d, 7, 300000, 0, &err), 0);
  assert_int_equal (err.code, 0);               /* no stale message after success */
  check_zeroed (t, 7, 300000);
  /* Any other failure is one. */
  t->zero_result = -EIO;
  assert_int_equal (bdev_zero (&t->d, 400000, 5, 0, &err), -EIO);
  assert_string_equal (err.msg, "toy says no");
  check_zeroed (t, 7, 300000);
  bdev_unref (&t->d);
}

static int
count_extent (void *opaque, uint64_t off, uint64_t len, unsigned kind)
{
  unsigned *n = opaque;

  assert_true (off == 100 && len == 1000 && kind == 0);
  ++*n;
  return *n == 1 ? 1 : -ECANCELED;
}

static void
other_emulations (void **state)
{
  struct toy *t = toy_new (&bare_ops, true);
  struct err err = { 0 };
  unsigned n = 0;

  assert_int_equal (bdev_trim (&t->d, 0, SIZE, 0, NULL), 0);
  check_zeroed (t, 0, 0);
  assert_int_equal (bdev_cache (&t->d, 0, SIZE, NULL), 0);
  assert_int_equal (bdev_extents (&t->d, 100, 1000, count_extent, &n, NULL), 0);
  assert_int_equal (bdev_extents (&t->d, 100, 1000, count_extent, &n, NULL), -ECANCELED);
  assert_int_equal (n, 2);
  assert_int_equal (bdev_resize (&t->d, SIZE, NULL), 0);
  assert_int_equal (bdev_resize (&t->d, SIZE + 1, &err), -ENOSPC);
  assert_int_equal (bdev_resize (&t->d, SIZE - 1, NULL), -ENOTSUP);
  /* A device that fails without a message gets one. */
  t->bad_off = 50;
  err_clear (&err);
  assert_int_equal (bdev_pread (&t->d, (char[100]) { 0 }, 100, 0, &err), -EIO);
  assert_int_equal (err.code, EIO);
  assert_non_null (strstr (err.msg, "toy"));
  bdev_unref (&t->d);
}

static void
reading_past_the_end (void **state)
{
  static const uint64_t offs[] = { 0, SIZE - 20, SIZE - 1, SIZE, SIZE + 1, UINT64_MAX - 3 };
  struct toy *t = toy_new (&bare_ops, true);
  uint8_t buf[40];

  for (size_t i = 0; i < sizeof offs / sizeof offs[0]; ++i) {
    memset (buf, 0xee, sizeof buf);
    assert_int_equal (bdev_pread_padded (&t->d, buf, sizeof buf, offs[i], NULL), 0);
    for (unsigned j = 0; j < sizeof buf; ++j) {
      bool inside = offs[i] < SIZE && j < SIZE - offs[i];

      assert_int_equal (buf[j], inside ? t->bytes[offs[i] + j] : 0);
    }
  }
  bdev_unref (&t->d);
}

/* --- read_many, emulated and with threads */

struct many_test {
  struct toy *t;
  struct bdev_range *ranges;
  atomic_uint *calls;
  atomic_uint errors;
  size_t stop_at;
};

static int
check_range_read (void *opaque, size_t i, const void *buf, int r, const struct err *why)
{
  struct many_test *m = opaque;
  struct bdev_range *g = &m->ranges[i];
  uint64_t bad = m->t->bad_off;
  bool hit = bad != UINT64_MAX && bad >= g->off && bad - g->off < g->len;

  atomic_fetch_add (&m->calls[i], 1);
  /* Asserts must not leave a thread that is not cmocka's: count instead. */
  if (hit != (r == -EIO) || (r < 0 && (why->code != EIO || !strstr (why->msg, "toy"))))
    atomic_fetch_add (&m->errors, 1);
  for (size_t j = 0; r == 0 && j < g->len; ++j) {
    uint64_t off = g->off + j;

    if (((const uint8_t *) buf)[j] != (off >= g->off && off < SIZE ? m->t->bytes[off] : 0)) {
      atomic_fetch_add (&m->errors, 1);
      break;
    }
  }
  return i == m->stop_at ? -ECANCELED : 0;
}

static unsigned
threads_now (void)
{
  FILE *f = popen ("ls /proc/$PPID/task | wc -l", "r");
  unsigned n = 0;

  assert_int_equal (fscanf (f, "%u", &n), 1);
  pclose (f);
  return n;
}

#define NR 3000

static void
many_with (const struct bdev_ops *ops)
{
  struct toy *t = toy_new (ops, true);
  struct many_test m = { .t = t, .stop_at = SIZE_MAX };
  unsigned threads = 0, calls = 0;
  struct err err = { 0 };
  uint64_t rng = 3;

  m.ranges = calloc (NR, sizeof *m.ranges);
  m.calls = calloc (NR, sizeof *m.calls);
  for (size_t i = 0; i < NR; ++i) {
    m.ranges[i].len = test_random (&rng) % 9 == 0 ? 0 : test_random (&rng) % 9000;
    m.ranges[i].off = i && test_random (&rng) % 3
      ? m.ranges[i - 1].off + m.ranges[i - 1].len       /* touches: read together */
      : test_random (&rng) % (SIZE + 5000);
    if (i % 100 == 50)
      m.ranges[i].off = UINT64_MAX - test_random (&rng) % 5000;
  }
  t->bad_off = SIZE / 2;
  for (unsigned round = 1; round <= 2; ++round) {
    assert_ok (bdev_read_many (&t->d, m.ranges, NR, check_range_read, &m, &err), &err);
    assert_int_equal (m.errors, 0);
    for (size_t i = 0; i < NR; ++i)
      assert_int_equal (m.calls[i], round);
    /* None is left behind; a sanitizer may have one that starts with the first. */
    if (round == 1)
      threads = threads_now ();
    assert_in_range (threads_now (), 1, 2);
    assert_int_equal (threads_now (), threads);
  }

  /* One that wants no more ends it all. */
  m.stop_at = 100;
  memset (m.calls, 0, NR * sizeof *m.calls);
  assert_int_equal (bdev_read_many (&t->d, m.ranges, NR, check_range_read, &m, &err),
                    -ECANCELED);
  assert_int_equal (err.code, ECANCELED);
  for (size_t i = 0; i < NR; ++i)
    calls += m.calls[i];
  assert_in_range (calls, 1, NR - 1);
  bdev_unref (&t->d);
  free (m.ranges);
  free (m.calls);
}

static void
many_emulated (void **state)
{
  many_with (&bare_ops);
}

static void
many_threads (void **state)
{
  many_with (&full_ops);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (bounds),
    cmocka_unit_test (read_only),
    cmocka_unit_test (references),
    cmocka_unit_test (fua_becomes_a_flush),
    cmocka_unit_test (zero_is_written_where_it_must_be),
    cmocka_unit_test (other_emulations),
    cmocka_unit_test (reading_past_the_end),
    cmocka_unit_test (many_emulated),
    cmocka_unit_test (many_threads),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
