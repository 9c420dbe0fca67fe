/* Healing, judged by a second check and by qemu-img; and the two sweeps: every
 * operation fails once or for good, and the power is cut at every flush.  After
 * either, healing again must end in a sound image (I6).
 */
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/cleanup.h"
#include "base/endian.h"
#include "base/num.h"
#include "dev/file.h"
#include "dev/mem.h"
#include "fault.h"
#include "heal/heal.h"

static char dir[] = "/tmp/test-heal.XXXXXX";

static int __attribute__ ((format (printf, 1, 2)))
run (const char *fmt, ...)
{
  char cmd[2048];
  va_list args;
  int r;

  va_start (args, fmt);
  vsnprintf (cmd, sizeof cmd, fmt, args);
  va_end (args);
  r = system (cmd);
  return WIFEXITED (r) ? WEXITSTATUS (r) : -1;
}

/* An image with three snapshots that share clusters, by stock tools. */
static void
make_image (const char *options)
{
  assert_int_equal (run ("cd %s && rm -f i && qemu-img create -q -f qcow2 -o %s i 8M && "
                         "qemu-io -f qcow2 -c 'write -q -P 1 0 2M' -c 'write -q -P 2 5M 512k' i && "
                         "qemu-img snapshot -c a i && "
                         "qemu-io -f qcow2 -c 'write -q -P 3 1M 300k' i && "
                         "qemu-img snapshot -c b i && "
                         "qemu-io -f qcow2 -c 'write -q -P 4 1100k 300k' i && "
                         "qemu-img snapshot -c c i && "
                         "qemu-io -f qcow2 -c 'write -q -P 5 64k 100k' -c 'discard -q 1M 64k' i",
                         dir, options), 0);
}

static struct bdev *
load (bool can_grow)
{
  CLEANUP_FREE char *path = NULL, *buf = NULL;
  struct bdev *file, *mem;
  uint64_t size;

  assert_true (asprintf (&path, "%s/i", dir) > 0);
  assert_int_equal (file_open (path, 0, &file, NULL), 0);
  size = bdev_size (file);
  buf = malloc (size);
  assert_int_equal (bdev_pread (file, buf, size, 0, NULL), 0);
  bdev_unref (file);
  assert_int_equal (mem_new ("healed", size, can_grow, &mem, NULL), 0);
  assert_int_equal (bdev_pwrite (mem, buf, size, 0, 0, NULL), 0);
  return mem;
}

static void
store (struct bdev *d, const char *name)
{
  uint64_t size = bdev_size (d);
  CLEANUP_FREE char *path = NULL, *buf = malloc (size);
  FILE *fp;

  assert_true (asprintf (&path, "%s/%s", dir, name) > 0);
  assert_int_equal (bdev_pread (d, buf, size, 0, NULL), 0);
  fp = fopen (path, "w");
  assert_non_null (fp);
  assert_int_equal (fwrite (buf, 1, size, fp), size);
  assert_int_equal (fclose (fp), 0);
}

static struct check *
check (struct bdev *d)
{
  struct check_options opts = { .memory_limit = 0 };
  struct check *c;
  struct err err = { 0 };

  if (check_run (d, &opts, &c, &err) != 0)
    fail_msg ("%s", err.msg);
  return c;
}

/* One pass of check, heal, check, finish, as the stack does it. */
static int
heal (struct bdev *d, struct heal_result *res, struct err *err)
{
  struct check_options opts = { .memory_limit = 0 };
  struct check *before = NULL, *after = NULL;
  int r = check_run (d, &opts, &before, err);

  memset (res, 0, sizeof *res);
  if (r == 0)
    r = heal_run (d, before, REPAIR_REFCOUNTS, NULL, res, err);
  if (r == 0)
    r = check_run (d, &opts, &after, err);
  if (r == 0)
    r = heal_finish (d, after, res, err);
  check_free (before);
  check_free (after);
  return r;
}

