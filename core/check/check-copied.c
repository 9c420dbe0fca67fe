/* The COPIED flags of the active disk, and host clusters that it uses twice.
 *
 * Only now is it known how often each cluster is referenced.  The L1 table is
 * looked at always.  The L2 tables are read a second time only if the first
 * walk saw an entry without the flag, if any cluster is shared, or if the refcount
 * of one that is in use is higher than its references: otherwise no flag can be wrong.
 *
 * A flag that is missing where the refcount is too high agrees with that refcount,
 * and a write is copied for nothing: that is the leak (R02), and no finding of its own.
 * A snapshot whose deletion was cut off leaves the whole disk like that.  A flag that is
 * set there is a leak too, but one that QEMU calls a corruption (copied_ahead).
 *
 * Two entries of the active disk on one host cluster are a note (T15).  The
 * second walk finds such clusters, by counting the references to shared ones
 * once more for the active disk alone; a third walk, if there are any with two,
 * finds who uses them.
 * Tables that one L1 table names twice are T05 and count once here.
 *
 * If there are snapshots, their tables are read with those of the active disk, for
 * host clusters that are named at two different guest offsets (S07): a program that
 * does not know snapshots took their clusters for free.
 *
 * Deliberately not here: the flags in tables of snapshots, which mean nothing until
 * a snapshot is loaded; and those of compressed clusters, which are always wrong (check-data.c).
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "check/check-int.h"

#define LOW_BITS  UINT64_C (0x5555555555555555)
/* LIMIT: no more than this many guest clusters are told in T15, and in S07. */
#define MAX_USERS (UINT64_C (1) << 20)

/* A guest cluster on a host cluster that has another one. */
struct user {
  uint64_t host_ci, guest_ci;
  int32_t snapshot_index;       /* of the table: FINDING_ACTIVE if the active disk has it, too */
};
DEFINE_VEC (user_vec, struct user);

struct copied {
  struct checker *k;
  const uint32_t *table;        /* the tables that are read: numbers in k->l2 */
  struct ownermap *active;      /* references to shared clusters by the active disk */
  /* With snapshots: the low bits of 1 + the guest cluster that was first seen on each
   * host cluster (LIMIT: NULL if memory does not allow it), and those on which another was.
   */
  _Atomic uint32_t *first;
  struct ownermap *reused;
  const struct ownermap *collect;       /* active or reused: users of such clusters are listed */
  unsigned least;               /* from this many claims there on */
  pthread_mutex_t lock;
  struct user_vec users;        /* protected by lock */
};

/* Is the refcount of cluster ci above its references? */
static bool
too_high (const struct check *c, uint64_t ci)
{
  return c->excess && ownermap_get (c->excess, ci) > 0;
}

/* --- L1 */

static int
check_l1 (struct checker *k, struct err *err)
{
  struct finding_batch b;
  int r = 0;

  finding_batch_init (&b, &k->c->findings, k->g->cluster_size);
  for (uint64_t i = 0; i < k->nr_l1 && r == 0; ++i) {
    uint64_t raw = k->l1[i], host_off = raw & L1E_OFF_MASK;
    bool copied = raw & ENTRY_COPIED, right;

    if (raw == 0 || !table_fits (k, host_off, k->g->cluster_size))
      continue;
    right = check_copied (k->c, host_off >> k->g->cluster_bits);
    if (right && too_high (k->c, host_off >> k->g->cluster_bits)) {
      atomic_store (copied ? &k->copied_ahead : &k->copied_follows, true);
      continue;
    }
    if (copied != right) {
      struct finding f = {
        .id = FINDING_L1_COPIED_WRONG, .snapshot_index = FINDING_ACTIVE,
        .host_off = k->c->header.l1_host_off, .guest_off = i * k->g->l2_coverage,
        .guest_len = k->g->l2_coverage, .index = i, .found = raw, .expected = right, .count = 1,
      };

      r = finding_batch_add (&b, &f);
    }
  }
  if (r == 0)
    r = finding_batch_flush (&b);
  return r < 0 ? err_set (err, ENOMEM, "out of memory") : 0;
}

/* --- L2 */

struct flag_walk {
  struct copied *cp;
  const struct geom *g;
  const struct l2_table *t;
  struct finding_batch batch;
  struct err *err;
};

static uint64_t
guest_cluster (const struct flag_walk *w, uint64_t i)
{
  return ((uint64_t) w->t->l1_index << w->g->l2_bits) + i;
}

static int
flag_finding (struct flag_walk *w, uint64_t i, uint64_t raw, bool right)
{
  uint64_t guest_ci = guest_cluster (w, i);
  struct finding f = {
    .id = FINDING_L2_COPIED_WRONG, .snapshot_index = FINDING_ACTIVE,
    .host_off = w->t->host_off, .guest_off = guest_ci << w->g->cluster_bits,
    .guest_len = w->g->cluster_size, .index = guest_ci, .found = raw, .expected = right,
    .count = 1,
  };

  return finding_batch_add (&w->batch, &f) < 0 ? err_set (w->err, ENOMEM, "out of memory") : 0;
}

