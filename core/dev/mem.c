/* Sparse RAM: see mem.h.
 *
 * Pages of 64 KiB hang from a radix tree of fixed depth; six levels of 256
 * slots reach every byte that a 64-bit offset can name, so the size of the
 * device costs nothing.  A page that is missing reads as zeros.
 *
 * Locks: interior nodes are published by compare-and-swap and live until the
 * device is closed, so walking the tree takes no lock.  A page, and the slot
 * that points to it, is protected by one of NR_STRIPES locks chosen by its
 * index; neighbours have different ones, so streams rarely meet.  Each page of
 * a request is atomic by itself, the request as a whole is not.
 *
 * Shrinking stores the new size first and then empties what lies behind it.  A
 * writer looks at the size again once it holds its page's lock: either its
 * bytes are there when the shrinker comes by, or it sees the new size and is
 * refused.  Hence growing again always reads zeros.
 *
 * Deliberately not here: giving back interior nodes (2 KiB for 16 MiB), a
 * limit on memory (whoever stacks the devices bounds what may be written).
 */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "dev/mem.h"

#define PAGE_BITS  16
#define PAGE_BYTES (UINT64_C (1) << PAGE_BITS)
#define NODE_BITS  8
#define NODE_SLOTS (1u << NODE_BITS)
#define LEVELS     6            /* PAGE_BITS + LEVELS * NODE_BITS = 64 */
#define NR_STRIPES 64

struct node {
  _Atomic (void *) slot[NODE_SLOTS];    /* struct node *, or in a leaf uint8_t * */
};

struct mem {
  struct bdev d;
  _Atomic uint64_t nr_pages;
  pthread_mutex_t resize_lock;
  pthread_rwlock_t stripe[NR_STRIPES];
  struct node root;
};

static pthread_rwlock_t *
stripe_of (struct mem *m, uint64_t page)
{
  return &m->stripe[page % NR_STRIPES];
}

static unsigned
slot_index (uint64_t page, unsigned level)
{
  return page >> (level * NODE_BITS) & (NODE_SLOTS - 1);
}

/* The leaf that holds page, or NULL and *gap_end, the first page after the
 * part of the tree that is missing.
 */
static struct node *
find_leaf (struct mem *m, uint64_t page, uint64_t *gap_end)
{
  struct node *node = &m->root;

  for (unsigned level = LEVELS - 1; level > 0; --level) {
    node = atomic_load (&node->slot[slot_index (page, level)]);
    if (node == NULL) {
      *gap_end = ((page >> (level * NODE_BITS)) + 1) << (level * NODE_BITS);
      return NULL;
    }
  }
  return node;
}

/* The same, made if it is missing; NULL = out of memory. */
static struct node *
make_leaf (struct mem *m, uint64_t page)
{
  struct node *node = &m->root;

  for (unsigned level = LEVELS - 1; level > 0; --level) {
    _Atomic (void *) *slot = &node->slot[slot_index (page, level)];
    void *next = atomic_load (slot);

    if (next == NULL) {
      struct node *fresh = calloc (1, sizeof *fresh);

      if (fresh == NULL)
        return NULL;
      if (atomic_compare_exchange_strong (slot, &next, fresh))
        next = fresh;
      else
        free (fresh);           /* somebody was faster: next is theirs */
    }
    node = next;
  }
  return node;
}

static int
mem_pread (struct bdev *d, void *buf, size_t len, uint64_t off, struct err *err)
{
  struct mem *m = (struct mem *) d;
  uint8_t *p = buf;

  while (len > 0) {
    uint64_t page = off >> PAGE_BITS, start = off & (PAGE_BYTES - 1), gap_end;
    size_t n = MIN (len, PAGE_BYTES - start);
    struct node *leaf = find_leaf (m, page, &gap_end);

    if (leaf == NULL) {
      /* All of the gap at once; at the tree's end gap_end << PAGE_BITS wraps to 0. */
      uint64_t gap = (gap_end << PAGE_BITS) - off;

      n = MIN (len, gap);
      memset (p, 0, n);
    }
    else {
      pthread_rwlock_t *lock = stripe_of (m, page);
      uint8_t *data;

      pthread_rwlock_rdlock (lock);
      data = atomic_load (&leaf->slot[slot_index (page, 0)]);
      if (data)
        memcpy (p, data + start, n);
      else
        memset (p, 0, n);
      pthread_rwlock_unlock (lock);
    }
    p += n;
    off += n;
    len -= n;
  }
  return 0;
}

static int
write_page_locked (struct mem *m, struct node *leaf, const uint8_t *p, size_t n,
                   uint64_t off, struct err *err)
{
  _Atomic (void *) *slot = &leaf->slot[slot_index (off >> PAGE_BITS, 0)];
  uint8_t *data = atomic_load (slot);

  if (!range_fits (off, n, atomic_load (&m->d.size)))
    return err_set (err, EINVAL, "%s: write at byte %llu: the device was shrunk meanwhile",
                    m->d.name, (unsigned long long) off);
  if (data == NULL) {
    data = n == PAGE_BYTES ? malloc (PAGE_BYTES) : calloc (1, PAGE_BYTES);
    if (data == NULL)
      return err_set (err, ENOMEM, "%s: out of memory", m->d.name);
    atomic_fetch_add (&m->nr_pages, 1);
    atomic_store (slot, data);
  }
  memcpy (data + (off & (PAGE_BYTES - 1)), p, n);
  return 0;
}

