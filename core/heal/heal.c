/* Healing, stage by stage.  Each stage ends with a flush, and whatever prefix of
 * them reaches the disk leaves the image no worse than it was:
 *
 *   0. unknown autoclear bits are cleared, as the specification demands before
 *      anybody writes, and one that speaks of a data file where there is none
 *   1. refcounts up: a rebuilt structure, or blocks replaced alone, or values
 *      raised in place - whichever is the smallest that is right (I2, I5)
 *   2. COPIED flags, which speak about refcounts that are right now
 *   3. refcounts down: leaks (I3: nothing refers to these clusters)
 *   4. heal_finish, after another check: dirty and corrupt bits
 *
 * Stopped anywhere, the next start checks again and finishes (I6).
 *
 * What this does not do: move, drop or invent guest data.  Where the check could
 * not follow everything, or orphans are to be kept (c->kept), no refcount is lowered,
 * since what looks like a leak may be all that is left of a lost table.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/endian.h"
#include "base/num.h"
#include "heal/heal-int.h"

static bool
any_at_level (const struct check *c, enum repair_level level, enum severity at_least)
{
  for (int id = 0; id < NR_FINDINGS; ++id)
    if (c->findings.totals[id] && finding_kinds[id].level <= level
        && finding_kinds[id].severity >= at_least)
      return true;
  return false;
}

bool
heal_needed (const struct check *c, enum repair_level level)
{
  return (level > REPAIR_OFF && any_at_level (c, level, SEV_LEAK))
         || (level >= REPAIR_ALL
             && (heal_all_needed (c) || findings_has (&c->findings, FINDING_CLUSTER_SHARED)));
}

static int
clear_autoclear (struct heal *h, struct err *err)
{
  bool no_data_file = findings_has (&h->c->findings, FINDING_RAW_WITHOUT_DATA_FILE);
  uint64_t bits = h->c->header.autoclear, keep = bits & AUTOCLEAR_KNOWN;
  uint8_t field[8];

  if (no_data_file)
    keep &= ~AUTOCLEAR_DATA_FILE_RAW;
  if (h->c->header.version < 3 || keep == bits)
    return 0;
  h->res->structures += no_data_file;
  store_be64 (field, keep);
  return bdev_pwrite (h->d, field, sizeof field, HEADER_OFF_AUTOCLEAR, BDEV_FUA, err);
}

static bool
any_block_lost (const struct check *c)
{
  for (uint64_t i = 0; i < c->rt.nr_entries; ++i)
    if (c->rt.states[i] == RB_LOST)
      return true;
  return false;
}

/* The smallest refcount width that holds every count.  Version 2 has no choice.  Refcounts that were
 * lost were compared with nothing, so that nobody has found yet that they do not fit.
 */
static void
choose_refcount_width (struct heal *h)
{
  uint64_t end = ownermap_end (h->c->owners), max = 0;

  if (h->g.version < 3 || (!findings_has (&h->c->findings, FINDING_REFCOUNT_OVERFLOW)
                           && h->c->rt.usable && !any_block_lost (h->c)))
    return;
  for (uint64_t ci = 0; (ci = ownermap_find (h->c->owners, ci, end, true)) < end; ++ci)
    max = MAX (max, ownermap_get (h->c->owners, ci));
  if (max <= h->g.refcount_max)
    return;
  while (h->g.refcount_max < max) {
    struct header wider = h->c->header;

    wider.refcount_order = h->g.refcount_order + 1;
    geom_init (&h->g, &wider);
  }
  h->res->refcount_bits = h->g.refcount_bits;
}

static bool
structure_unusable (const struct heal *h)
{
  return !h->c->rt.usable || h->g.refcount_order != h->c->geom.refcount_order;
}

/* Stage 1.  *sound_blocks tells whether old blocks stay in use, so that their
 * values matter.
 */
static int
raise_refcounts (struct heal *h, bool *blocks_stay, struct err *err)
{
  bool fits = true;
  int r = 0;

  choose_refcount_width (h);
  *blocks_stay = true;
  if (!structure_unusable (h)) {
    if (!any_block_lost (h->c))
      return heal_values (h, HEAL_RAISE, err);
    r = heal_replace_blocks (h, &fits, err);
    if (r < 0 || fits)
      return r;
  }
  *blocks_stay = false;
  return heal_rebuild (h, err);
}

