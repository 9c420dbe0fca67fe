/* Lost connections: what is sent again, what fails, what is durable, and whether it is the same disk. */
#include "line.h"

/* --- lost connections */

static void
changes_in_flight (void **state)
{
  static const unsigned kinds[] = { SRV_WRITE, SRV_ZERO, SRV_TRIM };
  static const enum nbdserver_answer answers[] = { SRV_DROP, SRV_DO_AND_DROP, SRV_SHUTDOWN };
  struct line l = connect_line ((struct nbdserver_options) { .multi_conn = true }, 20, 20);
  struct doing o;
  struct rule rule;

  for (unsigned i = 0; i < 3; ++i) {
    unsigned before = nbdserver_count (l.s, kinds[i]);

    all (&l, &rule, kinds[i], SRV_HOLD);
    begin (&o, l.d, kinds[i], 8192, 4096);
    assert_true (nbdserver_await_held (l.s, 1));
    nbdserver_go_away (l.s);
    nbdserver_come_back (l.s, SIZE);
    assert_int_equal (result_of (&o), -ENOTCONN);
    reads_right (&l, 0, 65536);
    assert_int_equal (nbdserver_count (l.s, kinds[i]), ++before);
    for (unsigned j = 0; j < 3; ++j) {
      the_next (&l, &rule, kinds[i], answers[j]);
      assert_int_equal (do_it (l.d, kinds[i], o.buf, 8192, 4096), -ENOTCONN);
      reads_right (&l, 0, 65536);
      assert_int_equal (nbdserver_count (l.s, kinds[i]), ++before);
      nbdserver_decide (l.s, NULL, NULL);
      assert_int_equal (do_it (l.d, kinds[i], o.buf, 8192, 4096), 0);
      ++before;
    }
  }
  end_line (&l);
}

static void
reads_in_flight (void **state)
{
  static const enum nbdserver_answer answers[] = { SRV_DROP, SRV_DO_AND_DROP, SRV_HALF, SRV_SHUTDOWN };
  struct bdev_range ranges[40];
  struct err err = { 0 };
  atomic_uint right;
  struct rule rule;

  for (unsigned i = 0; i < 40; ++i)
    ranges[i] = (struct bdev_range) { i * 65536, 4096 };
  for (unsigned i = 0; i < 4; ++i)
    for (unsigned times = 1; times <= 3; ++times) {
      struct line l = connect_line ((struct nbdserver_options) { .multi_conn = true }, 20, 20);
      unsigned before = nbdserver_count (l.s, SRV_READ);

      the_next (&l, &rule, SRV_READ, answers[i]);
      reads_right (&l, 4096 * i, 100000);
      assert_true (nbdserver_count (l.s, SRV_READ) > before + 1);
      /* Many in flight, broken off in the midst of them. */
      set_rule (&l, &rule, SRV_READ, times * 7, 0, answers[i]);
      right = 0;
      assert_ok (bdev_read_many (l.d, ranges, 40, count_right, &right, &err), &err);
      assert_int_equal (right, 40);
      set_rule (&l, &rule, SRV_READ, 2, 0, answers[i]);
      bdev_cache (l.d, 0, SIZE, NULL);
      reads_right (&l, 0, SIZE);
      end_line (&l);
    }
}

/* Nobody is under suspicion any more: there can be many in flight again. */
static void
many_in_flight (struct line *l)
{
  struct doing held[6];
  struct rule rule;

  all (l, &rule, SRV_READ, SRV_HOLD);
  for (unsigned i = 0; i < 6; ++i)
    begin (&held[i], l->d, SRV_READ, i * 131072, 4096);
  assert_true (nbdserver_await_held (l->s, 6));
  nbdserver_decide (l->s, NULL, NULL);
  nbdserver_release (l->s);
  for (unsigned i = 0; i < 6; ++i)
    assert_int_equal (result_of (&held[i]), 0);
}

