/* See nbdserver.h.  One lock for everything but the reading of sockets: it is small. */
#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/endian.h"
#include "base/num.h"
#include "nbdserver.h"

#define IHAVEOPT       UINT64_C (0x49484156454f5054)
#define OPT_REPLY      UINT64_C (0x3e889045565a9)
#define OPT_EXPORT_NAME 1
#define OPT_ABORT      2
#define OPT_GO         7
#define OPT_STRUCTURED 8
#define OPT_SET_META   10
#define REP_ACK        1
#define REP_INFO       3
#define REP_META       4
#define REP_UNSUP      0x80000001
#define MAX_CONNS      256
#define MAX_DATA       (2 << 20)

struct conn {
  struct nbdserver *s;
  int fd;
  unsigned number;
  bool used, structured, context;
  pthread_t thread;
};

struct held {
  struct conn *c;
  struct nbdserver_request req;
  uint8_t cookie[8];
  uint8_t *data;
};

struct nbdserver {
  struct nbdserver_options opts;
  pthread_mutex_t lock;
  pthread_cond_t cond;
  /* protected by lock */
  int listen_fd;
  bool stalled, stopping;
  struct conn conns[MAX_CONNS];
  unsigned nr_conns;
  struct nbdserver_request *list;
  size_t nr, cap;
  unsigned counts[SRV_KINDS];
  struct held *held;
  unsigned nr_held;
  pthread_t listener;
};

/* --- the wire */

static bool
receive (int fd, void *buf, size_t len)
{
  uint8_t *p = buf;

  while (len > 0) {
    ssize_t n = read (fd, p, len);

    if (n <= 0)
      return false;
    p += n;
    len -= n;
  }
  return true;
}

/* Errors show when the next request is read. */
static void
transmit (int fd, const void *buf, size_t len)
{
  const uint8_t *p = buf;

  while (len > 0) {
    ssize_t n = send (fd, p, len, MSG_NOSIGNAL);

    if (n <= 0)
      return;
    p += n;
    len -= n;
  }
}

/* --- handshake */

static void
option_reply (int fd, uint32_t opt, uint32_t type, const void *data, uint32_t len)
{
  uint8_t b[20];

  store_be64 (b, OPT_REPLY);
  store_be32 (b + 8, opt);
  store_be32 (b + 12, type);
  store_be32 (b + 16, len);
  transmit (fd, b, 20);
  transmit (fd, data, len);
}

static unsigned
export_flags (const struct nbdserver_options *o)
{
  return 1 | (o->read_only ? 2 : 0) | (o->no_flush ? 0 : 4) | (o->no_fua ? 0 : 8) | 32 | 64
         | (o->multi_conn ? 256 : 0);
}

static void
tell_export (struct conn *c, uint32_t opt)
{
  const struct nbdserver_options *o = &c->s->opts;
  uint8_t b[14];

  store_be16 (b, 0);
  store_be64 (b + 2, o->size);
  store_be16 (b + 10, export_flags (o));
  option_reply (c->fd, opt, REP_INFO, b, 12);
  if (o->maximum) {
    store_be16 (b, 3);
    store_be32 (b + 2, o->minimum);
    store_be32 (b + 6, MAX (o->minimum, 512u));
    store_be32 (b + 10, o->maximum);
    option_reply (c->fd, opt, REP_INFO, b, 14);
  }
  option_reply (c->fd, opt, REP_ACK, NULL, 0);
}

static void
tell_context (struct conn *c)
{
  uint8_t b[4 + 15] = { 0, 0, 0, 1 };

  memcpy (b + 4, "base:allocation", 15);
  option_reply (c->fd, OPT_SET_META, REP_META, b, sizeof b);
  option_reply (c->fd, OPT_SET_META, REP_ACK, NULL, 0);
  c->context = true;
}

static bool
handshake (struct conn *c)
{
  uint8_t b[18], data[4096];

  memcpy (b, "NBDMAGIC", 8);
  store_be64 (b + 8, IHAVEOPT);
  store_be16 (b + 16, 3);
  transmit (c->fd, b, 18);
  if (!receive (c->fd, b, 4))
    return false;
  for (;;) {
    uint32_t opt, len;

    if (!receive (c->fd, b, 16) || load_be64 (b) != IHAVEOPT)
      return false;
    opt = load_be32 (b + 8);
    len = load_be32 (b + 12);
    if (len > sizeof data || !receive (c->fd, data, len) || opt == OPT_ABORT)
      return false;
    if (opt == OPT_GO) {
      tell_export (c, opt);
      return true;
    }
    if (opt == OPT_STRUCTURED && c->s->opts.structured) {
      c->structured = true;
      option_reply (c->fd, opt, REP_ACK, NULL, 0);
    }
    else if (opt == OPT_SET_META && c->structured)
      tell_context (c);
    else
      option_reply (c->fd, opt, REP_UNSUP, NULL, 0);
  }
}

