/* References of every host cluster: see ownermap.h.
 *
 * Structure: a radix tree of fixed depth (5 levels of 512 slots) over chunks of
 * 2^14 clusters, 2 bits each: 4 KiB of map for 1 GiB of an image with 64 KiB
 * clusters.  It needs no geometry: cluster indices up to 2^59 fit, and what was
 * never claimed costs nothing.  Nodes and chunks are published by
 * compare-and-swap and live until the map is freed, so walking takes no lock.
 *
 * A state of 3 says "more than two": the exact count is then in a page of 128
 * counts, found by hash, because clusters that several snapshots share come in
 * long runs.  Pages begin with 16 bits a count and are widened to 64 when one
 * of them outgrows that.  A cell enters, changes and leaves state 3 only under
 * the lock; states 0, 1 and 2 change by compare-and-swap alone.
 *
 * Deliberately not here: who owns a cluster (the checker keeps a second map for
 * metadata), and giving memory back before the end.
 */
#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "check/ownermap.h"

#define WORD_BITS      5                /* log2 of clusters in a word */
#define WORD_CLUSTERS  (1u << WORD_BITS)
#define CHUNK_BITS     14               /* log2 of clusters in a chunk */
#define CHUNK_WORDS    (1u << (CHUNK_BITS - WORD_BITS))
#define NODE_BITS      9
#define NODE_SLOTS     (1u << NODE_BITS)
#define LEVELS         5
#define MAX_CI         (UINT64_C (1) << (CHUNK_BITS + LEVELS * NODE_BITS))
#define PAGE_BITS      7                /* log2 of clusters in a page of exact counts */
#define PAGE_CLUSTERS  (1u << PAGE_BITS)

#define LOW_BITS       UINT64_C (0x5555555555555555)
#define HIGH_BITS      UINT64_C (0xaaaaaaaaaaaaaaaa)

struct chunk {
  _Atomic uint64_t word[CHUNK_WORDS];
};

struct node {
  _Atomic (void *) slot[NODE_SLOTS];    /* struct node *, on the last level struct chunk * */
};

/* Exact counts of the clusters whose state is 3; other cells are stale. */
struct page {
  uint64_t index;                       /* cluster index >> PAGE_BITS */
  uint16_t *narrow;                     /* one of the two, or none in a free slot */
  uint64_t *wide;
};

struct ownermap {
  uint64_t memory_limit;                /* constant */
  _Atomic uint64_t memory;              /* bytes */
  _Atomic uint64_t nr_shared;           /* clusters with a state above 1 */
  struct node root;

  /* protected by lock */
  pthread_mutex_t lock;
  struct page *pages;                   /* open addressing, a power of two of them */
  size_t nr_slots, nr_pages;
};

int
ownermap_new (uint64_t memory_limit, struct ownermap **ret, struct err *err)
{
  struct ownermap *m = calloc (1, sizeof *m);

  if (m == NULL)
    return err_set (err, ENOMEM, "out of memory");
  m->memory_limit = memory_limit;
  atomic_init (&m->memory, sizeof *m);
  pthread_mutex_init (&m->lock, NULL);
  *ret = m;
  return 0;
}

static void
free_below (struct node *node, unsigned level)
{
  for (unsigned i = 0; i < NODE_SLOTS; ++i) {
    void *p = atomic_load_explicit (&node->slot[i], memory_order_relaxed);

    if (p && level > 0)
      free_below (p, level - 1);
    free (p);
  }
}

void
ownermap_free (struct ownermap *m)
{
  if (m == NULL)
    return;
  free_below (&m->root, LEVELS - 1);
  for (size_t i = 0; i < m->nr_slots; ++i) {
    free (m->pages[i].narrow);
    free (m->pages[i].wide);
  }
  free (m->pages);
  pthread_mutex_destroy (&m->lock);
  free (m);
}

/* --- memory */

