/* Reading from afar: many pieces of the guest's disk at once.
 *
 * Where a device below is far, a read that is cut into runs must not wait for one after the
 * other.  So the runs of a whole batch of ranges are looked up first, then all that lie on
 * one device below are read with one bdev_read_many, each into its place in a buffer.
 * Streams of compressed clusters are announced together, and decompressed when the rest is there.
 *
 * A batch is one grace section: no host cluster that was looked up is used again before
 * it was read.  The callbacks of read_many run only after it is left.  They are somebody else's
 * code, and one that writes to this image waits for a commit, which waits for the sections
 * of others to end: inside of one it would wait for itself.
 *
 * On near devices a few threads do as well, and need no buffer for a batch (dev/many.h).
 *
 * LIMIT: while the callbacks of a batch run, the next is not on its way yet.
 *
 * Invariants: none of its own; nothing here changes anything.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "dev/ahead.h"
#include "img/image-int.h"

#define BATCH_BYTES  (UINT64_C (16) << 20)
#define BATCH_RANGES 4096

/* One range of the guest's disk. */
struct part {
  uint64_t guest_off;
  uint64_t len;                 /* bytes inside the disk; the rest of the range is zeros */
  uint8_t *buf;
  int r;                        /* protected by lock, as why: the first failure */
  struct err *why;              /* owned; NULL if r is 0, or without memory for it */
};
DEFINE_VEC (part_vec, struct part);

/* A piece of one of them that lies on a device below. */
struct piece {
  size_t part;
  uint8_t *to;
  bool done;                    /* set by its callback */
};
DEFINE_VEC (piece_vec, struct piece);
DEFINE_VEC (range_vec, struct bdev_range);

struct gather;

struct lower {
  struct gather *g;
  struct piece_vec pieces;
  struct range_vec ranges;      /* of the pieces */
};

/* A piece of one compressed cluster. */
struct stream {
  size_t part;
  uint8_t *to;
  uint64_t guest_off, len, host_off, host_len;
};
DEFINE_VEC (stream_vec, struct stream);

struct gather {
  struct image *img;
  pthread_mutex_t lock;
  struct part_vec parts;
  struct lower data, backing;
  struct stream_vec streams;
};

static void
gather_init (struct gather *g, struct image *img)
{
  *g = (struct gather) { .img = img };
  g->data.g = g->backing.g = g;
  pthread_mutex_init (&g->lock, NULL);
}

/* Forget the batch; its memory is kept for the next. */
static void
gather_clear (struct gather *g)
{
  for (size_t i = 0; i < g->parts.len; ++i)
    free (g->parts.ptr[i].why);
  g->parts.len = g->streams.len = 0;
  g->data.pieces.len = g->data.ranges.len = 0;
  g->backing.pieces.len = g->backing.ranges.len = 0;
}

static void
gather_reset (struct gather *g)
{
  gather_clear (g);
  vec_reset (&g->parts);
  vec_reset (&g->streams);
  vec_reset (&g->data.pieces);
  vec_reset (&g->data.ranges);
  vec_reset (&g->backing.pieces);
  vec_reset (&g->backing.ranges);
  pthread_mutex_destroy (&g->lock);
}

static void
fail (struct gather *g, size_t part, int r, const struct err *why)
{
  struct part *p = &g->parts.ptr[part];
  LOCK_SCOPE (&g->lock);

  if (p->r < 0)
    return;
  p->r = r;
  p->why = why ? malloc (sizeof *why) : NULL;
  if (p->why)
    *p->why = *why;
}

/* --- looking up */

/* Pieces that go on where the last one ended are joined to it. */
static int
add_piece (struct lower *l, size_t part, uint8_t *to, uint64_t len, uint64_t off)
{
  struct piece *last = l->pieces.len ? &l->pieces.ptr[l->pieces.len - 1] : NULL;
  struct bdev_range *range = last ? &l->ranges.ptr[l->ranges.len - 1] : NULL;

  if (last && last->part == part && last->to + range->len == to &&
      range->off + range->len == off) {
    range->len += len;
    return 0;
  }
  if (piece_vec_reserve (&l->pieces, 1) < 0 || range_vec_reserve (&l->ranges, 1) < 0)
    return -ENOMEM;
  piece_vec_push (&l->pieces, (struct piece) { .part = part, .to = to });
  range_vec_push (&l->ranges, (struct bdev_range) { off, len });
  return 0;
}

static int
add_run (struct gather *g, size_t part, const struct run *run, uint8_t *to, uint64_t guest_off)
{
  switch (run->kind) {
  case CLUSTER_NORMAL:
    return add_piece (&g->data, part, to, run->len, run->host_off);
  case CLUSTER_UNALLOCATED:
    if (g->img->backing)
      return add_piece (&g->backing, part, to, run->len, guest_off);
    break;
  case CLUSTER_ZERO_PLAIN:
  case CLUSTER_ZERO_ALLOC:
    break;
  case CLUSTER_COMPRESSED:
    ahead_hint (g->img->file, run->host_off, run->stream_len);
    return stream_vec_push (&g->streams, (struct stream) {
        part, to, guest_off, run->len, run->host_off, run->stream_len });
  }
  memset (to, 0, run->len);
  return 0;
}

