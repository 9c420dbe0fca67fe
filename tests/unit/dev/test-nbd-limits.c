/* Limits of the server, bytes that change meanwhile, questions asked at once, and waiting that ends. */
#include "base/cleanup.h"
#include "line.h"

/* --- constraints */

static void
keeps_to (const struct line *l, uint32_t minimum, uint32_t maximum)
{
  size_t nr;
  struct nbdserver_request *list = nbdserver_list (l->s, &nr);

  for (size_t i = 0; i < nr; ++i) {
    assert_true (range_fits (list[i].off, list[i].len, l->size));
    assert_int_equal (list[i].off % minimum, 0);
    assert_int_equal (list[i].len % minimum, 0);
    assert_true (list[i].len > 0 || list[i].kind == SRV_FLUSH);
    if (list[i].kind == SRV_READ || list[i].kind == SRV_WRITE)
      assert_true (list[i].len <= maximum);
  }
  free (list);
}

static void
block_sizes (void **state)
{
  static const uint32_t sizes[][2] = { { 1, 1024 }, { 512, 512 }, { 512, 1536 }, { 4096, 12288 },
                                       { 65536, 65536 }, { 1, 3 << 19 } };

  for (unsigned i = 0; i < 6; ++i) {
    uint32_t minimum = sizes[i][0], maximum = sizes[i][1];
    struct line l = connect_line ((struct nbdserver_options) {
        .multi_conn = true, .minimum = minimum, .maximum = maximum, .structured = i % 2,
      }, 20, 20);
    uint64_t seed = i;
    uint8_t *buf = malloc (SIZE);
    struct rule rule;

    /* It is looked at when it is connected to again. */
    set_rule (&l, &rule, SRV_READ, 300, 3000, SRV_DROP);
    for (unsigned j = 0; j < 100; ++j) {
      uint64_t off = test_random (&seed) % SIZE, len = test_random (&seed) % 100000;
      struct bdev_range ranges[3] = { { off, 100 }, { off + 1000, len }, { off + 1000 + len, 9 } };
      atomic_uint right = 0;

      len = MIN (len, SIZE - off);
      if (j % 5 == 0)
        bdev_cache (l.d, off, len, NULL);
      if (j % 7 == 0)
        bdev_read_many (l.d, ranges, 3, count_right, &right, NULL);
      if (j % 3 == 0) {
        memset (buf, 1 + j % 255, len);
        /* What was read ahead may be what the line breaks at, and that fails a change beside it. */
        if (bdev_pwrite (l.d, buf, len, off, 0, NULL) != 0)
          assert_int_equal (bdev_pwrite (l.d, buf, len, off, 0, NULL), 0);
        assert_memory_equal (l.disk + off, buf, len);
      }
      if (j % 11 == 0 && bdev_zero (l.d, off, len, 0, NULL) != 0)
        assert_int_equal (bdev_zero (l.d, off, len, 0, NULL), 0);
      if (j % 13 == 0 && bdev_trim (l.d, off, len, 0, NULL) != 0)
        assert_int_equal (bdev_trim (l.d, off, len, 0, NULL), 0);
      reads_right (&l, off, len);
    }
    reads_right (&l, 0, SIZE);
    keeps_to (&l, minimum, maximum);
    free (buf);
    end_line (&l);
  }
}

/* Blocks that the size is no multiple of: the server is wrong there, but all is read. */
static void
part_of_a_block (void **state)
{
  uint64_t size = SIZE - 4096 + 700;
  struct line l = connect_line ((struct nbdserver_options) {
      .size = size, .minimum = 4096, .maximum = 65536 }, 20, 20);
  uint8_t buf[2] = { 7, 8 };

  reads_right (&l, size - 10000, 10000);
  reads_right (&l, size - 1, 1);
  assert_int_equal (bdev_pwrite (l.d, buf, 2, size - 2, 0, NULL), 0);
  assert_memory_equal (l.disk + size - 2, buf, 2);
  end_line (&l);
}

