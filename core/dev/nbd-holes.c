/* What an NBD server says about its export: where there is nothing.  See nbd-int.h.
 *
 * For bdev_extents the server is asked each time.  For bdev_read_many, what it says is kept, in
 * chunks of the disk, since a check asks for tables in the same regions again and again: ranges
 * in holes that read as zeros cost nothing then.  A chunk is asked about only if many ranges lie
 * in it; all the questions are in flight together.
 *
 * Nothing is kept once this program changes the disk.  LIMIT: what is kept, like every other
 * byte that was read, is wrong if somebody else writes to the export meanwhile.
 */
#include <errno.h>
#include <stdlib.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "base/vec.h"
#include "dev/nbd-int.h"

#define CHUNK        (UINT64_C (2) << 30)       /* bytes; one question must hold it in 32 bits */
#define MAX_CHUNKS   (1u << 16)                 /* larger disks are read without */
#define WORTH        4          /* ranges in a chunk that are worth a question */
#define MAX_EXTENTS  (1u << 20) /* kept, in all */
#define MAX_ROUNDS   64         /* questions about one chunk, if the answers are short */

struct extent {
  uint64_t off, len;
  unsigned kind;
};
DEFINE_VEC (extent_vec, struct extent);

struct chunk {
  bool known;                   /* that is, asked; what has no extent counts as data */
  struct extent_vec holes;      /* that read as zeros, in order, neighbours joined */
};

struct nbd_holes {
  pthread_mutex_t lock;         /* protects all below */
  struct chunk *chunks;
  uint64_t nr_chunks;           /* 0: not made yet, or too many */
  size_t nr_extents;
};

/* --- asking */

/* One question, repeated until its range is covered or the server says no more. */
struct question {
  struct nbd *n;
  uint64_t off, end, at;        /* at: what has been told about so far */
  struct extent_vec extents;
  bool no_memory;
  unsigned rounds;
  struct nbd_wait *wait;
  struct nbd_request req;
};

static int
hear (void *opaque, uint64_t off, uint64_t len, unsigned kind)
{
  struct question *q = opaque;

  /* A question that was asked again, since the connection was lost, is answered from its start. */
  if (off + len <= q->at)
    return 0;
  if (off < q->at) {
    len -= q->at - off;
    off = q->at;
  }
  if (q->extents.len >= MAX_EXTENTS
      || extent_vec_push (&q->extents, (struct extent) { off, len, kind }) < 0) {
    q->no_memory = true;
    return 1;
  }
  q->at = off + len;
  return 0;
}

static void ask (struct question *q);

static void
heard (struct nbd_request *req)
{
  struct question *q = req->opaque;
  struct nbd_wait *w = q->wait;

  if (req->result == 0 && q->at > req->off && q->at < q->end && !q->no_memory
      && ++q->rounds < MAX_ROUNDS) {
    ask (q);
    return;
  }
  if (atomic_fetch_sub (&w->left, 1) == 1)
    sem_post (&w->sem);
}

static void
ask (struct question *q)
{
  q->req = (struct nbd_request) { .op = NBD_STATUS, .off = q->at, .len = q->end - q->at,
                                  .extent = hear, .done = heard, .opaque = q };
  nbd_submit (q->n, &q->req);
}

/* Ask all, and wait. */
static void
ask_all (struct question *qs, size_t nr)
{
  struct nbd_wait w = { .left = nr };

  if (nr == 0)
    return;
  sem_init (&w.sem, 0, 0);
  for (size_t i = 0; i < nr; ++i) {
    qs[i].at = qs[i].off;
    qs[i].wait = &w;
    ask (&qs[i]);
  }
  while (sem_wait (&w.sem) < 0)
    ;                           /* EINTR */
  sem_destroy (&w.sem);
}

/* --- keeping */

int
nbd_holes_new (struct nbd *n, struct nbd_holes **ret, struct err *err)
{
  struct nbd_holes *h = calloc (1, sizeof *h);

  if (!h)
    return err_set (err, ENOMEM, "out of memory");
  pthread_mutex_init (&h->lock, NULL);
  *ret = h;
  return 0;
}

void
nbd_holes_free (struct nbd_holes *h)
{
  if (!h)
    return;
  for (uint64_t i = 0; i < h->nr_chunks; ++i)
    vec_reset (&h->chunks[i].holes);
  free (h->chunks);
  pthread_mutex_destroy (&h->lock);
  free (h);
}

static bool
make_chunks_locked (struct nbd *n)
{
  struct nbd_holes *h = n->holes;
  uint64_t nr = DIV_ROUND_UP (n->facts.size, CHUNK);

  if (h->chunks)
    return true;
  if (nr == 0 || nr > MAX_CHUNKS)
    return false;
  h->chunks = calloc (nr, sizeof *h->chunks);
  h->nr_chunks = h->chunks ? nr : 0;
  return h->chunks != NULL;
}

