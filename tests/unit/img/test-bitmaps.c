/* Persistent bitmaps: what the guest changes through us is in them, and where it
 * can't be they say that they are not to be trusted.  Judged by QEMU: qemu-img
 * info and check, and the bits as qemu-nbd exports them.
 */
#include "img-test.h"

static char *dir;

static int
make_dir (void **state)
{
  dir = make_folder ();
  return 0;
}

static int
remove_dir (void **state)
{
  remove_folder (dir);
  return 0;
}

/* A bit for each granule of the disk. */
static bool *
bits_of (const struct model *m, const char *name, uint64_t granularity)
{
  uint64_t nr = DIV_ROUND_UP (m->size, granularity);
  bool *bits = calloc (nr, 1);
  unsigned long long off, len;
  char path[512], line[200];
  unsigned kind;
  FILE *fp;

  assert_int_equal (run ("cd '%s' && nbdinfo --map=qemu:dirty-bitmap:%s -- "
                         "[ qemu-nbd -r -f qcow2 -B %s judged.qcow2 ] >map", dir, name, name), 0);
  snprintf (path, sizeof path, "%s/map", dir);
  fp = fopen (path, "r");
  assert_non_null (fp);
  while (fgets (line, sizeof line, fp)) {
    assert_int_equal (sscanf (line, "%llu %llu %u", &off, &len, &kind), 3);
    for (uint64_t i = off / granularity; kind && i < DIV_ROUND_UP (off + len, granularity); ++i)
      bits[i] = true;
  }
  fclose (fp);
  return bits;
}

/* Every granule whose bytes are not what they were is dirty, and none is that was
 * neither dirty before nor touched.
 */
static void
judge_bits (const struct model *m, const uint8_t *was, const bool *before, const bool *touched,
            const char *name, uint64_t granularity)
{
  bool *bits = bits_of (m, name, granularity);

  for (uint64_t i = 0; i < DIV_ROUND_UP (m->size, granularity); ++i) {
    uint64_t off = i * granularity, len = MIN (granularity, m->size - off);
    bool changed = memcmp (was + off, m->bytes + off, len) != 0;
    bool may = before[i];

    if ((changed || before[i]) && !bits[i])
      fail_msg ("%s: granule %llu was written, but is not dirty", name, (unsigned long long) i);
    for (uint64_t j = off / 512; touched && !may && j < DIV_ROUND_UP (off + len, 512); ++j)
      may = touched[j];
    if (touched && bits[i] && !may)
      fail_msg ("%s: granule %llu is dirty, but nobody touched it", name, (unsigned long long) i);
  }
  free (bits);
}

static void
touch (bool *touched, uint64_t off, uint64_t len)
{
  for (uint64_t i = off / 512; i < DIV_ROUND_UP (off + len, 512); ++i)
    touched[i] = true;
}

/* Is in the flags of that bitmap, as QEMU sees them? */
static bool
has_flag (const char *name, const char *flag)
{
  return run ("cd '%s' && qemu-img info --output=json judged.qcow2 | tr -d ' \\n' | "
              "grep -Eo '\\{\"flags\":\\[[^]]*\\],\"name\":\"%s\"' | grep -q '\"%s\"'", dir, name,
              flag) == 0;
}

static struct bdev *
make_file (const char *options, uint64_t size, const char *commands)
{
  char path[512];

  if (run ("cd '%s' && rm -f *.qcow2 && qemu-img create -f qcow2 -o %s made.qcow2 %llu && "
           "f=made.qcow2 && %s", dir, options, (unsigned long long) size, commands) != 0)
    fail_msg ("cannot make %s %s", options, commands);
  snprintf (path, sizeof path, "%s/made.qcow2", dir);
  return load (path, true);
}

static void
save_judged (struct bdev *file)
{
  char path[512];

  snprintf (path, sizeof path, "%s/judged.qcow2", dir);
  save (file, path);
}