static void *
get_memory (struct ownermap *m, size_t bytes, struct err *err)
{
  uint64_t before = atomic_fetch_add_explicit (&m->memory, bytes, memory_order_relaxed);
  void *p;

  if (!range_fits (before, bytes, m->memory_limit)) {
    atomic_fetch_sub_explicit (&m->memory, bytes, memory_order_relaxed);
    err_set (err, ENOMEM, "counting the references to this image's clusters needs more than "
             "the limit of %llu bytes of memory", (unsigned long long) m->memory_limit);
    return NULL;
  }
  p = calloc (1, bytes);
  if (p == NULL) {
    atomic_fetch_sub_explicit (&m->memory, bytes, memory_order_relaxed);
    err_set (err, ENOMEM, "out of memory");
  }
  return p;
}

static void
give_back (struct ownermap *m, void *p, size_t bytes)
{
  free (p);
  atomic_fetch_sub_explicit (&m->memory, bytes, memory_order_relaxed);
}

/* --- the tree */

static unsigned
slot_index (uint64_t ci, unsigned level)
{
  return ci >> (CHUNK_BITS + level * NODE_BITS) & (NODE_SLOTS - 1);
}

/* The chunk that holds ci, or NULL and *gap_end, the first cluster after the
 * part of the tree that is missing.
 */
static struct chunk *
find_chunk (const struct ownermap *m, uint64_t ci, uint64_t *gap_end)
{
  const struct node *node = &m->root;

  if (ci >= MAX_CI) {
    *gap_end = UINT64_MAX;
    return NULL;
  }
  for (unsigned level = LEVELS - 1;; --level) {
    void *p = atomic_load_explicit (&node->slot[slot_index (ci, level)], memory_order_acquire);

    if (p == NULL) {
      unsigned bits = CHUNK_BITS + level * NODE_BITS;

      *gap_end = ((ci >> bits) + 1) << bits;
      return NULL;
    }
    if (level == 0)
      return p;
    node = p;
  }
}

/* The same, made if it is missing; NULL = no memory, with a message. */
static struct chunk *
make_chunk (struct ownermap *m, uint64_t ci, struct err *err)
{
  struct node *node = &m->root;

  for (unsigned level = LEVELS - 1;; --level) {
    _Atomic (void *) *slot = &node->slot[slot_index (ci, level)];
    size_t bytes = level == 0 ? sizeof (struct chunk) : sizeof (struct node);
    void *p = atomic_load_explicit (slot, memory_order_acquire);

    if (p == NULL) {
      void *fresh = get_memory (m, bytes, err);

      if (fresh == NULL)
        return NULL;
      if (atomic_compare_exchange_strong_explicit (slot, &p, fresh, memory_order_acq_rel,
                                                   memory_order_acquire))
        p = fresh;
      else
        give_back (m, fresh, bytes);    /* somebody was faster: p is theirs */
    }
    if (level == 0)
      return p;
    node = p;
  }
}

static _Atomic uint64_t *
word_of (struct chunk *chunk, uint64_t ci)
{
  return &chunk->word[ci >> WORD_BITS & (CHUNK_WORDS - 1)];
}

/* The bits of n cells from the first on. */
static uint64_t
cells_mask (unsigned first, unsigned n)
{
  return (n == WORD_CLUSTERS ? UINT64_MAX : (UINT64_C (1) << 2 * n) - 1) << 2 * first;
}

/* --- exact counts above 2 */

static size_t
page_hash (uint64_t index)
{
  index *= UINT64_C (0x9e3779b97f4a7c15);
  return index ^ index >> 32;
}

static bool
page_is_free (const struct page *p)
{
  return p->narrow == NULL && p->wide == NULL;
}

/* The slot where the page is or would be; there is always a free one. */
static struct page *
page_slot (struct page *pages, size_t nr_slots, uint64_t index)
{
  size_t i = page_hash (index) & (nr_slots - 1);

  while (!page_is_free (&pages[i]) && pages[i].index != index)
    i = (i + 1) & (nr_slots - 1);
  return &pages[i];
}

