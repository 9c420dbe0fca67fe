/* Guest writes.
 *
 * A write to clusters that are ours alone (COPIED) goes straight to the host,
 * under nothing but a grace section.  Everything else takes a lock on its range
 * of guest clusters and looks again: new clusters are taken, as many in a row
 * as there are, their data is written (together with what the write leaves of
 * the first and the last of them, copied from wherever the guest saw it
 * before), and only then do the L2 entries name them (I4), in RAM; the disk
 * follows with the next commit.  A zero cluster that kept its host cluster is
 * filled the same way, without taking a new one: the guest can't see what is in
 * it until its entry changes.  A compressed cluster becomes a normal one, with
 * what the write leaves of it; the references of its stream are dropped.
 *
 * With extended L2 entries all this holds for subclusters: a new cluster gets what
 * the write touches, and what its old cluster held of the rest; in a cluster that
 * is ours, subclusters are filled without a new one.  Those already allocated
 * there are only ever written where the guest asks: others write to them, in
 * place, at the same time.
 *
 * In an external data file a guest cluster has one place, and needs none found.
 *
 * A request is done in pieces of at most one slice, so that it holds a bounded
 * number of clusters and dirties one slice at a time.  Between pieces, with
 * nothing held, it may have to commit: because much is dirty, or because
 * clusters that were freed can't be used again before.
 *
 * Invariants: I2 and I4, by the order above and that of commit.c.
 */
#include <errno.h>
#include <string.h>

#include "img/image-int.h"

/* A request on its way. */
struct write {
  const uint8_t *buf;
  uint64_t len, off;            /* what is left of it; guest bytes */
  bool fua;
  bool needs_flush;             /* FUA: the file must be flushed */
  bool needs_commit;            /* FUA: and the mapping must reach the disk */
};

static void
advance (struct write *w, uint64_t n)
{
  w->buf += n;
  w->off += n;
  w->len -= n;
}

static bool
in_place (const struct run *run)
{
  return run->kind == CLUSTER_NORMAL && run->copied;
}

int
write_room (struct image *img, uint64_t host_off, uint64_t len, struct err *err)
{
  if (range_fits (host_off, len, bdev_size (img->data)))
    return 0;
  if (!img->g.data_file)
    return err_set (err, ENOSPC, "%s: the last cluster of the file is cut short by the end of "
                    "the device", img->view.name);
  LOCK_SCOPE (&img->data_lock);
  if (range_fits (host_off, len, bdev_size (img->data)))
    return 0;
  return bdev_resize (img->data, host_off + len, err);
}

static int
write_run (struct image *img, struct write *w, const struct run *run, struct err *err)
{
  bool durable = run->durable && w->off + run->len <= atomic_load (&img->durable_size);
  unsigned flags = 0;
  int r;

  /* The usual case of FUA: one run, and the disk knows it already. */
  if (w->fua && durable && run->len == w->len && img->data->ops->native_fua)
    flags = BDEV_FUA;
  else if (w->fua && durable)
    w->needs_flush = true;
  else if (w->fua)
    w->needs_commit = true;
  r = write_room (img, run->host_off, run->len, err);
  if (r == 0)
    r = bdev_pwrite (img->data, w->buf, run->len, run->host_off, flags, err);
  if (r == 0)
    advance (w, run->len);
  return r;
}

/* As far as the clusters may be written in place. */
static int
write_in_place (struct image *img, struct write *w, struct err *err)
{
  unsigned token = image_enter (img);
  int r = 0;

  while (r == 0 && w->len > 0) {
    struct run run;

    r = map_lookup (img, w->off, w->len, &run, err);
    if (r == 0) {
      if (!in_place (&run))
        break;
      r = write_run (img, w, &run, err);
    }
  }
  image_leave (img, token);
  return r;
}

/* --- new clusters */

/* Clusters [guest_off, guest_off + n clusters) are to lie at host_off. */
struct fill {
  uint64_t guest_off, host_off; /* cluster aligned */
  uint64_t n;                   /* clusters */
  bool fresh;                   /* the host clusters read as zeros */
  bool in_place;                /* they are those that the entries name already */
  uint64_t off, end;            /* of the part of the request that it is for */
  struct l2_entry first, last;  /* what the guest saw where that begins and ends */
  struct l2_pair old[MAX_SLICE_ENTRIES];        /* the entries */
};

