/* The check: a damaged image on any block device -> findings and the computed
 * references.  Never writes, never prints, never trusts a value from the disk.
 *
 * Order of the phases (check.c): header and extensions; claims of all metadata
 * (active L1 and L2 tables, snapshots and their tables, bitmaps, encryption
 * header), so that a data pointer into metadata is recognised the moment it is
 * seen, and nothing that only a snapshot or a bitmap says casts doubt on the
 * active disk; data clusters of every L2 table, each table read once however
 * many snapshots share it; refcount structures and comparison; who is right where
 * two claims met; COPIED flags.
 */
#ifndef QR_CHECK_CHECK_H
#define QR_CHECK_CHECK_H

#include "base/progress.h"
#include "check/bad.h"
#include "check/finding.h"
#include "check/orphans.h"
#include "check/ownermap.h"
#include "dev/bdev.h"
#include "fmt/header.h"
#include "fmt/snaptab.h"

struct check_options {
  uint64_t memory_limit;        /* bytes for the reference map; 0 = a quarter of the RAM */
  struct progress *progress;    /* or NULL */
  bool deep;                    /* decompress every compressed cluster, too */
  /* For what is repaired in place.  Orphans go into check.kept, and are no reason
   * not to call the image sound; with keep_leaks all leaks do, whatever they look like.
   */
  bool keep_orphans, keep_leaks;
};

/* State of a refcount table entry after the check. */
enum rb_state {
  RB_ABSENT,                    /* no block, and none of its clusters is in use */
  RB_SOUND,                     /* in its own cluster and readable (values may be wrong) */
  RB_LOST,                      /* must be replaced: missing though needed, or unusable */
};

struct rt_state {
  bool usable;                  /* false: the whole structure must be rebuilt */
  uint64_t host_off;            /* as in the header */
  uint32_t clusters;
  uint64_t nr_entries;          /* 0 if the table could not be read */
  uint64_t *entries;            /* raw, host byte order; owned */
  uint8_t *states;              /* enum rb_state of each entry; owned */
};

/* Counted as qemu-img does, so that its JSON fields can be filled. */
struct check_stats {
  uint64_t total_clusters;      /* guest clusters of the virtual disk */
  uint64_t allocated_clusters;  /* guest clusters with a host cluster, active disk */
  uint64_t compressed_clusters; /* of these */
  uint64_t fragmented_clusters; /* not following their predecessor in the same L2 table */
  uint64_t compressed_anywhere; /* compressed entries in the active disk or any snapshot */
  uint64_t image_end_off;       /* bytes: end of the last cluster used or with a refcount */
  uint64_t l2_tables;           /* distinct ones read */
};

/* One entry of the bitmap directory. */
struct bitmap_state {
  uint64_t dir_off, dir_len;    /* bytes from the start of the directory, with padding */
  bool damaged;                 /* X02: its table or data cannot be right */
};
DEFINE_VEC (bitmap_state_vec, struct bitmap_state);

struct check {
  struct header header;
  struct geom geom;
  uint64_t file_size;           /* bytes, when the check began */
  /* Those that could be decoded, in the order of the table; a snapshot_index anywhere
   * is a position in this.  A bad entry between them is S02.
   */
  struct snapshot_vec snapshots;
  /* What l1_size in the header should be, given the virtual size and what lies at and
   * behind the table (equal to header.l1_entries if there is nothing to mend; also if
   * no table can be large enough, H06); and that the table has no room for it where it lies.
   */
  uint32_t l1_entries_right;
  bool l1_must_move;
  /* Entries of the active L1 table, from its start, that this check went by. */
  uint32_t l1_entries_followed;
  /* Consistent bitmaps in the order of the directory; none if it is damaged (X01). */
  struct bitmap_state_vec bitmaps;
  bool bitmap_dir_damaged;
  struct findings findings;
  struct check_stats stats;
  struct rt_state rt;
  /* References by everything but the refcount structures; and, if rt.usable,
   * by the table and its RB_SOUND blocks too.
   */
  struct ownermap *owners;
  /* Clusters inside the file whose refcount is above their references: see orphans.h. */
  struct ownermap *excess;
  struct orphan_stats orphans;
  bool keep_orphans;            /* as in the options */
  /* Some COPIED flags are missing and rightly so, until refcounts that are too high are lowered. */
  bool copied_follows;
  /* Some are set already: harmless, but QEMU calls the image corrupt until those refcounts are
   * lowered.
   */
  bool copied_ahead;
  /* Some compressed clusters have the flag, in tables that only snapshots use (T22, too). */
  bool copied_in_snapshots;
  /* Only if incomplete or if orphans are to be kept, else NULL: clusters whose refcount is above their
   * references and therefore stays as it is (as a set; the counts mean nothing).
   */
  struct ownermap *kept;
  /* Every entry of an L1 or L2 table that cannot be right; sorted by table and index. */
  struct bad_run_vec bad;
  bool bad_truncated;           /* more of them than memory allows: mend these, check again */
  /* Who lies on whom: the first MAX_CONFLICTS, and how many there are. */
  struct conflict_vec conflicts;
  uint64_t nr_conflicts;
  char *backing_name;           /* as found, or NULL; owned */
  /* Something could not be followed (unreadable tables, bad snapshots or bitmaps, bad mapping
   * entries): clusters without a computed reference may be in use by it, so
   * refcounts must not be lowered and unreferenced clusters that have a refcount not be reused.
   */
  bool incomplete;
};

/* Check d.  0 and *ret whenever the header can be understood, however bad the
 * rest; -errno with a message if not (not a qcow2 image, unknown features,
 * cancelled, out of memory).  The caller frees with check_free.
 */
int check_run (struct bdev *d, const struct check_options *opts, struct check **ret,
               struct err *err);

void check_free (struct check *c);      /* c may be NULL */

/* What the COPIED flag of an L1 or standard L2 entry of the active disk must be
 * that names host cluster ci: is ci's refcount one once it is healed?
 */
bool check_copied (const struct check *c, uint64_t ci);

/* Nothing worse than leaks and notes (and orphans, if they are kept). */
bool check_sound (const struct check *c);

#endif /* QR_CHECK_CHECK_H */
