/* Orphans: what is taken for a lost table, in which order it is shown, what stays
 * when it is to be kept, and that power cuts and hostile images are no trouble.
 */
#include "unit/check/images.h"

#include "fault.h"
#include "heal/heal.h"
#include "heal/orphans.h"
#include "img/image.h"

#define CLUSTER 4096u
#define WINDOW  (UINT64_C (2) << 20)    /* what a table of such clusters maps */

static const char opts[] = "cluster_size=4096";

static uint8_t *
read_all (struct bdev *d)
{
  uint8_t *bytes = malloc (bdev_size (d) + 1);
  struct err err = { 0 };

  assert_non_null (bytes);
  assert_ok (bdev_pread (d, bytes, bdev_size (d), 0, &err), &err);
  return bytes;
}

/* The index, after it was compared with the device that is made from it: regions
 * follow each other, show what the source has there, and no cluster twice.
 */
static struct orphans *
find (struct bdev *d)
{
  struct check *c = check_image (d);
  struct orphans *o = NULL;
  struct bdev *all;
  struct err err = { 0 };
  uint8_t *bytes, *seen = calloc (1, DIV_ROUND_UP (bdev_size (d), 512)), *source = read_all (d);
  uint64_t at = 0, size = c->geom.cluster_size;

  assert_ok (orphans_find (c, d, true, NULL, &o, &err), &err);
  assert_ok (orphans_device (o, d, &all, &err), &err);
  bytes = read_all (all);
  for (size_t i = 0; i < o->regions.len; ++i) {
    const struct orphan_region *r = &o->regions.ptr[i];

    assert_int_equal (r->off, at);
    for (size_t j = r->first_piece; j < r->first_piece + r->nr_pieces; ++j) {
      const struct orphan_piece *p = &o->pieces.ptr[j];

      assert_memory_equal (bytes + at, source + p->host_off, p->len);
      for (uint64_t off = p->host_off; off < p->host_off + p->len; off += size) {
        assert_int_equal (ownermap_get (c->owners, off / size), 0);
        assert_int_equal (seen[off / size]++, 0);
      }
      at += p->len;
    }
    assert_int_equal (r->off + r->len, at);
  }
  assert_int_equal (at, o->size);
  assert_int_equal (at, bdev_size (all));
  assert_int_equal (o->tables + o->data + o->unreferenced, o->regions.len);
  bdev_unref (all);
  check_free (c);
  free (bytes);
  free (seen);
  free (source);
  return o;
}

/* The bytes of a region are n times size bytes of the values. */
static void
assert_region (struct bdev *d, const struct orphans *o, size_t i, const char *values, size_t size)
{
  struct bdev *all;
  struct err err = { 0 };
  uint8_t *bytes;

  assert_true (i < o->regions.len);
  assert_int_equal (o->regions.ptr[i].len, strlen (values) * size);
  assert_ok (orphans_device (o, d, &all, &err), &err);
  bytes = read_all (all);
  for (size_t j = 0; values[j]; ++j)
    for (size_t k = 0; k < size; ++k)
      assert_int_equal (bytes[o->regions.ptr[i].off + j * size + k], (uint8_t) values[j]);
  free (bytes);
  bdev_unref (all);
}

/* --- order */

/* Two tables, each written out of order, with gaps and a zeroed cluster. */
static void
test_tables_in_guest_order (void **state)
{
  struct bdev *d = make_image (opts, "8M",
                               "qemu-io -f qcow2 -c 'write -P 0x63 2064k 8k' -c 'write -P 0x42 64k 4k' "
                               "-c 'write -P 0x61 2052k 4k' -c 'write -P 0x41 0 4k' "
                               "-c 'write -P 0x62 2056k 4k' -c 'write -z 68k 4k' \"$f\"");
  struct check *c;
  struct orphans *o;

  put64 (d, l1_place (d, 0), 0);
  put64 (d, l1_place (d, 1), 0);
  c = check_image (d);
  assert_int_equal (c->findings.totals[FINDING_ORPHANED_TABLES], 2);
  assert_int_equal (c->findings.totals[FINDING_ORPHANED_DATA], 0);
  assert_false (check_sound (c));
  assert_int_equal (c->orphans.tables, 2);
  assert_int_equal (c->orphans.clusters, 8);
  check_free (c);
  o = find (d);
  assert_int_equal (o->tables, 2);
  assert_int_equal (o->clusters, 8);
  assert_region (d, o, 0, "abcc", CLUSTER);     /* the table that was made first */
  assert_region (d, o, 1, "AB", CLUSTER);
  assert_int_equal (o->pieces.ptr[o->regions.ptr[0].first_piece].window_off, CLUSTER);
  assert_int_equal (o->regions.ptr[1].used, 3);
  assert_int_equal (o->size, 8 * CLUSTER);      /* the tables come after */
  orphans_free (o);
  bdev_unref (d);
}

