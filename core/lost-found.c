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

#include "base/cleanup.h"
#include "heal/orphans.h"
#include "lost-found.h"

bool
lost_found_any (const struct stack *s)
{
  return s->top.before && s->top.before->orphans.clusters + s->top.before->orphans.tables > 0;
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
