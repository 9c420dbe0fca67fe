/* What was read ahead from an NBD export, in RAM.  See nbd-int.h.
 *
 * Pieces of the disk, on their way or here, in the order in which they were last used.  A read
 * takes what is here, waits for what is on its way, and asks for the rest itself.  A hint that
 * finds no room is refused: everything is read correctly without it.  There are few pieces, so
 * that a list is searched quickly enough beside a journey over a network.
 *
 * A change takes the pieces that it touches off the list, before and after: one that is on its
 * way meanwhile may bring old bytes or new ones, and is seen by nobody who looks for it later.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "dev/nbd-int.h"

#define MAX_BYTES   (UINT64_C (128) << 20)      /* of all pieces */
#define MAX_LOADING (UINT64_C (96) << 20)       /* of those on their way */
#define MAX_PIECES  1024
#define PIECE       (UINT64_C (512) << 10)      /* bytes of one, at most */
#define MAX_SPARE   32          /* buffers kept, so that the kernel need not clear new memory */

enum state { LOADING, READY, FAILED };

struct piece {
  struct nbd_ahead *a;
  uint64_t off, len;            /* bytes; constant */
  uint64_t taken;               /* bytes that were read of it */
  uint8_t *buf;
  enum state state;
  bool listed;                  /* can be found */
  unsigned users;               /* readers that hold it; and one for LOADING */
  pthread_cond_t cond;          /* it is not LOADING any more */
  struct piece *next, *prev;
  struct nbd_request req;
};

struct nbd_ahead {
  pthread_mutex_t lock;
  /* protected by lock, and so are the pieces */
  struct piece *first, *last;   /* used latest, used longest ago */
  unsigned nr;
  uint64_t bytes, loading;
  uint8_t *spare[MAX_SPARE];    /* of PIECE bytes */
  unsigned nr_spare;
};

int
nbd_ahead_new (struct nbd *n, struct nbd_ahead **ret, struct err *err)
{
  struct nbd_ahead *a = calloc (1, sizeof *a);

  if (!a)
    return err_set (err, ENOMEM, "out of memory");
  pthread_mutex_init (&a->lock, NULL);
  *ret = a;
  return 0;
}

/* --- the list */

static void
unlink_locked (struct nbd_ahead *a, struct piece *p)
{
  *(p->prev ? &p->prev->next : &a->first) = p->next;
  *(p->next ? &p->next->prev : &a->last) = p->prev;
  p->next = p->prev = NULL;
  p->listed = false;
  a->nr--;
}

/* What has been read, all of it, is least likely to be needed again. */
static void
link_last_locked (struct nbd_ahead *a, struct piece *p)
{
  p->next = NULL;
  p->prev = a->last;
  *(a->last ? &a->last->next : &a->first) = p;
  a->last = p;
  p->listed = true;
  a->nr++;
}

static void
link_locked (struct nbd_ahead *a, struct piece *p)
{
  p->prev = NULL;
  p->next = a->first;
  *(a->first ? &a->first->prev : &a->last) = p;
  a->first = p;
  p->listed = true;
  a->nr++;
}

static void
drop_locked (struct piece *p)
{
  struct nbd_ahead *a = p->a;

  if (p->listed)
    unlink_locked (a, p);
  if (p->users > 0)
    return;
  a->bytes -= p->len;
  if (p->len == PIECE && a->nr_spare < MAX_SPARE)
    a->spare[a->nr_spare++] = p->buf;
  else
    free (p->buf);
  pthread_cond_destroy (&p->cond);
  free (p);
}

/* The end of one use. */
static void
release_locked (struct piece *p)
{
  p->users--;
  if (!p->listed)
    drop_locked (p);
}

static struct piece *
find_locked (const struct nbd_ahead *a, uint64_t off)
{
  for (struct piece *p = a->first; p; p = p->next)
    if (off >= p->off && off - p->off < p->len)
      return p;
  return NULL;
}

/* Bytes from off on, at most len, that no piece has. */
static uint64_t
gap_locked (const struct nbd_ahead *a, uint64_t off, uint64_t len)
{
  for (const struct piece *p = a->first; p; p = p->next)
    if (p->off > off && p->off - off < len)
      len = p->off - off;
  return len;
}

void
nbd_ahead_free (struct nbd_ahead *a)
{
  if (!a)
    return;
  while (a->first)
    drop_locked (a->first);
  while (a->nr_spare)
    free (a->spare[--a->nr_spare]);
  pthread_mutex_destroy (&a->lock);
  free (a);
}

/* --- fetching */