/* The whole L1 table is an orphan: it is no table of data. */
static void
test_lost_l1_table (void **state)
{
  struct bdev *d = make_image (opts, "8M", "qemu-io -f qcow2 -c 'write -P 0x61 0 4M' \"$f\"");
  uint64_t end = bdev_size (d);
  struct err err = { 0 };
  struct orphans *o;

  assert_ok (bdev_resize (d, end + CLUSTER, &err), &err);
  put64 (d, HEADER_OFF_L1_TABLE, end);
  o = find (d);
  assert_int_equal (o->tables, 2);
  assert_int_equal (o->regions.ptr[0].len, WINDOW);
  assert_int_equal (o->regions.ptr[1].len, WINDOW);
  assert_int_equal (o->size, 2 * WINDOW + 3 * CLUSTER);
  orphans_free (o);
  bdev_unref (d);
}

static void
test_compressed_are_left_out (void **state)
{
  struct bdev *d = make_image (opts, "8M",
                               "qemu-io -f qcow2 -c 'write -c -P 1 0 4k' -c 'write -c -P 1 8k 4k' "
                               "-c 'write -P 0x61 4k 4k' \"$f\"");
  struct orphans *o;

  put64 (d, l1_place (d, 0), 0);
  o = find (d);
  assert_int_equal (o->tables, 1);
  assert_int_equal (o->regions.ptr[0].compressed, 2);
  assert_int_equal (o->regions.ptr[0].used, 3);
  assert_region (d, o, 0, "a", CLUSTER);
  assert_int_equal (o->size, 3 * CLUSTER);      /* the table, and both streams in one */
  orphans_free (o);
  bdev_unref (d);
}

/* What a snapshot has too is not lost. */
static void
test_beside_a_snapshot (void **state)
{
  struct bdev *d = make_image (opts, "8M",
                               "qemu-io -f qcow2 -c 'write -P 0x61 0 64k' \"$f\"; "
                               "qemu-img snapshot -c s \"$f\"; "
                               "qemu-io -f qcow2 -c 'write -P 0x62 8k 8k' \"$f\"");
  struct check *c;
  struct orphans *o;

  put64 (d, l1_place (d, 0), 0);
  c = check_image (d);
  assert_int_equal (c->findings.totals[FINDING_ORPHANED_TABLES], 1);
  check_free (c);
  o = find (d);
  assert_int_equal (o->tables, 1);
  assert_region (d, o, 0, "bb", CLUSTER);
  orphans_free (o);
  bdev_unref (d);
}

/* Free clusters that are not zero, beside a sound refcount and without any. */
static void
test_unreferenced (void **state)
{
  struct bdev *d = make_image (opts, "8M", "qemu-io -f qcow2 -c 'write -P 0x61 0 64k' \"$f\"");
  uint64_t end = bdev_size (d);
  uint8_t bytes[CLUSTER];
  struct err err = { 0 };
  struct orphans *o;

  assert_ok (bdev_resize (d, end + 3 * CLUSTER, &err), &err);
  memset (bytes, 'x', sizeof bytes);
  put_bytes (d, end + CLUSTER, bytes, CLUSTER);
  o = find (d);
  assert_int_equal (o->unreferenced, 1);
  assert_int_equal (o->regions.len, 1);
  assert_region (d, o, 0, "x", CLUSTER);
  orphans_free (o);
  /* Without refcounts, the lost table still tells. */
  put64 (d, l1_place (d, 0), 0);
  zero_bytes (d, rt_place (d, 0), CLUSTER);
  o = find (d);
  assert_int_equal (o->tables, 1);
  assert_region (d, o, 0, "aaaaaaaaaaaaaaaa", CLUSTER);
  orphans_free (o);
  bdev_unref (d);
}

