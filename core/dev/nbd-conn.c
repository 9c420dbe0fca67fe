/* One connection of an NBD device.  See nbd-int.h.
 *
 * Life: connecting, then verifying, ready, lost.  All without blocking but for the first one,
 * which whoever opens the device waits for.  Every later connection must lead to the same
 * export: of the same size, as writable, and with the same bytes in many places
 * (nbd-verify.c).  Another one counts as none at all, since bytes of two disks mixed would be
 * worse than none.
 *
 * A connection that owes answers and has given no sign of life for the timeout is lost, and so is
 * one that never answers one request although it answers others that were sent a timeout later.
 *
 * What was in flight on a lost connection: reads and questions are sent again.  Changes are not:
 * the server may have them in its queue still, and carry them out after a newer write to the same
 * place.  They fail with -ENOTCONN.  Changes that were acknowledged but not flushed may have been
 * forgotten by a server that crashed, so from then on flushes fail (n->lost_changes).
 *
 * Handles are used by one thread at a time, so libnbd's callbacks run in the I/O thread, inside
 * nbd_aio_*; they only note the answer.
 */
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/num.h"
#include "dev/nbd-int.h"

#define MAX_ALONE  4            /* connections lost with a suspect alone in flight */
#define SMALL      (UINT64_C (64) << 10)        /* bytes of a step, for reads that do not get through */
#define LASTED     256          /* answers that make a good connection */
#define ALLOCATION LIBNBD_CONTEXT_BASE_ALLOCATION

static bool
is_change (enum nbd_op op)
{
  return op == NBD_WRITE || op == NBD_ZERO || op == NBD_TRIM;
}

static const char *
libnbd_says (void)
{
  const char *s = nbd_get_error ();

  return s ? s : "unknown error";
}

/* --- connecting */

static int
set_up (struct nbd *n, struct nbd_conn *c, struct err *err)
{
  c->h = nbd_create ();
  if (!c->h)
    return err_set (err, ENOMEM, "%s: %s", n->d.name, libnbd_says ());
  /* Alignment is ours to see to: a size that is no multiple of the blocks leaves one that is shorter. */
  if (nbd_set_strict_mode (c->h, nbd_get_strict_mode (c->h) & ~LIBNBD_STRICT_ALIGN) < 0
      || nbd_set_uri_allow_local_file (c->h, n->local_files) < 0
      || nbd_set_pread_initialize (c->h, false) < 0
      || nbd_add_meta_context (c->h, ALLOCATION) < 0)
    return err_set (err, EINVAL, "%s: %s", n->d.name, libnbd_says ());
  return 0;
}

int
nbd_conn_start (struct nbd *n, struct nbd_conn *c, struct err *err)
{
  int r = set_up (n, c, err), code;

  c->n = n;
  c->state = NBD_CONN_CONNECTING;
  c->since_ms = c->heard_ms = clock_ms ();
  c->answered_ms = c->last_change = 0;
  c->leaving = c->silent = false;
  c->nr_answered = 0;
  if (r < 0)
    return r;
  if (nbd_aio_connect_uri (c->h, n->uri) == 0)
    return 0;
  code = nbd_get_errno ();
  return err_set (err, code ? code : EINVAL, "cannot connect to %s: %s", n->d.name, libnbd_says ());
}

/* A yes or no that libnbd may be unable to give. */
static bool
yes (int r)
{
  return r > 0;
}

static int
learn_facts (struct nbd *n, struct nbd_handle *h, struct nbd_facts *f, struct err *err)
{
  int64_t size = nbd_get_size (h);
  int64_t minimum = nbd_get_block_size (h, LIBNBD_SIZE_MINIMUM);
  int64_t maximum = nbd_get_block_size (h, LIBNBD_SIZE_MAXIMUM);

  if (size < 0)
    return err_set (err, EINVAL, "%s: the server does not say how large the export is: %s",
                    n->d.name, libnbd_says ());
  memset (f, 0, sizeof *f);
  f->size = size;
  f->minimum = minimum > 0 && minimum <= 65536 && is_power_of_2 (minimum) ? minimum : 1;
  f->maximum = maximum >= (int64_t) f->minimum ? (uint64_t) maximum : UINT64_C (32) << 20;
  f->read_only = nbd_is_read_only (h) != 0;
  f->multi_conn = yes (nbd_can_multi_conn (h));
  f->can_fua = yes (nbd_can_fua (h));
  f->can_flush = yes (nbd_can_flush (h));
  f->can_zero = yes (nbd_can_zero (h));
  f->can_fast_zero = yes (nbd_can_fast_zero (h));
  f->can_trim = yes (nbd_can_trim (h));
  f->can_extents = yes (nbd_can_meta_context (h, ALLOCATION));
  return 0;
}

