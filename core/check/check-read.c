/* Reading tables for a check: many at a time, in bounded memory.
 *
 * Two shapes: whole tables of any length into buffers (load_tables), and
 * clusters handed to a callback where the device read them (read_clusters).
 * Both cut their work into batches, so that progress is told from one thread
 * and a cancel is noticed, and read what adjoins in one go: tables of 512 bytes
 * come by the million.  A read that failed is tried again cluster by cluster,
 * so that one bad sector costs one table.
 *
 * Deliberately not here: what the bytes mean.
 */
#include <errno.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "check/check-int.h"

#define PIECE_BYTES (UINT64_C (1) << 20)        /* most that is asked for in one read */
#define SPAN_BYTES  (UINT64_C (256) << 10)      /* most that adjoining clusters are joined to */
#define BATCH_BYTES (UINT64_C (64) << 20)       /* between two looks at progress and cancel */
#define BATCH_READS 4096

/* --- whole tables */

struct piece {
  struct table_load *load;
  uint64_t off;                 /* bytes from the start of the table */
};

struct loading {
  struct checker *k;
  const struct piece *pieces;
  pthread_mutex_t lock;         /* protects the r of the loads */
};

static int
piece_read (void *opaque, size_t i, const void *buf, int r, const struct err *why)
{
  struct loading *l = opaque;
  const struct piece *p = &l->pieces[i];

  if (progress_cancelled (l->k->progress))
    return -ECANCELED;
  if (r == 0) {
    memcpy (p->load->buf + p->off, buf, MIN (PIECE_BYTES, p->load->len - p->off));
    return 0;
  }
  if (r == -ENOTCONN)
    return r;                   /* out of reach: that says nothing about the table */
  LOCK_SCOPE (&l->lock);
  p->load->r = r;
  return 0;
}

static int
load_batch (struct checker *k, const struct bdev_range *ranges, const struct piece *pieces,
            size_t nr, struct err *err)
{
  struct loading l = { .k = k, .pieces = pieces };
  int r;

  pthread_mutex_init (&l.lock, NULL);
  r = bdev_read_many (k->d, ranges, nr, piece_read, &l, err);
  pthread_mutex_destroy (&l.lock);
  return r;
}

int
load_tables (struct checker *k, struct table_load *loads, size_t nr, struct err *err)
{
  struct bdev_range ranges[64];
  struct piece pieces[64];
  size_t n = 0;
  int r = 0;

  for (size_t i = 0; i < nr; ++i) {
    loads[i].r = 0;
    for (uint64_t off = 0; off < loads[i].len && r == 0; off += PIECE_BYTES) {
      pieces[n] = (struct piece) { &loads[i], off };
      ranges[n].off = loads[i].host_off + off;
      ranges[n].len = MIN (PIECE_BYTES, loads[i].len - off);
      if (++n == 64) {
        r = load_batch (k, ranges, pieces, n, err);
        n = 0;
      }
    }
  }
  return r == 0 && n ? load_batch (k, ranges, pieces, n, err) : r;
}

/* --- clusters */

struct span {
  size_t first, nr;             /* clusters of the list */
};
DEFINE_VEC (span_vec, struct span);
DEFINE_VEC (range_vec, struct bdev_range);

struct reading {
  struct checker *k;
  cluster_fn fn;
  void *opaque;
  struct span_vec spans;
  struct range_vec ranges;
  pthread_mutex_t lock;
  /* protected by lock */
  struct span_vec retry;
  struct err why;               /* of the first callback that failed */
};

