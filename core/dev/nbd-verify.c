/* Is what answers now the disk that answered before?  See nbd-int.h.
 *
 * Samples of the export, spread over it, are read when it is opened (the first at once, the others
 * while nobody waits for them), and read again on each new connection before that is used: all of
 * them if no other connection is left, else a few.  On a line that breaks before they have come there
 * are fewer the next time, other ones each time, until a connection has lasted.  One that differs is
 * proof of another disk.  LIMIT: that none does is none of the same one; copies that differ in few
 * places may look alike.
 *
 * A sample that a change of ours touches is forgotten the moment the change is sent, and so is one
 * that connections end at: the server may break off because of it.
 *
 * All of it belongs to the I/O thread, but for the first sample, which is set before that has
 * anything to do.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/num.h"
#include "dev/nbd-int.h"

#define NR_SAMPLES  64
#define SAMPLE      4096        /* bytes, unless the server's blocks are larger */
#define AT_ONCE     7           /* read ahead of need, and no reason for one more connection */
#define FEW         8           /* samples, while other connections are there */
#define LEAST       4           /* samples, on the worst of lines */
#define MAX_LOSSES  4           /* of connections that one sample was asked for on */

struct sample {
  struct nbd_samples *all;
  uint64_t off;                 /* bytes */
  bool known, spoiled;
  unsigned losses;              /* connections that ended while it was asked for */
  struct nbd_request req;
};

struct nbd_samples {
  unsigned nr;
  size_t len;                   /* bytes of each */
  unsigned most;                /* that are asked for on a connection */
  unsigned turn;                /* the first of those that are asked for next */
  uint8_t *bytes;               /* nr * len */
  struct sample list[NR_SAMPLES];
};

struct answer {
  struct nbd_verify *v;         /* NULL: not asked for */
  bool came, good;              /* an answer; one without an error */
};

struct nbd_verify {
  unsigned left;                /* answers that have not come */
  bool others;                  /* there were other connections when they were asked for */
  struct answer answers[NR_SAMPLES];
  uint8_t bytes[];              /* as in nbd_samples */
};

int
nbd_samples_new (struct nbd *n, struct err *err)
{
  struct nbd_samples *s = calloc (1, sizeof *s);
  uint64_t size = n->facts.size, step;

  if (!s)
    return err_set (err, ENOMEM, "out of memory");
  n->samples = s;
  s->len = MIN (MIN (MAX ((uint64_t) n->facts.minimum, (uint64_t) SAMPLE), n->max_piece), size);
  if (s->len == 0)
    return 0;
  s->nr = MAX (MIN (size / 16 / s->len, (uint64_t) NR_SAMPLES), UINT64_C (1));
  step = size / s->nr / s->len * s->len;
  s->most = s->nr;
  for (unsigned i = 0; i < s->nr; ++i)
    s->list[i].off = i * step;
  s->bytes = malloc (s->nr * s->len);
  return s->bytes ? 0 : err_set (err, ENOMEM, "out of memory");
}

void
nbd_samples_free (struct nbd_samples *s)
{
  if (!s)
    return;
  free (s->bytes);
  free (s);
}

uint8_t *
nbd_samples_first (struct nbd *n, size_t *len)
{
  *len = n->samples->len;
  return n->samples->bytes;
}

static void learn (struct nbd *n, unsigned i);

static void
sample_read (struct nbd_request *req)
{
  struct sample *sample = req->opaque;

  sample->known = req->result == 0 && !sample->spoiled;
  learn (req->n, sample - sample->all->list + AT_ONCE);
}

static void
learn (struct nbd *n, unsigned i)
{
  struct nbd_samples *s = n->samples;
  struct sample *sample = &s->list[i];

  if (i >= s->nr)
    return;
  sample->all = s;
  sample->req = (struct nbd_request) { .op = NBD_READ, .buf = s->bytes + i * s->len,
                                       .off = sample->off, .len = s->len, .hint = true,
                                       .done = sample_read, .opaque = sample };
  nbd_submit (n, &sample->req);
}

void
nbd_samples_learn (struct nbd *n, bool first_known)
{
  struct nbd_samples *s = n->samples;

  if (s->nr > 0)
    s->list[0].known = first_known;
  for (unsigned i = 1; i <= AT_ONCE; ++i)
    learn (n, i);
}

void
nbd_samples_spoil (struct nbd *n, uint64_t off, uint64_t len)
{
  struct nbd_samples *s = n->samples;

  for (unsigned i = 0; s && i < s->nr; ++i)
    if (ranges_overlap (s->list[i].off, s->len, off, len)) {
      s->list[i].known = false;
      s->list[i].spoiled = true;
    }
}

/* --- on a connection */

static int
answered (void *opaque, int *error)
{
  struct answer *a = opaque;

  if (*error == ENOTCONN)
    return 1;                   /* libnbd's word that there will be none */
  a->came = true;
  a->good = *error == 0;
  a->v->left--;
  return 1;
}

bool
nbd_verify_begin (struct nbd_conn *c, bool others)
{
  struct nbd_samples *s = c->n->samples;
  struct nbd_verify *v;
  unsigned nr, first;

  if (!s || s->nr == 0)
    return true;
  nr = others ? MIN (s->most, (unsigned) FEW) : s->most;
  first = s->turn++;
  v = calloc (1, sizeof *v + s->nr * s->len);
  if (!v)
    return false;
  c->verify = v;
  v->others = others;
  for (unsigned n = 0; n < nr; ++n) {
    unsigned i = (first + n * (s->nr / nr)) % s->nr;
    nbd_completion_callback cb = { .callback = answered, .user_data = &v->answers[i] };

    if (!s->list[i].known)
      continue;
    v->answers[i].v = v;
    v->left++;
    if (nbd_aio_pread (c->h, v->bytes + i * s->len, s->len, s->list[i].off, cb, 0) < 0)
      return false;
  }
  return true;
}

void
nbd_verify_lasted (struct nbd *n)
{
  if (n->samples)
    n->samples->most = n->samples->nr;
}

void
nbd_verify_fewer (struct nbd *n)
{
  struct nbd_samples *s = n->samples;

  if (s)
    s->most = MAX (s->most / 4, MIN (s->nr, (unsigned) LEAST));
}

bool
nbd_verify_done (const struct nbd_conn *c)
{
  return !c->verify || c->verify->left == 0;
}

bool
nbd_verify_same (const struct nbd_conn *c)
{
  const struct nbd_samples *s = c->n->samples;
  const struct nbd_verify *v = c->verify;

  /* An error of the disk says nothing about which disk it is. */
  for (unsigned i = 0; v && i < s->nr; ++i)
    if (v->answers[i].good && s->list[i].known
        && memcmp (v->bytes + i * s->len, s->bytes + i * s->len, s->len) != 0)
      return false;
  return true;
}

void
nbd_verify_free (struct nbd_conn *c)
{
  struct nbd_samples *s = c->n->samples;
  struct nbd_verify *v = c->verify;

  /* One beside others does without many, and may have been lost together with them. */
  if (v && v->left > 0 && !v->others)
    nbd_verify_fewer (c->n);
  for (unsigned i = 0; v && v->left > 0 && i < s->nr; ++i)
    if (v->answers[i].v && !v->answers[i].came && ++s->list[i].losses >= MAX_LOSSES)
      s->list[i].known = false;
  free (v);
  c->verify = NULL;
}