static bool
entry_is_zero (const struct image *img, const struct l2_entry *e, uint64_t guest_off)
{
  if (e->kind == CLUSTER_UNALLOCATED)
    return img->backing == NULL || guest_off >= bdev_size (img->backing);
  return e->kind == CLUSTER_ZERO_PLAIN || e->kind == CLUSTER_ZERO_ALLOC;
}

/* What the guest saw at guest_off, in the cluster whose entry is e. */
static int
read_before (struct image *img, const struct l2_entry *e, uint8_t *buf, uint64_t len,
             uint64_t guest_off, struct err *err)
{
  if (e->kind == CLUSTER_NORMAL)
    return bdev_pread_padded (img->data, buf, len,
                              e->host_off + (guest_off & (img->g.cluster_size - 1)), err);
  if (e->kind == CLUSTER_UNALLOCATED)
    return read_backing (img, buf, len, guest_off, err);
  if (e->kind == CLUSTER_COMPRESSED && len > 0)
    return compressed_read (img, e->host_off, e->host_len, buf, len, guest_off, err);
  memset (buf, 0, len);
  return 0;
}

/* Copy [guest_off, guest_off+len), all in the cluster whose entry is e, to where
 * the fill puts it.
 */
static int
copy_before (struct image *img, const struct fill *f, const struct l2_entry *e,
             uint64_t guest_off, uint64_t len, uint8_t *bounce, struct err *err)
{
  uint64_t host_off = f->host_off + (guest_off - f->guest_off);

  if (len && entry_is_zero (img, e, guest_off))
    return bdev_zero (img->data, host_off, len, 0, err);
  while (len > 0) {
    uint64_t n = MIN (len, IO_CHUNK);
    int r = read_before (img, e, bounce, n, guest_off, err);

    if (r == 0)
      r = bdev_pwrite (img->data, bounce, n, host_off, 0, err);
    if (r < 0)
      return r;
    guest_off += n;
    host_off += n;
    len -= n;
  }
  return 0;
}

/* Subclusters in the host cluster, and so in need of copying if that is left. */
static uint32_t
allocated (const struct image *img, struct l2_pair p)
{
  return p.raw & L2E_COMPRESSED || !img->g.extended_l2 ? UINT32_MAX : (uint32_t) p.bitmap;
}

/* Copy the subclusters of cluster i that the request does not touch and that lie
 * in its old host cluster.
 */
static int
copy_untouched (struct image *img, const struct fill *f, uint64_t i, struct err *err)
{
  uint64_t guest_off = f->guest_off + (i << img->g.cluster_bits);
  uint32_t mask = allocated (img, f->old[i]) & ~map_touched (img, guest_off, f->off, f->end);
  CLEANUP_FREE uint8_t *bounce = NULL;
  int r = 0;

  if (mask == 0)
    return 0;
  bounce = malloc (MIN (img->g.cluster_size, IO_CHUNK));
  if (bounce == NULL)
    return err_set (err, ENOMEM, "out of memory");
  while (r == 0 && mask != 0) {
    unsigned sc = __builtin_ctz (mask), n = 1;
    struct l2_entry e = map_decode (img, f->old[i], sc);

    while (sc + n < 32 && mask >> (sc + n) & 1)
      ++n;
    r = copy_before (img, f, &e, guest_off + ((uint64_t) sc << img->unit_bits),
                     (uint64_t) n << img->unit_bits, bounce, err);
    mask &= ~(UINT32_MAX >> (32 - n) << sc);
  }
  return r;
}

/* What lies around the request in its first and last subclusters must be written
 * as well: how many bytes of them?
 */
static void
measure_padding (const struct image *img, const struct fill *f, uint64_t *head, uint64_t *tail)
{
  *head = f->off & (img->unit_size - 1);
  *tail = ROUND_UP (f->end, img->unit_size) - f->end;
  if (f->fresh && entry_is_zero (img, &f->first, f->off - *head))
    *head = 0;
  if ((f->fresh && entry_is_zero (img, &f->last, f->end)) ||
      (f->in_place && f->last.kind == CLUSTER_NORMAL))
    *tail = 0;
  /* A data file ends where the disk does. */
  if (img->g.data_file)
    *tail = MIN (*tail, MAX (bdev_size (&img->view), f->end) - f->end);
}