static void
qemus_view_of (struct bdev *file, struct model *m)
{
  struct bdev *view = open_view (file, NULL, 0);

  for (uint64_t off = 0; off < m->size; off += 1 << 20)
    assert_int_equal (bdev_pread (view, m->bytes + off, MIN (1 << 20, m->size - off), off, NULL),
                      0);
  bdev_unref (view);
}

#define BITMAPS                                                                 \
  "qemu-io -c 'write -P 3 5M 13M' $f && "                                       \
  "qemu-img bitmap --add -g 512 $f fine && qemu-img bitmap --add -g 64k $f coarse && "  \
  "qemu-img bitmap --add $f off && qemu-io -c 'write -P 1 0 1M' -c 'write -P 2 20M 70k' "       \
  "-c 'write -z 21M 100k' $f && qemu-img bitmap --disable $f off"

static void
one_config (const char *options, unsigned cluster_bits, unsigned rounds, unsigned ops)
{
  uint64_t size = (40 << 20) + 1536;
  struct bdev *file = make_file (options, size, BITMAPS), *view;
  bool *fine, *coarse, *off, *touched = calloc (size / 512 + 1, 1);
  uint8_t *was = malloc (size);
  struct model m;

  model_init (&m, size, cluster_bits, cluster_bits);
  qemus_view_of (file, &m);
  memcpy (was, m.bytes, size);
  save_judged (file);
  fine = bits_of (&m, "fine", 512);
  coarse = bits_of (&m, "coarse", 65536);
  off = bits_of (&m, "off", 65536);
  assert_true (fine[0] && coarse[0] && off[0] && !fine[10000]);
  for (unsigned n = 0; n < rounds; ++n) {
    view = open_view (file, NULL, 0);
    for (unsigned i = 0; i < ops; ++i) {
      uint64_t at, len;

      random_range (&m, &at, &len);
      if (len == 0)
        continue;
      touch (touched, at, len);
      switch (below (&m, 6)) {
      default: do_write (view, &m, at, len, 0); break;
      case 0: do_zero (view, &m, at, len, BDEV_MAY_TRIM); break;
      case 1: do_trim (view, &m, at, len, 0); break;
      }
    }
    if (n == 0) {               /* of what was there before the bitmap was */
      do_trim (view, &m, 6 << 20, 1 << 20, 0);
      do_zero (view, &m, (9 << 20) + 100, 500000, 0);
      touch (touched, 6 << 20, 1 << 20);
      touch (touched, (9 << 20) + 100, 500000);
    }
    if (n == 1) {               /* makes a whole cluster of the bitmap ones */
      do_zero (view, &m, 1 << 20, 34 << 20, 0);
      touch (touched, 1 << 20, 34 << 20);
    }
    if (n == 2)
      assert_int_equal (bdev_flush (view, NULL), 0);
    bdev_unref (view);
    judge (dir, file, &m, CHECK_CLEAN);
    judge_bits (&m, was, fine, touched, "fine", 512);
    judge_bits (&m, was, coarse, touched, "coarse", 65536);
    judge_bits (&m, m.bytes, off, NULL, "off", 65536);
    assert_true (has_flag ("fine", "auto") && has_flag ("coarse", "auto"));
    assert_false (has_flag ("off", "auto"));
    assert_false (has_flag ("fine", "in-use") || has_flag ("coarse", "in-use"));
    /* What QEMU does with sound bitmaps works. */
    assert_int_equal (run ("cd '%s' && cp judged.qcow2 merged.qcow2 && qemu-img bitmap --add "
                           "--merge fine merged.qcow2 sum && qemu-img bitmap --clear merged.qcow2 "
                           "fine && qemu-img check merged.qcow2", dir), 0);
  }
  bdev_unref (file);
  free (fine);
  free (coarse);
  free (off);
  free (touched);
  free (was);
  free (m.bytes);
}

