/* L2 entries of every kind.  Expected values are worked out by hand from the
 * specification; that is not code that could share a mistake with the decoder.
 */
#include "unit/unit.h"

#include "fmt/entry.h"

static struct geom
geom_of (unsigned cluster_bits, uint64_t incompatible)
{
  struct header h = { .version = 3, .cluster_bits = cluster_bits, .refcount_order = 4,
                      .incompatible = incompatible };
  struct geom g;

  geom_init (&g, &h);
  return g;
}

static void
standard_entries (void **state)
{
  struct geom g = geom_of (16, 0);
  struct l2_entry e;

  e = l2_entry_decode (0, 0, &g);
  assert_int_equal (e.kind, CLUSTER_UNALLOCATED);
  assert_false (e.copied);
  e = l2_entry_decode (1, 0, &g);
  assert_int_equal (e.kind, CLUSTER_ZERO_PLAIN);
  e = l2_entry_decode (UINT64_C (0x8000000000050001), 0, &g);
  assert_int_equal (e.kind, CLUSTER_ZERO_ALLOC);
  assert_true (e.copied);
  assert_true (e.host_off == 0x50000 && e.host_len == 65536);
  e = l2_entry_decode (UINT64_C (0x00ffffffffff0000), 0, &g);
  assert_int_equal (e.kind, CLUSTER_NORMAL);
  assert_false (e.copied);
  assert_true (e.host_off == UINT64_C (0x00ffffffffff0000));
  assert_true (e.reserved == 0);
  /* Bits 1-8 and 56-61 are reserved, and no part of the offset. */
  e = l2_entry_decode (UINT64_C (0x3f000000000501fe), 0, &g);
  assert_int_equal (e.kind, CLUSTER_NORMAL);
  assert_true (e.host_off == 0x50000);
  assert_true (e.reserved == UINT64_C (0x3f000000000001fe));
  /* COPIED alone is no cluster, except in a data file, where offset 0 is one. */
  e = l2_entry_decode (ENTRY_COPIED, 0, &g);
  assert_int_equal (e.kind, CLUSTER_UNALLOCATED);
  g = geom_of (16, INCOMPAT_DATA_FILE);
  e = l2_entry_decode (ENTRY_COPIED, 0, &g);
  assert_int_equal (e.kind, CLUSTER_NORMAL);
  assert_true (e.host_off == 0);
}

/* 512-byte clusters: x = 61, so one bit counts sectors and bits 0-60 are offset. */
static void
compressed_512 (void **state)
{
  struct geom g = geom_of (9, 0);
  struct l2_entry e;

  e = l2_entry_decode (UINT64_C (0x4000000000012345), 0, &g);
  assert_int_equal (e.kind, CLUSTER_COMPRESSED);
  assert_true (e.host_off == 0x12345);
  assert_int_equal (e.host_len, 512 - 0x145);   /* to the end of its own sector */
  assert_true (e.reserved == 0);
  e = l2_entry_decode (UINT64_C (0x6000000000012345), 0, &g);
  assert_true (e.host_off == 0x12345);
  assert_int_equal (e.host_len, 1024 - 0x145);
  e = l2_entry_decode (UINT64_C (0x4000000000012200), 0, &g);
  assert_int_equal (e.host_len, 512);
  /* Offsets that nothing can have are found reserved, not cut down. */
  e = l2_entry_decode (UINT64_C (0x5fffffffffffffff), 0, &g);
  assert_true (e.host_off == UINT64_C (0x1fffffffffffffff));
  assert_true (e.reserved == UINT64_C (0x1f00000000000000));
}

/* 2 MiB clusters: x = 49, so bits 49-61 count sectors. */
static void
compressed_2m (void **state)
{
  struct geom g = geom_of (21, 0);
  struct l2_entry e;

  e = l2_entry_decode (UINT64_C (0x4001ffffffffffff), 0, &g);
  assert_true (e.host_off == UINT64_C (0x1ffffffffffff));
  assert_int_equal (e.host_len, 1);
  e = l2_entry_decode (UINT64_C (0x4002000000000000), 0, &g);
  assert_true (e.host_off == 0);
  assert_int_equal (e.host_len, 1024);
  e = l2_entry_decode (UINT64_C (0x7ffe000000000600), 0, &g);
  assert_true (e.host_off == 0x600);
  assert_int_equal (e.host_len, 8192 * 512);
  assert_true (e.reserved == 0);
  assert_false (e.copied);
  /* COPIED must not be set there, but is told and not counted as sectors. */
  e = l2_entry_decode (UINT64_C (0xc000000000000600), 0, &g);
  assert_true (e.copied);
  assert_int_equal (e.host_len, 512);
}

static void
extended_entries (void **state)
{
  struct geom g = geom_of (16, INCOMPAT_EXTENDED_L2);
  struct l2_entry e;

  e = l2_entry_decode (0, 0, &g);
  assert_int_equal (e.kind, CLUSTER_UNALLOCATED);
  e = l2_entry_decode (0, UINT64_C (0xffffffff00000000), &g);
  assert_int_equal (e.kind, CLUSTER_ZERO_PLAIN);
  e = l2_entry_decode (0x50000, UINT64_C (0x00000000ffffffff), &g);
  assert_int_equal (e.kind, CLUSTER_NORMAL);
  e = l2_entry_decode (0x50000, UINT64_C (0xfffffffe00000001), &g);
  assert_int_equal (e.kind, CLUSTER_NORMAL);
  e = l2_entry_decode (0x50000, UINT64_C (0xffffffff00000000), &g);
  assert_int_equal (e.kind, CLUSTER_ZERO_ALLOC);
  /* A cluster without any subcluster in use is still one that is held. */
  e = l2_entry_decode (0x50000, 0, &g);
  assert_int_equal (e.kind, CLUSTER_ZERO_ALLOC);
  assert_true (e.host_off == 0x50000);
  /* The zero flag of standard entries is reserved here. */
  e = l2_entry_decode (0x50001, UINT64_C (0xffffffff), &g);
  assert_int_equal (e.kind, CLUSTER_NORMAL);
  assert_true (e.reserved == 1);
}

static void
words_of_a_table (void **state)
{
  static const uint8_t table[32] = { [7] = 1, [15] = 2, [23] = 3, [31] = 4 };
  struct geom std = geom_of (16, 0), ext = geom_of (16, INCOMPAT_EXTENDED_L2);

  assert_int_equal (l2_raw (table, 1, &std), 2);
  assert_int_equal (l2_bitmap (table, 1, &std), 0);
  assert_int_equal (l2_raw (table, 1, &ext), 3);
  assert_int_equal (l2_bitmap (table, 1, &ext), 4);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (standard_entries),
    cmocka_unit_test (compressed_512),
    cmocka_unit_test (compressed_2m),
    cmocka_unit_test (extended_entries),
    cmocka_unit_test (words_of_a_table),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