static int
grow_pages_locked (struct ownermap *m, struct err *err)
{
  size_t n = m->nr_slots ? m->nr_slots * 2 : 64;
  struct page *fresh = get_memory (m, n * sizeof *fresh, err);

  if (fresh == NULL)
    return -ENOMEM;
  for (size_t i = 0; i < m->nr_slots; ++i)
    if (!page_is_free (&m->pages[i]))
      *page_slot (fresh, n, m->pages[i].index) = m->pages[i];
  give_back (m, m->pages, m->nr_slots * sizeof *fresh);
  m->pages = fresh;
  m->nr_slots = n;
  return 0;
}

/* The page of exact counts for ci, made if it is missing. */
static struct page *
make_page_locked (struct ownermap *m, uint64_t ci, struct err *err)
{
  struct page *p;

  if (m->nr_pages >= m->nr_slots / 4 * 3 && grow_pages_locked (m, err) < 0)
    return NULL;
  p = page_slot (m->pages, m->nr_slots, ci >> PAGE_BITS);
  if (page_is_free (p)) {
    p->narrow = get_memory (m, PAGE_CLUSTERS * sizeof *p->narrow, err);
    if (p->narrow == NULL)
      return NULL;
    p->index = ci >> PAGE_BITS;
    m->nr_pages++;
  }
  return p;
}

static int
widen_page_locked (struct ownermap *m, struct page *p, struct err *err)
{
  uint64_t *wide = get_memory (m, PAGE_CLUSTERS * sizeof *wide, err);

  if (wide == NULL)
    return -ENOMEM;
  for (unsigned i = 0; i < PAGE_CLUSTERS; ++i)
    wide[i] = p->narrow[i];
  give_back (m, p->narrow, PAGE_CLUSTERS * sizeof *p->narrow);
  p->narrow = NULL;
  p->wide = wide;
  return 0;
}

static uint64_t
page_get (const struct page *p, uint64_t ci)
{
  unsigned i = ci & (PAGE_CLUSTERS - 1);

  return p->wide ? p->wide[i] : p->narrow[i];
}

/* v must fit: see make_room_locked. */
static void
page_set (struct page *p, uint64_t ci, uint64_t v)
{
  unsigned i = ci & (PAGE_CLUSTERS - 1);

  if (p->wide)
    p->wide[i] = v;
  else {
    assert (v <= UINT16_MAX);
    p->narrow[i] = v;
  }
}

static uint64_t
saturating_add (uint64_t a, uint64_t b)
{
  uint64_t sum;

  return add_overflows (a, b, &sum) ? UINT64_MAX : sum;
}

/* A page in which the clusters [ci, ci+n) of one word can each gain weight.
 * Cells that are not in state 3 yet bring two at most.
 */
static struct page *
make_room_locked (struct ownermap *m, uint64_t ci, unsigned n, uint64_t weight, struct err *err)
{
  struct page *p = make_page_locked (m, ci, err);
  uint64_t highest = 2;

  if (p == NULL)
    return NULL;
  for (unsigned i = 0; i < n; ++i)
    highest = MAX (highest, page_get (p, ci + i));
  if (p->narrow && saturating_add (highest, weight) > UINT16_MAX &&
      widen_page_locked (m, p, err) < 0)
    return NULL;
  return p;
}

/* --- claims */

static void
count_shared (struct ownermap *m, uint64_t old, uint64_t new)
{
  unsigned n = __builtin_popcountll (new & ~old & HIGH_BITS);

  if (n)
    atomic_fetch_add_explicit (&m->nr_shared, n, memory_order_relaxed);
}

/* Claims that bring some cell of a word above 2. */
static int
claim_many (struct ownermap *m, _Atomic uint64_t *word, uint64_t ci, unsigned n,
            uint64_t weight, bool *conflict, struct err *err)
{
  unsigned first = ci & (WORD_CLUSTERS - 1);
  uint64_t old, new;
  struct page *p;

  LOCK_SCOPE (&m->lock);
  p = make_room_locked (m, ci, n, weight, err);
  if (p == NULL)
    return -ENOMEM;
  old = atomic_load_explicit (word, memory_order_relaxed);
  do {
    new = old;
    for (unsigned i = first; i < first + n; ++i) {
      uint64_t state = old >> 2 * i & 3;

      if (state < 3) {
        state = weight > 2 - state ? 3 : state + weight;
        new = (new & ~(UINT64_C (3) << 2 * i)) | state << 2 * i;
      }
    }
  } while (!atomic_compare_exchange_weak_explicit (word, &old, new, memory_order_relaxed,
                                                   memory_order_relaxed));
  for (unsigned i = 0; i < n; ++i) {
    uint64_t before = old >> 2 * (first + i) & 3;

    if (before == 3)
      before = page_get (p, ci + i);
    if ((new >> 2 * (first + i) & 3) == 3)
      page_set (p, ci + i, saturating_add (before, weight));
  }
  count_shared (m, old, new);
  if (old & cells_mask (first, n))
    *conflict = true;
  return 0;
}

