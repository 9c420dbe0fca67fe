/* Lost ranges: reads that touch them fail, and only those; what is written comes
 * back, to the byte; copying tools are told of data there.
 */
#include <pthread.h>

#include "unit/unit.h"

#include "base/num.h"
#include "dev/lossy.h"
#include "dev/mem.h"

/* Over a disk in RAM that holds fill, if given. */
static struct bdev *
new_lossy (uint64_t size, uint8_t *fill, const struct lossy_range *ranges, size_t nr)
{
  struct err err = { 0 };
  struct bdev *mem = NULL, *d = NULL;

  assert_ok (mem_new ("disk", size, false, &mem, &err), &err);
  if (fill)
    assert_ok (bdev_pwrite (mem, fill, size, 0, 0, &err), &err);
  assert_ok (lossy_new (mem, ranges, nr, &d, &err), &err);
  bdev_unref (mem);
  return d;
}

static void
says_which_range (void **state)
{
  struct lossy_range lost[] = { { 0x30000, 0x1000 }, { 0x31000, 0x800 }, { 0x90000, 0 },
                                { 0x9ff00, 0x10000 }, { 0xb0000, 5 } };
  struct bdev *d = new_lossy (0xa0000, NULL, lost, 5);
  struct err err = { 0 };
  uint8_t buf[0x2000];

  assert_int_equal (bdev_pread (d, buf, 1, 0x31000, &err), -EIO);
  assert_non_null (strstr (err.msg, "0x30000 to 0x317ff"));     /* joined */
  err_clear (&err);
  assert_int_equal (bdev_pread (d, buf, 0x1001, 0x2f000, &err), -EIO);
  err_clear (&err);
  assert_ok (bdev_pread (d, buf, 0x1000, 0x2f000, &err), &err);
  assert_ok (bdev_pread (d, buf, 0x1000, 0x31800, &err), &err);
  assert_ok (bdev_pread (d, buf, 1, 0x90000, &err), &err);
  assert_int_equal (bdev_pread (d, buf, 1, 0x9ffff, &err), -EIO);       /* cut at the end */
  assert_non_null (strstr (err.msg, "0x9ff00 to 0x9ffff"));
  err_clear (&err);
  bdev_unref (d);
}

static void
read_only_stays_so (void **state)
{
  struct lossy_range lost = { 0, 100 };
  struct bdev *mem = NULL, *d;
  struct err err = { 0 };
  uint8_t b = 1;

  assert_ok (mem_new ("disk", 4096, false, &mem, &err), &err);
  mem->writable = false;
  assert_ok (lossy_new (mem, &lost, 1, &d, &err), &err);
  assert_int_equal (bdev_pwrite (d, &b, 1, 0, 0, NULL), -EROFS);
  assert_int_equal (bdev_pread (d, &b, 1, 0, NULL), -EIO);
  bdev_unref (mem);
  bdev_unref (d);
}

/* --- against a model of one byte a byte */

enum { SIZE = 5 * 65536 + 123 };

struct model {
  uint8_t *bytes;
  bool *lost;
  uint64_t next;                /* extents */
};

static int
check_extent (void *opaque, uint64_t off, uint64_t len, unsigned kind)
{
  struct model *m = opaque;

  assert_true (off == m->next && len > 0);
  for (uint64_t i = off; i < off + len; ++i) {
    if (m->lost[i])
      assert_int_equal (kind, 0);
    else if (kind & BDEV_ZERO)
      assert_int_equal (m->bytes[i], 0);
  }
  m->next += len;
  return 0;
}

static void
check_read (struct bdev *d, struct model *m, uint8_t *buf, uint64_t off, uint64_t len)
{
  bool lost = memchr (m->lost + off, true, len) != NULL;
  int r = bdev_pread (d, buf, len, off, NULL);

  assert_int_equal (r, lost ? -EIO : 0);
  if (!lost)
    assert_memory_equal (buf, m->bytes + off, len);
}

static void
like_a_model (void **state)
{
  struct model m = { .bytes = malloc (SIZE), .lost = calloc (SIZE, 1) };
  struct lossy_range ranges[40];
  uint8_t *buf = malloc (SIZE);
  uint64_t rng = 7;
  struct bdev *d;

  memset (m.bytes, 0xee, SIZE);
  for (unsigned i = 0; i < 40; ++i) {
    ranges[i].off = test_random (&rng) % SIZE;
    ranges[i].len = test_random (&rng) % (i % 4 ? 512 : 70000);
    for (uint64_t b = ranges[i].off; b < MIN (SIZE, ranges[i].off + ranges[i].len); ++b)
      m.lost[b] = true;
  }
  d = new_lossy (SIZE, m.bytes, ranges, 40);
  for (unsigned n = 0; n < 4000; ++n) {
    uint64_t off = test_random (&rng) % SIZE;
    uint64_t len = MIN (SIZE - off, 1 + test_random (&rng) % (n % 8 ? 300 : 9000));
    unsigned op = test_random (&rng) % 12;

    if (op > 2)
      check_read (d, &m, buf, off, len);
    else {
      memset (m.lost + off, false, len);
      if (op == 0) {
        memset (m.bytes + off, n, len);
        assert_int_equal (bdev_pwrite (d, m.bytes + off, len, off, 0, NULL), 0);
      }
      else if (op == 1) {
        memset (m.bytes + off, 0, len);
        assert_int_equal (bdev_zero (d, off, len, BDEV_MAY_TRIM, NULL), 0);
      }
      else {
        assert_int_equal (bdev_trim (d, off, len, BDEV_FUA, NULL), 0);
        assert_int_equal (bdev_pread (d, m.bytes + off, len, off, NULL), 0);
      }
    }
    if (n % 50 == 0) {
      m.next = off;
      assert_int_equal (bdev_extents (d, off, SIZE - off, check_extent, &m, NULL), 0);
      assert_int_equal (m.next, SIZE);
    }
  }
  assert_non_null (memchr (m.lost, true, SIZE));        /* else the end of it was not tried */
  assert_int_equal (bdev_zero (d, 0, SIZE, 0, NULL), 0);
  assert_int_equal (bdev_pread (d, buf, SIZE, 0, NULL), 0);
  bdev_unref (d);
  free (m.bytes);
  free (m.lost);
  free (buf);
}