/* There are bytes at the beginning only. */
static enum nbdserver_answer
far_end_is_bad (void *opaque, const struct nbdserver_request *req)
{
  return req->kind == SRV_STATUS || req->off > SIZE ? SRV_EIO : SRV_ANSWER;
}

static void
as_large_as_can_be (void **state)
{
  uint64_t size = INT64_MAX;
  struct line l = connect_line ((struct nbdserver_options) { .size = size, .structured = true,
                                                             .decide = far_end_is_bad }, 20, 20);
  struct bdev_range ranges[6] = { { size - 1, 1 }, { size - 1, 5000 }, { UINT64_MAX, 1 },
                                  { UINT64_MAX - 5, 100 }, { 0, 4096 }, { size - 70000, 70000 } };
  atomic_uint right = 0;
  uint8_t buf[2];

  /* Right are those that lie past the end, and the one at the beginning. */
  assert_int_equal (bdev_pread (l.d, buf, 1, 77, NULL), 0);
  assert_int_equal (bdev_pread (l.d, buf, 2, size - 2, NULL), -EIO);
  assert_int_equal (bdev_pwrite (l.d, buf, 1, size, 0, NULL), -EINVAL);
  assert_int_equal (bdev_cache (l.d, size - 9000, 9000, NULL), 0);
  assert_int_equal (bdev_pread (l.d, buf, 1, size - 5, NULL), -EIO);
  assert_int_equal (bdev_read_many (l.d, ranges, 6, count_right, &right, NULL), 0);
  assert_int_equal (right, 3);
  keeps_to (&l, 1, 2 << 20);
  end_line (&l);
}

/* --- old bytes */

/* Bytes that were on their way when a write came are not found by who reads after it. */
static void
written_meanwhile (void **state)
{
  struct line l = connect_line ((struct nbdserver_options) { 0 }, 20, 20);
  struct doing old, new;
  uint8_t buf[4096];
  struct rule rule;

  all (&l, &rule, SRV_READ, SRV_HOLD);
  bdev_cache (l.d, 65536, 65536, NULL);
  assert_true (nbdserver_await_held (l.s, 1));
  begin (&old, l.d, SRV_READ, 65536, 4096);     /* waits for it */
  memset (buf, 0xff, 4096);
  assert_int_equal (bdev_pwrite (l.d, buf, 4096, 65536, 0, NULL), 0);
  begin (&new, l.d, SRV_READ, 65536, 4096);
  assert_true (nbdserver_await_held (l.s, 2));
  nbdserver_decide (l.s, NULL, NULL);
  nbdserver_release (l.s);
  assert_int_equal (result_of (&old), 0);
  assert_int_equal (result_of (&new), 0);
  assert_memory_equal (new.buf, buf, 4096);
  reads_right (&l, 0, SIZE);
  end_line (&l);
}

/* Nor are those that were read ahead while it was under way. */
static void
announced_meanwhile (void **state)
{
  struct line l = connect_line ((struct nbdserver_options) { 0 }, 20, 20);
  struct doing o;
  struct rule rule;

  all (&l, &rule, SRV_WRITE, SRV_HOLD);
  begin (&o, l.d, SRV_WRITE, 65536, 4096);      /* zeros */
  assert_true (nbdserver_await_held (l.s, 1));
  bdev_cache (l.d, 65536, 65536, NULL);
  reads_right (&l, 65536, 4096);                /* the old ones */
  nbdserver_release (l.s);
  assert_int_equal (result_of (&o), 0);
  reads_right (&l, 65536, 65536);
  end_line (&l);
}

