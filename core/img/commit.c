/* Writing metadata out, in the one order that a crash can't hurt.
 *
 *   0  under state_lock: copy the dirty L2 slices and L1 entries as they are now
 *      and take the list of references removed so far.  The data of everything
 *      they name was written before they named it; its refcounts are in RAM.
 *   A  write the dirty refcount blocks and, if the disk grew, the header's size
 *      field; flush.  If the refcount table got new entries: they name blocks
 *      that are durable now; write them; flush.
 *      An external data file is flushed as well.
 *      => data (I4), refcounts (I2) and new L2 tables are durable.
 *   B  write the L1 entries that changed; flush.  They name tables that are durable
 *      since A, with what these held when they were made: nothing, or a copy of the
 *      table that a snapshot keeps.  Then write the copied slices; flush.
 *      => the new mapping is durable, the old one is gone.  And a table that nothing
 *      names never holds an entry of its own, which to a check is a table that
 *      was lost, not one that was never there (core/check/check-orphans.c).
 *   C  the references taken in 0 are gone from the disk (I3).  Wait until nobody
 *      uses what they named, punch what was discarded, and only then lower the
 *      refcounts, in RAM: from there on the allocator may use the clusters
 *      again.  The next commit writes those refcounts; until then they leak.
 *
 * With lazy refcounts, A does not write refcount blocks, nor the table's entries
 * for new ones, but sets the dirty bit in the header, the first time; its flush
 * makes that durable before B.  From then on the refcounts on disk mean nothing:
 * whoever opens the image after a crash counts them anew.  Blocks are written
 * when too many wait in RAM, and by commit_all, which clears the bit at the very
 * end.
 *
 * With nothing dirty a flush of the file is all.  One commit runs at a time.
 * A flush that finds one running can't know whether that saw everything it
 * must, so it waits for the next, which all who came meanwhile share.
 *
 * A failure in A or B breaks the image for good: what the disk holds is no
 * longer known, and an fsync that failed can't be repeated.  What it holds is
 * still some state between two steps, and so at most leaks.
 *
 * LIMIT: a full host file system is told to the guest as ENOSPC when clusters
 * and tables are taken, which are written there and then.  One that copies on
 * write can still be full in a commit; then the image stays read-only until it
 * is opened again.
 */
#include <errno.h>
#include <string.h>

#include "img/image-int.h"

/* References waiting to be dropped beyond which writers commit first: their
 * space is in use until then.
 */
#define MAX_FREES 65536                 /* clusters */
#define MAX_FREE_BYTES (UINT64_C (1) << 30)

/* Entries of the L1 table are written together if no more than this lie between. */
#define L1_GAP 64

struct staged_slice {
  struct slice *slice;
  uint64_t host_off;
};

struct l1_piece {
  uint64_t first, n;            /* entries */
};
DEFINE_VEC (l1_piece_vec, struct l1_piece);

struct commit {
  struct staged_slice *slices;  /* by host_off */
  size_t nr_slices;
  uint8_t *slice_bytes;         /* their contents, in that order, as on disk */
  struct l1_piece_vec l1_pieces;
  struct u64_vec l1_values;     /* theirs, one piece after the other, as on disk */
  struct u64_vec frees;
  uint64_t size;                /* for the header; 0 = unchanged */
  struct u64_vec table_dirty;   /* refcount table entries to write */
};

static void
reset_commit (struct commit *c)
{
  free (c->slices);
  free (c->slice_bytes);
  vec_reset (&c->l1_pieces);
  vec_reset (&c->l1_values);
  vec_reset (&c->frees);
  vec_reset (&c->table_dirty);
}

int
commit_write (struct image *img, const void *buf, size_t len, uint64_t host_off,
              struct err *err)
{
  struct err why = { 0 };
  int r;

  if (atomic_load (&img->broken))
    return image_refuse (img, err);
  r = bdev_pwrite (img->file, buf, len, host_off, 0, &why);
  if (r == 0)
    return 0;
  image_break (img, r, &why);
  return err_set (err, -r, "%s", why.msg);
}

