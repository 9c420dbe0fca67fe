/* The table of findings, and how runs are joined, ordered and capped. */
#include "unit/unit.h"

#include <ctype.h>
#include <pthread.h>

#include "base/num.h"
#include "check/finding.h"

#define CS UINT64_C (65536)

static struct finding
clusters (enum finding_id id, uint64_t ci, uint64_t n)
{
  return (struct finding) { .id = id, .snapshot_index = FINDING_ACTIVE, .host_off = ci * CS,
                            .guest_off = FINDING_NO_OFF, .count = n };
}

static struct finding
entries (enum finding_id id, int32_t snapshot, uint64_t index, uint64_t n)
{
  return (struct finding) { .id = id, .snapshot_index = snapshot, .host_off = 0x50000,
                            .guest_off = index * CS, .guest_len = n * CS, .index = index,
                            .found = 0x8000 + index, .count = n };
}

static void
add (struct findings *fs, struct finding f)
{
  assert_int_equal (finding_add (fs, &f, CS), 0);
}

static void
test_table (void **state)
{
  static const char letters[] = "HTCSXROD";
  unsigned letter = 0;
  int number = 0;

  for (int id = 0; id < NR_FINDINGS; ++id) {
    const struct finding_kind *k = &finding_kinds[id];

    assert_int_equal (strlen (k->code), 3);
    assert_true (isdigit (k->code[1]) && isdigit (k->code[2]));
    if (k->code[0] != letters[letter]) {        /* the next letter, never back */
      while (letters[letter] && letters[letter] != k->code[0])
        ++letter;
      assert_true (letters[letter] != '\0');
      number = 0;
    }
    assert_true (atoi (k->code + 1) > number);  /* unique and ascending */
    number = atoi (k->code + 1);
    assert_true (strlen (k->title) > 10 && strlen (k->advice) > 10);
    assert_true (k->title[strlen (k->title) - 1] != '.');
    assert_true (k->name && isupper (k->name[0]));
    assert_true (k->severity < NR_SEVERITIES && k->level <= REPAIR_NEVER);
    for (int other = 0; other < id; ++other)
      assert_string_not_equal (k->name, finding_kinds[other].name);
  }
}

static void
test_joined_in_any_order (void **state)
{
  static const unsigned order[] = { 4, 0, 9, 2, 7, 1, 3, 8, 6, 5 };
  struct findings fs;

  assert_int_equal (findings_init (&fs), 0);
  for (unsigned i = 0; i < 10; ++i)
    add (&fs, clusters (FINDING_REFCOUNT_LOW, 100 + order[i], 1));
  add (&fs, clusters (FINDING_REFCOUNT_LOW, 111, 2));   /* one cluster is between */
  add (&fs, clusters (FINDING_REFCOUNT_HIGH, 110, 1));  /* of another kind */
  findings_finish (&fs, CS);
  assert_int_equal (fs.runs.len, 3);
  assert_int_equal (fs.runs.ptr[0].host_off, 100 * CS);
  assert_int_equal (fs.runs.ptr[0].count, 10);
  assert_int_equal (fs.runs.ptr[1].host_off, 111 * CS);
  assert_int_equal (fs.runs.ptr[2].id, FINDING_REFCOUNT_HIGH);
  assert_int_equal (fs.totals[FINDING_REFCOUNT_LOW], 12);
  assert_int_equal (fs.nr_runs[FINDING_REFCOUNT_LOW], 2);
  assert_int_equal (fs.per_severity[SEV_CORRUPT], 12);
  assert_int_equal (fs.per_severity[SEV_LEAK], 1);
  assert_true (findings_any (&fs, SEV_CORRUPT));
  assert_false (findings_any (&fs, SEV_FATAL));
  assert_true (findings_has (&fs, FINDING_REFCOUNT_HIGH));
  assert_false (findings_has (&fs, FINDING_DIRTY));
  assert_false (fs.truncated);
  findings_destroy (&fs);
}

static void
test_entries_join_by_index_and_guest (void **state)
{
  struct finding gap = entries (FINDING_L2_ENTRY_OUTSIDE, FINDING_ACTIVE, 7, 1);
  struct findings fs;

  assert_int_equal (findings_init (&fs), 0);
  add (&fs, entries (FINDING_L2_ENTRY_OUTSIDE, FINDING_ACTIVE, 5, 2));
  gap.guest_off += CS;                          /* the index adjoins, the guest does not */
  add (&fs, gap);
  add (&fs, entries (FINDING_L2_ENTRY_OUTSIDE, 0, 20, 3));
  add (&fs, entries (FINDING_L2_ENTRY_OUTSIDE, 1, 23, 1));      /* another snapshot */
  add (&fs, entries (FINDING_L2_ENTRY_OUTSIDE, 1, 24, 4));
  findings_finish (&fs, CS);
  assert_int_equal (fs.runs.len, 4);
  assert_int_equal (fs.runs.ptr[0].count, 2);
  assert_int_equal (fs.runs.ptr[0].guest_len, 2 * CS);
  assert_int_equal (fs.runs.ptr[0].found, 0x8005);
  assert_int_equal (fs.runs.ptr[3].count, 5);
  assert_int_equal (fs.runs.ptr[3].guest_len, 5 * CS);
  findings_destroy (&fs);
}