/* Is it what was connected to at first?  NULL, or why not. */
static const char *
compare_facts (struct nbd *n, const struct nbd_facts *f)
{
  static const size_t room = sizeof n->why;

  if (f->size != n->facts.size)
    snprintf (n->why, room, "the export has %" PRIu64 " bytes now, it had %" PRIu64, f->size,
              n->facts.size);
  else if (f->minimum > n->facts.minimum || f->maximum < n->facts.maximum)
    snprintf (n->why, room, "the export has other block sizes now");
  else if (n->d.writable && f->read_only)
    snprintf (n->why, room, "the export is read-only now");
  else if ((n->facts.can_flush && !f->can_flush) || (n->facts.can_fua && !f->can_fua)
           || (n->facts.can_zero && !f->can_zero) || (n->facts.can_trim && !f->can_trim)
           || (n->facts.can_extents && !f->can_extents))
    snprintf (n->why, room, "the server can do less now than before");
  else
    return NULL;
  return n->why;
}

static void
refuse_other_export (struct nbd *n, const char *why)
{
  if (!n->other_export)
    log_notice ("%s: what answers there now is not the same disk: %s.  Nothing is read from it; it is "
                "tried again, until the right one is back", n->d.name, why);
  n->other_export = true;
  if (why != n->why)
    snprintf (n->why, sizeof n->why, "%s", why);
}

static bool
any_ready (const struct nbd *n)
{
  for (unsigned i = 0; i < NBD_MAX_CONNS; ++i)
    if (n->conns[i].state == NBD_CONN_READY)
      return true;
  return false;
}

static void
begin_verifying (struct nbd_conn *c, uint64_t now)
{
  c->state = NBD_CONN_VERIFYING;
  if (!nbd_verify_begin (c, any_ready (c->n)))
    nbd_conn_lose (c, now, "samples of the disk cannot be asked for");
}

static void
become_ready (struct nbd_conn *c, uint64_t now)
{
  struct nbd *n = c->n;

  c->state = NBD_CONN_READY;
  c->heard_ms = now;
  n->next_extra_ms = 0;
  if (n->lost)
    log_notice ("%s: connected again", n->d.name);
  n->lost = n->gone = n->other_export = false;
  n->lost_ms = 0;
  n->attempts = 0;
}

static void
end_verifying (struct nbd_conn *c, uint64_t now)
{
  bool same;

  if (!nbd_verify_done (c))
    return;
  same = nbd_verify_same (c);
  nbd_verify_free (c);
  if (same) {
    become_ready (c, now);
    return;
  }
  refuse_other_export (c->n, "it has other bytes");
  nbd_conn_lose (c, now, NULL);
}

bool
nbd_conn_ended (const struct nbd_conn *c)
{
  return nbd_aio_is_dead (c->h) || nbd_aio_is_closed (c->h);
}

/* libnbd's last error may be of something else, if this was none. */
static const char *
why_ended (const struct nbd_conn *c)
{
  const char *s = nbd_aio_is_dead (c->h) ? nbd_get_error () : NULL;

  return s ? s : "the server closed it";
}

/* libnbd may have got further with it. */
static void
advance (struct nbd_conn *c, uint64_t now)
{
  struct nbd_facts f;
  struct err why = { 0 };

  if (nbd_conn_ended (c))
    nbd_conn_lose (c, now, why_ended (c));
  else if (c->leaving)
    nbd_conn_lose (c, now, "the server is shutting down");
  else if (c->state == NBD_CONN_CONNECTING && nbd_aio_is_ready (c->h)) {
    if (learn_facts (c->n, c->h, &f, &why) < 0)
      nbd_conn_lose (c, now, why.msg);
    else if (compare_facts (c->n, &f)) {
      refuse_other_export (c->n, c->n->why);
      nbd_conn_lose (c, now, NULL);
    }
    else
      begin_verifying (c, now);
  }
  if (c->state == NBD_CONN_VERIFYING)
    end_verifying (c, now);
}

/* --- events */

short
nbd_conn_events (const struct nbd_conn *c)
{
  unsigned dir = c->h ? nbd_aio_get_direction (c->h) : 0;

  return (dir & LIBNBD_AIO_DIRECTION_READ ? POLLIN : 0)
         | (dir & LIBNBD_AIO_DIRECTION_WRITE ? POLLOUT : 0);
}