static void
fetched (struct nbd_request *req)
{
  struct piece *p = req->opaque;
  struct nbd_ahead *a = p->a;

  LOCK_SCOPE (&a->lock);
  p->state = req->result == 0 ? READY : FAILED;
  a->loading -= p->len;
  if (p->state == FAILED && p->listed)
    unlink_locked (a, p);       /* whoever needs it asks again, and is told why */
  pthread_cond_broadcast (&p->cond);
  release_locked (p);
}

/* Make room; false: all that is here is in use. */
static bool
evict_locked (struct nbd_ahead *a, uint64_t len)
{
  struct piece *p = a->last, *prev;

  if (a->loading + len > MAX_LOADING)
    return false;
  for (; p && (a->bytes + len > MAX_BYTES || a->nr >= MAX_PIECES); p = prev) {
    prev = p->prev;
    if (p->users == 0)
      drop_locked (p);
  }
  return a->bytes + len <= MAX_BYTES && a->nr < MAX_PIECES;
}

static struct piece *
new_piece_locked (struct nbd *n, uint64_t off, uint64_t len)
{
  struct nbd_ahead *a = n->ahead;
  struct piece *p;

  if (!evict_locked (a, len))
    return NULL;
  p = calloc (1, sizeof *p);
  if (p)
    p->buf = len == PIECE && a->nr_spare ? a->spare[--a->nr_spare] : malloc (len);
  if (!p || !p->buf) {
    free (p);
    return NULL;
  }
  p->a = a;
  p->off = off;
  p->len = len;
  p->state = LOADING;
  p->users = 1;
  pthread_cond_init (&p->cond, NULL);
  p->req = (struct nbd_request) { .op = NBD_READ, .buf = p->buf, .off = off, .len = len,
                                  .hint = true, .done = fetched, .opaque = p };
  a->bytes += len;
  a->loading += len;
  link_locked (a, p);
  return p;
}

/* The first part of the range that is not here yet, as a piece.  NULL: there is none, or no room, then
 * *done is 0; else *done is how much of the range that takes care of.
 */
static struct piece *
next_piece (struct nbd *n, uint64_t off, uint64_t len, uint64_t *done)
{
  struct nbd_ahead *a = n->ahead;
  uint64_t at = off, want;
  struct piece *p;

  LOCK_SCOPE (&a->lock);
  while ((p = find_locked (a, at)) && p->off + p->len - off < len)
    at = p->off + p->len;
  *done = len;
  if (p)
    return NULL;
  want = MIN (gap_locked (a, at, off + len - at), MIN (PIECE, n->max_piece));
  *done = at + want - off;
  nbd_align (n, &at, &want);
  want = MIN (want, n->max_piece);
  if (nbd_holes_cover (n, at, want))
    return NULL;
  p = new_piece_locked (n, at, want);
  if (!p)
    *done = 0;
  return p;
}

bool
nbd_ahead_fetch (struct nbd *n, uint64_t off, uint64_t len)
{
  while (len > 0) {
    uint64_t done;
    struct piece *p = next_piece (n, off, len, &done);

    if (p)
      nbd_submit (n, &p->req);
    if (done == 0)
      return false;
    off += done;
    len -= done;
  }
  return true;
}

/* --- using */

size_t
nbd_ahead_take (struct nbd *n, void *buf, size_t len, uint64_t off, size_t *gap)
{
  struct nbd_ahead *a = n->ahead;
  struct piece *p;
  size_t got;
  bool good;

  {
    LOCK_SCOPE (&a->lock);
    p = find_locked (a, off);
    if (!p) {
      *gap = gap_locked (a, off, len);
      return 0;
    }
    p->users++;
    while (p->state == LOADING)
      pthread_cond_wait (&p->cond, &a->lock);
    good = p->state == READY && p->listed;
    got = MIN (len, p->off + p->len - off);
    if (good) {
      p->taken += got;          /* in any order: several requests of one reader are in flight */
      unlink_locked (a, p);
      (p->taken >= p->len ? link_last_locked : link_locked) (a, p);
    }
  }
  if (good)
    memcpy (buf, p->buf + (off - p->off), got);
  LOCK_SCOPE (&a->lock);
  release_locked (p);
  *gap = got;
  return good ? got : 0;
}

bool
nbd_ahead_covers (struct nbd *n, uint64_t off, uint64_t len)
{
  struct nbd_ahead *a = n->ahead;
  uint64_t end = off + len;
  const struct piece *p;
  LOCK_SCOPE (&a->lock);

  while (off < end && (p = find_locked (a, off)))
    off = p->off + p->len;
  return off >= end;
}

void
nbd_ahead_forget (struct nbd *n, uint64_t off, uint64_t len)
{
  struct nbd_ahead *a = n->ahead;
  struct piece *next;
  LOCK_SCOPE (&a->lock);

  for (struct piece *p = a->first; p; p = next) {
    next = p->next;
    if (ranges_overlap (p->off, p->len, off, len))
      drop_locked (p);
  }
}
