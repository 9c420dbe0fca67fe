/* What the files of core/img share: the fields of an open image, who may touch
 * them, and the order of the locks.  Stands here once.
 *
 * Words: a *slice* is the piece of an L2 table that is cached and written as a
 * unit, min (cluster size, 4096) bytes.  Slices are numbered by the guest
 * clusters they map (sn), so that a slice stays the same slice when its table
 * moves.  A *grace section* (base/grace.h) is what every request runs in; it
 * keeps alive the slices it found and the host clusters they named.
 *
 * Locks, outermost first; whoever holds one may take only those below it:
 *
 *   resize_lock            growing the view
 *   (the turn to commit)   commit_running; waited for with no other lock, no
 *                          range lock, and outside of any grace section
 *   change_lock            the first change
 *   reclaim_lock           waiting until evicted slices can be used again; outside
 *                          of grace sections and range locks
 *   range locks            guest clusters being given new host clusters; waited
 *                          for outside of grace sections
 *   (a grace section)      waits for none of the above, so that grace_wait ends
 *   table_lock             making or copying L2 tables
 *   load_lock[i]           bringing a slice into the cache
 *   alloc_lock             refcounts, the allocator, the size of the file
 *   state_lock             L1 and L2 entries in RAM, their dirty state, the
 *                          ring of slices, the references to be dropped
 *
 * alloc_lock and state_lock are never held together.  No I/O under state_lock.
 * broken_lock, data_lock, range_mutex, commit_mutex and the locks of compressed.c are held
 * for moments, over nothing.
 */
#ifndef QR_IMG_IMAGE_INT_H
#define QR_IMG_IMAGE_INT_H

#include <pthread.h>

#include "base/cleanup.h"
#include "base/endian.h"
#include "base/grace.h"
#include "base/num.h"
#include "base/vec.h"
#include "fmt/entry.h"
#include "img/image.h"

DEFINE_VEC (u64_vec, uint64_t);

#define MAX_SLICE_ENTRIES 512
#define SLOT_BITS 9             /* log2 of slots in a chunk of the slice directory */
#define NR_LOAD_LOCKS 64
#define IO_CHUNK (UINT64_C (1) << 20)   /* bytes; the largest bounce buffer */

enum {
  SLICE_DIRTY  = 1,             /* differs from the disk, and nobody is writing it yet */
  SLICE_STAGED = 2,             /* a copy of it is on its way to the disk */
};

struct slice {
  /* constant */
  uint64_t sn;
  uint64_t torn_ms;             /* parts of it could not be read then, so it is never changed; or 0 */
  /* changed under state_lock, read anywhere */
  atomic_uint state;
  /* a hint for eviction, anybody's */
  atomic_bool used;
  /* protected by state_lock */
  struct slice *next_dirty;
  struct slice *next_retired;
  /* Odd while pairs of extended entries change; see slice_pair. */
  atomic_uint seq;
  /* L2 entries, host byte order.  Changed under state_lock by whoever holds the
   * range lock of their guest clusters; read anywhere in a grace section.  With
   * extended L2 entries two words each, as on disk: entry, bitmap.
   */
  _Atomic uint64_t entries[];
};
DEFINE_VEC (slice_vec, struct slice *);

typedef _Atomic (struct slice *) slice_slot;

/* A refcount block, cached whole. */
struct rb {
  uint64_t index;               /* in the refcount table */
  uint64_t host_off;
  bool used;
  size_t dirty_lo, dirty_hi;    /* bytes that differ from the disk; equal: none */
  uint8_t data[];
};
DEFINE_VEC (rb_vec, struct rb *);

