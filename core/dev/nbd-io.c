/* The queue of an NBD device and the thread that carries it out.  See nbd-int.h.
 *
 * The thread alone touches libnbd's handles and sleeps in one poll over all of them.  Each
 * request goes to the connection with the fewest in flight; when all are busy and the server
 * allows several, one more is opened beside them, up to NBD_MAX_CONNS.  One that cannot be had
 * (qemu-nbd lets clients wait in line for ever) costs nothing, since nothing waits for it.
 *
 * Lost connections: see nbd-conn.c for what becomes of the requests.  While no connection is
 * left, requests wait and the export is looked for, with growing pauses, for reconnect_ms; then
 * those that wait fail.  A later one is a reason to look again, once a second at the most.
 *
 * A request that was in flight when a connection was lost twice is a suspect: perhaps the server
 * breaks off because of it.  While there are suspects one request is in flight at a time, and the
 * one that a connection was lost with is the first on the next: on a line that breaks now and then
 * the innocent get through.  Before long a read goes in small steps, for lines that break after so
 * many bytes.  Lost alone four times, it fails; after that, until something is answered, others
 * fail at the first loss.
 *
 * Invariants: none of its own.  A change is never sent twice (nbd-conn.c).
 */
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/num.h"
#include "dev/nbd-int.h"

#define BUSY            8       /* requests on each connection that make another worth while */
#define LONGEST_PAUSE   UINT64_C (5000) /* ms between two attempts to connect */
#define GONE_PAUSE      1000    /* ms between attempts once it was given up */
#define TICK            UINT64_C (250)  /* ms; how often clocks are looked at while something is awaited */

/* --- lists */

void
nbd_list_push (struct nbd_list *l, struct nbd_request *req)
{
  req->next = NULL;
  req->prev = l->tail;
  if (l->tail)
    l->tail->next = req;
  else
    l->head = req;
  l->tail = req;
}

void
nbd_list_push_front (struct nbd_list *l, struct nbd_request *req)
{
  req->prev = NULL;
  req->next = l->head;
  if (l->head)
    l->head->prev = req;
  else
    l->tail = req;
  l->head = req;
}

void
nbd_list_remove (struct nbd_list *l, struct nbd_request *req)
{
  if (req->prev)
    req->prev->next = req->next;
  else
    l->head = req->next;
  if (req->next)
    req->next->prev = req->prev;
  else
    l->tail = req->prev;
  req->next = req->prev = NULL;
}

/* --- ends of requests */

static void
retire (struct nbd *n)
{
  LOCK_SCOPE (&n->queue_lock);
  if (--n->nr_active == 0)
    pthread_cond_broadcast (&n->idle_cond);
}

void
nbd_finish (struct nbd *n, struct nbd_request *req, int r)
{
  if (nbd_is_suspect (req))
    n->nr_suspects--;
  if (r != -ENOTCONN)
    n->distrust = false;
  req->result = r;
  req->done (req);
  retire (n);
}

static void
fail_pending (struct nbd *n, int r)
{
  struct nbd_request *req;

  while ((req = n->pending.head)) {
    nbd_list_remove (&n->pending, req);
    nbd_finish (n, req, r);
  }
}

/* --- connections */

static unsigned
count (const struct nbd *n, enum nbd_conn_state state)
{
  unsigned found = 0;

  for (unsigned i = 0; i < NBD_MAX_CONNS; ++i)
    found += n->conns[i].state == state;
  return found;
}

static struct nbd_conn *
free_conn (struct nbd *n)
{
  for (unsigned i = 0; i < NBD_MAX_CONNS; ++i)
    if (n->conns[i].state == NBD_CONN_NONE)
      return &n->conns[i];
  return NULL;
}

static bool
connecting (const struct nbd *n)
{
  return count (n, NBD_CONN_CONNECTING) + count (n, NBD_CONN_VERIFYING) > 0;
}

static void
attempt (struct nbd *n, uint64_t now)
{
  struct nbd_conn *c = free_conn (n);
  struct err err = { 0 };

  if (c && nbd_conn_start (n, c, &err) < 0) {
    snprintf (n->why, sizeof n->why, "%.*s", (int) sizeof n->why - 1, err.msg);
    nbd_conn_lose (c, now, NULL);
  }
}

