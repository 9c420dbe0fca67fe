/* The order of a check, and what its phases share: see check.h.
 *
 * A check reads a device that it never writes, and makes two things of it: the
 * findings, and the number of references of every host cluster.  The order of
 * the phases decides who is believed where two structures lie on each other:
 * header, active disk, snapshots, bitmaps and encryption header, guest data,
 * and last the refcount structures, which can be made anew from all the others.
 *
 * Deliberately not here: repairs, words for people, the image layer (the server
 * may share its bugs).
 *
 * Invariants: I1, the device is only read; I6, nothing is remembered from one
 * check to the next.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "check/check-int.h"

int
claim_meta (struct checker *k, uint64_t off, uint64_t len, bool *conflict, struct err *err)
{
  uint64_t ci = off >> k->g->cluster_bits;
  uint64_t n = ((off + len - 1) >> k->g->cluster_bits) - ci + 1;
  int r;

  assert (len > 0 && range_fits (off, len, k->end));
  r = ownermap_claim (k->meta, ci, n, 1, conflict, err);
  if (r == 0)
    r = ownermap_claim (k->c->owners, ci, n, 1, NULL, err);
  return r;
}

int
add_finding (struct checker *k, struct finding f, struct err *err)
{
  int r;

  f.count = 1;
  r = finding_add (&k->c->findings, &f, k->g->cluster_size);
  return r < 0 ? err_set (err, -r, "out of memory") : 0;
}

size_t
bad_limit (const struct checker *k)
{
  return MAX (MIN (k->memory_limit, UINT64_C (1) << 30) / 8 / sizeof (struct l2_doubt), 64);
}

static bool
continues (const struct bad_run *a, const struct bad_run *b)
{
  return a->table_host_off == b->table_host_off && a->in_l1 == b->in_l1 &&
         a->snapshot_index == b->snapshot_index && a->why == b->why && a->fix == b->fix &&
         a->index + a->count == b->index;
}

int
bad_add (struct checker *k, struct bad_run b, struct err *err)
{
  struct bad_run_vec *v = &k->c->bad;
  bool joins;

  LOCK_SCOPE (&k->bad_lock);
  /* What is mended bit by bit may be lost as a whole, too: see finish_bad. */
  joins = b.fix != BAD_RESERVED && b.fix != BAD_SUBCLUSTERS && b.fix != BAD_SECTORS;
  if (joins && v->len && continues (&v->ptr[v->len - 1], &b)) {
    v->ptr[v->len - 1].count += b.count;
    return 0;
  }
  if (v->len >= bad_limit (k)) {
    k->c->bad_truncated = true;
    return 0;
  }
  return bad_run_vec_push (v, b) < 0 ? err_set (err, ENOMEM, "out of memory") : 0;
}

int
conflict_add (struct checker *k, uint64_t host_off, uint64_t host_len, struct owner winner,
              struct owner loser, struct err *err)
{
  LOCK_SCOPE (&k->bad_lock);
  if (k->c->nr_conflicts++ >= MAX_CONFLICTS)
    return 0;
  return conflict_vec_push (&k->c->conflicts, (struct conflict) { host_off, host_len, winner, loser })
             < 0 ? err_set (err, ENOMEM, "out of memory") : 0;
}

int
overlap_add (struct checker *k, struct overlap o, struct err *err)
{
  LOCK_SCOPE (&k->bad_lock);
  if (k->overlaps.len >= MAX_CONFLICTS) {
    k->c->nr_conflicts++;
    return 0;
  }
  return overlap_vec_push (&k->overlaps, o) < 0 ? err_set (err, ENOMEM, "out of memory") : 0;
}

/* By table and index; at one entry, what loses it comes first. */
static int
compare_bad (const void *pa, const void *pb)
{
  const struct bad_run *a = pa, *b = pb;

  if (a->table_host_off != b->table_host_off)
    return a->table_host_off < b->table_host_off ? -1 : 1;
  if (a->in_l1 != b->in_l1)
    return a->in_l1 - b->in_l1;
  if (a->snapshot_index != b->snapshot_index)
    return a->snapshot_index < b->snapshot_index ? -1 : 1;
  if (a->index != b->index)
    return a->index < b->index ? -1 : 1;
  if (a->fix != b->fix)
    return (b->fix == BAD_LOST) - (a->fix == BAD_LOST) ?: (int) a->fix - (int) b->fix;
  return a->why < b->why ? -1 : a->why > b->why;
}

/* Sort, and see to it that each entry has one fate: an entry that is lost needs no
 * other repair, and of two repairs the next check finds the second.
 */
static void
finish_bad (struct bad_run_vec *v)
{
  size_t n = 0;

  if (v->len)
    qsort (v->ptr, v->len, sizeof *v->ptr, compare_bad);
  for (size_t i = 0; i < v->len; ++i) {
    struct bad_run b = v->ptr[i], *last = n ? &v->ptr[n - 1] : NULL;
    uint64_t end = b.index + (uint64_t) b.count, last_end;

    if (last && last->table_host_off == b.table_host_off && last->in_l1 == b.in_l1 &&
        last->snapshot_index == b.snapshot_index) {
      last_end = last->index + (uint64_t) last->count;
      if (end <= last_end)
        continue;
      b.index = MAX (b.index, last_end);
      b.count = end - b.index;
      if (continues (last, &b)) {
        last->count += b.count;
        continue;
      }
    }
    v->ptr[n++] = b;
  }
  v->len = n;
}