/* Everything in here is protected by alloc_lock. */
struct refcounts {
  uint64_t *table;              /* refcount table, host byte order */
  uint64_t nr_entries;
  uint64_t host_off;            /* of the table */
  uint32_t clusters;            /* of the table */
  struct rb **cached;           /* by index in the table; NULL = not in RAM */
  struct rb_vec ring;           /* the same, for eviction */
  size_t hand;
  size_t max_blocks;
  struct u64_vec table_dirty;   /* entries not on disk yet */
  /* The allocator's memory: a block marked full has no free cluster; in the
   * others all clusters before hint_ci are in use.
   */
  uint8_t *full;                /* by index in the table */
  uint64_t hint_ci;
};

enum {
  REGION_HEADER, REGION_L1, REGION_SNAPSHOT_L1, REGION_RT, REGION_SNAPSHOTS, NR_REGIONS
};

/* Metadata at fixed places.  Immutable; replaced as a whole, and old ones are
 * kept until close since a reader may still look at them.
 */
struct regions {
  struct { uint64_t off, len; } r[NR_REGIONS];
  struct regions *older;
};

struct range_lock {
  uint64_t off, len;            /* guest bytes */
  struct range_lock *next;
};

struct image {
  struct bdev view;             /* first: the device that the guest sees */

  /* constant after open */
  struct bdev *file, *backing;
  struct bdev *data;            /* where guest clusters lie: file, or the external data file */
  struct header header;
  struct geom g;
  bool careful;                 /* as in the options */
  bool raw_data;                /* the data file must be readable as a raw image */
  unsigned unit_bits;           /* log2 of bytes in a subcluster; without any, in a cluster */
  uint64_t unit_size;
  uint64_t l1_host_off;         /* of the active disk's L1 table, or of the snapshot's */
  uint32_t l1_entries;          /* in that table; it may be longer in RAM: l1_len */
  uint32_t l1_len;
  bool backed;                  /* a backing file is named or given: unallocated may not be zero */
  unsigned slice_bits;          /* log2 of entries in a slice */
  unsigned slice_cover_bits;    /* log2 of guest bytes that a slice maps */
  unsigned table_slices_bits;   /* log2 of slices in an L2 table */
  size_t slice_bytes;
  size_t max_slices, max_dirty_slices, max_retired;
  uint64_t nr_slices;

  struct grace grace;

  /* The slice directory: chunks of slots, made on demand, gone at close. */
  _Atomic (slice_slot *) *dir;
  pthread_mutex_t load_lock[NR_LOAD_LOCKS];

  /* L1 entries, host byte order: changed under table_lock and state_lock, read
   * anywhere.
   */
  _Atomic uint64_t *l1;
  pthread_mutex_t table_lock;

  _Atomic (struct regions *) regions;   /* replaced under alloc_lock */

  pthread_mutex_t state_lock;
  /* protected by state_lock */
  struct slice_vec ring;
  size_t hand;
  struct slice *dirty_slices;   /* list */
  struct slice *retired_slices; /* list; unlinked, to be spare after a grace period */
  struct slice *spare_slices;   /* list, likewise by next_retired: memory for new ones */
  size_t nr_spare;
  struct u64_vec l1_dirty;      /* indexes */
  struct u64_vec frees;         /* references removed in RAM: host_ci << 1 | punch */
  /* changed under state_lock, read anywhere as hints */
  atomic_size_t nr_dirty_slices, nr_retired;
  atomic_size_t nr_frees;       /* collected and not dropped yet, staged ones too */
  pthread_mutex_t reclaim_lock;

  pthread_mutex_t alloc_lock;
  struct refcounts rc;          /* protected by alloc_lock */
  atomic_size_t nr_dirty_rbs;   /* changed under alloc_lock, read anywhere as a hint */

  pthread_mutex_t range_mutex;
  pthread_cond_t range_cond;
  struct range_lock *ranges;    /* protected by range_mutex; those that are held */

  struct compressed *compressed;        /* decompressed clusters; see compressed.c */
  struct bitmaps *bitmaps;              /* set before changing is; see bitmaps.c */

  pthread_mutex_t data_lock;    /* a leaf; held while the data file is made longer */

