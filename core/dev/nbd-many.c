/* bdev_read_many of the NBD device: a window of requests in flight.  See nbd-int.h.
 *
 * The caller's thread cuts the list into batches (ranges that touch, up to a piece; a longer
 * range is several requests), submits them as long as the window has room, and calls back for
 * those that have come, so the callbacks run beside the I/O thread.  A batch that cannot be read
 * is asked for again range by range, so that an error is told of those only that it hits.
 *
 * What lies in a hole is not asked for, nor what is being read ahead.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "dev/nbd-int.h"

#define WINDOW_BYTES   (UINT64_C (32) << 20)    /* in buffers of one caller */
#define WINDOW_BATCHES (NBD_MAX_CONNS * NBD_DEPTH)
#define MAX_BATCH      (UINT64_C (256) << 10)   /* bytes that ranges are joined up to */

struct many {
  struct nbd *n;
  const struct bdev_range *ranges;
  size_t nr, next;              /* ranges; the first not taken yet */
  bdev_many_fn fn;
  void *opaque;
  int result;                   /* the first -errno of a callback */
  /* what is under way */
  uint64_t bytes;
  size_t batches;
  pthread_mutex_t lock;
  pthread_cond_t cond;
  struct batch *come;           /* protected by lock: all of their requests are done */
};

struct batch {
  struct many *m;
  size_t first, nr;             /* ranges */
  uint64_t off, len;            /* what is read: inside the export, whole blocks */
  size_t room;                  /* bytes of buf: len, and what the ranges have past the end */
  uint8_t *buf;
  bool ahead;                   /* all of it is, or was, read ahead: no requests */
  atomic_uint left;             /* requests */
  atomic_int result;
  struct batch *next;
  unsigned nr_reqs;
  struct nbd_request reqs[];
};

/* --- making batches */

/* How many ranges from first on are read in one go. */
static size_t
count_joined (const struct many *m, size_t first)
{
  uint64_t bytes = m->ranges[first].len, end;
  size_t n = 1;

  while (first + n < m->nr) {
    const struct bdev_range *r = &m->ranges[first + n];

    if (add_overflows (m->ranges[first].off, bytes, &end) || r->off != end
        || !range_fits (bytes, r->len, MAX_BATCH))
      break;
    bytes += r->len;
    ++n;
  }
  return n;
}

static struct batch *
make_batch (struct many *m, size_t first, size_t nr)
{
  const struct bdev_range *last = &m->ranges[first + nr - 1];
  uint64_t off = m->ranges[first].off, size = m->n->facts.size;
  size_t want = last->off + last->len - off;
  uint64_t len = off < size ? MIN (want, size - off) : 0;
  struct batch *b;
  unsigned nr_reqs;
  bool ahead;

  if (len > 0 && nbd_holes_cover (m->n, off, len))
    len = 0;
  if (len > 0)
    nbd_align (m->n, &off, &len);
  ahead = len > 0 && nbd_ahead_covers (m->n, off, len);
  nr_reqs = ahead ? 0 : DIV_ROUND_UP (len, m->n->max_piece);
  b = calloc (1, sizeof *b + nr_reqs * sizeof b->reqs[0]);
  if (!b)
    return NULL;
  *b = (struct batch) { .m = m, .first = first, .nr = nr, .off = off, .len = len,
                        .ahead = ahead, .nr_reqs = nr_reqs };
  b->room = MAX (len, m->ranges[first].off - off + want);
  b->buf = malloc (b->room + 1);
  if (!b->buf) {
    free (b);
    return NULL;
  }
  memset (b->buf + len, 0, b->room - len);
  return b;
}

static void
batch_come (struct batch *b)
{
  LOCK_SCOPE (&b->m->lock);
  b->next = b->m->come;
  b->m->come = b;
  pthread_cond_signal (&b->m->cond);
}

