/* Opening and closing an image, its first change, and its last.
 *
 * The caller has had the file checked (core/check); what is validated here is
 * what memory safety and the tables kept in RAM need: the header, where the L1
 * and refcount tables lie and how long they are.  L1 entries are loaded as they
 * are and judged when they are used.
 *
 * Before the first change to an image, header bits that it would make untrue
 * are cleared, durably: autoclear bits that nobody here knows, and the one that
 * says that the bitmaps are consistent, unless bitmaps.c can keep them so.
 *
 * A snapshot is served like the active disk, read-only, with its own L1 table and
 * size.  QEMU keeps the table as long as it was, so it may be shorter than the
 * size asks for: what it lacks is unallocated.
 *
 * Deliberately not here: finding or opening a backing file or a data file.  What the header
 * calls it is no business of this layer; the caller gives one or does not.
 */
#include <errno.h>
#include <string.h>

#include "base/log.h"
#include "dev/ahead.h"
#include "img/image-int.h"

#define DEFAULT_CACHE (16 << 20)
#define HEAD_BYTES    (UINT64_C (1) << 20)      /* of most files, what opening them reads is here */

/* --- broken for good */

void
image_break (struct image *img, int r, const struct err *why)
{
  LOCK_SCOPE (&img->broken_lock);

  if (atomic_load (&img->broken))
    return;
  img->broken_why = *why;
  log_debug ("%s: read-only from here on: %s", img->view.name,
             why->code ? why->msg : strerror (-r));
  atomic_store (&img->broken, true);
}

int
image_refuse (struct image *img, struct err *err)
{
  return err_set (err, EROFS, "%s: read-only since its metadata could not be written: %s",
                  img->view.name, img->broken_why.msg);
}

/* --- the first change */

static int
clear_autoclear (struct image *img, struct err *err)
{
  const struct header *h = &img->header;
  uint64_t keep = h->autoclear & AUTOCLEAR_KNOWN;
  bool bitmaps;
  uint8_t raw[8];
  int r = bitmaps_begin (img, &bitmaps, err);

  if (r < 0)
    return r;
  if (!bitmaps)
    keep &= ~AUTOCLEAR_BITMAPS;
  if (h->version >= 3 && keep != h->autoclear) {
    store_be64 (raw, keep);
    r = commit_write (img, raw, sizeof raw, HEADER_OFF_AUTOCLEAR, err);
  }
  if (r == 0 && (bitmaps || keep != h->autoclear))
    r = commit_flush_file (img, err);
  return r;
}

int
image_begin_change (struct image *img, struct err *err)
{
  int r;

  if (atomic_load_explicit (&img->broken, memory_order_acquire))
    return image_refuse (img, err);
  if (atomic_load_explicit (&img->changing, memory_order_acquire))
    return 0;
  LOCK_SCOPE (&img->change_lock);
  if (atomic_load_explicit (&img->changing, memory_order_acquire))
    return 0;
  r = clear_autoclear (img, err);
  if (r < 0)
    return r;
  if (img->file->can_grow) {
    /* So that the last cluster can be written in place; not ahead, or each start would add to it. */
    LOCK_SCOPE (&img->alloc_lock);
    r = bdev_grow (img->file, file_end (img), 0, err);
    if (r < 0)
      return r;
  }
  atomic_store_explicit (&img->changing, true, memory_order_release);
  return 0;
}

void
image_leave (struct image *img, unsigned token)
{
  grace_leave (&img->grace, token);
  if (atomic_load_explicit (&img->nr_retired, memory_order_relaxed) > img->max_retired)
    tcache_reclaim (img);
}

/* --- opening */

/* Name the features that were refused, where the image has names for them. */
static int
refuse_features (struct image *img, struct err *err)
{
  uint64_t cluster_size = UINT64_C (1) << img->header.cluster_bits;
  CLEANUP_FREE uint8_t *cluster = malloc (cluster_size);

  if (cluster == NULL || bdev_pread_padded (img->file, cluster, cluster_size, 0, NULL) < 0)
    return -ENOTSUP;            /* the bits were named */
  return header_refuse_features (cluster, &img->header, err);
}