/* In an order that does not depend on the threads that found them. */
static int
compare_conflicts (const void *pa, const void *pb)
{
  const struct conflict *a = pa, *b = pb;
  const uint64_t keys[][2] = {
    { a->host_off, b->host_off }, { a->host_len, b->host_len },
    { a->loser.kind, b->loser.kind }, { a->loser.snapshot_index + UINT64_C (1),
                                        b->loser.snapshot_index + UINT64_C (1) },
    { a->loser.index, b->loser.index }, { a->loser.guest_off, b->loser.guest_off },
  };

  for (unsigned i = 0; i < sizeof keys / sizeof *keys; ++i)
    if (keys[i][0] != keys[i][1])
      return keys[i][0] < keys[i][1] ? -1 : 1;
  return 0;
}

bool
table_fits (const struct checker *k, uint64_t off, uint64_t bytes)
{
  return off != 0 && IS_ALIGNED (off, k->g->cluster_size) && range_fits (off, bytes, k->end);
}

int
check_cancelled (struct checker *k, struct err *err)
{
  return progress_cancelled (k->progress) ? err_set (err, ECANCELED, "the check was cancelled") : 0;
}

static uint64_t
default_memory_limit (void)
{
  long pages = sysconf (_SC_PHYS_PAGES), page_size = sysconf (_SC_PAGESIZE);

  return pages > 0 && page_size > 0 ? (uint64_t) pages * page_size / 4 : UINT64_C (1) << 30;
}

static int
checker_init (struct checker *k, struct bdev *d, const struct check_options *opts,
              struct err *err)
{
  struct check *c = calloc (1, sizeof *c);
  int r;

  memset (k, 0, sizeof *k);
  if (c == NULL)
    return err_set (err, ENOMEM, "out of memory");
  r = findings_init (&c->findings);
  if (r < 0) {
    free (c);
    return err_set (err, -r, "out of memory");
  }
  pthread_mutex_init (&k->bad_lock, NULL);
  k->c = c;
  k->d = d;
  k->g = &c->geom;
  k->progress = opts ? opts->progress : NULL;
  k->deep = opts && opts->deep;
  k->keep_leaks = opts && opts->keep_leaks;
  c->keep_orphans = opts && (opts->keep_orphans || opts->keep_leaks);
  k->memory_limit = opts && opts->memory_limit ? opts->memory_limit : default_memory_limit ();
  c->file_size = bdev_size (d);
  r = ownermap_new (k->memory_limit, &c->owners, err);
  if (r == 0)
    r = ownermap_new (k->memory_limit, &k->meta, err);
  return r;
}

static void
checker_reset (struct checker *k)
{
  ownermap_free (k->meta);
  ownermap_free (k->soft);
  vec_reset (&k->l2.tables);
  free (k->l2.slots);
  free (k->l1);
  vec_reset (&k->followed);
  vec_reset (&k->l1_doubts);
  vec_reset (&k->l2_doubts);
  vec_reset (&k->overlaps);
  vec_reset (&k->bitmap_doubts);
  vec_reset (&k->bitmap_data);
  vec_reset (&k->rt_doubts);
  pthread_mutex_destroy (&k->bad_lock);
}

static int
run_phases (struct checker *k, struct err *err)
{
  static int (*const phases[]) (struct checker *, struct err *) = {
    check_header, check_active_l1, check_snapshots, check_l1_tail, check_l2_close, check_extras,
    check_data, check_deep, check_refcounts, check_contests, check_orphans,
    check_copied_flags,
  };
  int r = 0;

  for (size_t i = 0; i < sizeof phases / sizeof *phases && r == 0; ++i) {
    r = check_cancelled (k, err);
    if (r == 0)
      r = phases[i] (k, err);
    /* Refcounts and COPIED flags depend on it. */
    k->c->incomplete = atomic_load (&k->incomplete);
  }
  return r;
}

int
check_run (struct bdev *d, const struct check_options *opts, struct check **ret,
           struct err *err)
{
  struct checker k;
  int r = checker_init (&k, d, opts, err);

  if (r < 0 && k.c == NULL)
    return r;
  if (r == 0)
    r = run_phases (&k, err);
  checker_reset (&k);
  if (r < 0) {
    check_free (k.c);
    return r;
  }
  findings_finish (&k.c->findings, k.g->cluster_size);
  finish_bad (&k.c->bad);
  if (k.c->conflicts.len)
    qsort (k.c->conflicts.ptr, k.c->conflicts.len, sizeof *k.c->conflicts.ptr, compare_conflicts);
  *ret = k.c;
  return 0;
}

void
check_free (struct check *c)
{
  if (c == NULL)
    return;
  header_reset (&c->header);
  snapshot_vec_reset (&c->snapshots);
  findings_destroy (&c->findings);
  free (c->rt.entries);
  free (c->rt.states);
  ownermap_free (c->owners);
  ownermap_free (c->kept);
  ownermap_free (c->excess);
  vec_reset (&c->bad);
  vec_reset (&c->conflicts);
  vec_reset (&c->bitmaps);
  free (c->backing_name);
  free (c);
}

bool
check_copied (const struct check *c, uint64_t ci)
{
  return ownermap_get (c->owners, ci) == 1 && !(c->kept && ownermap_get (c->kept, ci) > 0);
}

bool
check_sound (const struct check *c)
{
  const uint64_t *n = c->findings.per_severity;
  uint64_t orphans = c->keep_orphans ? orphan_findings (c) : 0;

  return n[SEV_CORRUPT] == orphans && n[SEV_FATAL] == 0;
}
