/* See lost-found.h.
 *
 * Orphans are those of the source, checked anew by itself: an overlay may have
 * freed them, and new writes may lie there, but the source keeps what they were.
 * Healing uses up the check it is made from, another reason to make one.
 *
 * If the guest writes to the source, no such check can be made beside it.  Then the
 * orphans are those that the last check at the start saw with a refcount: the server
 * neither frees nor writes them.  Clusters without one are in the guest's hands.
 *
 * Deliberately not here: what is an orphan (core/check/check-orphans.c), and their
 * order (core/heal/orphans.c).
 */
#include <errno.h>
#include <inttypes.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "heal/orphans.h"
#include "lost-found.h"

bool
lost_found_any (const struct stack *s)
{
  const struct orphan_stats *o = s->top.before ? layer_orphans (&s->top) : NULL;

  return o && o->clusters + o->tables > 0;
}

/* Orphans of source that healed has no more. */
static uint64_t
count_freed (const struct check *source, const struct check *healed)
{
  uint64_t end = DIV_ROUND_UP (source->file_size, source->geom.cluster_size);
  uint64_t stop = 0, ci, freed = 0;

  while ((ci = orphan_next (source, stop, end, &stop)) < end)
    for (; ci < stop; ++ci)
      freed += ownermap_get (healed->excess, ci) == 0;
  return freed;
}

int
lost_found_kept (struct stack *s, struct progress *progress, struct err *err)
{
  struct check_options copts = { .progress = progress };
  struct check *c;
  uint64_t freed = 0;
  int r;

  if (!s->top.keep_orphans)
    return 0;
  r = check_run (s->top.source, &copts, &c, err);
  if (r < 0)
    return r;
  if (orphan_findings (c) > 0)
    freed = count_freed (c, s->top.before);
  check_free (c);
  return freed == 0 ? 0
    : err_set (err, EEXIST, "%s: the overlay %s frees %" PRIu64 " clusters that look like lost data "
               "(the findings O01 and O02 of the image without it), and writing it into the image "
               "would make that final.  Fetch the export lost+found first, then add "
               "discard-orphans=true.  Nothing was changed", s->top.path, s->overlay, freed);
}

static bool
written_in_place (const struct stack *s)
{
  return s->writable && s->top.healed == s->top.source;
}

static int
find (struct stack *s, struct err *err)
{
  struct check *c = NULL;
  int r;

  if (s->top.before == NULL)
    return err_set (err, ENOTSUP, "check=false: nothing was looked for");
  if (written_in_place (s))
    return orphans_find (layer_now (&s->top), s->top.source, false, NULL, &s->orphans, err);
  r = check_run (s->top.source, NULL, &c, err);
  if (r == 0)
    r = orphans_find (c, s->top.source, true, NULL, &s->orphans, err);
  check_free (c);
  return r;
}

/* From then on they are constant. */
static int
find_once (struct stack *s, struct err *err)
{
  int r = 0;
  LOCK_SCOPE (&s->orphans_lock);

  if (s->orphans == NULL)
    r = find (s, err);
  if (r < 0)
    err_prefix (err, "%s: cannot look for orphans", s->top.path);
  return r;
}

int
lost_found_open (struct stack *s, struct bdev **ret, struct err *err)
{
  int r = find_once (s, err);

  return r < 0 ? r : orphans_device (s->orphans, s->top.source, ret, err);
}

int
lost_found_write_json (struct stack *s, FILE *fp, size_t max_regions, struct err *err)
{
  int r = find_once (s, err);

  if (r < 0)
    return r;
  orphans_write_json (fp, s->orphans, max_regions, "");
  fputc ('\n', fp);
  return 0;
}
