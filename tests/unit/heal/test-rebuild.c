/* The plan of a new refcount structure, against a brute-force idea of the least. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/num.h"
#include "heal/rebuild.h"

static struct geom
make_geom (unsigned cluster_bits, unsigned refcount_order)
{
  struct header h = { .version = 3, .cluster_bits = cluster_bits,
                      .refcount_order = refcount_order };
  struct geom g;

  geom_init (&g, &h);
  return g;
}

static struct ownermap *
make_map (void)
{
  struct ownermap *m;

  assert_int_equal (ownermap_new (1 << 30, &m, NULL), 0);
  return m;
}

static void
use (struct ownermap *m, uint64_t ci, uint64_t n)
{
  assert_int_equal (ownermap_claim (m, ci, n, 1, NULL, NULL), 0);
}

/* Whatever the plan is, it must hold together: nothing placed on a used
 * cluster or twice, every used range described, the table long enough.
 */
static void
assert_consistent (struct ownermap *m, const struct geom *g, const struct rebuild_plan *p)
{
  bool conflict = false;
  uint64_t end;

  assert_int_equal (ownermap_claim (m, p->rt_host_ci, p->rt_clusters, 1, &conflict, NULL), 0);
  for (size_t i = 0; i < p->blocks.len; ++i)
    assert_int_equal (ownermap_claim (m, p->blocks.ptr[i].host_ci, 1, 1, &conflict, NULL), 0);
  assert_false (conflict);
  end = ownermap_end (m);
  assert_true (end <= p->end_ci);
  for (uint64_t ci = 0, k = 0; (ci = ownermap_find (m, ci, end, true)) < end;
       ci = ((ci >> g->rb_bits) + 1) << g->rb_bits, ++k) {
    assert_true (k < p->blocks.len);
    assert_int_equal (p->blocks.ptr[k].index, ci >> g->rb_bits);
    assert_true ((p->blocks.ptr[k].index + 1) * 8 <= p->rt_clusters * g->cluster_size);
  }
  for (uint64_t ci = 0; ci < p->blocks.len; ++ci)
    assert_true (ci == 0 || p->blocks.ptr[ci].index > p->blocks.ptr[ci - 1].index);
}

static struct rebuild_plan
plan (struct ownermap *m, const struct geom *g, uint64_t file_clusters,
      enum rebuild_growth growth)
{
  struct rebuild_plan p;
  struct err err = { 0 };

  if (rebuild_plan (m, g, file_clusters, growth, &p, &err) != 0)
    fail_msg ("%s", err.msg);
  assert_consistent (m, g, &p);
  return p;
}

static void
test_earliest_hole (void **state)
{
  struct geom g = make_geom (16, 4);
  struct ownermap *m = make_map ();
  struct rebuild_plan p;

  use (m, 0, 5);
  use (m, 6, 10);               /* hole at 5 */
  use (m, 18, 82);              /* hole at 16, 17 */
  p = plan (m, &g, 100, REBUILD_FIXED);
  assert_int_equal (p.rt_host_ci, 5);
  assert_int_equal (p.rt_clusters, 1);
  assert_int_equal (p.blocks.len, 1);
  assert_int_equal (p.blocks.ptr[0].host_ci, 16);
  assert_int_equal (p.end_ci, 100);
  rebuild_plan_reset (&p);
  ownermap_free (m);
}

/* A table of several clusters skips the holes that are too small; the blocks fill them. */
static void
test_hole_that_fits (void **state)
{
  struct geom g = make_geom (9, 4);     /* 256 clusters a block, 64 blocks a table cluster */
  struct ownermap *m = make_map ();
  struct rebuild_plan p;
  uint64_t n = 256 * 100;               /* 100 blocks, 2 table clusters */

  use (m, 0, 10);
  use (m, 11, 20 - 11);                 /* hole of one at 10 */
  use (m, 22, 30 - 22);                 /* hole of two at 20 */
  use (m, 200, n - 200);                /* hole of 170 at 30 */
  p = plan (m, &g, n, REBUILD_FIXED);
  assert_int_equal (p.rt_clusters, 2);
  assert_int_equal (p.rt_host_ci, 20);
  assert_int_equal (p.blocks.len, 100);
  assert_int_equal (p.blocks.ptr[0].host_ci, 10);
  assert_int_equal (p.blocks.ptr[1].host_ci, 30);
  rebuild_plan_reset (&p);
  ownermap_free (m);
}