/* Clusters [ci, ci+n) lie in one word. */
static inline int
claim_word (struct ownermap *m, _Atomic uint64_t *word, uint64_t ci, unsigned n,
            uint64_t weight, bool *conflict, struct err *err)
{
  uint64_t mask = cells_mask (ci & (WORD_CLUSTERS - 1), n);
  uint64_t old = atomic_load_explicit (word, memory_order_relaxed), new;

  do {
    if (weight == 1 && (old & mask & HIGH_BITS) == 0)
      new = old + (mask & LOW_BITS);
    else if (weight == 2 && (old & mask) == 0)
      new = old | (mask & HIGH_BITS);
    else
      return claim_many (m, word, ci, n, weight, conflict, err);
  } while (!atomic_compare_exchange_weak_explicit (word, &old, new, memory_order_relaxed,
                                                   memory_order_relaxed));
  if (old & mask) {
    *conflict = true;
    count_shared (m, old, new);
  }
  else if (weight == 2)
    count_shared (m, old, new);
  return 0;
}

int
ownermap_claim (struct ownermap *m, uint64_t ci, uint64_t n, uint64_t weight,
                bool *conflict, struct err *err)
{
  bool any = false;
  uint64_t end = ci + n;

  assert (range_fits (ci, n, MAX_CI));
  if (weight == 0)
    return 0;
  while (ci < end) {
    struct chunk *chunk = make_chunk (m, ci, err);
    uint64_t stop = MIN (end, ROUND_DOWN (ci, 1u << CHUNK_BITS) + (1u << CHUNK_BITS));

    if (chunk == NULL)
      return -ENOMEM;
    while (ci < stop) {
      unsigned k = MIN (stop - ci, WORD_CLUSTERS - (ci & (WORD_CLUSTERS - 1)));
      int r = claim_word (m, word_of (chunk, ci), ci, k, weight, &any, err);

      if (r < 0)
        return r;
      ci += k;
    }
  }
  if (any && conflict)
    *conflict = true;
  return 0;
}

void
ownermap_unclaim (struct ownermap *m, uint64_t ci)
{
  uint64_t gap_end, old, count;
  struct chunk *chunk = find_chunk (m, ci, &gap_end);
  unsigned shift = 2 * (ci & (WORD_CLUSTERS - 1));

  assert (chunk != NULL);
  old = atomic_load_explicit (word_of (chunk, ci), memory_order_relaxed);
  count = ownermap_get (m, ci);
  assert (count > 0);
  --count;
  if (count > 2)
    page_set (page_slot (m->pages, m->nr_slots, ci >> PAGE_BITS), ci, count);
  if (count == 1)
    atomic_fetch_sub_explicit (&m->nr_shared, 1, memory_order_relaxed);
  old = (old & ~(UINT64_C (3) << shift)) | MIN (count, 3) << shift;
  atomic_store_explicit (word_of (chunk, ci), old, memory_order_relaxed);
}

/* --- questions */

uint64_t
ownermap_word (const struct ownermap *m, uint64_t ci)
{
  uint64_t gap_end;
  struct chunk *chunk = find_chunk (m, ci, &gap_end);

  return chunk ? atomic_load_explicit (word_of (chunk, ci), memory_order_relaxed) : 0;
}