/* Write len bytes of the request, and around them what was there before. */
static int
write_fill (struct image *img, const struct fill *f, const struct write *w, struct err *err)
{
  uint64_t end = f->end, len = end - w->off, head, tail, total;
  CLEANUP_FREE uint8_t *bounce = NULL;
  int r;

  measure_padding (img, f, &head, &tail);
  total = head + len + tail;
  r = write_room (img, f->host_off + (w->off - head - f->guest_off), total, err);
  if (r < 0)
    return r;
  if (head + tail == 0)
    return bdev_pwrite (img->data, w->buf, len, f->host_off + (w->off - f->guest_off), 0, err);
  bounce = malloc (MIN (total, IO_CHUNK));
  if (bounce == NULL)
    return err_set (err, ENOMEM, "out of memory");
  if (total > IO_CHUNK) {
    r = copy_before (img, f, &f->first, w->off - head, head, bounce, err);
    if (r == 0)
      r = bdev_pwrite (img->data, w->buf, len, f->host_off + (w->off - f->guest_off), 0, err);
    if (r == 0)
      r = copy_before (img, f, &f->last, end, tail, bounce, err);
    return r;
  }
  /* One journey rather than two, unless what lies between them cannot be read. */
  if (!img->view.far || !head || !tail || f->first.kind != CLUSTER_UNALLOCATED ||
      f->last.kind != CLUSTER_UNALLOCATED ||
      read_backing (img, bounce, total, w->off - head, NULL) < 0) {
    r = read_before (img, &f->first, bounce, head, w->off - head, err);
    if (r == 0)
      r = read_before (img, &f->last, bounce + head + len, tail, end, err);
  }
  if (r < 0)
    return r;
  memcpy (bounce + head, w->buf, len);
  return bdev_pwrite (img->data, bounce, total, f->host_off + (w->off - head - f->guest_off),
                      0, err);
}

/* The entries that the fill makes true. */
static int
publish_fill (struct image *img, const struct fill *f, struct err *err)
{
  uint64_t frees[MAX_SLICE_ENTRIES * MAX_ENTRY_REFS];
  struct l2_pair new[MAX_SLICE_ENTRIES];
  size_t nr_frees = 0;

  for (uint64_t i = 0; i < f->n; ++i) {
    struct l2_pair old = f->old[i];
    struct l2_entry e = l2_entry_decode (old.raw, old.bitmap, &img->g);
    uint64_t place = i << img->g.cluster_bits;

    new[i].raw = (f->host_off + place) | ENTRY_COPIED;
    new[i].bitmap = 0;
    if (img->g.extended_l2) {
      uint32_t touched = map_touched (img, f->guest_off + place, f->off, f->end);
      uint32_t zero = e.kind == CLUSTER_COMPRESSED ? 0 : old.bitmap >> 32;

      new[i].bitmap = allocated (img, old) | touched | (uint64_t) (zero & ~touched) << 32;
    }
    if (e.kind == CLUSTER_COMPRESSED || e.host_off != f->host_off + place)
      nr_frees += map_entry_frees (img, &e, false, frees + nr_frees);
  }
  return map_update (img, f->guest_off, f->n, new, frees, nr_frees, err);
}

enum need { NEED_NOTHING, NEED_FILL, NEED_CLUSTER };

static enum need
entry_need (const struct image *img, struct l2_pair p, unsigned sc)
{
  struct l2_entry e = map_decode (img, p, sc);

  if (!e.copied || !l2_has_host (p.raw, &img->g))
    return NEED_CLUSTER;
  return e.kind == CLUSTER_NORMAL ? NEED_NOTHING : NEED_FILL;
}

/* How many of the n entries are like the first (and contiguous, if they keep
 * their host clusters)?  A fill may as well write subclusters that are there.
 */
static uint64_t
count_alike (const struct image *img, const struct l2_pair *p, uint64_t n, enum need need)
{
  uint64_t i;

  for (i = 1; i < n; ++i) {
    enum need this = entry_need (img, p[i], 0);

    if (this != need && !(img->g.extended_l2 && need == NEED_FILL && this == NEED_NOTHING))
      break;
    if (need == NEED_FILL && p[i].raw != p[0].raw + (i << img->g.cluster_bits))
      break;
  }
  return i;
}