static void
test_grows_only_when_full (void **state)
{
  struct geom g = make_geom (16, 4);
  struct ownermap *m = make_map ();
  struct rebuild_plan p;
  struct err err = { 0 };

  use (m, 0, 50);
  use (m, 51, 49);
  assert_int_equal (rebuild_plan (m, &g, 100, REBUILD_FIXED, &p, &err), -ENOSPC);
  assert_non_null (strstr (err.msg, " 1 more clusters of 65536 bytes"));
  p = plan (m, &g, 100, REBUILD_GROW_IF_FULL);
  assert_int_equal (p.end_ci, 101);
  rebuild_plan_reset (&p);
  ownermap_free (m);
}

/* A wholly free range costs a block of its own, so a later hole in a used range wins. */
static void
test_prefers_ranges_that_have_a_block (void **state)
{
  struct geom g = make_geom (9, 6);     /* 64 clusters a block */
  struct ownermap *m = make_map ();
  struct rebuild_plan p;

  use (m, 0, 64);
  use (m, 128, 50);                     /* range 1 is free, range 2 has room from 178 on */
  p = plan (m, &g, 192, REBUILD_FIXED);
  assert_int_equal (p.rt_host_ci, 178);
  assert_int_equal (p.blocks.len, 2);
  rebuild_plan_reset (&p);
  ownermap_free (m);
}

static void
test_opens_a_range_rather_than_grow (void **state)
{
  struct geom g = make_geom (9, 6);
  struct ownermap *m = make_map ();
  struct rebuild_plan p;

  use (m, 0, 64);
  use (m, 128, 64);
  p = plan (m, &g, 192, REBUILD_GROW_IF_FULL);
  assert_int_equal (p.end_ci, 192);
  assert_int_equal (p.rt_host_ci, 64);
  assert_int_equal (p.blocks.len, 3);
  rebuild_plan_reset (&p);
  ownermap_free (m);
}

/* Sizes at which placing the structure makes the table grow, and growing makes
 * it grow again: 512-byte clusters, everything used.
 */
static void
test_third_round (void **state)
{
  struct geom g = make_geom (9, 6);     /* 64 clusters a block, 64 blocks a table cluster */
  unsigned most = 0;

  for (uint64_t n = 257900; n < 258000; ++n) {
    struct ownermap *m = make_map ();
    struct rebuild_plan p;

    use (m, 0, n);
    p = plan (m, &g, n, REBUILD_GROW_IF_FULL);
    most = MAX (most, p.rounds);
    /* The least: L = blocks + table must describe n + L clusters. */
    assert_int_equal (p.end_ci, n + p.blocks.len + p.rt_clusters);
    assert_int_equal (p.blocks.len, DIV_ROUND_UP (p.end_ci, 64));
    assert_int_equal (p.rt_clusters, DIV_ROUND_UP (p.blocks.len, 64));
    rebuild_plan_reset (&p);
    ownermap_free (m);
  }
  assert_true (most >= 3);
}

/* Holes that may hold evidence stay as they are. */
static void
test_append_leaves_holes (void **state)
{
  struct geom g = make_geom (9, 6);
  struct ownermap *m = make_map ();
  struct rebuild_plan p;

  use (m, 0, 1);
  use (m, 40, 10);
  p = plan (m, &g, 130, REBUILD_APPEND);
  assert_int_equal (p.rt_host_ci, 130);
  for (size_t i = 0; i < p.blocks.len; ++i)
    assert_true (p.blocks.ptr[i].host_ci > 130);
  /* Range 0 is used, range 2 holds the structure. */
  assert_int_equal (p.blocks.len, 2);
  assert_int_equal (p.end_ci, 133);
  rebuild_plan_reset (&p);
  ownermap_free (m);
}

