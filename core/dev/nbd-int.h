/* What the files of the NBD device share.
 *
 *   nbd.c         the device: its operations made of requests; opening, closing
 *   nbd-many.c    read_many
 *   nbd-ahead.c   what was read ahead, in RAM
 *   nbd-holes.c   what the server says is a hole
 *   nbd-io.c      the queue of requests, and the one thread that carries them out
 *   nbd-conn.c    one connection: made, used, watched, lost
 *   nbd-verify.c  is it still the same disk?
 *
 * libnbd's handles belong to the I/O thread, so they need no lock of ours; everybody else only
 * submits requests.  Locks: queue_lock, ahead_lock and holes_lock are leaves; none is held while
 * a request is waited for.
 */
#ifndef QR_DEV_NBD_INT_H
#define QR_DEV_NBD_INT_H

#include <pthread.h>
#include <semaphore.h>

#include <libnbd.h>

#include "dev/bdev.h"
#include "dev/nbd.h"

#define NBD_MAX_CONNS    8      /* of one device */
#define NBD_DEPTH        64     /* requests in flight on one connection, at most */
#define NBD_MAX_IN_FLIGHT (UINT64_C (96) << 20)         /* bytes, of one device */
#define NBD_MAX_PIECE    (UINT64_C (1) << 20)           /* bytes in one request for data */
#define NBD_EXTRA_PAUSE  30000  /* ms after a further connection could not be had */
#define NBD_CLOSE_MS     1000   /* for all that is to be done at the end */

enum nbd_op { NBD_READ, NBD_WRITE, NBD_ZERO, NBD_TRIM, NBD_FLUSH, NBD_STATUS };

struct nbd_request {
  /* set by whoever submits it */
  enum nbd_op op;
  void *buf;                    /* NBD_READ, NBD_WRITE */
  uint64_t off, len;            /* bytes; the server's constraints kept */
  uint32_t flags;               /* LIBNBD_CMD_FLAG_* */
  bool hint;                    /* whoever needs it asks for it anyway: it is not sent twice */
  /* Called once, in the I/O thread, with no lock held; the request is the owner's again from
   * the moment it begins.  May submit, must not wait.
   */
  void (*done) (struct nbd_request *);
  bdev_extent_fn extent;        /* NBD_STATUS: called in the I/O thread for each, before done */
  void *opaque;                 /* the submitter's */
  int result;                   /* for done: 0 or -errno */
  /* the I/O thread's */
  struct nbd_request *next, *prev;
  struct nbd_conn *conn;        /* in flight on */
  struct nbd *n;
  unsigned losses;              /* connections that were lost with it in flight, until it is a suspect */
  unsigned alone;               /* then, with it alone in flight, and no part of it answered since */
  uint64_t had, step;           /* NBD_READ: bytes that came in earlier steps; of a step, 0: all at once */
  uint64_t sent_ms;
  uint64_t change;              /* NBD_FLUSH: the last change it covers */
  uint64_t covered;             /* NBD_READ: bytes that the answer had */
};

struct nbd_list {
  struct nbd_request *head, *tail;
};

enum nbd_conn_state {
  NBD_CONN_NONE,
  NBD_CONN_CONNECTING,
  NBD_CONN_VERIFYING,           /* is it still the same export? */
  NBD_CONN_READY,
};

/* All of it belongs to the I/O thread. */
struct nbd_conn {
  struct nbd *n;
  struct nbd_handle *h;         /* NULL: NBD_CONN_NONE */
  enum nbd_conn_state state;
  uint64_t since_ms;            /* when connecting began */
  uint64_t heard_ms;            /* the last sign of life, or when waiting for one began */
  uint64_t answered_ms;         /* when the youngest request that was answered had been sent */
  struct nbd_list requests;     /* in flight */
  unsigned nr;                  /* of them */
  unsigned nr_answered;         /* requests */
  uint64_t last_change;         /* number of the last change acknowledged here */
  bool silent;                  /* no answer in time */
  bool leaving;                 /* the server, or libnbd, says that no more answers will come */
  struct nbd_verify *verify;    /* samples that were asked for, while it is verified; or NULL */
};

/* What a server says of an export when it is connected to. */
struct nbd_facts {
  uint64_t size;                /* bytes */
  uint32_t minimum;             /* block size, bytes: requests are aligned to this */
  uint64_t maximum;             /* bytes of data in one request */
  bool read_only, multi_conn, can_fua, can_flush, can_zero, can_fast_zero, can_trim, can_extents;
};

struct nbd_ahead;
struct nbd_holes;
struct nbd_samples;
struct nbd_verify;

