/* Guest cluster -> host cluster: looking entries up, and changing them.
 *
 * Every value comes from a disk that may hold anything, so every entry is
 * judged each time it is met: reserved bits, alignment, the end of the file,
 * the fixed metadata (regions.c).  One that can't be right makes the request
 * fail with EIO, with a message that names both offsets, and nothing more.
 *
 * An L2 table is made, or copied because a snapshot shares it, before the first
 * of its entries changes.  The new table is written in full at once and its L1
 * entry set in RAM; both are durable only with a commit, table first (I2).
 * Slices in RAM stay as they are meanwhile: copying a table changes no entry.
 *
 * With extended L2 entries a run ends where the kind of its subclusters does; an
 * entry is judged together with its bitmap.  Clusters of an external data file
 * lie where the guest sees them, or the entry can't be right.
 *
 * Deliberately not here: what a changed entry should be (write.c, discard.c),
 * and when it reaches the disk (commit.c).
 */
#include <errno.h>

#include "img/image-int.h"

int
map_check_l1 (struct image *img, uint64_t l1_index, uint64_t raw, struct err *err)
{
  uint64_t host_off = raw & L1E_OFF_MASK;
  const char *why = NULL;

  if (raw & L1E_RESERVED_MASK)
    why = "reserved bits are set";
  else if (host_off == 0)
    return 0;
  else if (!IS_ALIGNED (host_off, img->g.cluster_size))
    why = "misaligned";
  else if (!range_fits (host_off, img->g.cluster_size, file_end (img)))
    why = "past the end of the file";
  else if (regions_overlap (img, host_off, img->g.cluster_size))
    why = "inside other metadata";
  if (why == NULL)
    return 0;
  return err_set (err, EIO, "%s: L1 entry %llu (guest offset 0x%llx) points to an L2 table at "
                  "host offset 0x%llx: %s", img->view.name, ULL (l1_index),
                  ULL (l1_index << (img->g.cluster_bits + img->g.l2_bits)), ULL (host_off), why);
}

/* What can't be right about a compressed descriptor, or NULL. */
static const char *
judge_compressed (struct image *img, const struct l2_entry *e)
{
  uint64_t first = ROUND_DOWN (e->host_off, img->g.cluster_size), end = file_end (img);
  uint64_t len = e->host_len;

  /* A stream says itself where it ends: one with too large a count of sectors can be read all
   * the same.  But to overwrite it is to drop references to clusters that are not there, or not its.
   */
  if (!img->view.writable && e->host_off < end)
    len = 1;
  if (img->g.data_file)
    return "a compressed cluster cannot lie in an external data file";
  if (e->reserved)
    return "reserved bits are set";
  if (!range_fits (e->host_off, len, end))
    return "a compressed stream past the end of the file";
  if (regions_overlap (img, first, ROUND_UP (e->host_off + len, img->g.cluster_size) - first))
    return "a compressed stream inside metadata";
  return NULL;
}

/* Can n clusters at host_off, where guest_off is said to lie, be the guest's? */
static const char *
check_place (const struct image *img, uint64_t guest_off, uint64_t host_off, uint64_t n)
{
  if (!IS_ALIGNED (host_off, img->g.cluster_size))
    return "misaligned";
  if (img->g.data_file)
    return host_off == guest_off ? NULL : "another place in the external data file";
  if (!range_fits (host_off, n << img->g.cluster_bits, file_end (img)))
    return "past the end of the file";
  if (regions_overlap (img, host_off, n << img->g.cluster_bits))
    return "inside metadata";
  return NULL;
}

/* Judge one entry on its own, the cluster it names included. */
static int
check_entry (struct image *img, uint64_t guest_off, struct l2_pair p, struct err *err)
{
  struct l2_entry e = l2_entry_decode (p.raw, p.bitmap, &img->g);
  bool has_host = l2_has_host (p.raw, &img->g);
  const char *why = NULL;

  if (p.raw == ENTRY_UNREAD)
    return err_set (err, EIO, "%s: the cluster at guest offset 0x%llx: its L2 entry cannot be read",
                    img->view.name, ULL (guest_off));
  if (e.kind == CLUSTER_COMPRESSED)
    why = judge_compressed (img, &e);
  else if (e.reserved || (img->g.version < 3 && (p.raw & L2E_ZERO)))
    why = "reserved bits are set";
  else if ((p.bitmap >> 32) & p.bitmap & BITMAP_ALL_ALLOC)
    why = "a subcluster is both allocated and zero";
  else if (!has_host && (p.bitmap & BITMAP_ALL_ALLOC))
    why = "subclusters are allocated in no cluster";
  else if (has_host)
    why = check_place (img, guest_off, e.host_off, 1);
  if (why == NULL)
    return 0;
  return err_set (err, EIO, "%s: the cluster at guest offset 0x%llx is mapped to host offset "
                  "0x%llx: %s", img->view.name, ULL (guest_off), ULL (e.host_off), why);
}