static void
kept_true (void **state)
{
  require_program ("qemu-img");
  require_program ("nbdinfo");
  one_config ("cluster_size=4096", 12, 4, 60);
  one_config ("cluster_size=65536,lazy_refcounts=on", 16, 3, 40);
  one_config ("cluster_size=512", 9, 3, 40);
}

/* --- what is on disk */

/* Where entry n of the directory lies. */
static uint64_t
dir_entry_off (struct bdev *file, unsigned n)
{
  uint8_t cluster[4096], raw[24];
  struct header h;
  uint64_t off;

  assert_int_equal (bdev_pread (file, cluster, sizeof cluster, 0, NULL), 0);
  header_decode (cluster, sizeof cluster, &h);
  assert_int_equal (header_decode_extensions (cluster, &h, NULL), 0);
  assert_non_null (header_find_ext (&h, EXT_BITMAPS));
  off = load_be64 (cluster + header_find_ext (&h, EXT_BITMAPS)->host_off + 16);
  header_reset (&h);
  for (; n > 0; --n) {
    assert_int_equal (bdev_pread (file, raw, sizeof raw, off, NULL), 0);
    off = ROUND_UP (off + 24 + load_be32 (raw + 20) + load_be16 (raw + 18), 8);
  }
  return off;
}

static uint32_t
flags_of (struct bdev *file, unsigned n)
{
  uint8_t raw[4];

  assert_int_equal (bdev_pread (file, raw, 4, dir_entry_off (file, n) + 12, NULL), 0);
  return load_be32 (raw);
}

static bool
autoclear_set (struct bdev *file)
{
  uint8_t raw[8];

  assert_int_equal (bdev_pread (file, raw, 8, HEADER_OFF_AUTOCLEAR, NULL), 0);
  return load_be64 (raw) & AUTOCLEAR_BITMAPS;
}

static void
touch_disk (struct bdev *file)
{
  struct bdev *view = open_view (file, NULL, 0);
  struct err err = { 0 };
  uint8_t buf[512] = { 1 };

  assert_ok (bdev_pwrite (view, buf, sizeof buf, 5 << 20, 0, &err), &err);
  bdev_unref (view);
}

/* Reading, and closing after it, changes nothing. */
static void
read_changes_nothing (void **state)
{
  struct bdev *file, *view;
  uint8_t buf[512];

  require_program ("qemu-img");
  file = make_file ("cluster_size=4096", 40 << 20, BITMAPS);
  file->writable = true;
  view = open_view (file, NULL, 0);
  assert_int_equal (bdev_pread (view, buf, 512, 0, NULL), 0);
  assert_int_equal (bdev_flush (view, NULL), 0);
  bdev_unref (view);
  save_judged (file);
  assert_int_equal (run ("cd '%s' && cmp judged.qcow2 made.qcow2", dir), 0);
  bdev_unref (file);
}

/* In use from before the first write to the end; for a crash in between. */
static void
in_use_meanwhile (void **state)
{
  struct bdev *file, *view;
  uint8_t buf[512] = { 7 };

  require_program ("qemu-img");
  file = make_file ("cluster_size=4096", 40 << 20, BITMAPS);
  view = open_view (file, NULL, 0);
  assert_int_equal (flags_of (file, 0), 2);
  assert_int_equal (bdev_pwrite (view, buf, 512, 0, 0, NULL), 0);
  assert_int_equal (flags_of (file, 0), 3);
  assert_int_equal (flags_of (file, 1), 3);
  assert_int_equal (flags_of (file, 2), 0);
  assert_int_equal (bdev_flush (view, NULL), 0);
  save_judged (file);
  assert_true (has_flag ("fine", "in-use") && has_flag ("coarse", "in-use"));
  assert_false (has_flag ("off", "in-use"));
  assert_true (autoclear_set (file));
  bdev_unref (view);
  assert_int_equal (flags_of (file, 0), 2);
  assert_true (autoclear_set (file));
  /* One that was in use when we came stays so. */
  store_be32 (buf, 3);
  assert_int_equal (bdev_pwrite (file, buf, 4, dir_entry_off (file, 1) + 12, 0, NULL), 0);
  touch_disk (file);
  assert_int_equal (flags_of (file, 0), 2);
  assert_int_equal (flags_of (file, 1), 3);
  bdev_unref (file);
}

