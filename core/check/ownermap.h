/* How many references each host cluster has, as computed from the mapping.
 *
 * Two bits a cluster (0, 1, 2, more) in chunks that exist once something in
 * them is claimed; exact counts above 2 live in an overflow hash.  Cluster
 * indices are below 2^59.  Claims may come from several threads at once; a range
 * whose clusters were all free is claimed with one atomic operation per 32
 * clusters.
 */
#ifndef QR_CHECK_OWNERMAP_H
#define QR_CHECK_OWNERMAP_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"

struct ownermap;

/* memory_limit in bytes; exceeding it is -ENOMEM in whatever call needs more,
 * which may then have claimed a part of its range.
 */
int ownermap_new (uint64_t memory_limit, struct ownermap **ret, struct err *err);
void ownermap_free (struct ownermap *m);

/* Add weight references to each of the clusters [ci, ci+n).  *conflict (may be
 * NULL) becomes true if any of them had a reference before; it is never made false.
 * Thread-safe.  0 or -ENOMEM.
 */
int ownermap_claim (struct ownermap *m, uint64_t ci, uint64_t n, uint64_t weight,
                    bool *conflict, struct err *err);

/* Take one reference of cluster ci away (it must have one).  Not thread-safe. */
void ownermap_unclaim (struct ownermap *m, uint64_t ci);

/* References of cluster ci; exact. */
uint64_t ownermap_get (const struct ownermap *m, uint64_t ci);

/* The 2-bit states of the 32 clusters that start at ci (a multiple of 32), the
 * first in the lowest bits: 0, 1, 2, 3 = more.  For comparing in bulk.
 */
uint64_t ownermap_word (const struct ownermap *m, uint64_t ci);

/* The exact references of the 32 clusters that start at ci (a multiple of 32). */
void ownermap_counts (const struct ownermap *m, uint64_t ci, uint64_t counts[32]);

/* First cluster in [ci, end) that has (used) or has not (!used) a reference;
 * end if there is none.  Skips absent chunks at once.
 */
uint64_t ownermap_find (const struct ownermap *m, uint64_t ci, uint64_t end, bool used);

/* One past the highest cluster with a reference; 0 if none. */
uint64_t ownermap_end (const struct ownermap *m);

/* Is any cluster referenced more than once? */
bool ownermap_any_shared (const struct ownermap *m);

/* Bytes of RAM in use. */
uint64_t ownermap_memory (const struct ownermap *m);

#endif /* QR_CHECK_OWNERMAP_H */
