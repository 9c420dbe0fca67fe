/* Many threads use the NBD device while its line breaks, rests, and is used again. */
#include "base/cleanup.h"
#include "line.h"

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

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (threads_and_drops),
    cmocka_unit_test (threads_and_rest),
    cmocka_unit_test (requests_and_rest),
  };

  /* What waits for ever is a failure, too. */
  alarm (400);
  return cmocka_run_group_tests (tests, NULL, NULL);
}