uint64_t
ownermap_get (const struct ownermap *m, uint64_t ci)
{
  uint64_t state = ownermap_word (m, ci) >> 2 * (ci & (WORD_CLUSTERS - 1)) & 3;
  struct ownermap *locked = (struct ownermap *) m;      /* the lock only */

  if (state < 3)
    return state;
  LOCK_SCOPE (&locked->lock);
  return page_get (page_slot (m->pages, m->nr_slots, ci >> PAGE_BITS), ci);
}

void
ownermap_counts (const struct ownermap *m, uint64_t ci, uint64_t counts[32])
{
  struct ownermap *locked = (struct ownermap *) m;      /* the lock only */
  uint64_t word = ownermap_word (m, ci);
  const struct page *p;

  for (unsigned i = 0; i < WORD_CLUSTERS; ++i)
    counts[i] = word >> 2 * i & 3;
  if ((word & word >> 1 & LOW_BITS) == 0)
    return;
  LOCK_SCOPE (&locked->lock);
  p = page_slot (m->pages, m->nr_slots, ci >> PAGE_BITS);
  for (unsigned i = 0; i < WORD_CLUSTERS; ++i)
    if (counts[i] == 3)
      counts[i] = page_get (p, ci + i);
}

/* First cluster at or after ci in chunk that has (or not) a reference; the
 * chunk's end if there is none.
 */
static uint64_t
find_in_chunk (struct chunk *chunk, uint64_t ci, bool used)
{
  uint64_t end = ROUND_DOWN (ci, 1u << CHUNK_BITS) + (1u << CHUNK_BITS);

  while (ci < end) {
    uint64_t w = atomic_load_explicit (word_of (chunk, ci), memory_order_relaxed);
    unsigned first = ci & (WORD_CLUSTERS - 1);

    w = (w | w >> 1) & LOW_BITS;
    if (!used)
      w ^= LOW_BITS;
    w &= cells_mask (first, WORD_CLUSTERS - first);
    if (w)
      return ROUND_DOWN (ci, WORD_CLUSTERS) + __builtin_ctzll (w) / 2;
    ci = ROUND_DOWN (ci, WORD_CLUSTERS) + WORD_CLUSTERS;
  }
  return end;
}

uint64_t
ownermap_find (const struct ownermap *m, uint64_t ci, uint64_t end, bool used)
{
  while (ci < end) {
    uint64_t next;
    struct chunk *chunk = find_chunk (m, ci, &next);

    if (chunk == NULL) {
      if (!used)
        return ci;
    }
    else {
      next = find_in_chunk (chunk, ci, used);
      if (next >= end || next < ROUND_DOWN (ci, 1u << CHUNK_BITS) + (1u << CHUNK_BITS))
        return MIN (next, end);
    }
    ci = next;
  }
  return end;
}

/* One past the highest used cluster below node, whose first one is base. */
static uint64_t
end_below (const struct node *node, unsigned level, uint64_t base)
{
  unsigned bits = CHUNK_BITS + level * NODE_BITS;

  for (unsigned i = NODE_SLOTS; i-- > 0;) {
    void *p = atomic_load_explicit (&node->slot[i], memory_order_acquire);
    uint64_t sub_base = base + ((uint64_t) i << bits), end = 0;

    if (p && level > 0)
      end = end_below (p, level - 1, sub_base);
    else if (p)
      for (unsigned j = CHUNK_WORDS; j-- > 0 && end == 0;) {
        uint64_t w = atomic_load_explicit (&((struct chunk *) p)->word[j], memory_order_relaxed);

        if (w)
          end = sub_base + j * WORD_CLUSTERS + (63 - __builtin_clzll (w)) / 2 + 1;
      }
    if (end)
      return end;
  }
  return 0;
}

uint64_t
ownermap_end (const struct ownermap *m)
{
  return end_below (&m->root, LEVELS - 1, 0);
}

bool
ownermap_any_shared (const struct ownermap *m)
{
  return atomic_load_explicit (&m->nr_shared, memory_order_relaxed) != 0;
}

uint64_t
ownermap_memory (const struct ownermap *m)
{
  return atomic_load_explicit (&m->memory, memory_order_relaxed);
}
