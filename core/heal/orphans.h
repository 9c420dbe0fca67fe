/* Orphans as something to look into: the clusters of an image that nothing
 * references, in an order that makes sense, and an index of them.
 *
 *   tables        each lost L2 table: the clusters that it alone names, in the order of
 *                 its entries; what is unallocated, zero or compressed is left out
 *   data          the other clusters that have a refcount, in the file's order: the
 *                 tables themselves, compressed data, and what no table names
 *   unreferenced  clusters without refcount that are not zero, likewise
 *
 * A cluster appears once: in the first table of the file that names it, if one does.
 */
#ifndef QR_HEAL_ORPHANS_H
#define QR_HEAL_ORPHANS_H

#include <stdio.h>

#include "base/vec.h"
#include "check/check.h"

enum orphan_kind {
  ORPHAN_TABLE,
  ORPHAN_DATA,
  ORPHAN_UNREFERENCED,
};

/* What is contiguous in the file. */
struct orphan_piece {
  uint64_t host_off, len;       /* bytes */
  uint64_t window_off;          /* bytes, of a table: from the start of what it maps */
};
DEFINE_VEC (orphan_piece_vec, struct orphan_piece);

struct orphan_region {
  enum orphan_kind kind;
  uint64_t off, len;            /* bytes, among all regions */
  size_t first_piece, nr_pieces;/* exactly one if it is no table's */
  uint64_t table_host_off;      /* of the table */
  uint32_t used, compressed;    /* its entries that are not zero; of these, compressed */
};
DEFINE_VEC (orphan_region_vec, struct orphan_region);

struct orphans {
  uint64_t cluster_size;
  uint64_t size;                /* bytes of all regions */
  uint64_t clusters;            /* with a refcount, or named by a table */
  uint64_t tables, data, unreferenced;  /* regions of each kind */
  struct orphan_region_vec regions;     /* by kind, then by place */
  struct orphan_piece_vec pieces;       /* in the order of the regions */
  bool sampled;                 /* too many to look for tables in all of them */
  bool truncated;               /* too many pieces: the later ones are missing */
};

/* Find all orphans of the image on source, of which c is a check that no healing
 * has used.  unreferenced: those without refcount too; not for an image that is
 * being written to, whose free clusters come and go.
 */
int orphans_find (const struct check *c, struct bdev *source, bool unreferenced,
                  struct progress *progress, struct orphans **ret, struct err *err);

void orphans_free (struct orphans *o);  /* o may be NULL */

/* Their bytes as a read-only device, which references source but not o. */
int orphans_device (const struct orphans *o, struct bdev *source, struct bdev **ret,
                    struct err *err);

/* The index as a JSON object, the first max_regions of its regions; each new line
 * is begun with indent.  The members are described in nbdkit-qcow2repair.pod.
 */
void orphans_write_json (FILE *fp, const struct orphans *o, size_t max_regions,
                         const char *indent);

#endif /* QR_HEAL_ORPHANS_H */