static int
span_read (void *opaque, size_t i, const void *buf, int r, const struct err *why)
{
  struct reading *rd = opaque;
  const struct span *s = &rd->spans.ptr[i];
  struct err err = { 0 };

  if (progress_cancelled (rd->k->progress))
    return -ECANCELED;
  if (r == -ENOTCONN) {
    LOCK_SCOPE (&rd->lock);
    if (rd->why.code == 0)
      rd->why = *why;
    return r;                   /* out of reach: that says nothing about the tables */
  }
  if (r < 0 && s->nr > 1) {
    LOCK_SCOPE (&rd->lock);
    return span_vec_push (&rd->retry, *s);
  }
  if (r < 0)
    r = rd->fn (rd->k, rd->opaque, s->first, NULL, r, &err);
  else
    for (size_t j = 0; j < s->nr && r == 0; ++j)
      r = rd->fn (rd->k, rd->opaque, s->first + j,
                  (const uint8_t *) buf + (j << rd->k->g->cluster_bits), 0, &err);
  if (r < 0) {
    LOCK_SCOPE (&rd->lock);
    if (rd->why.code == 0)
      rd->why = err;
  }
  return r;
}

static int
add_span (struct reading *rd, const uint64_t *host_offs, size_t first, size_t nr)
{
  struct bdev_range range = { host_offs[first], nr << rd->k->g->cluster_bits };
  int r = span_vec_push (&rd->spans, (struct span) { first, nr });

  return r < 0 ? r : range_vec_push (&rd->ranges, range);
}

static int
read_spans (struct reading *rd, struct err *err)
{
  struct err why = { 0 };
  int r = bdev_read_many (rd->k->d, rd->ranges.ptr, rd->ranges.len, span_read, rd, &why);

  rd->spans.len = rd->ranges.len = 0;
  if (r == -ECANCELED)
    return err_set (err, ECANCELED, "the check was cancelled");
  if (r < 0)
    return err_set (err, -r, "%s", rd->why.code ? rd->why.msg : why.msg);
  return 0;
}

/* Each cluster of the spans that could not be read, by itself. */
static int
read_again (struct reading *rd, const uint64_t *host_offs, struct err *err)
{
  int r = 0;

  for (size_t i = 0; i < rd->retry.len && r == 0; ++i) {
    const struct span *s = &rd->retry.ptr[i];

    for (size_t j = 0; j < s->nr && r == 0; ++j)
      r = add_span (rd, host_offs, s->first + j, 1);
    if (r < 0)
      return err_set (err, ENOMEM, "out of memory");
    r = read_spans (rd, err);
  }
  rd->retry.len = 0;
  return r;
}

/* Take spans off the list until the batch is full; returns where it ends. */
static size_t
fill_batch (struct reading *rd, const uint64_t *host_offs, size_t i, size_t nr)
{
  uint64_t cluster_size = rd->k->g->cluster_size, bytes = 0;

  while (i < nr && bytes < BATCH_BYTES && rd->spans.len < BATCH_READS) {
    size_t n = 1;

    while (i + n < nr && (n + 1) * cluster_size <= SPAN_BYTES &&
           host_offs[i + n] == host_offs[i] + n * cluster_size)
      ++n;
    if (add_span (rd, host_offs, i, n) < 0)
      return SIZE_MAX;
    bytes += n * cluster_size;
    i += n;
  }
  return i;
}

int
read_clusters (struct checker *k, const uint64_t *host_offs, size_t nr, const char *phase,
               cluster_fn fn, void *opaque, struct err *err)
{
  struct reading rd = { .k = k, .fn = fn, .opaque = opaque };
  int r = 0;

  pthread_mutex_init (&rd.lock, NULL);
  for (size_t i = 0; i < nr && r == 0;) {
    progress_update (k->progress, phase, i, nr);
    i = fill_batch (&rd, host_offs, i, nr);
    if (i == SIZE_MAX)
      r = err_set (err, ENOMEM, "out of memory");
    if (r == 0)
      r = read_spans (&rd, err);
    if (r == 0)
      r = read_again (&rd, host_offs, err);
  }
  if (r == 0)
    progress_update (k->progress, phase, nr, nr);
  vec_reset (&rd.spans);
  vec_reset (&rd.ranges);
  vec_reset (&rd.retry);
  pthread_mutex_destroy (&rd.lock);
  return r;
}
