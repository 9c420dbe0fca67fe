/* The list of findings: see finding.h.
 *
 * Callbacks of several threads add findings in any order, and a hostile image
 * can have one for each of its entries.  So neighbours are joined three times:
 * in the thread that sees them (finding_batch), against the last run of the
 * kind, and once more when everything is sorted.  Each kind keeps at most
 * twice FINDINGS_PER_KIND runs: then its runs are sorted and joined, and if too
 * many are left, those with the highest places go.  From then on nothing behind
 * the last one kept is stored, which makes the result independent of the order
 * of arrival.  Totals count everything.
 *
 * Deliberately not here: words (report.c), and any decision what to do.
 */
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "check/finding.h"

const struct finding_kind finding_kinds[NR_FINDINGS] = {
#define FINDING(code, name, severity, level, unit, title, advice) \
  [FINDING_##name] = { #code, #name, severity, level, unit, title, advice },
#include "check/findings.def"
#undef FINDING
};

int
findings_init (struct findings *fs)
{
  memset (fs, 0, sizeof *fs);
  return -pthread_mutex_init (&fs->lock, NULL);
}

void
findings_destroy (struct findings *fs)
{
  for (int id = 0; id < NR_FINDINGS; ++id)
    vec_reset (&fs->pending[id]);
  vec_reset (&fs->runs);
  pthread_mutex_destroy (&fs->lock);
}

/* --- order and joining */

static int
compare_u64 (uint64_t a, uint64_t b)
{
  return a < b ? -1 : a > b;
}

/* By kind, snapshot and place; complete, so that the order is always the same. */
static int
compare (const void *pa, const void *pb)
{
  const struct finding *a = pa, *b = pb;
  bool by_host = finding_kinds[a->id].unit == UNIT_CLUSTERS;
  int r = compare_u64 (a->id, b->id);

  if (r == 0)
    r = (a->snapshot_index > b->snapshot_index) - (a->snapshot_index < b->snapshot_index);
  if (r == 0)
    r = by_host ? compare_u64 (a->host_off, b->host_off) : compare_u64 (a->index, b->index);
  if (r == 0)
    r = compare_u64 (a->guest_off, b->guest_off);
  if (r == 0)
    r = compare_u64 (a->host_off, b->host_off);
  if (r == 0)
    r = compare_u64 (a->found, b->found);
  if (r == 0)
    r = compare_u64 (a->expected, b->expected);
  return r ? r : compare_u64 (a->count, b->count);
}

/* Does b begin where a ends? */
static bool
continues (const struct finding *a, const struct finding *b, uint64_t cluster_size)
{
  if (a->id != b->id || a->snapshot_index != b->snapshot_index)
    return false;
  if (a->guest_off != FINDING_NO_OFF || b->guest_off != FINDING_NO_OFF)
    if (a->guest_off == FINDING_NO_OFF || a->guest_off + a->guest_len != b->guest_off)
      return false;
  switch (finding_kinds[a->id].unit) {
  case UNIT_CLUSTERS:
    return a->host_off != FINDING_NO_OFF && a->host_off + a->count * cluster_size == b->host_off;
  case UNIT_ENTRIES:
    return a->index + a->count == b->index;
  case UNIT_ONE:
    break;
  }
  return false;
}

static void
extend (struct finding *a, const struct finding *b)
{
  a->count += b->count;
  if (a->guest_off != FINDING_NO_OFF)
    a->guest_len += b->guest_len;
}

static void
sort_and_join (struct finding_vec *v, uint64_t cluster_size)
{
  size_t n = 0;

  if (v->len == 0)
    return;
  qsort (v->ptr, v->len, sizeof *v->ptr, compare);
  for (size_t i = 1; i < v->len; ++i)
    if (continues (&v->ptr[n], &v->ptr[i], cluster_size))
      extend (&v->ptr[n], &v->ptr[i]);
    else
      v->ptr[++n] = v->ptr[i];
  v->len = n + 1;
}

/* --- adding */

static void
limit_kind (struct findings *fs, enum finding_id id, uint64_t cluster_size)
{
  struct finding_vec *v = &fs->pending[id];

  sort_and_join (v, cluster_size);
  if (v->len > FINDINGS_PER_KIND) {
    v->len = FINDINGS_PER_KIND;
    fs->bound[id] = v->ptr[v->len - 1];
    fs->dropped[id] = true;
    fs->truncated = true;
  }
}

static int
add_run_locked (struct findings *fs, const struct finding *f, uint64_t cluster_size)
{
  struct finding_vec *v = &fs->pending[f->id];

  if (fs->dropped[f->id] && compare (f, &fs->bound[f->id]) > 0)
    return 0;
  if (v->len > 0 && continues (&v->ptr[v->len - 1], f, cluster_size)) {
    extend (&v->ptr[v->len - 1], f);
    return 0;
  }
  if (v->len >= 2 * FINDINGS_PER_KIND)
    limit_kind (fs, f->id, cluster_size);
  return finding_vec_push (v, *f);
}

int
finding_add (struct findings *fs, const struct finding *f, uint64_t cluster_size)
{
  assert (f->id < NR_FINDINGS && f->count > 0);
  LOCK_SCOPE (&fs->lock);
  fs->totals[f->id] += f->count;
  fs->per_severity[finding_kinds[f->id].severity] += f->count;
  return add_run_locked (fs, f, cluster_size);
}

int
findings_move (struct findings *fs, struct findings *src, uint64_t cluster_size)
{
  int r = 0;

  LOCK_SCOPE (&fs->lock);
  for (int id = 0; id < NR_FINDINGS && r == 0; ++id) {
    struct finding_vec *v = &src->pending[id];

    fs->totals[id] += src->totals[id];
    fs->per_severity[finding_kinds[id].severity] += src->totals[id];
    src->totals[id] = 0;
    fs->truncated |= src->dropped[id];
    for (size_t i = 0; i < v->len && r == 0; ++i)
      r = add_run_locked (fs, &v->ptr[i], cluster_size);
    v->len = 0;
  }
  memset (src->per_severity, 0, sizeof src->per_severity);
  return r;
}

void
findings_finish (struct findings *fs, uint64_t cluster_size)
{
  LOCK_SCOPE (&fs->lock);
  for (int id = 0; id < NR_FINDINGS; ++id) {
    struct finding_vec *v = &fs->pending[id];

    limit_kind (fs, id, cluster_size);
    if (v->len && finding_vec_reserve (&fs->runs, v->len) < 0)
      fs->truncated = true;     /* out of memory: the totals still stand */
    else if (v->len) {
      memcpy (fs->runs.ptr + fs->runs.len, v->ptr, v->len * sizeof *v->ptr);
      fs->runs.len += v->len;
      fs->nr_runs[id] += v->len;
    }
    vec_reset (v);
  }
}

bool
findings_any (const struct findings *fs, enum severity at_least)
{
  for (int s = at_least; s < NR_SEVERITIES; ++s)
    if (fs->per_severity[s])
      return true;
  return false;
}

/* --- batches */

_Static_assert (NR_FINDINGS <= 64, "finding_batch.used has a bit for each kind");

void
finding_batch_init (struct finding_batch *b, struct findings *fs, uint64_t cluster_size)
{
  b->fs = fs;
  b->cluster_size = cluster_size;
  b->used = 0;
}

int
finding_batch_add (struct finding_batch *b, const struct finding *f)
{
  struct finding *run = &b->run[f->id];
  uint64_t bit = UINT64_C (1) << f->id;
  int r = 0;

  if ((b->used & bit) && continues (run, f, b->cluster_size)) {
    extend (run, f);
    return 0;
  }
  if (b->used & bit)
    r = finding_add (b->fs, run, b->cluster_size);
  *run = *f;
  b->used |= bit;
  return r;
}

int
finding_batch_flush (struct finding_batch *b)
{
  int r = 0;

  for (; b->used && r == 0; b->used &= b->used - 1)
    r = finding_add (b->fs, &b->run[__builtin_ctzll (b->used)], b->cluster_size);
  return r;
}