struct nbd {
  struct bdev d;
  /* constant after open */
  char *uri;
  bool local_files;
  uint64_t timeout_ms, reconnect_ms;
  struct nbd_facts facts;
  uint64_t max_piece;           /* bytes: a multiple of facts.minimum */
  struct nbd_ahead *ahead;
  struct nbd_holes *holes;
  struct nbd_samples *samples;  /* the I/O thread's, once that has begun */
  struct nbd *next;             /* of all devices; under the lock of the list */

  pthread_mutex_t partial_lock; /* held while blocks are read, changed and written back */
  /* Set before the first change is sent: holes may be no holes any more. */
  atomic_bool changed;

  pthread_mutex_t queue_lock;
  pthread_cond_t idle_cond;
  /* protected by queue_lock */
  struct nbd_list queue;        /* submitted, not yet seen by the I/O thread */
  uint64_t nr_active;           /* submitted, and done has not returned */
  bool running, stop, closing;
  pthread_t thread;
  int wake_fd;                  /* eventfd */

  /* the I/O thread's */
  uint64_t close_by_ms;         /* 0; or when it is closed, come what may: nobody waits any more */
  struct nbd_conn conns[NBD_MAX_CONNS];
  struct nbd_list pending;      /* to be sent */
  struct nbd_list finished;     /* answered, done not called yet */
  unsigned nr_in_flight;
  uint64_t bytes_in_flight;
  unsigned nr_suspects;         /* pending or in flight, and a connection was lost with them twice */
  uint64_t changes, flushed;    /* changes acknowledged so far; the last of them that is durable */
  bool lost_changes;            /* some were not durable when a connection was lost */
  bool lost;                    /* no connection is left, and the operator was told */
  uint64_t lost_ms;             /* since when somebody waits for one; 0: nobody does */
  unsigned attempts;            /* to connect again, since then */
  uint64_t next_attempt_ms, pause_ms;
  uint64_t next_extra_ms;       /* no further connection is tried before */
  bool gone;                    /* given up, until somebody asks again */
  bool other_export;            /* what answered last is another disk, and the operator was told */
  bool distrust;                /* a request was given up, and none was answered since */
  char why[256];                /* the last thing that went wrong with a connection */
};

/* --- nbd-io.c */

/* Hand it to the I/O thread, which is started if need be.  If that fails, done is called with
 * -ENOMEM or so before this returns.
 */
void nbd_submit (struct nbd *n, struct nbd_request *req);

/* Is a server that is not there not to be looked for any more?  See nbd_hurry. */
bool nbd_is_hasty (const struct nbd *n);

/* Wait until nothing is under way, then end the thread.  last: nobody waits for what is under way,
 * so it is given a second, and then up; and goodbye is said to the server.
 */
void nbd_stop (struct nbd *n, bool last);

/* Perhaps connections are lost because of it: it is sent alone, and before others. */
static inline bool
nbd_is_suspect (const struct nbd_request *req)
{
  return req->losses >= 2;
}

/* Bytes of a read that are asked for next. */
static inline uint64_t
nbd_step (const struct nbd_request *req)
{
  uint64_t left = req->len - req->had;

  return req->step && req->step < left ? req->step : left;
}

/* Bytes of data that go with it over the line. */
static inline uint64_t
nbd_payload (const struct nbd_request *req)
{
  return req->op == NBD_READ || req->op == NBD_WRITE ? req->len : 0;
}

void nbd_list_push (struct nbd_list *l, struct nbd_request *req);
void nbd_list_push_front (struct nbd_list *l, struct nbd_request *req);
void nbd_list_remove (struct nbd_list *l, struct nbd_request *req);

/* The result is known: r = 0 or -errno.  I/O thread. */
void nbd_finish (struct nbd *n, struct nbd_request *req, int r);

/* --- nbd-conn.c; all in the I/O thread, or before there is one */

/* Begin to connect.  -errno with *err: it failed at once, or libnbd does not understand the URI. */
int nbd_conn_start (struct nbd *n, struct nbd_conn *c, struct err *err);

/* Something may have happened on its socket (poll's revents). */
void nbd_conn_event (struct nbd_conn *c, short revents, uint64_t now);

/* Nothing more will come from its handle. */
bool nbd_conn_ended (const struct nbd_conn *c);

/* poll's events for it. */
short nbd_conn_events (const struct nbd_conn *c);

/* Look at the clock: is an answer overdue? */
void nbd_conn_tend (struct nbd_conn *c, uint64_t now);

