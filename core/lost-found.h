/* The export lost+found of a stack and its index: made when first asked for. */
#ifndef QR_LOST_FOUND_H
#define QR_LOST_FOUND_H

#include <stdio.h>

#include "stack.h"

/* Are there any that the check at the start has seen?  (Clusters that have no
 * refcount either are only found when they are looked for.)
 */
bool lost_found_any (const struct stack *s);

/* -EEXIST with a message if the overlay over s->top frees, or has overwritten, what
 * looks like lost data in the source, and that is to be kept.  For an overlay
 * that was made before anybody said so.
 */
int lost_found_kept (struct stack *s, struct progress *progress, struct err *err);

/* The orphans' bytes, read-only.  The caller owns *ret.  Thread-safe; the first call
 * may take a while.
 */
int lost_found_open (struct stack *s, struct bdev **ret, struct err *err);

/* The index, as JSON: whole, or at most max_regions of its regions. */
int lost_found_write_json (struct stack *s, FILE *fp, size_t max_regions, struct err *err);

#endif /* QR_LOST_FOUND_H */
