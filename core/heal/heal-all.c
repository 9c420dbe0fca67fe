/* Level all: mend, check again, and go on until nothing is left.
 *
 * One round cannot do it.  What a wrong entry names is unknown until the entry is
 * right; a snapshot table that has been mended names tables that nobody has looked
 * at; a table that turned out to be nonsense had claimed clusters at random.  So
 * each round mends what the check is sure of and the next check sees further.  It
 * ends since each round takes wrong entries away and adds none; MAX_ROUNDS is for
 * what nobody thought of.
 *
 * The refcounts come after (heal.c): a mapping that is right is all they need.
 */
#include <errno.h>
#include <stdlib.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "heal/heal-int.h"

#define MAX_ROUNDS 8

static bool
any_entry (const struct check *c)
{
  for (size_t i = 0; i < c->bad.len; ++i)
    if (c->bad.ptr[i].fix != BAD_UNREADABLE && c->bad.ptr[i].fix != BAD_CUT)
      return true;
  return false;
}

bool
heal_all_needed (const struct check *c)
{
  for (int id = 0; id < NR_FINDINGS; ++id)
    if (finding_kinds[id].level == REPAIR_ALL && id != FINDING_CLUSTER_SHARED
        && c->findings.totals[id])
      return true;
  return any_entry (c);
}

static uint64_t
work_done (const struct heal_result *res)
{
  return res->structures + res->entries_cleared + res->entries_corrected;
}

static int
mend (struct heal *h, struct lost *lost, struct err *err)
{
  int r = lost_collect (lost, h->d, h->c, err);

  if (r == 0)
    r = heal_header (h, lost, err);
  if (r == 0)
    r = heal_snapshots (h, lost, err);
  if (r == 0)
    r = heal_bitmaps (h, err);
  if (r == 0)
    r = heal_entries (h, err);
  return r < 0 ? r : bdev_flush (h->d, err);
}

int
heal_all (struct bdev *d, struct check **c, const struct check_options *copts,
          struct heal_result *res, struct lost *lost, struct err *err)
{
  const struct check *first = *c;
  uint64_t before;
  int r = 0;

  for (unsigned round = 0; r == 0 && round < MAX_ROUNDS && heal_all_needed (*c); ++round) {
    CLEANUP_FREE uint8_t *buf = malloc ((*c)->geom.cluster_size);
    struct heal h;
    struct check *next = NULL;

    if (!buf)
      return err_set (err, ENOMEM, "out of memory");
    heal_init (&h, d, *c, copts ? copts->progress : NULL, res, buf);
    before = work_done (res);
    r = mend (&h, lost, err);
    if (r == 0)
      r = check_run (d, copts, &next, err);
    if (r < 0)
      break;
    if (*c != first)
      check_free (*c);
    *c = next;
    res->rounds_all++;
    if (work_done (res) == before)
      break;                    /* what is left cannot be mended */
  }
  lost_finish (lost);
  return r;
}
