/* See lost-view.h.
 *
 * LIMIT: what a list is recalled from is the mapping.  A lost range counts as saved
 * as soon as something is mapped there: with version 2 and a backing file that is so
 * from the start, since only written zeros can stand for it; and a write to part of a
 * cluster maps all of it, so that the rest is known as lost until the next start only.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "base/vec.h"
#include "dev/ahead.h"
#include "dev/lossy.h"
#include "img/image.h"
#include "lost-view.h"

DEFINE_VEC (lossy_vec, struct lossy_range);

/* --- disks that fail where they should */

static bool
is_of (const struct lost_range *r, const struct snapshot *snapshot)
{
  if (!snapshot || !r->snapshot_id)
    return !snapshot && !r->snapshot_id;
  return strcmp (r->snapshot_id, snapshot->id) == 0
         && strcmp (r->snapshot_name, snapshot->name) == 0;
}

int
lost_view_guard (struct bdev **view, const struct lost *l, const struct snapshot *snapshot,
                 struct err *err)
{
  struct lossy_vec v = VEC_INIT;
  struct bdev *guarded;
  int r = 0;

  for (size_t i = 0; r == 0 && i < l->ranges.len; ++i)
    if (is_of (&l->ranges.ptr[i], snapshot))
      r = lossy_vec_push (&v, (struct lossy_range) { l->ranges.ptr[i].guest_off,
                                                     l->ranges.ptr[i].guest_len });
  if (r < 0)
    err_set (err, ENOMEM, "out of memory");
  else if (v.len) {
    r = lossy_new (*view, v.ptr, v.len, &guarded, err);
    if (r == 0) {
      bdev_unref (*view);
      *view = guarded;
    }
  }
  vec_reset (&v);
  return r;
}

/* --- adding what a disk's extents say */

struct lister {
  struct lost *l;
  const struct snapshot *snapshot;
  unsigned mask, kind;          /* extents that count: those of this kind, of the bits in mask */
  int why;
};

static int
add_extent (void *opaque, uint64_t off, uint64_t len, unsigned kind)
{
  struct lister *li = opaque;

  return (kind & li->mask) == li->kind
         ? lost_add (li->l, li->snapshot, off, len, li->why) : 0;
}

/* --- what an earlier start lost */

/* Those of the ranges of one disk that it still maps to nothing. */
static int
keep_ranges (struct layer *l, const struct lost *then, const struct snapshot *snapshot,
             struct err *err)
{
  struct image_options iopts = { .read_only = true, .snapshot = snapshot };
  struct lister li = { .l = &l->lost, .snapshot = snapshot, .mask = BDEV_ZERO, .kind = BDEV_ZERO };
  struct bdev *view = NULL;
  int r = 0;

  for (size_t i = 0; r == 0 && i < then->ranges.len; ++i) {
    const struct lost_range *lr = &then->ranges.ptr[i];
    uint64_t size;

    if (!is_of (lr, snapshot))
      continue;
    if (!view)
      r = image_open (l->healed, &iopts, &view, err);
    if (r < 0)
      break;
    size = bdev_size (view);
    li.why = lr->why;
    if (lr->guest_off < size)
      r = bdev_extents (view, lr->guest_off, MIN (lr->guest_len, size - lr->guest_off),
                        add_extent, &li, err);
  }
  bdev_unref (view);
  return r;
}

static int
keep_losses (struct layer *l, const struct lost *then, struct err *err)
{
  const struct snapshot_vec *v = &layer_now (l)->snapshots;
  int r = keep_ranges (l, then, NULL, err);

  for (size_t i = 0; r == 0 && i < v->len; ++i)
    r = keep_ranges (l, then, &v->ptr[i], err);
  for (size_t i = 0; r == 0 && i < then->snapshots.len; ++i) {
    const struct lost_snapshot *s = &then->snapshots.ptr[i];

    if (lost_add_snapshot (&l->lost, s->id, s->name, s->why) < 0)
      r = err_set (err, ENOMEM, "out of memory");
  }
  return r;
}

