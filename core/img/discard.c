/* Zero and trim: guest clusters that lose their contents.
 *
 * Whole clusters change their entry, nothing is written:
 *
 *   version 3   the zero flag, with the host cluster kept for later if the
 *               caller wants the space to stay allocated
 *   otherwise   no entry at all, where that reads as zeros (no backing file)
 *
 * Host clusters that lose their reference are freed, and punched into the file,
 * only after that is durable and nobody uses them any more (I3; commit.c).
 * What does not fill a cluster is written as zeros, unless it reads as zeros
 * anyway; a trim leaves it alone.  Version 2 over a backing file knows no way
 * to say "zeros" but to write them, so there zero writes and trim does nothing.
 *
 * With extended L2 entries the same is done to subclusters, in their bitmap; the
 * host cluster goes with its last subcluster.
 *
 * In an external data file, clusters are not freed but punched, at once.  If it
 * must be readable as a raw image, it gets the zeros instead of the entries.
 *
 * A cluster that the end of the disk cuts off counts as whole.
 */
#include <errno.h>
#include <string.h>

#include "img/image-int.h"

#define ZERO_CHUNK 65536

static const uint8_t zeros[ZERO_CHUNK];

static bool
run_is_zero (const struct image *img, const struct run *run, uint64_t guest_off)
{
  if (run->kind == CLUSTER_UNALLOCATED)
    return img->backing == NULL || guest_off >= bdev_size (img->backing);
  return run->kind == CLUSTER_ZERO_PLAIN || run->kind == CLUSTER_ZERO_ALLOC;
}

/* How many bytes from guest_off on read as zeros without a look at them (*zero),
 * or may not.
 */
static int
probe_zero (struct image *img, uint64_t guest_off, uint64_t max, uint64_t *len, bool *zero,
            struct err *err)
{
  unsigned token = image_enter (img);
  struct run run;
  int r = map_lookup (img, guest_off, max, &run, err);

  image_leave (img, token);
  if (r < 0)
    return r;
  *len = run.len;
  *zero = run_is_zero (img, &run, guest_off);
  /* A backing file that ends inside the run. */
  if (!*zero && run.kind == CLUSTER_UNALLOCATED)
    *len = MIN (run.len, bdev_size (img->backing) - guest_off);
  return 0;
}

/* Would zeros have to be written here? */
static int
needs_zeros (struct image *img, uint64_t guest_off, uint64_t len, struct err *err)
{
  while (len > 0) {
    uint64_t n;
    bool zero;
    int r = probe_zero (img, guest_off, len, &n, &zero, err);

    if (r < 0 || !zero)
      return r < 0 ? r : 1;
    guest_off += n;
    len -= n;
  }
  return 0;
}

static int
write_zeros (struct image *img, uint64_t guest_off, uint64_t len, struct err *err)
{
  while (len > 0) {
    uint64_t n, left;
    bool zero;
    int r = probe_zero (img, guest_off, len, &n, &zero, err);

    if (r < 0)
      return r;
    for (left = zero ? 0 : n; left > 0; left -= MIN (left, ZERO_CHUNK)) {
      r = write_range (img, zeros, MIN (left, ZERO_CHUNK), guest_off + (n - left), 0, err);
      if (r < 0)
        return r;
    }
    guest_off += n;
    len -= n;
  }
  return 0;
}

/* --- whole clusters and subclusters */

/* The entry of a cluster that is to read as zeros.  *drop: it loses its host
 * clusters.
 */
static uint64_t
zeroed_entry (const struct image *img, struct l2_pair p, uint64_t guest_off, bool discard,
              bool *drop)
{
  struct l2_entry e = map_decode (img, p, 0);
  /* Version 2 gets here only where unallocated reads as zeros. */
  uint64_t gone = img->g.version >= 3 && (img->backed || !discard) ? L2E_ZERO : 0;

  *drop = false;
  switch (e.kind) {
  case CLUSTER_UNALLOCATED:
    return backing_is_zero (img, guest_off) ? p.raw : L2E_ZERO;
  case CLUSTER_ZERO_PLAIN:
    return p.raw;
  case CLUSTER_ZERO_ALLOC:
    if (!discard)
      return p.raw;
    break;
  case CLUSTER_NORMAL:
    if (!discard && e.copied && img->g.version >= 3)
      return p.raw | L2E_ZERO;
    break;
  case CLUSTER_COMPRESSED:
    break;
  }
  *drop = true;
  return gone;
}

/* The same for the subclusters in mask; the others stay.  The host cluster goes
 * with the last subcluster in it, unless it is ours and to be kept.
 */
