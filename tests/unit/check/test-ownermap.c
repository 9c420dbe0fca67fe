/* The reference map against a plain array, alone and with several threads. */
#include "unit/unit.h"

#include <pthread.h>
#include <stdatomic.h>

#include "base/num.h"
#include "check/ownermap.h"

#define NO_LIMIT UINT64_MAX

static struct ownermap *
new_map (uint64_t limit)
{
  struct ownermap *m;
  struct err err = { 0 };

  assert_ok (ownermap_new (limit, &m, &err), &err);
  return m;
}

static void
claim (struct ownermap *m, uint64_t ci, uint64_t n, uint64_t weight, bool want_conflict)
{
  struct err err = { 0 };
  bool conflict = false;

  assert_ok (ownermap_claim (m, ci, n, weight, &conflict, &err), &err);
  assert_int_equal (conflict, want_conflict);
}

static void
test_empty (void **state)
{
  struct ownermap *m = new_map (NO_LIMIT);
  uint64_t far = UINT64_C (1) << 55;

  assert_int_equal (ownermap_get (m, 0), 0);
  assert_int_equal (ownermap_get (m, far), 0);
  assert_int_equal (ownermap_get (m, UINT64_MAX), 0);
  assert_int_equal (ownermap_word (m, 64), 0);
  assert_int_equal (ownermap_end (m), 0);
  assert_int_equal (ownermap_find (m, 0, far, true), far);
  assert_int_equal (ownermap_find (m, 5, far, false), 5);
  assert_int_equal (ownermap_find (m, 5, UINT64_MAX, true), UINT64_MAX);
  assert_int_equal (ownermap_find (m, 5, 5, false), 5);
  assert_false (ownermap_any_shared (m));
  claim (m, 7, 0, 1, false);
  claim (m, 7, 1, 0, false);
  assert_int_equal (ownermap_end (m), 0);
  ownermap_free (m);
  ownermap_free (NULL);
}

static void
test_counts (void **state)
{
  struct ownermap *m = new_map (NO_LIMIT);

  claim (m, 10, 1, 1, false);
  assert_int_equal (ownermap_get (m, 10), 1);
  assert_false (ownermap_any_shared (m));
  claim (m, 10, 1, 1, true);
  assert_int_equal (ownermap_get (m, 10), 2);
  assert_true (ownermap_any_shared (m));
  claim (m, 10, 1, 1, true);
  assert_int_equal (ownermap_get (m, 10), 3);
  claim (m, 10, 1, 70000, true);                /* widens the page of counts */
  assert_int_equal (ownermap_get (m, 10), 70003);
  claim (m, 10, 1, UINT64_MAX, true);           /* and it saturates */
  assert_int_equal (ownermap_get (m, 10), UINT64_MAX);
  claim (m, 11, 2, 65536, false);
  claim (m, 9, 5, 2, true);
  assert_int_equal (ownermap_get (m, 9), 2);
  assert_int_equal (ownermap_get (m, 11), 65538);
  assert_int_equal (ownermap_get (m, 12), 65538);
  assert_int_equal (ownermap_get (m, 13), 2);
  assert_int_equal (ownermap_word (m, 0) >> 18, 2 | 3 << 2 | 3 << 4 | 3 << 6 | 2 << 8);
  ownermap_free (m);
}

static void
test_unclaim (void **state)
{
  struct ownermap *m = new_map (NO_LIMIT);

  claim (m, 100, 1, 5, false);
  for (uint64_t n = 5; n-- > 0;) {
    ownermap_unclaim (m, 100);
    assert_int_equal (ownermap_get (m, 100), n);
    assert_int_equal (ownermap_any_shared (m), n > 1);
    assert_int_equal (ownermap_end (m), n ? 101 : 0);
  }
  claim (m, 100, 1, 4, false);                  /* no memory of the old count */
  assert_int_equal (ownermap_get (m, 100), 4);
  ownermap_free (m);
}

