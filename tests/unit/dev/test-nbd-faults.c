/* The NBD device against a server that misbehaves, request by request (tests/nbdserver.h).
 */
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include "unit/unit.h"

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/num.h"
#include "dev/nbd.h"
#include "nbdserver.h"

#define SIZE       (UINT64_C (4) << 20)
#define MAX_MAPPED (UINT64_C (32) << 30)

struct line {
  char *folder, *uri, *path;
  uint8_t *disk;                /* the server's */
  uint64_t size;
  struct nbdserver *s;
  struct bdev *d;
};

/* With nbd_options of whole seconds. */
static struct line
connect_line (struct nbdserver_options opts, unsigned timeout, unsigned reconnect)
{
  struct line l = { .folder = make_folder (), .size = opts.size ? opts.size : SIZE };
  struct nbd_options nopts = { .timeout = timeout, .reconnect = reconnect };
  struct err err = { 0 };
  uint64_t seed = 1;

  /* Of an enormous disk there is only what is touched. */
  l.disk = mmap (NULL, MIN (l.size, MAX_MAPPED), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  assert_true (l.disk != MAP_FAILED);
  for (size_t i = 0; i < MIN (l.size, SIZE); ++i)
    l.disk[i] = 1 + test_random (&seed) % 255;
  if (asprintf (&l.path, "%s/sock", l.folder) < 0
      || asprintf (&l.uri, "nbd+unix:///?socket=%s", l.path) < 0)
    abort ();
  opts.path = l.path;
  opts.disk = l.disk;
  opts.size = l.size;
  l.s = nbdserver_start (&opts);
  assert_ok (nbd_open (l.uri, &nopts, &l.d, &err), &err);
  assert_true (bdev_size (l.d) == l.size);
  nbd_rest ();                  /* the samples by which it is known again have come */
  nbdserver_forget (l.s);
  if (!opts.read_only)
    assert_ok (bdev_make_writable (l.d, &err), &err);
  return l;
}

static void
end_line (struct line *l)
{
  bdev_unref (l->d);
  nbdserver_stop (l->s);
  munmap (l->disk, MIN (l->size, MAX_MAPPED));
  remove_folder (l->folder);
  free (l->uri);
  free (l->path);
}

static void
reads_right (const struct line *l, uint64_t off, uint64_t len)
{
  uint8_t *buf = malloc (len);
  struct err err = { 0 };

  assert_ok (bdev_pread (l->d, buf, len, off, &err), &err);
  assert_memory_equal (buf, l->disk + off, len);
  free (buf);
}

/* --- rules */

/* The nth request of a kind gets an answer of its own. */
struct rule {
  unsigned kind, nth, every, seen;      /* every: and each so many after that, if not 0 */
  enum nbdserver_answer answer;
};

static enum nbdserver_answer
apply (void *opaque, const struct nbdserver_request *req)
{
  struct rule *r = opaque;

  if (req->kind != r->kind)
    return SRV_ANSWER;
  r->seen++;
  return r->seen == r->nth || (r->every && r->seen > r->nth && (r->seen - r->nth) % r->every == 0)
           ? r->answer : SRV_ANSWER;
}

static void
set_rule (struct line *l, struct rule *r, unsigned kind, unsigned nth, unsigned every,
          enum nbdserver_answer answer)
{
  nbdserver_decide (l->s, NULL, NULL);          /* nobody looks at it while it changes */
  *r = (struct rule) { .kind = kind, .nth = nth, .every = every, .answer = answer };
  nbdserver_decide (l->s, apply, r);
}

/* All of a kind. */
static void
all (struct line *l, struct rule *r, unsigned kind, enum nbdserver_answer answer)
{
  set_rule (l, r, kind, 1, 1, answer);
}

static void
the_next (struct line *l, struct rule *r, unsigned kind, enum nbdserver_answer answer)
{
  set_rule (l, r, kind, 1, 0, answer);
}

/* One operation in a thread of its own. */
struct doing {
  struct bdev *d;
  unsigned kind;
  uint64_t off, len;
  uint8_t buf[65536];
  int result;
  pthread_t thread;
};

static int
do_it (struct bdev *d, unsigned kind, uint8_t *buf, uint64_t off, uint64_t len)
{
  switch (kind) {
  case SRV_READ:
    return bdev_pread (d, buf, len, off, NULL);
  case SRV_WRITE:
    return bdev_pwrite (d, buf, len, off, 0, NULL);
  case SRV_ZERO:
    return bdev_zero (d, off, len, 0, NULL);
  case SRV_TRIM:
    return bdev_trim (d, off, len, 0, NULL);
  default:
    return bdev_flush (d, NULL);
  }
}

static void *
do_in_thread (void *opaque)
{
  struct doing *o = opaque;

  o->result = do_it (o->d, o->kind, o->buf, o->off, o->len);
  return NULL;
}

static void
begin (struct doing *o, struct bdev *d, unsigned kind, uint64_t off, uint64_t len)
{
  *o = (struct doing) { .d = d, .kind = kind, .off = off, .len = len };
  pthread_create (&o->thread, NULL, do_in_thread, o);
}

static int
result_of (struct doing *o)
{
  pthread_join (o->thread, NULL);
  return o->result;
}

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

static int
count_right (void *opaque, size_t i, const void *buf, int r, const struct err *why)
{
  atomic_uint *right = opaque;

  *right += r == 0;
  return 0;
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
  struct doing bad, good[4], held[6];
  struct rule rule;

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
    /* Nobody is under suspicion any more: there can be many in flight again. */
    reads_right (&l, 0, 512);
    all (&l, &rule, SRV_READ, SRV_HOLD);
    for (unsigned i = 0; i < 6; ++i)
      begin (&held[i], l.d, SRV_READ, i * 131072, 4096);
    assert_true (nbdserver_await_held (l.s, 6));
    nbdserver_decide (l.s, NULL, NULL);
    nbdserver_release (l.s);
    for (unsigned i = 0; i < 6; ++i)
      assert_int_equal (result_of (&held[i]), 0);
  }
  end_line (&l);
}

