/* The NBD device: its operations, made of requests to the server.  See nbd.h, nbd-int.h.
 *
 * Server and caller have different ideas of a request: the server may want whole blocks and set
 * a limit, the caller may ask for any bytes.  Reads are widened to blocks; changes of parts of
 * blocks read, change and write back, one at a time.  What is longer than a piece goes as many
 * requests at once.
 *
 * Deliberately not here: locks.  NBD has none.
 *
 * Invariants: I1; until bdev_make_writable the device is read-only, and bdev.c refuses changes.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "dev/nbd-int.h"

#define MAX_ZERO (UINT64_C (1) << 30)   /* bytes in one request that carries no data */

/* All devices there are, for nbd_rest. */
static pthread_mutex_t all_lock = PTHREAD_MUTEX_INITIALIZER;
static struct nbd *all;

static atomic_bool in_a_hurry;  /* this process is about to end */

static const char *
describe (int r)
{
  return r == -ENOTCONN ? "the server cannot be reached" : strerror (-r);
}

static int
fail (struct nbd *n, int r, const char *what, uint64_t len, uint64_t off, struct err *err)
{
  return err_set (err, -r, "%s: %s of %llu bytes at byte %llu: %s", n->d.name, what,
                  (unsigned long long) len, (unsigned long long) off, describe (r));
}

/* --- requests that are waited for */

static void
wait_done (struct nbd_request *req)
{
  struct nbd_wait *w = req->opaque;
  int none = 0;

  if (req->result < 0)
    atomic_compare_exchange_strong (&w->result, &none, req->result);
  if (atomic_fetch_sub (&w->left, 1) == 1)
    sem_post (&w->sem);
}

static void
wait_for (struct nbd_wait *w)
{
  while (sem_wait (&w->sem) < 0)
    ;                           /* EINTR */
}

/* The range in pieces of at most step bytes, all at once; the server's constraints are kept.
 * 0 or -errno.
 */
static int
run_requests (struct nbd *n, struct nbd_request like, uint64_t step)
{
  uint64_t nr = like.len ? DIV_ROUND_UP (like.len, step) : 1;
  struct nbd_request one, *reqs = nr > 1 ? calloc (nr, sizeof *reqs) : &one;
  struct nbd_wait w = { .left = nr };

  if (!reqs)
    return -ENOMEM;
  sem_init (&w.sem, 0, 0);
  like.done = wait_done;
  like.opaque = &w;
  for (uint64_t i = 0; i < nr; ++i) {
    reqs[i] = like;
    reqs[i].off += i * step;
    reqs[i].len = MIN (like.len - i * step, step);
    if (like.buf)
      reqs[i].buf = (uint8_t *) like.buf + i * step;
    nbd_submit (n, &reqs[i]);
  }
  wait_for (&w);
  sem_destroy (&w.sem);
  if (reqs != &one)
    free (reqs);
  return atomic_load (&w.result);
}

static bool
is_aligned (const struct nbd *n, uint64_t off, uint64_t len)
{
  uint64_t from = off, n_bytes = len;

  nbd_align (n, &from, &n_bytes);
  return from == off && n_bytes == len;
}

/* --- reading */

static int
read_blocks (struct nbd *n, void *buf, uint64_t len, uint64_t off)
{
  struct nbd_request like = { .op = NBD_READ, .buf = buf, .off = off, .len = len };
  CLEANUP_FREE uint8_t *bounce = NULL;
  int r;

  if (is_aligned (n, off, len))
    return run_requests (n, like, n->max_piece);
  nbd_align (n, &like.off, &like.len);
  bounce = malloc (like.len);
  if (!bounce)
    return -ENOMEM;
  like.buf = bounce;
  r = run_requests (n, like, n->max_piece);
  if (r == 0)
    memcpy (buf, bounce + (off - like.off), len);
  return r;
}

int
nbd_read_blocking (struct nbd *n, void *buf, uint64_t len, uint64_t off, struct bdev_range *bad)
{
  uint8_t *p = buf;

  while (len > 0) {
    size_t gap, got = nbd_ahead_take (n, p, len, off, &gap);

    if (got == 0) {
      int r = read_blocks (n, p, gap, off);

      if (r < 0 && bad)
        *bad = (struct bdev_range) { off, gap };
      if (r < 0)
        return r;
      got = gap;
    }
    p += got;
    off += got;
    len -= got;
  }
  return 0;
}

static int
nbd_pread_op (struct bdev *d, void *buf, size_t len, uint64_t off, struct err *err)
{
  struct nbd *n = (struct nbd *) d;
  struct bdev_range bad;
  int r = nbd_read_blocking (n, buf, len, off, &bad);

  return r < 0 ? fail (n, r, "read", bad.len, bad.off, err) : 0;
}

static int
nbd_cache_op (struct bdev *d, uint64_t off, uint64_t len, struct err *err)
{
  return nbd_ahead_fetch ((struct nbd *) d, off, len) ? 0 : -EAGAIN;
}

/* --- changing */