/* --- answers; lock held */

static void
reply (struct conn *c, const uint8_t cookie[8], uint32_t error, unsigned type, const void *head,
       size_t head_len, const void *data, size_t len)
{
  uint8_t b[20 + 16];

  if (!c->structured || (error == 0 && type == 0 && len == 0 && head_len == 0)) {
    store_be32 (b, 0x67446698);
    store_be32 (b + 4, error);
    memcpy (b + 8, cookie, 8);
    transmit (c->fd, b, 16);
    transmit (c->fd, data, len);
    return;
  }
  store_be32 (b, 0x668e33ef);
  store_be16 (b + 4, 1);        /* done */
  store_be16 (b + 6, error ? 32769 : type);
  memcpy (b + 8, cookie, 8);
  store_be32 (b + 16, error ? 6 : head_len + len);
  if (error) {
    store_be32 (b + 20, error);
    store_be16 (b + 24, 0);
    transmit (c->fd, b, 26);
    return;
  }
  transmit (c->fd, b, 20);
  transmit (c->fd, head, head_len);
  transmit (c->fd, data, len);
}

static void
reply_read (struct conn *c, const struct nbdserver_request *req, const uint8_t cookie[8],
            const uint8_t *data, size_t len)
{
  uint8_t off[8];

  store_be64 (off, req->off);
  reply (c, cookie, 0, 1, off, c->structured ? 8 : 0, data, len);
}

/* A chunk of all zeros is a hole; one extent a reply. */
static void
reply_status (struct conn *c, const struct nbdserver_request *req, const uint8_t cookie[8])
{
  const uint8_t *p = c->s->opts.disk + req->off;
  uint64_t len = 1;
  uint8_t b[12];

  while (len < req->len && (p[len] == 0) == (p[0] == 0))
    ++len;
  store_be32 (b, 1);
  store_be32 (b + 4, len);
  store_be32 (b + 8, p[0] ? 0 : 3);
  reply (c, cookie, 0, 5, b, 12, NULL, 0);
}

static void
carry_out (struct conn *c, const struct nbdserver_request *req, const uint8_t *data)
{
  if (req->kind == SRV_WRITE)
    memcpy (c->s->opts.disk + req->off, data, req->len);
  else if (req->kind == SRV_ZERO)
    memset (c->s->opts.disk + req->off, 0, req->len);
}

static void
answer (struct conn *c, const struct nbdserver_request *req, const uint8_t cookie[8],
        const uint8_t *data)
{
  uint64_t size = c->s->opts.size;

  if (!range_fits (req->off, req->len, size)) {
    reply (c, cookie, 22, 0, NULL, 0, NULL, 0);
    return;
  }
  carry_out (c, req, data);
  if (req->kind == SRV_READ)
    reply_read (c, req, cookie, data ? data : c->s->opts.disk + req->off, req->len);
  else if (req->kind == SRV_STATUS)
    reply_status (c, req, cookie);
  else
    reply (c, cookie, 0, 0, NULL, 0, NULL, 0);
}

static void
drop_all_locked (struct nbdserver *s)
{
  for (unsigned i = 0; i < s->nr_conns; ++i)
    if (s->conns[i].used)
      shutdown (s->conns[i].fd, SHUT_RDWR);
  for (unsigned i = 0; i < s->nr_held; ++i)
    free (s->held[i].data);
  s->nr_held = 0;
}

static void
hold_locked (struct conn *c, const struct nbdserver_request *req, const uint8_t cookie[8],
             const uint8_t *data)
{
  struct nbdserver *s = c->s;
  struct held h = { .c = c, .req = *req };

  memcpy (h.cookie, cookie, 8);
  if (req->kind == SRV_WRITE || req->kind == SRV_READ) {
    h.data = malloc (req->len + 1);
    memcpy (h.data, data ? data : s->opts.disk + req->off, req->len);
  }
  s->held = realloc (s->held, (s->nr_held + 1) * sizeof *s->held);
  s->held[s->nr_held++] = h;
}

static void
note_locked (struct nbdserver *s, const struct nbdserver_request *req)
{
  if (s->nr == s->cap) {
    s->cap = s->cap * 2 + 64;
    s->list = realloc (s->list, s->cap * sizeof *s->list);
  }
  s->list[s->nr++] = *req;
  s->counts[req->kind]++;
}

