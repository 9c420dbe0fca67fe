/* A new, empty image: header, refcount table, refcount blocks and L1 table, one
 * after the other from the start of the file.
 *
 * The refcount structures cover exactly these clusters; they grow with the
 * image.  Everything but the header is written and flushed before the header
 * is, so that a creation cut short leaves no image at all (I5).
 */
#include <errno.h>

#include "fmt/refbits.h"
#include "img/image-int.h"

struct layout {
  struct geom g;
  uint64_t l1_entries;
  uint64_t rt_clusters, nr_blocks, l1_clusters, total;  /* clusters */
};

/* Blocks to count every cluster, a table to name every block, and both are
 * clusters too.
 */
static void
plan_layout (struct layout *l)
{
  l->rt_clusters = l->nr_blocks = 1;
  for (;;) {
    uint64_t blocks, table;

    l->total = 1 + l->rt_clusters + l->nr_blocks + l->l1_clusters;
    blocks = DIV_ROUND_UP (l->total, l->g.rb_entries);
    table = DIV_ROUND_UP (blocks * 8, l->g.cluster_size);
    if (blocks <= l->nr_blocks && table <= l->rt_clusters)
      return;
    l->nr_blocks = MAX (blocks, l->nr_blocks);
    l->rt_clusters = MAX (table, l->rt_clusters);
  }
}

static int
check_params (const struct image_params *p, struct layout *l, struct err *err)
{
  struct header h = {
    .magic = HEADER_MAGIC,
    .version = p->version,
    .cluster_bits = p->cluster_bits,
    .refcount_order = p->refcount_order,
    .header_length = HEADER_V3_MIN_LENGTH,
  };
  int r = header_usable (&h, err);

  if (r < 0)
    return r;
  if (p->version < 3 && p->refcount_order != 4)
    return err_set (err, EINVAL, "version 2 images have refcounts of 16 bits, not %u",
                    1u << p->refcount_order);
  geom_init (&l->g, &h);
  /* One at least: a table of no entries has no place. */
  l->l1_entries = MAX (geom_l1_entries (&l->g, MAX (p->size, p->max_size)), 1);
  if (l->l1_entries > MAX_L1_BYTES / 8)
    return err_set (err, EFBIG, "a virtual disk of %llu bytes needs larger clusters than %llu "
                    "bytes", ULL (MAX (p->size, p->max_size)), ULL (l->g.cluster_size));
  l->l1_clusters = DIV_ROUND_UP (l->l1_entries * 8, l->g.cluster_size);
  plan_layout (l);
  if (l->rt_clusters << l->g.cluster_bits > MAX_RT_BYTES)
    return err_set (err, EFBIG, "the refcount table would be too large");
  return 0;
}

/* The table names the blocks that follow it; each block counts its share. */
static int
write_refcounts (struct bdev *file, const struct layout *l, struct err *err)
{
  uint64_t rt_bytes = l->rt_clusters << l->g.cluster_bits, first = 1 + l->rt_clusters;
  CLEANUP_FREE uint8_t *table = calloc (1, rt_bytes);
  CLEANUP_FREE uint8_t *block = malloc (l->g.cluster_size);
  int r;

  if (!table || !block)
    return err_set (err, ENOMEM, "out of memory");
  for (uint64_t i = 0; i < l->nr_blocks; ++i)
    store_be64 (table + i * 8, (first + i) << l->g.cluster_bits);
  r = bdev_pwrite (file, table, rt_bytes, l->g.cluster_size, 0, err);
  for (uint64_t i = 0; r == 0 && i < l->nr_blocks; ++i) {
    uint64_t begin = i << l->g.rb_bits;
    uint64_t used = l->total > begin ? MIN (l->total - begin, l->g.rb_entries) : 0;

    memset (block, 0, l->g.cluster_size);
    for (uint64_t j = 0; j < used; ++j)
      refbits_set (block, l->g.refcount_order, j, 1);
    r = bdev_pwrite (file, block, l->g.cluster_size, (first + i) << l->g.cluster_bits, 0, err);
  }
  return r;
}

int
image_create (struct bdev *file, const struct image_params *p, struct err *err)
{
  struct layout l = { .total = 0 };
  CLEANUP_FREE uint8_t *header = NULL;
  struct header_template t = {
    .version = p->version,
    .cluster_bits = p->cluster_bits,
    .refcount_order = p->refcount_order,
    .size = p->size,
    .backing_name = p->backing_name,
    .backing_format = p->backing_format,
    .private_ext_type = p->private_ext_type,
    .private_ext = p->private_ext,
    .private_ext_len = p->private_ext_len,
  };
  int r = check_params (p, &l, err);

  if (r < 0)
    return r;
  if (bdev_size (file) != 0)
    return err_set (err, EINVAL, "%s: a new image needs an empty file", file->name);
  t.l1_entries = l.l1_entries;
  t.rt_host_off = l.g.cluster_size;
  t.rt_clusters = l.rt_clusters;
  t.l1_host_off = (l.total - l.l1_clusters) << l.g.cluster_bits;
  header = calloc (1, l.g.cluster_size);
  if (header == NULL)
    return err_set (err, ENOMEM, "out of memory");
  r = header_encode (&t, header, err);
  /* What a file grew by reads as zeros: the L1 table is there already. */
  if (r == 0)
    r = bdev_resize (file, l.total << l.g.cluster_bits, err);
  if (r == 0)
    r = write_refcounts (file, &l, err);
  if (r == 0)
    r = bdev_flush (file, err);
  if (r == 0)
    r = bdev_pwrite (file, header, l.g.cluster_size, 0, 0, err);
  if (r == 0)
    r = bdev_flush (file, err);
  return r;
}
