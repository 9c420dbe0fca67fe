/* Deep checks: the clusters said not to decompress are those that qemu-io
 * cannot read.
 */
#include "unit/check/images.h"

#include "base/cleanup.h"

static struct check *
check_deep_image (struct bdev *d, bool deep)
{
  struct check_options opts = { .deep = deep };
  struct check *c = NULL;
  struct err err = { 0 };

  assert_ok (check_run (d, &opts, &c, &err), &err);
  return c;
}

#define SOURCE                                                                          \
  "{ head -c 700000 /dev/urandom | base64; yes abc | head -c 900000; "                  \
  "seq 1 200000; } | head -c 3M >src; truncate -s 4M src; "                             \
  "qemu-img convert -c -f raw -O qcow2 -o "

/* The entry of each guest cluster. */
static struct l2_entry
entry_of (struct bdev *d, const struct geom *g, uint64_t guest_ci)
{
  uint64_t place = l2_place (d, guest_ci >> g->l2_bits, guest_ci & (g->l2_entries - 1));

  return l2_entry_decode (get64 (d, place), 0, g);
}

/* For each cluster: can QEMU read it? */
static void
ask_qemu (struct bdev *d, uint64_t cluster_size, uint64_t nr, bool *readable)
{
  char *folder = make_folder (), path[4096];
  FILE *fp;

  snprintf (path, sizeof path, "%s/d.qcow2", folder);
  save_image (d, path);
  assert_int_equal (run ("cd %s; i=0; while [ $i -lt %llu ]; do echo read $((i * %llu)) %llu; "
                         "i=$((i + 1)); done >cmds; "
                         "qemu-io -r -f qcow2 d.qcow2 <cmds >out 2>&1; "
                         "sed -n 's/^.*read failed.*/0/p; s/^.*read [0-9]*.[0-9]* bytes.*/1/p' "
                         "out >answers", folder, (unsigned long long) nr,
                         (unsigned long long) cluster_size,
                         (unsigned long long) cluster_size), 0);
  snprintf (path, sizeof path, "%s/answers", folder);
  fp = fopen (path, "r");
  assert_non_null (fp);
  for (uint64_t i = 0; i < nr; ++i) {
    int c = fgetc (fp);

    assert_true (c == '0' || c == '1');
    readable[i] = c == '1';
    assert_int_equal (fgetc (fp), '\n');
  }
  fclose (fp);
  remove_folder (folder);
}

static void
one_kind (const char *opts, unsigned cluster_bits, uint64_t seed)
{
  char commands[1000];
  uint64_t nr = (4 << 20) >> cluster_bits, reported = 0, unreadable = 0, lost = 0;
  bool *readable = calloc (nr, 1), *broken = calloc (nr, 1);
  struct bdev *d;
  struct check *c;
  struct geom g;

  snprintf (commands, sizeof commands, SOURCE "cluster_size=%u,%s src $f",
            1u << cluster_bits, opts);
  d = make_image (opts, "4M", commands);
  c = check_deep_image (d, true);
  assert_findings (c, "");
  g = c->geom;
  assert_true (c->stats.compressed_clusters > 20);
  check_free (c);
  for (unsigned i = 0; i < 30; ++i) {
    uint8_t junk = test_random (&seed);
    struct l2_entry e = entry_of (d, &g, test_random (&seed) % nr);

    if (e.kind == CLUSTER_COMPRESSED)
      put_bytes (d, e.host_off + test_random (&seed) % (e.host_len - MIN (e.host_len - 1, 512)),
                 &junk, 1);
  }
  c = check_deep_image (d, false);
  assert_findings (c, "");
  check_free (c);
  c = check_deep_image (d, true);
  for (size_t i = 0; i < c->findings.runs.len; ++i) {
    const struct finding *f = &c->findings.runs.ptr[i];

    assert_int_equal (f->id, FINDING_STREAM_BROKEN);
    assert_int_equal (f->snapshot_index, FINDING_ACTIVE);
    assert_int_equal (f->guest_off, f->index << cluster_bits);
    assert_int_equal (f->guest_len, f->count << cluster_bits);
    for (uint64_t j = 0; j < f->count; ++j)
      broken[f->index + j] = true;
  }
  ask_qemu (d, g.cluster_size, nr, readable);
  for (uint64_t i = 0; i < nr; ++i) {
    reported += broken[i];
    unreadable += !readable[i];
    if (broken[i])
      assert_false (readable[i]);
  }
  /* QEMU refuses windows over 4 KiB, which are sound and which damage can feign. */
  assert_true (reported > 0 && reported <= unreadable && unreadable - reported <= 2);
  if (strstr (opts, "zstd"))
    assert_int_equal (reported, unreadable);
  assert_int_equal (reported, c->findings.totals[FINDING_STREAM_BROKEN]);
  for (size_t i = 0; i < c->bad.len; ++i) {
    assert_int_equal (c->bad.ptr[i].why, FINDING_STREAM_BROKEN);
    assert_int_equal (c->bad.ptr[i].fix, BAD_LOST);
    lost += c->bad.ptr[i].count;
  }
  assert_int_equal (lost, reported);
  check_free (c);
  bdev_unref (d);
  free (readable);
  free (broken);
}

