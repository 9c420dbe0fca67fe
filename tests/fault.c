/* See fault.h.
 *
 * The crash device keeps what would survive a power cut (a copy in RAM) and the
 * list of changes since.  Its promises are no better than a disk's:
 *
 * - A change may reach the medium from the moment it is begun, so it is in the
 *   list before it is passed on; one that fails is taken out again (what lies
 *   below in a test either does something or fails).
 * - A flush makes durable what had completed when the flush began, nothing that
 *   was merely under way, nothing that came later, and nothing if it fails.
 * - A write with BDEV_FUA is durable itself, and nothing else is because of it.
 * - Changes may be lost or half there in any combination, one sector of 512
 *   bytes being the unit that is there or is not.  Sizes are a file system's
 *   business, which keeps its own order: of several resizes the first few have
 *   happened, and nothing moves across one.  Of what the device was allowed to
 *   grow ahead nothing, all, or anything between is there.
 */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "base/vec.h"
#include "dev/mem.h"
#include "fault.h"

#define SECTOR     512
#define COPY_CHUNK (1 << 20)

/* What both devices do alike: hand it on. */
struct pass {
  struct bdev d;
  struct bdev *under;
};

static struct bdev *
under_of (struct bdev *d)
{
  return ((struct pass *) d)->under;
}

static int
pass_pread (struct bdev *d, void *buf, size_t len, uint64_t off, struct err *err)
{
  return bdev_pread (under_of (d), buf, len, off, err);
}

static int
pass_read_many (struct bdev *d, const struct bdev_range *ranges, size_t nr,
                bdev_many_fn fn, void *opaque, struct err *err)
{
  return bdev_read_many (under_of (d), ranges, nr, fn, opaque, err);
}

static int
pass_extents (struct bdev *d, uint64_t off, uint64_t len, bdev_extent_fn fn,
              void *opaque, struct err *err)
{
  return bdev_extents (under_of (d), off, len, fn, opaque, err);
}

static int
pass_cache (struct bdev *d, uint64_t off, uint64_t len, struct err *err)
{
  return bdev_cache (under_of (d), off, len, err);
}

static int
pass_init (struct bdev *d, const struct bdev_ops *ops, struct bdev *under, struct err *err)
{
  int r = bdev_init (d, ops, under->name, bdev_size (under), under->writable,
                     under->can_grow, err);

  if (r < 0)
    return r;
  d->far = under->far;
  ((struct pass *) d)->under = bdev_ref (under);
  return 0;
}

/* --- failing */

struct fault {
  struct pass p;
  unsigned n;
  enum fault_kind kind;
  atomic_uint count;
  atomic_bool fired;
};

/* Count one operation: 0 or the error that it is to fail with. */
static int
fault_tick (struct bdev *d, const char *what, struct err *err)
{
  struct fault *f = (struct fault *) d;
  unsigned now = atomic_fetch_add (&f->count, 1) + 1;

  if (f->n == 0 || (f->kind == FAULT_ONCE ? now != f->n : now < f->n))
    return 0;
  atomic_store (&f->fired, true);
  return err_set (err, EIO, "%s: injected fault in operation %u (%s)", d->name, now, what);
}

static int
fault_pwrite (struct bdev *d, const void *buf, size_t len, uint64_t off,
              unsigned flags, struct err *err)
{
  int r = fault_tick (d, "write", err);

  return r < 0 ? r : bdev_pwrite (under_of (d), buf, len, off, flags, err);
}

static int
fault_zero (struct bdev *d, uint64_t off, uint64_t len, unsigned flags, struct err *err)
{
  int r = fault_tick (d, "zero", err);

  return r < 0 ? r : bdev_zero (under_of (d), off, len, flags, err);
}

static int
fault_trim (struct bdev *d, uint64_t off, uint64_t len, unsigned flags, struct err *err)
{
  int r = fault_tick (d, "trim", err);

  return r < 0 ? r : bdev_trim (under_of (d), off, len, flags, err);
}