/* One request breaks every connection: it fails, and all others are answered. */
static enum nbdserver_answer
poison (void *opaque, const struct nbdserver_request *req)
{
  return req->kind == SRV_READ && ranges_overlap (req->off, req->len, 1 << 20, 512) ? SRV_DROP
                                                                                 : SRV_ANSWER;
}

static void
one_breaks_it (void **state)
{
  struct line l = connect_line ((struct nbdserver_options) { .multi_conn = true }, 20, 20);
  struct doing bad, good[4];

  for (unsigned round = 0; round < 2; ++round) {
    nbdserver_decide (l.s, poison, NULL);
    begin (&bad, l.d, SRV_READ, 1 << 20, 512);
    for (unsigned i = 0; i < 4; ++i)
      begin (&good[i], l.d, SRV_READ, i * 65536, 65536);
    assert_int_equal (result_of (&bad), -ENOTCONN);
    for (unsigned i = 0; i < 4; ++i) {
      assert_int_equal (result_of (&good[i]), 0);
      assert_memory_equal (good[i].buf, l.disk + i * 65536, 65536);
    }
    reads_right (&l, 0, 512);
    many_in_flight (&l);
  }
  end_line (&l);
}

/* The line carries so many replies, or bytes, and breaks, whatever was asked for. */
struct budget {
  unsigned reads, reads_left;   /* 0: as many as may be */
  uint64_t bytes, bytes_left;
  unsigned breaks;
};

static enum nbdserver_answer
spend (void *opaque, const struct nbdserver_request *req)
{
  struct budget *b = opaque;

  if (req->kind != SRV_READ)
    return SRV_ANSWER;
  if (b->reads ? b->reads_left-- > 0 : req->len <= b->bytes_left) {
    b->bytes_left -= b->reads ? 0 : req->len;
    return SRV_ANSWER;
  }
  b->reads_left = b->reads;
  b->bytes_left = b->bytes;
  b->breaks++;
  return SRV_HALF;
}

/* As long as it carries the fewest samples and a little more, everything is read in the end. */
static void
breaks_now_and_then (void **state)
{
  static const struct budget budgets[] = { { .reads = 5 }, { .bytes = 100000 },
                                           { .bytes = 400000 } };

  for (unsigned i = 0; i < sizeof budgets / sizeof budgets[0]; ++i) {
    struct line l = connect_line ((struct nbdserver_options) { .multi_conn = i != 1 }, 20, 20);
    struct budget b = budgets[i];
    struct doing o[4];

    nbdserver_decide (l.s, spend, &b);
    reads_right (&l, 0, 1 << 19);
    for (unsigned n = 0; n < 4; ++n)
      begin (&o[n], l.d, SRV_READ, n * 1000000, 65536);
    for (unsigned n = 0; n < 4; ++n) {
      assert_int_equal (result_of (&o[n]), 0);
      assert_memory_equal (o[n].buf, l.disk + n * 1000000, 65536);
    }
    assert_true (b.breaks > 0);
    end_line (&l);
  }
}

static enum nbdserver_answer
short_if_longer (void *opaque, const struct nbdserver_request *req)
{
  return req->kind == SRV_READ && req->len > *(const uint64_t *) opaque ? SRV_SHORT : SRV_ANSWER;
}

/* Replies that lack bytes: nothing of them is given to anybody, and they are not asked for for ever. */
static void
short_replies (void **state)
{
  struct line l = connect_line ((struct nbdserver_options) { .structured = true }, 20, 20);
  static uint8_t buf[1 << 20];
  uint64_t most = 65536;

  nbdserver_decide (l.s, short_if_longer, &most);
  reads_right (&l, 4096, 3 << 19);
  most = 4096;                  /* the samples are whole */
  assert_int_equal (bdev_pread (l.d, buf, sizeof buf, 0, NULL), -ENOTCONN);
  nbdserver_decide (l.s, NULL, NULL);
  reads_right (&l, 0, SIZE);
  many_in_flight (&l);
  end_line (&l);
}

