/* The cache of L2 tables, in slices of at most 4 KiB.
 *
 * A two-level directory, indexed by the slice's number, leads to the slices;
 * looking one up takes no lock and two loads.  A miss is read under one of 64
 * locks chosen by number, held from "it is not there" to "now it is", so that
 * a slow reader can never put back an old copy over a newer one that came and
 * went meanwhile.
 *
 * Eviction is second chance, when a new slice makes the cache too large: only
 * slices that equal the disk go.  A slice is unlinked, kept on the retired list
 * until a grace period has passed, then used again.  The limit is soft: dirty slices
 * stay, but commit_wanted bounds them to a quarter of the cache; and a request that
 * takes its time keeps alive all that was evicted meanwhile, which may come to twice
 * the cache before those that evict wait for it.
 *
 * Whoever changes entries does it under state_lock after making sure that the
 * slice is still linked (map_update).
 */
#include <errno.h>

#include "dev/ahead.h"
#include "base/clock.h"
#include "img/image-int.h"

int
tcache_init (struct image *img, size_t cache_bytes, struct err *err)
{
  uint64_t nr_chunks;

  img->slice_bytes = MIN (img->g.cluster_size, MAX_SLICE_ENTRIES * 8);
  img->slice_bits = MIN (img->g.cluster_bits, 12) - (img->g.extended_l2 ? 4 : 3);
  img->slice_cover_bits = img->slice_bits + img->g.cluster_bits;
  img->table_slices_bits = img->g.l2_bits - img->slice_bits;
  img->nr_slices = (uint64_t) img->l1_len << img->table_slices_bits;
  img->max_slices = MAX (cache_bytes / (img->slice_bytes + sizeof (struct slice)), 32);
  img->max_dirty_slices = img->max_slices / 4;
  img->max_retired = MAX (img->max_slices / 8, 4);
  nr_chunks = (img->nr_slices >> SLOT_BITS) + 1;
  img->dir = calloc (nr_chunks, sizeof img->dir[0]);
  if (img->dir == NULL)
    return err_set (err, ENOMEM, "out of memory");
  return 0;
}

static void
free_slices (struct slice *s)
{
  struct slice *next;

  for (; s; s = next) {
    next = s->next_retired;
    free (s);
  }
}

void
tcache_free (struct image *img)
{
  uint64_t nr_chunks = (img->nr_slices >> SLOT_BITS) + 1;

  for (size_t i = 0; i < img->ring.len; ++i)
    free (img->ring.ptr[i]);
  vec_reset (&img->ring);
  free_slices (img->retired_slices);
  free_slices (img->spare_slices);
  for (uint64_t i = 0; img->dir && i < nr_chunks; ++i) {
    slice_slot *chunk = atomic_load_explicit (&img->dir[i], memory_order_relaxed);

    free (chunk);
  }
  free (img->dir);
}

static slice_slot *
get_slot (struct image *img, uint64_t sn)
{
  _Atomic (slice_slot *) *p = &img->dir[sn >> SLOT_BITS];
  slice_slot *chunk = atomic_load_explicit (p, memory_order_acquire);

  if (chunk == NULL) {
    slice_slot *fresh = calloc (1 << SLOT_BITS, sizeof *fresh);

    if (fresh == NULL)
      return NULL;
    if (atomic_compare_exchange_strong (p, &chunk, fresh))
      chunk = fresh;
    else
      free (fresh);
  }
  return &chunk[sn & ((1 << SLOT_BITS) - 1)];
}

#define TORN_MS 3000            /* after which a slice that could not be read as a whole is tried again */

/* Has this thread, since it last waited?  Only those that have reclaim, which may take long. */
static _Thread_local bool evicted;

