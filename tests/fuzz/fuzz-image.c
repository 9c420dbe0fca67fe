/* A libFuzzer target: damage a sound image in RAM, and do with it what core/stack does.
 *
 * An input is not an image, since those are large and sparse and a mutation would seldom hit
 * anything: it is two bytes (which base image, how to go about it) and records of 12 bytes,
 * little-endian:
 *
 *     op | region | word (16 bits) | value (64 bits)
 *
 * Most change one 8-byte word of one of the base's structures (see bases.h).  Those with
 * the top bit of op set are requests to the healed disk, in their order.  The mutator keeps records whole.
 *
 * What must hold, whatever the bytes (each is an assert here):
 *   - the damaged device is never written (it is read-only: -EROFS tells);
 *   - no request ends with anything but success, or EIO for what cannot be read;
 *   - after healing at a level, nothing is left that this level mends, and healing once more changes nothing;
 *   - what was read at first is what is there later, but for what was written;
 *   - the image is as sound after the writes as before them.
 */
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/endian.h"
#include "base/num.h"
#include "bases.h"
#include "check/report.h"
#include "dev/mem.h"
#include "fuzz-image.h"
#include "img/image.h"
#include "layer.h"

#define RECORD 12
#define SHADOW (UINT64_C (128) << 10)   /* bytes of the disk that are compared */

enum {                          /* the second byte */
  HOW_DEEP = 1,
  HOW_KEEP_ORPHANS = 2,         /* as for a repair in place */
  HOW_REFCOUNTS = 4,            /* repair=refcounts, else all */
  HOW_OVERLAY_STAYS = 8,        /* as with overlay=FILE */
  HOW_FIXED_SIZE = 16,
  HOW_SIZE = 32,                /* times 0 to 7: how long the device is */
};

struct record {
  unsigned op, region, word;
  uint64_t value;
};

static struct record
record_at (const uint8_t *data, size_t i)
{
  const uint8_t *p = data + 2 + i * RECORD;
  struct record r = { .op = p[0], .region = p[1], .word = p[2] | p[3] << 8 };

  for (unsigned b = 0; b < 8; ++b)
    r.value |= (uint64_t) p[4 + b] << 8 * b;
  return r;
}

static size_t
nr_records (size_t size)
{
  return size < 2 ? 0 : (size - 2) / RECORD;
}

/* A sentence, then what abort does: libFuzzer keeps the input. */
static void __attribute__ ((noreturn))
wrong (const char *what, const char *why)
{
  fprintf (stderr, "BROKEN PROMISE: %s: %s\n", what, why);
  abort ();
}

static void
ok (int r, const char *what, const struct err *err)
{
  if (r < 0)
    wrong (what, err->msg);
}

/* --- damage */

static uint64_t
load (struct bdev *d, uint64_t off)
{
  uint8_t b[8];
  struct err err = { 0 };

  ok (bdev_pread_padded (d, b, 8, off, &err), "reading a word", &err);
  return load_be64 (b);
}

static void
store (struct bdev *d, uint64_t off, uint64_t value)
{
  uint8_t b[8];
  struct err err = { 0 };

  store_be64 (b, value);
  if (range_fits (off, 8, bdev_size (d)))
    ok (bdev_pwrite (d, b, 8, off, 0, &err), "writing a word", &err);
}

static void
damage (struct bdev *d, const struct base *b, struct record r)
{
  const struct base_region *at = &b->regions[r.region % b->nr_regions];
  const struct base_region *to = &b->regions[r.value % 256 % b->nr_regions];
  uint64_t off = at->off + r.word * 8 % at->len, old = load (d, off);
  uint64_t cs = b->cluster_size, flags = r.value & UINT64_C (0xff00000000000000);

  switch (r.op & 7) {
  case 0: store (d, off, r.value); break;
  case 1: store (d, off, (old & 0xffffffff) | r.value << 32); break;
  case 2: store (d, off, (old & ~UINT64_C (0xffffffff)) | (r.value & 0xffffffff)); break;
  case 3: store (d, off, old ^ UINT64_C (1) << r.value % 64); break;
  case 4: store (d, off, old + (int8_t) r.value * ((r.value & 256) ? cs : 1)); break;
  case 5: store (d, off, flags | to->off); break;
  case 6:                       /* the rest of the structure */
    for (; off + 8 <= at->off + at->len; off += 8)
      store (d, off, r.value);
    break;
  case 7: store (d, r.value / 8 * 8 % bdev_size (d), r.word * UINT64_C (0x0001000100010001)); break;
  }
}