static void
assert_clean (struct bdev *d)
{
  struct check *c = check (d);

  assert_false (findings_any (&c->findings, SEV_LEAK));
  check_free (c);
  store (d, "healed");
  assert_int_equal (run ("cd %s && qemu-img check -q -f qcow2 healed >check.log 2>&1", dir), 0);
}

static void
assert_same_guest_bytes (struct bdev *d)
{
  store (d, "healed");
  assert_int_equal (run ("cd %s && qemu-img compare -q -f qcow2 -F qcow2 i healed", dir), 0);
  assert_int_equal (run ("cd %s && for s in a b c; do for i in i healed; do "
                         "qemu-img convert -q -f qcow2 -l snapshot.name=$s -O raw $i $i.raw "
                         "|| exit 1; done; cmp i.raw healed.raw || exit 1; done", dir), 0);
}

static void
put64 (struct bdev *d, uint64_t off, uint64_t v)
{
  uint8_t buf[8];

  store_be64 (buf, v);
  assert_int_equal (bdev_pwrite (d, buf, 8, off, 0, NULL), 0);
}

static uint64_t
get64 (struct bdev *d, uint64_t off)
{
  uint8_t buf[8];

  assert_int_equal (bdev_pread (d, buf, 8, off, NULL), 0);
  return load_be64 (buf);
}

static void
put32 (struct bdev *d, uint64_t off, uint32_t v)
{
  uint8_t buf[4];

  store_be32 (buf, v);
  assert_int_equal (bdev_pwrite (d, buf, 4, off, 0, NULL), 0);
}

/* --- ways to break the refcounts */

static void
no_table (struct bdev *d)
{
  put64 (d, HEADER_OFF_RT, 0);
  put32 (d, HEADER_OFF_RT_CLUSTERS, 0);
}

static void
table_zeroed (struct bdev *d)
{
  for (unsigned i = 0; i < 512; i += 8)
    put64 (d, get64 (d, HEADER_OFF_RT) + i, 0);
}

static void
table_misaligned (struct bdev *d)
{
  put64 (d, HEADER_OFF_RT, get64 (d, HEADER_OFF_RT) + 8);
}

static void
table_outside (struct bdev *d)
{
  put64 (d, HEADER_OFF_RT, ROUND_UP (bdev_size (d), 1 << 21) + (1 << 21));
}

static void
table_overflows_signed (struct bdev *d)
{
  put64 (d, HEADER_OFF_RT, UINT64_C (0x7fffffffffe00000));
}

static void
table_overflows_unsigned (struct bdev *d)
{
  put64 (d, HEADER_OFF_RT, UINT64_C (0xffffffffffe00000));
  put32 (d, HEADER_OFF_RT_CLUSTERS, UINT32_MAX);
}

static void
table_on_l1 (struct bdev *d)
{
  put64 (d, HEADER_OFF_RT, get64 (d, HEADER_OFF_L1_TABLE));
}

static void
block_zeroed (struct bdev *d)
{
  uint64_t rb = get64 (d, get64 (d, HEADER_OFF_RT));

  for (unsigned i = 0; i < 512; i += 8)
    put64 (d, rb + i, 0);
}

static void
block_random (struct bdev *d)
{
  uint64_t rb = get64 (d, get64 (d, HEADER_OFF_RT));

  srandom (3);
  for (unsigned i = 0; i < 512; i += 8)
    put64 (d, rb + i, (uint64_t) random () << 32 | random ());
}

static void
block_on_l2 (struct bdev *d)
{
  put64 (d, get64 (d, HEADER_OFF_RT), get64 (d, get64 (d, HEADER_OFF_L1_TABLE)) & L1E_OFF_MASK);
}

static void
block_outside (struct bdev *d)
{
  put64 (d, get64 (d, HEADER_OFF_RT), UINT64_C (1) << 55);
}