/* --- durability */

static void
flush_after_loss (void **state)
{
  struct line l = connect_line ((struct nbdserver_options) { 0 }, 20, 20);

  assert_int_equal (bdev_flush (l.d, NULL), 0);
  assert_int_equal (nbdserver_count (l.s, SRV_FLUSH), 0);       /* nothing was written */
  assert_int_equal (bdev_pwrite (l.d, "x", 1, 0, 0, NULL), 0);
  assert_int_equal (bdev_flush (l.d, NULL), 0);
  break_line (&l);                                              /* nothing is lost */
  reads_right (&l, 0, 4096);
  assert_int_equal (bdev_flush (l.d, NULL), 0);
  assert_int_equal (bdev_pwrite (l.d, "y", 1, 100, BDEV_FUA, NULL), 0);
  break_line (&l);                                              /* nor here */
  assert_int_equal (bdev_flush (l.d, NULL), 0);
  assert_int_equal (bdev_zero (l.d, 0, 512, 0, NULL), 0);
  break_line (&l);
  for (unsigned i = 0; i < 3; ++i) {
    assert_int_equal (bdev_flush (l.d, NULL), -EIO);
    assert_int_equal (bdev_pwrite (l.d, "z", 1, 200, 0, NULL), 0);
    reads_right (&l, 0, 4096);
  }
  end_line (&l);
}

/* Only the flush is lost: it was not answered, so it is sent again; but not when there was
 * something to lose.
 */
static void
flush_in_flight (void **state)
{
  struct line l = connect_line ((struct nbdserver_options) { 0 }, 20, 20);
  struct doing o;
  struct rule rule;

  assert_int_equal (bdev_pwrite (l.d, "x", 1, 0, 0, NULL), 0);
  assert_int_equal (bdev_flush (l.d, NULL), 0);
  the_next (&l, &rule, SRV_FLUSH, SRV_DROP);
  assert_int_equal (bdev_flush (l.d, NULL), 0);
  assert_int_equal (nbdserver_count (l.s, SRV_FLUSH), 3);
  assert_int_equal (bdev_pwrite (l.d, "x", 1, 0, 0, NULL), 0);
  all (&l, &rule, SRV_FLUSH, SRV_HOLD);
  begin (&o, l.d, SRV_FLUSH, 0, 0);
  assert_true (nbdserver_await_held (l.s, 1));
  break_line (&l);
  assert_int_equal (result_of (&o), -EIO);
  end_line (&l);
}

/* A write that was acknowledged while a flush was under way is not covered by it. */
static void
write_beside_a_flush (void **state)
{
  struct line l = connect_line ((struct nbdserver_options) { 0 }, 20, 20);
  struct doing o;
  struct rule rule;

  assert_int_equal (bdev_pwrite (l.d, "x", 1, 0, 0, NULL), 0);
  all (&l, &rule, SRV_FLUSH, SRV_HOLD);
  begin (&o, l.d, SRV_FLUSH, 0, 0);
  assert_true (nbdserver_await_held (l.s, 1));
  assert_int_equal (bdev_pwrite (l.d, "y", 1, 1, 0, NULL), 0);
  nbdserver_decide (l.s, NULL, NULL);
  nbdserver_release (l.s);
  assert_int_equal (result_of (&o), 0);
  break_line (&l);
  assert_int_equal (bdev_flush (l.d, NULL), -EIO);
  end_line (&l);
}