/* Which of the 32 clusters from ci on may be written in place, as bits in the
 * places of ownermap_word; and which have more than one reference.
 */
static uint64_t
single (const struct check *c, uint64_t ci, uint64_t *shared)
{
  uint64_t w = ownermap_word (c->owners, ci), kept = c->kept ? ownermap_word (c->kept, ci) : 0;

  *shared = w >> 1 & LOW_BITS;
  return w & ~(w >> 1) & ~(kept | kept >> 1) & LOW_BITS;
}

/* Count the references of the active disk to the clusters in mask. */
static int
count_active (struct flag_walk *w, uint64_t ci, uint64_t mask)
{
  int r = 0;

  while (mask && r == 0) {
    unsigned first = __builtin_ctzll (mask) / 2, n = 1;

    while (first + n < 32 && mask >> 2 * (first + n) & 1)
      ++n;
    r = ownermap_claim (w->cp->active, ci + first, n, 1, NULL, w->err);
    mask &= first + n < 32 ? UINT64_MAX << 2 * (first + n) : 0;
  }
  return r;
}

/* The bits of the clusters [ci, stop) in the word that starts at base. */
static uint64_t
word_mask (uint64_t base, uint64_t ci, uint64_t stop)
{
  uint64_t mask = LOW_BITS << 2 * (ci - base);

  return stop < base + 32 ? mask & ((UINT64_C (1) << 2 * (stop - base)) - 1) : mask;
}

/* Cluster ci is shared: by the same guest cluster of the disk and its snapshots? */
static int
note_guest (struct flag_walk *w, uint64_t ci, uint64_t guest_ci)
{
  uint32_t mine = (uint32_t) guest_ci == UINT32_MAX ? 1 : guest_ci + 1, seen = 0;

  if (atomic_compare_exchange_strong (&w->cp->first[ci], &seen, mine) || seen == mine)
    return 0;
  return ownermap_claim (w->cp->reused, ci, 1, 1, NULL, w->err);
}

/* The clusters in mask of the word at base are shared; ci is named by entry i. */
static int
note_guests (struct flag_walk *w, uint64_t base, uint64_t mask, uint64_t i, uint64_t ci)
{
  int r = 0;

  for (; w->cp->first && mask && r == 0; mask &= mask - 1) {
    uint64_t at = base + __builtin_ctzll (mask) / 2;

    r = note_guest (w, at, guest_cluster (w, i + (at - ci)));
  }
  return r;
}

/* The same for a table of snapshots only, whose flags do not matter. */
static int
note_run (struct flag_walk *w, uint64_t i, uint64_t n, uint64_t ci, uint64_t raw)
{
  uint64_t end = ci + n, first_ci = ci, stop;
  int r = 0;

  for (; ci < end && r == 0; ci = stop) {
    uint64_t base = ROUND_DOWN (ci, 32), shared;

    stop = MIN (base + 32, end);
    single (w->cp->k->c, base, &shared);
    r = note_guests (w, base, shared & word_mask (base, ci, stop), i, first_ci);
  }
  return r;
}

/* Entries [i, i+n) have the flags of raw and name the clusters [ci, ci+n). */
static int
check_flags (struct flag_walk *w, uint64_t i, uint64_t n, uint64_t ci, uint64_t raw)
{
  struct checker *k = w->cp->k;
  const struct check *c = k->c;
  uint64_t end = ci + n, first_ci = ci, base, stop;
  bool copied = raw & ENTRY_COPIED;
  int r = 0;

  for (; ci < end && r == 0; ci = stop) {
    uint64_t shared, one, mask, wrong, high;

    base = ROUND_DOWN (ci, 32);
    stop = MIN (base + 32, end);
    mask = word_mask (base, ci, stop);
    one = single (c, base, &shared);
    high = c->excess ? ownermap_word (c->excess, base) : 0;
    high = (high | high >> 1) & LOW_BITS;
    wrong = (copied ? ~one : one & ~high) & mask;
    if (one & high & mask)
      atomic_store_explicit (copied ? &k->copied_ahead : &k->copied_follows, true,
                             memory_order_relaxed);
    for (; wrong && r == 0; wrong &= wrong - 1) {
      uint64_t j = base + __builtin_ctzll (wrong) / 2 - first_ci;

      r = flag_finding (w, i + j, raw + (j << w->g->cluster_bits), !copied);
    }
    if (r == 0)
      r = count_active (w, base, shared & mask);
    if (r == 0)
      r = note_guests (w, base, shared & mask, i, first_ci);
  }
  return r;
}