/* --- durability */

static void
break_line (struct line *l)
{
  nbdserver_go_away (l->s);
  nbdserver_come_back (l->s, SIZE);
}

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

/* What answers has another byte there. */
static void
other_bytes (uint64_t where)
{
  struct line l = connect_line ((struct nbdserver_options) { .read_only = true }, 20, 1);
  unsigned conns = nbdserver_conns (l.s);
  uint64_t furthest;
  uint8_t buf[4096];

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
  other_bytes (4095);
  other_bytes (SIZE / 4 + 77);
}

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

/* --- many threads */

#define NR_THREADS 8
#define REGION     (SIZE / NR_THREADS)

struct worker {
  struct line *l;
  unsigned index;
  uint8_t *want;                /* of the region */
  unsigned lost, wrong;
  pthread_t thread;
};

/* A write that failed may or may not have been carried out: it is made once more. */
static void
change_region (struct worker *w, uint64_t off, uint64_t len, uint8_t byte, bool zero)
{
  uint64_t at = w->index * REGION + off;
  int r = -ENOTCONN;

  memset (w->want + off, zero ? 0 : byte, len);
  for (unsigned i = 0; i < 100 && r == -ENOTCONN; ++i) {
    r = zero ? bdev_zero (w->l->d, at, len, 0, NULL)
             : bdev_pwrite (w->l->d, w->want + off, len, at, 0, NULL);
    w->lost += r == -ENOTCONN;
  }
  w->wrong += r != 0;
}

static int
compare_region (void *opaque, size_t i, const void *buf, int r, const struct err *why)
{
  return r == 0 && memcmp (buf, opaque, 4096) == 0 ? 0 : -EILSEQ;
}

