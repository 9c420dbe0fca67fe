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

int
bad_add (struct checker *k, struct bad_run b, struct err *err)
{
  struct bad_run_vec *v = &k->c->bad;
  struct bad_run *last;

  LOCK_SCOPE (&k->bad_lock);
  last = v->len ? &v->ptr[v->len - 1] : NULL;
  if (last && last->table_host_off == b.table_host_off && last->in_l1 == b.in_l1 &&
      last->snapshot_index == b.snapshot_index && last->why == b.why && last->fix == b.fix &&
      last->index + last->count == b.index) {
    last->count += b.count;
    return 0;
  }
  return bad_run_vec_push (v, b) < 0 ? err_set (err, ENOMEM, "out of memory") : 0;
}

static int
compare_bad (const void *pa, const void *pb)
{
  const struct bad_run *a = pa, *b = pb;

  if (a->table_host_off != b->table_host_off)
    return a->table_host_off < b->table_host_off ? -1 : 1;
  return a->index < b->index ? -1 : a->index > b->index;
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
  pthread_mutex_destroy (&k->bad_lock);
}

static int
run_phases (struct checker *k, struct err *err)
{
  static int (*const phases[]) (struct checker *, struct err *) = {
    check_header, check_active_l1, check_snapshots, check_l2_close, check_extras,
    check_data, check_deep, check_refcounts, check_orphans,
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
  if (k.c->bad.len)
    qsort (k.c->bad.ptr, k.c->bad.len, sizeof *k.c->bad.ptr, compare_bad);
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
