/* The refcount structures of an open image: the table in RAM, blocks cached
 * whole, and both made larger when the file outgrows them.
 *
 * A refcount is lowered here only after the removal of the reference is durable
 * (commit.c), and raised before the reference exists, so a dirty block may be
 * written at any time (I2, I3).  Entries of the table are another matter: one
 * may reach the disk only after its block did, with a flush between; so new
 * entries wait in table_dirty for a commit.
 *
 * A missing block is made in the cluster the allocator found, the lowest free
 * one, which it then describes itself: where no cluster below is free, none but
 * the clusters that it covers can be.
 *
 * A table that is too short (all it covers is in use) is replaced by one about
 * half again as large, right past its coverage, together with the blocks that
 * describe the new clusters.  All dirty blocks, the new ones and the table are
 * written, flush, then the twelve bytes of the header that name the table,
 * flush (I5); then the old table's clusters are free.
 *
 * Blocks are held to a byte budget, second chance, clean ones only;
 * commit_wanted bounds the dirty ones.
 *
 * Deliberately not here: choosing clusters (alloc.c), and judging refcounts.
 */
#include <errno.h>
#include <string.h>

#include "dev/ahead.h"
#include "fmt/refbits.h"
#include "img/image-int.h"

static int
load_table (struct image *img, struct err *err)
{
  struct refcounts *rc = &img->rc;
  CLEANUP_FREE uint8_t *raw = malloc (IO_CHUNK);
  uint64_t bytes = rc->nr_entries * 8;
  struct ahead ahead;

  if (raw == NULL)
    return err_set (err, ENOMEM, "out of memory");
  ahead_init_bytes (&ahead, img->file, rc->host_off, bytes, IO_CHUNK);
  for (uint64_t off = 0; off < bytes; off += IO_CHUNK) {
    uint64_t n = MIN (bytes - off, IO_CHUNK);
    int r;

    ahead_at (&ahead, off / IO_CHUNK);
    r = bdev_pread_padded (img->file, raw, n, rc->host_off + off, err);

    if (r < 0)
      return r;
    for (uint64_t i = 0; i < n; i += 8)
      rc->table[(off + i) / 8] = load_be64 (raw + i);
  }
  return 0;
}

int
refcounts_init (struct image *img, size_t cache_bytes, struct err *err)
{
  const struct header *h = &img->header;
  struct refcounts *rc = &img->rc;
  uint64_t bytes = (uint64_t) h->rt_clusters << img->g.cluster_bits;

  if (h->rt_clusters == 0 || bytes > MAX_RT_BYTES ||
      !IS_ALIGNED (h->rt_host_off, img->g.cluster_size) ||
      h->rt_host_off == 0 || !range_fits (h->rt_host_off, bytes, file_end (img)))
    return err_set (err, EINVAL, "the refcount table (%u clusters at host offset 0x%llx) "
                    "can't be right; the image can only be opened read-only",
                    h->rt_clusters, ULL (h->rt_host_off));
  rc->host_off = h->rt_host_off;
  rc->clusters = h->rt_clusters;
  rc->nr_entries = bytes / 8;
  rc->max_blocks = MAX (cache_bytes >> img->g.cluster_bits, 4);
  rc->table = malloc (bytes);
  rc->cached = calloc (rc->nr_entries, sizeof rc->cached[0]);
  rc->full = calloc (rc->nr_entries, 1);
  if (!rc->table || !rc->cached || !rc->full)
    return err_set (err, ENOMEM, "out of memory");
  return load_table (img, err);
}

void
refcounts_free (struct image *img)
{
  struct refcounts *rc = &img->rc;

  for (size_t i = 0; i < rc->ring.len; ++i)
    free (rc->ring.ptr[i]);
  vec_reset (&rc->ring);
  vec_reset (&rc->table_dirty);
  free (rc->table);
  free (rc->cached);
  free (rc->full);
}