static int
fault_flush (struct bdev *d, struct err *err)
{
  int r = fault_tick (d, "flush", err);

  return r < 0 ? r : bdev_flush (under_of (d), err);
}

static int
fault_resize (struct bdev *d, uint64_t size, uint64_t ahead, struct err *err)
{
  int r = fault_tick (d, "resize", err);

  if (r == 0)
    r = bdev_grow (under_of (d), size, ahead, err);
  if (r == 0)
    atomic_store (&d->size, size);
  return r;
}

static void
fault_close (struct bdev *d)
{
  bdev_unref (under_of (d));
  free (d);
}

/* No FUA of its own: the flush that replaces it is one more thing that can fail. */
static const struct bdev_ops fault_ops = {
  .kind = "fault",
  .pread = pass_pread,
  .read_many = pass_read_many,
  .pwrite = fault_pwrite,
  .zero = fault_zero,
  .trim = fault_trim,
  .flush = fault_flush,
  .resize = fault_resize,
  .extents = pass_extents,
  .cache = pass_cache,
  .close = fault_close,
};

int
fault_new (struct bdev *under, unsigned n, enum fault_kind kind,
           struct bdev **ret, struct err *err)
{
  struct fault *f = calloc (1, sizeof *f);
  int r = f ? pass_init (&f->p.d, &fault_ops, under, err)
            : err_set (err, ENOMEM, "out of memory");

  if (r < 0) {
    free (f);
    return r;
  }
  f->n = n;
  f->kind = kind;
  *ret = &f->p.d;
  return 0;
}

bool
fault_fired (struct bdev *d)
{
  return atomic_load (&((struct fault *) d)->fired);
}

unsigned
fault_count (struct bdev *d)
{
  return atomic_load (&((struct fault *) d)->count);
}

/* --- crashing */

enum change_kind { CHANGE_WRITE, CHANGE_ZERO, CHANGE_RESIZE };

struct change {
  enum change_kind kind;
  uint64_t id;
  uint64_t off, len;            /* CHANGE_RESIZE: off is the new size */
  uint8_t *data;                /* CHANGE_WRITE; owned */
  uint64_t done_at;             /* time at which it completed; 0 = under way */
  bool durable;                 /* by BDEV_FUA */
};
DEFINE_VEC (change_vec, struct change);

struct crash {
  struct pass p;
  void (*hook) (void *);        /* set while nothing else goes on */
  void *hook_opaque;
  /* protected by lock */
  pthread_mutex_t lock;
  struct bdev *base;            /* what is durable */
  struct change_vec changes;    /* in the order in which they began */
  _Atomic uint64_t ahead;       /* how much longer than its size it may be */
  uint64_t clock;               /* ticks whenever a change begins or ends, or a flush begins */
};

struct copy {
  struct bdev *from, *to;
  uint8_t *buf;
  struct err *err;
};

static int
copy_extent (void *opaque, uint64_t off, uint64_t len, unsigned kind)
{
  struct copy *c = opaque;

  while (!(kind & BDEV_ZERO) && len > 0) {
    size_t n = MIN (len, COPY_CHUNK);
    int r = bdev_pread (c->from, c->buf, n, off, c->err);

    if (r == 0)
      r = bdev_pwrite (c->to, c->buf, n, off, 0, c->err);
    if (r < 0)
      return r;
    off += n;
    len -= n;
  }
  return 0;
}

int
mem_copy_of (struct bdev *src, struct bdev **ret, struct err *err)
{
  CLEANUP_FREE uint8_t *buf = malloc (COPY_CHUNK);
  struct copy c = { .from = src, .buf = buf, .err = err };
  int r;

  if (buf == NULL)
    return err_set (err, ENOMEM, "out of memory");
  r = mem_new (src->name, bdev_size (src), src->can_grow, &c.to, err);
  if (r < 0)
    return r;
  r = bdev_extents (src, 0, bdev_size (src), copy_extent, &c, err);
  if (r < 0) {
    bdev_unref (c.to);
    return r;
  }
  *ret = c.to;
  return 0;
}