/* From guest_off on there is no L2 table: for how many bytes? */
static uint64_t
absent_length (struct image *img, uint64_t guest_off, uint64_t max)
{
  uint64_t len = img->g.l2_coverage - (guest_off & (img->g.l2_coverage - 1));

  while (len < max) {
    uint64_t l1_index = map_l1_index (img, guest_off + len);

    if (l1_index >= img->l1_len || map_l1 (img, l1_index) != 0)
      break;
    len += img->g.l2_coverage;
  }
  return MIN (len, max);
}

/* How many of the entries i, i+1, ... (at most max) go on where the first, e, raw,
 * begins?
 */
static uint64_t
count_contiguous (struct image *img, const struct slice *s, unsigned i, uint64_t max,
                  uint64_t raw, const struct l2_entry *e, uint64_t guest_off)
{
  bool has_host = e->kind == CLUSTER_NORMAL || e->kind == CLUSTER_ZERO_ALLOC;
  uint64_t step = has_host ? img->g.cluster_size : 0, n = 1;

  max = MIN (max, (UINT64_C (1) << img->slice_bits) - i);
  while (n < max &&
         atomic_load_explicit (&s->entries[i + n], memory_order_acquire) == raw + n * step)
    ++n;
  /* The first was judged; the others only look like it so far. */
  if (n > 1 && has_host && check_place (img, guest_off, e->host_off, n) != NULL)
    n = 1;
  return n;
}

/* The same for extended entries, in bytes from the start of the cluster i, whose
 * pair is p; the run begins in its subcluster sc and needs at most max bytes.
 */
static uint64_t
subclusters_end (struct image *img, const struct slice *s, unsigned i, struct l2_pair p,
                 unsigned sc, uint64_t guest_off, uint64_t max)
{
  struct l2_entry first = map_decode (img, p, sc), e;
  uint64_t n = 0, end;

  for (;;) {
    while (sc < 1u << SUBCLUSTER_BITS && map_decode (img, p, sc).kind == first.kind)
      ++sc;
    end = (n << img->g.cluster_bits) + ((uint64_t) sc << img->unit_bits);
    ++n;
    if (sc < 1u << SUBCLUSTER_BITS || end >= max || i + n >= 1u << img->slice_bits)
      return end;
    sc = 0;
    p = slice_pair (img, s, i + n);
    e = map_decode (img, p, 0);
    /* A bad one is found when the next run begins with it. */
    if (e.kind != first.kind ||
        check_entry (img, guest_off + (n << img->g.cluster_bits), p, NULL) < 0)
      return end;
    if (e.kind == CLUSTER_NORMAL &&
        (e.copied != first.copied || e.host_off != first.host_off + (n << img->g.cluster_bits)))
      return end;
  }
}

int
map_lookup (struct image *img, uint64_t guest_off, uint64_t max, struct run *run,
            struct err *err)
{
  uint64_t mask = img->g.cluster_size - 1, in_cluster = guest_off & mask, end;
  unsigned sc = map_subcluster (img, guest_off);
  unsigned i = (guest_off >> img->g.cluster_bits) & ((1u << img->slice_bits) - 1);
  struct l2_pair p;
  struct l2_entry e;
  struct slice *s;
  int r = slice_get (img, guest_off >> img->slice_cover_bits, &s, err);

  if (r < 0)
    return r;
  if (s == NULL) {
    *run = (struct run) { .kind = CLUSTER_UNALLOCATED, .durable = true };
    run->len = absent_length (img, guest_off, max);
    return 0;
  }
  p = slice_pair (img, s, i);
  r = check_entry (img, guest_off & ~mask, p, err);
  if (r < 0)
    return r;
  e = map_decode (img, p, sc);
  if (e.kind == CLUSTER_COMPRESSED) {
    *run = (struct run) { .kind = e.kind, .host_off = e.host_off, .stream_len = e.host_len,
                          .len = MIN (img->g.cluster_size - in_cluster, max) };
    return 0;
  }
  if (img->g.extended_l2)
    end = subclusters_end (img, s, i, p, sc, guest_off & ~mask, in_cluster + max);
  else
    end = count_contiguous (img, s, i, DIV_ROUND_UP (in_cluster + max, img->g.cluster_size),
                            p.raw, &e, guest_off & ~mask) << img->g.cluster_bits;
  run->kind = e.kind;
  run->host_off = e.host_off + in_cluster;
  run->len = MIN (end - in_cluster, max);
  run->copied = e.copied;
  /* After the entries: see slice_mark_dirty_locked. */
  run->durable = atomic_load_explicit (&s->state, memory_order_acquire) == 0;
  return 0;
}

int
map_entries (struct image *img, uint64_t guest_off, unsigned n, struct l2_pair *p,
             struct err *err)
{
  unsigned first = (guest_off >> img->g.cluster_bits) & ((1u << img->slice_bits) - 1);
  struct slice *s;
  int r = slice_get (img, guest_off >> img->slice_cover_bits, &s, err);