static void
test_nothing_used (void **state)
{
  struct geom g = make_geom (12, 0);
  struct ownermap *m = make_map ();
  struct rebuild_plan p = plan (m, &g, 0, REBUILD_GROW_IF_FULL);

  assert_int_equal (p.end_ci, 2);
  assert_int_equal (p.blocks.len, 1);
  rebuild_plan_reset (&p);
  ownermap_free (m);
}

static void
test_table_too_large (void **state)
{
  struct geom g = make_geom (9, 6);
  struct ownermap *m = make_map ();
  struct rebuild_plan p;
  struct err err = { 0 };

  use (m, UINT64_C (1) << 44, 1);
  assert_int_equal (rebuild_plan (m, &g, UINT64_C (1) << 45, REBUILD_GROW_IF_FULL, &p, &err), -EFBIG);
  ownermap_free (m);
}

/* The fewest clusters for any placement, found the slow way: B >= ranges that
 * anything uses, and the placed clusters must fit in the free ones of B ranges.
 */
static uint64_t
lower_bound (struct ownermap *m, const struct geom *g, uint64_t file_clusters)
{
  uint64_t used = 0, room = 0, top = 0;
  uint64_t nr = DIV_ROUND_UP (file_clusters, g->rb_entries);

  for (uint64_t r = 0; r < nr; ++r) {
    uint64_t start = r * g->rb_entries, end = MIN (start + g->rb_entries, file_clusters);

    if (ownermap_find (m, start, end, true) == end)
      continue;
    used++;
    top = r;
    for (uint64_t ci = start; ci < end; ++ci)
      room += ownermap_get (m, ci) == 0;
  }
  for (uint64_t opened = 0;; ++opened) {
    uint64_t blocks = used + opened;
    uint64_t need = blocks + DIV_ROUND_UP ((top + 1) * 8, g->cluster_size);

    if (need <= room + opened * g->rb_entries)
      return need;
  }
}

static void
test_random_maps_take_the_least (void **state)
{
  srandom (7);
  for (unsigned round = 0; round < 400; ++round) {
    /* The table is one cluster here, so that no question of contiguous holes
     * blurs the bound.
     */
    struct geom g = make_geom (9, 3 + random () % 4);
    uint64_t n = g.rb_entries * (1 + random () % 40);
    struct ownermap *m = make_map ();
    struct rebuild_plan p;
    uint64_t least;

    use (m, 0, 1);
    for (uint64_t ci = 1; ci < n; ) {
      uint64_t len = MIN (n - ci, 1 + (uint64_t) random () % (g.rb_entries * 2));

      if (random () % 3)
        use (m, ci, len);
      ci += len;
    }
    least = lower_bound (m, &g, n);
    if (rebuild_plan (m, &g, n, REBUILD_FIXED, &p, NULL) == 0) {
      assert_consistent (m, &g, &p);
      assert_int_equal (p.blocks.len + p.rt_clusters, least);
      rebuild_plan_reset (&p);
    }
    ownermap_free (m);
  }
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_earliest_hole),
    cmocka_unit_test (test_hole_that_fits),
    cmocka_unit_test (test_grows_only_when_full),
    cmocka_unit_test (test_prefers_ranges_that_have_a_block),
    cmocka_unit_test (test_opens_a_range_rather_than_grow),
    cmocka_unit_test (test_third_round),
    cmocka_unit_test (test_append_leaves_holes),
    cmocka_unit_test (test_nothing_used),
    cmocka_unit_test (test_table_too_large),
    cmocka_unit_test (test_random_maps_take_the_least),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