/* What was a hole is none once it was written. */
static void
holes_change (void **state)
{
  struct line l = connect_line ((struct nbdserver_options) { .structured = true }, 20, 20);
  struct bdev_range ranges[8];
  atomic_uint right = 0;
  unsigned before;
  uint8_t b = 5;

  memset (l.disk + 65536, 0, 1 << 20);
  for (unsigned i = 0; i < 8; ++i)
    ranges[i] = (struct bdev_range) { 65536 + i * 65536, 4096 };
  before = nbdserver_count (l.s, SRV_READ);
  assert_int_equal (bdev_read_many (l.d, ranges, 8, count_right, &right, NULL), 0);
  assert_int_equal (right, 8);
  assert_int_equal (nbdserver_count (l.s, SRV_READ), before);
  bdev_cache (l.d, 65536, 1 << 20, NULL);
  assert_int_equal (nbdserver_count (l.s, SRV_READ), before);
  assert_int_equal (bdev_pwrite (l.d, &b, 1, 65536, 0, NULL), 0);
  assert_int_equal (bdev_read_many (l.d, ranges, 8, count_right, &right, NULL), 0);
  assert_true (nbdserver_count (l.s, SRV_READ) > before);
  bdev_cache (l.d, 65536, 1 << 20, NULL);
  reads_right (&l, 65536, 1 << 20);
  end_line (&l);
}

/* --- room for what was read ahead */

#define MIB (UINT64_C (1) << 20)

/* There is not always room for all at once. */
static void
announce (const struct line *l, uint64_t off, uint64_t len)
{
  struct err err = { 0 };
  int r;

  while ((r = bdev_cache (l->d, off, len, &err)) == -EAGAIN)
    usleep (1000);
  assert_ok (r, &err);
}

static uint64_t
bytes_sent (const struct line *l)
{
  size_t nr;
  CLEANUP_FREE struct nbdserver_request *list = nbdserver_list (l->s, &nr);
  uint64_t sum = 0;

  for (size_t i = 0; i < nr; ++i)
    sum += list[i].kind == SRV_READ ? list[i].len : 0;
  return sum;
}

/* What was read makes room, in whatever order it was; what nobody has read yet is kept. */
static void
makes_room (void **state)
{
  struct line l = connect_line ((struct nbdserver_options) { .size = 256 * MIB }, 20, 20);

  announce (&l, 0, 60 * MIB);
  announce (&l, 60 * MIB, 60 * MIB);
  for (uint64_t at = 0; at < 60 * MIB; at += 512 * 1024) {      /* as of two requests in flight */
    reads_right (&l, at + 256 * 1024, 256 * 1024);
    reads_right (&l, at, 256 * 1024);
  }
  announce (&l, 120 * MIB, 60 * MIB);
  for (uint64_t at = 60 * MIB; at < 180 * MIB; at += MIB)
    reads_right (&l, at, MIB);
  assert_int_equal (bytes_sent (&l), 180 * MIB);          /* nothing twice */
  end_line (&l);
}

/* More than there is room for: it says so, and all is read right. */
static void
no_room (void **state)
{
  struct line l = connect_line ((struct nbdserver_options) { .size = 256 * MIB }, 20, 20);
  struct rule rule;

  all (&l, &rule, SRV_READ, SRV_HOLD);
  assert_int_equal (bdev_cache (l.d, 0, 256 * MIB, NULL), -EAGAIN);
  nbdserver_decide (l.s, NULL, NULL);
  nbdserver_release (l.s);
  for (uint64_t at = 0; at < 256 * MIB; at += MIB)
    reads_right (&l, at, MIB);
  end_line (&l);
}

struct seen {
  const struct line *l;
  const struct bdev_range *ranges;
  unsigned right, wrong;
};

static int
look (void *opaque, size_t i, const void *buf, int r, const struct err *why)
{
  struct seen *seen = opaque;
  bool right = r == 0 && memcmp (buf, seen->l->disk + seen->ranges[i].off, seen->ranges[i].len) == 0;

  seen->right += right;
  seen->wrong += !right;
  return 0;
}

