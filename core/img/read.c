/* Reading the guest's disk, and telling which parts of it hold data.
 *
 * A request runs in one grace section: no host cluster it looked up is reused
 * before it is done.  Runs that are contiguous on the host are one read.
 *
 * Invariants: none of its own; nothing here changes anything.
 */
#include <errno.h>
#include <string.h>

#include "dev/ahead.h"
#include "img/image-int.h"

int
read_backing (struct image *img, void *buf, uint64_t len, uint64_t guest_off,
              struct err *err)
{
  if (img->backing)
    return bdev_pread_padded (img->backing, buf, len, guest_off, err);
  memset (buf, 0, len);
  return 0;
}

static int
read_run (struct image *img, const struct run *run, uint8_t *buf, uint64_t guest_off,
          struct err *err)
{
  switch (run->kind) {
  case CLUSTER_NORMAL:
    return bdev_pread_padded (img->data, buf, run->len, run->host_off, err);
  case CLUSTER_UNALLOCATED:
    return read_backing (img, buf, run->len, guest_off, err);
  case CLUSTER_ZERO_PLAIN:
  case CLUSTER_ZERO_ALLOC:
    memset (buf, 0, run->len);
    return 0;
  case CLUSTER_COMPRESSED:
    break;
  }
  return compressed_read (img, run->host_off, run->stream_len, buf, run->len, guest_off, err);
}

int
read_range (struct image *img, void *buf, uint64_t len, uint64_t guest_off,
            struct err *err)
{
  uint8_t *p = buf;
  unsigned token = image_enter (img);
  int r = 0;

  while (r == 0 && len > 0) {
    struct run run;

    r = map_lookup (img, guest_off, len, &run, err);
    if (r == 0 && img->view.far && run.len < len) {
      r = gather_range (img, p, len, guest_off, err);
      break;
    }
    if (r == 0)
      r = read_run (img, &run, p, guest_off, err);
    if (r == 0) {
      p += run.len;
      guest_off += run.len;
      len -= run.len;
    }
  }
  image_leave (img, token);
  return r;
}

/* Joins neighbours of one kind on their way to the caller's function. */
struct joiner {
  bdev_extent_fn fn;
  void *opaque;
  uint64_t off, len;            /* what has not been told yet */
  unsigned kind;
  bool stopped;
};

static int
tell (struct joiner *j)
{
  int r;

  if (j->len == 0 || j->stopped)
    return j->stopped;
  r = j->fn (j->opaque, j->off, j->len, j->kind);
  j->len = 0;
  j->stopped = r == 1;
  return r;
}

static int
join (void *opaque, uint64_t off, uint64_t len, unsigned kind)
{
  struct joiner *j = opaque;
  int r = 0;

  if (j->len && j->kind == kind) {
    j->len += len;
    return 0;
  }
  r = tell (j);
  if (r != 0)
    return r;
  j->off = off;
  j->len = len;
  j->kind = kind;
  return 0;
}

/* What that device has at the same place; d may be NULL. */
static int
join_device (struct bdev *d, struct joiner *j, uint64_t off, uint64_t len, struct err *err)
{
  uint64_t size = d ? bdev_size (d) : 0;
  uint64_t inside = off < size ? MIN (len, size - off) : 0;

  if (inside) {
    int r = bdev_extents (d, off, inside, join, j, err);

    if (r < 0 || j->stopped)
      return r < 0 ? r : 1;
  }
  return inside < len ? join (j, off + inside, len - inside, BDEV_HOLE | BDEV_ZERO) : 0;
}

/* What can't be mapped is told as data: that makes the client read it, which fails
 * there alone, and leaves all the rest to be copied.  It is one cluster if the
 * entry can't be right, and a whole slice if there are no entries to be had.
 */
static void
run_of_unmapped (struct image *img, uint64_t guest_off, uint64_t len, struct run *run)
{
  bool no_entries = slice_peek (img, guest_off >> img->slice_cover_bits) == NULL;
  uint64_t step = no_entries ? UINT64_C (1) << img->slice_cover_bits : img->g.cluster_size;

  *run = (struct run) { .kind = CLUSTER_COMPRESSED,
                        .len = MIN (step - (guest_off & (step - 1)), len) };
}

/* The L2 table of L1 entry i; opaque is the image. */
static bool
range_of_table (void *opaque, uint64_t i, struct bdev_range *range)
{
  struct image *img = opaque;

  *range = (struct bdev_range) { map_l1 (img, i) & L1E_OFF_MASK, img->g.cluster_size };
  return range->off && slice_peek (img, i << img->table_slices_bits) == NULL;
}

int
read_extents (struct image *img, uint64_t guest_off, uint64_t len, bdev_extent_fn fn,
              void *opaque, struct err *err)
{
  struct joiner j = { .fn = fn, .opaque = opaque };
  unsigned token = image_enter (img);
  struct ahead ahead;
  int r = 0;

  ahead_init (&ahead, img->file, map_l1_index (img, guest_off + len - 1) + 1, range_of_table, img);
  while (r == 0 && len > 0) {
    struct run run;

    ahead_at (&ahead, map_l1_index (img, guest_off));
    r = map_lookup (img, guest_off, len, &run, NULL);
    if (r == -EIO)
      run_of_unmapped (img, guest_off, len, &run);
    else if (r < 0)
      break;
    r = 0;
    if (run.kind == CLUSTER_UNALLOCATED)
      r = join_device (img->backing, &j, guest_off, run.len, err);
    else if (run.kind == CLUSTER_NORMAL && img->raw_data)
      r = join_device (img->data, &j, guest_off, run.len, err);
    else if (run.kind == CLUSTER_ZERO_PLAIN)
      r = join (&j, guest_off, run.len, BDEV_HOLE | BDEV_ZERO);
    else
      r = join (&j, guest_off, run.len, run.kind == CLUSTER_ZERO_ALLOC ? BDEV_ZERO : 0);
    guest_off += run.len;
    len -= run.len;
  }
  if (r == 0)
    r = tell (&j);
  image_leave (img, token);
  return r < 0 ? r : 0;
}

int
read_cache (struct image *img, uint64_t guest_off, uint64_t len, struct err *err)
{
  unsigned token = image_enter (img);
  int r = 0;

  while (r == 0 && len > 0) {
    struct run run;
    uint64_t size = bdev_size (img->data), off;

    r = map_lookup (img, guest_off, len, &run, err);
    if (r < 0)
      break;
    off = run.host_off;
    if (run.kind == CLUSTER_NORMAL && off < size)
      r = bdev_cache (img->data, off, MIN (run.len, size - off), err);
    else if (run.kind == CLUSTER_COMPRESSED && off < size)
      r = bdev_cache (img->file, off, MIN (run.stream_len, size - off), err);
    else if (run.kind == CLUSTER_UNALLOCATED && img->backing) {
      size = bdev_size (img->backing);
      if (guest_off < size)
        r = bdev_cache (img->backing, guest_off, MIN (run.len, size - guest_off), err);
    }
    guest_off += run.len;
    len -= run.len;
  }
  image_leave (img, token);
  return r;
}