/* The header and its extensions; everything in them that can't be served. */
static int
read_header (struct image *img, struct bdev *data_file, bool writable, struct err *err)
{
  struct header *h = &img->header;
  CLEANUP_FREE uint8_t *cluster = NULL;
  uint8_t fixed[HEADER_FIXED_LENGTH];
  const char *missing = NULL;
  int r = bdev_pread_padded (img->file, fixed, sizeof fixed, 0, err);

  if (r < 0)
    return r;
  header_decode (fixed, sizeof fixed, h);
  r = header_usable (h, err);
  if (r == -ENOTSUP && header_unknown_features (h))
    r = refuse_features (img, err);
  if (r < 0)
    return r;
  if ((h->incompatible & INCOMPAT_DATA_FILE) && data_file == NULL)
    return err_set (err, ENOTSUP, "the image has an external data file, which was not given");
  if (!(h->incompatible & INCOMPAT_DATA_FILE) && data_file)
    return err_set (err, EINVAL, "the image has no external data file, but one was given");
  if (h->crypt_method != CRYPT_NONE)
    missing = h->crypt_method == CRYPT_AES ? "AES encryption" : "LUKS encryption";
  if (missing)
    return err_set (err, ENOTSUP, "the image has %s, which is not supported yet", missing);
  if (writable && (h->incompatible & (INCOMPAT_DIRTY | INCOMPAT_CORRUPT)))
    return err_set (err, EROFS, "the image is marked %s: until it is repaired, it can only be "
                    "opened read-only",
                    h->incompatible & INCOMPAT_CORRUPT ? "corrupt" : "dirty");
  geom_init (&img->g, h);
  img->data = bdev_ref (data_file ? data_file : img->file);
  img->raw_data = img->g.data_file && (h->autoclear & AUTOCLEAR_DATA_FILE_RAW);
  img->unit_bits = img->g.cluster_bits - (img->g.extended_l2 ? SUBCLUSTER_BITS : 0);
  img->unit_size = UINT64_C (1) << img->unit_bits;
  cluster = malloc (img->g.cluster_size);
  if (cluster == NULL)
    return err_set (err, ENOMEM, "out of memory");
  r = bdev_pread_padded (img->file, cluster, img->g.cluster_size, 0, err);
  return r < 0 ? r : header_decode_extensions (cluster, h, err);
}

/* Which L1 table is served, and how large the disk is. */
static int
choose_disk (struct image *img, const struct snapshot *sn, uint64_t *size, struct err *err)
{
  const struct header *h = &img->header;
  uint64_t needed;

  img->l1_host_off = sn ? sn->l1_host_off : h->l1_host_off;
  img->l1_entries = sn ? sn->l1_entries : h->l1_entries;
  *size = sn && sn->size ? sn->size : h->size;
  needed = geom_l1_entries (&img->g, *size);
  if (sn && img->g.data_file)
    return err_set (err, ENOTSUP, "an image with an external data file can't have snapshots");
  if (needed > (sn ? MAX_L1_BYTES / 8 : img->l1_entries))
    return err_set (err, EINVAL, "the L1 table has %u entries, but %llu bytes of virtual disk "
                    "need %llu", img->l1_entries, ULL (*size), ULL (needed));
  img->l1_len = MAX (img->l1_entries, needed);
  return 0;
}

static int
load_l1 (struct image *img, struct err *err)
{
  uint64_t bytes = (uint64_t) img->l1_entries * 8, host_off = img->l1_host_off;
  CLEANUP_FREE uint8_t *raw = NULL;
  struct ahead ahead;

  if (bytes > MAX_L1_BYTES || !IS_ALIGNED (host_off, img->g.cluster_size) ||
      !range_fits (host_off, bytes, file_end (img)) || (bytes && host_off == 0))
    return err_set (err, EINVAL, "the L1 table (%u entries at host offset 0x%llx) can't be right",
                    img->l1_entries, ULL (host_off));
  img->l1 = calloc (MAX (img->l1_len, 1), sizeof img->l1[0]);
  raw = malloc (IO_CHUNK);
  if (!img->l1 || !raw)
    return err_set (err, ENOMEM, "out of memory");
  ahead_init_bytes (&ahead, img->file, host_off, bytes, IO_CHUNK);
  for (uint64_t off = 0; off < bytes; off += IO_CHUNK) {
    uint64_t n = MIN (bytes - off, IO_CHUNK);
    int r;

    ahead_at (&ahead, off / IO_CHUNK);
    r = bdev_pread_padded (img->file, raw, n, host_off + off, err);
    if (r < 0)
      return r;
    for (uint64_t i = 0; i < n; i += 8) {
      uint64_t entry = load_be64 (raw + i);

      if (entry)                /* pages of zeros stay untouched */
        atomic_store_explicit (&img->l1[(off + i) / 8], entry, memory_order_relaxed);
    }
  }
  return 0;
}