static void
without_fua (void **state)
{
  struct line l = connect_line ((struct nbdserver_options) { .no_fua = true }, 20, 20);
  struct nbdserver_request *list;
  size_t nr;

  assert_int_equal (bdev_pwrite (l.d, "x", 1, 0, BDEV_FUA, NULL), 0);
  assert_int_equal (bdev_zero (l.d, 512, 512, BDEV_FUA | BDEV_MAY_TRIM, NULL), 0);
  assert_int_equal (bdev_trim (l.d, 512, 512, BDEV_FUA, NULL), 0);
  assert_int_equal (nbdserver_count (l.s, SRV_FLUSH), 3);
  list = nbdserver_list (l.s, &nr);
  for (size_t i = 0; i < nr; ++i)
    assert_int_equal (list[i].flags & 1, 0);
  free (list);
  end_line (&l);
  l = connect_line ((struct nbdserver_options) { 0 }, 20, 20);
  assert_int_equal (bdev_pwrite (l.d, "x", 1, 0, BDEV_FUA, NULL), 0);
  assert_int_equal (bdev_zero (l.d, 512, 512, BDEV_FUA, NULL), 0);
  list = nbdserver_list (l.s, &nr);
  assert_int_equal (list[nr - 2].flags, 1);
  assert_int_equal (list[nr - 1].flags, 1 | 2);         /* FUA, NO_HOLE */
  free (list);
  assert_int_equal (nbdserver_count (l.s, SRV_FLUSH), 0);
  end_line (&l);
}

/* --- another disk */

/* Reads that came on connections after that one. */
static unsigned
reads_after (struct line *l, unsigned conn, uint64_t *furthest)
{
  size_t nr;
  struct nbdserver_request *list = nbdserver_list (l->s, &nr);
  unsigned n = 0;

  *furthest = 0;
  for (size_t i = 0; i < nr; ++i)
    if (list[i].conn > conn && list[i].kind == SRV_READ) {
      *furthest = MAX (*furthest, list[i].off + list[i].len);
      n++;
    }
  free (list);
  return n;
}

static void
other_size (void **state)
{
  static const uint64_t sizes[] = { SIZE - 512, SIZE + 512, 0 };
  struct line l = connect_line ((struct nbdserver_options) { .multi_conn = true }, 20, 1);
  unsigned conns = nbdserver_conns (l.s);
  uint64_t furthest;
  uint8_t buf[4096];

  reads_right (&l, 0, SIZE);
  for (unsigned i = 0; i < 3; ++i) {
    unsigned before = nbdserver_conns (l.s);

    nbdserver_go_away (l.s);
    nbdserver_come_back (l.s, sizes[i]);
    assert_int_equal (bdev_pread (l.d, buf, 4096, 65536, NULL), -ENOTCONN);
    assert_true (nbdserver_conns (l.s) > before);
    conns = MAX (conns, i ? 0 : before);
  }
  assert_int_equal (bdev_pwrite (l.d, buf, 4096, 65536, 0, NULL), -ENOTCONN);
  assert_int_equal (reads_after (&l, conns, &furthest), 0);
  nbdserver_go_away (l.s);
  nbdserver_come_back (l.s, SIZE);
  for (unsigned t = 0; t < 50 && bdev_pread (l.d, buf, 4096, 65536, NULL) < 0; ++t)
    ;                           /* each looks for it again */
  reads_right (&l, 0, SIZE);
  end_line (&l);
}

/* Nothing but what it is known by was read: 4096 bytes in many places. */
static bool
only_samples (const struct line *l)
{
  size_t nr;
  struct nbdserver_request *list = nbdserver_list (l->s, &nr);
  bool only = true;

  for (size_t i = 0; i < nr; ++i)
    only = only && (list[i].kind != SRV_READ || (list[i].len == 4096 && list[i].off % 4096 == 0
                                                 && list[i].off != 69632));
  free (list);
  return only;
}

/* What answers has another byte there; perhaps after a write of ours elsewhere. */
static void
other_bytes (uint64_t where, bool written)
{
  struct line l = connect_line ((struct nbdserver_options) { .read_only = !written }, 20, 1);
  unsigned conns = nbdserver_conns (l.s);
  uint64_t furthest;
  uint8_t buf[4096] = { 0 };

  if (written)
    assert_int_equal (bdev_pwrite (l.d, buf, 4096, SIZE / 2, 0, NULL), 0);
  nbdserver_forget (l.s);
  l.disk[where] ^= 1;
  break_line (&l);
  assert_int_equal (bdev_pread (l.d, buf, 4096, 69632, NULL), -ENOTCONN);
  assert_true (reads_after (&l, conns, &furthest) > 0);
  assert_true (only_samples (&l));
  l.disk[where] ^= 1;
  for (unsigned t = 0; t < 50 && bdev_pread (l.d, buf, 4096, 69632, NULL) < 0; ++t)
    ;
  reads_right (&l, 0, SIZE);
  end_line (&l);
}

