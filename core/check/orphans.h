/* Orphans: clusters that have a refcount and no reference.  They may be nothing
 * but leaks, as a killed writer leaves them, or all that is left of lost data.
 *
 * What a check knows about them, and the judgement whether a cluster looks like
 * an L2 table that was lost (shared by the check and by core/heal/orphans.c).
 */
#ifndef QR_CHECK_ORPHANS_H
#define QR_CHECK_ORPHANS_H

#include <stdbool.h>
#include <stdint.h>

struct check;

/* Counts in check.excess.  A cluster of a lost table that a snapshot has too still
 * has a reference, but fewer than its refcount says.
 */
#define EXCESS_ORPHAN     1     /* no reference at all */
#define EXCESS_REFERENCED 2     /* fewer references than its refcount says */

/* What the check makes of them; the heads of at most 65536 are looked at. */
struct orphan_stats {
  uint64_t clusters;            /* orphans inside the file whose refcount is known */
  uint64_t tables;              /* look like L2 tables of orphans, of those looked at */
  bool sampled;                 /* there were more than could be looked at */
};

/* Findings of the O kinds, as they count among SEV_CORRUPT. */
uint64_t orphan_findings (const struct check *c);

/* Is the refcount of cluster ci unknown, since its block is lost? */
bool orphan_unknown (const struct check *c, uint64_t ci);

/* Has cluster ci a refcount, or one that is unknown, and no reference? */
bool orphan_is (const struct check *c, uint64_t ci);

/* First orphan with a known refcount in [ci, end), and one past the last of its
 * neighbours in *stop; end if there is none.
 */
uint64_t orphan_next (const struct check *c, uint64_t ci, uint64_t end, uint64_t *stop);

/* --- does it look like an L2 table? */

struct l2_tally {
  uint64_t used;                /* entries that are not zero */
  uint64_t bad;                 /* of these: cannot be right */
  uint64_t named;               /* of these: name host clusters, inside the file */
  uint64_t orphans;             /* of those: name orphans */
  uint64_t excess;              /* of those: name clusters with more refcount than references */
  uint64_t copied, compressed;  /* of those */
  uint64_t in_step;             /* of those: see tally_step */
  uint64_t last_step;
  uint64_t last_raw;            /* the entry before */
};

#define ORPHAN_HEAD_BYTES 512u  /* enough to tell most data from a table */

/* Count the entries in len bytes of what may be a table. */
void l2_tally_add (struct l2_tally *t, const struct check *c, const uint8_t *buf, uint64_t len);

/* So far (len = ORPHAN_HEAD_BYTES), could it be one?  True for zeros. */
bool l2_tally_possible (const struct l2_tally *t);

/* The whole cluster is one that was lost. */
bool l2_tally_lost_table (const struct l2_tally *t, const struct check *c);

#endif /* QR_CHECK_ORPHANS_H */
