/* The values in the refcount blocks against the references that were counted.
 *
 * 32 clusters at a time: where they all have the same few references, which is
 * nearly everywhere, their part of the block is compared as bytes with a
 * pattern.  Only what differs is looked at one by one.
 *
 * A block that cannot be read is lost, and then its own cluster is referenced
 * no more.  Another block may already have been compared as if it were, so the
 * comparison is made again without the lost ones.  It is rare, and devices that
 * fail differently each time get no more than MAX_ATTEMPTS.
 *
 * Deliberately not here: setting anything right.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "check/check-int.h"
#include "fmt/refbits.h"

#define GROUP        32u                /* clusters: a word of the owner map */
#define MAX_ATTEMPTS 3
#define LOW_BITS     UINT64_C (0x5555555555555555)

struct comparison {
  struct checker *k;
  const uint64_t *rt_index;     /* of each block that is compared */
  uint64_t file_clusters;
  size_t group_bytes;           /* GROUP refcounts */
  uint8_t pattern[3][GROUP * 8];        /* GROUP refcounts of 0, 1, 2 */
  struct findings findings;
  _Atomic uint64_t end_ci;
  pthread_mutex_t lock;
  struct u64_vec failed;        /* protected by lock: refcount table entries */
};

static void
raise_end (struct comparison *cmp, uint64_t ci)
{
  uint64_t old = atomic_load (&cmp->end_ci);

  while (ci + 1 > old && !atomic_compare_exchange_weak (&cmp->end_ci, &old, ci + 1))
    ;
}

static int
value_finding (struct comparison *cmp, struct finding_batch *b, enum finding_id id, uint64_t ci,
               uint64_t found, uint64_t expected)
{
  unsigned bits = cmp->k->g->cluster_bits;
  struct finding f = {
    .id = id, .snapshot_index = FINDING_ACTIVE, .guest_off = FINDING_NO_OFF,
    .host_off = ci <= UINT64_MAX >> bits ? ci << bits : FINDING_NO_OFF,
    .found = found, .expected = expected, .count = 1,
  };

  return finding_batch_add (b, &f);
}

/* More refcount than references. */
static int
compare_high (struct comparison *cmp, struct finding_batch *b, uint64_t ci, uint64_t stored,
              uint64_t refs, struct err *err)
{
  struct checker *k = cmp->k;
  int r;

  if (ci >= cmp->file_clusters)
    return value_finding (cmp, b, FINDING_REFCOUNT_PAST_END, ci, stored, refs);
  raise_end (cmp, ci);
  if (refs == 0 && k->soft && ownermap_get (k->soft, ci) > 0)
    return ownermap_claim (k->c->owners, ci, 1, stored, NULL, err);
  r = ownermap_claim (k->c->excess, ci, 1, refs ? EXCESS_REFERENCED : EXCESS_ORPHAN, NULL, err);
  if (r == 0 && k->c->kept)
    r = ownermap_claim (k->c->kept, ci, 1, 1, NULL, err);
  if (r < 0)
    return r;
  return value_finding (cmp, b, FINDING_REFCOUNT_HIGH, ci, stored, refs);
}

static int
compare_one (struct comparison *cmp, struct finding_batch *b, uint64_t ci, uint64_t stored,
             uint64_t refs, struct err *err)
{
  uint64_t right = MIN (refs, cmp->k->g->refcount_max);
  int r = 0;

  if (refs > right)
    r = value_finding (cmp, b, FINDING_REFCOUNT_OVERFLOW, ci, stored, refs);
  if (r == 0 && stored < right)
    r = value_finding (cmp, b, FINDING_REFCOUNT_LOW, ci, stored, right);
  if (r == 0 && stored > right)
    r = compare_high (cmp, b, ci, stored, refs, err);
  return r;
}

static int
compare_group (struct comparison *cmp, struct finding_batch *b, uint64_t ci, const uint8_t *buf,
               uint64_t first, struct err *err)
{
  uint64_t refs[GROUP];
  int r = 0;

  ownermap_counts (cmp->k->c->owners, ci, refs);
  for (unsigned i = 0; i < GROUP && r == 0; ++i) {
    uint64_t stored = refbits_get (buf, cmp->k->g->refcount_order, first + i);

    if (stored != refs[i])
      r = compare_one (cmp, b, ci + i, stored, refs[i], err);
  }
  return r;
}

static int
compare_block (struct checker *k, void *opaque, size_t n, const uint8_t *buf, int r,
               struct err *err)
{
  struct comparison *cmp = opaque;
  uint64_t ci = cmp->rt_index[n] << k->g->rb_bits;
  struct finding_batch b;

