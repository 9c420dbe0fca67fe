/* See many.h.  The ranges are a queue; each thread, the caller's among them,
 * takes the next batch (one range, or several that touch), reads it into a
 * buffer of its own and calls back.  Few ranges are not worth a thread.
 *
 * Deliberately not here: sorting.  The order of the caller is the order of the
 * table that the ranges came from, which the callbacks want, and which is
 * nearly always ascending on the disk too.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "dev/many.h"

#define MAX_THREADS   4
#define MIN_RANGES    16        /* to be worth a thread, or ... */
#define MIN_BYTES     (UINT64_C (4) << 20)
#define MAX_BATCH     (256 * 1024)      /* bytes that ranges are joined up to */
#define AHEAD         64        /* ranges announced before they are read */
#define SLOW_NS       100000    /* a read that takes longer came from a disk */

struct many {
  /* constant */
  struct bdev *d;
  const struct bdev_range *ranges;
  size_t nr;
  bdev_many_fn fn;
  void *opaque;
  /* protected by lock */
  pthread_mutex_t lock;
  size_t next;                  /* first range that nobody has taken */
  size_t announced;             /* ranges before it have been announced */
  atomic_bool slow;
  atomic_int result;            /* first -errno of a callback */
};

struct batch {
  size_t first, nr;             /* ranges */
  size_t bytes;
  size_t announce_first, announce_end;
};

/* False when there is nothing left to do. */
static bool
take_batch (struct many *m, struct batch *b)
{
  LOCK_SCOPE (&m->lock);
  if (m->next >= m->nr || atomic_load (&m->result) != 0)
    return false;
  b->first = m->next;
  b->nr = 1;
  b->bytes = m->ranges[m->next].len;
  while (b->first + b->nr < m->nr) {
    const struct bdev_range *r = &m->ranges[b->first + b->nr];
    uint64_t end;

    if (add_overflows (m->ranges[b->first].off, b->bytes, &end) || r->off != end ||
        !range_fits (b->bytes, r->len, MAX_BATCH))
      break;
    b->bytes += r->len;
    b->nr++;
  }
  m->next += b->nr;
  b->announce_first = b->announce_end = 0;
  if (atomic_load (&m->slow)) {
    b->announce_first = MAX (m->announced, m->next);
    b->announce_end = MAX (b->announce_first, MIN (m->nr, m->next + AHEAD));
    m->announced = b->announce_end;
  }
  return true;
}

static void
announce (struct many *m, const struct batch *b)
{
  for (size_t i = b->announce_first; i < b->announce_end; ++i) {
    uint64_t size = bdev_size (m->d), off = m->ranges[i].off;

    if (off < size)             /* a hint: errors show when it is read */
      bdev_cache (m->d, off, MIN (m->ranges[i].len, size - off), NULL);
  }
}

/* pread_padded, and notice whether the bytes had to come from afar. */
static int
timed_read (struct many *m, void *buf, size_t len, uint64_t off, struct err *why)
{
  struct timespec a, b;
  int r;

  if (m->d->ops->cache == NULL || atomic_load_explicit (&m->slow, memory_order_relaxed))
    return bdev_pread_padded (m->d, buf, len, off, why);
  clock_gettime (CLOCK_MONOTONIC, &a);
  r = bdev_pread_padded (m->d, buf, len, off, why);
  clock_gettime (CLOCK_MONOTONIC, &b);
  /* Copying out of a cache makes at least 1 byte a nanosecond. */
  if ((b.tv_sec - a.tv_sec) * 1000000000ll + b.tv_nsec - a.tv_nsec >
      SLOW_NS + (long long) len)
    atomic_store (&m->slow, true);
  return r;
}

/* All of the batch at once; if that fails, each range for itself, so that an
 * error is told of those ranges only that it hits.
 */
static void
do_batch (struct many *m, const struct batch *b, uint8_t *buf, const struct err *no_memory)
{
  const struct bdev_range *ranges = m->ranges + b->first;
  struct err why = { 0 };
  int r = no_memory->code ? -no_memory->code
                          : timed_read (m, buf, b->bytes, ranges[0].off, &why);
  bool one_by_one = r < 0 && b->nr > 1 && !no_memory->code;
  size_t pos = 0;

  for (size_t i = 0; i < b->nr && atomic_load (&m->result) == 0; ++i) {
    int expected = 0, fr;

    if (one_by_one) {
      err_clear (&why);
      r = bdev_pread_padded (m->d, buf + pos, ranges[i].len, ranges[i].off, &why);
    }
    fr = m->fn (m->opaque, b->first + i, buf + pos, r, no_memory->code ? no_memory : &why);
    if (fr < 0)
      atomic_compare_exchange_strong (&m->result, &expected, fr);
    pos += ranges[i].len;
  }
}

static void *
worker (void *opaque)
{
  struct many *m = opaque;
  CLEANUP_FREE uint8_t *buf = NULL;
  size_t cap = 0;
  struct batch b;

  while (take_batch (m, &b)) {
    struct err no_memory = { 0 };

    announce (m, &b);
    if (buf == NULL || b.bytes > cap) {
      free (buf);
      cap = MAX (b.bytes, 4096);
      buf = malloc (cap);
      if (buf == NULL)
        err_set (&no_memory, ENOMEM, "out of memory");
    }
    do_batch (m, &b, buf, &no_memory);
  }
  return NULL;
}

static unsigned
threads_worth (const struct bdev_range *ranges, size_t nr)
{
  long cores = sysconf (_SC_NPROCESSORS_ONLN);
  uint64_t bytes = 0;

  for (size_t i = 0; i < nr && i < MIN_RANGES && bytes < MIN_BYTES; ++i)
    if (add_overflows (bytes, ranges[i].len, &bytes))
      bytes = MIN_BYTES;
  if (nr < MIN_RANGES && bytes < MIN_BYTES)
    return 1;
  return MIN (MIN ((size_t) MAX (cores, 1), nr), MAX_THREADS);
}

int
many_read (struct bdev *d, const struct bdev_range *ranges, size_t nr,
           bdev_many_fn fn, void *opaque, struct err *err)
{
  struct many m = { .d = d, .ranges = ranges, .nr = nr, .fn = fn, .opaque = opaque,
                    .lock = PTHREAD_MUTEX_INITIALIZER };
  unsigned want = threads_worth (ranges, nr) - 1, have = 0;
  pthread_t threads[MAX_THREADS];
  sigset_t all, old;

  if (want > 0) {
    sigfillset (&all);          /* signals are the program's business */
    pthread_sigmask (SIG_SETMASK, &all, &old);
    while (have < want && pthread_create (&threads[have], NULL, worker, &m) == 0)
      ++have;                   /* fewer will do */
    pthread_sigmask (SIG_SETMASK, &old, NULL);
  }
  worker (&m);
  for (unsigned i = 0; i < have; ++i)
    pthread_join (threads[i], NULL);
  pthread_mutex_destroy (&m.lock);
  return atomic_load (&m.result);
}