static void
agrees_with_qemu (void **state)
{
  one_kind ("compat=0.10", 16, 1);
  one_kind ("compression_type=zstd", 16, 2);
  one_kind ("compat=1.1", 12, 3);
  one_kind ("compression_type=zstd", 12, 4);
  one_kind ("compat=1.1", 9, 5);
}

/* What only a snapshot has is its finding; a table that several share is one. */
static void
in_snapshots (void **state)
{
  struct bdev *d = make_image ("compat=1.1", "4M", SOURCE "compat=1.1 src $f; "
                               "qemu-img snapshot -c one $f; qemu-img snapshot -c two $f; "
                               "qemu-io -c 'write 128k 64k' $f; qemu-img snapshot -c three $f");
  struct check *c = check_deep_image (d, true);
  const struct finding *f;
  struct l2_entry e;
  uint64_t l1;

  assert_findings (c, "");
  assert_int_equal (c->snapshots.len, 3);
  l1 = get64 (d, c->snapshots.ptr[0].l1_host_off) & L1E_OFF_MASK;
  e = l2_entry_decode (get64 (d, l1 + 2 * 8), 0, &c->geom);
  assert_int_equal (e.kind, CLUSTER_COMPRESSED);
  check_free (c);
  put64 (d, e.host_off + 8, UINT64_MAX);
  put64 (d, e.host_off, UINT64_MAX);
  c = check_deep_image (d, true);
  assert_findings (c, "C01:1");
  f = first_run (c, FINDING_STREAM_BROKEN);
  assert_int_equal (f->snapshot_index, 0);
  assert_int_equal (f->guest_off, 128 << 10);
  assert_int_equal (f->guest_len, 64 << 10);
  assert_int_equal (f->host_off, l1);
  assert_false (c->incomplete);
  check_free (c);
  bdev_unref (d);
}

static void
descriptors_that_cannot_be (void **state)
{
  struct bdev *d = make_image ("compat=1.1", "4M", SOURCE "compat=1.1 src $f");
  struct check *c;

  put64 (d, l2_place (d, 0, 3), L2E_COMPRESSED | UINT64_C (0x3fffffffffffff));
  c = check_deep_image (d, true);
  assert_true (findings_has (&c->findings, FINDING_L2_ENTRY_OUTSIDE));
  assert_false (findings_has (&c->findings, FINDING_STREAM_BROKEN));
  check_free (c);
  bdev_unref (d);
}

/* A quarter of a million entries that name one stream of 2 MiB, which nobody has the time to
 * decompress as often; one of two lengths, both of them too long to be joined with other reads.
 */
static void
one_stream_often (void **state)
{
  struct bdev *d = make_image ("cluster_size=2M", "512G",
                               "qemu-io -f qcow2 -c 'write -c 0 2M' $f");
  uint64_t entry = get64 (d, l2_place (d, 0, 0)), sectors = UINT64_C (1) << (62 - 13);
  CLEANUP_FREE uint8_t *table = malloc (2 << 20);
  struct err err = { 0 };
  struct check *c;

  assert_true (entry & L2E_COMPRESSED);
  assert_ok (bdev_resize (d, UINT64_C (64) << 20, &err), &err);
  for (unsigned i = 0; i < 1 << 18; ++i)
    store_be64 (table + i * 8, entry + (i % 2 ? 1000 * sectors : 0));
  put_bytes (d, l2_place (d, 0, 0), table, 2 << 20);
  c = check_deep_image (d, true);
  assert_int_equal (c->stats.compressed_clusters, 1 << 18);
  assert_false (findings_has (&c->findings, FINDING_STREAM_BROKEN));
  check_free (c);
  bdev_unref (d);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (agrees_with_qemu),
    cmocka_unit_test (in_snapshots),
    cmocka_unit_test (descriptors_that_cannot_be),
    cmocka_unit_test (one_stream_often),
  };

  if (run ("command -v qemu-img && command -v qemu-io") != 0) {
    print_message ("SKIP: qemu-img or qemu-io is not installed\n");
    return 0;
  }
  return cmocka_run_group_tests_name ("deep", tests, NULL, NULL);
}