static void
other_contents (void **state)
{
  for (unsigned written = 0; written < 2; ++written) {
    other_bytes (4095, written);
    other_bytes (SIZE / 4 + 77, written);
  }
}

/* Connections that were lost while nothing was asked of them say nothing of how much the line
 * carries: the disk is looked at as closely as before.
 */
static void
idle_ones_say_nothing (void **state)
{
  struct line l = connect_line ((struct nbdserver_options) { .multi_conn = true }, 20, 20);
  struct doing o[32];
  struct rule rule;
  unsigned before;

  all (&l, &rule, SRV_READ, SRV_HOLD);
  for (unsigned i = 0; i < 32; ++i)
    begin (&o[i], l.d, SRV_READ, i * 65536, 4096);
  /* Samples of new connections are held, too. */
  while (nbdserver_conns (l.s) < 5)
    usleep (50000);
  assert_int_equal (nbdserver_conns (l.s), 5);
  nbdserver_decide (l.s, NULL, NULL);
  nbdserver_release (l.s);
  for (unsigned i = 0; i < 32; ++i)
    assert_int_equal (result_of (&o[i]), 0);
  nbd_rest ();                  /* they are ready, and idle, ... */
  reads_right (&l, 0, 512);     /* ... and watched again */
  break_line (&l);
  before = nbdserver_count (l.s, SRV_READ);
  reads_right (&l, 0, 4096);
  assert_int_equal (nbdserver_count (l.s, SRV_READ) - before, 64 + 1);
  end_line (&l);
}

/* Nor do those that were looked at when all of them were lost. */
static void
new_ones_say_nothing (void **state)
{
  struct line l = connect_line ((struct nbdserver_options) { .multi_conn = true }, 20, 20);
  unsigned samples = 0, before;
  struct nbdserver_request *list;
  struct doing o[32];
  struct rule rule;
  size_t nr;

  all (&l, &rule, SRV_READ, SRV_HOLD);
  for (unsigned i = 0; i < 32; ++i)
    begin (&o[i], l.d, SRV_READ, i * 65536, 512);
  assert_true (nbdserver_await_held (l.s, 32 + 4 * 8));
  before = nbdserver_conns (l.s);
  nbdserver_decide (l.s, NULL, NULL);
  break_line (&l);
  for (unsigned i = 0; i < 32; ++i)
    assert_int_equal (result_of (&o[i]), 0);
  list = nbdserver_list (l.s, &nr);
  for (size_t i = 0; i < nr; ++i)
    samples += list[i].conn == before + 1 && list[i].len == 4096;
  free (list);
  assert_int_equal (samples, 64);
  end_line (&l);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (changes_in_flight),
    cmocka_unit_test (reads_in_flight),
    cmocka_unit_test (one_breaks_it),
    cmocka_unit_test (breaks_now_and_then),
    cmocka_unit_test (short_replies),
    cmocka_unit_test (flush_after_loss),
    cmocka_unit_test (flush_in_flight),
    cmocka_unit_test (write_beside_a_flush),
    cmocka_unit_test (without_fua),
    cmocka_unit_test (other_size),
    cmocka_unit_test (other_contents),
    cmocka_unit_test (idle_ones_say_nothing),
    cmocka_unit_test (new_ones_say_nothing),
  };

  /* What waits for ever is a failure, too. */
  alarm (400);
  return cmocka_run_group_tests (tests, NULL, NULL);
}