/* Before a change, and after it: what was read ahead meanwhile may be old, too. */
static void
forget (struct nbd *n, uint64_t off, uint64_t len)
{
  atomic_store (&n->changed, true);
  nbd_ahead_forget (n, off, len);
}

static int
write_blocks (struct nbd *n, const void *buf, uint64_t len, uint64_t off, uint32_t flags)
{
  struct nbd_request like = { .op = NBD_WRITE, .buf = (void *) buf, .off = off, .len = len,
                              .flags = flags };

  return run_requests (n, like, n->max_piece);
}

/* The range does not consist of whole blocks. */
static int
write_partial (struct nbd *n, const void *buf, uint64_t len, uint64_t off, uint32_t flags)
{
  uint64_t from = off, all_len = len;
  CLEANUP_FREE uint8_t *bounce = NULL;
  int r;

  nbd_align (n, &from, &all_len);
  bounce = malloc (all_len);
  if (!bounce)
    return -ENOMEM;
  LOCK_SCOPE (&n->partial_lock);
  r = read_blocks (n, bounce, all_len, from);
  if (r < 0)
    return r;
  memcpy (bounce + (off - from), buf, len);
  return write_blocks (n, bounce, all_len, from, flags);
}

static int nbd_flush_op (struct bdev *d, struct err *err);

static uint32_t
fua_flag (const struct nbd *n, unsigned flags)
{
  return (flags & BDEV_FUA) && n->facts.can_fua ? LIBNBD_CMD_FLAG_FUA : 0;
}

/* A server that knows no FUA is flushed. */
static int
make_durable (struct nbd *n, unsigned flags, struct err *err)
{
  return (flags & BDEV_FUA) && !n->facts.can_fua ? nbd_flush_op (&n->d, err) : 0;
}

static int
nbd_pwrite_op (struct bdev *d, const void *buf, size_t len, uint64_t off, unsigned flags,
               struct err *err)
{
  struct nbd *n = (struct nbd *) d;
  int r;

  forget (n, off, len);
  r = (is_aligned (n, off, len) ? write_blocks : write_partial) (n, buf, len, off,
                                                                 fua_flag (n, flags));
  forget (n, off, len);
  return r < 0 ? fail (n, r, "write", len, off, err) : make_durable (n, flags, err);
}

static int
nbd_zero_op (struct bdev *d, uint64_t off, uint64_t len, unsigned flags, struct err *err)
{
  struct nbd *n = (struct nbd *) d;
  struct nbd_request like = { .op = NBD_ZERO, .off = off, .len = len, .flags = fua_flag (n, flags) };
  int r;

  if (!n->facts.can_zero || !is_aligned (n, off, len)
      || ((flags & BDEV_FAST) && !n->facts.can_fast_zero))
    return -ENOTSUP;            /* let it be written */
  if (!(flags & BDEV_MAY_TRIM))
    like.flags |= LIBNBD_CMD_FLAG_NO_HOLE;
  if (flags & BDEV_FAST)
    like.flags |= LIBNBD_CMD_FLAG_FAST_ZERO;
  forget (n, off, len);
  r = run_requests (n, like, MAX_ZERO);
  forget (n, off, len);
  if (r == -ENOTSUP)
    return r;
  return r < 0 ? fail (n, r, "zeroing", len, off, err) : make_durable (n, flags, err);
}

static int
nbd_trim_op (struct bdev *d, uint64_t off, uint64_t len, unsigned flags, struct err *err)
{
  struct nbd *n = (struct nbd *) d;
  uint64_t m = n->facts.minimum, from = DIV_ROUND_UP (off, m) * m, to = (off + len) / m * m;
  struct nbd_request like = { .op = NBD_TRIM, .off = from, .flags = fua_flag (n, flags) };
  int r;

  if (!n->facts.can_trim || to <= from)
    return 0;                   /* a wish, not a command */
  like.len = to - from;
  forget (n, off, len);
  r = run_requests (n, like, MAX_ZERO);
  forget (n, off, len);
  if (r == -ENOTSUP)
    return 0;
  return r < 0 ? fail (n, r, "trimming", len, off, err) : make_durable (n, flags, err);
}

static int
nbd_flush_op (struct bdev *d, struct err *err)
{
  struct nbd *n = (struct nbd *) d;
  struct nbd_request like = { .op = NBD_FLUSH };
  int r;

  /* A server that can't be flushed has promised nothing; there is no more to be had from it. */
  if (!n->facts.can_flush || !atomic_load (&n->changed))
    return 0;
  r = run_requests (n, like, 1);
  if (r < 0)
    return err_set (err, -r, "%s: flush: %s; what was written since the last good flush may be lost, "
                    "so that no later flush can succeed", d->name,
                    r == -EIO ? "the server reports an error, or the connection was lost" : describe (r));
  return 0;
}

static int
nbd_make_writable_op (struct bdev *d, struct err *err)
{
  struct nbd *n = (struct nbd *) d;

  if (n->facts.read_only)
    return err_set (err, EROFS, "%s: the export is read-only", d->name);
  d->writable = true;
  return 0;
}

/* --- life */