/* A table of zeros and as many leaks as it mapped; half of them are not enough. */
static void
test_table_s_worth (void **state)
{
  static const char *const sizes[] = { "256M", "1G" };

  for (unsigned i = 0; i < 2; ++i) {
    struct bdev *d = make_image ("preallocation=metadata", sizes[i], "");
    struct check *c;

    zero_bytes (d, l2_place (d, 0, 0), 65536);
    c = check_image (d);
    assert_int_equal (c->orphans.clusters, i ? 8192 : 4096);
    assert_int_equal (c->findings.totals[FINDING_ORPHANED_DATA], i);
    assert_int_equal (c->findings.totals[FINDING_ORPHANED_TABLES], 0);
    if (i)
      assert_int_equal (first_run (c, FINDING_ORPHANED_DATA)->found, 8192);
    assert_int_equal (check_sound (c), !i);
    check_free (c);
    bdev_unref (d);
  }
}

/* --- no evidence */

static void
test_mere_leaks (void **state)
{
  struct bdev *d = make_image (opts, "8M", "qemu-io -f qcow2 -c 'write -P 0x61 0 64k' \"$f\"");
  struct check *c;

  /* Data without its entry; and an empty table without its own. */
  put64 (d, l2_place (d, 0, 3), 0);
  put64 (d, l2_place (d, 0, 4), 0);
  c = check_image (d);
  assert_findings (c, "R02:2");
  assert_true (check_sound (c));
  check_free (c);
  bdev_unref (d);
}

/* A copy that was made for a snapshot, but never linked. */
static void
test_unlinked_copy (void **state)
{
  struct bdev *d = make_image (opts, "8M", "qemu-io -f qcow2 -c 'write -P 0x61 0 64k' \"$f\"");
  uint64_t end = ROUND_UP (bdev_size (d), CLUSTER);
  uint8_t table[CLUSTER];
  struct err err = { 0 };
  struct check *c;

  assert_ok (bdev_pread (d, table, CLUSTER, l2_place (d, 0, 0), &err), &err);
  assert_ok (bdev_resize (d, end + CLUSTER, &err), &err);
  put_bytes (d, end, table, CLUSTER);
  put_refcount (d, end / CLUSTER, 1);
  c = check_image (d);
  assert_findings (c, "R02:1");
  check_free (c);
  bdev_unref (d);
}

/* QEMU drops a bitmap that it cannot trust; what is left is an array of offsets too. */
static void
test_dropped_bitmap (void **state)
{
  struct bdev *d = make_image (opts, "8M",
                               "qemu-img bitmap --add -g 4k \"$f\" b; "
                               "qemu-io -f qcow2 -c 'write -P 1 0 1M' \"$f\"; "
                               "printf '\\0\\0\\0\\0\\0\\0\\0\\0' | "
                               "dd of=\"$f\" bs=1 seek=88 conv=notrunc; "
                               "qemu-io -f qcow2 -c 'write -P 1 2M 4k' \"$f\"");
  struct check *c = check_image (d);

  assert_true (c->orphans.clusters >= 3);
  assert_int_equal (orphan_findings (c), 0);
  assert_true (check_sound (c));
  check_free (c);
  bdev_unref (d);
}

/* --- keeping */

static struct check *
check_keeping (struct bdev *d, bool keep_orphans, bool keep_leaks)
{
  struct check_options copts = { .keep_orphans = keep_orphans, .keep_leaks = keep_leaks };
  struct err err = { 0 };
  struct check *c;

  assert_ok (check_run (d, &copts, &c, &err), &err);
  return c;
}

/* Heal, and how many orphans the next check sees. */
static uint64_t
heal_keeping (struct bdev *d, bool keep_orphans, bool keep_leaks)
{
  struct check *c = check_keeping (d, keep_orphans, keep_leaks);
  struct heal_result res;
  struct err err = { 0 };
  uint64_t left;

  assert_ok (heal_run (d, c, REPAIR_REFCOUNTS, NULL, &res, &err), &err);
  check_free (c);
  c = check_keeping (d, keep_orphans, keep_leaks);
  assert_true (check_sound (c));
  left = c->orphans.clusters;
  check_free (c);
  return left;
}