/* Call fn for the runs of standard entries that name clusters inside the file. */
typedef int (*run_fn) (struct flag_walk *w, uint64_t i, uint64_t n, uint64_t ci, uint64_t raw);

static int
for_each_run (struct flag_walk *w, const uint8_t *table, run_fn fn)
{
  const struct geom *g = w->g;
  uint64_t end = w->cp->k->end, n;
  int r = 0;

  for (uint64_t i = 0; i < g->l2_entries && r == 0; i += n) {
    uint64_t raw = l2_raw (table, i, g), off = raw & L2E_OFF_MASK;

    n = 1;
    if (raw == 0 && !g->extended_l2)
      n = zero_words (table + i * 8, g->l2_entries - i);
    if (raw == 0 || (raw & L2E_COMPRESSED))
      continue;
    if (off == 0 || !IS_ALIGNED (off, g->cluster_size) || off >= end)
      continue;
    if (!g->extended_l2)
      n = MIN (entries_in_a_row (table + i * 8, g->l2_entries - i, raw, g),
               (end - off) >> g->cluster_bits);
    r = fn (w, i, n, off >> g->cluster_bits, raw);
  }
  return r;
}

/* With a data file each guest cluster has a host cluster of its own. */
static int
check_data_file_flags (struct flag_walk *w, const uint8_t *table)
{
  int r = 0;

  for (uint64_t i = 0; i < w->g->l2_entries && r == 0; ++i) {
    uint64_t raw = l2_raw (table, i, w->g);

    if (!(raw & (L2E_COMPRESSED | ENTRY_COPIED)) && (raw & L2E_OFF_MASK))
      r = flag_finding (w, i, raw, true);
  }
  return r;
}

static void
walk_init (struct flag_walk *w, struct checker *k, struct copied *cp, size_t n, struct err *err)
{
  w->cp = cp;
  w->g = k->g;
  w->t = &k->l2.tables.ptr[cp->table[n]];
  w->err = err;
  finding_batch_init (&w->batch, &k->c->findings, k->g->cluster_size);
}

static int
flags_of_table (struct checker *k, void *opaque, size_t n, const uint8_t *buf, int r,
                struct err *err)
{
  struct flag_walk w;

  if (r < 0)
    return 0;                   /* T06 was said when it was read for its data */
  walk_init (&w, k, opaque, n, err);
  if (!w.t->active_weight)
    r = for_each_run (&w, buf, note_run);
  else
    r = k->g->data_file ? check_data_file_flags (&w, buf) : for_each_run (&w, buf, check_flags);
  if (r == 0 && finding_batch_flush (&w.batch) < 0)
    r = err_set (err, ENOMEM, "out of memory");
  return r;
}

/* --- host clusters used twice */

static int
collect_users (struct flag_walk *w, uint64_t i, uint64_t n, uint64_t ci, uint64_t raw)
{
  struct copied *cp = w->cp;
  uint64_t end = ci + n, first_ci = ci, stop;

  for (; ci < end; ci = stop) {
    uint64_t base = ROUND_DOWN (ci, 32), word = ownermap_word (cp->collect, base), those;

    stop = MIN (base + 32, end);
    those = (cp->least > 1 ? word >> 1 : word | word >> 1) & word_mask (base, ci, stop);
    for (; those; those &= those - 1) {
      uint64_t at = base + __builtin_ctzll (those) / 2;
      struct user u = { at, guest_cluster (w, i + (at - first_ci)),
                        w->t->active_weight ? FINDING_ACTIVE : w->t->snapshot_index };

      LOCK_SCOPE (&cp->lock);
      if (cp->users.len < MAX_USERS && user_vec_push (&cp->users, u) < 0)
        return err_set (w->err, ENOMEM, "out of memory");
    }
  }
  return 0;
}

static int
users_of_table (struct checker *k, void *opaque, size_t n, const uint8_t *buf, int r,
                struct err *err)
{
  struct flag_walk w;

  if (r < 0)
    return 0;
  walk_init (&w, k, opaque, n, err);
  if (!w.t->active_weight && w.cp->collect == w.cp->active)
    return 0;
  return for_each_run (&w, buf, collect_users);
}

static int
compare_users (const void *pa, const void *pb)
{
  const struct user *a = pa, *b = pb;

  if (a->host_ci != b->host_ci)
    return a->host_ci < b->host_ci ? -1 : 1;
  if (a->snapshot_index != b->snapshot_index)
    return a->snapshot_index < b->snapshot_index ? -1 : 1;
  return a->guest_ci < b->guest_ci ? -1 : a->guest_ci > b->guest_ci;
}

/* Each user of a cluster but the first is a finding that names the first; of
 * reused ones those of snapshots at another guest offset.
 */