/* A map of 2^63 bytes of clusters must be walked in no time. */
static void
test_far (void **state)
{
  struct ownermap *m = new_map (NO_LIMIT);
  uint64_t far = (UINT64_C (1) << 55) - 3;

  claim (m, far, 6, 1, false);                  /* across a boundary of all levels */
  claim (m, 3, 1, 1, false);
  assert_int_equal (ownermap_find (m, 4, UINT64_C (1) << 58, true), far);
  assert_int_equal (ownermap_find (m, far, UINT64_C (1) << 58, false), far + 6);
  assert_int_equal (ownermap_find (m, far + 6, UINT64_C (1) << 58, true), UINT64_C (1) << 58);
  assert_int_equal (ownermap_end (m), far + 6);
  assert_true (ownermap_memory (m) < 200 * 1024);
  for (unsigned i = 0; i < 6; ++i)
    assert_int_equal (ownermap_get (m, far + i), 1);
  ownermap_free (m);
}

static void
test_memory_limit (void **state)
{
  struct ownermap *m = new_map (100 * 1024);
  struct err err = { 0 };
  uint64_t ci = 0;
  int r = 0;

  while (r == 0 && ci < UINT64_C (1) << 40) {
    r = ownermap_claim (m, ci, 1, 1, NULL, &err);
    ci += UINT64_C (1) << 24;
  }
  assert_int_equal (r, -ENOMEM);
  assert_non_null (strstr (err.msg, "102400 bytes"));
  assert_true (ownermap_memory (m) <= 100 * 1024);
  ownermap_free (m);
}

/* --- against a model */

#define MODEL_CLUSTERS 4096

struct model {
  uint64_t base;
  uint64_t count[MODEL_CLUSTERS];
};

static void
compare_with_model (struct ownermap *m, const struct model *mo)
{
  uint64_t used = UINT64_MAX, unused = UINT64_MAX, counts[32];

  for (uint64_t i = MODEL_CLUSTERS; i-- > 0;) {
    uint64_t ci = mo->base + i, end = mo->base + MODEL_CLUSTERS;

    assert_int_equal (ownermap_get (m, ci), mo->count[i]);
    *(mo->count[i] ? &used : &unused) = ci;
    assert_int_equal (ownermap_find (m, ci, end, true), MIN (used, end));
    assert_int_equal (ownermap_find (m, ci, end, false), MIN (unused, end));
    if (ci % 32 == 0) {
      uint64_t word = ownermap_word (m, ci);

      ownermap_counts (m, ci, counts);
      for (unsigned j = 0; j < 32; ++j) {
        assert_int_equal (word >> 2 * j & 3, MIN (mo->count[i + j], 3));
        assert_int_equal (counts[j], mo->count[i + j]);
      }
    }
  }
}

static void
random_step (struct ownermap *m, struct model *mo, uint64_t *seed)
{
  static const uint64_t weights[] = { 1, 1, 1, 1, 2, 2, 3, 40000, 1000000 };
  uint64_t i = test_random (seed) % MODEL_CLUSTERS;
  uint64_t n = test_random (seed) % 3 ? test_random (seed) % 100 : 1, weight;
  bool conflict = false;

  n = MIN (n, MODEL_CLUSTERS - i);
  if (test_random (seed) % 3 == 0) {
    for (; n > 0; --n, ++i)
      if (mo->count[i]) {
        ownermap_unclaim (m, mo->base + i);
        mo->count[i]--;
      }
    return;
  }
  weight = weights[test_random (seed) % 9];
  for (uint64_t j = 0; j < n; ++j) {
    conflict |= mo->count[i + j] != 0;
    mo->count[i + j] += weight;
  }
  claim (m, mo->base + i, n, weight, conflict);
}

static void
test_random_model (void **state)
{
  /* At the start, across a chunk, across a node, and far out. */
  static struct model models[4] = {
    { .base = 0 }, { .base = (1 << 14) * 3 - 2048 }, { .base = (UINT64_C (1) << 23) * 5 - 2048 },
    { .base = (UINT64_C (1) << 55) - 2048 },
  };
  struct ownermap *m = new_map (NO_LIMIT);
  uint64_t seed = 1;

  for (unsigned round = 0; round < 20; ++round) {
    uint64_t end = 0;
    bool shared = false;

    for (unsigned i = 0; i < 200; ++i)
      random_step (m, &models[test_random (&seed) % 4], &seed);
    for (unsigned i = 0; i < 4; ++i) {
      compare_with_model (m, &models[i]);
      for (uint64_t j = 0; j < MODEL_CLUSTERS; ++j) {
        shared |= models[i].count[j] > 1;
        if (models[i].count[j])
          end = models[i].base + j + 1;
      }
    }
    assert_int_equal (ownermap_end (m), end);
    assert_int_equal (ownermap_any_shared (m), shared);
  }
  ownermap_free (m);
}