static void
batch_done (struct nbd_request *req)
{
  struct batch *b = req->opaque;
  int none = 0;

  if (req->result < 0)
    atomic_compare_exchange_strong (&b->result, &none, req->result);
  if (atomic_fetch_sub (&b->left, 1) == 1)
    batch_come (b);
}

static void
submit (struct many *m, struct batch *b)
{
  unsigned nr_reqs = b->nr_reqs;
  uint64_t step = m->n->max_piece;

  m->bytes += b->room;
  m->batches++;
  if (nr_reqs == 0) {
    batch_come (b);
    return;
  }
  atomic_store (&b->left, nr_reqs);
  for (unsigned i = 0; i < nr_reqs; ++i) {      /* b may be gone after the last */
    b->reqs[i] = (struct nbd_request) {
      .op = NBD_READ, .buf = b->buf + i * step, .off = b->off + i * step,
      .len = MIN (b->len - i * step, step), .done = batch_done, .opaque = b,
    };
    nbd_submit (m->n, &b->reqs[i]);
  }
}

/* --- giving them to the caller */

static void
call (struct many *m, size_t i, const void *buf, int r)
{
  struct err why = { 0 };

  if (m->result < 0)
    return;
  if (r < 0)
    err_set (&why, -r, "%s: read of %zu bytes at byte %llu: %s", m->n->d.name, m->ranges[i].len,
             (unsigned long long) m->ranges[i].off,
             r == -ENOTCONN ? "the server cannot be reached" : strerror (-r));
  r = m->fn (m->opaque, i, buf, r, &why);
  if (r < 0)
    m->result = r;
}

static void
start_batch (struct many *m, size_t first, size_t nr)
{
  struct batch *b = make_batch (m, first, nr);

  if (b)
    submit (m, b);
  else
    for (size_t i = 0; i < nr; ++i)
      call (m, first + i, NULL, -ENOMEM);
}

static void
give (struct many *m, struct batch *b)
{
  int r = b->ahead ? nbd_read_blocking (m->n, b->buf, b->len, b->off, NULL)
                   : atomic_load (&b->result);

  m->bytes -= b->room;
  m->batches--;
  for (size_t i = 0; i < b->nr; ++i) {
    if (r < 0 && r != -ENOTCONN && b->nr > 1)
      start_batch (m, b->first + i, 1);
    else
      call (m, b->first + i, b->buf + (m->ranges[b->first + i].off - b->off), r);
  }
  free (b->buf);
  free (b);
}

static bool
has_room (const struct many *m)
{
  return m->batches == 0
         || (m->bytes < WINDOW_BYTES && m->batches < WINDOW_BATCHES);
}

/* Wait until something has come, and give it all out. */
static void
give_what_came (struct many *m)
{
  struct batch *b, *next;

  {
    LOCK_SCOPE (&m->lock);
    while (!m->come)
      pthread_cond_wait (&m->cond, &m->lock);
    b = m->come;
    m->come = NULL;
  }
  for (; b; b = next) {
    next = b->next;
    give (m, b);
  }
}

int
nbd_read_many (struct bdev *d, const struct bdev_range *ranges, size_t nr, bdev_many_fn fn,
               void *opaque, struct err *err)
{
  struct nbd *n = (struct nbd *) d;
  struct many m = { .n = n, .ranges = ranges, .nr = nr, .fn = fn, .opaque = opaque,
                    .lock = PTHREAD_MUTEX_INITIALIZER, .cond = PTHREAD_COND_INITIALIZER };

  nbd_holes_learn (n, ranges, nr);
  while ((m.next < nr && m.result == 0) || m.batches > 0) {
    while (m.next < nr && m.result == 0 && has_room (&m)) {
      size_t first = m.next, joined = count_joined (&m, first);

      m.next += joined;
      start_batch (&m, first, joined);
    }
    if (m.batches > 0)
      give_what_came (&m);
  }
  pthread_mutex_destroy (&m.lock);
  pthread_cond_destroy (&m.cond);
  return m.result;
}