  pthread_mutex_t resize_lock;
  uint64_t zero_end;            /* protected by resize_lock; see view.c */

  pthread_mutex_t commit_mutex;
  pthread_cond_t commit_cond;
  /* protected by commit_mutex */
  uint64_t commits_started, commits_finished;
  bool commit_running;
  int commit_result;            /* of the last one that finished */
  struct err commit_err;
  /* changed by the running commit, read anywhere */
  _Atomic uint64_t durable_size;        /* the header's size field on disk */
  /* Lazy refcounts: commits leave refcount blocks in RAM, once the dirty bit is
   * set.  Both belong to the running commit, and to close.
   */
  bool lazy, marked_dirty;

  pthread_mutex_t change_lock;  /* held while the first change is prepared */
  atomic_bool changing;         /* set under change_lock: that is done */
  pthread_mutex_t broken_lock;  /* a leaf */
  atomic_bool broken;           /* set under broken_lock, for good */
  struct err broken_why;        /* constant once broken is set */
};

static inline struct image *
view_image (struct bdev *d)
{
  return (struct image *) d;
}

#define ULL(x) ((unsigned long long) (x))

/* End of the file, rounded up to a cluster: the last cluster may be short. */
static inline uint64_t
file_end (const struct image *img)
{
  return ROUND_UP (bdev_size (img->file), img->g.cluster_size);
}

/* --- open.c */

/* Called before anything is written: -EROFS once the image is broken.  The
 * first call clears header bits that a change makes untrue.  Outside of grace
 * sections, no locks held.
 */
int image_begin_change (struct image *img, struct err *err);

/* A metadata write or a flush failed with r: never write again. */
void image_break (struct image *img, int r, const struct err *why);

/* -EROFS, with what broke the image. */
int image_refuse (struct image *img, struct err *err);

/* End a grace section; may also wait for one to free old slices, so not inside
 * another section and with no lock held.
 */
void image_leave (struct image *img, unsigned token);

static inline unsigned
image_enter (struct image *img)
{
  return grace_enter (&img->grace);
}

/* The view's last reference is gone: write everything out and free it all. */
void image_close (struct bdev *d);

/* --- regions.c */

/* Note where the header, the L1 table and, if the image is going to be
 * written, the refcount and snapshot tables lie.
 */
int regions_init (struct image *img, struct err *err);
void regions_free (struct image *img);

/* Does [host_off, host_off+len) touch one of them? */
bool regions_overlap (const struct image *img, uint64_t host_off, uint64_t len);

/* The refcount table moved; alloc_lock held. */
int regions_move_rt_locked (struct image *img, uint64_t host_off, uint64_t len);

/* --- tcache.c */

int tcache_init (struct image *img, size_t cache_bytes, struct err *err);
void tcache_free (struct image *img);

/* Stands in a slice for entries that could not be read: reserved bits that none can have. */
#define ENTRY_UNREAD UINT64_C (0x3f000000000001fe)

/* The slice sn, from RAM or from disk; *ret = NULL if there is no L2 table.
 * In a grace section.  -EIO if the L1 entry can't be right.
 */
int slice_get (struct image *img, uint64_t sn, struct slice **ret, struct err *err);

/* If the file is far: the L2 tables of [guest_off, guest_off+len) will be looked into,
 * unless that is in RAM or the table is *last, which becomes the last of them.  In a grace
 * section.
 */
void tcache_announce (struct image *img, uint64_t guest_off, uint64_t len, uint64_t *last);

/* The slice if it is in RAM.  In a grace section, or with state_lock held. */
static inline struct slice *
slice_peek (struct image *img, uint64_t sn)
{
  slice_slot *chunk = atomic_load_explicit (&img->dir[sn >> SLOT_BITS], memory_order_acquire);

  if (chunk == NULL)
    return NULL;
  return atomic_load_explicit (&chunk[sn & ((1 << SLOT_BITS) - 1)], memory_order_acquire);
}