static void
test_single_things_stay_apart (void **state)
{
  struct findings fs;

  assert_int_equal (findings_init (&fs), 0);
  for (unsigned i = 0; i < 2; ++i)
    add (&fs, entries (FINDING_L2_TABLE_UNREADABLE, FINDING_ACTIVE, i, 1));
  findings_finish (&fs, CS);
  assert_int_equal (fs.runs.len, 2);
  findings_destroy (&fs);
}

/* Hostile: every second cluster.  What is kept does not depend on the order. */
static void
test_cap (void **state)
{
  struct findings fs[2];
  uint64_t n = 50000;

  for (unsigned i = 0; i < 2; ++i) {
    assert_int_equal (findings_init (&fs[i]), 0);
    for (uint64_t j = 0; j < n; ++j)
      add (&fs[i], clusters (FINDING_REFCOUNT_LOW, 2 * (i ? n - 1 - j : j), 1));
    findings_finish (&fs[i], CS);
    assert_true (fs[i].truncated);
    assert_true (fs[i].dropped[FINDING_REFCOUNT_LOW]);
    assert_int_equal (fs[i].totals[FINDING_REFCOUNT_LOW], n);
    assert_int_equal (fs[i].runs.len, FINDINGS_PER_KIND);
  }
  assert_memory_equal (fs[0].runs.ptr, fs[1].runs.ptr,
                       FINDINGS_PER_KIND * sizeof (struct finding));
  for (unsigned i = 0; i < 2; ++i)
    findings_destroy (&fs[i]);
}

/* Backwards nothing adjoins until it is sorted; still it is one run. */
static void
test_no_cap_where_runs_join (void **state)
{
  struct findings fs;

  assert_int_equal (findings_init (&fs), 0);
  for (uint64_t j = 100000; j-- > 0;)
    add (&fs, clusters (FINDING_REFCOUNT_LOW, j, 1));
  findings_finish (&fs, CS);
  assert_false (fs.truncated);
  assert_int_equal (fs.runs.len, 1);
  assert_int_equal (fs.runs.ptr[0].count, 100000);
  findings_destroy (&fs);
}

static void
test_batch_and_move (void **state)
{
  struct findings fs, src;
  struct finding_batch b;
  struct finding f;

  assert_int_equal (findings_init (&fs), 0);
  assert_int_equal (findings_init (&src), 0);
  finding_batch_init (&b, &src, CS);
  for (unsigned i = 0; i < 100; ++i) {
    f = clusters (FINDING_REFCOUNT_LOW, i, 1);
    assert_int_equal (finding_batch_add (&b, &f), 0);
    f = clusters (FINDING_REFCOUNT_HIGH, 3 * i, 1);
    assert_int_equal (finding_batch_add (&b, &f), 0);
  }
  assert_int_equal (src.totals[FINDING_REFCOUNT_LOW], 0);       /* joined, not yet told */
  assert_int_equal (finding_batch_flush (&b), 0);
  assert_int_equal (src.totals[FINDING_REFCOUNT_LOW], 100);
  add (&fs, clusters (FINDING_REFCOUNT_LOW, 100, 1));
  assert_int_equal (findings_move (&fs, &src, CS), 0);
  findings_finish (&fs, CS);
  assert_int_equal (fs.totals[FINDING_REFCOUNT_LOW], 101);
  assert_int_equal (fs.per_severity[SEV_LEAK], 100);
  assert_int_equal (fs.runs.len, 101);
  assert_int_equal (fs.runs.ptr[0].count, 101);
  assert_int_equal (src.totals[FINDING_REFCOUNT_HIGH], 0);
  findings_destroy (&src);
  findings_destroy (&fs);
}

static void *
add_many (void *opaque)
{
  static _Atomic uint64_t next;
  uint64_t j;

  while ((j = next++) < 100000) {
    struct finding f = clusters (FINDING_REFCOUNT_LOW, j, 1);

    if (finding_add (opaque, &f, CS) < 0)
      abort ();
  }
  return NULL;
}

static void
test_threads (void **state)
{
  struct findings fs;
  pthread_t t[4];

  assert_int_equal (findings_init (&fs), 0);
  for (unsigned i = 0; i < 4; ++i)
    assert_int_equal (pthread_create (&t[i], NULL, add_many, &fs), 0);
  for (unsigned i = 0; i < 4; ++i)
    pthread_join (t[i], NULL);
  findings_finish (&fs, CS);
  assert_int_equal (fs.totals[FINDING_REFCOUNT_LOW], 100000);
  assert_int_equal (fs.runs.len, 1);
  findings_destroy (&fs);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_table),
    cmocka_unit_test (test_joined_in_any_order),
    cmocka_unit_test (test_entries_join_by_index_and_guest),
    cmocka_unit_test (test_single_things_stay_apart),
    cmocka_unit_test (test_cap),
    cmocka_unit_test (test_no_cap_where_runs_join),
    cmocka_unit_test (test_batch_and_move),
    cmocka_unit_test (test_threads),
  };

  return cmocka_run_group_tests_name ("finding", tests, NULL, NULL);
}