static void
evict_locked (struct image *img)
{
  struct refcounts *rc = &img->rc;
  size_t steps = 2 * rc->ring.len;

  for (; rc->ring.len >= rc->max_blocks && steps > 0; --steps) {
    struct rb *rb;

    if (rc->hand >= rc->ring.len)
      rc->hand = 0;
    rb = rc->ring.ptr[rc->hand];
    if (rb->used || rb->dirty_lo < rb->dirty_hi) {
      rb->used = false;
      rc->hand++;
      continue;
    }
    rc->cached[rb->index] = NULL;
    rc->ring.ptr[rc->hand] = rc->ring.ptr[--rc->ring.len];
    free (rb);
  }
}

/* A block of zeros in RAM, not in the ring yet. */
static struct rb *
new_rb (struct image *img, uint64_t index, uint64_t host_off)
{
  struct rb *rb = calloc (1, sizeof *rb + img->g.cluster_size);

  if (rb) {
    rb->index = index;
    rb->host_off = host_off;
    rb->used = true;
  }
  return rb;
}

static int
check_rt_entry (struct image *img, uint64_t index, uint64_t raw, struct err *err)
{
  uint64_t host_off = raw & RTE_OFF_MASK;
  const char *why = NULL;

  if (raw & RTE_RESERVED_MASK)
    why = "reserved bits are set";
  else if (!IS_ALIGNED (host_off, img->g.cluster_size))
    why = "misaligned";
  else if (!range_fits (host_off, img->g.cluster_size, file_end (img)))
    why = "past the end of the file";
  else if (regions_overlap (img, host_off, img->g.cluster_size))
    why = "inside other metadata";
  if (why == NULL)
    return 0;
  return err_set (err, EIO, "%s: refcount table entry %llu points to a block at host offset "
                  "0x%llx: %s", img->view.name, ULL (index), ULL (host_off), why);
}

int
rb_get_locked (struct image *img, uint64_t index, struct rb **ret, struct err *err)
{
  struct refcounts *rc = &img->rc;
  struct rb *rb = NULL;
  int r;

  if (index < rc->nr_entries && rc->table[index] != 0 && rc->cached[index] == NULL) {
    r = check_rt_entry (img, index, rc->table[index], err);
    if (r < 0)
      return r;
    evict_locked (img);
    rb = new_rb (img, index, rc->table[index]);
    if (rb == NULL || rb_vec_reserve (&rc->ring, 1) < 0) {
      free (rb);
      return err_set (err, ENOMEM, "out of memory");
    }
    r = bdev_pread_padded (img->file, rb->data, img->g.cluster_size, rb->host_off, err);
    if (r < 0) {
      free (rb);
      return r;
    }
    rb_vec_push (&rc->ring, rb);
    rc->cached[index] = rb;
  }
  *ret = index < rc->nr_entries ? rc->cached[index] : NULL;
  if (*ret)
    (*ret)->used = true;
  return 0;
}

static void
mark_dirty_locked (struct image *img, struct rb *rb, size_t lo, size_t hi)
{
  if (rb->dirty_lo == rb->dirty_hi) {
    rb->dirty_lo = lo;
    rb->dirty_hi = hi;
    atomic_fetch_add_explicit (&img->nr_dirty_rbs, 1, memory_order_relaxed);
    return;
  }
  rb->dirty_lo = MIN (rb->dirty_lo, lo);
  rb->dirty_hi = MAX (rb->dirty_hi, hi);
}

void
rb_set_locked (struct image *img, struct rb *rb, uint64_t i, uint64_t value)
{
  size_t byte = i << img->g.refcount_order >> 3;
  size_t lo = ROUND_DOWN (byte, 512);

  refbits_set (rb->data, img->g.refcount_order, i, value);
  mark_dirty_locked (img, rb, lo, lo + 512);
}