static void
give_up (struct nbd *n)
{
  log_notice ("%s: it could not be reached again for %" PRIu64 " s (%s): requests fail from now on; "
              "it is tried again when something asks for it", n->d.name, n->reconnect_ms / 1000,
              n->why);
  n->gone = true;
  n->attempts = 1;
}

/* Nobody is connected and somebody waits. */
static void
look_again (struct nbd *n, uint64_t now)
{
  if (nbd_is_hasty (n)) {
    fail_pending (n, -ENOTCONN);
    return;
  }
  if (n->lost_ms == 0)
    n->lost_ms = now;
  if (connecting (n))
    return;
  if (!n->gone && now - n->lost_ms >= n->reconnect_ms && n->attempts > 0)
    give_up (n);
  if (n->gone && n->attempts > 0) {     /* that one was for those who wait */
    fail_pending (n, -ENOTCONN);
    n->attempts = 0;
    return;
  }
  if (now < n->next_attempt_ms)
    return;
  n->pause_ms = MIN (MAX (n->pause_ms * 2, UINT64_C (100)), LONGEST_PAUSE);
  n->next_attempt_ms = now + (n->gone ? GONE_PAUSE : n->pause_ms);
  n->attempts++;
  attempt (n, now);
}

/* More connections, if those there are have enough to do: as many as would be busy. */
static void
add_connections (struct nbd *n, uint64_t now)
{
  unsigned have = NBD_MAX_CONNS - count (n, NBD_CONN_NONE);

  if (!n->facts.multi_conn || n->other_export || n->nr_suspects || now < n->next_extra_ms)
    return;
  for (; have < NBD_MAX_CONNS && n->nr_in_flight >= have * BUSY; ++have)
    attempt (n, now);
}

/* It is being closed: what is still under way was read ahead, for nobody.  A server that does not
 * answer, or is gone, must not keep whoever closes it.
 */
static void
hurry (struct nbd *n, uint64_t now)
{
  fail_pending (n, -ENOTCONN);
  for (unsigned i = 0; now >= n->close_by_ms && i < NBD_MAX_CONNS; ++i)
    nbd_conn_lose (&n->conns[i], now, "no answer while it was being closed");
}

static void
tend (struct nbd *n, uint64_t now)
{
  if (n->close_by_ms)
    hurry (n, now);
  for (unsigned i = 0; i < NBD_MAX_CONNS; ++i)
    nbd_conn_tend (&n->conns[i], now);
  if (count (n, NBD_CONN_READY) > 0)
    add_connections (n, now);
  else if (n->pending.head)
    look_again (n, now);
}

/* --- sending */

static struct nbd_conn *
least_busy (struct nbd *n)
{
  struct nbd_conn *best = NULL;

  for (unsigned i = 0; i < NBD_MAX_CONNS; ++i) {
    struct nbd_conn *c = &n->conns[i];

    if (c->state == NBD_CONN_READY && c->nr < NBD_DEPTH && (!best || c->nr < best->nr))
      best = c;
  }
  return best;
}

static void
dispatch (struct nbd *n, uint64_t now)
{
  struct nbd_request *req;
  struct nbd_conn *c;

  while ((req = n->pending.head)) {
    if (n->nr_in_flight > 0
        && (n->nr_suspects || n->bytes_in_flight + nbd_payload (req) > NBD_MAX_IN_FLIGHT))
      return;
    c = least_busy (n);
    if (!c)
      return;
    nbd_list_remove (&n->pending, req);
    if (!nbd_conn_send (c, req, now)) {
      nbd_conn_lose (c, now, "it does not take requests any more");
      nbd_list_push_front (&n->pending, req);
    }
  }
}

/* What libnbd has answered. */
static void
settle (struct nbd *n)
{
  struct nbd_request *req;

  while ((req = n->finished.head)) {
    nbd_list_remove (&n->finished, req);
    if (req->result == -EPROTO)
      nbd_recover (n, req, false);
    else
      nbd_finish (n, req, req->result);
  }
}

/* --- the thread */

static void
drain_wake (struct nbd *n)
{
  uint64_t x;

  if (read (n->wake_fd, &x, sizeof x) < 0)
    return;                     /* nobody had called */
}

/* Requests submitted since; false: the thread is to end, as nothing is under way. */
static bool
take_queue (struct nbd *n)
{
  LOCK_SCOPE (&n->queue_lock);

  while (n->queue.head) {
    struct nbd_request *req = n->queue.head;

    nbd_list_remove (&n->queue, req);
    nbd_list_push (&n->pending, req);
  }
  if (n->closing && n->close_by_ms == 0)
    n->close_by_ms = clock_ms () + NBD_CLOSE_MS;
  return !n->stop || n->nr_active > 0;
}

