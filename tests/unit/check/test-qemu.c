/* Our check and qemu-img's must agree wherever they mean the same: on figures
 * for sound images of every kind, and on each single cluster whose refcount is
 * wrong, for values damaged at random.
 */
#include "unit/check/images.h"

#include "dev/file.h"

#define SEEDS 6

struct kind {
  const char *name;
  const char *opts;             /* of qemu-img create */
  const char *commands;         /* $f is the image, $io runs qemu-io on it */
  bool secret;
};

#define WRITES "$io -c 'write -P 1 0 1M' -c 'write -P 2 3M 300k' -c 'write -P 3 2100k 8k'; "
#define ZEROS  "$io -c 'write -z 200k 128k' -c 'discard 700k 64k'; "
#define SNAPSHOTS                                                                            \
  "qemu-img snapshot -c one $f; $io -c 'write -P 4 0 100k'; qemu-img snapshot -c two $f; "     \
  "$io -c 'write -P 5 5M 200k' -c 'write -P 6 512k 1k'; qemu-img snapshot -c three $f; "       \
  "$io -c 'write -P 7 3M 64k'; "
/* Half of it shrinks to a few bytes, half hardly at all. */
#define COMPRESSED(opts)                                                                     \
  "{ head -c 1500000 /dev/urandom | base64; yes abc | head -c 2000000; } >src; "             \
  "truncate -s 8M src; qemu-img convert -c -f raw -O qcow2 -o " opts " src $f; "