/* Before entries of s are changed; state_lock held. */
void slice_mark_dirty_locked (struct image *img, struct slice *s);

/* Entry i of the slice, both words of the same moment. */
struct l2_pair slice_pair (struct image *img, const struct slice *s, unsigned i);

/* Replace entries from first on; state_lock held. */
void slice_set_pairs_locked (struct image *img, struct slice *s, unsigned first, unsigned n,
                             const struct l2_pair *p);

/* Free slices that were evicted; waits for a grace period. */
void tcache_reclaim (struct image *img);

/* --- map.c */

/* A piece of the guest's disk that is contiguous on the host. */
struct run {
  enum cluster_kind kind;
  uint64_t host_off;            /* of its first byte; NORMAL and ZERO_ALLOC only;
                                   COMPRESSED: of the stream */
  uint64_t stream_len;          /* bytes; COMPRESSED only, and then len stays in one cluster */
  uint64_t len;                 /* bytes */
  bool copied;                  /* may be written in place */
  bool durable;                 /* the disk says the same */
};

/* What guest_off maps to, and for how far (at most max bytes).  In a grace
 * section.  -EIO if the entry can't be right.
 */
int map_lookup (struct image *img, uint64_t guest_off, uint64_t max, struct run *run,
                struct err *err);

/* The n entries from guest_off (a cluster's start) on, all in one slice; all 0
 * if there is no L2 table.  In a grace section; stable only under a range lock.
 */
int map_entries (struct image *img, uint64_t guest_off, unsigned n, struct l2_pair *p,
                 struct err *err);

/* Which subcluster of its cluster is it?  0 without extended L2 entries. */
static inline unsigned
map_subcluster (const struct image *img, uint64_t guest_off)
{
  return (guest_off & (img->g.cluster_size - 1)) >> img->unit_bits;
}

/* What the subcluster sc sees.  Clusters in a data file are always ours alone. */
static inline struct l2_entry
map_decode (const struct image *img, struct l2_pair p, unsigned sc)
{
  struct l2_entry e = l2_entry_decode_sub (p, sc, &img->g);

  if (img->g.data_file && l2_has_host (p.raw, &img->g))
    e.copied = true;
  return e;
}

/* The subclusters of the cluster at cluster_off that touch [off, end), as the
 * bits of an allocation bitmap; all where there are none.
 */
static inline uint32_t
map_touched (const struct image *img, uint64_t cluster_off, uint64_t off, uint64_t end)
{
  unsigned first, last;

  if (!img->g.extended_l2)
    return UINT32_MAX;
  off = MAX (off, cluster_off);
  end = MIN (end, cluster_off + img->g.cluster_size);
  if (off >= end)
    return 0;
  first = (off - cluster_off) >> img->unit_bits;
  last = (end - 1 - cluster_off) >> img->unit_bits;
  return UINT32_MAX >> (31 - (last - first)) << first;
}

/* Make sure that guest_off has an L2 table that may be changed.  In a grace section. */
int map_ensure_table (struct image *img, uint64_t guest_off, struct err *err);

/* Replace those n entries and remember the references in frees (host_ci << 1 |
 * punch) as removed.  Everything that the new entries name is written already
 * (I4) and has its refcount, in RAM (I2).  In a grace section, under the range
 * lock, after map_ensure_table.
 */
int map_update (struct image *img, uint64_t guest_off, unsigned n, const struct l2_pair *p,
                const uint64_t *frees, size_t nr_frees, struct err *err);

/* Check an L1 entry; in_place of slice_get and map_ensure_table. */
int map_check_l1 (struct image *img, uint64_t l1_index, uint64_t raw, struct err *err);

/* The most references that an entry can hold: a stream has at most two clusters'
 * worth of sectors.
 */
#define MAX_ENTRY_REFS 3

