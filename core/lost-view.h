/* What a served disk has lost: lists that healing alone cannot make, and disks that
 * say so.  Used by stack.c; see heal/lost.h for the list.
 */
#ifndef QR_LOST_VIEW_H
#define QR_LOST_VIEW_H

#include "layer.h"

/* Of *view, the disk of snapshot (NULL: the active disk) of the image whose losses
 * are l: put a device on top that fails where something was lost (dev/lossy.h).  Nothing
 * is put there if nothing was.  *view is replaced; the caller's reference goes with it.
 */
int lost_view_guard (struct bdev **view, const struct lost *l, const struct snapshot *snapshot,
                     struct err *err);

/* l's overlay was healed by an earlier start, so that nothing in it tells any more
 * what was lost, or which clusters of the source nothing leads to (l->source_orphans).  Heal the source again, in RAM, for its list alone, and add to
 * l->lost what the healed image still has nothing for.
 */
int lost_view_recall (struct layer *l, struct progress *progress, struct err *err);

/* The file behind l is missing.  Add to l->lost what would come from it, of the
 * active disk and of each snapshot.  data: the external data file, or NULL.
 */
int lost_view_backing (struct layer *l, struct bdev *data, struct err *err);

#endif /* QR_LOST_VIEW_H */
