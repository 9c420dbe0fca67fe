/* Findings: what a check has to say, as numbers.  findings.def is the table of
 * kinds; report.c is the only place that makes text or JSON from them.
 */
#ifndef QR_CHECK_FINDING_H
#define QR_CHECK_FINDING_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"
#include "base/vec.h"

enum severity {
  SEV_NOTE,                     /* worth knowing; the image is sound */
  SEV_LEAK,                     /* space is wasted; the image counts as sound */
  SEV_CORRUPT,                  /* writing to it may destroy data */
  SEV_FATAL,                    /* the guest disk cannot be served */
  NR_SEVERITIES,
};

/* The repair level that mends it. */
enum repair_level {
  REPAIR_OFF,
  REPAIR_REFCOUNTS,
  REPAIR_ALL,
  REPAIR_SALVAGE,
  REPAIR_NEVER,                 /* as a column of the table: nothing mends it */
};

enum finding_id {
#define FINDING(code, name, severity, level, unit, title, advice) FINDING_##name,
#include "check/findings.def"
#undef FINDING
  NR_FINDINGS,
};

/* What a finding's count counts. */
enum finding_unit {
  UNIT_CLUSTERS,                /* host clusters: [host_off, host_off + count * cluster size) */
  UNIT_ENTRIES,                 /* entries of a table, starting at index */
  UNIT_ONE,                     /* the thing itself, once */
};

struct finding_kind {
  const char *code;             /* "R01": stable, never reused */
  const char *name;             /* "REFCOUNT_LOW" */
  enum severity severity;
  enum repair_level level;
  enum finding_unit unit;
  const char *title;            /* for people: what is wrong */
  const char *advice;           /* for people: what it means for them */
};

extern const struct finding_kind finding_kinds[NR_FINDINGS];

#define FINDING_NO_OFF UINT64_MAX       /* this finding has no such place */
#define FINDING_ACTIVE (-1)             /* snapshot_index of the active disk */

/* Offsets in bytes, half-open ranges.  found and expected are what the kind's
 * title says they are; for a run they belong to its first item.
 *
 * Where a run is, by the letter of its code:
 *   H, X   host_off is the structure's place
 *   T0x    index is the L1 entry, host_off the L1 table, guest_* what it maps
 *          (T06: host_off is the L2 table)
 *   T1x,   index is the guest cluster (of the disk, not of one L2 table, so that
 *   T22, C runs go on from table to table), host_off the L2 table of the first
 *   T15    host_off is the shared cluster, guest_off a guest cluster on it, and
 *          expected the guest offset of the first guest cluster on it
 *   T21    as T0x; for T21 and T22 found is the raw entry, expected its right flag
 *   S      index is the number of the snapshot
 *   R0x    host_off is the first cluster
 *   R1x    host_off is the refcount table
 *   R2x    index is the refcount table entry, host_off the first byte it covers
 *   O      host_off is the first cluster
 */
struct finding {
  enum finding_id id;
  int32_t snapshot_index;       /* FINDING_ACTIVE, or the position in the snapshot table */
  uint64_t host_off;
  uint64_t guest_off, guest_len;
  uint64_t index;               /* entry number in its table */
  uint64_t found, expected;
  uint64_t count;               /* items joined into this run, at least 1 */
};
DEFINE_VEC (finding_vec, struct finding);

#define FINDINGS_PER_KIND 10000         /* runs that are kept of each kind */

struct findings {
  /* protected by lock while a check runs, constant after it */
  pthread_mutex_t lock;
  struct finding_vec runs;      /* sorted by code and place; empty until finished */
  uint64_t totals[NR_FINDINGS]; /* items, exact even where runs were dropped */
  uint64_t per_severity[NR_SEVERITIES];
  bool truncated;               /* more runs than are kept: the later ones were dropped */
  uint32_t nr_runs[NR_FINDINGS];        /* of each kind in runs */
  /* Until finished: the runs of each kind, and where dropped those that lie
   * before bound.
   */
  struct finding_vec pending[NR_FINDINGS];
  bool dropped[NR_FINDINGS];
  struct finding bound[NR_FINDINGS];
};

int findings_init (struct findings *fs);
void findings_destroy (struct findings *fs);

/* Add a run; f->count items.  Thread-safe.  If the last run of this kind
 * continues into this one (same snapshot, places adjoin) it is extended.
 * 0 or -ENOMEM.
 */
int finding_add (struct findings *fs, const struct finding *f, uint64_t cluster_size);

/* Add everything in src, which is not finished and is left empty.  0 or -ENOMEM. */
int findings_move (struct findings *fs, struct findings *src, uint64_t cluster_size);

/* Sort and join neighbours; after the last finding_add. */
void findings_finish (struct findings *fs, uint64_t cluster_size);

/* Is there anything at least as bad as this? */
bool findings_any (const struct findings *fs, enum severity at_least);

static inline bool
findings_has (const struct findings *fs, enum finding_id id)
{
  return fs->totals[id] != 0;
}

/* One thread's findings on their way to fs: neighbours are joined before the
 * lock is taken.
 */
struct finding_batch {
  struct findings *fs;
  uint64_t cluster_size;
  uint64_t used;                        /* bit i: run[i] holds something */
  struct finding run[NR_FINDINGS];
};

void finding_batch_init (struct finding_batch *b, struct findings *fs, uint64_t cluster_size);
int finding_batch_add (struct finding_batch *b, const struct finding *f);
int finding_batch_flush (struct finding_batch *b);

#endif /* QR_CHECK_FINDING_H */