/* Put a piece of a change on a device, as far as it lies inside. */
static int
apply_piece (struct bdev *to, const struct change *c, uint64_t pos, uint64_t len, struct err *err)
{
  uint64_t size = bdev_size (to), off = c->off + pos;

  if (off >= size)
    return 0;
  len = MIN (len, size - off);
  return c->kind == CHANGE_WRITE ? bdev_pwrite (to, c->data + pos, len, off, 0, err)
                                 : bdev_zero (to, off, len, BDEV_MAY_TRIM, err);
}

static int
resize_anyway (struct bdev *to, uint64_t size, struct err *err)
{
  to->can_grow = true;          /* it could when the change was made */
  return bdev_resize (to, size, err);
}

static int
apply_whole (struct bdev *to, const struct change *c, struct err *err)
{
  return c->kind == CHANGE_RESIZE ? resize_anyway (to, c->off, err)
                                  : apply_piece (to, c, 0, c->len, err);
}

/* splitmix64 */
static uint64_t
next_random (uint64_t *state)
{
  uint64_t x = *state += UINT64_C (0x9e3779b97f4a7c15);

  x = (x ^ x >> 30) * UINT64_C (0xbf58476d1ce4e5b9);
  x = (x ^ x >> 27) * UINT64_C (0x94d049bb133111eb);
  return x ^ x >> 31;
}

/* Any subset of its sectors; of large ranges, of groups of sectors. */
static int
apply_torn (struct bdev *to, const struct change *c, uint64_t *rng, struct err *err)
{
  uint64_t group = SECTOR, pos = 0;

  while (c->kind == CHANGE_ZERO && c->len / group > 4096)
    group *= 2;
  while (pos < c->len) {
    /* Up to the next boundary on the device, not in the buffer. */
    uint64_t n = MIN (c->len - pos, group - (c->off + pos) % group);
    int r = next_random (rng) & 1 ? apply_piece (to, c, pos, n, err) : 0;

    if (r < 0)
      return r;
    pos += n;
  }
  return 0;
}

static void
shuffle (const struct change **list, size_t nr, uint64_t *rng)
{
  for (size_t i = nr; i > 1; --i) {
    size_t j = next_random (rng) % i;
    const struct change *t = list[i - 1];

    list[i - 1] = list[j];
    list[j] = t;
  }
}

/* Some of the changes: each lost, torn or there; resizes up to one of them. */
static int
apply_some (struct bdev *to, const struct change **list, size_t nr, uint64_t *rng,
            struct err *err)
{
  bool sizes_go_on = true;
  int r = 0;

  for (size_t start = 0, end; start < nr && r == 0; start = end + 1) {
    for (end = start; end < nr; ++end)
      if (list[end]->durable || list[end]->kind == CHANGE_RESIZE)
        break;
    shuffle (list + start, end - start, rng);
    for (size_t i = start; i < end && r == 0; ++i)
      switch (next_random (rng) % 3) {
      case 0: break;
      case 1: r = apply_whole (to, list[i], err); break;
      case 2: r = apply_torn (to, list[i], rng, err); break;
      }
    if (end == nr || r < 0)
      break;
    if (list[end]->kind == CHANGE_RESIZE)
      sizes_go_on = sizes_go_on && next_random (rng) % 4 != 0;
    if (list[end]->durable || sizes_go_on)
      r = apply_whole (to, list[end], err);
  }
  return r;
}

static uint64_t
some_of (uint64_t n, uint64_t *rng)
{
  switch (next_random (rng) % 3) {
  case 0: return 0;
  case 1: return n;
  default: return n ? next_random (rng) % n : 0;
  }
}