int
commit_flush_file (struct image *img, struct err *err)
{
  struct err why = { 0 };
  int r = bdev_flush (img->file, &why);

  if (r == 0)
    return 0;
  image_break (img, r, &why);
  return err_set (err, -r, "%s", why.msg);
}

int
commit_flush_data (struct image *img, struct err *err)
{
  struct err why = { 0 };
  int r = bdev_flush (img->data, &why);

  if (r == 0)
    return 0;
  image_break (img, r, &why);
  return err_set (err, -r, "%s", why.msg);
}

/* --- step 0 */

static int
compare_u64 (const void *a, const void *b)
{
  uint64_t x = *(const uint64_t *) a, y = *(const uint64_t *) b;

  return x < y ? -1 : x > y;
}

static int
compare_staged (const void *a, const void *b)
{
  const struct staged_slice *x = a, *y = b;

  return compare_u64 (&x->host_off, &y->host_off);
}

static uint64_t
slice_host_off (struct image *img, const struct slice *s)
{
  uint64_t in_table = s->sn & ((UINT64_C (1) << img->table_slices_bits) - 1);

  return (map_l1 (img, s->sn >> img->table_slices_bits) & L1E_OFF_MASK) +
         in_table * img->slice_bytes;
}

/* Changes nothing unless it succeeds. */
static int
stage_slices_locked (struct image *img, struct commit *c)
{
  size_t nr = atomic_load_explicit (&img->nr_dirty_slices, memory_order_relaxed), i = 0;
  struct slice *next;

  if (nr == 0)
    return 0;
  c->slices = malloc (nr * sizeof c->slices[0]);
  c->slice_bytes = malloc (nr * img->slice_bytes);
  if (!c->slices || !c->slice_bytes)
    return -ENOMEM;
  for (struct slice *s = img->dirty_slices; s; s = next) {
    next = s->next_dirty;
    s->next_dirty = NULL;
    c->slices[i].slice = s;
    c->slices[i++].host_off = slice_host_off (img, s);
  }
  assert (i == nr);
  img->dirty_slices = NULL;
  atomic_store_explicit (&img->nr_dirty_slices, 0, memory_order_relaxed);
  qsort (c->slices, nr, sizeof c->slices[0], compare_staged);
  for (i = 0; i < nr; ++i) {
    struct slice *s = c->slices[i].slice;
    uint8_t *raw = c->slice_bytes + i * img->slice_bytes;

    /* Never 0 between the two states: it is not evicted, nor taken for durable. */
    atomic_store_explicit (&s->state, SLICE_STAGED, memory_order_release);
    for (size_t j = 0; j < img->slice_bytes / 8; ++j)
      store_be64 (raw + j * 8, atomic_load_explicit (&s->entries[j], memory_order_relaxed));
  }
  c->nr_slices = nr;
  return 0;
}

/* Entries between dirty ones equal the disk, so small gaps may be written too.
 * Changes nothing unless it succeeds.
 */
static int
stage_l1_locked (struct image *img, struct commit *c)
{
  struct u64_vec *dirty = &img->l1_dirty;
  size_t i, j;

  if (dirty->len == 0)
    return 0;
  qsort (dirty->ptr, dirty->len, sizeof dirty->ptr[0], compare_u64);
  for (i = 0; i < dirty->len; i = j) {
    struct l1_piece piece = { .first = dirty->ptr[i] };

    for (j = i + 1; j < dirty->len && dirty->ptr[j] - dirty->ptr[j - 1] <= L1_GAP; ++j)
      ;
    piece.n = dirty->ptr[j - 1] - piece.first + 1;
    if (l1_piece_vec_push (&c->l1_pieces, piece) < 0 ||
        u64_vec_reserve (&c->l1_values, piece.n) < 0)
      return -ENOMEM;
    for (uint64_t k = 0; k < piece.n; ++k) {
      uint64_t raw;

      store_be64 (&raw, map_l1 (img, piece.first + k));
      u64_vec_push (&c->l1_values, raw);
    }
  }
  return 0;
}