/* Send it; false: the connection cannot take it. */
bool nbd_conn_send (struct nbd_conn *c, struct nbd_request *req, uint64_t now);

/* Close it.  What was in flight is sent again or fails. */
void nbd_conn_lose (struct nbd_conn *c, uint64_t now, const char *why);

/* It was in flight on a connection that is not to be trusted any more: once more, or not. */
void nbd_recover (struct nbd *n, struct nbd_request *req, bool silent);

/* Connect the first time, waiting for it, and learn the facts. */
int nbd_conn_first (struct nbd *n, struct err *err);

/* Take leave of the server, if it listens, until then. */
void nbd_conn_goodbye (struct nbd_conn *c, uint64_t until);

/* --- nbd-verify.c */

/* Choose samples; the facts are known.  After a failure they are to be freed, too. */
int nbd_samples_new (struct nbd *n, struct err *err);
void nbd_samples_free (struct nbd_samples *s);

/* Where the first one, at the start of the export, is to be read to; *len bytes, 0 if the export has none. */
uint8_t *nbd_samples_first (struct nbd *n, size_t *len);

/* Begin to read the others, once the first is there (or is not to be had). */
void nbd_samples_learn (struct nbd *n, bool first_known);

/* The range is about to change. */
void nbd_samples_spoil (struct nbd *n, uint64_t off, uint64_t len);

/* Ask for samples on a new connection; others: there are other connections.  false: it takes none. */
bool nbd_verify_begin (struct nbd_conn *c, bool others);
/* A connection has lasted: the line is good.  Or it has not: it carries no more than samples. */
void nbd_verify_lasted (struct nbd *n);
void nbd_verify_fewer (struct nbd *n);

bool nbd_verify_done (const struct nbd_conn *c);
bool nbd_verify_same (const struct nbd_conn *c);

/* Its handle does not write to them any more. */
void nbd_verify_free (struct nbd_conn *c);

/* --- nbd.c */

/* Requests of one caller that waits for all of them. */
struct nbd_wait {
  sem_t sem;
  atomic_uint left;
  atomic_int result;            /* the first that failed */
};

/* [off, off+len) widened to the server's blocks. */
static inline void
nbd_align (const struct nbd *n, uint64_t *off, uint64_t *len)
{
  uint64_t m = n->facts.minimum, from = *off / m * m, to = (*off + *len + m - 1) / m * m;

  *off = from;
  *len = (to < n->facts.size ? to : n->facts.size) - from;
}

/* --- nbd-ahead.c */

int nbd_ahead_new (struct nbd *n, struct nbd_ahead **ret, struct err *err);
void nbd_ahead_free (struct nbd_ahead *a);      /* nothing is under way */

/* Begin to read what of the range is neither here nor a known hole.  false: there is no room for all
 * of it.
 */
bool nbd_ahead_fetch (struct nbd *n, uint64_t off, uint64_t len);

/* Copy the bytes from off on that were read ahead, waiting for those on their way.  Returns how
 * many (at most len); if none, *gap is how many from off on were not.
 */
size_t nbd_ahead_take (struct nbd *n, void *buf, size_t len, uint64_t off, size_t *gap);

/* Is all of the range here or on its way?  It may be given up before it is taken. */
bool nbd_ahead_covers (struct nbd *n, uint64_t off, uint64_t len);

/* The range is going to change, or has: forget it. */
void nbd_ahead_forget (struct nbd *n, uint64_t off, uint64_t len);

/* --- nbd-holes.c */

int nbd_holes_new (struct nbd *n, struct nbd_holes **ret, struct err *err);
void nbd_holes_free (struct nbd_holes *h);

/* Ask the server about the parts of the disk that many of the ranges lie in, and wait. */
void nbd_holes_learn (struct nbd *n, const struct bdev_range *ranges, size_t nr);

/* Is all of it known to read as zeros?  False also if nothing is known. */
bool nbd_holes_cover (struct nbd *n, uint64_t off, uint64_t len);

int nbd_extents (struct bdev *d, uint64_t off, uint64_t len, bdev_extent_fn fn, void *opaque,
                 struct err *err);

/* Read what was read ahead, and the rest from the server.  0 or -errno; *bad, if not NULL, is where, and
 * how much, could not be read.
 */
int nbd_read_blocking (struct nbd *n, void *buf, uint64_t len, uint64_t off, struct bdev_range *bad);

/* --- nbd-many.c */

int nbd_read_many (struct bdev *d, const struct bdev_range *ranges, size_t nr, bdev_many_fn fn,
                   void *opaque, struct err *err);

#endif /* QR_DEV_NBD_INT_H */