  if (r < 0) {
    LOCK_SCOPE (&cmp->lock);
    r = u64_vec_push (&cmp->failed, cmp->rt_index[n]);
    return r < 0 ? err_set (err, ENOMEM, "out of memory") : 0;
  }
  finding_batch_init (&b, &cmp->findings, k->g->cluster_size);
  for (uint64_t i = 0; i < k->g->rb_entries && r == 0; i += GROUP) {
    uint64_t word = ownermap_word (k->c->owners, ci + i), state = word & 3;

    if (word != state * LOW_BITS || state > MIN (2, k->g->refcount_max) ||
        memcmp (buf + i / GROUP * cmp->group_bytes, cmp->pattern[state], cmp->group_bytes) != 0)
      r = compare_group (cmp, &b, ci + i, buf, i, err);
  }
  if (r == 0)
    r = finding_batch_flush (&b);
  return r < 0 ? err_set (err, -r, "out of memory") : 0;
}

/* --- all blocks */

static int
comparison_init (struct comparison *cmp, struct checker *k, struct err *err)
{
  unsigned order = k->g->refcount_order;

  memset (cmp, 0, sizeof *cmp);
  cmp->k = k;
  cmp->file_clusters = k->end >> k->g->cluster_bits;
  cmp->group_bytes = (GROUP << order) / 8;
  for (uint64_t v = 0; v <= MIN (2, k->g->refcount_max); ++v)
    for (unsigned i = 0; i < GROUP; ++i)
      refbits_set (cmp->pattern[v], order, i, v);
  pthread_mutex_init (&cmp->lock, NULL);
  if (findings_init (&cmp->findings) == 0)
    return 0;
  pthread_mutex_destroy (&cmp->lock);
  return err_set (err, ENOMEM, "out of memory");
}

static void
comparison_reset (struct comparison *cmp)
{
  vec_reset (&cmp->failed);
  findings_destroy (&cmp->findings);
  pthread_mutex_destroy (&cmp->lock);
}

static int
compare_sound (struct comparison *cmp, struct err *err)
{
  const struct rt_state *rt = &cmp->k->c->rt;
  struct u64_vec index = VEC_INIT, offs = VEC_INIT;
  int r = 0;

  for (uint64_t i = 0; i < rt->nr_entries && r == 0; ++i)
    if (rt->states[i] == RB_SOUND) {
      r = u64_vec_push (&index, i);
      if (r == 0)
        r = u64_vec_push (&offs, rt->entries[i] & RTE_OFF_MASK);
    }
  cmp->rt_index = index.ptr;
  if (r < 0)
    r = err_set (err, ENOMEM, "out of memory");
  else if (index.len)
    r = read_clusters (cmp->k, offs.ptr, offs.len, "refcounts", compare_block, cmp, err);
  vec_reset (&index);
  vec_reset (&offs);
  return r;
}

static int
lose_blocks (struct checker *k, const struct u64_vec *failed, struct err *err)
{
  struct rt_state *rt = &k->c->rt;
  int r = 0;

  for (size_t i = 0; i < failed->len && r == 0; ++i) {
    uint64_t index = failed->ptr[i];

    rt->states[index] = RB_LOST;
    ownermap_unclaim (k->c->owners, rt->entries[index] >> k->g->cluster_bits);
    r = rt_entry_finding (k, FINDING_RB_UNREADABLE, index, err);
  }
  return r;
}

int
compare_refcounts (struct checker *k, uint64_t *end_ci, struct err *err)
{
  bool again = true;
  int r = 0;

  for (unsigned attempt = 1; again && r == 0; ++attempt) {
    struct comparison cmp;

    r = comparison_init (&cmp, k, err);
    if (r < 0)
      return r;
    ownermap_free (k->c->excess);
    k->c->excess = NULL;
    r = ownermap_new (k->memory_limit, &k->c->excess, err);
    if (r == 0)
      r = compare_sound (&cmp, err);
    again = cmp.failed.len > 0 && attempt < MAX_ATTEMPTS;
    if (r == 0)
      r = lose_blocks (k, &cmp.failed, err);
    if (r == 0 && !again && findings_move (&k->c->findings, &cmp.findings,
                                           k->g->cluster_size) < 0)
      r = err_set (err, ENOMEM, "out of memory");
    *end_ci = MAX (*end_ci, atomic_load (&cmp.end_ci));
    comparison_reset (&cmp);
  }
  return r;
}