static int
stage (struct image *img, struct commit *c, struct err *err)
{
  uint64_t size;
  LOCK_SCOPE (&img->state_lock);

  if (stage_l1_locked (img, c) < 0 || stage_slices_locked (img, c) < 0)
    return err_set (err, ENOMEM, "out of memory");
  img->l1_dirty.len = 0;
  c->frees = img->frees;
  memset (&img->frees, 0, sizeof img->frees);
  size = bdev_size (&img->view);
  if (size != atomic_load_explicit (&img->durable_size, memory_order_relaxed))
    c->size = size;
  return 0;
}

/* --- step A */

/* The blocks; and which entries of the table may be written after the flush,
 * namely those whose blocks are written by then.
 */
static int
write_blocks (struct image *img, struct commit *c, struct err *err)
{
  LOCK_SCOPE (&img->alloc_lock);

  c->table_dirty = img->rc.table_dirty;
  memset (&img->rc.table_dirty, 0, sizeof img->rc.table_dirty);
  return refcounts_write_blocks_locked (img, err);
}

/* Under alloc_lock, since the table may move: then it has the entries already,
 * and writing them again, where it is now, does no harm.
 */
static int
write_rt_entries (struct image *img, const struct commit *c, struct err *err)
{
  int r = 0;
  LOCK_SCOPE (&img->alloc_lock);

  for (size_t i = 0; r == 0 && i < c->table_dirty.len; ++i) {
    uint64_t index = c->table_dirty.ptr[i];
    uint8_t raw[8];

    store_be64 (raw, img->rc.table[index]);
    r = commit_write (img, raw, sizeof raw, img->rc.host_off + index * 8, err);
  }
  return r;
}

static int
write_size (struct image *img, const struct commit *c, struct err *err)
{
  uint8_t raw[8];

  if (c->size == 0)
    return 0;
  store_be64 (raw, c->size);
  return commit_write (img, raw, sizeof raw, HEADER_OFF_SIZE, err);
}

static int
write_dirty_bit (struct image *img, bool dirty, struct err *err)
{
  uint8_t raw[8];

  store_be64 (raw, img->header.incompatible | (dirty ? INCOMPAT_DIRTY : 0));
  return commit_write (img, raw, sizeof raw, HEADER_OFF_INCOMPATIBLE, err);
}

/* Lazy refcounts: *postponed if none need be written now. */
static int
postpone_refcounts (struct image *img, bool *postponed, struct err *err)
{
  size_t nr = atomic_load_explicit (&img->nr_dirty_rbs, memory_order_relaxed);
  int r = 0;

  *postponed = img->lazy && nr > 0 && nr < img->rc.max_blocks;
  if (*postponed && !img->marked_dirty) {
    r = write_dirty_bit (img, true, err);
    img->marked_dirty = true;   /* or about to be, or the image is broken */
  }
  return r;
}

static int
commit_refcounts (struct image *img, struct commit *c, struct err *err)
{
  bool postponed;
  int r = postpone_refcounts (img, &postponed, err);

  if (r == 0 && !postponed)
    r = write_blocks (img, c, err);
  if (r == 0)
    r = write_size (img, c, err);
  if (r == 0 && img->data != img->file)
    r = commit_flush_data (img, err);
  if (r == 0)
    r = commit_flush_file (img, err);
  if (r == 0 && c->table_dirty.len > 0) {
    r = write_rt_entries (img, c, err);
    if (r == 0)
      r = commit_flush_file (img, err);
  }
  if (r == 0 && c->size)
    atomic_store_explicit (&img->durable_size, c->size, memory_order_release);
  return r;
}

/* --- step B */

