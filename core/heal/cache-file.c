/* See cache-file.h.
 *
 * Per cluster of the file two bits: it is there; somebody is fetching it.  Whoever needs a cluster
 * that is being fetched waits for it, so each is read from the source once.  A cluster is written
 * to the file, as data or as zeros, before its bit is set.  Crash safety is the image layer's: an
 * entry that is durable names data that is.
 *
 * Where a whole cluster cannot be read, the bytes that were asked for are tried alone and kept
 * nowhere, so that a bad sector costs no more than itself.
 *
 * Deliberately not here: limits of size.  The file can become as large as the source.
 */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/num.h"
#include "base/vec.h"
#include "dev/many.h"
#include "heal/cache-file.h"
#include "heal/overlay.h"

#define UNIT        (UINT64_C (1) << OVERLAY_CLUSTER_BITS)
#define MAX_FETCH   (UINT64_C (1) << 20)        /* bytes of one read of the source */
#define MAX_BATCH   (UINT64_C (32) << 20)       /* bytes fetched for one part of a read_many */
#define FLUSH_BYTES (UINT64_C (64) << 20)
#define FLUSH_MS    1000

DEFINE_VEC (cluster_vec, uint64_t);
DEFINE_VEC (range_vec, struct bdev_range);

struct cache {
  struct bdev d;
  struct bdev *source;
  struct bdev *view;            /* the file, over the source */
  pthread_mutex_t lock;
  pthread_cond_t cond;          /* something has been fetched, or could not be */
  /* protected by lock: bits, by cluster */
  uint64_t *here, *busy;
  struct cluster_vec fresh;     /* that are here, and no flush has begun since */
  uint64_t unflushed;           /* bytes */
  uint64_t flushed_ms;
  atomic_bool full;             /* nothing more is kept */
};

static bool
bit (const uint64_t *bits, uint64_t i)
{
  return bits[i / 64] >> i % 64 & 1;
}

static void
set_bit (uint64_t *bits, uint64_t i, bool on)
{
  if (on)
    bits[i / 64] |= UINT64_C (1) << i % 64;
  else
    bits[i / 64] &= ~(UINT64_C (1) << i % 64);
}

/* --- keeping */

static void
stop_keeping (struct cache *c, const struct err *why)
{
  if (!atomic_exchange (&c->full, true))
    log_notice ("%s: what is read from now on is not kept: %s", c->d.name, why->msg);
}

/* Bytes whose flush failed may be others when the kernel reads them again. */
static void
forget (struct cache *c, struct cluster_vec *clusters)
{
  for (size_t i = 0; i < clusters->len; ++i)
    set_bit (c->here, clusters->ptr[i], false);
  clusters->len = 0;
}

static void
flush_failed (struct cache *c, struct cluster_vec *flushed, const struct err *why)
{
  stop_keeping (c, why);
  LOCK_SCOPE (&c->lock);
  forget (c, flushed);
  forget (c, &c->fresh);
}

/* Now and then what was kept is made durable. */
static void
flush_sometimes (struct cache *c, uint64_t len)
{
  uint64_t now = clock_ms ();
  struct cluster_vec flushed;
  struct err why = { 0 };

  {
    LOCK_SCOPE (&c->lock);
    c->unflushed += len;
    if (c->unflushed < FLUSH_BYTES && now - c->flushed_ms < FLUSH_MS)
      return;
    c->unflushed = 0;
    c->flushed_ms = now;
    flushed = c->fresh;
    c->fresh = (struct cluster_vec) VEC_INIT;
  }
  if (bdev_flush (c->view, &why) < 0)
    flush_failed (c, &flushed, &why);
  vec_reset (&flushed);
}

static bool
is_zero (const uint8_t *p, size_t len)
{
  return p[0] == 0 && memcmp (p, p + 1, len - 1) == 0;
}

/* Whole clusters, but for the last of the source. */
static void
keep (struct cache *c, uint64_t off, const uint8_t *buf, uint64_t len)
{
  struct err why = { 0 };
  int r = atomic_load (&c->full) ? -ENOSPC : 0;

  for (uint64_t at = 0; r == 0 && at < len; at += UNIT) {
    uint64_t n = MIN (len - at, UNIT);

    if (is_zero (buf + at, n))
      r = bdev_zero (c->view, off + at, n, BDEV_MAY_TRIM, &why);
    else
      r = bdev_pwrite (c->view, buf + at, n, off + at, 0, &why);
    if (r < 0)
      break;
    LOCK_SCOPE (&c->lock);
    r = cluster_vec_push (&c->fresh, (off + at) / UNIT);
    set_bit (c->here, (off + at) / UNIT, r == 0);
  }
  if (r < 0 && why.code)
    stop_keeping (c, &why);
  else if (r == 0)
    flush_sometimes (c, len);
}

