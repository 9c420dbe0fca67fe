/* Where the metadata with a fixed place lies: the header's cluster, the L1
 * table, that of a snapshot that is served, the refcount table and the snapshot table.
 *
 * Two users: the allocator, which must never hand such a cluster out even if
 * its refcount says that it is free; and the mapping, where an entry that
 * points into one can't be right, so that a guest write can never reach it.
 *
 * Deliberately not here: L2 tables, refcount blocks and the snapshots' L1
 * tables, which are as many as the image likes.  Whether something points into
 * those is the checker's business, before the image is opened.
 */
#include <errno.h>

#include "fmt/snaptab.h"
#include "img/image-int.h"

/* Bytes of the snapshot table, which is as long as its entries say. */
static int
snapshot_table_length (struct image *img, uint64_t *len_ret, struct err *err)
{
  const struct header *h = &img->header;
  CLEANUP_FREE uint8_t *buf = NULL;
  uint64_t cap = 0, off = 0, need;

  if (h->nr_snapshots > MAX_SNAPSHOTS || h->snapshots_host_off == 0 ||
      !IS_ALIGNED (h->snapshots_host_off, img->g.cluster_size))
    return err_set (err, EINVAL, "%u snapshots in a table at host offset 0x%llx: "
                    "that can't be right", h->nr_snapshots,
                    ULL (h->snapshots_host_off));
  for (uint32_t i = 0; i < h->nr_snapshots; ) {
    struct snapshot s;
    int r = snapshot_decode (buf, cap, off, &s, &need, err);

    if (r == 0) {
      free (s.id);
      free (s.name);
      off += s.entry_len;
      ++i;
      continue;
    }
    if (r != -EAGAIN)
      return r;
    cap = MAX (ROUND_UP (off + need, 65536), cap * 2);
    if (cap > MAX_SNAPSHOT_TABLE_BYTES || !range_fits (h->snapshots_host_off, off, file_end (img)))
      return err_set (err, EINVAL, "the snapshot table at host offset 0x%llx has no end",
                      ULL (h->snapshots_host_off));
    free (buf);
    buf = malloc (cap);
    if (buf == NULL)
      return err_set (err, ENOMEM, "out of memory");
    r = bdev_pread_padded (img->file, buf, cap, h->snapshots_host_off, err);
    if (r < 0)
      return r;
  }
  *len_ret = off;
  return 0;
}

int
regions_init (struct image *img, struct err *err)
{
  const struct header *h = &img->header;
  struct regions *n = calloc (1, sizeof *n);
  int r;

  if (n == NULL)
    return err_set (err, ENOMEM, "out of memory");
  atomic_store (&img->regions, n);
  n->r[REGION_HEADER].len = img->g.cluster_size;
  n->r[REGION_L1].off = h->l1_host_off;
  n->r[REGION_L1].len = (uint64_t) h->l1_entries * 8;
  n->r[REGION_SNAPSHOT_L1].off = img->l1_host_off;
  n->r[REGION_SNAPSHOT_L1].len = img->l1_host_off == h->l1_host_off ? 0
                                                     : (uint64_t) img->l1_entries * 8;
  if (!img->view.writable)
    return 0;
  n->r[REGION_RT].off = h->rt_host_off;
  n->r[REGION_RT].len = (uint64_t) h->rt_clusters << img->g.cluster_bits;
  if (h->nr_snapshots) {
    r = snapshot_table_length (img, &n->r[REGION_SNAPSHOTS].len, err);
    if (r < 0)
      return r;
    n->r[REGION_SNAPSHOTS].off = h->snapshots_host_off;
  }
  return 0;
}

void
regions_free (struct image *img)
{
  struct regions *n = atomic_load (&img->regions), *older;

  for (; n; n = older) {
    older = n->older;
    free (n);
  }
}

bool
regions_overlap (const struct image *img, uint64_t host_off, uint64_t len)
{
  const struct regions *n = atomic_load_explicit (&img->regions, memory_order_acquire);

  for (int i = 0; i < NR_REGIONS; ++i)
    if (n->r[i].len && ranges_overlap (host_off, len, n->r[i].off, n->r[i].len))
      return true;
  return false;
}

int
regions_move_rt_locked (struct image *img, uint64_t host_off, uint64_t len)
{
  struct regions *old = atomic_load_explicit (&img->regions, memory_order_relaxed);
  struct regions *n = malloc (sizeof *n);

  if (n == NULL)
    return -ENOMEM;
  *n = *old;
  n->r[REGION_RT].off = host_off;
  n->r[REGION_RT].len = len;
  n->older = old;
  atomic_store_explicit (&img->regions, n, memory_order_release);
  return 0;
}
