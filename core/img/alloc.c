/* The allocator: which host cluster to use next.
 *
 * The lowest free cluster first, and as many as wanted if free ones follow it.
 * All clusters before hint_ci are in use, except in blocks not marked full that
 * it has passed because a cluster was freed there since; freeing moves the hint
 * back and takes the mark away, so blocks without a free cluster are looked
 * into once.
 *
 * A cluster is free if its refcount in RAM is 0.  Refcounts in RAM are lowered
 * only when the removal of the reference is durable and nobody can still be
 * reading or writing the cluster (commit.c), so nothing else needs to be asked.
 * As a guard, clusters of the fixed metadata (regions.c), and the block that is
 * being asked, are never handed out.
 *
 * Clusters that lay past the end of the file, before it was made longer for
 * them, read as zeros: the caller is told, and saves himself writing zeros.  The
 * file may grow ahead of its size (bdev_grow): one call for each cluster is what
 * first writes would spend most of their time on.
 */
#include <errno.h>

#include "dev/ahead.h"
#include "fmt/refbits.h"
#include "img/image-int.h"

/* How much longer the file may be made than is needed: this part of it, at most so much. */
#define AHEAD_PART 8
#define MAX_AHEAD  (UINT64_C (16) << 20)

uint64_t
alloc_limit (const struct image *img)
{
  if (img->file->can_grow)
    return MAX_HOST_OFF >> img->g.cluster_bits;
  /* A partial last cluster is of no use. */
  return bdev_size (img->file) >> img->g.cluster_bits;
}

int
alloc_extend_locked (struct image *img, uint64_t size, struct err *err)
{
  uint64_t ahead = ROUND_DOWN (MIN (size / AHEAD_PART, MAX_AHEAD), img->g.cluster_size);

  return bdev_grow (img->file, size, ahead, err);
}

static bool
is_free_locked (struct image *img, const struct rb *rb, uint64_t ci)
{
  return refbits_get (rb->data, img->g.refcount_order, ci & (img->g.rb_entries - 1)) == 0 &&
         ci << img->g.cluster_bits != rb->host_off &&
         !regions_overlap (img, ci << img->g.cluster_bits, img->g.cluster_size);
}

/* First free cluster of the block at or after the hint, or one past the block. */
static uint64_t
scan_block_locked (struct image *img, const struct rb *rb, uint64_t ci)
{
  uint64_t end = (rb->index + 1) << img->g.rb_bits;

  while (ci < end && !is_free_locked (img, rb, ci))
    ++ci;
  return ci;
}

/* Refcount block i, if find_free_locked would look into it and it is not in RAM. */
static bool
range_of_block (void *opaque, uint64_t i, struct bdev_range *range)
{
  const struct image *img = opaque;

  *range = (struct bdev_range) { img->rc.table[i], img->g.cluster_size };
  return range->off && !img->rc.full[i] && !img->rc.cached[i];
}

/* Move the hint to the lowest free cluster, making the block that describes it
 * (and the table that names the block) if it is missing.
 */
static int
find_free_locked (struct image *img, struct rb **rb, struct err *err)
{
  struct refcounts *rc = &img->rc;
  uint64_t index, ci;
  struct ahead ahead;
  unsigned looked = 0;          /* into blocks that are full */
  int r;

  ahead_init (&ahead, img->file, rc->nr_entries, range_of_block, img);
  for (;;) {
    index = rc->hint_ci >> img->g.rb_bits;
    if (rc->hint_ci >= alloc_limit (img))
      return err_set (err, ENOSPC, "%s: no free cluster is left", img->view.name);
    if (index >= rc->nr_entries) {
      r = refcounts_grow_locked (img, err);
      if (r < 0)
        return r;
      continue;                 /* the old table's clusters are free now */
    }
    if (rc->full[index]) {
      rc->hint_ci = (index + 1) << img->g.rb_bits;
      continue;
    }
    if (rc->table[index] == 0) {
      ci = rc->hint_ci;
      while (regions_overlap (img, ci << img->g.cluster_bits, img->g.cluster_size))
        ++ci;
      if (ci == rc->hint_ci) {
        r = rb_make_locked (img, index, ci, err);
        if (r < 0)
          return r;
        ++ci;
      }
      rc->hint_ci = ci;
      continue;
    }
    if (looked > 0)             /* the first is mostly the right one */
      ahead_at (&ahead, index);
    r = rb_get_locked (img, index, rb, err);
    if (r < 0)
      return r;
    ci = scan_block_locked (img, *rb, rc->hint_ci);
    rc->hint_ci = ci;
    if (ci >> img->g.rb_bits == index) {
      if (ci < alloc_limit (img))
        return 0;
      continue;
    }
    rc->full[index] = 1;
    ++looked;
  }
}

int
alloc_run (struct image *img, uint64_t want, uint64_t *host_off, uint64_t *got,
           bool *fresh, struct err *err)
{
  struct refcounts *rc = &img->rc;
  uint64_t ci, n = 1, end, file_ci;
  struct rb *rb;
  int r;
  LOCK_SCOPE (&img->alloc_lock);

  r = find_free_locked (img, &rb, err);
  if (r < 0)
    return r;
  ci = rc->hint_ci;
  file_ci = file_end (img) >> img->g.cluster_bits;
  *fresh = ci >= file_ci && img->file->can_grow;
  end = MIN ((rb->index + 1) << img->g.rb_bits, alloc_limit (img));
  if (ci < file_ci)
    end = MIN (end, file_ci);   /* all of one sort */
  while (n < want && ci + n < end && is_free_locked (img, rb, ci + n))
    ++n;
  r = alloc_extend_locked (img, (ci + n) << img->g.cluster_bits, err);
  if (r < 0)
    return r;
  for (uint64_t i = 0; i < n; ++i)
    rb_set_locked (img, rb, (ci + i) & (img->g.rb_entries - 1), 1);
  rc->hint_ci = ci + n;
  *host_off = ci << img->g.cluster_bits;
  *got = n;
  return 0;
}

void
alloc_release (struct image *img, uint64_t host_off, uint64_t n)
{
  LOCK_SCOPE (&img->alloc_lock);

  /* What can't be given back is a leak, for the next check to find. */
  for (uint64_t i = 0; i < n; ++i)
    refcount_drop_locked (img, (host_off >> img->g.cluster_bits) + i, 1, NULL);
}