/* Take the slice at place i of the ring out of the directory. */
static void
retire_locked (struct image *img, size_t i)
{
  struct slice *s = img->ring.ptr[i];

  atomic_store_explicit (get_slot (img, s->sn), NULL, memory_order_release);
  img->ring.ptr[i] = img->ring.ptr[--img->ring.len];
  s->next_retired = img->retired_slices;
  img->retired_slices = s;
  evicted = true;
  atomic_fetch_add_explicit (&img->nr_retired, 1, memory_order_relaxed);
}

/* All but keep, which was only just brought in for somebody. */
static void
evict_locked (struct image *img, const struct slice *keep)
{
  size_t steps = 2 * img->ring.len;

  for (; img->ring.len > img->max_slices && steps > 0; --steps) {
    struct slice *s;

    if (img->hand >= img->ring.len)
      img->hand = 0;
    s = img->ring.ptr[img->hand];
    if (s == keep || atomic_load_explicit (&s->state, memory_order_relaxed) != 0 ||
        atomic_exchange_explicit (&s->used, false, memory_order_relaxed)) {
      img->hand++;
      continue;
    }
    retire_locked (img, img->hand);
  }
}

/* A disk may find its sectors again, and a web server its files.  It is never dirty. */
static void
forget_torn (struct image *img, const struct slice *s)
{
  LOCK_SCOPE (&img->state_lock);

  if (slice_peek (img, s->sn) != s)
    return;
  for (size_t i = 0; i < img->ring.len; ++i)
    if (img->ring.ptr[i] == s) {
      retire_locked (img, i);
      return;
    }
}

/* Slices come and go as fast as guests read here and there, made by one thread and retired by another,
 * which malloc answers with ever more memory.  So they are used again.
 */
static struct slice *
new_slice (struct image *img)
{
  {
    LOCK_SCOPE (&img->state_lock);
    struct slice *s = img->spare_slices;

    if (s) {
      img->spare_slices = s->next_retired;
      img->nr_spare--;
      return s;
    }
  }
  return malloc (sizeof (struct slice) + img->slice_bytes);
}

/* Nobody can see them any more.  Where the sanitizer is to notice if somebody does, they are freed. */
static void
spare_slices (struct image *img, struct slice *list)
{
#ifndef __SANITIZE_ADDRESS__
  pthread_mutex_lock (&img->state_lock);
  while (list && img->nr_spare < 4 * img->max_retired) {
    struct slice *s = list;

    list = s->next_retired;
    s->next_retired = img->spare_slices;
    img->spare_slices = s;
    img->nr_spare++;
  }
  pthread_mutex_unlock (&img->state_lock);
#endif
  free_slices (list);
}

#define SECTOR 512

/* A slice that cannot be read as a whole, sector by sector: entries in bad ones are ENTRY_UNREAD, and
 * cost no more than what they map.  false: none can be read.
 */
static bool
read_sectors (struct image *img, uint8_t *raw, uint64_t host_off)
{
  unsigned good = 0;

  for (size_t at = 0; at < img->slice_bytes; at += SECTOR) {
    struct err why = { 0 };
    int r = bdev_pread_padded (img->file, raw + at, SECTOR, host_off + at, &why);

    if (r < 0 && r != -EIO)
      return false;             /* out of reach, say: that is no property of the sector */
    good += r == 0;
    for (size_t i = 0; r < 0 && i < SECTOR; i += 8)
      store_be64 (raw + at + i, ENTRY_UNREAD);
  }
  return good > 0;
}

/* The disk's copy.  In a table that must be copied before it is changed, no
 * cluster may be written in place, whatever its entry says.  (But nothing is
 * shared in a data file, and there COPIED is what says that cluster 0 exists.)
 */
