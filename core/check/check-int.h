/* What the phases of a check share.  For check*.c only. */
#ifndef QR_CHECK_CHECK_INT_H
#define QR_CHECK_CHECK_INT_H

#include <pthread.h>
#include <stdatomic.h>

#include "check/check.h"
#include "fmt/entry.h"

/* An L2 table, however many L1 entries name it. */
struct l2_table {
  uint64_t host_off;
  uint64_t weight;              /* L1 entries that name it, in all L1 tables */
  uint32_t active_weight;       /* of these, in the active one */
  int32_t snapshot_index;       /* of the first that does: FINDING_ACTIVE or a snapshot */
  uint32_t l1_index;            /* and its entry there */
  int32_t last_l1;              /* the last L1 table that named it, to see T05 */
  bool shared;                  /* the L1 table that is being looked at names it twice */
  /* What check-data.c found in it: entries that are possible, and that are not. */
  uint32_t good, bad;
  /* Why its L1 entries go: L2_TABLE_NONSENSE, L2_TABLE_UNREADABLE, or 0. */
  enum finding_id fate;
};
DEFINE_VEC (l2_table_vec, struct l2_table);
DEFINE_VEC (u64_vec, uint64_t);
DEFINE_VEC (u32_vec, uint32_t);

/* Open addressing: number of a table in the vector + 1, or 0. */
struct l2_set {
  struct l2_table_vec tables;   /* sorted by host_off once the set is closed */
  uint32_t *slots;
  size_t nr_slots;
};

/* An L1 entry with reserved bits whose table may be good all the same. */
struct l1_doubt {
  uint64_t l1_host_off, l2_host_off;
  uint32_t index;
  int32_t snapshot_index;
};
DEFINE_VEC (l1_doubt_vec, struct l1_doubt);

/* An L2 entry (or a run of them) that waits for a decision, as all tables must be known. */
struct l2_doubt {
  uint32_t table;               /* number in k->l2 */
  uint32_t index, count;        /* entries */
  uint64_t ci;                  /* host clusters [ci, ci + n) */
  uint64_t n;
  uint64_t raw;                 /* the first entry */
  enum finding_id why;          /* L2_ENTRY_OVERLAP or L2_ENTRY_RESERVED */
};
DEFINE_VEC (l2_doubt_vec, struct l2_doubt);

/* A claim that lost against what was there before; the winner is looked up later. */
struct overlap {
  uint64_t ci, n;               /* host clusters */
  struct owner loser;
};
DEFINE_VEC (overlap_vec, struct overlap);

/* A bitmap that lies on metadata: if that is an L2 table, its contents decide. */
struct bitmap_doubt {
  uint64_t ci, n;               /* host clusters */
  uint32_t bitmap;              /* in c->bitmaps, or UINT32_MAX: the directory */
  uint64_t table_host_off, found;       /* as in the finding, if the bitmap loses */
};
DEFINE_VEC (bitmap_doubt_vec, struct bitmap_doubt);

/* Part of the refcount structure on something that the mapping claims. */
struct rt_doubt {
  uint64_t ci;
  uint64_t index;               /* refcount table entry, or RT_DOUBT_TABLE: the table itself */
  bool sound;                   /* it holds refcounts (or entries) that make sense */
  bool zeros;                   /* it does not, and holds nothing else either */
};
DEFINE_VEC (rt_doubt_vec, struct rt_doubt);
#define RT_DOUBT_TABLE UINT64_MAX
#define MAX_RT_DOUBTS  64       /* more lose without a look at their contents */