/* Entry 1 names the block of entry 0. */
static void
block_twice (struct bdev *d)
{
  uint64_t rt = get64 (d, HEADER_OFF_RT);

  put64 (d, rt + 8, get64 (d, rt));
}

static void
copied_flags_wrong (struct bdev *d)
{
  uint64_t l1 = get64 (d, HEADER_OFF_L1_TABLE);
  uint64_t l2 = get64 (d, l1) & L1E_OFF_MASK;

  put64 (d, l1, get64 (d, l1) ^ ENTRY_COPIED);
  for (unsigned i = 0; i < 64; ++i)
    if (get64 (d, l2 + i * 8) & L2E_OFF_MASK)
      put64 (d, l2 + i * 8, get64 (d, l2 + i * 8) ^ ENTRY_COPIED);
}

static void
dirty_and_corrupt (struct bdev *d)
{
  put64 (d, HEADER_OFF_INCOMPATIBLE,
         get64 (d, HEADER_OFF_INCOMPATIBLE) | INCOMPAT_DIRTY | INCOMPAT_CORRUPT);
}

static void
everything (struct bdev *d)
{
  block_random (d);
  copied_flags_wrong (d);
  dirty_and_corrupt (d);
}

static const struct damage {
  const char *name;
  void (*inflict) (struct bdev *);
  /* Is the whole structure rebuilt, by DESIGN's smallest repair? */
  enum { NEVER, ALWAYS, IF_ONLY_BLOCK } rebuilds;
  bool v3_only;
} damages[] = {
  { "no table", no_table, ALWAYS },
  { "table zeroed", table_zeroed, ALWAYS },
  { "table misaligned", table_misaligned, ALWAYS },
  { "table outside", table_outside, ALWAYS },
  { "table overflows signed", table_overflows_signed, ALWAYS },
  { "table overflows unsigned", table_overflows_unsigned, ALWAYS },
  { "table on L1", table_on_l1, ALWAYS },
  { "block zeroed", block_zeroed, NEVER },
  { "block random", block_random, NEVER },
  { "block on L2", block_on_l2, IF_ONLY_BLOCK },
  { "block outside", block_outside, IF_ONLY_BLOCK },
  { "COPIED flags", copied_flags_wrong, NEVER },
  { "dirty and corrupt", dirty_and_corrupt, NEVER, true },
  { "everything", everything, NEVER, true },
};

static const char *const image_options[] = {
  "compat=1.1,cluster_size=64k",
  "compat=0.10,cluster_size=4k",
  "compat=1.1,cluster_size=4k,refcount_bits=64",
  "compat=1.1,cluster_size=64k,refcount_bits=4",
  "compat=1.1,cluster_size=2M,refcount_bits=8",
};

/* Does one refcount block describe the whole file? */
static bool
has_one_block (struct bdev *d)
{
  struct check *c = check (d);
  bool one = bdev_size (d) >> c->geom.cluster_bits <= c->geom.rb_entries;

  check_free (c);
  return one;
}

static bool
should_rebuild (const struct damage *damage, struct bdev *d)
{
  return damage->rebuilds == ALWAYS
         || (damage->rebuilds == IF_ONLY_BLOCK && has_one_block (d));
}

static void
test_every_damage_on_every_kind (void **state)
{
  for (size_t o = 0; o < sizeof image_options / sizeof image_options[0]; ++o) {
    make_image (image_options[o]);
    for (size_t i = 0; i < sizeof damages / sizeof damages[0]; ++i) {
      struct bdev *d = load (true);
      struct heal_result res;
      struct err err = { 0 };
      uint64_t size = bdev_size (d);

      if (damages[i].v3_only && strstr (image_options[o], "0.10")) {
        bdev_unref (d);
        continue;
      }
      print_message ("%s: %s\n", image_options[o], damages[i].name);
      damages[i].inflict (d);
      if (heal (d, &res, &err) != 0)
        fail_msg ("%s", err.msg);
      assert_int_equal (res.rebuilt, should_rebuild (&damages[i], d));
      assert_clean (d);
      assert_same_guest_bytes (d);
      assert_true (bdev_size (d) <= ROUND_UP (size, 1 << 21));
      bdev_unref (d);
    }
  }
}