/* Add the references that the entry holds to a list of frees; returns how many. */
static inline unsigned
map_entry_frees (const struct image *img, const struct l2_entry *e, bool punch, uint64_t *frees)
{
  uint64_t first = e->host_off >> img->g.cluster_bits;
  uint64_t last = (e->host_off + e->host_len - 1) >> img->g.cluster_bits;
  unsigned n = 0;

  if (img->g.data_file || e->kind == CLUSTER_UNALLOCATED || e->kind == CLUSTER_ZERO_PLAIN)
    return 0;
  assert (last - first < MAX_ENTRY_REFS);
  for (uint64_t ci = first; ci <= last; ++ci)
    frees[n++] = ci << 1 | punch;
  return n;
}

static inline uint64_t
map_l1_index (const struct image *img, uint64_t guest_off)
{
  return guest_off >> (img->g.cluster_bits + img->g.l2_bits);
}

static inline uint64_t
map_l1 (const struct image *img, uint64_t l1_index)
{
  return atomic_load_explicit (&img->l1[l1_index], memory_order_acquire);
}

/* --- read.c */

int read_range (struct image *img, void *buf, uint64_t len, uint64_t guest_off,
                struct err *err);

/* Read what unallocated clusters show. */
int read_backing (struct image *img, void *buf, uint64_t len, uint64_t guest_off,
                  struct err *err);

/* True if an unallocated cluster reads as zeros from guest_off on. */
static inline bool
backing_is_zero (const struct image *img, uint64_t guest_off)
{
  if (img->backing == NULL)
    return !img->backed;
  return guest_off >= bdev_size (img->backing);
}

int read_extents (struct image *img, uint64_t guest_off, uint64_t len, bdev_extent_fn fn,
                  void *opaque, struct err *err);
int read_cache (struct image *img, uint64_t guest_off, uint64_t len, struct err *err);

/* --- gather.c */

/* Read a range that is several runs, with few journeys.  In a grace section. */
int gather_range (struct image *img, void *buf, uint64_t len, uint64_t guest_off,
                  struct err *err);

/* The read_many of a view that is far (see bdev_ops).  Outside of grace sections; the
 * callbacks run outside of them, too, and may do anything that its caller may.
 */
int gather_many (struct image *img, const struct bdev_range *ranges, size_t nr,
                 bdev_many_fn fn, void *opaque);

/* --- compressed.c */

int compressed_init (struct image *img, size_t cache_bytes, struct err *err);
void compressed_free (struct image *img);

/* Read [guest_off, guest_off+len), which lies in the one cluster whose stream
 * lies at [host_off, host_off+host_len).  In a grace section, no locks held.
 */
int compressed_read (struct image *img, uint64_t host_off, uint64_t host_len, void *buf,
                     uint64_t len, uint64_t guest_off, struct err *err);

/* The clusters of this sorted list are about to be freed; a grace period has
 * passed since the mapping named them.
 */
void compressed_forget (struct image *img, const struct u64_vec *frees);

/* --- bitmaps.c */

/* Before the first change, under change_lock: load the bitmaps that record
 * writes, and write (not flush) that they are in use.  *consistent: the autoclear
 * bit may stay.
 */
int bitmaps_begin (struct image *img, bool *consistent, struct err *err);

/* The guest is about to change what it reads there.  After image_begin_change. */
void bitmaps_mark (struct image *img, uint64_t guest_off, uint64_t len);

/* Write them back; before commit_all, with nobody else using the image. */
int bitmaps_store (struct image *img, struct err *err);

/* Forget them: on disk they stay in use. */
void bitmaps_drop (struct image *img);
void bitmaps_free (struct image *img);

/* --- refcounts.c: all with alloc_lock held, except init and free */

int refcounts_init (struct image *img, size_t cache_bytes, struct err *err);
void refcounts_free (struct image *img);

/* *ret = NULL if the table has no such block.  Valid until the next call. */
int rb_get_locked (struct image *img, uint64_t index, struct rb **ret, struct err *err);