static int
write_slices (struct image *img, const struct commit *c, struct err *err)
{
  size_t i, j;

  for (i = 0; i < c->nr_slices; i = j) {
    int r;

    for (j = i + 1; j < c->nr_slices &&
                    c->slices[j].host_off == c->slices[j - 1].host_off + img->slice_bytes; ++j)
      ;
    r = commit_write (img, c->slice_bytes + i * img->slice_bytes, (j - i) * img->slice_bytes,
                      c->slices[i].host_off, err);
    if (r < 0)
      return r;
  }
  return 0;
}

static int
write_l1 (struct image *img, const struct commit *c, struct err *err)
{
  uint64_t *values = c->l1_values.ptr;

  for (size_t i = 0; i < c->l1_pieces.len; ++i) {
    const struct l1_piece *piece = &c->l1_pieces.ptr[i];
    int r = commit_write (img, values, piece->n * 8, img->header.l1_host_off + piece->first * 8,
                          err);

    if (r < 0)
      return r;
    values += piece->n;
  }
  return 0;
}

static int
commit_mapping (struct image *img, struct commit *c, struct err *err)
{
  int r;

  if (c->nr_slices == 0 && c->l1_pieces.len == 0)
    return 0;
  r = write_l1 (img, c, err);
  if (r == 0 && c->l1_pieces.len > 0 && c->nr_slices > 0)
    r = commit_flush_file (img, err);
  if (r == 0)
    r = write_slices (img, c, err);
  if (r == 0)
    r = commit_flush_file (img, err);
  if (r < 0)
    return r;
  LOCK_SCOPE (&img->state_lock);
  for (size_t i = 0; i < c->nr_slices; ++i)
    atomic_fetch_and_explicit (&c->slices[i].slice->state, ~SLICE_STAGED, memory_order_release);
  return 0;
}

/* --- step C */

/* Of frees[i..]: how many name the same cluster, and is one of them a discard? */
static size_t
same_cluster (const struct u64_vec *frees, size_t i, bool *punch)
{
  size_t n = 1;

  for (; i + n < frees->len && frees->ptr[i + n] >> 1 == frees->ptr[i] >> 1; ++n)
    ;
  *punch = frees->ptr[i + n - 1] & 1;   /* sorted: 1 comes last */
  return n;
}

/* Is the cluster about to have no reference left? */
static bool
last_reference (struct image *img, uint64_t ci, uint64_t n)
{
  uint64_t value = 0;
  LOCK_SCOPE (&img->alloc_lock);

  return refcount_get_locked (img, ci, &value, NULL) == 0 && value == n;
}

/* Before the refcounts drop, since the allocator uses the clusters from then on.
 * That space could not be given back is no reason to fail.
 */
static void
punch_clusters (struct image *img, const struct u64_vec *frees)
{
  uint64_t ci = 0, len = 0;
  size_t n;

  for (size_t i = 0; i < frees->len; i += n) {
    bool punch;
    uint64_t this_ci = frees->ptr[i] >> 1;

    n = same_cluster (frees, i, &punch);
    if (!punch || !last_reference (img, this_ci, n))
      continue;
    if (len && ci + len != this_ci) {
      bdev_trim (img->file, ci << img->g.cluster_bits, len << img->g.cluster_bits, 0, NULL);
      len = 0;
    }
    if (len++ == 0)
      ci = this_ci;
  }
  if (len)
    bdev_trim (img->file, ci << img->g.cluster_bits, len << img->g.cluster_bits, 0, NULL);
}

static int
drop_references (struct image *img, struct u64_vec *frees, struct err *err)
{
  struct err why = { 0 };
  int r = 0;

  if (frees->len == 0)
    return 0;
  grace_wait (&img->grace);
  qsort (frees->ptr, frees->len, sizeof frees->ptr[0], compare_u64);
  compressed_forget (img, frees);
  punch_clusters (img, frees);
  LOCK_SCOPE (&img->alloc_lock);
  for (size_t i = 0; r == 0 && i < frees->len; ++i) {
    r = refcount_drop_locked (img, frees->ptr[i] >> 1, 1, &why);
    /* Lowering may be written at any time now; keep the blocks within bounds. */
    if (r == 0 &&
        atomic_load_explicit (&img->nr_dirty_rbs, memory_order_relaxed) >= img->rc.max_blocks)
      r = refcounts_write_blocks_locked (img, &why);
  }
  atomic_fetch_sub_explicit (&img->nr_frees, frees->len, memory_order_relaxed);
  if (r == 0)
    return 0;
  image_break (img, r, &why);
  return err_set (err, -r, "%s", why.msg);
}