/* With 512-byte clusters there are many blocks: one of them can be lost alone. */
static void
test_one_block_is_replaced_alone (void **state)
{
  static void (*const ways[]) (struct bdev *) = { block_twice, block_outside, block_on_l2 };

  make_image ("compat=1.1,cluster_size=512");
  for (size_t i = 0; i < 3; ++i) {
    struct bdev *d = load (true);
    struct heal_result res;
    struct err err = { 0 };

    ways[i] (d);
    if (heal (d, &res, &err) != 0)
      fail_msg ("%s", err.msg);
    assert_false (res.rebuilt);
    assert_int_equal (res.blocks_replaced, 1);
    assert_clean (d);
    assert_same_guest_bytes (d);
    bdev_unref (d);
  }
}

static void
test_sound_image_is_left_alone (void **state)
{
  struct heal_result res;
  struct err err = { 0 };
  struct bdev *d, *f;

  make_image ("compat=1.1,cluster_size=4k");
  d = load (true);
  assert_int_equal (fault_new (d, 0, FAULT_ONCE, &f, NULL), 0);
  assert_int_equal (heal (f, &res, &err), 0);
  assert_int_equal (fault_count (f), 0);
  bdev_unref (f);
  bdev_unref (d);
}

/* Four owners of a cluster, and refcounts of two bits: wider ones are needed. */
static void
test_refcounts_are_widened (void **state)
{
  struct heal_result res;
  struct err err = { 0 };
  struct bdev *d;
  struct check *c;

  make_image ("compat=1.1,cluster_size=64k,refcount_bits=4");
  d = load (true);
  /* Say that the width is one bit: all snapshots overflow it. */
  put32 (d, HEADER_OFF_REFCOUNT_ORDER, 0);
  c = check (d);
  assert_true (findings_has (&c->findings, FINDING_REFCOUNT_OVERFLOW));
  check_free (c);
  if (heal (d, &res, &err) != 0)
    fail_msg ("%s", err.msg);
  assert_true (res.rebuilt);
  assert_int_equal (res.refcount_bits, 4);
  assert_clean (d);
  assert_same_guest_bytes (d);
  bdev_unref (d);
}

/* Every operation fails once, or from there on; healing the result ends well. */
static void
test_fault_sweep (void **state)
{
  static void (*const ways[]) (struct bdev *) = { table_zeroed, everything, block_twice };

  make_image ("compat=1.1,cluster_size=512");
  for (size_t w = 0; w < 3; ++w)
    for (int kind = FAULT_ONCE; kind <= FAULT_STICKY; ++kind) {
      bool fired = true;

      for (unsigned n = 1; fired; ++n) {
        struct bdev *d = load (true), *f;
        struct heal_result res;
        int r;

        ways[w] (d);
        assert_int_equal (fault_new (d, n, kind, &f, NULL), 0);
        r = heal (f, &res, NULL);
        fired = fault_fired (f);
        assert_true (fired ? r == -EIO : r == 0);
        bdev_unref (f);
        assert_int_equal (heal (d, &res, NULL), 0);
        {
          struct check *c = check (d);

          assert_false (findings_any (&c->findings, SEV_LEAK));
          check_free (c);
        }
        if (!fired || n % 16 == 1) {
          assert_clean (d);
          assert_same_guest_bytes (d);
        }
        bdev_unref (d);
      }
    }
}

struct cut {
  struct bdev *crash;
  unsigned at, seen, seed;
  struct bdev *state;           /* what the cut left */
};

static void
cut_here (void *opaque)
{
  struct cut *cut = opaque;

  if (cut->seen++ == cut->at)
    assert_int_equal (crash_now (cut->crash, cut->seed, &cut->state, NULL), 0);
}