/* A write that fails saves nothing. */
static int
no_pwrite (struct bdev *d, const void *buf, size_t len, uint64_t off, unsigned flags,
           struct err *err)
{
  return -ENOSPC;
}

static int
ones_pread (struct bdev *d, void *buf, size_t len, uint64_t off, struct err *err)
{
  memset (buf, 1, len);
  return 0;
}

static void
full_close (struct bdev *d)
{
  free (d);
}

static void
failed_write_saves_nothing (void **state)
{
  static const struct bdev_ops full_ops = {
    .kind = "full", .pread = ones_pread, .pwrite = no_pwrite, .close = full_close,
  };
  struct lossy_range lost = { 1 << 20, 1 << 20 };
  struct bdev *full = malloc (sizeof *full), *d;
  uint8_t b = 0;

  assert_int_equal (bdev_init (full, &full_ops, "full", 4 << 20, true, false, NULL), 0);
  assert_int_equal (lossy_new (full, &lost, 1, &d, NULL), 0);
  bdev_unref (full);
  assert_int_equal (bdev_pwrite (d, &b, 1, 1 << 20, 0, NULL), -ENOSPC);
  assert_int_equal (bdev_zero (d, 1 << 20, 512, 0, NULL), -ENOSPC);
  assert_int_equal (bdev_zero (d, 1 << 20, 512, BDEV_FAST, NULL), -ENOTSUP);
  assert_int_equal (bdev_pread (d, &b, 1, 1 << 20, NULL), -EIO);
  assert_int_equal (bdev_pread (d, &b, 1, (1 << 20) - 1, NULL), 0);
  bdev_unref (d);
}

/* --- threads: each owns every fourth piece, all of it lost at first; whoever reads a
 * piece that was written sees what was written.
 */
enum { PIECE = 512, PIECES = 4096, THREADS = 4 };

struct worker {
  struct bdev *d;
  unsigned me;
};

static void *
save_pieces (void *opaque)
{
  struct worker *w = opaque;
  uint64_t rng = w->me;
  uint8_t buf[PIECE];

  for (unsigned i = w->me; i < PIECES; i += THREADS) {
    uint64_t other = test_random (&rng) % PIECES;

    if (bdev_pread (w->d, buf, PIECE, (uint64_t) i * PIECE, NULL) != -EIO)
      return "a lost piece could be read";
    memset (buf, 1 + i % 200, PIECE);
    if (bdev_pwrite (w->d, buf, PIECE, (uint64_t) i * PIECE, 0, NULL) != 0 ||
        bdev_pread (w->d, buf, PIECE, (uint64_t) i * PIECE, NULL) != 0)
      return "a piece that was written could not be read";
    if (bdev_pread (w->d, buf, PIECE, other * PIECE, NULL) == 0 &&
        (buf[0] != 1 + other % 200 || buf[PIECE - 1] != buf[0]))
      return "a piece was readable before it was written";
  }
  return NULL;
}

static void
threads (void **state)
{
  struct lossy_range all = { 0, UINT64_MAX };
  struct bdev *d = new_lossy ((uint64_t) PIECE * PIECES, NULL, &all, 1);
  struct worker w[THREADS];
  pthread_t t[THREADS];
  void *complaint;

  for (unsigned i = 0; i < THREADS; ++i) {
    w[i] = (struct worker) { d, i };
    assert_int_equal (pthread_create (&t[i], NULL, save_pieces, &w[i]), 0);
  }
  for (unsigned i = 0; i < THREADS; ++i) {
    pthread_join (t[i], &complaint);
    if (complaint)
      fail_msg ("%s", (const char *) complaint);
  }
  for (unsigned i = 0; i < PIECES; ++i) {
    uint8_t b;

    assert_int_equal (bdev_pread (d, &b, 1, (uint64_t) i * PIECE, NULL), 0);
    assert_int_equal (b, 1 + i % 200);
  }
  bdev_unref (d);
}

/* The map of a disk of any size is small, and its last part is there. */
static void
largest_disk (void **state)
{
  struct lossy_range lost[] = { { UINT64_C (1) << 40, 1 }, { INT64_MAX - 1, 1 } };
  struct bdev *d = new_lossy (INT64_MAX, NULL, lost, 2);
  uint8_t b;

  assert_int_equal (bdev_pread (d, &b, 1, INT64_MAX - 1, NULL), -EIO);
  assert_int_equal (bdev_pread (d, &b, 1, INT64_MAX - 2, NULL), 0);
  assert_int_equal (bdev_zero (d, 0, INT64_MAX, BDEV_MAY_TRIM, NULL), 0);
  assert_int_equal (bdev_pread (d, &b, 1, UINT64_C (1) << 40, NULL), 0);
  assert_int_equal (bdev_pread (d, &b, 1, INT64_MAX - 1, NULL), 0);
  bdev_unref (d);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (says_which_range),
    cmocka_unit_test (read_only_stays_so),
    cmocka_unit_test (like_a_model),
    cmocka_unit_test (failed_write_saves_nothing),
    cmocka_unit_test (threads),
    cmocka_unit_test (largest_disk),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