static void *
work (void *opaque)
{
  struct worker *w = opaque;
  uint64_t seed = w->index, base = w->index * REGION;
  CLEANUP_FREE uint8_t *buf = malloc (REGION);

  for (unsigned i = 0; i < 100; ++i) {
    uint64_t off = test_random (&seed) % REGION, len = 1 + test_random (&seed) % 50000;
    struct bdev_range same[3] = { { base, 4096 }, { base, 4096 }, { base, 4096 } };

    len = MIN (len, REGION - off);
    if (i % 3 == 0)
      bdev_cache (w->l->d, base + off, len, NULL);
    if (i % 4 == 0)
      change_region (w, off, len, i, i % 8 == 0);
    if (bdev_pread (w->l->d, buf, len, base + off, NULL) < 0
        || memcmp (buf, w->want + off, len) != 0)
      w->wrong++;
    if (i % 10 == 0 && bdev_read_many (w->l->d, same, 3, compare_region, w->want, NULL) < 0)
      w->wrong++;
  }
  return NULL;
}

static unsigned
all_work (struct line *l, void (*meanwhile) (struct line *))
{
  struct worker workers[NR_THREADS];
  unsigned lost = 0;

  for (unsigned i = 0; i < NR_THREADS; ++i) {
    struct worker *w = &workers[i];

    *w = (struct worker) { .l = l, .index = i, .want = malloc (REGION) };
    memcpy (w->want, l->disk + i * REGION, REGION);
    pthread_create (&w->thread, NULL, work, w);
  }
  if (meanwhile)
    meanwhile (l);
  for (unsigned i = 0; i < NR_THREADS; ++i) {
    pthread_join (workers[i].thread, NULL);
    assert_int_equal (workers[i].wrong, 0);
    assert_memory_equal (l->disk + i * REGION, workers[i].want, REGION);
    lost += workers[i].lost;
    free (workers[i].want);
  }
  return lost;
}

struct every {
  unsigned left, period;
  enum nbdserver_answer answer; /* SRV_DO_AND_DROP: when the next change comes */
};

static enum nbdserver_answer
now_and_then (void *opaque, const struct nbdserver_request *req)
{
  struct every *e = opaque;

  if (e->left > 0)
    e->left--;
  if (e->left > 0 || (e->answer == SRV_DO_AND_DROP && req->kind != SRV_WRITE))
    return SRV_ANSWER;
  e->left = e->period;
  return e->answer;
}

static void
threads_and_drops (void **state)
{
  static const enum nbdserver_answer answers[] = { SRV_DROP, SRV_DO_AND_DROP, SRV_HALF };

  for (unsigned i = 0; i < 3; ++i) {
    struct line l = connect_line ((struct nbdserver_options) {
        .multi_conn = i != 1, .structured = i == 0, .minimum = 512, .maximum = 65536 }, 20, 20);
    struct every e = { 100, 200, answers[i] };
    unsigned lost;

    nbdserver_decide (l.s, now_and_then, &e);
    lost = all_work (&l, NULL);
    assert_true (lost > 0 || answers[i] != SRV_DO_AND_DROP);
    nbdserver_decide (l.s, NULL, NULL);
    assert_int_equal (bdev_flush (l.d, NULL), -EIO);
    end_line (&l);
  }
}

static void
rest_often (struct line *l)
{
  for (unsigned i = 0; i < 200; ++i)
    nbd_rest ();
}

struct hasty {
  struct bdev *d;
  unsigned failed;
  pthread_t thread;
};

static void *
read_hastily (void *opaque)
{
  struct hasty *h = opaque;
  uint8_t buf[512];

  for (unsigned i = 0; i < 3000; ++i)
    h->failed += bdev_pread (h->d, buf, 512, i * 512, NULL) < 0;
  return NULL;
}

/* Nobody's request is forgotten when the I/O thread comes to rest. */
static void
threads_and_rest (void **state)
{
  struct line l = connect_line ((struct nbdserver_options) { .multi_conn = true }, 20, 20);

  nbd_rest ();
  all_work (&l, rest_often);
  nbd_rest ();
  all_work (&l, NULL);
  end_line (&l);
}

