/* A line from the NBD device to a server that misbehaves, request by request
 * (tests/nbdserver.h): what the tests of faults share.
 */
#ifndef QR_TESTS_DEV_LINE_H
#define QR_TESTS_DEV_LINE_H

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include "unit/unit.h"

#include "base/clock.h"
#include "base/num.h"
#include "dev/nbd.h"
#include "nbdserver.h"

#define SIZE       (UINT64_C (4) << 20)
#define MAX_MAPPED (UINT64_C (32) << 30)

struct line {
  char *folder, *uri, *path;
  uint8_t *disk;                /* the server's */
  uint64_t size;
  struct nbdserver *s;
  struct bdev *d;
};

/* With nbd_options of whole seconds. */
static inline __attribute__ ((unused)) struct line
connect_line (struct nbdserver_options opts, unsigned timeout, unsigned reconnect)
{
  struct line l = { .folder = make_folder (), .size = opts.size ? opts.size : SIZE };
  struct nbd_options nopts = { .timeout = timeout, .reconnect = reconnect };
  struct err err = { 0 };
  uint64_t seed = 1;

  /* Of an enormous disk there is only what is touched. */
  l.disk = mmap (NULL, MIN (l.size, MAX_MAPPED), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  assert_true (l.disk != MAP_FAILED);
  for (size_t i = 0; i < MIN (l.size, SIZE); ++i)
    l.disk[i] = 1 + test_random (&seed) % 255;
  if (asprintf (&l.path, "%s/sock", l.folder) < 0
      || asprintf (&l.uri, "nbd+unix:///?socket=%s", l.path) < 0)
    abort ();
  opts.path = l.path;
  opts.disk = l.disk;
  opts.size = l.size;
  l.s = nbdserver_start (&opts);
  assert_ok (nbd_open (l.uri, &nopts, &l.d, &err), &err);
  assert_true (bdev_size (l.d) == l.size);
  nbd_rest ();                  /* the samples by which it is known again have come */
  nbdserver_forget (l.s);
  if (!opts.read_only)
    assert_ok (bdev_make_writable (l.d, &err), &err);
  return l;
}

static inline __attribute__ ((unused)) void
end_line (struct line *l)
{
  bdev_unref (l->d);
  nbdserver_stop (l->s);
  munmap (l->disk, MIN (l->size, MAX_MAPPED));
  remove_folder (l->folder);
  free (l->uri);
  free (l->path);
}

static inline __attribute__ ((unused)) void
reads_right (const struct line *l, uint64_t off, uint64_t len)
{
  uint8_t *buf = malloc (len);
  struct err err = { 0 };

  assert_ok (bdev_pread (l->d, buf, len, off, &err), &err);
  assert_memory_equal (buf, l->disk + off, len);
  free (buf);
}

static inline __attribute__ ((unused)) void
break_line (struct line *l)
{
  nbdserver_go_away (l->s);
  nbdserver_come_back (l->s, SIZE);
}

static inline __attribute__ ((unused)) int
count_right (void *opaque, size_t i, const void *buf, int r, const struct err *why)
{
  atomic_uint *right = opaque;

  *right += r == 0;
  return 0;
}

/* --- rules */

/* The nth request of a kind gets an answer of its own. */
struct rule {
  unsigned kind, nth, every, seen;      /* every: and each so many after that, if not 0 */
  enum nbdserver_answer answer;
};

static inline __attribute__ ((unused)) enum nbdserver_answer
apply (void *opaque, const struct nbdserver_request *req)
{
  struct rule *r = opaque;

  if (req->kind != r->kind)
    return SRV_ANSWER;
  r->seen++;
  return r->seen == r->nth || (r->every && r->seen > r->nth && (r->seen - r->nth) % r->every == 0)
           ? r->answer : SRV_ANSWER;
}

static inline __attribute__ ((unused)) void
set_rule (struct line *l, struct rule *r, unsigned kind, unsigned nth, unsigned every,
          enum nbdserver_answer answer)
{
  nbdserver_decide (l->s, NULL, NULL);          /* nobody looks at it while it changes */
  *r = (struct rule) { .kind = kind, .nth = nth, .every = every, .answer = answer };
  nbdserver_decide (l->s, apply, r);
}

/* All of a kind. */
static inline __attribute__ ((unused)) void
all (struct line *l, struct rule *r, unsigned kind, enum nbdserver_answer answer)
{
  set_rule (l, r, kind, 1, 1, answer);
}

static inline __attribute__ ((unused)) void
the_next (struct line *l, struct rule *r, unsigned kind, enum nbdserver_answer answer)
{
  set_rule (l, r, kind, 1, 0, answer);
}

/* One operation in a thread of its own. */
struct doing {
  struct bdev *d;
  unsigned kind;
  uint64_t off, len;
  uint8_t buf[65536];
  int result;
  pthread_t thread;
};

static inline __attribute__ ((unused)) int
do_it (struct bdev *d, unsigned kind, uint8_t *buf, uint64_t off, uint64_t len)
{
  switch (kind) {
  case SRV_READ:
    return bdev_pread (d, buf, len, off, NULL);
  case SRV_WRITE:
    return bdev_pwrite (d, buf, len, off, 0, NULL);
  case SRV_ZERO:
    return bdev_zero (d, off, len, 0, NULL);
  case SRV_TRIM:
    return bdev_trim (d, off, len, 0, NULL);
  default:
    return bdev_flush (d, NULL);
  }
}

static inline __attribute__ ((unused)) void *
do_in_thread (void *opaque)
{
  struct doing *o = opaque;

  o->result = do_it (o->d, o->kind, o->buf, o->off, o->len);
  return NULL;
}

static inline __attribute__ ((unused)) void
begin (struct doing *o, struct bdev *d, unsigned kind, uint64_t off, uint64_t len)
{
  *o = (struct doing) { .d = d, .kind = kind, .off = off, .len = len };
  pthread_create (&o->thread, NULL, do_in_thread, o);
}

static inline __attribute__ ((unused)) int
result_of (struct doing *o)
{
  pthread_join (o->thread, NULL);
  return o->result;
}

#endif /* QR_TESTS_DEV_LINE_H */
