/* L1 and L2 entries that cannot be right: the check has decided about each
 * (check/bad.h), here it is carried out.
 *
 * What is lost reads as zeros from now on.  In an image without a backing file an
 * entry of 0 does that; with one, the base would shine through, older data in the
 * place of lost data.  So there an L2 entry becomes a zero cluster, and an L1 entry
 * gets a new L2 table of such.  Version 2 has no zero clusters: each gets a real one.
 *
 * Tables are rewritten in slices, so that one wrong entry in a 2 MiB table does not
 * pull 2 MiB into the overlay.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/endian.h"
#include "base/num.h"
#include "fmt/entry.h"
#include "heal/heal-int.h"

#define SLICE 4096

struct fix {
  struct heal *h;
  const struct bad_run *run;
  uint64_t guest_off;           /* BAD_PLACE: of the table's first entry */
};

static bool
has_backing (const struct heal *h)
{
  return h->c->header.backing_off != 0;
}

/* --- what reads as zeros */

/* A cluster of zeros of its own: *raw is an L2 entry that names it. */
static int
place_zeros (struct heal *h, uint64_t *raw, struct err *err)
{
  uint64_t host_off;
  int r = heal_place (h, 1, &host_off, err);

  if (r == 0 && host_off + h->g.cluster_size > bdev_size (h->d) && h->d->can_grow)
    r = bdev_resize (h->d, host_off + h->g.cluster_size, err);
  if (r == 0)
    r = bdev_zero (h->d, host_off, h->g.cluster_size, BDEV_MAY_TRIM, err);
  *raw = host_off | ENTRY_COPIED;
  return r;
}

static int
zero_entry (struct heal *h, uint64_t *raw, uint64_t *bitmap, struct err *err)
{
  *raw = *bitmap = 0;
  if (h->g.version < 3)
    return has_backing (h) ? place_zeros (h, raw, err) : 0;
  if (h->g.extended_l2)
    *bitmap = BITMAP_ALL_ZERO;
  else
    *raw = L2E_ZERO;
  return 0;
}

/* Guest clusters that entry l1_index of a table can map: a snapshot's disk may have
 * been larger than the active one is now.
 */
static uint64_t
entries_in_use (const struct heal *h, int32_t snapshot_index, uint64_t l1_index)
{
  uint64_t size = h->c->header.size, from = l1_index * h->g.l2_coverage;

  if (snapshot_index != FINDING_ACTIVE && h->c->snapshots.ptr[snapshot_index].size)
    size = h->c->snapshots.ptr[snapshot_index].size;
  return size > from ? MIN (DIV_ROUND_UP (size - from, h->g.cluster_size), h->g.l2_entries)
                     : 0;
}

/* A new L2 table of which n entries read as zeros: *raw is an L1 entry that names it. */
static int
place_zero_table (struct heal *h, uint64_t n, uint64_t *raw, struct err *err)
{
  CLEANUP_FREE uint8_t *table = calloc (1, h->g.cluster_size);
  uint64_t host_off;
  int r;

  if (!table)
    return err_set (err, ENOMEM, "out of memory");
  r = heal_place (h, 1, &host_off, err);
  for (uint64_t i = 0; r == 0 && i < n; ++i) {
    uint64_t entry, bitmap;

    r = zero_entry (h, &entry, &bitmap, err);
    store_be64 (table + i * h->g.l2e_size, entry);
    if (h->g.extended_l2)
      store_be64 (table + i * h->g.l2e_size + 8, bitmap);
  }
  if (r == 0)
    r = heal_write (h, table, h->g.cluster_size, host_off, err);
  *raw = host_off | ENTRY_COPIED;
  return r;
}

/* --- one entry */

static int
fix_l1_entry (struct fix *f, uint64_t i, uint64_t *raw, struct err *err)
{
  struct heal *h = f->h;
  uint64_t n;

  if (f->run->fix == BAD_RESERVED) {
    *raw &= ~L1E_RESERVED_MASK;
    h->res->entries_corrected++;
    return 0;
  }
  h->res->entries_cleared++;
  *raw = 0;
  n = has_backing (h) ? entries_in_use (h, f->run->snapshot_index, i) : 0;
  return n ? place_zero_table (h, n, raw, err) : 0;
}

static void
believe_the_rest (const struct geom *g, uint64_t *raw, uint64_t *bitmap)
{
  if (*raw & L2E_COMPRESSED) {
    *raw &= ~ENTRY_COPIED;
    *bitmap = 0;
    return;
  }
  *raw &= ~L2E_STD_RESERVED_MASK;
  if (g->extended_l2 || g->version < 3)
    *raw &= ~L2E_ZERO;
}

/* What says both allocated and zero, or is allocated nowhere, is zero. */
static void
resolve_subclusters (const struct geom *g, uint64_t raw, uint64_t *bitmap)
{
  uint64_t allocated = *bitmap & BITMAP_ALL_ALLOC, zero = *bitmap >> 32;

  if (l2_has_host (raw, g))
    allocated &= ~zero;
  else {
    zero |= allocated;
    allocated = 0;
  }
  *bitmap = zero << 32 | allocated;
}

