/* How much the cache of L2 tables keeps while a read does not come to its end: what that
 * read may still see cannot be used again, and the others bring in more and more.
 */
#include <pthread.h>
#include <time.h>
#include <unistd.h>

#include "img-test.h"

#define CLUSTER  512
#define COVERED  (CLUSTER / 8 * CLUSTER)        /* guest bytes that a slice, a whole table here, maps */
#define SLICES   4096
#define CACHED   64             /* slices */
#define READERS  4
#define STUCK    333            /* bytes; the length of the read that does not end */
#define TOO_MANY 3000           /* slices brought in meanwhile */

/* --- a device with a read that ends when it is told to */

struct stuck {
  struct bdev d;
  struct bdev *under;
  pthread_mutex_t lock;
  pthread_cond_t cond;
  bool begun, may_end;
};

static int
stuck_pread (struct bdev *d, void *buf, size_t len, uint64_t off, struct err *err)
{
  struct stuck *s = (struct stuck *) d;

  if (len == STUCK) {
    pthread_mutex_lock (&s->lock);
    s->begun = true;
    pthread_cond_broadcast (&s->cond);
    while (!s->may_end)
      pthread_cond_wait (&s->cond, &s->lock);
    pthread_mutex_unlock (&s->lock);
  }
  return bdev_pread (s->under, buf, len, off, err);
}

static void
stuck_close (struct bdev *d)
{
  struct stuck *s = (struct stuck *) d;

  bdev_unref (s->under);
  free (s);
}

static const struct bdev_ops stuck_ops = { .kind = "stuck", .pread = stuck_pread, .close = stuck_close };

static struct stuck *
stuck_new (struct bdev *under)
{
  struct stuck *s = calloc (1, sizeof *s);

  assert_int_equal (bdev_init (&s->d, &stuck_ops, "stuck", bdev_size (under), false, false, NULL), 0);
  s->under = bdev_ref (under);
  pthread_mutex_init (&s->lock, NULL);
  pthread_cond_init (&s->cond, NULL);
  return s;
}

/* --- readers */

struct reader {
  pthread_t thread;
  struct bdev *view;
  uint64_t off, step;           /* guest bytes; it goes round */
  uint64_t max;                 /* reads; 0 = until it is stopped */
  size_t len;
  atomic_bool stop, failed;
  _Atomic uint64_t nr_reads;
};

static void *
read_round (void *opaque)
{
  struct reader *r = opaque;
  uint8_t buf[CLUSTER];

  for (uint64_t n = 0; !atomic_load (&r->stop) && (r->max == 0 || n < r->max); ++n) {
    uint64_t off = (r->off + n * r->step) % ((uint64_t) SLICES * COVERED);

    if (bdev_pread (r->view, buf, r->len, off, NULL) < 0 || load_be64 (buf) != off / COVERED)
      atomic_store (&r->failed, true);
    atomic_fetch_add (&r->nr_reads, 1);
  }
  return NULL;
}

static void
start (struct reader *r, struct bdev *view, uint64_t off, uint64_t step, size_t len)
{
  r->view = view;
  r->off = off;
  r->step = step;
  r->len = len;
  assert_int_equal (pthread_create (&r->thread, NULL, read_round, r), 0);
}

static uint64_t
reads_of (struct reader *r, unsigned n)
{
  uint64_t sum = 0;

  for (unsigned i = 0; i < n; ++i)
    sum += atomic_load (&r[i].nr_reads);
  return sum;
}

static void
end (struct reader *r)
{
  pthread_join (r->thread, NULL);
  assert_false (atomic_load (&r->failed));
}

/* Its clusters say to which table they belong.  All tables but the first exist. */
static struct bdev *
make_disk (void)
{
  struct bdev *file = new_image (3, 9, 4, (uint64_t) SLICES * COVERED, NULL);
  struct bdev *view = open_view (file, NULL, 0);
  uint8_t buf[CLUSTER] = { 0 };
  struct err err = { 0 };

  for (uint64_t i = 1; i < SLICES; ++i) {
    store_be64 (buf, i);
    assert_ok (bdev_pwrite (view, buf, sizeof buf, i * COVERED, 0, &err), &err);
  }
  assert_ok (bdev_flush (view, &err), &err);
  bdev_unref (view);
  return file;
}

/* Until they no longer get on, though they did, or have gone too far. */
static uint64_t
wait_until_they_wait (struct reader *r, unsigned n)
{
  uint64_t before, now = 0;

  do {
    struct timespec ts = { .tv_nsec = 300000000 };

    before = now;
    nanosleep (&ts, NULL);
    now = reads_of (r, n);
  } while (now == 0 || (now > before && now < TOO_MANY));
  return now;
}

static void
a_stuck_read_does_not_fill_memory (void **state)
{
  struct bdev *file = make_disk ();
  struct stuck *s = stuck_new (file);
  struct bdev *view = open_view (&s->d, NULL, CACHED * CLUSTER);
  struct reader stuck = { .max = 1 }, hot = { 0 }, readers[READERS] = { 0 };
  uint64_t hot_before;

  start (&stuck, view, COVERED, 0, STUCK);
  pthread_mutex_lock (&s->lock);
  while (!s->begun)
    pthread_cond_wait (&s->cond, &s->lock);
  pthread_mutex_unlock (&s->lock);
  start (&hot, view, 0, 0, CLUSTER);
  for (unsigned i = 0; i < READERS; ++i)
    start (&readers[i], view, (i + 1) * (SLICES / READERS) * (uint64_t) COVERED, COVERED, CLUSTER);
  assert_in_range (wait_until_they_wait (readers, READERS), 1, 5 * CACHED);
  /* Who needs nothing new is not held up. */
  hot_before = atomic_load (&hot.nr_reads);
  for (unsigned i = 0; i < 100 && atomic_load (&hot.nr_reads) < hot_before + 1000; ++i)
    wait_until_they_wait (readers, READERS);
  assert_true (atomic_load (&hot.nr_reads) >= hot_before + 1000);

  /* All go on when it comes to its end. */
  pthread_mutex_lock (&s->lock);
  s->may_end = true;
  pthread_cond_broadcast (&s->cond);
  pthread_mutex_unlock (&s->lock);
  end (&stuck);
  while (reads_of (readers, READERS) < TOO_MANY)
    wait_until_they_wait (readers, READERS);
  atomic_store (&hot.stop, true);
  end (&hot);
  for (unsigned i = 0; i < READERS; ++i) {
    atomic_store (&readers[i].stop, true);
    end (&readers[i]);
  }
  bdev_unref (view);
  bdev_unref (&s->d);
  bdev_unref (file);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (a_stuck_read_does_not_fill_memory),
  };

  alarm (400);                  /* what waits for ever is a failure, too */
  return cmocka_run_group_tests (tests, NULL, NULL);
}