static void
note_goodbye (struct nbdserver *s)
{
  LOCK_SCOPE (&s->lock);
  s->counts[SRV_DISC]++;
  pthread_cond_broadcast (&s->cond);
}

static void
handle (struct conn *c, const struct nbdserver_request *req, const uint8_t cookie[8],
        const uint8_t *data)
{
  struct nbdserver *s = c->s;
  enum nbdserver_answer a = SRV_ANSWER;
  LOCK_SCOPE (&s->lock);

  note_locked (s, req);
  if (s->stalled)
    a = SRV_HOLD;
  else if (s->opts.decide)
    a = s->opts.decide (s->opts.opaque, req);
  switch (a) {
  case SRV_ANSWER:
    answer (c, req, cookie, data);
    break;
  case SRV_EIO:
  case SRV_SHUTDOWN:
    reply (c, cookie, a == SRV_EIO ? 5 : 108, 0, NULL, 0, NULL, 0);
    break;
  case SRV_HOLD:
    hold_locked (c, req, cookie, data);
    break;
  case SRV_HALF:
    if (req->kind == SRV_READ && !c->structured)
      reply_read (c, req, cookie, s->opts.disk + req->off, req->len / 2);
    drop_all_locked (s);
    break;
  case SRV_SHORT:
    reply_read (c, req, cookie, s->opts.disk + req->off, req->len / 2);
    break;
  case SRV_DO_AND_DROP:
    carry_out (c, req, data);
    drop_all_locked (s);
    break;
  case SRV_DROP:
    drop_all_locked (s);
    break;
  }
  pthread_cond_broadcast (&s->cond);
}

/* --- threads */

static void
serve_requests (struct conn *c)
{
  CLEANUP_FREE uint8_t *data = malloc (MAX_DATA);
  uint8_t b[28];

  while (receive (c->fd, b, 28) && load_be32 (b) == 0x25609513) {
    struct nbdserver_request req = { .conn = c->number, .flags = load_be16 (b + 4),
                                     .kind = load_be16 (b + 6), .off = load_be64 (b + 16),
                                     .len = load_be32 (b + 24) };

    if (req.kind == SRV_WRITE && (req.len > MAX_DATA || !receive (c->fd, data, req.len)))
      return;
    if (req.kind == SRV_DISC)
      note_goodbye (c->s);
    if (req.kind == SRV_DISC || req.kind >= SRV_KINDS)
      return;
    handle (c, &req, b + 8, req.kind == SRV_WRITE ? data : NULL);
  }
}

static void *
conn_thread (void *opaque)
{
  struct conn *c = opaque;
  struct nbdserver *s = c->s;

  {
    LOCK_SCOPE (&s->lock);
    while (s->stalled && !s->stopping)
      pthread_cond_wait (&s->cond, &s->lock);
  }
  if (handshake (c))
    serve_requests (c);
  LOCK_SCOPE (&s->lock);
  for (unsigned i = 0; i < s->nr_held; ++i)     /* nobody is there to be answered */
    if (s->held[i].c == c) {
      free (s->held[i].data);
      s->held[i--] = s->held[--s->nr_held];
    }
  c->used = false;
  close (c->fd);
  pthread_cond_broadcast (&s->cond);
  return NULL;
}

static void *
listen_thread (void *opaque)
{
  struct nbdserver *s = opaque;

  for (;;) {
    int listen_fd, fd;

    {
      LOCK_SCOPE (&s->lock);
      while (s->listen_fd < 0 && !s->stopping)
        pthread_cond_wait (&s->cond, &s->lock);
      listen_fd = s->listen_fd;
      if (s->stopping)
        return NULL;
    }
    fd = accept (listen_fd, NULL, NULL);
    LOCK_SCOPE (&s->lock);
    if (fd >= 0 && s->listen_fd >= 0 && !s->stopping && s->nr_conns < MAX_CONNS) {
      struct conn *c = &s->conns[s->nr_conns++];

      *c = (struct conn) { .s = s, .fd = fd, .number = s->nr_conns, .used = true };
      pthread_create (&c->thread, NULL, conn_thread, c);
    }
    else if (fd >= 0)
      close (fd);
  }
}

/* --- for the test */

static int
listen_at (const char *path)
{
  struct sockaddr_un sun = { .sun_family = AF_UNIX };
  int fd = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

  assert (fd >= 0 && strlen (path) < sizeof sun.sun_path);
  strcpy (sun.sun_path, path);
  unlink (path);
  if (bind (fd, (struct sockaddr *) &sun, sizeof sun) < 0 || listen (fd, 64) < 0)
    abort ();
  return fd;
}