struct checker {
  struct bdev *d;
  struct check *c;
  const struct geom *g;         /* = &c->geom */
  struct progress *progress;
  uint64_t memory_limit;
  uint64_t end;                 /* bytes: the file's size, rounded up to a cluster */
  uint64_t cut_ci;              /* the cluster in whose midst the file ends; UINT64_MAX if none */
  struct ownermap *meta;        /* clusters that hold metadata (not the refcount structures) */
  struct ownermap *soft;        /* clusters of inconsistent bitmaps; NULL if there are none */
  uint64_t *l1;                 /* active L1 table, host byte order */
  uint64_t nr_l1;
  struct l2_set l2;
  struct u32_vec followed;      /* snapshots whose L1 tables were read */
  bool deep, keep_leaks;        /* as in the options */
  pthread_mutex_t bad_lock;     /* protects c->bad, the conflicts and the doubts */
  struct l1_doubt_vec l1_doubts;
  struct l2_doubt_vec l2_doubts;
  struct overlap_vec overlaps;
  struct bitmap_doubt_vec bitmap_doubts;
  struct bitmap_doubt_vec bitmap_data;  /* clusters that the bitmaps' tables name, each once a name */
  struct rt_doubt_vec rt_doubts;        /* sorted by ci */
  uint64_t snaptab_len;         /* bytes of the snapshot table that were claimed */
  uint64_t crypto_off, crypto_len;      /* the encryption header, if it is where it can be */
  atomic_uint nr_clipped;       /* streams that clip_whole_stream has looked at */
  atomic_bool incomplete;       /* becomes c->incomplete */
  atomic_bool copied_follows, copied_ahead, copied_in_snapshots;        /* -> check */
  atomic_bool look_at_copied;   /* some L2 entry of the active disk lacks COPIED */
};

static inline void
set_incomplete (struct checker *k)
{
  atomic_store_explicit (&k->incomplete, true, memory_order_relaxed);
}

/* --- check.c */

/* Claim the clusters that [off, off+len) touches as metadata; it must lie below
 * k->end.  *conflict (may be NULL) becomes true if any was metadata before.
 */
int claim_meta (struct checker *k, uint64_t off, uint64_t len, bool *conflict, struct err *err);

/* Add a finding with one item; fields that do not apply are FINDING_NO_OFF or 0. */
int add_finding (struct checker *k, struct finding f, struct err *err);

/* Entries [b.index, b.index + b.count) of a table are bad; thread-safe.  0 or -ENOMEM. */
int bad_add (struct checker *k, struct bad_run b, struct err *err);

/* Note who lies on whom; thread-safe.  0 or -ENOMEM. */
int conflict_add (struct checker *k, uint64_t host_off, uint64_t host_len, struct owner winner,
                  struct owner loser, struct err *err);
int overlap_add (struct checker *k, struct overlap o, struct err *err);

/* How many bad runs or doubts are kept at most. */
size_t bad_limit (const struct checker *k);

/* A table of bytes at off: cluster aligned, not in the header, inside the file. */
bool table_fits (const struct checker *k, uint64_t off, uint64_t bytes);

/* -ECANCELED if somebody asked for it. */
int check_cancelled (struct checker *k, struct err *err);

/* --- check-read.c */

struct table_load {
  uint64_t host_off;
  uint64_t len;                 /* bytes */
  uint8_t *buf;
  int r;                        /* out: 0 or -errno */
};

/* Read whole tables, many pieces in flight; one that can't be read is no error
 * of the whole.
 */
int load_tables (struct checker *k, struct table_load *loads, size_t nr, struct err *err);

/* Called from several threads at once for each cluster read; r < 0: it could
 * not be read, buf is NULL.
 */
typedef int (*cluster_fn) (struct checker *k, void *opaque, size_t i, const uint8_t *buf, int r,
                           struct err *err);

/* Read the clusters at host_offs, neighbours in the list that adjoin in the file
 * in one go.  Reports progress of this phase, and can be cancelled.
 */
int read_clusters (struct checker *k, const uint64_t *host_offs, size_t nr, const char *phase,
                   cluster_fn fn, void *opaque, struct err *err);

/* --- the phases, in order */

int check_header (struct checker *k, struct err *err);          /* check-header.c */
int check_active_l1 (struct checker *k, struct err *err);       /* check-l1.c */
int check_snapshots (struct checker *k, struct err *err);       /* check-snapshots.c */
int check_l1_tail (struct checker *k, struct err *err);         /* check-l1.c */
int check_l2_close (struct checker *k, struct err *err);        /* check-tables.c */
int check_extras (struct checker *k, struct err *err);          /* check-extras.c */
int check_data (struct checker *k, struct err *err);            /* check-data.c */
int check_deep (struct checker *k, struct err *err);            /* check-deep.c */
int check_refcounts (struct checker *k, struct err *err);       /* check-refcounts.c */
int check_contests (struct checker *k, struct err *err);        /* check-contests.c */
int check_orphans (struct checker *k, struct err *err);         /* check-orphans.c */
int check_copied_flags (struct checker *k, struct err *err);    /* check-copied.c */