static void
test_power_cuts (void **state)
{
  static void (*const ways[]) (struct bdev *) = { table_zeroed, everything, block_twice };

  make_image ("compat=1.1,cluster_size=512");
  for (size_t w = 0; w < 3; ++w) {
    bool more = true;

    for (unsigned at = 0; more; ++at)
      for (unsigned seed = 0; seed < 6; ++seed) {
        struct cut cut = { .at = at, .seed = seed };
        struct bdev *d = load (true);
        struct heal_result res;

        ways[w] (d);
        assert_int_equal (crash_new (d, &cut.crash, NULL), 0);
        crash_set_hook (cut.crash, cut_here, &cut);
        assert_int_equal (heal (cut.crash, &res, NULL), 0);
        more = cut.state != NULL;
        if (more) {
          assert_int_equal (heal (cut.state, &res, NULL), 0);
          assert_clean (cut.state);
          if (seed == 2)
            assert_same_guest_bytes (cut.state);
          bdev_unref (cut.state);
        }
        bdev_unref (cut.crash);
        bdev_unref (d);
      }
  }
}

/* The new structure takes the old one's places, so that it must not do for the new. */
static void
structure_lost (struct bdev *d, unsigned cluster_size)
{
  uint64_t rt = get64 (d, HEADER_OFF_RT), rb = get64 (d, rt);

  for (unsigned i = 0; i < cluster_size; i += 8) {
    put64 (d, rt + i, 0);
    put64 (d, rb + i, 0);
  }
  table_misaligned (d);
}

/* I5, seen from outside: once the header is switched, the new structure is all
 * there.
 */
static void
test_header_switches_last (void **state)
{
  make_image ("compat=1.1,cluster_size=4k");
  for (unsigned at = 0; at < 3; ++at)
    for (unsigned seed = 0; seed < 20; ++seed) {
      struct cut cut = { .at = at, .seed = seed };
      struct bdev *d = load (true);
      struct heal_result res;
      struct check *c;
      uint64_t old;

      structure_lost (d, 4096);
      old = get64 (d, HEADER_OFF_RT);
      assert_int_equal (crash_new (d, &cut.crash, NULL), 0);
      crash_set_hook (cut.crash, cut_here, &cut);
      assert_int_equal (heal (cut.crash, &res, NULL), 0);
      if (cut.state) {
        c = check (cut.state);
        if (get64 (cut.state, HEADER_OFF_RT) != old) {
          assert_true (c->rt.usable);
          assert_false (findings_has (&c->findings, FINDING_REFCOUNT_LOW));
        }
        check_free (c);
        bdev_unref (cut.state);
      }
      bdev_unref (cut.crash);
      bdev_unref (d);
    }
}

static void
test_full_device (void **state)
{
  struct heal_result res;
  struct err err = { 0 };
  struct bdev *d;

  /* Room inside, or only the old structures' clusters: both must do. */
  make_image ("compat=1.1,cluster_size=4k");
  d = load (false);
  table_zeroed (d);
  if (heal (d, &res, &err) != 0)
    fail_msg ("%s", err.msg);
  assert_clean (d);
  bdev_unref (d);
}

static int
setup (void **state)
{
  return mkdtemp (dir) ? 0 : -1;
}

static int
teardown (void **state)
{
  return run ("rm -rf %s", dir);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_every_damage_on_every_kind),
    cmocka_unit_test (test_one_block_is_replaced_alone),
    cmocka_unit_test (test_sound_image_is_left_alone),
    cmocka_unit_test (test_refcounts_are_widened),
    cmocka_unit_test (test_fault_sweep),
    cmocka_unit_test (test_power_cuts),
    cmocka_unit_test (test_header_switches_last),
    cmocka_unit_test (test_full_device),
  };

  return cmocka_run_group_tests (tests, setup, teardown);
}