void
nbd_conn_event (struct nbd_conn *c, short revents, uint64_t now)
{
  unsigned dir = nbd_aio_get_direction (c->h);

  if (revents & POLLIN)
    c->heard_ms = now;
  /* A hang-up is found out by reading or writing, whichever it waits for. */
  if ((dir & LIBNBD_AIO_DIRECTION_READ) && (revents & (POLLIN | POLLHUP | POLLERR)))
    nbd_aio_notify_read (c->h);
  else if ((dir & LIBNBD_AIO_DIRECTION_WRITE) && (revents & (POLLOUT | POLLHUP | POLLERR)))
    nbd_aio_notify_write (c->h);
  else if (revents & POLLNVAL) {
    nbd_conn_lose (c, now, "its socket is gone");
    return;
  }
  advance (c, now);
}

static uint64_t
patience (const struct nbd *n)
{
  return nbd_is_hasty (n) ? MIN (n->timeout_ms, (uint64_t) NBD_CLOSE_MS) : n->timeout_ms;
}

void
nbd_conn_tend (struct nbd_conn *c, uint64_t now)
{
  uint64_t timeout = c->n ? patience (c->n) : 0;
  char why[64];

  if (c->state != NBD_CONN_NONE)
    advance (c, now);           /* it may have died while something was sent */
  if (c->state == NBD_CONN_NONE)
    return;
  snprintf (why, sizeof why, "no answer for %" PRIu64 " s", timeout / 1000);
  if (c->state != NBD_CONN_READY) {
    if (now - c->since_ms >= timeout)
      nbd_conn_lose (c, now, why);
    return;
  }
  if (c->nr == 0)
    c->heard_ms = now;
  else if (now - c->heard_ms >= timeout
           || (c->requests.head && c->requests.head->sent_ms + timeout < c->answered_ms))
    c->silent = true;
  if (!c->silent)
    return;
  /* Those that have nothing to do would be as silent if they had: new ones tell more. */
  for (unsigned i = 0; i < NBD_MAX_CONNS; ++i)
    if (c->n->conns[i].state == NBD_CONN_READY && c->n->conns[i].nr == 0)
      nbd_conn_lose (&c->n->conns[i], now, why);
  nbd_conn_lose (c, now, why);
}

/* --- requests */

static void
off_connection (struct nbd_request *req)
{
  struct nbd_conn *c = req->conn;

  nbd_list_remove (&c->requests, req);
  c->nr--;
  c->n->nr_in_flight--;
  c->n->bytes_in_flight -= nbd_payload (req);
  req->conn = NULL;
}

/* The server's answer, or libnbd's word that there will be none. */
static int
completed (void *opaque, int *error)
{
  struct nbd_request *req = opaque;
  struct nbd_conn *c = req->conn;
  struct nbd *n = c->n;

  /* ENOTCONN is libnbd's own, ESHUTDOWN that of a server about to leave: for nbd_conn_lose. */
  if (*error == ENOTCONN || *error == ESHUTDOWN) {
    c->leaving = true;
    return 1;
  }
  off_connection (req);
  n->pause_ms = 0;
  if (++c->nr_answered == LASTED)
    nbd_verify_lasted (n);
  c->answered_ms = MAX (c->answered_ms, req->sent_ms);
  req->result = -*error;
  /* libnbd sees to it that no part is outside the request, not that all of it is there. */
  if (*error == 0 && req->op == NBD_READ && req->covered != nbd_step (req)) {
    req->result = -EPROTO;
    c->leaving = true;
  }
  else if (*error == 0 && req->op == NBD_READ && req->had + req->covered < req->len) {
    req->had += req->covered;
    req->alone = 0;
    nbd_list_push_front (&n->pending, req);
    return 1;
  }
  if (*error == 0 && is_change (req->op)) {
    c->last_change = ++n->changes;
    if (req->flags & LIBNBD_CMD_FLAG_FUA && n->flushed == n->changes - 1)
      n->flushed = n->changes;
  }
  if (*error == 0 && req->op == NBD_FLUSH) {
    n->flushed = MAX (n->flushed, req->change);
    if (n->lost_changes)
      req->result = -EIO;
  }
  nbd_list_push (&n->finished, req);
  return 1;
}

/* A part of the answer to a read has arrived. */
static int
chunk_came (void *opaque, const void *part, size_t len, uint64_t off, unsigned status, int *error)
{
  struct nbd_request *req = opaque;

  if (status != LIBNBD_READ_ERROR)
    req->covered += len;
  return 0;
}