static struct l2_pair
zeroed_pair (const struct image *img, struct l2_pair p, uint64_t guest_off, uint32_t mask,
             bool discard, bool *drop)
{
  uint32_t alloc = p.bitmap, zero = p.bitmap >> 32, left;

  if (!img->g.extended_l2)
    return (struct l2_pair) { .raw = zeroed_entry (img, p, guest_off, discard, drop) };
  *drop = false;
  if (p.raw & L2E_COMPRESSED) {
    if (mask != UINT32_MAX)
      return p;                 /* see whole_compressed */
    *drop = true;
    return (struct l2_pair) { .bitmap = img->backed || !discard ? BITMAP_ALL_ZERO : 0 };
  }
  left = alloc & ~mask;
  if (l2_has_host (p.raw, &img->g) && left == 0 && ((alloc & mask) || mask == UINT32_MAX))
    *drop = discard || !map_decode (img, p, 0).copied;
  if (!backing_is_zero (img, guest_off))
    zero |= mask;
  else if (img->backed || !discard)
    zero |= mask & alloc;
  return (struct l2_pair) {
    .raw = *drop ? 0 : p.raw,
    .bitmap = left | (uint64_t) zero << 32,
  };
}

/* What is past the end of the disk in a data file is not ours. */
static uint64_t
data_end (struct image *img)
{
  return MIN (bdev_size (img->data), bdev_size (&img->view));
}

/* In a data file no refcount says when a cluster may be punched.  But nothing
 * else is ever put there, so now is as good as later: until the entry changes,
 * on disk too, it shows zeros, which is what was asked for.
 */
static void
punch_data (struct image *img, uint64_t host_off)
{
  uint64_t size = data_end (img);

  /* That space could not be given back is no reason to fail. */
  if (host_off < size)
    bdev_zero (img->data, host_off, MIN (img->g.cluster_size, size - host_off),
               BDEV_MAY_TRIM | BDEV_FAST, NULL);
}

/* [guest_off, guest_off+len), in one slice, aligned to subclusters (clusters where
 * there are none); under the range lock, in a grace section.
 */
static int
discard_slice_locked (struct image *img, uint64_t guest_off, uint64_t len, bool discard,
                      struct err *err)
{
  uint64_t frees[MAX_SLICE_ENTRIES * MAX_ENTRY_REFS], end = guest_off + len;
  uint64_t base = ROUND_DOWN (guest_off, img->g.cluster_size);
  unsigned n = DIV_ROUND_UP (end - base, img->g.cluster_size);
  struct l2_pair p[MAX_SLICE_ENTRIES];
  size_t nr_frees = 0;
  bool changed = false;
  int r = map_entries (img, base, n, p, err);

  for (unsigned i = 0; r == 0 && i < n; ++i) {
    uint64_t off = base + ((uint64_t) i << img->g.cluster_bits);
    struct l2_entry e = l2_entry_decode (p[i].raw, p[i].bitmap, &img->g);
    struct l2_pair old = p[i];
    bool drop;

    p[i] = zeroed_pair (img, old, off, map_touched (img, off, guest_off, end), discard, &drop);
    changed |= p[i].raw != old.raw || p[i].bitmap != old.bitmap;
    if (drop)
      nr_frees += map_entry_frees (img, &e, discard, frees + nr_frees);
    if (drop && discard && img->g.data_file)
      punch_data (img, e.host_off);
  }
  if (r == 0 && changed) {
    r = map_ensure_table (img, base, err);
    if (r == 0)
      r = map_update (img, base, n, p, frees, nr_frees, err);
  }
  return r;
}

static int
discard_slice (struct image *img, uint64_t guest_off, uint64_t len, bool discard,
               struct err *err)
{
  struct range_lock rl;
  unsigned token;
  int r;

  range_lock (img, &rl, guest_off, len);
  token = image_enter (img);
  r = discard_slice_locked (img, guest_off, len, discard, err);
  range_unlock (img, &rl);
  image_leave (img, token);
  return r;
}

/* Bytes from guest_off on that have no L2 table and need none, up to max. */
static uint64_t
skip_absent (struct image *img, uint64_t guest_off, uint64_t max)
{
  uint64_t skipped = 0;

  while (skipped < max && backing_is_zero (img, guest_off + skipped)) {
    uint64_t off = guest_off + skipped;

    if (map_l1 (img, map_l1_index (img, off)) != 0)
      break;
    skipped += img->g.l2_coverage - (off & (img->g.l2_coverage - 1));
  }
  return MIN (skipped, max);
}

static int
discard_clusters (struct image *img, uint64_t guest_off, uint64_t len, bool discard,
                  struct err *err)
{
  uint64_t cover = UINT64_C (1) << img->slice_cover_bits;
  bool retried = false;
  int r = 0;