static void
test_keeping (void **state)
{
  struct bdev *d = make_image (opts, "8M", "qemu-io -f qcow2 -c 'write -P 0x61 0 64k' "
                               "-c 'write -P 0x62 2M 64k' \"$f\""), *copy;
  struct err err = { 0 };

  put64 (d, l2_place (d, 1, 0), 0);
  assert_ok (mem_copy_of (d, &copy, &err), &err);
  assert_int_equal (heal_keeping (copy, true, true), 1);
  assert_int_equal (heal_keeping (copy, true, false), 0);       /* a mere leak */
  bdev_unref (copy);
  put64 (d, l1_place (d, 0), 0);
  assert_ok (mem_copy_of (d, &copy, &err), &err);
  assert_int_equal (heal_keeping (copy, true, false), 18);
  assert_int_equal (heal_keeping (copy, false, false), 0);      /* discard-orphans */
  bdev_unref (copy);
  /* All refcounts are lost: what the table names gets new ones. */
  zero_bytes (d, rt_place (d, 0), CLUSTER);
  assert_int_equal (heal_keeping (d, true, false), 17);
  bdev_unref (d);
}

/* What is kept is not handed out: a disk full of writes leaves it as it was. */
static void
test_kept_are_not_reused (void **state)
{
  struct bdev *d = make_image (opts, "4M", "qemu-io -f qcow2 -c 'write -P 0x61 0 64k' \"$f\"");
  uint8_t bytes[65536];
  struct image_options iopts = { .cache_size = 0 };
  struct bdev *view;
  struct orphans *o;
  struct err err = { 0 };

  put64 (d, l1_place (d, 0), 0);
  assert_int_equal (heal_keeping (d, true, false), 17);
  assert_ok (image_open (d, &iopts, &view, &err), &err);
  memset (bytes, 'w', sizeof bytes);
  for (uint64_t off = 0; off < bdev_size (view); off += sizeof bytes)
    assert_ok (bdev_pwrite (view, bytes, sizeof bytes, off, 0, &err), &err);
  assert_ok (bdev_flush (view, &err), &err);
  bdev_unref (view);
  o = find (d);
  assert_int_equal (o->tables, 1);
  assert_region (d, o, 0, "aaaaaaaaaaaaaaaa", CLUSTER);
  orphans_free (o);
  bdev_unref (d);
}

/* --- power cuts */

struct cut {
  struct bdev *crash;
  unsigned states, leaks;
};

static void
look_after_cut (void *opaque)
{
  struct cut *cut = opaque;
  struct err err = { 0 };

  for (unsigned seed = 0; seed < 24; ++seed) {
    struct bdev *left;
    struct check *c;

    assert_ok (crash_now (cut->crash, seed, &left, &err), &err);
    c = check_image (left);
    if (!check_sound (c))
      fail_msg ("after a power cut: %s", findings_text (c));
    cut->leaks += c->orphans.clusters > 0;
    cut->states++;
    check_free (c);
    bdev_unref (left);
  }
}

/* New tables, and copies of those that a snapshot keeps, at every flush. */
static void
test_power_cuts (void **state)
{
  struct bdev *d = make_image (opts, "32M", "qemu-io -f qcow2 -c 'write 0 2M' -c 'write 4M 64k' "
                               "-c 'write 8M 64k' \"$f\"; qemu-img snapshot -c s \"$f\""), *view;
  struct image_options iopts = { .cache_size = 0 };
  struct cut cut = { 0 };
  uint8_t bytes[65536];
  uint64_t seed = 4;
  struct err err = { 0 };

  assert_ok (crash_new (d, &cut.crash, &err), &err);
  assert_ok (image_open (cut.crash, &iopts, &view, &err), &err);
  crash_set_hook (cut.crash, look_after_cut, &cut);
  for (unsigned i = 0; i < 40; ++i) {
    uint64_t off = test_random (&seed) % (bdev_size (view) - sizeof bytes);

    memset (bytes, i + 1, sizeof bytes);
    assert_ok (bdev_pwrite (view, bytes, 1 + test_random (&seed) % sizeof bytes, off, 0, &err),
               &err);
    if (i % 3 == 2)
      assert_ok (bdev_flush (view, &err), &err);
  }
  bdev_unref (view);
  crash_set_hook (cut.crash, NULL, NULL);
  assert_true (cut.states > 500 && cut.leaks > 20);
  bdev_unref (cut.crash);
  bdev_unref (d);
}

/* --- hostile */

enum content { RANDOM, ONES, EACH_OTHER, ALL_THE_SAME };

