/* Deep: does every compressed cluster decompress?  Off unless asked for, since
 * it reads all compressed data.
 *
 * Each distinct L2 table once, in batches: the tables of a batch are read, the
 * streams that they name are gathered, sorted by place and joined to reads of
 * SPAN_BYTES (streams lie close together, several to a host cluster), and what
 * comes back is decompressed on the device's reading threads.  Memory is
 * bounded by the batch: tables of TABLE_BYTES or one, and a stream for each of
 * their entries at most.
 *
 * Descriptors that can't be right, and tables that can't be read, have their
 * findings from check-data.c and are passed over.
 *
 * Deliberately not here: guest data that is not compressed; any bytes are valid.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "check/check-int.h"
#include "fmt/inflate.h"

#define TABLE_BYTES (UINT64_C (2) << 20)
#define SPAN_BYTES  (UINT64_C (256) << 10)

struct stream {
  uint64_t host_off, host_len;
  uint64_t guest_ci;
  uint64_t raw;
  const struct l2_table *t;
};
DEFINE_VEC (stream_vec, struct stream);

struct span {
  size_t first, nr;             /* streams */
};
DEFINE_VEC (span_vec, struct span);
DEFINE_VEC (range_vec, struct bdev_range);

struct deep {
  struct checker *k;
  struct table_load *loads;
  struct stream_vec streams;
  struct span_vec spans;
  struct range_vec ranges;
  uint8_t *tables;
};

/* --- what there is to decompress */

static int
gather_table (struct deep *d, const struct l2_table *t, const uint8_t *table)
{
  const struct geom *g = d->k->g;
  int r = 0;

  for (uint64_t i = 0; i < g->l2_entries && r == 0; ++i) {
    uint64_t raw = l2_raw (table, i, g);
    struct stream s = { .raw = raw, .t = t };
    struct l2_entry e;

    if (!(raw & L2E_COMPRESSED))
      continue;
    e = l2_entry_decode (raw, 0, g);
    s.guest_ci = ((uint64_t) t->l1_index << g->l2_bits) + i;
    s.host_off = e.host_off;
    s.host_len = e.host_len;
    if (e.reserved == 0 && range_fits (e.host_off, e.host_len, d->k->end))
      r = stream_vec_push (&d->streams, s);
  }
  return r;
}

static int
compare_streams (const void *pa, const void *pb)
{
  const struct stream *a = pa, *b = pb;

  if (a->host_off != b->host_off)
    return a->host_off < b->host_off ? -1 : 1;
  return a->host_len < b->host_len ? -1 : a->host_len > b->host_len;
}

/* Reads that cover the streams, several to a read. */
static int
join_streams (struct deep *d)
{
  const struct stream_vec *v = &d->streams;

  if (v->len)
    qsort (v->ptr, v->len, sizeof *v->ptr, compare_streams);
  for (size_t i = 0, n; i < v->len; i += n) {
    uint64_t off = v->ptr[i].host_off, end = off + v->ptr[i].host_len;

    for (n = 1; i + n < v->len && v->ptr[i + n].host_off <= end; ++n) {
      uint64_t next_end = MAX (end, v->ptr[i + n].host_off + v->ptr[i + n].host_len);

      if (next_end > end && next_end - off > SPAN_BYTES)
        break;
      end = next_end;
    }
    if (span_vec_push (&d->spans, (struct span) { i, n }) < 0 ||
        range_vec_push (&d->ranges, (struct bdev_range) { off, end - off }) < 0)
      return -ENOMEM;
  }
  return 0;
}

/* --- decompressing, on several threads */

static int
report_stream (struct deep *d, const struct stream *s, struct finding_batch *batch,
               enum finding_id id)
{
  const struct geom *g = d->k->g;
  struct finding f = {
    .id = id, .snapshot_index = s->t->snapshot_index, .host_off = s->t->host_off,
    .guest_off = s->guest_ci << g->cluster_bits, .guest_len = g->cluster_size,
    .index = s->guest_ci, .found = s->raw, .count = 1,
  };

  if (finding_batch_add (batch, &f) < 0)
    return -ENOMEM;
  return bad_add (d->k, (struct bad_run) {
      .table_host_off = s->t->host_off, .index = s->guest_ci & (g->l2_entries - 1), .count = 1,
      .snapshot_index = FINDING_ACTIVE, .why = id,
      .fix = id == FINDING_STREAM_UNREADABLE ? BAD_UNREADABLE : BAD_LOST }, NULL);
}

