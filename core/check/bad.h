/* Entries of the mapping that cannot be right, and what is to become of each:
 * the complete list (findings are capped), made by the check, carried out by the
 * healing at level "all" (core/heal/heal-entries.c).
 */
#ifndef QR_CHECK_BAD_H
#define QR_CHECK_BAD_H

#include <stdbool.h>
#include <stdint.h>

#include "base/vec.h"
#include "check/finding.h"

enum bad_fix {
  BAD_LOST,             /* nothing says where the data is: it reads as zeros from now on */
  BAD_RESERVED,         /* reserved bits are cleared, the rest of the entry is believed */
  BAD_PLACE,            /* external data file: the place follows from the guest offset */
  BAD_SUBCLUSTERS,      /* subclusters that are both allocated and zero become zero */
  BAD_SECTORS,          /* a compressed cluster's count of sectors is lowered: its stream ends earlier */
  BAD_CUT,              /* stays: only what lies past the end of the file is lost */
  BAD_UNREADABLE,       /* lost for the guest, but the entry stays: the device could not read */
};

/* Neighbouring entries of one table with the same fate. */
struct bad_run {
  uint64_t table_host_off;      /* of the L1 or L2 table */
  uint32_t index, count;        /* entries [index, index + count) */
  bool in_l1;                   /* the table is an L1 table */
  int32_t snapshot_index;       /* in_l1: whose (FINDING_ACTIVE or a snapshot); else
                                   FINDING_ACTIVE.  An L2 table
                                   belongs to every L1 entry that names it: walk the L1 tables */
  enum finding_id why;
  enum bad_fix fix;
  uint64_t end;                 /* BAD_SECTORS: host offset where the sectors are to end */
};
DEFINE_VEC (bad_run_vec, struct bad_run);

/* What a host cluster is used for. */
enum owner_kind {
  OWNER_HEADER,
  OWNER_L1_TABLE,               /* of the active disk, or of a snapshot: snapshot_index */
  OWNER_L2_TABLE,               /* index: the L1 entry; snapshot_index: of the first that names it */
  OWNER_REFCOUNT_TABLE,
  OWNER_REFCOUNT_BLOCK,         /* index: the refcount table entry */
  OWNER_SNAPSHOT_TABLE,
  OWNER_BITMAP,                 /* directory, a table or data of one */
  OWNER_CRYPTO_HEADER,
  OWNER_DATA,                   /* guest data: guest_off, snapshot_index */
};

struct owner {
  enum owner_kind kind;
  int32_t snapshot_index;       /* FINDING_ACTIVE, or the position in the snapshot table */
  uint64_t index;               /* see the kinds; else 0 */
  uint64_t guest_off, guest_len;/* bytes; guest_len 0: not guest data */
};

/* Two structures claimed [host_off, host_off + host_len); the loser's guest range
 * is lost (at level "all"), or the loser is made anew.
 */
struct conflict {
  uint64_t host_off, host_len;  /* bytes */
  struct owner winner, loser;
};
DEFINE_VEC (conflict_vec, struct conflict);

#define MAX_CONFLICTS 10000     /* more are counted, not kept */

#endif /* QR_CHECK_BAD_H */