/* A hundred thousand leaked clusters, full of that. */
static struct bdev *
make_hostile (struct bdev *image, enum content content, uint64_t *nr)
{
  struct check *c = check_image (image);
  uint64_t end = bdev_size (image) / 512, stop = 0, ci, seed = 5, entry[64];
  struct bdev *d;
  struct err err = { 0 };

  assert_ok (mem_copy_of (image, &d, &err), &err);
  *nr = c->orphans.clusters;
  while ((ci = orphan_next (c, stop, end, &stop)) < end)
    for (; ci < stop; ++ci) {
      for (unsigned i = 0; i < 64; ++i)
        switch (content) {
        case RANDOM:
          entry[i] = test_random (&seed);
          break;
        case ONES:
          entry[i] = UINT64_MAX;
          break;
        case EACH_OTHER:
          store_be64 (&entry[i], ENTRY_COPIED | (end - 1 - (ci + i * 7) % (end / 2)) << 9);
          break;
        case ALL_THE_SAME:
          store_be64 (&entry[i], ENTRY_COPIED | (end - 1 - i) << 9);
        }
      put_bytes (d, ci << 9, entry, sizeof entry);
    }
  check_free (c);
  return d;
}

static void
test_hostile (void **state)
{
  struct bdev *image = make_image ("cluster_size=512,preallocation=metadata", "48M", "");
  struct err err = { 0 };

  assert_ok (bdev_resize (image, ROUND_UP (bdev_size (image), 512), &err), &err);
  zero_bytes (image, l1_place (image, 0), get32 (image, HEADER_OFF_L1_SIZE) * 8);
  alarm (300);                  /* not a limit, the end of one that hangs */
  for (enum content content = RANDOM; content <= ALL_THE_SAME; ++content) {
    uint64_t nr;
    struct bdev *d = make_hostile (image, content, &nr);
    struct orphans *o = find (d);
    uint64_t size = 0;

    assert_true (nr > 99000);
    assert_int_equal (o->clusters, nr);
    for (size_t i = 0; i < o->regions.len; ++i)
      size += o->regions.ptr[i].kind == ORPHAN_UNREFERENCED ? 0 : o->regions.ptr[i].len;
    assert_int_equal (size, nr * 512);
    if (content == ALL_THE_SAME)
      assert_true (o->tables <= 64);    /* the first has them all, the rest nothing */
    else
      assert_int_equal (o->tables, 0);
    orphans_free (o);
    bdev_unref (d);
  }
  alarm (0);
  bdev_unref (image);
}

/* More than are looked at: the sample finds that there are tables. */
static void
test_sampled (void **state)
{
  struct bdev *d = make_image ("cluster_size=512,preallocation=metadata", "48M", "");
  struct check *c;
  struct orphans *o;

  zero_bytes (d, l1_place (d, 0), get32 (d, HEADER_OFF_L1_SIZE) * 8);
  c = check_image (d);
  assert_true (c->orphans.sampled);
  assert_in_range (c->orphans.tables, 500, 1536);
  check_free (c);
  o = find (d);
  assert_int_equal (o->tables, 48u << 20 >> 15);        /* all of them */
  assert_int_equal (o->regions.ptr[0].len, 64 * 512);
  assert_false (o->sampled || o->truncated);
  orphans_free (o);
  bdev_unref (d);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_tables_in_guest_order),
    cmocka_unit_test (test_lost_l1_table),
    cmocka_unit_test (test_compressed_are_left_out),
    cmocka_unit_test (test_beside_a_snapshot),
    cmocka_unit_test (test_unreferenced),
    cmocka_unit_test (test_table_s_worth),
    cmocka_unit_test (test_mere_leaks),
    cmocka_unit_test (test_unlinked_copy),
    cmocka_unit_test (test_dropped_bitmap),
    cmocka_unit_test (test_keeping),
    cmocka_unit_test (test_kept_are_not_reused),
    cmocka_unit_test (test_power_cuts),
    cmocka_unit_test (test_hostile),
    cmocka_unit_test (test_sampled),
  };

  if (run ("command -v qemu-img && command -v qemu-io") != 0) {
    print_message ("SKIP: qemu-img or qemu-io is not installed\n");
    return 0;
  }
  return cmocka_run_group_tests_name ("orphans", tests, NULL, NULL);
}