static const struct kind kinds[] = {
  { "v2", "compat=0.10", WRITES ZEROS },
  { "v2 snapshots", "compat=0.10,cluster_size=4096", WRITES SNAPSHOTS },
  { "v2 compressed", "compat=0.10", COMPRESSED ("compat=0.10") SNAPSHOTS },
  { "v3", "cluster_size=65536", WRITES ZEROS },
  { "512", "cluster_size=512", WRITES ZEROS },
  { "512 snapshots", "cluster_size=512,refcount_bits=64", WRITES SNAPSHOTS },
  { "4k", "cluster_size=4096,lazy_refcounts=on", WRITES ZEROS },
  { "2M", "cluster_size=2M", WRITES SNAPSHOTS },
  { "1 bit", "cluster_size=4096,refcount_bits=1", WRITES ZEROS },
  { "2 bits", "cluster_size=512,refcount_bits=2", WRITES ZEROS },
  { "4 bits", "cluster_size=4096,refcount_bits=4", WRITES SNAPSHOTS },
  { "8 bits", "cluster_size=1024,refcount_bits=8", WRITES SNAPSHOTS },
  { "32 bits", "cluster_size=4096,refcount_bits=32", WRITES SNAPSHOTS },
  { "64 bits", "refcount_bits=64", WRITES SNAPSHOTS },
  { "preallocated", "cluster_size=512,preallocation=metadata", WRITES },
  { "zlib", "cluster_size=65536", COMPRESSED ("cluster_size=65536") },
  { "zlib 512", "cluster_size=512", COMPRESSED ("cluster_size=512") WRITES },
  { "zlib 2M snapshots", "cluster_size=2M", COMPRESSED ("cluster_size=2M") SNAPSHOTS },
  { "zstd snapshots", "compression_type=zstd",
    COMPRESSED ("compression_type=zstd,cluster_size=4096") WRITES SNAPSHOTS },
  { "subclusters", "extended_l2=on,cluster_size=16k", WRITES ZEROS SNAPSHOTS },
  { "subclusters zlib", "extended_l2=on", COMPRESSED ("extended_l2=on") SNAPSHOTS },
  { "data file", "data_file=data.raw", WRITES ZEROS },
  { "raw data file", "data_file=data.raw,data_file_raw=on,cluster_size=4096", WRITES },
  { "bitmaps", "cluster_size=4096",
    WRITES "qemu-img bitmap --add -g 512 $f a; " "$io -c 'write 6M 64k'; "
    "qemu-img bitmap --add $f b; qemu-img bitmap --disable $f a; " },
  { "luks", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=200", WRITES, true },
  { "aes", "encrypt.format=aes,encrypt.key-secret=s", WRITES, true },
};

/* --- what qemu-img says */

struct opinion {
  uint64_t corruptions, leaks, total, allocated, compressed, fragmented, end_off;
  uint64_t flags;               /* lines about COPIED flags */
  /* Of each cluster: 'E' too low, 'L' leaked, with the references that it counts. */
  uint64_t nr_clusters;
  char *wrong;
  uint64_t *references;
};

static uint64_t
json_number (const char *text, const char *key)
{
  char quoted[64];
  const char *p;

  snprintf (quoted, sizeof quoted, "\"%s\":", key);
  p = strstr (text, quoted);
  return p ? strtoull (p + strlen (quoted), NULL, 10) : 0;
}

static void
read_lines (FILE *fp, struct opinion *o)
{
  char line[512];

  while (fgets (line, sizeof line, fp)) {
    unsigned long long ci, stored, refs;
    bool leaked = sscanf (line, "Leaked cluster %llu refcount=%llu reference=%llu", &ci, &stored,
                          &refs) == 3;

    if (strstr (line, "OFLAG_COPIED"))
      o->flags++;
    if (!leaked && sscanf (line, "ERROR cluster %llu refcount=%llu reference=%llu", &ci, &stored,
                           &refs) != 3)
      continue;
    assert_true (ci < o->nr_clusters);
    o->wrong[ci] = leaked ? 'L' : 'E';
    o->references[ci] = refs;
  }
}

static void
ask_qemu (const struct kind *kind, const char *folder, uint64_t nr_clusters, struct opinion *o)
{
  static char text[1 << 16];
  char cmd[4096], path[4096];
  FILE *fp;
  size_t n;

  snprintf (cmd, sizeof cmd,
            "cd %s; qemu-img check --output=json %s >out.json 2>errors", folder,
            kind->secret ? "--object secret,id=s,data=abc --image-opts "
                           "driver=qcow2,encrypt.key-secret=s,file.filename=disk.qcow2"
                         : "-f qcow2 disk.qcow2");
  n = system (cmd);
  (void) n;                     /* 0, 2 and 3 are all answers */
  memset (o, 0, sizeof *o);
  o->nr_clusters = nr_clusters;
  o->wrong = calloc (nr_clusters, 1);
  o->references = calloc (nr_clusters, 8);
  snprintf (path, sizeof path, "%s/out.json", folder);
  fp = fopen (path, "r");
  assert_non_null (fp);
  n = fread (text, 1, sizeof text - 1, fp);
  text[n] = '\0';
  fclose (fp);
  if (strstr (text, "\"image-end-offset\"") == NULL)
    fail_msg ("%s: qemu-img check cannot: %s", kind->name, text);
  o->corruptions = json_number (text, "corruptions");
  o->leaks = json_number (text, "leaks");
  o->total = json_number (text, "total-clusters");
  o->allocated = json_number (text, "allocated-clusters");
  o->compressed = json_number (text, "compressed-clusters");
  o->fragmented = json_number (text, "fragmented-clusters");
  o->end_off = json_number (text, "image-end-offset");
  snprintf (path, sizeof path, "%s/errors", folder);
  fp = fopen (path, "r");
  assert_non_null (fp);
  read_lines (fp, o);
  fclose (fp);
}

static void
opinion_reset (struct opinion *o)
{
  free (o->wrong);
  free (o->references);
}

/* --- ours beside it */

/* Through the file, with as many threads as that takes; and it must say what
 * was said of the same bytes in RAM.
 */
static struct check *
check_both_ways (const char *folder, struct bdev *mem)
{
  char path[4096];
  struct err err = { 0 };
  struct bdev *d;
  struct check *c[2];
  char *text[2];

  snprintf (path, sizeof path, "%s/disk.qcow2", folder);
  assert_ok (file_open (path, FILE_NO_LOCK, &d, &err), &err);
  c[0] = check_image (d);
  c[1] = check_image (mem);
  for (unsigned i = 0; i < 2; ++i)
    text[i] = findings_text (c[i]);
  assert_string_equal (text[0], text[1]);
  assert_memory_equal (&c[0]->stats, &c[1]->stats, sizeof c[0]->stats);
  free (text[0]);
  free (text[1]);
  check_free (c[1]);
  bdev_unref (d);
  return c[0];
}

/* Every cluster of ours that is too low or leaks, in the shape of theirs. */
static char *
our_wrong (const struct check *c, uint64_t nr_clusters)
{
  char *wrong = calloc (nr_clusters, 1);

  for (size_t i = 0; i < c->findings.runs.len; ++i) {
    const struct finding *f = &c->findings.runs.ptr[i];
    uint64_t ci = f->host_off >> c->geom.cluster_bits;

    if (f->id == FINDING_REFCOUNT_LOW || f->id == FINDING_REFCOUNT_HIGH)
      for (uint64_t j = 0; j < f->count; ++j) {
        assert_true (ci + j < nr_clusters);
        wrong[ci + j] = f->id == FINDING_REFCOUNT_LOW ? 'E' : 'L';
      }
  }
  /* Where a block is lost they take every refcount for 0. */
  for (uint64_t i = 0; i < c->rt.nr_entries; ++i)
    for (uint64_t ci = i << c->geom.rb_bits;
         c->rt.states[i] == RB_LOST && ci < (i + 1) << c->geom.rb_bits && ci < nr_clusters; ++ci)
      wrong[ci] = ownermap_get (c->owners, ci) ? 'E' : 0;
  return wrong;
}

static void
compare_figures (const struct check *c, const struct opinion *o)
{
  assert_int_equal (c->stats.total_clusters, o->total);
  assert_int_equal (c->stats.allocated_clusters, o->allocated);
  assert_int_equal (c->stats.compressed_clusters, o->compressed);
  assert_int_equal (c->stats.fragmented_clusters, o->fragmented);
  assert_int_equal (c->stats.image_end_off, o->end_off);
}

/* How much both found, over all damaged images. */
static uint64_t all_errors, all_leaks;

static void
compare_clusters (const struct check *c, const struct opinion *o)
{
  char *wrong = our_wrong (c, o->nr_clusters);
  uint64_t errors = 0, leaks = 0;

  for (uint64_t ci = 0; ci < o->nr_clusters; ++ci) {
    if (wrong[ci] != o->wrong[ci])
      fail_msg ("cluster %llu: we say '%c', qemu-img says '%c'", (unsigned long long) ci,
                wrong[ci] ? wrong[ci] : '-', o->wrong[ci] ? o->wrong[ci] : '-');
    if (wrong[ci])
      assert_int_equal (ownermap_get (c->owners, ci), o->references[ci]);
    errors += wrong[ci] == 'E';
    leaks += wrong[ci] == 'L';
  }
  all_errors += errors;
  all_leaks += leaks;
  assert_int_equal (leaks, o->leaks);
  assert_int_equal (c->findings.totals[FINDING_REFCOUNT_HIGH], o->leaks);
  /* They compare the flags with the refcounts as stored, we with what is right. */
  if (errors == 0 && leaks == 0)
    assert_int_equal (c->findings.per_severity[SEV_CORRUPT], o->corruptions);
  assert_true (o->corruptions >= errors + o->flags);
  free (wrong);
}

static struct check *
compare (const struct kind *kind, const char *folder, struct bdev *d)
{
  char path[4096];
  struct opinion o;
  struct check *c;

  snprintf (path, sizeof path, "%s/disk.qcow2", folder);
  save_image (d, path);
  c = check_both_ways (folder, d);
  ask_qemu (kind, folder, DIV_ROUND_UP (bdev_size (d), c->geom.cluster_size) + 1, &o);
  compare_figures (c, &o);
  compare_clusters (c, &o);
  opinion_reset (&o);
  return c;
}

/* --- damage */

static void
damage_values (struct bdev *d, const struct check *sound, uint64_t *seed)
{
  uint64_t clusters = bdev_size (d) / sound->geom.cluster_size;

  for (unsigned i = 0; i < 30; ++i) {
    uint64_t ci = test_random (seed) % clusters, index = ci >> sound->geom.rb_bits;

    if (sound->rt.states[index] == RB_SOUND)
      put_refcount (d, ci, test_random (seed) % 4 & sound->geom.refcount_max);
  }
}

static void
damage_bytes (struct bdev *d, const struct check *sound, uint64_t *seed)
{
  uint64_t clusters = bdev_size (d) / sound->geom.cluster_size;

  for (unsigned i = 0; i < 40; ++i) {
    uint64_t ci = test_random (seed) % clusters, index = ci >> sound->geom.rb_bits;
    uint64_t bit = (ci & (sound->geom.rb_entries - 1)) << sound->geom.refcount_order;
    uint8_t byte = test_random (seed);

    if (sound->rt.states[index] == RB_SOUND)
      put_bytes (d, sound->rt.entries[index] + bit / 8, &byte, 1);
  }
}

/* Entries forgotten, or pointing where another one points. */
static void
damage_mapping (struct bdev *d, const struct check *sound, uint64_t *seed)
{
  for (unsigned i = 0; i < 10; ++i) {
    uint64_t l1 = test_random (seed) % sound->header.l1_entries, at, raw;

    if (get64 (d, l1_place (d, l1)) == 0)
      continue;
    at = l2_place (d, l1, test_random (seed) % sound->geom.l2_entries);
    raw = get64 (d, l2_place (d, 0, test_random (seed) % sound->geom.l2_entries));
    if (sound->geom.extended_l2 || sound->geom.data_file || (raw & L2E_COMPRESSED))
      continue;
    put64 (d, at, i % 3 ? 0 : raw);
  }
}

static void
damage_table (struct bdev *d, const struct check *sound, uint64_t *seed)
{
  uint64_t blocks = 0;

  for (uint64_t i = 0; i < sound->rt.nr_entries; ++i)
    blocks += sound->rt.states[i] == RB_SOUND;
  if (blocks >= 4)
    put64 (d, rt_place (d, test_random (seed) % blocks), 0);
}

static void
try_kind (const struct kind *kind)
{
  static void (*const damages[]) (struct bdev *, const struct check *, uint64_t *) = {
    damage_values, damage_bytes, damage_mapping, damage_table,
  };
  char *folder = make_folder (), path[4096];
  struct check *sound;
  struct bdev *d;

  snprintf (path, sizeof path, "%s/disk.qcow2", folder);
  if (run ("set -e; cd %s; f=disk.qcow2; "
           "secret='--object secret,id=s,data=abc'; "
           "io=\"%s\"; for i in $(seq 100); do "
           "qemu-img create -q -f qcow2 %s -o %s $f 8M && break; done; %s :", folder,
           kind->secret ? "qemu-io $secret --image-opts "
                          "driver=qcow2,encrypt.key-secret=s,file.filename=$f"
                        : "qemu-io -f qcow2 $f",
           kind->secret ? "$secret" : "", kind->opts, kind->commands) != 0)
    fail_msg ("cannot make the image '%s'", kind->name);
  d = load_image (path);
  sound = compare (kind, folder, d);
  assert_findings (sound, "");
  bdev_unref (d);
  for (uint64_t seed = 1; seed <= SEEDS; ++seed) {
    uint64_t random = seed;

    snprintf (path, sizeof path, "%s/disk.qcow2", folder);
    if (seed == 1)
      assert_int_equal (run ("cp %s %s.sound", path, path), 0);
    assert_int_equal (run ("cp %s.sound %s", path, path), 0);
    d = load_image (path);
    damages[seed % 4] (d, sound, &random);
    check_free (compare (kind, folder, d));
    bdev_unref (d);
  }
  check_free (sound);
  remove_folder (folder);
}

static void
test_kinds (void **state)
{
  for (unsigned i = 0; i < sizeof kinds / sizeof *kinds; ++i) {
    print_message ("  %s\n", kinds[i].name);
    try_kind (&kinds[i]);
  }
  /* Agreeing that all is well would prove little. */
  print_message ("  %llu errors, %llu leaks\n", (unsigned long long) all_errors,
                 (unsigned long long) all_leaks);
  assert_true (all_errors > 1000 && all_leaks > 1000);
}

/* Leaks at the end of the file decide where the image ends. */
static void
test_image_end (void **state)
{
  const struct kind kind = { .name = "end" };
  char *folder = make_folder ();
  struct bdev *d = make_image ("cluster_size=65536", "8M", "");
  struct err err = { 0 };

  assert_ok (bdev_resize (d, (UINT64_C (50) << 16) + 17, &err), &err);
  check_free (compare (&kind, folder, d));
  put_refcount (d, 30, 1);
  check_free (compare (&kind, folder, d));
  put_refcount (d, 50, 1);
  check_free (compare (&kind, folder, d));
  bdev_unref (d);
  remove_folder (folder);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_kinds),
    cmocka_unit_test (test_image_end),
  };

  if (run ("command -v qemu-img && command -v qemu-io") != 0) {
    print_message ("SKIP: qemu-img or qemu-io is not installed\n");
    return 0;
  }
  return cmocka_run_group_tests_name ("qemu", tests, NULL, NULL);
}