/* Set a refcount in a block and note that it is dirty. */
void rb_set_locked (struct image *img, struct rb *rb, uint64_t i, uint64_t value);

/* Make the missing block index in cluster ci, which it covers. */
int rb_make_locked (struct image *img, uint64_t index, uint64_t ci, struct err *err);

int refcount_get_locked (struct image *img, uint64_t ci, uint64_t *value, struct err *err);

/* Take n references of cluster ci away.  -EIO if it has fewer. */
int refcount_drop_locked (struct image *img, uint64_t ci, uint64_t n, struct err *err);

/* Write all dirty blocks; no flush.  A failure breaks the image. */
int refcounts_write_blocks_locked (struct image *img, struct err *err);

/* Replace the table by a larger one; see refcounts.c. */
int refcounts_grow_locked (struct image *img, struct err *err);

/* --- alloc.c */

/* One past the last cluster that the file may have. */
uint64_t alloc_limit (const struct image *img);

/* Take 1..want contiguous free clusters (*got), refcount 1, inside the file.
 * *fresh: they read as zeros.  -ENOSPC if there is none.
 */
int alloc_run (struct image *img, uint64_t want, uint64_t *host_off, uint64_t *got,
               bool *fresh, struct err *err);

/* Give back clusters of alloc_run that nothing ever referenced. */
void alloc_release (struct image *img, uint64_t host_off, uint64_t n);

/* Make the file at least that long; alloc_lock held.  -ENOSPC if it can't. */
int alloc_extend_locked (struct image *img, uint64_t size, struct err *err);

/* --- rangelock.c */

/* Wait until nobody holds a range that touches [guest_off, guest_off+len),
 * rounded out to clusters, and hold it.
 */
void range_lock (struct image *img, struct range_lock *rl, uint64_t guest_off, uint64_t len);
void range_unlock (struct image *img, struct range_lock *rl);

/* --- write.c */

/* Before [host_off, host_off+len) of the device with the guest's data is
 * written: an external data file may have to grow for it.
 */
int write_room (struct image *img, uint64_t host_off, uint64_t len, struct err *err);

/* Outside of grace sections, no locks held but resize_lock. */
int write_range (struct image *img, const void *buf, uint64_t len, uint64_t guest_off,
                 unsigned flags, struct err *err);

/* --- discard.c: likewise */

/* limit: where the disk ends; a last, partial cluster counts as whole. */
int discard_zero (struct image *img, uint64_t guest_off, uint64_t len, uint64_t limit,
                  unsigned flags, struct err *err);
int discard_trim (struct image *img, uint64_t guest_off, uint64_t len, unsigned flags,
                  struct err *err);

/* --- commit.c: outside of grace sections, no locks held but resize_lock */

/* Make everything durable that completed before the call. */
int commit_flush (struct image *img, struct err *err);

/* Is there so much waiting that a writer had better commit first? */
bool commit_wanted (struct image *img);

/* After r = -ENOSPC: 1 if a commit freed clusters, so that trying again makes
 * sense (*err is cleared then), else r or what went wrong.
 */
int commit_for_space (struct image *img, int r, struct err *err);

/* Commit until nothing is left to write, and say so in the header if it said that
 * refcounts may be missing (lazy refcounts).  Nobody else uses the image any more.
 */
int commit_all (struct image *img, struct err *err);

/* Flush the file alone; a failure breaks the image. */
int commit_flush_file (struct image *img, struct err *err);

/* Flush the guest's data, wherever it lies; likewise. */
int commit_flush_data (struct image *img, struct err *err);

/* Write metadata; a failure breaks the image. */
int commit_write (struct image *img, const void *buf, size_t len, uint64_t host_off,
                  struct err *err);

/* --- view.c */

extern const struct bdev_ops image_ops;

#endif /* QR_IMG_IMAGE_INT_H */