static int
read_slice (struct image *img, uint64_t sn, uint64_t l1, struct slice **ret, struct err *err)
{
  uint64_t in_table = sn & ((UINT64_C (1) << img->table_slices_bits) - 1);
  uint64_t mask = l1 & ENTRY_COPIED || img->g.data_file ? UINT64_MAX : ~ENTRY_COPIED;
  struct slice *s = new_slice (img);
  uint64_t host_off;
  uint8_t *raw;
  int r;

  if (s == NULL)
    return err_set (err, ENOMEM, "out of memory");
  raw = (uint8_t *) s->entries;
  s->torn_ms = 0;
  host_off = (l1 & L1E_OFF_MASK) + in_table * img->slice_bytes;
  r = bdev_pread_padded (img->file, raw, img->slice_bytes, host_off, err);
  if (r == -EIO && read_sectors (img, raw, host_off)) {
    s->torn_ms = MAX (clock_ms (), UINT64_C (1));
    r = 0;
    err_clear (err);
  }
  if (r < 0) {
    free (s);
    return r;
  }
  s->sn = sn;
  atomic_init (&s->state, 0);
  atomic_init (&s->used, true);
  atomic_init (&s->seq, 0);
  for (unsigned i = 0; i < img->slice_bytes / 8; ++i) {
    bool bitmap = img->g.extended_l2 && i % 2;

    atomic_init (&s->entries[i], load_be64 (raw + i * 8) & (bitmap ? UINT64_MAX : mask));
  }
  *ret = s;
  return 0;
}

void
tcache_announce (struct image *img, uint64_t guest_off, uint64_t len, uint64_t *last)
{
  uint64_t i = map_l1_index (img, guest_off);

  if (!img->file->far || len == 0)
    return;
  for (; i <= map_l1_index (img, guest_off + len - 1) && i < img->l1_len; ++i) {
    uint64_t host_off = map_l1 (img, i) & L1E_OFF_MASK, first = i << img->table_slices_bits;

    if (i == *last)
      continue;
    *last = i;
    if (host_off && slice_peek (img, MAX (guest_off >> img->slice_cover_bits, first)) == NULL)
      ahead_hint (img->file, host_off, img->g.cluster_size);
  }
}

static int
load_slice (struct image *img, uint64_t sn, struct slice **ret, struct err *err)
{
  slice_slot *slot = get_slot (img, sn);
  uint64_t l1_index = sn >> img->table_slices_bits, l1;
  struct slice *s = NULL;
  int r;
  LOCK_SCOPE (&img->load_lock[sn % NR_LOAD_LOCKS]);

  if (slot == NULL)
    return err_set (err, ENOMEM, "out of memory");
  *ret = atomic_load_explicit (slot, memory_order_acquire);
  if (*ret)
    return 0;
  l1 = map_l1 (img, l1_index);
  if ((l1 & L1E_OFF_MASK) == 0)
    return map_check_l1 (img, l1_index, l1, err);
  r = map_check_l1 (img, l1_index, l1, err);
  if (r == 0 && img->slice_bytes < img->g.cluster_size)         /* one journey for the table */
    ahead_hint (img->file, l1 & L1E_OFF_MASK, img->g.cluster_size);
  if (r == 0)
    r = read_slice (img, sn, l1, &s, err);
  if (r < 0)
    return r;

  LOCK_SCOPE (&img->state_lock);
  if (slice_vec_push (&img->ring, s) < 0) {
    free (s);
    return err_set (err, ENOMEM, "out of memory");
  }
  atomic_store_explicit (slot, s, memory_order_release);
  evict_locked (img, s);
  *ret = s;
  return 0;
}

int
slice_get (struct image *img, uint64_t sn, struct slice **ret, struct err *err)
{
  struct slice *s = slice_peek (img, sn);

  if (s && s->torn_ms && clock_ms () - s->torn_ms > TORN_MS) {
    forget_torn (img, s);
    s = NULL;
  }
  if (s == NULL) {
    int r = load_slice (img, sn, &s, err);

    if (r < 0)
      return r;
  }
  if (s && !atomic_load_explicit (&s->used, memory_order_relaxed))
    atomic_store_explicit (&s->used, true, memory_order_relaxed);
  *ret = s;
  return 0;
}

/* An extended entry and its bitmap mean something only together, and no load
 * gets both at once.  A writer makes seq odd, stores both with release, makes
 * seq even.  A reader that got any new word also gets the odd seq, or a later
 * one, when it looks again.  A reader that keeps meeting writers waits for them.
 */