/* Host clusters for the fill, which wants f->n and gets as many as f->n then says. */
static int
find_clusters (struct image *img, struct fill *f, struct err *err)
{
  if (!img->g.data_file)
    return alloc_run (img, f->n, &f->host_off, &f->n, &f->fresh, err);
  f->host_off = f->guest_off;
  f->fresh = f->guest_off >= bdev_size (img->data);
  return 0;
}

/* The request's first bytes, at most len of them, which lie in the clusters of the
 * n entries f->old and can't all be written in place; the range lock is held.
 * Does some of them.
 */
static int
write_new (struct image *img, struct write *w, uint64_t len, struct fill *f, uint64_t n,
           enum need need, struct err *err)
{
  int r = 0;

  f->guest_off = ROUND_DOWN (w->off, img->g.cluster_size);
  f->n = count_alike (img, f->old, n, need);
  f->in_place = need == NEED_FILL;
  f->fresh = false;
  if (f->in_place)
    f->host_off = f->old[0].raw & L2E_OFF_MASK;
  else
    r = find_clusters (img, f, err);
  if (r < 0)
    return r;
  f->off = w->off;
  f->end = MIN (w->off + len, f->guest_off + (f->n << img->g.cluster_bits));
  f->first = map_decode (img, f->old[0], map_subcluster (img, f->off));
  f->last = map_decode (img, f->old[f->n - 1], map_subcluster (img, f->end - 1));
  r = write_fill (img, f, w, err);
  if (r == 0 && img->g.extended_l2 && !f->in_place)
    r = copy_untouched (img, f, 0, err);
  if (r == 0 && img->g.extended_l2 && !f->in_place && f->n > 1)
    r = copy_untouched (img, f, f->n - 1, err);
  if (r == 0)
    r = publish_fill (img, f, err);
  if (r == 0)
    advance (w, f->end - f->off);
  else if (!f->in_place && !img->g.data_file)
    alloc_release (img, f->host_off, f->n);
  w->needs_commit = true;
  return r;
}

/* One piece, at most len bytes in one slice, under the range lock. */
static int
write_piece_locked (struct image *img, struct write *w, uint64_t len, struct err *err)
{
  uint64_t end = w->off + len, mask = img->g.cluster_size - 1;
  struct fill f;
  int r = map_ensure_table (img, w->off, err);

  while (r == 0 && w->off < end) {
    uint64_t n = DIV_ROUND_UP ((w->off & mask) + (end - w->off), img->g.cluster_size);
    enum need need;
    struct run run;

    r = map_entries (img, w->off & ~mask, n, f.old, err);
    if (r < 0)
      break;
    need = entry_need (img, f.old[0], map_subcluster (img, w->off));
    if (need != NEED_NOTHING) {
      r = write_new (img, w, end - w->off, &f, n, need, err);
      continue;
    }
    r = map_lookup (img, w->off, end - w->off, &run, err);
    if (r == 0)
      r = write_run (img, w, &run, err);
  }
  return r;
}

static int
write_piece (struct image *img, struct write *w, struct err *err)
{
  uint64_t cover = UINT64_C (1) << img->slice_cover_bits;
  uint64_t len = MIN (w->len, cover - (w->off & (cover - 1)));
  struct range_lock rl;
  unsigned token;
  int r;

  range_lock (img, &rl, w->off, len);
  token = image_enter (img);
  r = write_piece_locked (img, w, len, err);
  range_unlock (img, &rl);
  image_leave (img, token);
  return r;
}

int
write_range (struct image *img, const void *buf, uint64_t len, uint64_t guest_off,
             unsigned flags, struct err *err)
{
  struct write w = { .buf = buf, .len = len, .off = guest_off, .fua = flags & BDEV_FUA };
  bool retried = false;
  int r = image_begin_change (img, err);

  if (r == 0)
    bitmaps_mark (img, guest_off, len);
  while (r == 0 && w.len > 0) {
    r = write_in_place (img, &w, err);
    if (r < 0 || w.len == 0)
      break;
    if (commit_wanted (img)) {
      r = commit_flush (img, err);
      if (r < 0)
        break;
    }
    r = write_piece (img, &w, err);
    if (r == -ENOSPC && !retried) {
      retried = true;
      r = commit_for_space (img, r, err);
      if (r == 1)
        r = 0;
    }
  }
  if (r == 0 && w.fua && w.needs_commit)
    r = commit_flush (img, err);
  else if (r == 0 && w.fua && w.needs_flush)
    r = commit_flush_data (img, err);
  return r;
}