/* --- threads */

#define THREADS 4
#define SPACE   (UINT64_C (1) << 16)

struct worker {
  struct ownermap *m;
  uint64_t seed;
  uint32_t *count;              /* what this thread claimed, of SPACE clusters */
  pthread_t thread;
};

static void *
work (void *opaque)
{
  struct worker *w = opaque;

  for (unsigned i = 0; i < 20000; ++i) {
    uint64_t n = test_random (&w->seed) % 64 + 1;
    uint64_t ci = test_random (&w->seed) % (SPACE - n);
    uint64_t weight = test_random (&w->seed) % 16 ? 1 : 1 + test_random (&w->seed) % 30000;

    if (ownermap_claim (w->m, ci, n, weight, NULL, NULL) < 0)
      abort ();
    for (uint64_t j = 0; j < n; ++j)
      w->count[ci + j] += weight;
  }
  return NULL;
}

static void
test_threads (void **state)
{
  struct ownermap *m = new_map (NO_LIMIT);
  struct worker w[THREADS];

  for (unsigned i = 0; i < THREADS; ++i) {
    w[i] = (struct worker) { .m = m, .seed = i + 1, .count = calloc (SPACE, 4) };
    assert_int_equal (pthread_create (&w[i].thread, NULL, work, &w[i]), 0);
  }
  for (unsigned i = 0; i < THREADS; ++i)
    pthread_join (w[i].thread, NULL);
  for (uint64_t ci = 0; ci < SPACE; ++ci) {
    uint64_t sum = 0;

    for (unsigned i = 0; i < THREADS; ++i)
      sum += w[i].count[ci];
    assert_int_equal (ownermap_get (m, ci), sum);
  }
  for (unsigned i = 0; i < THREADS; ++i)
    free (w[i].count);
  ownermap_free (m);
}

struct racer {
  struct ownermap *m;
  atomic_uint *go;
  uint64_t conflicts;
  pthread_t thread;
};

static void *
race (void *opaque)
{
  struct racer *r = opaque;

  atomic_fetch_add (r->go, 1);
  while (atomic_load (r->go) < THREADS)
    ;
  for (uint64_t ci = 0; ci < SPACE; ++ci) {
    bool conflict = false;

    if (ownermap_claim (r->m, ci << 4, 1, 1, &conflict, NULL) < 0)
      abort ();
    r->conflicts += conflict;
  }
  return NULL;
}

/* However threads meet, exactly one of them is told that a cluster was free. */
static void
test_conflict_is_seen_once (void **state)
{
  struct ownermap *m = new_map (NO_LIMIT);
  struct racer r[THREADS];
  atomic_uint go = 0;
  uint64_t conflicts = 0;

  for (unsigned i = 0; i < THREADS; ++i) {
    r[i] = (struct racer) { .m = m, .go = &go };
    assert_int_equal (pthread_create (&r[i].thread, NULL, race, &r[i]), 0);
  }
  for (unsigned i = 0; i < THREADS; ++i) {
    pthread_join (r[i].thread, NULL);
    conflicts += r[i].conflicts;
  }
  assert_int_equal (conflicts, SPACE * (THREADS - 1));
  for (uint64_t ci = 0; ci < SPACE; ++ci)
    assert_int_equal (ownermap_get (m, ci << 4), THREADS);
  ownermap_free (m);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_empty),
    cmocka_unit_test (test_counts),
    cmocka_unit_test (test_unclaim),
    cmocka_unit_test (test_far),
    cmocka_unit_test (test_memory_limit),
    cmocka_unit_test (test_random_model),
    cmocka_unit_test (test_threads),
    cmocka_unit_test (test_conflict_is_seen_once),
  };

  return cmocka_run_group_tests_name ("ownermap", tests, NULL, NULL);
}