static void
nbd_free (struct nbd *n)
{
  nbd_ahead_free (n->ahead);
  nbd_holes_free (n->holes);
  pthread_mutex_destroy (&n->partial_lock);
  pthread_mutex_destroy (&n->queue_lock);
  pthread_cond_destroy (&n->idle_cond);
  if (n->wake_fd >= 0)
    close (n->wake_fd);
  nbd_samples_free (n->samples);
  free (n->uri);
  free (n);
}

static void
nbd_close_op (struct bdev *d)
{
  struct nbd *n = (struct nbd *) d;

  {
    LOCK_SCOPE (&all_lock);
    for (struct nbd **p = &all; *p; p = &(*p)->next)
      if (*p == n) {
        *p = n->next;
        break;
      }
  }
  nbd_stop (n, true);
  nbd_free (n);
}

void
nbd_rest (void)
{
  LOCK_SCOPE (&all_lock);
  for (struct nbd *n = all; n; n = n->next)
    nbd_stop (n, false);
}

void
nbd_hurry (void)
{
  atomic_store (&in_a_hurry, true);     /* the I/O threads look at it as often as at the clock */
}

bool
nbd_is_hasty (const struct nbd *n)
{
  return atomic_load (&in_a_hurry) && !atomic_load (&n->changed);
}

static const struct bdev_ops nbd_ops = {
  .kind = "nbd",
  .native_fua = true,
  .pread = nbd_pread_op,
  .read_many = nbd_read_many,
  .pwrite = nbd_pwrite_op,
  .zero = nbd_zero_op,
  .trim = nbd_trim_op,
  .flush = nbd_flush_op,
  .extents = nbd_extents,
  .cache = nbd_cache_op,
  .make_writable = nbd_make_writable_op,
  .close = nbd_close_op,
};

bool
nbd_is_uri (const char *name)
{
  static const char *const schemes[] = {
    "nbd", "nbds", "nbd+unix", "nbds+unix", "nbd+vsock", "nbds+vsock",
  };
  const char *colon = strstr (name, ":");

  for (size_t i = 0; colon && i < sizeof schemes / sizeof *schemes; ++i)
    if ((size_t) (colon - name) == strlen (schemes[i])
        && strncasecmp (name, schemes[i], colon - name) == 0)
      return strncmp (colon, "://", 3) == 0;
  return false;
}

static int
nbd_new (const char *uri, const struct nbd_options *opts, struct nbd **ret, struct err *err)
{
  struct nbd *n = calloc (1, sizeof *n);
  int r = 0;

  if (!n)
    return err_set (err, ENOMEM, "out of memory");
  n->wake_fd = eventfd (0, EFD_CLOEXEC | EFD_NONBLOCK);
  n->uri = strdup (uri);
  n->local_files = opts->local_files;
  n->timeout_ms = UINT64_C (1000) * (opts->timeout ? opts->timeout : NBD_DEFAULT_TIMEOUT);
  n->reconnect_ms = UINT64_C (1000) * opts->reconnect;
  pthread_mutex_init (&n->partial_lock, NULL);
  pthread_mutex_init (&n->queue_lock, NULL);
  pthread_cond_init (&n->idle_cond, NULL);
  if (!n->uri || n->wake_fd < 0)
    r = err_set (err, n->uri ? errno : ENOMEM, "%s: %s", uri, strerror (n->uri ? errno : ENOMEM));
  if (r == 0)
    r = bdev_init (&n->d, &nbd_ops, uri, 0, false, false, err);
  if (r == 0)
    r = nbd_ahead_new (n, &n->ahead, err);
  if (r == 0)
    r = nbd_holes_new (n, &n->holes, err);
  if (r < 0) {
    free (n->d.name);
    nbd_free (n);
    return r;
  }
  n->d.far = true;
  *ret = n;
  return 0;
}

/* What it is known again by.  -ENOTCONN: it takes requests, but does not answer. */
static int
take_samples (struct nbd *n, struct err *err)
{
  size_t len;
  uint8_t *first;
  int r = nbd_samples_new (n, err);

  if (r < 0)
    return r;
  first = nbd_samples_first (n, &len);
  r = len > 0 ? read_blocks (n, first, len, 0) : 0;
  if (r == -ENOTCONN)
    return fail (n, r, "read", len, 0, err);
  nbd_samples_learn (n, r == 0 && len > 0);
  return 0;
}

int
nbd_open (const char *uri, const struct nbd_options *opts, struct bdev **ret, struct err *err)
{
  struct nbd *n = NULL;
  int r = nbd_new (uri, opts, &n, err);

  if (r < 0)
    return r;
  r = nbd_conn_first (n, err);
  if (r < 0) {
    bdev_unref (&n->d);
    return r;
  }
  atomic_store (&n->d.size, n->facts.size);
  n->max_piece = MAX (MIN (n->facts.maximum, NBD_MAX_PIECE) / n->facts.minimum * n->facts.minimum,
                      (uint64_t) n->facts.minimum);
  r = take_samples (n, err);
  if (r < 0) {
    bdev_unref (&n->d);
    return r;
  }
  {
    LOCK_SCOPE (&all_lock);
    n->next = all;
    all = n;
  }
  *ret = &n->d;
  return 0;
}