/* --- who fetches what */

/* From cluster i on, before end: either *nr clusters that are here (true), or *nr that this thread
 * is to fetch (they are marked busy).  Waits for those that others fetch.
 */
static bool
find_run (struct cache *c, uint64_t i, uint64_t end, uint64_t max, uint64_t *nr)
{
  uint64_t n = 0;
  LOCK_SCOPE (&c->lock);

  while (!bit (c->here, i) && bit (c->busy, i))
    pthread_cond_wait (&c->cond, &c->lock);
  if (bit (c->here, i)) {
    while (i + n < end && bit (c->here, i + n))
      ++n;
    *nr = n;
    return true;
  }
  while (i + n < end && n < max && !bit (c->here, i + n) && !bit (c->busy, i + n))
    set_bit (c->busy, i + n++, true);
  *nr = n;
  return false;
}

static void
no_longer_busy (struct cache *c, uint64_t i, uint64_t nr)
{
  LOCK_SCOPE (&c->lock);
  for (uint64_t n = 0; n < nr; ++n)
    set_bit (c->busy, i + n, false);
  pthread_cond_broadcast (&c->cond);
}

/* --- reading one range */

/* [off, off+len) lies in clusters [i, i+nr), which are ours to fetch. */
static int
fetch (struct cache *c, uint64_t i, uint64_t nr, uint8_t *to, uint64_t off, uint64_t len,
       struct err *err)
{
  uint64_t from = i * UNIT, bytes = MIN (nr * UNIT, bdev_size (&c->d) - from);
  CLEANUP_FREE uint8_t *buf = atomic_load (&c->full) ? NULL : malloc (bytes);
  int r = buf ? bdev_pread (c->source, buf, bytes, from, NULL) : -ENOMEM;

  if (r == 0) {
    memcpy (to, buf + (off - from), len);
    keep (c, from, buf, bytes);
  }
  no_longer_busy (c, i, nr);
  return r == 0 ? 0 : bdev_pread (c->source, to, len, off, err);
}

/* A disk of ours that has failed is no reason to refuse what can be had elsewhere. */
static int
read_kept (struct cache *c, void *buf, uint64_t len, uint64_t off, struct err *err)
{
  struct err why = { 0 };

  if (bdev_pread (c->view, buf, len, off, &why) == 0)
    return 0;
  log_debug ("%s", why.msg);
  return bdev_pread (c->source, buf, len, off, err);
}

static int
cache_pread (struct bdev *d, void *buf, size_t len, uint64_t off, struct err *err)
{
  struct cache *c = (struct cache *) d;
  uint8_t *p = buf;
  int r = 0;

  while (r == 0 && len > 0) {
    uint64_t i = off / UNIT, end = (off + len - 1) / UNIT + 1, nr, n;
    bool here = find_run (c, i, end, MAX_FETCH / UNIT, &nr);

    n = MIN (len, (i + nr) * UNIT - off);
    r = here ? read_kept (c, p, n, off, err) : fetch (c, i, nr, p, off, n, err);
    p += n;
    off += n;
    len -= n;
  }
  return r;
}

/* --- reading many */

struct gathering {
  struct cache *c;
  struct range_vec ranges;      /* whole clusters that are ours to fetch */
};

/* Mark what of the range nobody has and nobody fetches as ours. */
static int
gather (struct gathering *g, const struct bdev_range *range)
{
  struct cache *c = g->c;
  uint64_t size = bdev_size (&c->d), i, end;
  int r = 0;

  if (range->len == 0 || range->off >= size)
    return 0;
  i = range->off / UNIT;
  end = (range->off + MIN (range->len, size - range->off) - 1) / UNIT + 1;
  LOCK_SCOPE (&c->lock);
  for (; r == 0 && i < end; ++i) {
    struct bdev_range *last = g->ranges.len ? &g->ranges.ptr[g->ranges.len - 1] : NULL;

    if (bit (c->here, i) || bit (c->busy, i))
      continue;
    if (last && last->off + last->len == i * UNIT && last->len < MAX_FETCH)
      last->len += UNIT;
    else
      r = range_vec_push (&g->ranges, (struct bdev_range) { i * UNIT, UNIT });
    if (r == 0)
      set_bit (c->busy, i, true);
  }
  return r;
}

static int
gathered (void *opaque, size_t i, const void *buf, int r, const struct err *why)
{
  struct gathering *g = opaque;
  const struct bdev_range *range = &g->ranges.ptr[i];

  if (r == 0)
    keep (g->c, range->off, buf, MIN (range->len, bdev_size (&g->c->d) - range->off));
  no_longer_busy (g->c, range->off / UNIT, range->len / UNIT);
  return 0;                     /* what failed is asked for again, by itself */
}