  if (r < 0)
    return r;
  for (unsigned i = 0; i < n; ++i) {
    p[i] = s ? slice_pair (img, s, first + i) : (struct l2_pair) { 0 };
    r = check_entry (img, guest_off + ((uint64_t) i << img->g.cluster_bits), p[i], err);
    if (r < 0)
      return r;
  }
  return 0;
}

/* The contents of a new table: those of the old one if there is one, but with
 * no cluster that may be written in place, since a snapshot has them all too (in
 * a data file nothing is shared).
 * Zeros are written as well: if the host's file system is full, it should say
 * so now, when the guest can be told, and not in a commit.
 */
static int
write_table (struct image *img, uint64_t old_host_off, uint64_t new_host_off, struct err *err)
{
  CLEANUP_FREE uint8_t *table = NULL;
  int r;

  table = calloc (1, img->g.cluster_size);
  if (table == NULL)
    return err_set (err, ENOMEM, "out of memory");
  if (old_host_off) {
    r = bdev_pread_padded (img->file, table, img->g.cluster_size, old_host_off, err);
    if (r < 0)
      return r;
    for (uint64_t i = 0; i < img->g.l2_entries && !img->g.data_file; ++i) {
      uint8_t *entry = table + i * img->g.l2e_size;

      store_be64 (entry, load_be64 (entry) & ~ENTRY_COPIED);
    }
  }
  return bdev_pwrite (img->file, table, img->g.cluster_size, new_host_off, 0, err);
}

static int
publish_table (struct image *img, uint64_t l1_index, uint64_t old_host_off,
               uint64_t new_host_off, struct err *err)
{
  LOCK_SCOPE (&img->state_lock);

  if (u64_vec_reserve (&img->frees, 1) < 0 || u64_vec_push (&img->l1_dirty, l1_index) < 0)
    return err_set (err, ENOMEM, "out of memory");
  atomic_store_explicit (&img->l1[l1_index], new_host_off | ENTRY_COPIED, memory_order_release);
  if (old_host_off) {
    u64_vec_push (&img->frees, old_host_off >> img->g.cluster_bits << 1);
    atomic_fetch_add_explicit (&img->nr_frees, 1, memory_order_relaxed);
  }
  return 0;
}

int
map_ensure_table (struct image *img, uint64_t guest_off, struct err *err)
{
  uint64_t l1_index = map_l1_index (img, guest_off), l1 = map_l1 (img, l1_index);
  uint64_t old_host_off, new_host_off, got;
  bool fresh;
  int r;

  if ((l1 & ENTRY_COPIED) && (l1 & L1E_OFF_MASK))
    return 0;
  LOCK_SCOPE (&img->table_lock);
  l1 = map_l1 (img, l1_index);
  old_host_off = l1 & L1E_OFF_MASK;
  if ((l1 & ENTRY_COPIED) && old_host_off)
    return 0;
  r = map_check_l1 (img, l1_index, l1, err);
  if (r == 0)
    r = alloc_run (img, 1, &new_host_off, &got, &fresh, err);
  if (r < 0)
    return r;
  r = write_table (img, old_host_off, new_host_off, err);
  if (r == 0)
    r = publish_table (img, l1_index, old_host_off, new_host_off, err);
  if (r < 0)
    alloc_release (img, new_host_off, 1);       /* nothing ever named it */
  return r;
}

int
map_update (struct image *img, uint64_t guest_off, unsigned n, const struct l2_pair *p,
            const uint64_t *frees, size_t nr_frees, struct err *err)
{
  uint64_t sn = guest_off >> img->slice_cover_bits;
  unsigned first = (guest_off >> img->g.cluster_bits) & ((1u << img->slice_bits) - 1);

  for (;;) {
    struct slice *s;
    int r = slice_get (img, sn, &s, err);

    if (r < 0)
      return r;
    assert (s);                 /* map_ensure_table */
    if (s->torn_ms)
      return err_set (err, EIO, "%s: the L2 table of guest offset 0x%llx cannot be read as a whole, so "
                      "it is not changed", img->view.name, ULL (guest_off));
    LOCK_SCOPE (&img->state_lock);
    if (slice_peek (img, sn) != s)
      continue;                 /* evicted since: a change to it would be lost */
    if (u64_vec_reserve (&img->frees, nr_frees) < 0)
      return err_set (err, ENOMEM, "out of memory");
    slice_mark_dirty_locked (img, s);
    slice_set_pairs_locked (img, s, first, n, p);
    for (size_t i = 0; i < nr_frees; ++i)
      u64_vec_push (&img->frees, frees[i]);
    atomic_fetch_add_explicit (&img->nr_frees, nr_frees, memory_order_relaxed);
    return 0;
  }
}