/* In a grace section. */
static void
look_up (struct gather *g, size_t part)
{
  const struct part *p = &g->parts.ptr[part];
  uint64_t done = 0;

  while (done < p->len) {
    struct err why = { 0 };
    struct run run;
    int r = map_lookup (g->img, p->guest_off + done, p->len - done, &run, &why);

    if (r == 0 && add_run (g, part, &run, p->buf + done, p->guest_off + done) < 0)
      r = err_set (&why, ENOMEM, "out of memory");
    if (r < 0) {
      fail (g, part, r, &why);
      return;
    }
    done += run.len;
  }
}

/* --- reading */

static int
piece_read (void *opaque, size_t i, const void *buf, int r, const struct err *why)
{
  struct lower *l = opaque;
  struct piece *p = &l->pieces.ptr[i];

  p->done = true;
  if (r < 0)
    fail (l->g, p->part, r, why);
  else
    memcpy (p->to, buf, l->ranges.ptr[i].len);
  return 0;
}

static void
read_lower (struct lower *l, struct bdev *d)
{
  struct err why = { 0 };
  int r = bdev_read_many (d, l->ranges.ptr, l->ranges.len, piece_read, l, &why);

  for (size_t i = 0; r < 0 && i < l->pieces.len; ++i)
    if (!l->pieces.ptr[i].done)
      fail (l->g, l->pieces.ptr[i].part, r, &why);
}

/* Fill the buffers of all parts.  In a grace section. */
static void
read_parts (struct gather *g)
{
  uint64_t last = UINT64_MAX;

  for (size_t i = 0; i < g->parts.len; ++i)
    tcache_announce (g->img, g->parts.ptr[i].guest_off, g->parts.ptr[i].len, &last);
  for (size_t i = 0; i < g->parts.len; ++i)
    look_up (g, i);
  read_lower (&g->data, g->img->data);
  read_lower (&g->backing, g->img->backing);    /* nothing if there is none */
  for (size_t i = 0; i < g->streams.len; ++i) {
    const struct stream *s = &g->streams.ptr[i];
    struct err why = { 0 };
    int r = compressed_read (g->img, s->host_off, s->host_len, s->to, s->len, s->guest_off, &why);

    if (r < 0)
      fail (g, s->part, r, &why);
  }
}

int
gather_range (struct image *img, void *buf, uint64_t len, uint64_t guest_off, struct err *err)
{
  struct gather g;
  int r;

  gather_init (&g, img);
  r = part_vec_push (&g.parts, (struct part) { guest_off, len, buf, 0, NULL });
  if (r == 0) {
    read_parts (&g);
    r = g.parts.ptr[0].r;
  }
  if (r < 0) {
    const struct err *why = g.parts.len ? g.parts.ptr[0].why : NULL;

    err_set (err, -r, "%s", why && why->code ? why->msg : strerror (-r));
  }
  gather_reset (&g);
  return r;
}

/* --- many ranges */

/* Ranges that are read together; *bytes: what their buffers need. */
static size_t
batch_length (const struct bdev_range *ranges, size_t nr, size_t *bytes)
{
  size_t n = 1;

  *bytes = ranges[0].len;
  while (n < nr && n < BATCH_RANGES && range_fits (*bytes, ranges[n].len, BATCH_BYTES))
    *bytes += ranges[n++].len;
  return n;
}

static int
add_parts (struct gather *g, const struct bdev_range *ranges, size_t n, uint8_t *buf)
{
  uint64_t size = bdev_size (&g->img->view);

  if (part_vec_reserve (&g->parts, n) < 0)
    return -ENOMEM;
  for (size_t i = 0; i < n; buf += ranges[i++].len) {
    uint64_t off = ranges[i].off, inside = off < size ? MIN (ranges[i].len, size - off) : 0;

    memset (buf + inside, 0, ranges[i].len - inside);
    part_vec_push (&g->parts, (struct part) { off, inside, buf, 0, NULL });
  }
  return 0;
}

/* Read the batch, which starts with range first, and hand it out. */
static int
read_batch (struct gather *g, const struct bdev_range *ranges, size_t first, size_t n,
            uint8_t *buf, bdev_many_fn fn, void *opaque)
{
  bool room = buf && add_parts (g, ranges + first, n, buf) == 0;
  struct err no_memory = { .code = ENOMEM, .msg = "out of memory" };
  int r = 0;

  if (room) {
    unsigned token = image_enter (g->img);

    read_parts (g);
    image_leave (g->img, token);
  }
  for (size_t i = 0; i < n && r == 0; ++i) {
    const struct part *p = room ? &g->parts.ptr[i] : NULL;

    r = p ? fn (opaque, first + i, p->buf, p->r, p->why ? p->why : &no_memory)
          : fn (opaque, first + i, NULL, -ENOMEM, &no_memory);
  }
  gather_clear (g);
  return r;
}

int
gather_many (struct image *img, const struct bdev_range *ranges, size_t nr, bdev_many_fn fn,
             void *opaque)
{
  CLEANUP_FREE uint8_t *buf = NULL;
  struct gather g;
  size_t cap = 0, n, bytes;
  int r = 0;

  gather_init (&g, img);
  for (size_t first = 0; first < nr && r == 0; first += n) {
    n = batch_length (ranges + first, nr - first, &bytes);
    if (buf == NULL || bytes > cap) {
      free (buf);
      cap = MAX (bytes, 1);
      buf = malloc (cap);
    }
    r = read_batch (&g, ranges, first, n, buf, fn, opaque);
  }
  gather_reset (&g);
  return r;
}