static int
run_stages (struct heal *h, struct err *err)
{
  bool blocks_stay;
  int r = clear_autoclear (h, err);

  if (r == 0)
    r = raise_refcounts (h, &blocks_stay, err);
  if (r == 0)
    r = bdev_flush (h->d, err);                 /* I2 */
  if (r == 0)
    r = heal_copied_flags (h, err);
  if (r == 0)
    r = bdev_flush (h->d, err);
  if (r == 0 && blocks_stay)
    r = heal_values (h, HEAL_LOWER, err);       /* I3 */
  if (r == 0)
    r = bdev_flush (h->d, err);
  return r;
}

void
heal_init (struct heal *h, struct bdev *d, struct check *c, struct progress *progress,
           struct heal_result *res, uint8_t *buf)
{
  *h = (struct heal) {
    .d = d, .c = c, .g = c->geom, .progress = progress, .res = res, .buf = buf,
    /* A growable file's last cluster may be cut short; it is a whole one once written. */
    .held_clusters = DIV_ROUND_UP (bdev_size (d), c->geom.cluster_size),
    .file_clusters = d->can_grow ? DIV_ROUND_UP (bdev_size (d), c->geom.cluster_size)
                                 : bdev_size (d) / c->geom.cluster_size,
  };
}

int
heal_run (struct bdev *d, struct check *c, enum repair_level level,
          struct progress *progress, struct heal_result *res, struct err *err)
{
  CLEANUP_FREE uint8_t *buf = malloc (c->geom.cluster_size);
  struct heal h;

  if (level < REPAIR_REFCOUNTS || !heal_needed (c, level))
    return 0;
  if (!buf)
    return err_set (err, ENOMEM, "out of memory");
  heal_init (&h, d, c, progress, res, buf);
  return run_stages (&h, err);
}

static bool
refcounts_right (const struct check *after)
{
  for (int id = 0; id < NR_FINDINGS; ++id)
    if (finding_kinds[id].code[0] == 'R' && finding_kinds[id].severity >= SEV_CORRUPT
        && after->findings.totals[id])
      return false;
  return true;
}

/* Anything corrupt but the two bits themselves? */
static bool
otherwise_sane (const struct check *after)
{
  for (int id = 0; id < NR_FINDINGS; ++id)
    if (id != FINDING_DIRTY && id != FINDING_CORRUPT_BIT
        && !(after->keep_orphans && finding_kinds[id].code[0] == 'O')
        && finding_kinds[id].severity >= SEV_CORRUPT && after->findings.totals[id])
      return false;
  return true;
}

/* What the findings of a kind say is no longer so. */
static void
forget (struct findings *fs, enum finding_id id)
{
  size_t kept = 0;

  for (size_t i = 0; i < fs->runs.len; ++i)
    if (fs->runs.ptr[i].id != id)
      fs->runs.ptr[kept++] = fs->runs.ptr[i];
  fs->runs.len = kept;
  fs->per_severity[finding_kinds[id].severity] -= fs->totals[id];
  fs->totals[id] = 0;
  fs->nr_runs[id] = 0;
}

static int
write_incompatible (struct bdev *d, uint64_t bits, struct err *err)
{
  uint8_t field[8];
  int r = bdev_flush (d, err);  /* what the bits speak of comes first */

  store_be64 (field, bits);
  if (r == 0)
    r = bdev_pwrite (d, field, sizeof field, HEADER_OFF_INCOMPATIBLE, BDEV_FUA, err);
  return r;
}

int
heal_finish (struct bdev *d, struct check *after, struct heal_result *res,
             struct err *err)
{
  uint64_t bits = after->header.incompatible, cleared = 0;
  int r;

  if (after->header.version < 3)
    return 0;
  if (refcounts_right (after))
    cleared |= bits & INCOMPAT_DIRTY;
  if (otherwise_sane (after))
    cleared |= bits & INCOMPAT_CORRUPT;
  if (!cleared)
    return 0;
  r = write_incompatible (d, bits & ~cleared, err);
  if (r < 0)
    return r;
  after->header.incompatible = bits & ~cleared;
  res->dirty_cleared = !!(cleared & INCOMPAT_DIRTY);
  res->corrupt_cleared = !!(cleared & INCOMPAT_CORRUPT);
  if (res->dirty_cleared)
    forget (&after->findings, FINDING_DIRTY);
  if (res->corrupt_cleared)
    forget (&after->findings, FINDING_CORRUPT_BIT);
  return 0;
}
