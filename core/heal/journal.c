/* See journal.h.
 *
 * I1: this is the only code that changes a damaged image, and it refuses to
 * unless the journal says durably that it is committing.
 *
 * The order in which ranges are copied does not matter, nor does it matter what
 * of them a crash leaves on the disk: the journal is whole, and copying again
 * ends in the same bytes.  What is equal already is not written, so that thin
 * volumes stay thin; except in a second copy: after a write-back that failed, the
 * kernel's cache may show bytes that the disk never got.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "dev/ahead.h"
#include "heal/journal.h"
#include "heal/overlay.h"
#include "img/image.h"

#define CHUNK (UINT64_C (1) << 20)         /* bytes read at a time */
#define SECTOR 512
#define GRAIN 4096              /* bytes that are written together if one of them differs */

/* --- state */

int
journal_mark (struct bdev *file, struct bdev *healed, struct bdev *source,
              enum overlay_state state, struct err *err)
{
  uint8_t raw[FINGERPRINT_LENGTH];
  struct fingerprint f;
  uint64_t host_off;
  int r = fingerprint_read (file, &f, &host_off, err);

  if (r < 0)
    return r;
  if (state == OVERLAY_COMMITTING) {
    /* Durable as a whole before its state says so. */
    r = bdev_flush (healed, err);
    if (r == 0)
      r = fingerprint_sums (healed, &f, err);
    f.source_size = bdev_size (source);
    f.has_mtime = false;
    f.mtime_sec = f.mtime_nsec = 0;
  }
  f.state = state;
  fingerprint_encode (&f, raw);
  if (r == 0)
    r = bdev_flush (file, err);
  if (r == 0)
    r = bdev_pwrite (file, raw, sizeof raw, host_off, 0, err);
  return r < 0 ? r : bdev_flush (file, err);
}

static int
refuse_changed (struct bdev *file, struct bdev *source, struct err *err)
{
  return err_set (err, EINVAL, "%s was changed since a repair of it began to be written into it "
                  "from the journal %s, or the journal belongs to another image.  Nothing was "
                  "written now.  If the image was replaced by a good one (a backup), remove the "
                  "journal", source->name, file->name);
}

int
journal_accept (struct bdev *file, struct bdev *source, struct bdev **healed,
                struct err *err)
{
  struct fingerprint then, now;
  struct bdev *d = NULL;
  uint64_t host_off;
  int r = fingerprint_read (file, &then, &host_off, err);

  if (r == 0)
    r = overlay_reopen (file, source, &d, err);
  if (r < 0)
    return r;
  if (bdev_size (source) != then.source_size && bdev_size (source) != bdev_size (d))
    r = refuse_changed (file, source, err);
  if (r == 0)
    r = fingerprint_sums (d, &now, err);
  if (r == 0 && (now.edges_crc != then.edges_crc || now.samples_crc != then.samples_crc))
    r = refuse_changed (file, source, err);
  if (r == 0)
    *healed = d;
  else
    bdev_unref (d);
  return r;
}

/* --- copying */

#define MAX_EXTENTS 1024

struct extent {
  uint64_t off, len;
  uint64_t first_chunk;         /* chunks in the list before it */
  bool zero;
};

struct copy {
  struct bdev *healed, *source;
  uint8_t *want, *have;         /* CHUNK bytes each */
  bool again;                   /* write also what seems to be there already */
  struct progress *progress;
  struct journal_result *res;
  struct err *err;
  /* Copied together, so that a far source is asked ahead. */
  struct extent list[MAX_EXTENTS];
  size_t nr;
  uint64_t chunks;              /* in all of them */
  size_t at;                    /* of the chunk that was asked for last */
  struct ahead ahead;
};

/* Bytes of buf from at on, in whole grains, that are (or are not) as in the source. */
static size_t
run_of (const struct copy *c, size_t at, size_t len, bool equal)
{
  size_t end = at;

  while (end < len) {
    size_t n = MIN (len - end, GRAIN);

    if ((memcmp (c->want + end, c->have + end, n) == 0) != equal)
      break;
    end += n;
  }
  return end - at;
}

static int
change (struct copy *c, size_t at, size_t len, uint64_t off, bool zero)
{
  if (zero) {
    c->res->bytes_zeroed += len;
    return bdev_zero (c->source, off + at, len, BDEV_MAY_TRIM, c->err);
  }
  c->res->bytes_written += len;
  return bdev_pwrite (c->source, c->want + at, len, off + at, 0, c->err);
}

static int
copy_chunk (struct copy *c, uint64_t off, size_t len, bool zero)
{
  int r = c->again ? 0 : bdev_pread (c->source, c->have, len, off, c->err);

  if (r == 0 && !zero)
    r = bdev_pread (c->healed, c->want, len, off, c->err);
  else if (r == 0)
    memset (c->want, 0, len);
  if (r == 0 && c->again)
    return change (c, 0, len, off, zero);
  for (size_t at = 0; r == 0 && at < len; ) {
    size_t n;

    at += run_of (c, at, len, true);
    n = run_of (c, at, len, false);
    if (n)
      r = change (c, at, n, off, zero);
    at += n;
  }
  return r;
}