/* Patch the first bitmap; the second is kept all the same. */
static void
cannot_be_kept (void **state)
{
  static const struct { unsigned off, len; uint32_t value; uint32_t flags; } cases[] = {
    { 12, 4, 0x12, 0x13 },              /* a flag of the future */
    { 16, 1, 2, 3 },                    /* a type of the future */
    { 17, 1, 70, 3 },                   /* a granularity that can't be */
    { 4, 4, 0x12345678, 3 },            /* nonsense about the table ... */
    { 0, 4, 0x00ffffff, 3 },
    { 8, 4, 999, 3 },
  };

  require_program ("qemu-img");
  for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    struct bdev *file = make_file ("cluster_size=4096", 40 << 20, BITMAPS);
    uint8_t raw[4], before[24], after[24];
    uint64_t at = dir_entry_off (file, 0);

    if (cases[i].len == 1)
      raw[0] = cases[i].value;
    else
      store_be32 (raw, cases[i].value);
    assert_int_equal (bdev_pwrite (file, raw, cases[i].len, at + cases[i].off, 0, NULL), 0);
    assert_int_equal (bdev_pread (file, before, 24, at, NULL), 0);
    touch_disk (file);
    assert_int_equal (flags_of (file, 0), cases[i].flags);
    assert_int_equal (flags_of (file, 1), 2);
    assert_true (autoclear_set (file));
    assert_int_equal (bdev_pread (file, after, 24, at, NULL), 0);
    store_be32 (before + 12, cases[i].flags);
    assert_memory_equal (before, after, 24);
    bdev_unref (file);
  }
}

/* A bad entry in a bitmap's table. */
static void
damaged_table (void **state)
{
  struct bdev *file;
  uint8_t raw[8];
  uint64_t table;

  require_program ("qemu-img");
  file = make_file ("cluster_size=4096", 40 << 20, BITMAPS);
  assert_int_equal (bdev_pread (file, raw, 8, dir_entry_off (file, 0), NULL), 0);
  table = load_be64 (raw);
  store_be64 (raw, UINT64_C (1) << 50);
  assert_int_equal (bdev_pwrite (file, raw, 8, table, 0, NULL), 0);
  touch_disk (file);
  assert_int_equal (flags_of (file, 0), 3);
  assert_int_equal (flags_of (file, 1), 2);
  bdev_unref (file);
}

/* Nothing to be understood: all are declared out of date, as by a program that
 * knows nothing of bitmaps.
 */
static void
damaged_directory (void **state)
{
  struct bdev *file;
  uint8_t raw[2] = { 0xff, 0xff };

  require_program ("qemu-img");
  file = make_file ("cluster_size=4096", 40 << 20, BITMAPS);
  assert_int_equal (bdev_pwrite (file, raw, 2, dir_entry_off (file, 2) + 18, 0, NULL), 0);
  touch_disk (file);
  assert_int_equal (flags_of (file, 0), 2);
  assert_false (autoclear_set (file));
  bdev_unref (file);
}