struct l2_pair
slice_pair (struct image *img, const struct slice *s, unsigned i)
{
  struct l2_pair p = { 0 };

  if (!img->g.extended_l2) {
    p.raw = atomic_load_explicit (&s->entries[i], memory_order_acquire);
    return p;
  }
  for (unsigned attempt = 0; attempt < 8; ++attempt) {
    unsigned before = atomic_load_explicit (&s->seq, memory_order_acquire);

    p.raw = atomic_load_explicit (&s->entries[i * 2], memory_order_acquire);
    p.bitmap = atomic_load_explicit (&s->entries[i * 2 + 1], memory_order_acquire);
    if (before % 2 == 0 && atomic_load_explicit (&s->seq, memory_order_relaxed) == before)
      return p;
  }
  LOCK_SCOPE (&img->state_lock);
  p.raw = atomic_load_explicit (&s->entries[i * 2], memory_order_relaxed);
  p.bitmap = atomic_load_explicit (&s->entries[i * 2 + 1], memory_order_relaxed);
  return p;
}

void
slice_set_pairs_locked (struct image *img, struct slice *s, unsigned first, unsigned n,
                        const struct l2_pair *p)
{
  unsigned seq = atomic_load_explicit (&s->seq, memory_order_relaxed);

  if (!img->g.extended_l2) {
    for (unsigned i = 0; i < n; ++i)
      atomic_store_explicit (&s->entries[first + i], p[i].raw, memory_order_release);
    return;
  }
  atomic_store_explicit (&s->seq, seq + 1, memory_order_relaxed);
  for (unsigned i = 0; i < n; ++i) {
    atomic_store_explicit (&s->entries[(first + i) * 2], p[i].raw, memory_order_release);
    atomic_store_explicit (&s->entries[(first + i) * 2 + 1], p[i].bitmap, memory_order_release);
  }
  atomic_store_explicit (&s->seq, seq + 2, memory_order_release);
}

/* The flag is set before the entries change: who sees a new entry sees the
 * flag as well (map_lookup).
 */
void
slice_mark_dirty_locked (struct image *img, struct slice *s)
{
  unsigned before = atomic_fetch_or_explicit (&s->state, SLICE_DIRTY, memory_order_release);

  if (before & SLICE_DIRTY)
    return;
  s->next_dirty = img->dirty_slices;
  img->dirty_slices = s;
  atomic_fetch_add_explicit (&img->nr_dirty_slices, 1, memory_order_relaxed);
}

/* Another thread is at it, and this one has evicted more meanwhile.  Where that is much it waits
 * for its turn: a little, since the other mostly waits for nothing but a CPU for those in
 * sections; but as long as it takes if a section lasts so long that memory would fill up.
 */
static bool
wait_for_turn (struct image *img)
{
  size_t n = atomic_load_explicit (&img->nr_retired, memory_order_relaxed);
  struct timespec moment = { .tv_nsec = 500000 };

  if (n <= 2 * img->max_retired)
    return false;
  if (n > img->max_slices)
    return pthread_mutex_lock (&img->reclaim_lock) == 0;
  nanosleep (&moment, NULL);
  return pthread_mutex_trylock (&img->reclaim_lock) == 0;
}

void
tcache_reclaim (struct image *img)
{
  struct slice *list;

  if (!evicted || (pthread_mutex_trylock (&img->reclaim_lock) != 0 && !wait_for_turn (img)))
    return;
  evicted = false;
  {
    LOCK_SCOPE (&img->state_lock);
    list = img->retired_slices;
    img->retired_slices = NULL;
    atomic_store_explicit (&img->nr_retired, 0, memory_order_relaxed);
  }
  if (list) {
    grace_wait (&img->grace);
    spare_slices (img, list);
  }
  pthread_mutex_unlock (&img->reclaim_lock);
}