static int
report_users (struct copied *cp, enum finding_id id, struct err *err)
{
  unsigned bits = cp->k->g->cluster_bits;
  const struct user *first = NULL, *u = cp->users.ptr;
  int r = 0;

  if (cp->users.len)
    qsort (cp->users.ptr, cp->users.len, sizeof *cp->users.ptr, compare_users);
  for (size_t i = 0; i < cp->users.len && r == 0; ++i, ++u) {
    if (first == NULL || first->host_ci != u->host_ci) {
      first = u;
      continue;
    }
    if (id == FINDING_SNAPSHOT_CLUSTER_REUSED &&
        (u->snapshot_index == FINDING_ACTIVE || u->guest_ci == first->guest_ci))
      continue;
    r = add_finding (cp->k, (struct finding) {
        .id = id, .snapshot_index = u->snapshot_index,
        .host_off = u->host_ci << bits, .guest_off = u->guest_ci << bits,
        .guest_len = cp->k->g->cluster_size, .index = u->guest_ci,
        .expected = first->guest_ci << bits }, err);
  }
  return r;
}

/* --- all tables */

static int
list_users (struct copied *cp, const struct ownermap *of, unsigned least, enum finding_id id,
            const uint64_t *host_offs, size_t nr, struct err *err)
{
  int r;

  cp->users.len = 0;
  cp->collect = of;
  cp->least = least;
  r = read_clusters (cp->k, host_offs, nr, "flags", users_of_table, cp, err);
  return r < 0 ? r : report_users (cp, id, err);
}

static int
walk_tables (struct copied *cp, const uint64_t *host_offs, size_t nr, struct err *err)
{
  int r = read_clusters (cp->k, host_offs, nr, "flags", flags_of_table, cp, err);

  if (r == 0 && ownermap_any_shared (cp->active))
    r = list_users (cp, cp->active, 2, FINDING_CLUSTER_SHARED, host_offs, nr, err);
  if (r == 0 && cp->first && ownermap_end (cp->reused) > 0)
    r = list_users (cp, cp->reused, 1, FINDING_SNAPSHOT_CLUSTER_REUSED, host_offs, nr, err);
  return r;
}

/* What tells clusters that snapshots have at another guest offset. */
static int
prepare_reused (struct copied *cp, struct err *err)
{
  struct checker *k = cp->k;
  uint64_t clusters = k->end >> k->g->cluster_bits;

  if (k->c->snapshots.len == 0 || k->g->data_file ||
      clusters > k->memory_limit / 8 / sizeof *cp->first)
    return 0;
  cp->first = calloc (MAX (clusters, 1), sizeof *cp->first);
  if (cp->first == NULL)
    return err_set (err, ENOMEM, "out of memory");
  return ownermap_new (k->memory_limit, &cp->reused, err);
}

static int
check_l2_flags (struct checker *k, struct err *err)
{
  const struct l2_table_vec *v = &k->l2.tables;
  CLEANUP_FREE uint64_t *host_offs = malloc (MAX (v->len, 1) * sizeof *host_offs);
  CLEANUP_FREE uint32_t *table = malloc (MAX (v->len, 1) * sizeof *table);
  struct copied cp = { .k = k, .table = table };
  size_t nr = 0;
  int r;

  if (host_offs == NULL || table == NULL)
    return err_set (err, ENOMEM, "out of memory");
  for (size_t i = 0; i < v->len; ++i)
    if (v->ptr[i].active_weight || k->c->snapshots.len > 0) {
      host_offs[nr] = v->ptr[i].host_off;
      table[nr++] = i;
    }
  pthread_mutex_init (&cp.lock, NULL);
  r = ownermap_new (k->memory_limit, &cp.active, err);
  if (r == 0)
    r = prepare_reused (&cp, err);
  if (r == 0)
    r = walk_tables (&cp, host_offs, nr, err);
  ownermap_free (cp.active);
  ownermap_free (cp.reused);
  free ((void *) cp.first);
  vec_reset (&cp.users);
  pthread_mutex_destroy (&cp.lock);
  return r;
}

int
check_copied_flags (struct checker *k, struct err *err)
{
  const struct check *c = k->c;
  /* EXCESS_REFERENCED is more than one. */
  bool needed = atomic_load (&k->look_at_copied) || ownermap_any_shared (c->owners) ||
                (c->kept && ownermap_end (c->kept) > 0) ||
                (c->excess && ownermap_any_shared (c->excess));
  int r = check_l1 (k, err);

  if (r == 0 && needed)
    r = check_l2_flags (k, err);
  k->c->copied_follows = atomic_load (&k->copied_follows);
  k->c->copied_ahead = atomic_load (&k->copied_ahead);
  k->c->copied_in_snapshots = atomic_load (&k->copied_in_snapshots);
  return r;
}