/* With one thread, nothing is under way again and again. */
static void
requests_and_rest (void **state)
{
  struct line l = connect_line ((struct nbdserver_options) { 0 }, 20, 20);
  struct hasty h = { .d = l.d };

  pthread_create (&h.thread, NULL, read_hastily, &h);
  for (unsigned i = 2; i < 2500; ++i) {
    assert_true (nbdserver_await (l.s, SRV_READ, i));
    nbd_rest ();
  }
  pthread_join (h.thread, NULL);
  assert_int_equal (h.failed, 0);
  end_line (&l);
}

/* --- waiting ends */

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
    struct line l = connect_line ((struct nbdserver_options) { .multi_conn = multi }, 30, 60);
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
    assert_in_range (close_ms (&l), 0, 2500);
    end_line (&l);
  }
}

static void
closed_while_gone (void **state)
{
  struct line l = connect_line ((struct nbdserver_options) { .multi_conn = true }, 30, 60);
  struct rule rule;

  all (&l, &rule, SRV_READ, SRV_HOLD);
  bdev_cache (l.d, 0, SIZE, NULL);
  assert_true (nbdserver_await_held (l.s, 1));
  nbdserver_go_away (l.s);
  assert_in_range (close_ms (&l), 0, 2500);
  end_line (&l);
  /* It takes connections, and says nothing. */
  l = connect_line ((struct nbdserver_options) { .multi_conn = true }, 30, 60);
  nbdserver_stall (l.s, true);
  break_line (&l);
  bdev_cache (l.d, 0, SIZE, NULL);
  assert_in_range (close_ms (&l), 0, 2500);
  end_line (&l);
}

/* What is on its way arrives, where it can: the server is not cut off in the midst of it. */
static void
closed_politely (void **state)
{
  struct line l = connect_line ((struct nbdserver_options) { .multi_conn = true }, 30, 60);

  bdev_cache (l.d, 0, SIZE, NULL);
  assert_in_range (close_ms (&l), 0, 900);
  end_line (&l);
}

/* Stalled while it is read from: an error, in time; then it goes on. */
static void
stalled (void **state)
{
  struct line l = connect_line ((struct nbdserver_options) { .multi_conn = true }, 1, 1);
  uint64_t before = clock_ms (), took;
  uint8_t buf[512];

  nbdserver_stall (l.s, true);
  assert_int_equal (bdev_pread (l.d, buf, 512, 0, NULL), -ENOTCONN);
  took = clock_ms () - before;
  assert_in_range (took, 900, 5000);
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
    cmocka_unit_test (changes_in_flight),
    cmocka_unit_test (reads_in_flight),
    cmocka_unit_test (one_breaks_it),
    cmocka_unit_test (flush_after_loss),
    cmocka_unit_test (flush_in_flight),
    cmocka_unit_test (write_beside_a_flush),
    cmocka_unit_test (without_fua),
    cmocka_unit_test (other_size),
    cmocka_unit_test (other_contents),
    cmocka_unit_test (block_sizes),
    cmocka_unit_test (part_of_a_block),
    cmocka_unit_test (as_large_as_can_be),
    cmocka_unit_test (written_meanwhile),
    cmocka_unit_test (announced_meanwhile),
    cmocka_unit_test (holes_change),
    cmocka_unit_test (asked_at_once),
    cmocka_unit_test (threads_and_drops),
    cmocka_unit_test (threads_and_rest),
    cmocka_unit_test (requests_and_rest),
    cmocka_unit_test (closed_while_stalled),
    cmocka_unit_test (closed_while_gone),
    cmocka_unit_test (closed_politely),
    cmocka_unit_test (stalled),
    cmocka_unit_test (read_error),
  };

  /* What waits for ever is a failure, too. */
  alarm (120);
  return cmocka_run_group_tests (tests, NULL, NULL);
}
