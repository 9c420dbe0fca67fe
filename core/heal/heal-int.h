/* Shared by the files of core/heal; see heal.c for the order of the stages. */
#ifndef QR_HEAL_INT_H
#define QR_HEAL_INT_H

#include "base/num.h"
#include "dev/ahead.h"
#include "heal/heal.h"
#include "heal/lost.h"
#include "heal/rebuild.h"

struct heal {
  struct bdev *d;
  struct check *c;
  struct geom g;                /* the image's; refcount fields as they shall be */
  struct progress *progress;
  struct heal_result *res;
  uint8_t *buf;                 /* one cluster of scratch */
  /* Clusters of d that are whole and inside it. */
  uint64_t file_clusters;
  /* Clusters of which anything is inside it: what they hold is kept, but nothing placed there. */
  uint64_t held_clusters;
  uint64_t place_from;          /* heal_place: no single free cluster lies before it */
};

/* buf: a cluster of scratch; res is added to. */
void heal_init (struct heal *h, struct bdev *d, struct check *c, struct progress *progress,
                struct heal_result *res, uint8_t *buf);

/* heal-refcounts.c */

/* Replace the whole structure: plan, blocks, table, flush, header (I5). */
int heal_rebuild (struct heal *h, struct err *err);

/* Replace lost blocks one by one.  *fits becomes false, with nothing written, if
 * the table has no room that makes this possible: then rebuild.
 */
int heal_replace_blocks (struct heal *h, bool *fits, struct err *err);

enum heal_direction { HEAL_RAISE, HEAL_LOWER };

/* Set the values in sound blocks that are too low, or those that are too high. */
int heal_values (struct heal *h, enum heal_direction direction, struct err *err);

/* heal-copied.c */

/* Make the COPIED flags of the active L1 and L2 tables agree with the references, and clear those
 * of compressed clusters, also in the tables of snapshots.
 */
int heal_copied_flags (struct heal *h, struct err *err);

/* --- level all: heal-all.c has the order.  Each of these mends what the check h->c
 * says about its part, on h->d, and counts in h->res->structures what it changed; the
 * caller flushes and checks again.  What is lost for good is added to lost.
 */
int heal_header (struct heal *h, struct lost *lost, struct err *err);           /* heal-header.c */
int heal_snapshots (struct heal *h, struct lost *lost, struct err *err);        /* heal-snapshots.c */
int heal_bitmaps (struct heal *h, struct err *err);                             /* heal-bitmaps.c */
int heal_entries (struct heal *h, struct err *err);                             /* heal-entries.c */

/* heal-place.c: n clusters in a row that nothing uses, inside the file or, where it
 * can grow, behind its end; claimed in h->c->owners, so that the refcounts that are
 * healed afterwards count them.  Their contents are undefined.  Clusters that have a
 * refcount for no known reason are left alone.  -ENOSPC says how many are missing.
 */
int heal_place (struct heal *h, uint64_t n, uint64_t *host_off, struct err *err);

/* Write len bytes at host_off, past the end of the file too (it grows). */
int heal_write (struct heal *h, const void *buf, uint64_t len, uint64_t host_off,
                struct err *err);

/* Bytes around a write that an overlay copies from the source, in whole clusters of its own. */
#define COPY_GRAIN (UINT64_C (64) << 10)

/* If the image is far: len bytes at host_off are going to be written, so what lies around
 * them will be read.
 */
static inline void
heal_announce_write (const struct heal *h, uint64_t host_off, uint64_t len)
{
  uint64_t from = ROUND_DOWN (host_off, COPY_GRAIN);

  ahead_hint (h->d, from, ROUND_UP (host_off + len, COPY_GRAIN) - from);
}

/* The refcount that cluster ci shall have on disk. */
static inline uint64_t
right_refcount (const struct heal *h, uint64_t ci)
{
  uint64_t n = ownermap_get (h->c->owners, ci);

  return n < h->g.refcount_max ? n : h->g.refcount_max;
}

#endif /* QR_HEAL_INT_H */