/* Many ranges: what was read ahead is not read again, also if that has failed it is right. */
static void
many_after_ahead (void **state)
{
  static const struct bdev_range ranges[] = {
    { 0, 4096 }, { 70000, 100 }, { MIB - 10, 20 }, { 3 * MIB, 4096 }, { 2 * MIB, 65536 },
  };

  for (unsigned broken = 0; broken < 2; ++broken) {
    struct line l = connect_line ((struct nbdserver_options) { 0 }, 20, 20);
    struct seen seen = { &l, ranges, 0, 0 };
    struct err err = { 0 };
    struct rule rule;

    if (broken)
      the_next (&l, &rule, SRV_READ, SRV_EIO);
    announce (&l, 0, 2 * MIB);
    assert_ok (bdev_read_many (l.d, ranges, 5, look, &seen, &err), &err);
    assert_int_equal (seen.right, 5);
    assert_int_equal (seen.wrong, 0);
    if (!broken)
      assert_int_equal (bytes_sent (&l), 2 * MIB + 4096 + 65536);
    end_line (&l);
  }
}

/* --- many questions */

struct asking {
  struct line *l;
  struct bdev_range ranges[80];
  atomic_uint right;
};

static void *
ask_many (void *opaque)
{
  struct asking *a = opaque;

  bdev_read_many (a->l->d, a->ranges, 80, count_right, &a->right, NULL);
  return NULL;
}

static void
asked_at_once (void **state)
{
  struct line l = connect_line ((struct nbdserver_options) {
      .size = UINT64_C (20) << 30, .structured = true, .read_only = true }, 20, 20);
  struct asking a = { .l = &l };
  struct rule rule;
  pthread_t thread;

  all (&l, &rule, SRV_STATUS, SRV_HOLD);
  for (unsigned i = 0; i < 80; ++i)
    a.ranges[i] = (struct bdev_range) { (uint64_t) i << 28, 4096 };
  pthread_create (&thread, NULL, ask_many, &a);
  assert_true (nbdserver_await_held (l.s, 10));
  all (&l, &rule, SRV_STATUS, SRV_EIO);
  nbdserver_go_away (l.s);                      /* asked again, and not answered */
  nbdserver_come_back (l.s, l.size);
  pthread_join (thread, NULL);
  assert_int_equal (a.right, 80);
  end_line (&l);
}

/* --- waiting ends */

#define LINE_MS  60000          /* it would wait so long for an answer, if not closed */
#define CLOSE_MS 20000          /* less (and less than the default), but enough for a busy machine */

static uint64_t
close_ms (struct line *l)
{
  uint64_t before = clock_ms ();

  bdev_unref (l->d);
  l->d = NULL;
  return clock_ms () - before;
}

/* Bytes were announced, and are on their way for ever. */
static void
closed_while_stalled (void **state)
{
  for (unsigned multi = 0; multi < 2; ++multi) {
    struct line l = connect_line ((struct nbdserver_options) { .multi_conn = multi },
                                  LINE_MS / 1000, 60);
    struct doing held[64];
    struct rule rule;

    all (&l, &rule, SRV_READ, SRV_HOLD);
    for (unsigned i = 0; multi && i < 64; ++i)  /* so that there are several connections */
      begin (&held[i], l.d, SRV_READ, i * 4096, 4096);
    if (multi)
      assert_true (nbdserver_await_held (l.s, 64));
    nbdserver_decide (l.s, NULL, NULL);
    nbdserver_release (l.s);
    for (unsigned i = 0; multi && i < 64; ++i)
      assert_int_equal (result_of (&held[i]), 0);
    nbdserver_stall (l.s, true);
    bdev_cache (l.d, 0, SIZE, NULL);
    assert_true (nbdserver_await_held (l.s, 1));
    assert_in_range (close_ms (&l), 0, CLOSE_MS);
    end_line (&l);
  }
}

static void
closed_while_gone (void **state)
{
  struct line l = connect_line ((struct nbdserver_options) { .multi_conn = true },
                                LINE_MS / 1000, 60);
  struct rule rule;

  all (&l, &rule, SRV_READ, SRV_HOLD);
  bdev_cache (l.d, 0, SIZE, NULL);
  assert_true (nbdserver_await_held (l.s, 1));
  nbdserver_go_away (l.s);
  assert_in_range (close_ms (&l), 0, CLOSE_MS);
  end_line (&l);
  /* It takes connections, and says nothing. */
  l = connect_line ((struct nbdserver_options) { .multi_conn = true }, LINE_MS / 1000,
                    60);
  nbdserver_stall (l.s, true);
  break_line (&l);
  bdev_cache (l.d, 0, SIZE, NULL);
  assert_in_range (close_ms (&l), 0, CLOSE_MS);
  end_line (&l);
}