/* The chunks that are worth a question and were not asked about; the caller frees. */
static uint32_t *
worth_asking_locked (struct nbd *n, const struct bdev_range *ranges, size_t nr, size_t *found)
{
  struct nbd_holes *h = n->holes;
  uint32_t *list = malloc (h->nr_chunks * sizeof *list), *counts = calloc (h->nr_chunks,
                                                                           sizeof *counts);

  *found = 0;
  for (size_t i = 0; list && counts && i < nr; ++i) {
    uint64_t c = ranges[i].off / CHUNK;

    if (c < h->nr_chunks && !h->chunks[c].known && ++counts[c] == WORTH)
      list[(*found)++] = c;
  }
  free (counts);
  return list;
}

static void
keep_locked (struct nbd_holes *h, const struct question *q)
{
  struct chunk *c = &h->chunks[q->off / CHUNK];

  if (c->known)
    return;                     /* another thread asked, too */
  c->known = true;
  for (size_t i = 0; i < q->extents.len && h->nr_extents < MAX_EXTENTS; ++i) {
    const struct extent *e = &q->extents.ptr[i];
    struct extent *last = c->holes.len ? &c->holes.ptr[c->holes.len - 1] : NULL;

    if (!(e->kind & BDEV_ZERO))
      continue;
    if (last && last->off + last->len == e->off)
      last->len += e->len;
    else if (extent_vec_push (&c->holes, *e) == 0)
      h->nr_extents++;
  }
}

void
nbd_holes_learn (struct nbd *n, const struct bdev_range *ranges, size_t nr)
{
  struct nbd_holes *h = n->holes;
  CLEANUP_FREE uint32_t *list = NULL;
  CLEANUP_FREE struct question *qs = NULL;
  size_t found;

  if (!n->facts.can_extents || nr < WORTH || atomic_load (&n->changed))
    return;
  {
    LOCK_SCOPE (&h->lock);
    if (!make_chunks_locked (n))
      return;
    list = worth_asking_locked (n, ranges, nr, &found);
  }
  qs = found ? calloc (found, sizeof *qs) : NULL;
  if (!qs)
    return;
  for (size_t i = 0; i < found; ++i) {
    qs[i].n = n;
    qs[i].off = list[i] * CHUNK;
    qs[i].end = MIN (qs[i].off + CHUNK, n->facts.size);
  }
  ask_all (qs, found);
  LOCK_SCOPE (&h->lock);
  for (size_t i = 0; i < found; ++i) {
    keep_locked (h, &qs[i]);
    vec_reset (&qs[i].extents);
  }
}

/* The hole that holds off, or NULL. */
static const struct extent *
hole_at (const struct chunk *c, uint64_t off)
{
  size_t low = 0, high = c->holes.len;

  while (low < high) {
    size_t mid = low + (high - low) / 2;
    const struct extent *e = &c->holes.ptr[mid];

    if (off < e->off)
      high = mid;
    else if (off - e->off >= e->len)
      low = mid + 1;
    else
      return e;
  }
  return NULL;
}

bool
nbd_holes_cover (struct nbd *n, uint64_t off, uint64_t len)
{
  struct nbd_holes *h = n->holes;
  uint64_t end = off + len;

  if (atomic_load (&n->changed))
    return false;
  LOCK_SCOPE (&h->lock);
  while (off < end) {
    const struct extent *e = off / CHUNK < h->nr_chunks ? hole_at (&h->chunks[off / CHUNK], off)
                                                         : NULL;

    if (!e)
      return false;
    off = e->off + e->len;
  }
  return true;
}

/* --- bdev_extents */

static int
tell (const struct question *q, uint64_t off, uint64_t end, bdev_extent_fn fn, void *opaque)
{
  uint64_t at = off;
  int r = 0;

  for (size_t i = 0; r == 0 && i < q->extents.len && at < end; ++i) {
    const struct extent *e = &q->extents.ptr[i];
    uint64_t to = MIN (e->off + e->len, end);

    if (to <= at)
      continue;
    r = fn (opaque, at, to - at, e->kind);
    at = to;
  }
  /* What the server said nothing about may hold anything. */
  return r == 0 && at < end ? fn (opaque, at, end - at, 0) : r;
}

int
nbd_extents (struct bdev *d, uint64_t off, uint64_t len, bdev_extent_fn fn, void *opaque,
             struct err *err)
{
  struct nbd *n = (struct nbd *) d;
  uint64_t end = off + len;
  int r = 0;

  while (r == 0 && off < end) {
    uint64_t from = off, n_bytes = MIN (end - off, CHUNK);
    uint64_t to = off + n_bytes;
    struct question q = { .n = n };

    nbd_align (n, &from, &n_bytes);
    q.off = from;
    q.end = from + n_bytes;
    if (n->facts.can_extents)
      ask_all (&q, 1);
    r = tell (&q, off, to, fn, opaque);
    vec_reset (&q.extents);
    off = to;
  }
  return r;
}
