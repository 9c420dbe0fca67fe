/* Where new structures go: tables that had to be moved, and L2 tables and clusters of
 * zeros that keep a backing file from shining through what was lost.
 *
 * What is given out is claimed in the reference map, so that the refcounts that
 * are healed afterwards count it.  Free is what nothing refers to; but where the
 * check could not follow everything, what has a refcount for no known reason may
 * belong to what could not be followed, and where the refcounts themselves are
 * lost, nothing is known to be free: then only the end of the file is used.
 *
 * Deliberately not here: refcount structures, whose places depend on each other
 * (rebuild.c).
 */
#include <errno.h>

#include "base/num.h"
#include "heal/heal-int.h"

/* May cluster ci, which nothing refers to, hold something all the same? */
static bool
is_doubtful (const struct heal *h, uint64_t ci)
{
  const struct check *c = h->c;

  if (c->kept == NULL)
    return false;
  if (!c->rt.usable || ci >> c->geom.rb_bits >= c->rt.nr_entries)
    return true;
  return c->rt.states[ci >> c->geom.rb_bits] == RB_LOST || ownermap_get (c->kept, ci) > 0;
}

/* The first n free clusters in a row inside the file; UINT64_MAX if there are none. */
static uint64_t
find_hole (const struct heal *h, uint64_t n)
{
  uint64_t end = h->file_clusters, ci = n == 1 ? h->place_from : 0, run = 0;

  if (h->c->kept && !h->c->rt.usable)
    return UINT64_MAX;
  while (ci < end) {
    if (run == 0)
      ci = ownermap_find (h->c->owners, ci, end, false);
    if (ci >= end)
      break;
    run = ownermap_get (h->c->owners, ci) > 0 || is_doubtful (h, ci) ? 0 : run + 1;
    ++ci;
    if (run == n)
      return ci - n;
  }
  return UINT64_MAX;
}

int
heal_place (struct heal *h, uint64_t n, uint64_t *host_off, struct err *err)
{
  uint64_t ci = find_hole (h, n);
  int r;

  if (ci == UINT64_MAX && h->d->can_grow)
    ci = MAX (h->file_clusters, ownermap_end (h->c->owners));
  if (ci == UINT64_MAX)
    return err_set (err, ENOSPC, "%s: no room for %llu cluster%s in a row that the repair needs, "
                    "and the device cannot grow", h->d->name, (unsigned long long) n,
                    n == 1 ? "" : "s");
  if (ci >= MAX_HOST_OFF >> h->g.cluster_bits)
    return err_set (err, EFBIG, "%s: the image would become too large", h->d->name);
  r = ownermap_claim (h->c->owners, ci, n, 1, NULL, err);
  if (r < 0)
    return r;
  if (n == 1)
    h->place_from = ci + 1;
  *host_off = ci << h->g.cluster_bits;
  return 0;
}

int
heal_write (struct heal *h, const void *buf, uint64_t len, uint64_t host_off, struct err *err)
{
  int r = 0;

  if (host_off + len > bdev_size (h->d))
    r = h->d->can_grow
        ? bdev_resize (h->d, ROUND_UP (host_off + len, h->g.cluster_size), err)
        : err_set (err, ENOSPC, "%s: the device ends inside a structure that is to be mended, at host "
                   "offset 0x%llx, and it cannot grow", h->d->name,
                   (unsigned long long) bdev_size (h->d));
  return r < 0 ? r : bdev_pwrite (h->d, buf, len, host_off, 0, err);
}