int
rb_make_locked (struct image *img, uint64_t index, uint64_t ci, struct err *err)
{
  struct refcounts *rc = &img->rc;
  struct rb *rb = NULL;
  int r;

  assert (rc->table[index] == 0 && ci >> img->g.rb_bits == index);
  r = alloc_extend_locked (img, (ci + 1) << img->g.cluster_bits, err);
  if (r < 0)
    return r;
  evict_locked (img);
  rb = new_rb (img, index, ci << img->g.cluster_bits);
  if (rb == NULL || rb_vec_reserve (&rc->ring, 1) < 0 ||
      u64_vec_push (&rc->table_dirty, index) < 0) {
    free (rb);
    return err_set (err, ENOMEM, "out of memory");
  }
  /* Written at once, though only a commit must: as in map.c's write_table. */
  refbits_set (rb->data, img->g.refcount_order, ci & (img->g.rb_entries - 1), 1);
  r = bdev_pwrite (img->file, rb->data, img->g.cluster_size, rb->host_off, 0, err);
  if (r < 0) {
    rc->table_dirty.len--;
    free (rb);
    return r;
  }
  rb_vec_push (&rc->ring, rb);
  rc->cached[index] = rb;
  rc->table[index] = rb->host_off;
  rb_set_locked (img, rb, ci & (img->g.rb_entries - 1), 1);
  mark_dirty_locked (img, rb, 0, img->g.cluster_size);
  return 0;
}

int
refcount_get_locked (struct image *img, uint64_t ci, uint64_t *value, struct err *err)
{
  struct rb *rb;
  int r = rb_get_locked (img, ci >> img->g.rb_bits, &rb, err);

  if (r < 0)
    return r;
  *value = rb ? refbits_get (rb->data, img->g.refcount_order, ci & (img->g.rb_entries - 1)) : 0;
  return 0;
}

int
refcount_drop_locked (struct image *img, uint64_t ci, uint64_t n, struct err *err)
{
  struct refcounts *rc = &img->rc;
  uint64_t i = ci & (img->g.rb_entries - 1), value = 0;
  struct rb *rb;
  int r = rb_get_locked (img, ci >> img->g.rb_bits, &rb, err);

  if (r < 0)
    return r;
  if (rb)
    value = refbits_get (rb->data, img->g.refcount_order, i);
  if (value < n)
    return err_set (err, EIO, "%s: the cluster at host offset 0x%llx had more references than "
                    "its refcount says: the refcounts are wrong", img->view.name,
                    ULL (ci << img->g.cluster_bits));
  rb_set_locked (img, rb, i, value - n);
  if (value == n) {
    rc->full[rb->index] = 0;
    rc->hint_ci = MIN (rc->hint_ci, ci);
  }
  return 0;
}

int
refcounts_write_blocks_locked (struct image *img, struct err *err)
{
  struct refcounts *rc = &img->rc;

  for (size_t i = 0; i < rc->ring.len; ++i) {
    struct rb *rb = rc->ring.ptr[i];
    int r;

    if (rb->dirty_lo == rb->dirty_hi)
      continue;
    r = commit_write (img, rb->data + rb->dirty_lo, rb->dirty_hi - rb->dirty_lo,
                      rb->host_off + rb->dirty_lo, err);
    if (r < 0)
      return r;
    rb->dirty_lo = rb->dirty_hi = 0;
    atomic_fetch_sub_explicit (&img->nr_dirty_rbs, 1, memory_order_relaxed);
  }
  return 0;
}

/* --- a larger table */

struct growth {
  uint64_t ci;                  /* where the table goes, and the new blocks after it */
  uint64_t clusters;            /* of the table */
  uint64_t first_index, nr_blocks;
  uint64_t *table;              /* the new arrays */
  struct rb **cached;
  uint8_t *full;
  struct rb_vec blocks;         /* the new blocks */
};

/* How many blocks a table of that many clusters needs with it, and how many
 * clusters a table needs to name them all.
 */