/* Has b been tried when a has, with that result?  Else a few bytes that every entry of a table names
 * would be decompressed as often as there are entries.
 */
static bool
is_known (const struct stream *a, const struct stream *b, int good)
{
  return a->host_off == b->host_off && (good == 0 || a->host_len == b->host_len);
}

/* r < 0: the span could not be read. */
static int
try_streams (struct deep *d, size_t i, const uint8_t *buf, int r, uint8_t *out,
             struct finding_batch *batch)
{
  const struct span *span = &d->spans.ptr[i];
  uint8_t type = d->k->c->header.compression_type;
  int good = r;

  for (size_t j = span->first; j < span->first + span->nr; ++j) {
    const struct stream *s = &d->streams.ptr[j];
    enum finding_id id = FINDING_STREAM_UNREADABLE;

    if (progress_cancelled (d->k->progress))
      return -ECANCELED;
    if (r == 0) {
      id = FINDING_STREAM_BROKEN;
      if (j == span->first || !is_known (s - 1, s, good))
        good = inflate_cluster (type, buf + (s->host_off - d->ranges.ptr[i].off), s->host_len, out,
                                d->k->g->cluster_size, NULL);
    }
    if (good == -ENOMEM || (good < 0 && report_stream (d, s, batch, id) < 0))
      return -ENOMEM;
  }
  return 0;
}

static int
span_read (void *opaque, size_t i, const void *buf, int r, const struct err *why)
{
  struct deep *d = opaque;
  CLEANUP_FREE uint8_t *out = malloc (d->k->g->cluster_size);
  CLEANUP_FREE struct finding_batch *batch = malloc (sizeof *batch);
  int flushed;

  if (!out || !batch)
    return -ENOMEM;
  finding_batch_init (batch, &d->k->c->findings, d->k->g->cluster_size);
  r = try_streams (d, i, buf, r, out, batch);
  flushed = finding_batch_flush (batch);
  return r < 0 ? r : flushed;
}

static int
run_spans (struct deep *d, struct err *err)
{
  struct err why = { 0 };
  int r = bdev_read_many (d->k->d, d->ranges.ptr, d->ranges.len, span_read, d, &why);

  if (r == -ECANCELED)
    return check_cancelled (d->k, err);
  return r < 0 ? err_set (err, -r, "%s", why.code ? why.msg : "out of memory") : 0;
}

/* --- batches of tables */

static int
deep_batch (struct deep *d, size_t first, size_t nr, struct err *err)
{
  const struct l2_table *t = d->k->l2.tables.ptr + first;
  int r;

  d->streams.len = d->spans.len = d->ranges.len = 0;
  for (size_t i = 0; i < nr; ++i)
    d->loads[i] = (struct table_load) {
      .host_off = t[i].host_off, .len = d->k->g->cluster_size,
      .buf = d->tables + (i << d->k->g->cluster_bits),
    };
  r = load_tables (d->k, d->loads, nr, err);
  if (r < 0)
    return r;
  for (size_t i = 0; i < nr && r == 0; ++i)
    if (d->loads[i].r == 0)
      r = gather_table (d, &t[i], d->loads[i].buf);
  if (r == 0)
    r = join_streams (d);
  return r < 0 ? err_set (err, ENOMEM, "out of memory") : run_spans (d, err);
}

int
check_deep (struct checker *k, struct err *err)
{
  size_t nr = k->l2.tables.len, most = MAX (TABLE_BYTES >> k->g->cluster_bits, 1);
  struct deep d = { .k = k };
  int r = 0;

  if (!k->deep || k->c->stats.compressed_anywhere == 0 || k->g->data_file)
    return 0;
  most = MIN (most, nr);
  d.loads = malloc (most * sizeof d.loads[0]);
  d.tables = malloc (most << k->g->cluster_bits);
  if (!d.loads || !d.tables)
    r = err_set (err, ENOMEM, "out of memory");
  for (size_t i = 0; i < nr && r == 0; i += most) {
    progress_update (k->progress, "streams", i, nr);
    r = check_cancelled (k, err);
    if (r == 0)
      r = deep_batch (&d, i, MIN (most, nr - i), err);
  }
  if (r == 0)
    progress_update (k->progress, "streams", nr, nr);
  vec_reset (&d.streams);
  vec_reset (&d.spans);
  vec_reset (&d.ranges);
  free (d.loads);
  free (d.tables);
  return r;
}