static int
apply_chosen_locked (struct crash *c, struct bdev *to, unsigned seed, struct err *err)
{
  CLEANUP_FREE const struct change **list = calloc (c->changes.len + 1, sizeof *list);
  uint64_t rng = seed;
  int r = 0;

  if (list == NULL)
    return err_set (err, ENOMEM, "out of memory");
  for (size_t i = 0; i < c->changes.len; ++i) {
    const struct change *ch = list[i] = &c->changes.ptr[i];

    if (r == 0 && (seed == 1 || (seed == 0 && ch->durable)))
      r = apply_whole (to, ch, err);
  }
  if (seed > 1)
    r = apply_some (to, list, c->changes.len, &rng, err);
  if (seed > 1 && r == 0)
    r = resize_anyway (to, bdev_size (to) + some_of (c->ahead, &rng), err);
  return r;
}

int
crash_now (struct bdev *d, unsigned seed, struct bdev **ret, struct err *err)
{
  struct crash *c = (struct crash *) d;
  struct bdev *state = NULL;
  int r;

  LOCK_SCOPE (&c->lock);
  r = mem_copy_of (c->base, &state, err);
  if (r == 0)
    r = apply_chosen_locked (c, state, seed, err);
  if (r < 0) {
    bdev_unref (state);
    return r;
  }
  state->can_grow = d->can_grow;
  *ret = state;
  return 0;
}

void
crash_set_hook (struct bdev *d, void (*fn) (void *opaque), void *opaque)
{
  struct crash *c = (struct crash *) d;

  c->hook = fn;
  c->hook_opaque = opaque;
}

/* A change begins; *id names it for change_end. */
static int
change_begin (struct crash *c, struct change ch, const void *data, uint64_t *id,
              struct err *err)
{
  int r;

  if (data) {
    ch.data = malloc (ch.len);
    if (ch.data == NULL)
      return err_set (err, ENOMEM, "out of memory");
    memcpy (ch.data, data, ch.len);
  }
  LOCK_SCOPE (&c->lock);
  ch.id = *id = ++c->clock;
  r = change_vec_push (&c->changes, ch);
  if (r < 0) {
    free (ch.data);
    return err_set (err, -r, "out of memory");
  }
  return 0;
}

/* It has ended: r says how, which is passed on. */
static int
change_end (struct crash *c, uint64_t id, int r, bool durable)
{
  size_t i;

  LOCK_SCOPE (&c->lock);
  for (i = 0; c->changes.ptr[i].id != id; ++i)
    ;
  if (r == 0) {
    c->changes.ptr[i].done_at = ++c->clock;
    c->changes.ptr[i].durable = durable;
    return 0;
  }
  free (c->changes.ptr[i].data);
  c->changes.len--;
  memmove (&c->changes.ptr[i], &c->changes.ptr[i + 1],
           (c->changes.len - i) * sizeof c->changes.ptr[0]);
  return r;
}

static void
call_hook (struct crash *c)
{
  if (c->hook)
    c->hook (c->hook_opaque);
}

static int
crash_pwrite (struct bdev *d, const void *buf, size_t len, uint64_t off,
              unsigned flags, struct err *err)
{
  struct crash *c = (struct crash *) d;
  struct change ch = { .kind = CHANGE_WRITE, .off = off, .len = len };
  uint64_t id;
  int r = change_begin (c, ch, buf, &id, err);

  if (r < 0)
    return r;
  if (flags & BDEV_FUA)
    call_hook (c);
  return change_end (c, id, bdev_pwrite (under_of (d), buf, len, off, flags, err),
                     flags & BDEV_FUA);
}

static int
crash_zero (struct bdev *d, uint64_t off, uint64_t len, unsigned flags, struct err *err)
{
  struct crash *c = (struct crash *) d;
  struct change ch = { .kind = CHANGE_ZERO, .off = off, .len = len };
  uint64_t id;
  int r = change_begin (c, ch, NULL, &id, err);

  if (r < 0)
    return r;
  if (flags & BDEV_FUA)
    call_hook (c);
  return change_end (c, id, bdev_zero (under_of (d), off, len, flags, err),
                     flags & BDEV_FUA);
}