static int
init_locks (struct image *img, struct err *err)
{
  pthread_mutex_t *mutexes[] = {
    &img->table_lock, &img->state_lock, &img->reclaim_lock, &img->alloc_lock, &img->range_mutex,
    &img->data_lock, &img->resize_lock, &img->commit_mutex, &img->change_lock,
    &img->broken_lock,
  };
  int r = grace_init (&img->grace);

  for (size_t i = 0; i < sizeof mutexes / sizeof mutexes[0]; ++i)
    pthread_mutex_init (mutexes[i], NULL);
  for (size_t i = 0; i < NR_LOAD_LOCKS; ++i)
    pthread_mutex_init (&img->load_lock[i], NULL);
  pthread_cond_init (&img->range_cond, NULL);
  pthread_cond_init (&img->commit_cond, NULL);
  return r < 0 ? err_set (err, -r, "out of memory") : 0;
}

static void
destroy_locks (struct image *img)
{
  pthread_mutex_t *mutexes[] = {
    &img->table_lock, &img->state_lock, &img->reclaim_lock, &img->alloc_lock, &img->range_mutex,
    &img->data_lock, &img->resize_lock, &img->commit_mutex, &img->change_lock,
    &img->broken_lock,
  };

  for (size_t i = 0; i < sizeof mutexes / sizeof mutexes[0]; ++i)
    pthread_mutex_destroy (mutexes[i]);
  for (size_t i = 0; i < NR_LOAD_LOCKS; ++i)
    pthread_mutex_destroy (&img->load_lock[i]);
  pthread_cond_destroy (&img->range_cond);
  pthread_cond_destroy (&img->commit_cond);
  grace_destroy (&img->grace);
}

/* All but the view's name; img may be half made. */
static void
free_image (struct image *img)
{
  regions_free (img);
  refcounts_free (img);
  tcache_free (img);
  compressed_free (img);
  bitmaps_free (img);
  free (img->l1);
  vec_reset (&img->l1_dirty);
  vec_reset (&img->frees);
  header_reset (&img->header);
  bdev_unref (img->data);
  bdev_unref (img->file);
  bdev_unref (img->backing);
  destroy_locks (img);
  free (img);
}

void
image_close (struct bdev *d)
{
  struct image *img = view_image (d);
  struct err err = { 0 };

  if (atomic_load (&img->changing) && !atomic_load (&img->broken)) {
    if (bitmaps_store (img, &err) < 0)
      log_debug ("%s: closing: bitmaps stay marked as in use: %s", img->view.name, err.msg);
    err_clear (&err);
    if (commit_all (img, &err) < 0)
      log_debug ("%s: closing: %s", img->view.name, err.msg);
  }
  free_image (img);
}

/* After read_header. */
static int
open_tables (struct image *img, size_t cache_size, struct err *err)
{
  int r = load_l1 (img, err);

  if (cache_size == 0)
    cache_size = DEFAULT_CACHE;
  if (r == 0)
    r = tcache_init (img, cache_size / 4 * 3, err);
  if (r == 0)
    r = compressed_init (img, cache_size / 2, err);
  if (r == 0)
    r = regions_init (img, err);
  if (r == 0 && img->view.writable)
    r = refcounts_init (img, cache_size / 4, err);
  return r;
}

int
image_open (struct bdev *file, const struct image_options *opts,
            struct bdev **view, struct err *err)
{
  bool writable = file->writable && !opts->read_only && !opts->snapshot &&
                  (!opts->data_file || opts->data_file->writable);
  struct image *img = calloc (1, sizeof *img);
  struct err why = { 0 };
  uint64_t size = 0;
  int r;

  if (img == NULL)
    return err_set (err, ENOMEM, "out of memory");
  ahead_hint (file, 0, HEAD_BYTES);
  img->file = bdev_ref (file);
  img->backing = bdev_ref (opts->backing);
  img->careful = opts->careful;
  r = init_locks (img, &why);
  if (r == 0)
    r = read_header (img, opts->data_file, writable, &why);
  if (r == 0)
    r = choose_disk (img, opts->snapshot, &size, &why);
  if (r == 0)
    r = bdev_init (&img->view, &image_ops, file->name, size, writable, false, &why);
  if (r == 0) {
    img->view.far = file->far || img->data->far || (img->backing && img->backing->far);
    img->lazy = writable && (img->header.compatible & COMPAT_LAZY_REFCOUNTS);
    img->backed = img->backing || img->header.backing_off != 0;
    atomic_init (&img->durable_size, size);
    r = open_tables (img, opts->cache_size, &why);
  }
  if (r < 0) {
    err_set (err, -r, "%s: %s", file->name, why.msg);
    free (img->view.name);
    free_image (img);
    return r;
  }
  *view = &img->view;
  return 0;
}

void
image_set_growable (struct bdev *view, bool can_grow)
{
  assert (view->ops == &image_ops);
  view->can_grow = can_grow;
}

const struct header *
image_header (struct bdev *view)
{
  assert (view->ops == &image_ops);
  return &view_image (view)->header;
}