/* --- check-tables.c */

/* Judge entries [first, nr) of the L1 table l1 (snapshot_index as in a finding) and
 * claim the L2 tables that they name.
 */
int claim_l2_tables (struct checker *k, const uint64_t *l1, uint64_t first, uint64_t nr,
                     int32_t snapshot_index, uint64_t l1_host_off, struct err *err);

/* The table at host_off, once check_l2_close has sorted them; or NULL. */
struct l2_table *l2_table_at (const struct checker *k, uint64_t host_off);

/* --- check-snapshots.c */

/* Call fn with every L1 table that was followed: the active one, then those of the
 * snapshots, which are read again.
 */
typedef int (*l1_fn) (struct checker *k, void *opaque, const uint64_t *l1, uint64_t nr,
                      int32_t snapshot_index, uint64_t l1_host_off, struct err *err);
int for_each_l1 (struct checker *k, l1_fn fn, void *opaque, struct err *err);

/* The table at host_off, until check_l2_close; or NULL. */
struct l2_table *l2_set_find (const struct l2_set *set, uint64_t host_off);

/* --- check-contests.c */

/* What claimed host cluster ci as metadata, not counting L2 tables that are dropped,
 * nor what is like "but" (kind and snapshot; NULL: nothing).  false: nothing did.
 */
bool owner_at (const struct checker *k, uint64_t ci, const struct owner *but, struct owner *o);

/* Is that L2 table's contents nonsense: more entries impossible than possible? */
static inline bool
l2_is_nonsense (const struct l2_table *t)
{
  return t->bad > t->good;
}

/* The sectors of the compressed cluster that entry i of L2 table t names are to end at host offset end. */
int shorten_stream (struct checker *k, const struct l2_table *t, enum finding_id id, uint64_t i,
                    uint64_t end, struct err *err);

/* Entries [i, i+n) of L2 table t, of which raw is the first: finding, and lost. */
int lose_entries (struct checker *k, struct finding_batch *b, const struct l2_table *t,
                  enum finding_id id, uint64_t i, uint64_t n, uint64_t raw, struct err *err);
struct owner data_owner (const struct checker *k, const struct l2_table *t, uint64_t i, uint64_t n);
struct owner l2_owner (const struct l2_table *t);

/* --- check-evidence.c */

/* Part of the refcount structure lies where the mapping has something.  0 or -ENOMEM. */
int rt_doubt_add (struct checker *k, uint64_t ci, uint64_t index, struct err *err);

/* Entry e counts sectors that cannot be a stream's, from end on.  If it is a compressed cluster's whose stream
 * is whole without them, as where one bit of the count is too many, e is clipped there.  Thread-safe.
 */
bool clip_whole_stream (struct checker *k, struct l2_entry *e, uint64_t end);

/* Look at the contents: fills in "sound" and sorts. */
int weigh_rt_doubts (struct checker *k, struct err *err);

/* Once L2 tables that are none are dropped: who loses. */
int settle_rt_doubts (struct checker *k, struct err *err);

/* --- check-refcounts.c, check-compare.c */

/* Findings about refcount table entry i: host_off is the first byte it covers. */
int rt_entry_finding (struct checker *k, enum finding_id id, uint64_t i, struct err *err);

/* Compare all RB_SOUND blocks with the references; a block that can't be read
 * becomes RB_LOST.  *end_ci: one past the highest cluster inside the file that
 * has a refcount but no reference (0 = none).
 */
int compare_refcounts (struct checker *k, uint64_t *end_ci, struct err *err);

/* --- check-data.c */

/* How many of the nr entries from p on are raw, raw + a cluster, raw + two ... */
uint64_t entries_in_a_row (const uint8_t *p, uint64_t nr, uint64_t raw, const struct geom *g);

/* A table of 8-byte entries that are all zero is skipped quickly: the number of
 * zero words from p on, at most nr.
 */
uint64_t zero_words (const uint8_t *p, uint64_t nr);

#endif /* QR_CHECK_CHECK_INT_H */