/* No cluster left to store it in. */
static void
no_space (void **state)
{
  struct bdev *file, *fixed, *view;
  uint8_t buf[4096] = { 9 };
  struct err err = { 0 };
  char path[512];

  require_program ("qemu-img");
  file = make_file ("cluster_size=4096", 40 << 20,
                    "qemu-img bitmap --add -g 512 $f fine && qemu-io -c 'write 0 64k' "
                    "-c 'write 30M 4k' -c 'write 20M 4k' $f && "
                    "qemu-img bitmap --clear $f fine && qemu-img bitmap --add $f other && "
                    "truncate -s %4096 $f");
  bdev_unref (file);
  snprintf (path, sizeof path, "%s/made.qcow2", dir);
  fixed = load (path, false);
  view = open_view (fixed, NULL, 0);
  /* What QEMU freed is used first; until nothing is free. */
  for (uint64_t off = 1 << 20; bdev_pwrite (view, buf, sizeof buf, off, 0, &err) == 0; off += 4096)
    assert_true (off < 20 << 20);
  assert_int_equal (err.code, ENOSPC);
  bdev_unref (view);
  save_judged (fixed);
  assert_int_equal (run ("cd '%s' && qemu-img check judged.qcow2", dir), 0);
  assert_true (has_flag ("fine", "in-use") || has_flag ("other", "in-use"));
  bdev_unref (fixed);
}

/* --- power cuts */

struct cut {
  struct bdev *crash;
  const struct model *start;
  const bool *before;
  unsigned states, trusted;
  bool closing;                 /* the interesting part */
};

/* Leaks at worst; and if the bitmap says that it can be trusted, it can. */
static void
cut_power (void *opaque)
{
  struct cut *c = opaque;

  for (unsigned seed = 0; seed < (c->closing ? 24 : 3); ++seed) {
    struct bdev *state = NULL;
    struct model now;
    struct err err = { 0 };
    int r;

    ++c->states;
    assert_ok (crash_now (c->crash, seed, &state, &err), &err);
    save_judged (state);
    r = run ("cd '%s' && qemu-img check judged.qcow2", dir);
    assert_true (r == CHECK_CLEAN || r == CHECK_LEAKS);
    if (!(flags_of (state, 0) & 1)) {
      ++c->trusted;
      model_init (&now, c->start->size, 12, 0);
      qemus_view_of (state, &now);
      judge_bits (&now, c->start->bytes, c->before, NULL, "fine", 512);
      free (now.bytes);
    }
    bdev_unref (state);
  }
}

static void
loses_power (void **state)
{
  struct bdev *file, *view;
  struct model m, work;
  struct cut c = { 0 };
  struct err err = { 0 };
  bool *before;

  require_program ("qemu-img");
  require_program ("nbdinfo");
  file = make_file ("cluster_size=4096", 40 << 20, BITMAPS);
  model_init (&m, 40 << 20, 12, 3);
  model_init (&work, 40 << 20, 12, 3);
  qemus_view_of (file, &m);
  memcpy (work.bytes, m.bytes, m.size);
  save_judged (file);
  c.start = &m;
  c.before = before = bits_of (&m, "fine", 512);
  assert_ok (crash_new (file, &c.crash, &err), &err);
  crash_set_hook (c.crash, cut_power, &c);
  view = open_view (c.crash, NULL, 0);
  for (unsigned i = 0; i < 60; ++i)
    do_random (view, &work);
  /* Clusters of the bitmap come and go. */
  do_trim (view, &work, 16 << 20, 17 << 20, 0);
  c.closing = true;
  bdev_unref (view);
  c.closing = false;
  view = open_view (c.crash, NULL, 0);
  do_write (view, &work, 35 << 20, 5000, 0);
  bdev_unref (view);
  crash_set_hook (c.crash, NULL, NULL);
  bdev_unref (c.crash);
  assert_true (c.trusted > 10 && c.states - c.trusted > 30);
  judge (dir, file, &work, CHECK_CLEAN);
  judge_bits (&work, m.bytes, before, NULL, "fine", 512);
  bdev_unref (file);
  free (before);
  free (m.bytes);
  free (work.bytes);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (kept_true),
    cmocka_unit_test (read_changes_nothing),
    cmocka_unit_test (in_use_meanwhile),
    cmocka_unit_test (cannot_be_kept),
    cmocka_unit_test (damaged_table),
    cmocka_unit_test (damaged_directory),
    cmocka_unit_test (no_space),
    cmocka_unit_test (loses_power),
  };

  return cmocka_run_group_tests (tests, make_dir, remove_dir);
}