  while (r == 0 && len > 0) {
    uint64_t n = skip_absent (img, guest_off, len);

    if (n == 0) {
      if (commit_wanted (img))
        r = commit_flush (img, err);
      n = MIN (len, cover - (guest_off & (cover - 1)));
      if (r == 0)
        r = discard_slice (img, guest_off, n, discard, err);
      if (r == -ENOSPC && !retried) {
        retried = true;
        r = commit_for_space (img, r, err);
        if (r == 1) {
          r = 0;
          continue;
        }
      }
      if (r < 0)
        break;
    }
    guest_off += n;
    len -= n;
  }
  return r;
}

/* A compressed cluster has no subclusters: shrink [*first, *last), which is
 * aligned to subclusters, so that it takes in all or nothing of one.
 */
static int
whole_compressed (struct image *img, uint64_t *first, uint64_t *last, struct err *err)
{
  uint64_t ends[2] = { *first, *last };
  uint64_t cs = img->g.cluster_size;

  for (unsigned i = 0; i < 2 && *first < *last; ++i) {
    struct run run;
    unsigned token;
    int r;

    if (IS_ALIGNED (ends[i], cs))
      continue;
    token = image_enter (img);
    r = map_lookup (img, ends[i] - i, 1, &run, err);
    image_leave (img, token);
    if (r < 0)
      return r;
    if (run.kind == CLUSTER_COMPRESSED && i == 0)
      *first = MIN (ROUND_UP (ends[i], cs), *last);
    else if (run.kind == CLUSTER_COMPRESSED)
      *last = MAX (ROUND_DOWN (ends[i], cs), *first);
  }
  return 0;
}

/* The part [*first, *last) of a request that can be had by changing entries.  At
 * the end of the disk, limit, the last cluster counts as whole.  Both are the
 * request's end if there is none.
 */
static int
changeable_part (struct image *img, uint64_t guest_off, uint64_t len, uint64_t limit,
                 uint64_t *first, uint64_t *last, struct err *err)
{
  uint64_t end = guest_off + len;
  int r = 0;

  *first = ROUND_UP (guest_off, img->unit_size);
  *last = end == limit ? ROUND_UP (end, img->g.cluster_size) : ROUND_DOWN (end, img->unit_size);
  if (*first < *last && img->g.extended_l2)
    r = whole_compressed (img, first, last, err);
  if (*first >= *last || (img->g.version < 3 && img->backed))
    *first = *last = end;
  return r;
}

/* A raw data file must hold the zeros itself.  The entries may stay as they are:
 * those without a cluster there read as zeros, and so does the data file.
 */
static int
zero_raw_data (struct image *img, uint64_t guest_off, uint64_t len, unsigned flags,
               struct err *err)
{
  uint64_t size = data_end (img);

  if (guest_off >= size)
    return 0;
  return bdev_zero (img->data, guest_off, MIN (len, size - guest_off),
                    flags & (BDEV_MAY_TRIM | BDEV_FAST), err);
}

/* --- requests */

int
discard_zero (struct image *img, uint64_t guest_off, uint64_t len, uint64_t limit,
              unsigned flags, struct err *err)
{
  uint64_t end = guest_off + len, first = end, last = end;
  int r = image_begin_change (img, err);

  if (r == 0)
    bitmaps_mark (img, guest_off, len);
  if (r == 0 && img->raw_data)
    r = zero_raw_data (img, guest_off, len, flags, err);
  if (r == 0 && !(img->raw_data && !img->backed)) {
    r = changeable_part (img, guest_off, len, limit, &first, &last, err);
    if (r == 0 && (flags & BDEV_FAST)) {
      r = needs_zeros (img, guest_off, first - guest_off, err);
      if (r == 0 && last < end)
        r = needs_zeros (img, last, end - last, err);
      if (r == 1)
        r = err_set (err, ENOTSUP, "%s: zeros would have to be written", img->view.name);
    }
    if (r == 0)
      r = write_zeros (img, guest_off, first - guest_off, err);
    if (r == 0)
      r = discard_clusters (img, first, last - first, flags & BDEV_MAY_TRIM, err);
    if (r == 0 && last < end)
      r = write_zeros (img, last, end - last, err);
  }
  if (r == 0 && (flags & BDEV_FUA))
    r = commit_flush (img, err);
  return r;
}

int
discard_trim (struct image *img, uint64_t guest_off, uint64_t len, unsigned flags,
              struct err *err)
{
  uint64_t first, last;
  int r = image_begin_change (img, err);

  if (r == 0)
    bitmaps_mark (img, guest_off, len);
  if (r == 0)
    r = changeable_part (img, guest_off, len, bdev_size (&img->view), &first, &last, err);
  if (r == 0 && img->raw_data)
    r = zero_raw_data (img, first, last - first, BDEV_MAY_TRIM, err);
  if (r == 0 && !(img->raw_data && !img->backed))
    r = discard_clusters (img, first, last - first, true, err);
  if (r == 0 && (flags & BDEV_FUA))
    r = commit_flush (img, err);
  return r;
}