/* How many of the ranges from i on are worth one journey. */
static size_t
count_batch (const struct bdev_range *ranges, size_t i, size_t nr)
{
  uint64_t bytes = 0;
  size_t n = 0;

  while (i + n < nr && bytes < MAX_BATCH)
    bytes += ROUND_UP (MIN ((uint64_t) ranges[i + n++].len, MAX_BATCH), UNIT) + UNIT;
  return n;
}

struct shifted {
  bdev_many_fn fn;
  void *opaque;
  size_t first;
};

static int
call_shifted (void *opaque, size_t i, const void *buf, int r, const struct err *why)
{
  struct shifted *s = opaque;

  return s->fn (s->opaque, s->first + i, buf, r, why);
}

static int
cache_read_many (struct bdev *d, const struct bdev_range *ranges, size_t nr, bdev_many_fn fn,
                 void *opaque, struct err *err)
{
  struct cache *c = (struct cache *) d;
  int r = 0;

  if (atomic_load (&c->full))
    return bdev_read_many (c->source, ranges, nr, fn, opaque, err);
  for (size_t i = 0, n; r == 0 && i < nr; i += n) {
    struct gathering g = { .c = c, .ranges = VEC_INIT };
    struct shifted s = { .fn = fn, .opaque = opaque, .first = i };

    n = count_batch (ranges, i, nr);
    for (size_t j = i; j < i + n; ++j)
      if (gather (&g, &ranges[j]) < 0)
        break;                  /* no memory: it is read one by one */
    bdev_read_many (c->source, g.ranges.ptr, g.ranges.len, gathered, &g, NULL);
    vec_reset (&g.ranges);
    r = many_read (d, ranges + i, n, call_shifted, &s, err);    /* from the file, by and large */
  }
  return r;
}

static bool
wanted_locked (const struct cache *c, uint64_t i)
{
  return !bit (c->here, i) && !bit (c->busy, i);
}

/* Not what is being fetched: who fetches it did not look for what was announced. */
static int
cache_cache (struct bdev *d, uint64_t off, uint64_t len, struct err *err)
{
  struct cache *c = (struct cache *) d;
  uint64_t end = (off + len - 1) / UNIT + 1, size = bdev_size (d);
  int r = 0;

  for (uint64_t i = off / UNIT, n; i < end && r == 0; i += n) {
    bool wanted;

    {
      LOCK_SCOPE (&c->lock);
      wanted = wanted_locked (c, i);
      for (n = 1; i + n < end && wanted_locked (c, i + n) == wanted; ++n)
        ;
    }
    if (wanted)
      r = bdev_cache (c->source, i * UNIT, MIN (n * UNIT, size - i * UNIT), err);
  }
  return r;
}

static int
cache_extents (struct bdev *d, uint64_t off, uint64_t len, bdev_extent_fn fn, void *opaque,
               struct err *err)
{
  return bdev_extents (((struct cache *) d)->source, off, len, fn, opaque, err);
}

static int
cache_make_writable (struct bdev *d, struct err *err)
{
  return err_set (err, EROFS, "%s: with cache= it is only read; overlay=FILE takes what is written",
                  d->name);
}

static int
cache_identity (struct bdev *d, struct bdev_identity *id, struct err *err)
{
  return bdev_identity (((struct cache *) d)->source, id, err);
}

/* --- life */

static void
cache_close (struct bdev *d)
{
  struct cache *c = (struct cache *) d;

  bdev_unref (c->view);         /* flushes */
  bdev_unref (c->source);
  free (c->here);
  free (c->busy);
  vec_reset (&c->fresh);
  pthread_mutex_destroy (&c->lock);
  pthread_cond_destroy (&c->cond);
  free (c);
}

static const struct bdev_ops cache_ops = {
  .kind = "cache",
  .pread = cache_pread,
  .read_many = cache_read_many,
  .extents = cache_extents,
  .cache = cache_cache,
  .make_writable = cache_make_writable,
  .identity = cache_identity,
  .close = cache_close,
};

/* What the file has from an earlier start. */
static int
note_extent (void *opaque, uint64_t off, uint64_t len, unsigned kind)
{
  struct cache *c = opaque;
  uint64_t size = bdev_size (&c->d), end = MIN (off + len, ROUND_UP (size, UNIT));

  if (kind != BDEV_HOLE)
    for (uint64_t i = DIV_ROUND_UP (off, UNIT); (i + 1) * UNIT <= end || (i * UNIT < size && end >= size);
         ++i)
      set_bit (c->here, i, true);
  return 0;
}