static void
size_growth (const struct image *img, struct growth *gr)
{
  uint64_t need, last;

  for (;;) {
    gr->first_index = gr->ci >> img->g.rb_bits;
    gr->nr_blocks = 1;
    /* The blocks describe the table, themselves too. */
    for (;;) {
      last = (gr->ci + gr->clusters + gr->nr_blocks - 1) >> img->g.rb_bits;
      if (last - gr->first_index + 1 <= gr->nr_blocks)
        break;
      gr->nr_blocks = last - gr->first_index + 1;
    }
    need = DIV_ROUND_UP ((last + 1) * 8, img->g.cluster_size);
    if (need <= gr->clusters)
      return;
    gr->clusters = need;        /* ends: one more names many clusters more */
  }
}

static int
plan_growth (struct image *img, struct growth *gr, struct err *err)
{
  const struct refcounts *rc = &img->rc;
  uint64_t limit = alloc_limit (img), max = MAX_RT_BYTES >> img->g.cluster_bits;
  /* More than names the whole of a device that can't grow is of no use. */
  uint64_t useful = DIV_ROUND_UP (DIV_ROUND_UP (limit, img->g.rb_entries) * 8,
                                  img->g.cluster_size);
  uint64_t wanted[2] = { rc->clusters + rc->clusters / 2 + 1, rc->clusters + 1 };

  gr->ci = rc->nr_entries << img->g.rb_bits;
  for (unsigned i = 0; i < 2; ++i) {
    gr->clusters = MIN (MIN (wanted[i], max), useful);
    if (gr->clusters <= rc->clusters)
      break;
    size_growth (img, gr);
    if (gr->clusters <= max && gr->ci + gr->clusters + gr->nr_blocks <= limit &&
        !regions_overlap (img, gr->ci << img->g.cluster_bits,
                          (gr->clusters + gr->nr_blocks) << img->g.cluster_bits))
      return 0;
  }
  return err_set (err, ENOSPC, "%s: no free cluster is left, and there is no room for a larger "
                  "refcount table", img->view.name);
}

static void
reset_growth (struct growth *gr)
{
  for (size_t i = 0; i < gr->blocks.len; ++i)
    free (gr->blocks.ptr[i]);
  vec_reset (&gr->blocks);
  free (gr->table);
  free (gr->cached);
  free (gr->full);
}

/* Everything that growing needs memory for, so that nothing can stop it later. */
static int
prepare_growth (struct image *img, struct growth *gr, struct err *err)
{
  struct refcounts *rc = &img->rc;
  uint64_t nr = (gr->clusters << img->g.cluster_bits) / 8;

  gr->table = calloc (nr, sizeof gr->table[0]);
  gr->cached = calloc (nr, sizeof gr->cached[0]);
  gr->full = calloc (nr, 1);
  if (!gr->table || !gr->cached || !gr->full ||
      rb_vec_reserve (&gr->blocks, gr->nr_blocks) < 0 ||
      rb_vec_reserve (&rc->ring, gr->nr_blocks) < 0)
    return err_set (err, ENOMEM, "out of memory");
  memcpy (gr->table, rc->table, rc->nr_entries * sizeof gr->table[0]);
  memcpy (gr->cached, rc->cached, rc->nr_entries * sizeof gr->cached[0]);
  memcpy (gr->full, rc->full, rc->nr_entries);
  for (uint64_t i = 0; i < gr->nr_blocks; ++i) {
    struct rb *rb = new_rb (img, gr->first_index + i,
                            (gr->ci + gr->clusters + i) << img->g.cluster_bits);

    if (rb == NULL)
      return err_set (err, ENOMEM, "out of memory");
    rb_vec_push (&gr->blocks, rb);
    gr->table[rb->index] = rb->host_off;
    gr->cached[rb->index] = rb;
  }
  for (uint64_t ci = gr->ci; ci < gr->ci + gr->clusters + gr->nr_blocks; ++ci)
    refbits_set (gr->cached[ci >> img->g.rb_bits]->data, img->g.refcount_order,
                 ci & (img->g.rb_entries - 1), 1);
  return 0;
}