static int
mem_pwrite (struct bdev *d, const void *buf, size_t len, uint64_t off,
            unsigned flags, struct err *err)
{
  struct mem *m = (struct mem *) d;
  const uint8_t *p = buf;

  while (len > 0) {
    uint64_t page = off >> PAGE_BITS;
    size_t n = MIN (len, PAGE_BYTES - (off & (PAGE_BYTES - 1)));
    struct node *leaf = make_leaf (m, page);
    int r;

    if (leaf == NULL)
      return err_set (err, ENOMEM, "%s: out of memory", d->name);
    pthread_rwlock_wrlock (stripe_of (m, page));
    r = write_page_locked (m, leaf, p, n, off, err);
    pthread_rwlock_unlock (stripe_of (m, page));
    if (r < 0)
      return r;
    p += n;
    off += n;
    len -= n;
  }
  return 0;
}

/* Make [off, off+len) read as zeros and free the pages that lie in it whole. */
static void
clear_range (struct mem *m, uint64_t off, uint64_t len)
{
  while (len > 0) {
    uint64_t page = off >> PAGE_BITS, start = off & (PAGE_BYTES - 1), gap_end;
    uint64_t n = MIN (len, PAGE_BYTES - start);
    struct node *leaf = find_leaf (m, page, &gap_end);

    if (leaf == NULL)
      n = MIN (len, (gap_end << PAGE_BITS) - off);
    else {
      _Atomic (void *) *slot = &leaf->slot[slot_index (page, 0)];
      pthread_rwlock_t *lock = stripe_of (m, page);
      uint8_t *data;

      /* Not even an empty slot is passed over without the lock: a writer who
       * holds it may have seen the old size (see above).
       */
      pthread_rwlock_wrlock (lock);
      data = atomic_load (slot);
      /* What a page holds behind the end of the device is zeros anyway. */
      if (data && start == 0 && (n == PAGE_BYTES || off + n >= atomic_load (&m->d.size)))
        atomic_store (slot, NULL);
      else if (data) {
        memset (data + start, 0, n);
        data = NULL;
      }
      pthread_rwlock_unlock (lock);
      if (data) {
        atomic_fetch_sub (&m->nr_pages, 1);
        free (data);
      }
    }
    off += n;
    len -= n;
  }
}

static int
mem_zero (struct bdev *d, uint64_t off, uint64_t len, unsigned flags, struct err *err)
{
  clear_range ((struct mem *) d, off, len);
  return 0;
}

static int
mem_trim (struct bdev *d, uint64_t off, uint64_t len, unsigned flags, struct err *err)
{
  clear_range ((struct mem *) d, off, len);
  return 0;
}

static int
mem_resize (struct bdev *d, uint64_t size, uint64_t ahead, struct err *err)
{
  struct mem *m = (struct mem *) d;
  uint64_t old;

  LOCK_SCOPE (&m->resize_lock);
  old = atomic_exchange (&d->size, size);
  if (size < old)               /* behind old nothing was ever written */
    clear_range (m, size, old - size);
  return 0;
}

static int
mem_extents (struct bdev *d, uint64_t off, uint64_t len, bdev_extent_fn fn,
             void *opaque, struct err *err)
{
  struct mem *m = (struct mem *) d;
  uint64_t end = off + len, from = off;
  unsigned kind = 0;
  int r;

  while (off < end) {
    uint64_t page = off >> PAGE_BITS, next = page + 1;
    struct node *leaf = find_leaf (m, page, &next);
    bool data = leaf && atomic_load (&leaf->slot[slot_index (page, 0)]);
    unsigned k = data ? 0 : BDEV_HOLE | BDEV_ZERO;

    if (k != kind && off > from) {
      r = fn (opaque, from, off - from, kind);
      if (r != 0)
        return r;
      from = off;
    }
    kind = k;
    off += MIN (end - off, (next << PAGE_BITS) - off);
  }
  return fn (opaque, from, end - from, kind);
}

static void
free_below (struct node *node, unsigned level)
{
  for (unsigned i = 0; i < NODE_SLOTS; ++i) {
    void *p = atomic_load (&node->slot[i]);

    if (p && level > 0)
      free_below (p, level - 1);
    free (p);
  }
}

static void
mem_close (struct bdev *d)
{
  struct mem *m = (struct mem *) d;

  free_below (&m->root, LEVELS - 1);
  for (unsigned i = 0; i < NR_STRIPES; ++i)
    pthread_rwlock_destroy (&m->stripe[i]);
  pthread_mutex_destroy (&m->resize_lock);
  free (m);
}

static const struct bdev_ops mem_ops = {
  .kind = "mem",
  .native_fua = true,           /* RAM: nothing is ever less durable than the rest */
  .pread = mem_pread,
  .pwrite = mem_pwrite,
  .zero = mem_zero,
  .trim = mem_trim,
  .resize = mem_resize,
  .extents = mem_extents,
  .close = mem_close,
};

int
mem_new (const char *name, uint64_t size, bool can_grow, struct bdev **ret, struct err *err)
{
  struct mem *m = calloc (1, sizeof *m);
  int r;

  if (m == NULL)
    return err_set (err, ENOMEM, "out of memory");
  r = bdev_init (&m->d, &mem_ops, name, size, true, can_grow, err);
  if (r < 0) {
    free (m);
    return r;
  }
  pthread_mutex_init (&m->resize_lock, NULL);
  for (unsigned i = 0; i < NR_STRIPES; ++i)
    pthread_rwlock_init (&m->stripe[i], NULL);
  *ret = &m->d;
  return 0;
}

uint64_t
mem_used (struct bdev *d)
{
  struct mem *m = (struct mem *) d;

  return atomic_load (&m->nr_pages) * PAGE_BYTES;
}