static int
fix_l2_entry (struct fix *f, uint64_t i, uint64_t *raw, uint64_t *bitmap, struct err *err)
{
  struct heal *h = f->h;
  uint64_t zero = *raw & L2E_ZERO;

  if (f->run->fix == BAD_LOST) {
    h->res->entries_cleared++;
    return zero_entry (h, raw, bitmap, err);
  }
  h->res->entries_corrected++;
  if (f->run->fix == BAD_RESERVED)
    believe_the_rest (&h->g, raw, bitmap);
  else if (f->run->fix == BAD_SECTORS)
    *raw = l2_compressed_ending_at (*raw, f->run->end, &h->g);
  else if (f->run->fix == BAD_SUBCLUSTERS)
    resolve_subclusters (&h->g, *raw, bitmap);
  else
    *raw = (f->guest_off + (i << h->g.cluster_bits)) | ENTRY_COPIED
           | (h->g.extended_l2 || h->g.version < 3 ? 0 : zero);
  return 0;
}

/* --- tables */

/* Entries [i, i+n) of the run's table, which are in buf. */
static int
fix_entries (struct fix *f, uint8_t *buf, uint64_t i, uint64_t n, struct err *err)
{
  unsigned step = f->run->in_l1 ? 8 : f->h->g.l2e_size;
  int r = 0;

  for (uint64_t k = 0; r == 0 && k < n; ++k) {
    uint64_t raw = load_be64 (buf + k * step);
    uint64_t bitmap = step == 16 ? load_be64 (buf + k * step + 8) : 0;

    r = f->run->in_l1 ? fix_l1_entry (f, i + k, &raw, err)
                      : fix_l2_entry (f, i + k, &raw, &bitmap, err);
    store_be64 (buf + k * step, raw);
    if (step == 16)
      store_be64 (buf + k * step + 8, bitmap);
  }
  return r;
}

/* Do entries of this run get clusters, whose contents must be there before the entries? */
static bool
places_clusters (const struct fix *f)
{
  return f->run->fix == BAD_LOST && has_backing (f->h)
         && (f->run->in_l1 || f->h->g.version < 3);
}

/* LIMIT: entries of an L2 table that a device which cannot grow cuts off stay cut off; they read as
 * unallocated, the damage remains, and the disk is read-only.
 */
static uint64_t
entries_that_fit (const struct heal *h, uint64_t host_off, uint64_t n, uint64_t step)
{
  uint64_t size = bdev_size (h->d);

  if (h->d->can_grow)
    return n;
  return host_off < size ? MIN (n, (size - host_off) / step) : 0;
}

static int
fix_run (struct fix *f, struct err *err)
{
  const struct bad_run *run = f->run;
  uint64_t step = run->in_l1 ? 8 : f->h->g.l2e_size, n;
  uint8_t buf[SLICE];
  int r = 0;

  for (uint64_t i = 0; r == 0 && i < run->count; i += n) {
    uint64_t host_off = run->table_host_off + (run->index + i) * step;

    n = entries_that_fit (f->h, host_off, MIN (run->count - i, SLICE / step), step);
    if (n == 0)
      break;
    r = bdev_pread_padded (f->h->d, buf, n * step, host_off, err);
    if (r == 0)
      r = fix_entries (f, buf, run->index + i, n, err);
    if (r == 0 && places_clusters (f))
      r = bdev_flush (f->h->d, err);            /* I4 */
    if (r == 0)
      r = heal_write (f->h, buf, n * step, host_off, err);
  }
  return r;
}

/* Data-file images have no snapshots: the guest offset follows from the active L1 table,
 * which is read into *l1 if it is not there.
 */
static int
find_guest_off (struct fix *f, uint8_t **l1_cached, bool *found, struct err *err)
{
  const struct header *header = &f->h->c->header;
  uint64_t nr = f->h->c->l1_entries_followed, bytes = nr * 8;
  uint8_t *l1 = *l1_cached;
  int r = 0;

  *found = false;
  if (!l1) {
    *l1_cached = l1 = malloc (MAX (bytes, 1));
    if (!l1)
      return err_set (err, ENOMEM, "out of memory");
    r = bdev_pread_padded (f->h->d, l1, bytes, header->l1_host_off, err);
  }
  for (uint64_t i = 0; r == 0 && !*found && i < nr; ++i)
    if ((load_be64 (l1 + i * 8) & L1E_OFF_MASK) == f->run->table_host_off) {
      f->guest_off = i * f->h->g.l2_coverage;
      *found = true;
    }
  return r;
}

/* What run i is in, with all that an overlay copies for it. */
static bool
range_around_run (void *opaque, uint64_t i, struct bdev_range *range)
{
  const struct heal *h = opaque;
  const struct bad_run *run = &h->c->bad.ptr[i];
  uint64_t step = run->in_l1 ? 8 : h->g.l2e_size, off = run->table_host_off + run->index * step;

  range->off = ROUND_DOWN (off, COPY_GRAIN);
  range->len = ROUND_UP (off + run->count * step, COPY_GRAIN) - range->off;
  return run->fix != BAD_UNREADABLE && run->fix != BAD_CUT;
}

int
heal_entries (struct heal *h, struct err *err)
{
  const struct bad_run_vec *bad = &h->c->bad;
  CLEANUP_FREE uint8_t *l1 = NULL;
  struct ahead ahead;
  int r = 0;

  ahead_init (&ahead, h->d, bad->len, range_around_run, h);
  for (size_t i = 0; r == 0 && i < bad->len; ++i) {
    struct fix f = { .h = h, .run = &bad->ptr[i] };
    bool wanted = f.run->fix != BAD_UNREADABLE && f.run->fix != BAD_CUT;

    progress_update (h->progress, "mending tables", i, bad->len);
    ahead_at (&ahead, i);
    if (f.run->fix == BAD_PLACE)
      r = find_guest_off (&f, &l1, &wanted, err);
    if (r == 0 && wanted)
      r = fix_run (&f, err);
    if (f.run->in_l1) {         /* it is another now */
      free (l1);
      l1 = NULL;
    }
  }
  return r;
}