/* Nothing names what is written here yet. */
static int
write_growth (struct image *img, const struct growth *gr, struct err *err)
{
  uint64_t bytes = gr->clusters << img->g.cluster_bits, host_off = gr->ci << img->g.cluster_bits;
  CLEANUP_FREE uint8_t *raw = malloc (bytes);
  int r;

  if (raw == NULL)
    return err_set (err, ENOMEM, "out of memory");
  for (uint64_t i = 0; i < bytes / 8; ++i)
    store_be64 (raw + i * 8, gr->table[i]);
  r = bdev_pwrite (img->file, raw, bytes, host_off, 0, err);
  for (size_t i = 0; r == 0 && i < gr->blocks.len; ++i)
    r = bdev_pwrite (img->file, gr->blocks.ptr[i]->data, img->g.cluster_size,
                     gr->blocks.ptr[i]->host_off, 0, err);
  return r;
}

/* The one write that makes the new table the table (I5), and the flushes around it. */
static int
switch_growth (struct image *img, const struct growth *gr, struct err *err)
{
  uint8_t field[12];
  int r;

  store_be64 (field, gr->ci << img->g.cluster_bits);
  store_be32 (field + 8, gr->clusters);
  /* The old blocks that only the new table will name are among the dirty ones. */
  r = refcounts_write_blocks_locked (img, err);
  if (r == 0)
    r = commit_flush_file (img, err);
  if (r == 0)
    r = commit_write (img, field, sizeof field, HEADER_OFF_RT, err);
  if (r == 0)
    r = commit_flush_file (img, err);
  return r;
}

static void
install_growth (struct image *img, struct growth *gr)
{
  struct refcounts *rc = &img->rc;

  for (size_t i = 0; i < gr->blocks.len; ++i)
    rb_vec_push (&rc->ring, gr->blocks.ptr[i]);
  gr->blocks.len = 0;
  rc->table_dirty.len = 0;      /* written with the table */
  rc->nr_entries = (gr->clusters << img->g.cluster_bits) / 8;
  rc->host_off = gr->ci << img->g.cluster_bits;
  rc->clusters = gr->clusters;
  free (rc->table);
  free (rc->cached);
  free (rc->full);
  rc->table = gr->table;
  rc->cached = gr->cached;
  rc->full = gr->full;
  gr->table = NULL;
  gr->cached = NULL;
  gr->full = NULL;
}

int
refcounts_grow_locked (struct image *img, struct err *err)
{
  struct refcounts *rc = &img->rc;
  struct growth gr = { 0 };
  uint64_t old_ci = rc->host_off >> img->g.cluster_bits, old_clusters = rc->clusters;
  int r = plan_growth (img, &gr, err);

  if (r < 0)
    return r;
  r = prepare_growth (img, &gr, err);
  if (r == 0)
    r = alloc_extend_locked (img, (gr.ci + gr.clusters + gr.nr_blocks) << img->g.cluster_bits,
                             err);
  if (r == 0)
    r = write_growth (img, &gr, err);
  if (r == 0)
    r = switch_growth (img, &gr, err);
  if (r == 0 && regions_move_rt_locked (img, gr.ci << img->g.cluster_bits,
                                        gr.clusters << img->g.cluster_bits) < 0) {
    struct err why = { 0 };

    r = err_set (&why, ENOMEM, "out of memory");
    image_break (img, r, &why); /* the disk has changed, and we can't follow */
    err_set (err, ENOMEM, "out of memory");
  }
  if (r == 0) {
    install_growth (img, &gr);
    /* Its removal is durable (I3). */
    for (uint64_t i = 0; r == 0 && i < old_clusters; ++i)
      r = refcount_drop_locked (img, old_ci + i, 1, err);
  }
  reset_growth (&gr);
  return r;
}