static int
poll_timeout (const struct nbd *n, uint64_t now)
{
  if (n->nr_in_flight || connecting (n))
    return TICK;
  if (!n->pending.head)
    return -1;
  return n->next_attempt_ms > now ? (int) MIN (n->next_attempt_ms - now, TICK) : 0;
}

static void
wait_for_events (struct nbd *n, uint64_t now)
{
  struct pollfd fds[NBD_MAX_CONNS + 1] = { { .fd = n->wake_fd, .events = POLLIN } };

  for (unsigned i = 0; i < NBD_MAX_CONNS; ++i) {
    struct nbd_conn *c = &n->conns[i];

    /* Asking one that has ended would put that error in the place of what ended it. */
    fds[i + 1].fd = c->h && !nbd_conn_ended (c) ? nbd_aio_get_fd (c->h) : -1;
    fds[i + 1].events = nbd_conn_events (c);
  }
  if (poll (fds, NBD_MAX_CONNS + 1, poll_timeout (n, now)) < 0)
    return;                     /* EINTR: signals are blocked; whatever it was, look again */
  if (fds[0].revents)
    drain_wake (n);
  now = clock_ms ();
  for (unsigned i = 0; i < NBD_MAX_CONNS; ++i)
    if (fds[i + 1].revents)
      nbd_conn_event (&n->conns[i], fds[i + 1].revents, now);
}

static void *
io_thread (void *opaque)
{
  struct nbd *n = opaque;

  while (take_queue (n)) {
    uint64_t now = clock_ms ();

    tend (n, now);
    dispatch (n, now);
    settle (n);
    if (!n->finished.head)
      wait_for_events (n, clock_ms ());
    settle (n);
  }
  /* What is only half connected belongs to nobody from here on. */
  for (unsigned i = 0; i < NBD_MAX_CONNS; ++i)
    if (n->conns[i].state != NBD_CONN_READY)
      nbd_conn_lose (&n->conns[i], 0, NULL);
  return NULL;
}

static int
start_locked (struct nbd *n)
{
  sigset_t all, old;
  int r;

  sigfillset (&all);            /* signals are the program's business */
  pthread_sigmask (SIG_SETMASK, &all, &old);
  r = pthread_create (&n->thread, NULL, io_thread, n);
  pthread_sigmask (SIG_SETMASK, &old, NULL);
  n->running = r == 0;
  return -r;
}

static void
wake (struct nbd *n)
{
  uint64_t one = 1;

  if (write (n->wake_fd, &one, sizeof one) < 0)
    return;                     /* EAGAIN: it has been woken often enough */
}

void
nbd_submit (struct nbd *n, struct nbd_request *req)
{
  bool first;
  int r = 0;

  req->n = n;
  req->conn = NULL;
  req->losses = req->alone = 0;
  req->had = req->step = 0;
  {
    LOCK_SCOPE (&n->queue_lock);
    if (!n->running)
      r = start_locked (n);
    first = n->queue.head == NULL;
    if (r == 0) {
      n->nr_active++;
      nbd_list_push (&n->queue, req);
    }
  }
  if (r < 0) {
    req->result = r;
    req->done (req);
  }
  else if (first)
    wake (n);
}

/* A request may have come between the thread's last look and its end: then there is another. */
static void
stopped (struct nbd *n)
{
  LOCK_SCOPE (&n->queue_lock);
  n->running = n->stop = false;
  if (n->queue.head)
    start_locked (n);
}

void
nbd_stop (struct nbd *n, bool last)
{
  uint64_t until = clock_ms () + NBD_CLOSE_MS;
  bool join;

  {
    LOCK_SCOPE (&n->queue_lock);
    n->closing = last;
    if (last && n->running)
      wake (n);
    while (n->nr_active > 0)
      pthread_cond_wait (&n->idle_cond, &n->queue_lock);
    join = n->stop = n->running;        /* if there is none, the next is not ours to end */
  }
  if (join) {
    wake (n);
    pthread_join (n->thread, NULL);
    stopped (n);
  }
  for (unsigned i = 0; last && i < NBD_MAX_CONNS; ++i)
    nbd_conn_goodbye (&n->conns[i], until);
}