/* Extents as the server tells them: pairs of length and flags, from req->off on.  What it says
 * beyond the request, or about nothing, is not believed.
 */
static int
tell_extents (void *opaque, const char *context, uint64_t off, uint32_t *entries, size_t nr,
              int *error)
{
  struct nbd_request *req = opaque;
  uint64_t at = req->off, end = req->off + req->len;

  if (strcmp (context, ALLOCATION) != 0 || off != req->off)
    return 0;
  for (size_t i = 0; i + 1 < nr && at < end; i += 2) {
    uint64_t len = MIN ((uint64_t) entries[i], end - at);
    unsigned kind = (entries[i + 1] & LIBNBD_STATE_HOLE ? BDEV_HOLE : 0)
                    | (entries[i + 1] & LIBNBD_STATE_ZERO ? BDEV_ZERO : 0);

    if (len == 0 || req->extent (req->opaque, at, len, kind) != 0)
      break;
    at += len;
  }
  return 0;
}

static int64_t
issue (struct nbd_handle *h, struct nbd_request *req)
{
  nbd_completion_callback cb = { .callback = completed, .user_data = req };
  nbd_extent_callback extent = { .callback = tell_extents, .user_data = req };
  nbd_chunk_callback chunk = { .callback = chunk_came, .user_data = req };

  switch (req->op) {
  case NBD_READ:
    return nbd_aio_pread_structured (h, (uint8_t *) req->buf + req->had, nbd_step (req),
                                     req->off + req->had, chunk, cb, req->flags);
  case NBD_WRITE:
    return nbd_aio_pwrite (h, req->buf, req->len, req->off, cb, req->flags);
  case NBD_ZERO:
    return nbd_aio_zero (h, req->len, req->off, cb, req->flags);
  case NBD_TRIM:
    return nbd_aio_trim (h, req->len, req->off, cb, req->flags);
  case NBD_FLUSH:
    return nbd_aio_flush (h, cb, req->flags);
  case NBD_STATUS:
    break;
  }
  return nbd_aio_block_status (h, req->len, req->off, extent, cb, req->flags);
}

bool
nbd_conn_send (struct nbd_conn *c, struct nbd_request *req, uint64_t now)
{
  struct nbd *n = c->n;

  if (c->nr == 0)
    c->heard_ms = now;
  req->conn = c;
  req->sent_ms = now;
  req->covered = 0;
  if (is_change (req->op))
    nbd_samples_spoil (n, req->off, req->len);
  req->change = n->changes;
  nbd_list_push (&c->requests, req);
  c->nr++;
  n->nr_in_flight++;
  n->bytes_in_flight += nbd_payload (req);
  if (issue (c->h, req) >= 0)
    return true;
  off_connection (req);
  if (nbd_conn_ended (c))
    return false;
  /* libnbd itself refuses: a mistake of ours, or no memory. */
  log_debug ("%s: %s", n->d.name, libnbd_says ());
  req->result = nbd_get_errno () ? -nbd_get_errno () : -EIO;
  nbd_list_push (&n->finished, req);
  return true;
}

/* --- the end */

/* Silence is worse than a line that breaks: each time costs the whole timeout. */
static void
count_loss (struct nbd *n, struct nbd_request *req, bool silent)
{
  if (nbd_is_suspect (req)) {   /* so it was alone */
    req->alone += silent ? MAX_ALONE : 1;
    if (req->op == NBD_READ && req->alone >= MAX_ALONE / 2)
      req->step = SMALL;
    return;
  }
  req->losses += silent ? 2 : 1;
  if (nbd_is_suspect (req))
    n->nr_suspects++;
}

void
nbd_recover (struct nbd *n, struct nbd_request *req, bool silent)
{
  if (is_change (req->op) || (req->op == NBD_FLUSH && n->lost_changes)) {
    nbd_finish (n, req, req->op == NBD_FLUSH ? -EIO : -ENOTCONN);
    return;
  }
  if (req->hint || n->close_by_ms || nbd_is_hasty (n)) {
    nbd_finish (n, req, -ENOTCONN);
    return;
  }
  count_loss (n, req, silent);
  if (n->distrust || req->alone >= MAX_ALONE) {
    if (!n->distrust)
      log_notice ("%s: again and again it has broken off, or said nothing, when it was asked for %" PRIu64
                  " bytes at byte %" PRIu64 ": that fails, and so does all else until it answers again",
                  n->d.name, req->len, req->off);
    n->distrust = true;
    nbd_finish (n, req, -ENOTCONN);
    return;
  }
  if (nbd_is_suspect (req))
    nbd_list_push_front (&n->pending, req);
  else
    nbd_list_push (&n->pending, req);
}