/* A trimmed range may read as zeros at once, later, or in parts. */
static int
crash_trim (struct bdev *d, uint64_t off, uint64_t len, unsigned flags, struct err *err)
{
  struct crash *c = (struct crash *) d;
  struct change ch = { .kind = CHANGE_ZERO, .off = off, .len = len };
  uint64_t id;
  int r;

  if (under_of (d)->ops->trim == NULL)
    return 0;
  r = change_begin (c, ch, NULL, &id, err);
  if (r < 0)
    return r;
  if (flags & BDEV_FUA)
    call_hook (c);
  return change_end (c, id, bdev_trim (under_of (d), off, len, flags, err),
                     flags & BDEV_FUA);
}

static int
crash_resize (struct bdev *d, uint64_t size, uint64_t ahead, struct err *err)
{
  struct crash *c = (struct crash *) d;
  struct change ch = { .kind = CHANGE_RESIZE, .off = size };
  uint64_t id;
  int r = change_begin (c, ch, NULL, &id, err);

  if (r < 0)
    return r;
  r = change_end (c, id, bdev_grow (under_of (d), size, ahead, err), false);
  if (r == 0) {
    atomic_store (&d->size, size);
    atomic_store (&c->ahead, ahead);
  }
  return r;
}

/* What had completed by then goes into the base, in order. */
static int
make_durable_locked (struct crash *c, uint64_t then, struct err *err)
{
  size_t kept = 0;
  int r = 0;

  for (size_t i = 0; i < c->changes.len; ++i) {
    struct change *ch = &c->changes.ptr[i];

    if (r < 0 || ch->done_at == 0 || ch->done_at > then) {
      c->changes.ptr[kept++] = *ch;
      continue;
    }
    r = apply_whole (c->base, ch, err);
    free (ch->data);
  }
  c->changes.len = kept;
  return r;
}

static int
crash_flush (struct bdev *d, struct err *err)
{
  struct crash *c = (struct crash *) d;
  uint64_t began;
  int r;

  pthread_mutex_lock (&c->lock);
  began = ++c->clock;
  pthread_mutex_unlock (&c->lock);
  call_hook (c);
  r = bdev_flush (under_of (d), err);
  if (r < 0)
    return r;
  LOCK_SCOPE (&c->lock);
  return make_durable_locked (c, began, err);
}

static void
crash_close (struct bdev *d)
{
  struct crash *c = (struct crash *) d;

  for (size_t i = 0; i < c->changes.len; ++i)
    free (c->changes.ptr[i].data);
  vec_reset (&c->changes);
  bdev_unref (c->base);
  bdev_unref (under_of (d));
  pthread_mutex_destroy (&c->lock);
  free (c);
}

static const struct bdev_ops crash_ops = {
  .kind = "crash",
  .native_fua = true,
  .pread = pass_pread,
  .read_many = pass_read_many,
  .pwrite = crash_pwrite,
  .zero = crash_zero,
  .trim = crash_trim,
  .flush = crash_flush,
  .resize = crash_resize,
  .extents = pass_extents,
  .cache = pass_cache,
  .close = crash_close,
};

int
crash_new (struct bdev *under, struct bdev **ret, struct err *err)
{
  struct crash *c = calloc (1, sizeof *c);
  int r;

  if (c == NULL)
    return err_set (err, ENOMEM, "out of memory");
  r = mem_copy_of (under, &c->base, err);
  if (r == 0)
    r = pass_init (&c->p.d, &crash_ops, under, err);
  if (r < 0) {
    bdev_unref (c->base);
    free (c);
    return r;
  }
  pthread_mutex_init (&c->lock, NULL);
  *ret = &c->p.d;
  return 0;
}