/* --- all together */

static int
commit (struct image *img, struct err *err)
{
  struct commit c = { 0 };
  int r;

  if (atomic_load (&img->broken))
    return image_refuse (img, err);
  r = stage (img, &c, err);
  if (r == 0)
    r = commit_refcounts (img, &c, err);
  if (r == 0)
    r = commit_mapping (img, &c, err);
  if (r == 0)
    r = drop_references (img, &c.frees, err);
  reset_commit (&c);
  return r;
}

int
commit_flush (struct image *img, struct err *err)
{
  struct err why = { 0 };
  uint64_t number;
  int r;

  pthread_mutex_lock (&img->commit_mutex);
  number = img->commits_started + 1;
  while (img->commit_running && img->commits_finished < number)
    pthread_cond_wait (&img->commit_cond, &img->commit_mutex);
  if (img->commits_finished >= number) {
    /* That one, or one after it, began after this call did. */
    r = img->commit_result;
    why = img->commit_err;
    pthread_mutex_unlock (&img->commit_mutex);
    return r < 0 ? err_set (err, -r, "%s", why.msg) : 0;
  }
  number = ++img->commits_started;
  img->commit_running = true;
  pthread_mutex_unlock (&img->commit_mutex);

  r = commit (img, &why);

  pthread_mutex_lock (&img->commit_mutex);
  img->commits_finished = number;
  img->commit_running = false;
  img->commit_result = r;
  img->commit_err = why;
  pthread_cond_broadcast (&img->commit_cond);
  pthread_mutex_unlock (&img->commit_mutex);
  return r < 0 ? err_set (err, -r, "%s", why.msg) : 0;
}

bool
commit_wanted (struct image *img)
{
  uint64_t nr_frees = atomic_load_explicit (&img->nr_frees, memory_order_relaxed);

  return atomic_load_explicit (&img->nr_dirty_slices, memory_order_relaxed) >=
           img->max_dirty_slices ||
         nr_frees >= MIN (MAX_FREES, MAX_FREE_BYTES >> img->g.cluster_bits) ||
         atomic_load_explicit (&img->nr_dirty_rbs, memory_order_relaxed) >= img->rc.max_blocks;
}

int
commit_for_space (struct image *img, int r, struct err *err)
{
  if (atomic_load_explicit (&img->nr_frees, memory_order_relaxed) == 0)
    return r;
  err_clear (err);
  r = commit_flush (img, err);
  return r < 0 ? r : 1;
}

static bool
anything_dirty (struct image *img)
{
  if (atomic_load (&img->nr_dirty_rbs) || atomic_load (&img->nr_dirty_slices) ||
      atomic_load (&img->nr_frees) ||
      atomic_load (&img->durable_size) != bdev_size (&img->view))
    return true;
  {
    LOCK_SCOPE (&img->alloc_lock);
    if (img->rc.table_dirty.len > 0)
      return true;
  }
  LOCK_SCOPE (&img->state_lock);
  return img->l1_dirty.len > 0;
}

int
commit_all (struct image *img, struct err *err)
{
  int r;

  img->lazy = false;
  /* The first writes everything but the refcounts that drop because of it. */
  do
    r = commit_flush (img, err);
  while (r == 0 && anything_dirty (img));
  if (r < 0 || !img->marked_dirty)
    return r;
  r = commit_flush_file (img, err);     /* all of the refcounts, before anybody trusts them */
  if (r == 0)
    r = write_dirty_bit (img, false, err);
  return r < 0 ? r : commit_flush_file (img, err);
}
