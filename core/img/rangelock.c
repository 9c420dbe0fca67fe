/* Locks on ranges of guest clusters, for requests that change the mapping:
 * allocation, copy-on-write, zero and trim.  Two of them on one cluster must
 * not both copy it.
 *
 * The ranges held are a short list (one a request), so a list it is.  Nobody
 * holds two.  Writes to clusters that may be written in place take no lock
 * here: the entry of such a cluster names the same host cluster until a trim
 * or zero removes it, and what was removed is not reused before the writer has
 * left its grace section.
 */
#include "img/image-int.h"

static bool
is_free_locked (struct image *img, const struct range_lock *rl)
{
  for (const struct range_lock *held = img->ranges; held; held = held->next)
    if (ranges_overlap (held->off, held->len, rl->off, rl->len))
      return false;
  return true;
}

void
range_lock (struct image *img, struct range_lock *rl, uint64_t guest_off, uint64_t len)
{
  LOCK_SCOPE (&img->range_mutex);

  rl->off = ROUND_DOWN (guest_off, img->g.cluster_size);
  rl->len = ROUND_UP (guest_off + len, img->g.cluster_size) - rl->off;
  while (!is_free_locked (img, rl))
    pthread_cond_wait (&img->range_cond, &img->range_mutex);
  rl->next = img->ranges;
  img->ranges = rl;
}

void
range_unlock (struct image *img, struct range_lock *rl)
{
  struct range_lock **p;
  LOCK_SCOPE (&img->range_mutex);

  for (p = &img->ranges; *p != rl; p = &(*p)->next)
    ;
  *p = rl->next;
  pthread_cond_broadcast (&img->range_cond);
}