struct bdev *
fuzz_damaged (const uint8_t *data, size_t size)
{
  const struct base *b = base_get (data[0] % nr_bases);
  uint64_t sizes[] = { b->len, b->len, b->len, b->len - b->cluster_size + 8, b->len / 2 + 100,
                       b->len + (1 << 20), b->len + (UINT64_C (1) << 40), b->len };
  struct err err = { 0 };
  struct bdev *d;

  ok (mem_new ("damaged", b->len, !(data[1] & HOW_FIXED_SIZE), &d, &err), "mem_new", &err);
  ok (bdev_pwrite (d, b->bytes, b->len, 0, 0, &err), "the base", &err);
  for (size_t i = 0; i < nr_records (size); ++i)
    if (!(record_at (data, i).op & 0x80))
      damage (d, b, record_at (data, i));
  d->ops->resize (d, sizes[data[1] / HOW_SIZE], 0, &err);
  d->writable = false;          /* I1 */
  return d;
}

/* --- healing */

/* A cluster that two entries shared, and that lost one to a write: the other does not know that it is
 * alone now.  That costs a copy.
 */
static bool
missing_flags_only (const struct findings *fs, enum finding_id id)
{
  if (id != FINDING_L2_COPIED_WRONG)
    return false;
  for (size_t i = 0; i < fs->runs.len; ++i)
    if (fs->runs.ptr[i].id == id && !fs->runs.ptr[i].expected)
      return false;
  return true;
}

static bool
findings_above (const struct check *c, enum repair_level level)
{
  for (int id = 0; id < NR_FINDINGS; ++id)
    if (c->findings.totals[id] && finding_kinds[id].severity == SEV_CORRUPT
        && finding_kinds[id].level > level)
      return true;
  return false;
}

/* Nothing may remain that the level mends, and nothing at all once there were writes.  What else is
 * wrong can stand in the way of mending refcounts; and a device that cannot grow cuts off what it cuts off.
 */
static void
nothing_remains (const struct layer *l, const struct check *c, enum repair_level level,
                 const char *when)
{
  bool remains = false;

  for (int id = 0; id < NR_FINDINGS; ++id)
    if (c->findings.totals[id] && finding_kinds[id].severity == SEV_CORRUPT
        && !(id == FINDING_L2_TABLE_CUT && !l->source->can_grow)
        && !(level == REPAIR_NEVER && missing_flags_only (&c->findings, id))
        && finding_kinds[id].code[0] != 'O' && finding_kinds[id].level <= level)
      remains = true;
  if (!remains || (level == REPAIR_REFCOUNTS && findings_above (c, level)))
    return;
  report_text (stderr, c, 20);
  wrong (when, "damage remains");
}

/* Those that core/stack.c refuses, since no disk can come of them at that level. */
static bool
refused (const struct check *c, enum repair_level level)
{
  const struct header *h = &c->header;

  if (c->findings.per_severity[SEV_FATAL] || c->l1_entries_right < geom_l1_entries (&c->geom, h->size))
    return true;
  return level < REPAIR_ALL
         && (findings_has (&c->findings, FINDING_L1_TOO_SMALL) || findings_has (&c->findings, FINDING_L1_CUT)
             || findings_has (&c->findings, FINDING_L1_TOO_LARGE));
}

/* As core/stack.c; false: it cannot be served, and says why. */
static bool
heal (struct layer *l, unsigned how, enum repair_level level)
{
  struct err err = { 0 };

  if (layer_check (l, how & HOW_DEEP, NULL, &err) < 0)
    return false;
  if (refused (l->before, level))
    return false;
  if (!check_sound (l->before) || (how & HOW_OVERLAY_STAYS)) {
    ok (layer_lay_memory (l, &err), "laying an overlay", &err);
    if (how & HOW_OVERLAY_STAYS)
      l->overlay = bdev_ref (l->healed);        /* what stays only needs to be there */
  }
  if (l->healed == l->source || !heal_needed (l->before, level))
    return true;
  if (layer_heal (l, level, NULL, &err) < 0) {
    /* A device that cannot grow may be full, and so may the largest refcount table. */
    if (err.code == ENOSPC || err.code == ENOMEM || err.code == EFBIG)
      return false;
    wrong ("healing", err.msg);
  }
  nothing_remains (l, l->after, level, "healing");
  return true;
}