struct nbdserver *
nbdserver_start (const struct nbdserver_options *opts)
{
  struct nbdserver *s = calloc (1, sizeof *s);
  pthread_condattr_t attr;

  s->opts = *opts;
  pthread_mutex_init (&s->lock, NULL);
  pthread_condattr_init (&attr);
  pthread_condattr_setclock (&attr, CLOCK_MONOTONIC);
  pthread_cond_init (&s->cond, &attr);
  pthread_condattr_destroy (&attr);
  s->listen_fd = listen_at (opts->path);
  pthread_create (&s->listener, NULL, listen_thread, s);
  return s;
}

static void
stop_listening_locked (struct nbdserver *s)
{
  if (s->listen_fd >= 0) {
    unlink (s->opts.path);
    shutdown (s->listen_fd, SHUT_RDWR);         /* accept returns */
    close (s->listen_fd);
  }
  s->listen_fd = -1;
}

void
nbdserver_go_away (struct nbdserver *s)
{
  LOCK_SCOPE (&s->lock);
  stop_listening_locked (s);
  drop_all_locked (s);
}

void
nbdserver_come_back (struct nbdserver *s, uint64_t size)
{
  LOCK_SCOPE (&s->lock);
  s->opts.size = size;
  s->listen_fd = listen_at (s->opts.path);
  pthread_cond_broadcast (&s->cond);
}

static void
release_locked (struct nbdserver *s)
{
  for (unsigned i = 0; i < s->nr_held; ++i) {
    struct held *h = &s->held[i];

    answer (h->c, &h->req, h->cookie, h->data);
    free (h->data);
  }
  s->nr_held = 0;
  pthread_cond_broadcast (&s->cond);
}

void
nbdserver_stall (struct nbdserver *s, bool on)
{
  LOCK_SCOPE (&s->lock);
  s->stalled = on;
  if (!on)
    release_locked (s);
}

void
nbdserver_decide (struct nbdserver *s,
                  enum nbdserver_answer (*decide) (void *, const struct nbdserver_request *),
                  void *opaque)
{
  LOCK_SCOPE (&s->lock);
  s->opts.decide = decide;
  s->opts.opaque = opaque;
}

void
nbdserver_release (struct nbdserver *s)
{
  LOCK_SCOPE (&s->lock);
  release_locked (s);
}

static bool
await_locked (struct nbdserver *s, const unsigned *number, unsigned nr)
{
  struct timespec until;
  int r = 0;

  clock_gettime (CLOCK_MONOTONIC, &until);
  until.tv_sec += 20;
  while (r == 0 && *number < nr)
    r = pthread_cond_timedwait (&s->cond, &s->lock, &until);
  return *number >= nr;
}

bool
nbdserver_await (struct nbdserver *s, unsigned kind, unsigned nr)
{
  LOCK_SCOPE (&s->lock);
  return await_locked (s, &s->counts[kind], nr);
}

bool
nbdserver_await_held (struct nbdserver *s, unsigned nr)
{
  LOCK_SCOPE (&s->lock);
  return await_locked (s, &s->nr_held, nr);
}

void
nbdserver_forget (struct nbdserver *s)
{
  pthread_mutex_lock (&s->lock);
  s->nr = 0;
  memset (s->counts, 0, sizeof s->counts);
  pthread_mutex_unlock (&s->lock);
}

unsigned
nbdserver_count (struct nbdserver *s, unsigned kind)
{
  LOCK_SCOPE (&s->lock);
  return s->counts[kind];
}

unsigned
nbdserver_conns (struct nbdserver *s)
{
  LOCK_SCOPE (&s->lock);
  return s->nr_conns;
}

struct nbdserver_request *
nbdserver_list (struct nbdserver *s, size_t *nr)
{
  struct nbdserver_request *list;
  LOCK_SCOPE (&s->lock);

  list = malloc ((s->nr + 1) * sizeof *list);
  if (s->nr)
    memcpy (list, s->list, s->nr * sizeof *list);
  *nr = s->nr;
  return list;
}

void
nbdserver_stop (struct nbdserver *s)
{
  {
    LOCK_SCOPE (&s->lock);
    s->stopping = true;
    stop_listening_locked (s);
    drop_all_locked (s);
    pthread_cond_broadcast (&s->cond);
  }
  pthread_join (s->listener, NULL);
  for (unsigned i = 0; i < s->nr_conns; ++i)
    pthread_join (s->conns[i].thread, NULL);
  pthread_mutex_destroy (&s->lock);
  pthread_cond_destroy (&s->cond);
  free (s->held);
  free (s->list);
  free (s);
}