/* What is on its way arrives, where it can: the server is not cut off in the midst of it. */
static void
closed_politely (void **state)
{
  bool in_time = false;

  /* On a busy machine, not all that is on its way does arrive. */
  for (unsigned n = 0; !in_time; ++n) {
    struct line l = connect_line ((struct nbdserver_options) { .multi_conn = true }, 30, 60);

    bdev_cache (l.d, 0, SIZE, NULL);
    in_time = close_ms (&l) < 900;
    if (n > 50)
      fail_msg ("it always takes as long as may be");
    assert_true (!in_time || nbdserver_await (l.s, SRV_DISC, 1));
    end_line (&l);
  }
}

/* Stalled while it is read from: an error, in time; then it goes on. */
static void
stalled (void **state)
{
  struct line l = connect_line ((struct nbdserver_options) { .multi_conn = true }, 1, 1);
  uint64_t before = clock_ms ();
  uint8_t buf[512];

  nbdserver_stall (l.s, true);
  assert_int_equal (bdev_pread (l.d, buf, 512, 0, NULL), -ENOTCONN);
  assert_in_range (clock_ms () - before, 900, CLOSE_MS);
  assert_int_equal (bdev_pwrite (l.d, buf, 512, 0, 0, NULL), -ENOTCONN);
  nbdserver_stall (l.s, false);
  for (unsigned t = 0; t < 50 && bdev_pread (l.d, buf, 512, 0, NULL) < 0; ++t)
    ;
  reads_right (&l, 0, SIZE);
  end_line (&l);
}

/* An error of the disk is told as such, and is no reason to leave. */
static void
read_error (void **state)
{
  struct line l = connect_line ((struct nbdserver_options) { .structured = true }, 20, 20);
  struct bdev_range ranges[20];
  atomic_uint right = 0;
  struct rule rule;
  uint8_t buf[512];

  all (&l, &rule, SRV_READ, SRV_EIO);
  assert_int_equal (bdev_pread (l.d, buf, 512, 0, NULL), -EIO);
  bdev_cache (l.d, 0, 65536, NULL);
  assert_int_equal (bdev_pread (l.d, buf, 512, 0, NULL), -EIO);
  nbdserver_decide (l.s, NULL, NULL);
  reads_right (&l, 0, 65536);                   /* an error is not kept */
  for (unsigned i = 0; i < 20; ++i)
    ranges[i] = (struct bdev_range) { i * 4096, 4096 };
  the_next (&l, &rule, SRV_READ, SRV_EIO);      /* the one that all were joined to */
  assert_int_equal (bdev_read_many (l.d, ranges, 20, count_right, &right, NULL), 0);
  assert_int_equal (right, 20);
  assert_int_equal (nbdserver_conns (l.s), 1);
  end_line (&l);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (block_sizes),
    cmocka_unit_test (part_of_a_block),
    cmocka_unit_test (as_large_as_can_be),
    cmocka_unit_test (written_meanwhile),
    cmocka_unit_test (announced_meanwhile),
    cmocka_unit_test (holes_change),
    cmocka_unit_test (makes_room),
    cmocka_unit_test (no_room),
    cmocka_unit_test (many_after_ahead),
    cmocka_unit_test (asked_at_once),
    cmocka_unit_test (closed_while_stalled),
    cmocka_unit_test (closed_while_gone),
    cmocka_unit_test (closed_politely),
    cmocka_unit_test (stalled),
    cmocka_unit_test (read_error),
  };

  /* What waits for ever is a failure, too. */
  alarm (400);
  return cmocka_run_group_tests (tests, NULL, NULL);
}