/* --- the disk */

struct disk {
  struct bdev *view;
  uint8_t *shadow, *buf;        /* SHADOW bytes each */
  uint64_t len;                 /* bytes of the disk in shadow */
  bool unreadable;              /* some of it: then it is not compared */
};

static int
extent (void *opaque, uint64_t off, uint64_t len, unsigned kind)
{
  uint64_t *next = opaque;

  if (off != *next || len == 0)
    wrong ("extents", "they do not follow each other");
  *next = off + len;
  return 0;
}

static void
only_eio (int r, const char *what, const struct err *err)
{
  if (r < 0 && r != -EIO)
    wrong (what, err->msg);
}

static void
request (struct disk *k, struct record rec)
{
  uint64_t size = bdev_size (k->view), off, len, end;
  struct err err = { 0 };
  int r;

  if (size == 0)
    return;
  /* At the begin, at the end, or anywhere. */
  off = rec.op & 8 ? rec.value % size : rec.op & 16 ? size - MIN (size, 1 + rec.word)
                   : rec.value % MIN (size, SHADOW);
  len = MIN (size - off, 1 + (rec.op & 32 ? rec.word : rec.region));
  end = off;
  memset (k->buf, rec.value >> 8, len);
  switch (rec.op & 7) {
  case 0:
  case 1: r = bdev_pwrite (k->view, k->buf, len, off, rec.op & 1 ? BDEV_FUA : 0, &err); break;
  case 2:
  case 3: r = bdev_zero (k->view, off, len, rec.op & 1 ? BDEV_MAY_TRIM : 0, &err); break;
  case 4: r = bdev_trim (k->view, off, len, 0, &err); break;
  case 5: r = bdev_flush (k->view, &err); break;
  case 6: r = bdev_extents (k->view, off, len, extent, &end, &err); break;
  default: r = bdev_pread (k->view, k->buf, len, off, &err); break;
  }
  if (r < 0 && r != -EIO && r != -ENOSPC && r != -EROFS)
    wrong ("a request", err.msg);
  if (r < 0) {
    k->unreadable = true;       /* what is there now is unknown */
    return;
  }
  if (off >= k->len || (rec.op & 7) > 4)
    return;
  len = MIN (len, k->len - off);
  if ((rec.op & 7) <= 1)
    memcpy (k->shadow + off, k->buf, len);
  else if ((rec.op & 7) <= 3)
    memset (k->shadow + off, 0, len);
  else if (bdev_pread (k->view, k->shadow + off, len, off, &err) < 0)
    k->unreadable = true;       /* trimmed: anything */
}

static void
compare (struct disk *k, const char *when)
{
  struct err err = { 0 };
  int r = bdev_pread (k->view, k->buf, k->len, 0, &err);

  only_eio (r, when, &err);
  if (k->unreadable)
    return;
  ok (r, when, &err);
  if (memcmp (k->buf, k->shadow, k->len) != 0)
    wrong (when, "the disk reads otherwise than before");
}