/* Tell the operator about it, unless nobody will notice. */
static void
announce_loss (struct nbd *n, bool was_ready)
{
  if (!was_ready || any_ready (n) || n->lost || n->close_by_ms)
    return;
  n->lost = true;
  log_notice ("%s: the connection was lost (%s); trying to connect again", n->d.name, n->why);
}

/* It took the samples, and broke before the first answer.  One that nobody had asked for anything, or
 * that others were lost together with, says nothing of how much the line carries.
 */
static bool
carried_samples_only (const struct nbd_conn *c)
{
  return c->nr_answered == 0 && c->requests.head && !any_ready (c->n);
}

void
nbd_conn_lose (struct nbd_conn *c, uint64_t now, const char *why)
{
  struct nbd *n = c->n;
  bool was_ready = c->state == NBD_CONN_READY;

  if (!c->h)
    c->state = NBD_CONN_NONE;
  if (c->state == NBD_CONN_NONE)
    return;
  if (!was_ready)
    n->next_extra_ms = now + NBD_EXTRA_PAUSE;   /* lifted when one succeeds */
  if (why)
    snprintf (n->why, sizeof n->why, "%.*s", (int) sizeof n->why - 1, why);
  log_debug ("%s: connection %d is closed: %s", n->d.name, (int) (c - n->conns), n->why);
  nbd_close (c->h);             /* from here on nothing is written to anybody's buffer */
  c->h = NULL;
  c->state = NBD_CONN_NONE;
  nbd_verify_free (c);
  if (was_ready && carried_samples_only (c))
    nbd_verify_fewer (n);
  if (c->last_change > n->flushed)
    n->lost_changes = true;
  announce_loss (n, was_ready);
  while (c->requests.head) {
    struct nbd_request *req = c->requests.head;

    off_connection (req);
    nbd_recover (n, req, c->silent);
  }
}

void
nbd_conn_goodbye (struct nbd_conn *c, uint64_t until)
{
  uint64_t now;

  if (!c->h)
    return;
  if (nbd_aio_is_ready (c->h) && nbd_aio_disconnect (c->h, 0) == 0) {
    while (!nbd_aio_is_closed (c->h) && !nbd_aio_is_dead (c->h) && (now = clock_ms ()) < until) {
      struct pollfd p = { .fd = nbd_aio_get_fd (c->h), .events = nbd_conn_events (c) };

      if (p.fd < 0 || poll (&p, 1, until - now) <= 0)
        break;
      if (p.revents & (POLLIN | POLLHUP | POLLERR) && p.events & POLLIN)
        nbd_aio_notify_read (c->h);
      else
        nbd_aio_notify_write (c->h);
    }
  }
  nbd_close (c->h);
  c->h = NULL;
  c->state = NBD_CONN_NONE;
  nbd_verify_free (c);
}

/* --- the first one */

int
nbd_conn_first (struct nbd *n, struct err *err)
{
  struct nbd_conn *c = &n->conns[0];
  uint64_t until = clock_ms () + n->timeout_ms, now;
  int r = nbd_conn_start (n, c, err);

  while (r == 0 && !nbd_aio_is_ready (c->h)) {
    struct pollfd p = { .fd = nbd_aio_get_fd (c->h), .events = nbd_conn_events (c) };

    now = clock_ms ();
    if (now >= until)
      r = err_set (err, ETIMEDOUT, "cannot connect to %s: no answer for %" PRIu64 " s", n->d.name,
                   n->timeout_ms / 1000);
    else if (poll (&p, 1, (int) MIN (until - now, UINT64_C (1000))) > 0) {
      if (p.events & POLLIN && p.revents & (POLLIN | POLLHUP | POLLERR))
        nbd_aio_notify_read (c->h);
      else
        nbd_aio_notify_write (c->h);
    }
    if (r == 0 && (nbd_aio_is_dead (c->h) || nbd_aio_is_closed (c->h)))
      r = err_set (err, nbd_get_errno () ? nbd_get_errno () : ECONNREFUSED,
                   "cannot connect to %s: %s", n->d.name, libnbd_says ());
  }
  if (r == 0)
    r = learn_facts (n, c->h, &n->facts, err);
  if (r == 0) {
    c->state = NBD_CONN_READY;
    return 0;
  }
  if (c->h)
    nbd_close (c->h);
  c->h = NULL;
  c->state = NBD_CONN_NONE;
  return r;
}