int
lost_view_recall (struct layer *l, struct progress *progress, struct err *err)
{
  struct layer again = { .source = bdev_ref (l->source), .watch = bdev_ref (l->watch),
                         .healed = bdev_ref (l->source) };
  int r = 0;

  again.path = strdup (l->path);
  if (!again.path)
    r = err_set (err, ENOMEM, "out of memory");
  if (r == 0)
    r = layer_check (&again, false, progress, err);
  if (r == 0 && orphan_findings (again.before) > 0)
    l->source_orphans = again.before->orphans;
  if (r == 0 && !again.before->geom.data_file && again.before->header.crypt_method == CRYPT_NONE
      && heal_all_needed (again.before)) {
    r = layer_lay_memory (&again, err);
    if (r == 0)
      r = layer_heal (&again, REPAIR_ALL, progress, err);
    if (r == 0)
      r = keep_losses (l, &again.lost, err);
    if (r == 0 && again.before->header.backing_off && !layer_now (l)->header.backing_off)
      r = lost_view_backing (l, NULL, err);     /* its name was beyond repair */
    lost_finish (&l->lost);
  }
  layer_reset (&again);
  return r;
}

/* --- what a missing backing file held */

/* In its place: of a kind that no disk tells of itself, a hole that is not zeros. */
static int
missing_pread (struct bdev *d, void *buf, size_t len, uint64_t off, struct err *err)
{
  return err_set (err, EIO, "the backing file is missing");
}

static int
missing_extents (struct bdev *d, uint64_t off, uint64_t len, bdev_extent_fn fn, void *opaque,
                 struct err *err)
{
  return fn (opaque, off, len, BDEV_HOLE);
}

static void
missing_close (struct bdev *d)
{
  free (d);
}

static const struct bdev_ops missing_ops = {
  .kind = "missing", .pread = missing_pread, .extents = missing_extents, .close = missing_close,
};

static int
missing_new (struct bdev **ret, struct err *err)
{
  struct bdev *d = calloc (1, sizeof *d);
  int r = d ? bdev_init (d, &missing_ops, "missing backing file", INT64_MAX, false, false, err)
            : err_set (err, ENOMEM, "out of memory");

  if (r < 0)
    free (d);
  else
    *ret = d;
  return r;
}

static int
list_missing (struct layer *l, struct bdev *missing, struct bdev *data,
              const struct snapshot *snapshot, struct err *err)
{
  struct image_options iopts = { .read_only = true, .backing = missing, .data_file = data,
                                 .snapshot = snapshot };
  struct lister li = { .l = &l->lost, .snapshot = snapshot, .mask = BDEV_HOLE | BDEV_ZERO,
                       .kind = BDEV_HOLE, .why = LOST_BACKING };
  struct bdev *view;
  int r = image_open (l->healed, &iopts, &view, err);

  if (r < 0)
    return r;
  r = bdev_extents (view, 0, bdev_size (view), add_extent, &li, err);
  bdev_unref (view);
  return r;
}

/* What opening snapshot i reads first. */
static bool
range_of_snapshot (void *opaque, uint64_t i, struct bdev_range *range)
{
  const struct snapshot *s = &((const struct snapshot_vec *) opaque)->ptr[i];

  *range = (struct bdev_range) { s->l1_host_off, s->l1_entries * UINT64_C (8) };
  return true;
}

int
lost_view_backing (struct layer *l, struct bdev *data, struct err *err)
{
  const struct snapshot_vec *v = &layer_now (l)->snapshots;
  struct bdev *missing;
  struct ahead ahead;
  int r = missing_new (&missing, err);

  if (r < 0)
    return r;
  r = list_missing (l, missing, data, NULL, err);
  /* A snapshot that cannot be opened says so to whoever asks for it. */
  ahead_init (&ahead, l->healed, v->len, range_of_snapshot, (void *) v);
  for (size_t i = 0; r == 0 && i < v->len; ++i) {
    ahead_at (&ahead, i);
    if (list_missing (l, missing, data, &v->ptr[i], NULL) == -ENOMEM)
      r = err_set (err, ENOMEM, "out of memory");
  }
  bdev_unref (missing);
  lost_finish (&l->lost);
  return r;
}