/* Let the requests come, with the healed image below; written: they may write. */
static void
use (struct layer *l, const uint8_t *data, size_t size, bool written)
{
  static uint8_t shadow[SHADOW], buf[SHADOW];
  struct disk k = { .shadow = shadow, .buf = buf };
  struct image_options iopts = { .careful = true, .read_only = !written, .cache_size = 1 << 16 };
  bool deep = (data[1] & HOW_DEEP) && layer_now (l)->findings.totals[FINDING_STREAM_BROKEN] == 0;
  struct bdev *file = NULL;
  struct err err = { 0 };
  int r;

  if (layer_now (l)->geom.data_file) {
    ok (mem_new ("data", UINT64_C (16) << 20, true, &file, &err), "mem_new", &err);
    iopts.data_file = file;
  }
  r = image_open (l->healed, &iopts, &k.view, &err);
  if (r == -ENOTSUP || r == -ENOMEM)
    goto out;
  ok (r, "opening the disk", &err);
  k.len = MIN (bdev_size (k.view), SHADOW);
  r = bdev_pread (k.view, shadow, k.len, 0, &err);
  only_eio (r, "reading the disk", &err);
  if (r < 0 && deep && !(data[1] & HOW_REFCOUNTS) && check_sound (layer_now (l)))
    wrong ("reading a disk that was checked deeply", err.msg);
  k.unreadable = r < 0;
  for (size_t i = 0; i < nr_records (size); ++i)
    if (record_at (data, i).op & 0x80)
      if (written || (record_at (data, i).op & 7) > 4)
        request (&k, record_at (data, i));
  compare (&k, "reading it again");
  bdev_unref (k.view);
  ok (image_open (l->healed, &iopts, &k.view, &err), "opening the disk again", &err);
  compare (&k, "reading it once it was closed");
 out:
  bdev_unref (k.view);
  bdev_unref (file);
}

/* --- one input */

static void
look_again (struct layer *l, enum repair_level level, bool written)
{
  struct check_options copts = layer_check_options (l, NULL);
  struct err err = { 0 };
  struct check *c;

  ok (check_run (l->healed, &copts, &c, &err), "the check after it all", &err);
  nothing_remains (l, c, written ? REPAIR_NEVER : level, "the check after it all");
  check_free (c);
}

void
fuzz_image (const uint8_t *data, size_t size, void (*judge) (struct bdev *healed))
{
  unsigned how = data[1];
  enum repair_level level = how & HOW_REFCOUNTS ? REPAIR_REFCOUNTS : REPAIR_ALL;
  struct layer l = { .path = strdup ("damaged"), .source = fuzz_damaged (data, size),
                     .keep_orphans = how & HOW_KEEP_ORPHANS };

  l.healed = bdev_ref (l.source);
  if (heal (&l, how, level) && layer_now (&l)->header.crypt_method == CRYPT_NONE) {
    /* As stack.c decides: only a sound image is written to. */
    bool written = check_sound (layer_now (&l)) && l.healed != l.source;

    use (&l, data, size, written);
    look_again (&l, level, written);
    if (judge && check_sound (layer_now (&l)))
      judge (l.healed);
  }
  layer_reset (&l);
}

int LLVMFuzzerTestOneInput (const uint8_t *data, size_t size);

int
LLVMFuzzerTestOneInput (const uint8_t *data, size_t size)
{
  if (size >= 2)
    fuzz_image (data, size, NULL);
  return 0;
}

/* --- the mutator */

size_t LLVMFuzzerMutate (uint8_t *data, size_t size, size_t max_size) __attribute__ ((weak));
size_t LLVMFuzzerCustomMutator (uint8_t *data, size_t size, size_t max_size, unsigned seed);

/* Add, take away or change one record, or change the two bytes before them. */
size_t
LLVMFuzzerCustomMutator (uint8_t *data, size_t size, size_t max_size, unsigned seed)
{
  size_t n = nr_records (size), i = n ? (seed >> 8) % n : 0;
  uint8_t *at = data + 2 + i * RECORD;

  if (size < 2)
    memset (data, seed, 2);
  size = 2 + n * RECORD;
  switch (seed % 8) {
  case 0:
    data[seed >> 8 & 1] = seed >> 16;
    return size;
  case 1:
    if (n > 0) {
      memmove (at, at + RECORD, (n - i - 1) * RECORD);
      return size - RECORD;
    }
    /* fall through */
  case 2:
  case 3:
    if (size + RECORD <= max_size) {
      at = data + size;
      for (i = 0; i < RECORD; ++i)
        at[i] = (seed = seed * 1103515245 + 12345) >> 16;
      /* Small numbers and single high bits are more telling than noise. */
      for (i = 5; i < RECORD - 1 && (seed & 256); ++i)
        at[i] = 0;
      return size + RECORD;
    }
    /* fall through */
  default:
    if (n > 0)
      LLVMFuzzerMutate (at, RECORD, RECORD);
    return size;
  }
}