static int
copy_extent (struct copy *c, const struct extent *e)
{
  uint64_t off = e->off, len = e->len;
  int r = 0;

  while (r == 0 && len > 0) {
    size_t n = MIN (len, CHUNK);

    ahead_at (&c->ahead, e->first_chunk + (off - e->off) / CHUNK);
    r = copy_chunk (c, off, n, e->zero);
    off += n;
    len -= n;
    progress_update (c->progress, "writing the repair into the image", off,
                     bdev_size (c->healed));
  }
  return r;
}

/* What the source has where chunk i of the list goes. */
static bool
range_of_chunk (void *opaque, uint64_t i, struct bdev_range *range)
{
  struct copy *c = opaque;
  const struct extent *e;

  /* Chunks come in order, but announcing runs before copying. */
  while (c->at > 0 && c->list[c->at].first_chunk > i)
    --c->at;
  while (c->at + 1 < c->nr && c->list[c->at + 1].first_chunk <= i)
    ++c->at;
  e = &c->list[c->at];
  range->off = e->off + (i - e->first_chunk) * CHUNK;
  range->len = MIN (CHUNK, e->off + e->len - range->off);
  return !c->again;
}

static int
copy_list (struct copy *c)
{
  int r = 0;

  ahead_init (&c->ahead, c->source, c->chunks, range_of_chunk, c);
  c->at = 0;
  for (size_t i = 0; r == 0 && i < c->nr; ++i)
    r = copy_extent (c, &c->list[i]);
  c->nr = c->chunks = 0;
  return r;
}

static int
add_extent (void *opaque, uint64_t off, uint64_t len, unsigned kind)
{
  struct copy *c = opaque;

  if (kind == BDEV_HOLE)
    return 0;
  c->list[c->nr++] = (struct extent) { off, len, c->chunks, kind & BDEV_ZERO };
  c->chunks += DIV_ROUND_UP (len, CHUNK);
  return c->nr == MAX_EXTENTS ? copy_list (c) : 0;
}

/* QEMU counts disks in sectors, so an overlay is longer than a source that ends inside one, by
 * zeros: what a partial last cluster reads as anyway.
 */
static bool
only_zeros_from (struct bdev *d, uint64_t off, uint64_t len)
{
  uint8_t tail[SECTOR];

  if (len >= SECTOR || bdev_pread (d, tail, len, off, NULL) < 0)
    return false;
  for (uint64_t i = 0; i < len; ++i)
    if (tail[i])
      return false;
  return true;
}

int
journal_fits (struct bdev *healed, struct bdev *source, struct err *err)
{
  uint64_t want = bdev_size (healed), have = bdev_size (source);

  if (want <= have || source->can_grow || only_zeros_from (healed, have, want - have))
    return 0;
  return err_set (err, ENOSPC, "%s cannot grow: it has %llu bytes, with what is in the overlay it "
                  "would need %llu.  Nothing was written into it", source->name,
                  (unsigned long long) have, (unsigned long long) want);
}

static int
copy_all (struct copy *c, struct bdev *file, struct err *err)
{
  uint64_t size = bdev_size (c->healed);
  int r = journal_fits (c->healed, c->source, err);

  c->res->old_size = bdev_size (c->source);
  if (!c->source->can_grow)
    size = MIN (size, c->res->old_size);
  if (r == 0 && size > c->res->old_size)
    r = bdev_resize (c->source, size, err);
  c->res->new_size = bdev_size (c->source);
  if (r == 0)
    r = overlay_extents (file, size, add_extent, c, err);
  if (r == 0)
    r = copy_list (c);
  return r < 0 ? r : bdev_flush (c->source, err);
}

int
journal_copy (struct bdev *file, struct bdev *healed, struct bdev *source, bool again,
              struct progress *progress, struct journal_result *res, struct err *err)
{
  CLEANUP_FREE uint8_t *want = malloc (CHUNK), *have = malloc (CHUNK);
  struct copy c = { .healed = healed, .source = source, .want = want, .have = have,
                    .again = again, .progress = progress, .res = res, .err = err };
  struct fingerprint f;
  uint64_t host_off;
  int r = fingerprint_read (file, &f, &host_off, err);

  memset (res, 0, sizeof *res);
  if (r < 0)
    return r;
  if (!want || !have)
    return err_set (err, ENOMEM, "out of memory");
  if (f.state != OVERLAY_COMMITTING)    /* I1 */
    return err_set (err, EINVAL, "%s: it is not marked as being written into %s", file->name,
                    source->name);
  return copy_all (&c, file, err);
}