/* --- opening */

#define PROBES      256         /* places that are compared with the source */
#define PROBE_BYTES 4096
#define MAX_KEPT    (UINT64_C (1) << 50)        /* bytes of a source; each 64 KiB cost two bits of RAM */

struct probing {
  struct cache *c;
  const struct bdev_range *ranges;
  atomic_bool differs;
};

static int
probed (void *opaque, size_t i, const void *buf, int r, const struct err *why)
{
  struct probing *p = opaque;
  uint8_t kept[PROBE_BYTES];

  if (r == 0 && bdev_pread (p->c->view, kept, p->ranges[i].len, p->ranges[i].off, NULL) == 0
      && memcmp (buf, kept, p->ranges[i].len) != 0)
    atomic_store (&p->differs, true);
  return 0;                     /* what cannot be read says nothing */
}

/* Some place in a cluster that is kept; false: none was found. */
static bool
choose_probe (const struct cache *c, struct bdev_range *range)
{
  uint64_t size = bdev_size (&c->d), nr = DIV_ROUND_UP (size, UNIT);
  uint64_t dice[2] = { 0 };

  if (getrandom (dice, sizeof dice, GRND_NONBLOCK) < 0)
    dice[0] = clock_ms () * UINT64_C (0x9e3779b97f4a7c15);
  for (uint64_t n = 0, i = dice[0] % nr; n < MIN (nr, UINT64_C (4096)); ++n, i = (i + 1) % nr)
    if (bit (c->here, i)) {
      uint64_t in_unit = dice[1] % (UNIT / PROBE_BYTES) * PROBE_BYTES;
      uint64_t off = i * UNIT + in_unit < size ? i * UNIT + in_unit : i * UNIT;

      *range = (struct bdev_range) { off, MIN (size - off, (uint64_t) PROBE_BYTES) };
      return true;
    }
  return false;
}

/* Does what is kept look as if the source had changed since? */
static int
compare_kept (struct cache *c, const char *path, struct err *err)
{
  struct bdev_range ranges[PROBES];
  struct probing p = { .c = c, .ranges = ranges };
  size_t nr = 0;

  while (bdev_size (&c->d) > 0 && nr < PROBES && choose_probe (c, &ranges[nr]))
    ++nr;
  bdev_read_many (c->source, ranges, nr, probed, &p, NULL);
  if (!atomic_load (&p.differs))
    return 0;
  return err_set (err, EINVAL, "%s: what is kept there of %s is not what is there now: the image was "
                  "written to since, or it is another one.  Remove the cache, or name another file",
                  path, c->d.name);
}

static int
cache_new (struct bdev *source, struct cache **ret, struct err *err)
{
  struct cache *c;
  uint64_t nr = DIV_ROUND_UP (bdev_size (source), UNIT) / 64 + 1;
  int r;

  if (bdev_size (source) > MAX_KEPT)
    return err_set (err, EFBIG, "%s: an image of %llu bytes is too large for cache=; leave that out",
                    source->name, (unsigned long long) bdev_size (source));
  c = calloc (1, sizeof *c);
  if (!c)
    return err_set (err, ENOMEM, "out of memory");
  r = bdev_init (&c->d, &cache_ops, source->name, bdev_size (source), false, false, err);
  if (r < 0) {
    free (c);
    return r;
  }
  c->d.far = source->far;
  c->source = bdev_ref (source);
  pthread_mutex_init (&c->lock, NULL);
  pthread_cond_init (&c->cond, NULL);
  c->flushed_ms = clock_ms ();
  c->here = calloc (nr, sizeof *c->here);
  c->busy = calloc (nr, sizeof *c->busy);
  *ret = c;
  if (c->here && c->busy)
    return 0;
  bdev_unref (&c->d);
  return err_set (err, ENOMEM, "out of memory");
}

int
cache_file_open (const char *path, struct bdev *source, const char *source_path,
                 struct bdev **ret, bool *created, struct err *err)
{
  struct overlay_options oopts = { .source_path = source_path, .cache = true };
  struct bdev *file = NULL;
  struct cache *c = NULL;
  int r = cache_new (source, &c, err);

  *created = false;
  if (r < 0)
    return r;
  oopts.file = &file;
  r = overlay_open (path, source, &oopts, &c->view, created, err);
  if (r == 0)
    r = overlay_extents (file, bdev_size (&c->d), note_extent, c, err);
  bdev_unref (file);
  if (r == 0 && !*created)
    r = compare_kept (c, path, err);
  if (r == 0)
    *ret = &c->d;
  else
    bdev_unref (&c->d);
  return r;
}
