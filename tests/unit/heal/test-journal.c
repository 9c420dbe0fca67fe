/* An overlay on its way into its source: whatever operation fails, and whatever a
 * power cut leaves of what was not flushed, either the source is as it was, or the
 * journal says that it is committing and copying it again gives the healed bytes,
 * or it says that it is done and the source is the healed bytes.
 */
#include "unit/unit.h"

#include "base/cleanup.h"
#include "base/num.h"
#include "dev/mem.h"
#include "fault.h"
#include "heal/journal.h"
#include "heal/overlay.h"
#include "img/image.h"

#define OLD_SIZE (700 * 1024 + 1000)    /* not whole sectors, as a file that was cut short */
#define NEW_SIZE (900 * 1024)

static uint8_t old_bytes[OLD_SIZE], new_bytes[NEW_SIZE];

/* What the cases differ in. */
struct shape {
  const char *name;
  bool grows;
};

static const struct shape shapes[] = { { "of one length", false }, { "growing", true } };

static uint64_t
new_size (const struct shape *s)
{
  return s->grows ? NEW_SIZE : ROUND_UP (OLD_SIZE, 512);
}

static struct bdev *
make_source_that (bool can_grow)
{
  struct bdev *d;

  assert_int_equal (mem_new ("source", OLD_SIZE, can_grow, &d, NULL), 0);
  assert_int_equal (bdev_pwrite (d, old_bytes, OLD_SIZE, 0, 0, NULL), 0);
  return d;
}

static struct bdev *
make_source (void)
{
  return make_source_that (true);
}

static struct bdev *
open_healed (struct bdev *file, struct bdev *source)
{
  struct err err = { 0 };
  struct bdev *healed;

  assert_ok (overlay_reopen (file, source, &healed, &err), &err);
  image_set_growable (healed, true);
  return healed;
}

/* Data, equal data, zeros over data and over nothing, and the end of the file. */
static void
change (struct bdev *healed, const struct shape *s)
{
  static const struct { uint64_t off, len; int value; } changes[] = {
    { 0, 100, 0x11 }, { 70000, 5000, 0x22 }, { 200000, 140000, 0 }, { 400000, 1, 0x33 },
    { OLD_SIZE - 10, 10, 0x44 },
  };
  uint64_t size = new_size (s);

  if (s->grows)
    assert_int_equal (bdev_resize (healed, size, NULL), 0);
  memset (new_bytes, 0, sizeof new_bytes);
  memcpy (new_bytes, old_bytes, OLD_SIZE);
  for (size_t i = 0; i < sizeof changes / sizeof changes[0]; ++i) {
    uint8_t *at = new_bytes + changes[i].off;

    memset (at, changes[i].value, changes[i].len);
    assert_int_equal (changes[i].value
                      ? bdev_pwrite (healed, at, changes[i].len, changes[i].off, 0, NULL)
                      : bdev_zero (healed, changes[i].off, changes[i].len, BDEV_MAY_TRIM, NULL), 0);
  }
  assert_int_equal (bdev_pwrite (healed, new_bytes + 500000, 3000, 500000, 0, NULL), 0);
  if (s->grows) {
    memset (new_bytes + size - 5000, 0x55, 5000);
    assert_int_equal (bdev_pwrite (healed, new_bytes + size - 5000, 5000, size - 5000, 0, NULL), 0);
  }
}

/* A plain overlay without changes, in file. */
static void
make_empty_overlay (struct bdev *file)
{
  struct fingerprint f = { .state = OVERLAY_PLAIN, .source_size = OLD_SIZE };
  uint8_t ext[FINGERPRINT_LENGTH];
  struct image_params p = {
    .version = 3, .cluster_bits = 16, .refcount_order = 4, .size = ROUND_UP (OLD_SIZE, 512),
    .max_size = NEW_SIZE, .backing_name = "source", .backing_format = "raw",
    .private_ext_type = FINGERPRINT_EXT, .private_ext = ext, .private_ext_len = sizeof ext,
  };

  fingerprint_encode (&f, ext);
  assert_int_equal (image_create (file, &p, NULL), 0);
}

static struct bdev *
new_mem (void)
{
  struct bdev *d;

  assert_int_equal (mem_new ("journal", 0, true, &d, NULL), 0);
  return d;
}

/* One with these changes, in RAM. */
static struct bdev *
make_overlay (struct bdev *source, const struct shape *s)
{
  struct bdev *file = new_mem (), *healed;

  make_empty_overlay (file);
  healed = open_healed (file, source);
  change (healed, s);
  bdev_unref (healed);
  return file;
}

static bool
holds (struct bdev *d, const uint8_t *bytes, uint64_t size)
{
  CLEANUP_FREE uint8_t *buf = malloc (size);

  if (bdev_size (d) != size)
    return false;
  assert_int_equal (bdev_pread (d, buf, size, 0, NULL), 0);
  return memcmp (buf, bytes, size) == 0;
}

static enum overlay_state
state_of (struct bdev *file)
{
  struct err err = { 0 };
  struct fingerprint f;
  uint64_t host_off;

  assert_ok (fingerprint_read (file, &f, &host_off, &err), &err);
  return f.state;
}

/* All of a commit, of an overlay that is open and may have unflushed changes. */
static int
commit_open (struct bdev *file, struct bdev *healed, struct bdev *source, struct err *err)
{
  struct journal_result res;
  int r = journal_mark (file, healed, source, OVERLAY_COMMITTING, err);

  if (r == 0)
    r = journal_copy (file, healed, source, false, NULL, &res, err);
  if (r == 0)
    r = journal_mark (file, healed, source, OVERLAY_DONE, err);
  return r;
}

static int
commit (struct bdev *file, struct bdev *source, struct err *err)
{
  struct bdev *healed = NULL;
  int r = overlay_reopen (file, source, &healed, err);

  if (r == 0)
    r = commit_open (file, healed, source, err);
  bdev_unref (healed);
  return r;
}

/* The start after it: the promise at the top of this file. */
static enum overlay_state
recover (struct bdev *file, struct bdev *source, const struct shape *s)
{
  enum overlay_state state = state_of (file);
  struct journal_result res;
  struct err err = { 0 };
  struct bdev *healed;

  if (state == OVERLAY_PLAIN)
    assert_true (holds (source, old_bytes, OLD_SIZE));
  if (state == OVERLAY_COMMITTING) {
    assert_ok (journal_accept (file, source, &healed, &err), &err);
    assert_true (holds (healed, new_bytes, new_size (s)));
    assert_ok (journal_copy (file, healed, source, true, NULL, &res, &err), &err);
    bdev_unref (healed);
  }
  if (state != OVERLAY_PLAIN)
    assert_true (holds (source, new_bytes, new_size (s)));
  return state;
}

/* --- */

static void
commits (void **state)
{
  for (size_t i = 0; i < 2; ++i) {
    struct bdev *source = make_source (), *file = make_overlay (source, &shapes[i]);
    struct err err = { 0 };

    assert_true (holds (source, old_bytes, OLD_SIZE));
    assert_ok (commit (file, source, &err), &err);
    assert_int_equal (recover (file, source, &shapes[i]), OVERLAY_DONE);
    bdev_unref (file);
    bdev_unref (source);
  }
}

/* I1: without the mark, not a byte is written. */
static void
copies_nothing_unmarked (void **state)
{
  struct bdev *source = make_source (), *file = make_overlay (source, &shapes[1]), *healed;
  struct journal_result res;

  healed = open_healed (file, source);
  assert_int_equal (journal_copy (file, healed, source, false, NULL, &res, NULL), -EINVAL);
  assert_true (holds (source, old_bytes, OLD_SIZE));
  assert_int_equal (journal_accept (file, source, &healed, NULL), -EINVAL);
  bdev_unref (healed);
  bdev_unref (file);
  bdev_unref (source);
}

/* Bytes that are there already are not written; the second time, all are. */
static void
writes_what_differs (void **state)
{
  struct bdev *source = make_source (), *file = make_overlay (source, &shapes[0]), *healed;
  struct journal_result res;

  healed = open_healed (file, source);
  assert_int_equal (journal_mark (file, healed, source, OVERLAY_COMMITTING, NULL), 0);
  assert_int_equal (journal_copy (file, healed, source, false, NULL, &res, NULL), 0);
  assert_in_range (res.bytes_written, 5000, 5 * 65536 / 2);     /* five clusters hold data */
  assert_int_equal (res.bytes_zeroed, 65536);                   /* one was zeroed as a whole */
  assert_int_equal (journal_copy (file, healed, source, false, NULL, &res, NULL), 0);
  assert_int_equal (res.bytes_written + res.bytes_zeroed, 0);
  assert_int_equal (journal_copy (file, healed, source, true, NULL, &res, NULL), 0);
  assert_in_range (res.bytes_written, 4 * 65536, NEW_SIZE);
  bdev_unref (healed);
  bdev_unref (file);
  bdev_unref (source);
}

static void
refuses_a_source_that_changed (void **state)
{
  static const uint64_t places[] = { 150000, 600000 };  /* the overlay has nothing there */

  for (size_t i = 0; i < 3; ++i) {
    struct bdev *source = make_source (), *file = make_overlay (source, &shapes[0]);
    struct bdev *healed = open_healed (file, source), *other = NULL;
    uint8_t byte = 0xee;

    assert_int_equal (journal_mark (file, healed, source, OVERLAY_COMMITTING, NULL), 0);
    bdev_unref (healed);
    /* Where the overlay holds the bytes, what the source has does not matter. */
    assert_int_equal (bdev_pwrite (source, &byte, 1, 10, 0, NULL), 0);
    assert_int_equal (journal_accept (file, source, &other, NULL), 0);
    bdev_unref (other);
    assert_int_equal (i == 2 ? bdev_resize (source, OLD_SIZE + 4096, NULL)
                      : bdev_pwrite (source, &byte, 1, places[i], 0, NULL), 0);
    assert_int_equal (journal_accept (file, source, &other, NULL), -EINVAL);
    bdev_unref (file);
    bdev_unref (source);
  }
}

/* A source that ends inside a sector and cannot grow needs no room for the sector's rest; one
 * that is too short is not begun with.
 */
static void
keeps_to_a_fixed_size (void **state)
{
  for (size_t i = 0; i < 2; ++i) {
    struct bdev *source = make_source_that (false), *file = make_overlay (source, &shapes[i]);
    struct bdev *healed = open_healed (file, source);
    struct err err = { 0 };

    assert_int_equal (journal_fits (healed, source, &err), shapes[i].grows ? -ENOSPC : 0);
    err_clear (&err);
    if (!shapes[i].grows) {
      assert_ok (commit_open (file, healed, source, &err), &err);
      assert_true (holds (source, new_bytes, OLD_SIZE));
    }
    bdev_unref (healed);
    bdev_unref (file);
    bdev_unref (source);
  }
}

/* Operation n of the journal, or of the source, fails. */
static void
survives_every_failure (void **state)
{
  for (unsigned what = 0; what < 8; ++what) {
    const struct shape *s = &shapes[what & 1];
    enum fault_kind kind = what & 2 ? FAULT_STICKY : FAULT_ONCE;
    bool in_source = what & 4, fired = true;

    for (unsigned n = 1; fired; ++n) {
      struct bdev *source = make_source (), *file = make_overlay (source, s), *faulty;
      struct err err = { 0 };
      int r;

      assert_int_equal (fault_new (in_source ? source : file, n, kind, &faulty, NULL), 0);
      r = in_source ? commit (file, faulty, &err) : commit (faulty, source, &err);
      fired = fault_fired (faulty);
      assert_true (fired ? r < 0 && err.code : r == 0);
      assert_true (fired || n > (in_source ? 4 : 3));
      recover (file, source, s);
      bdev_unref (faulty);
      bdev_unref (file);
      bdev_unref (source);
    }
  }
}

/* Power cuts, at every flush of either device. */
struct cut {
  struct bdev *file, *source;   /* both record */
  const struct shape *shape;
  unsigned nr, states[3];
};

static void
cut_power (void *opaque)
{
  struct cut *c = opaque;

  c->nr++;
  for (unsigned seed = 0; seed < 6; ++seed) {
    struct bdev *file, *source;

    assert_int_equal (crash_now (c->file, seed, &file, NULL), 0);
    assert_int_equal (crash_now (c->source, seed ? seed + c->nr : 0, &source, NULL), 0);
    c->states[recover (file, source, c->shape)]++;
    bdev_unref (file);
    bdev_unref (source);
  }
}

static void
survives_power_cuts (void **state)
{
  for (size_t i = 0; i < 2; ++i) {
    struct bdev *source = make_source (), *file = new_mem (), *healed;
    struct cut c = { .shape = &shapes[i] };
    struct err err = { 0 };

    make_empty_overlay (file);
    assert_int_equal (crash_new (file, &c.file, NULL), 0);
    assert_int_equal (crash_new (source, &c.source, NULL), 0);
    healed = open_healed (c.file, c.source);
    crash_set_hook (c.file, cut_power, &c);
    crash_set_hook (c.source, cut_power, &c);
    change (healed, &shapes[i]);
    assert_ok (commit_open (c.file, healed, c.source, &err), &err);
    cut_power (&c);
    bdev_unref (healed);
    for (int st = 0; st < 3; ++st)
      assert_true (c.states[st] > 0);
    bdev_unref (c.file);
    bdev_unref (c.source);
    bdev_unref (file);
    bdev_unref (source);
  }
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (commits),
    cmocka_unit_test (copies_nothing_unmarked),
    cmocka_unit_test (writes_what_differs),
    cmocka_unit_test (refuses_a_source_that_changed),
    cmocka_unit_test (keeps_to_a_fixed_size),
    cmocka_unit_test (survives_every_failure),
    cmocka_unit_test (survives_power_cuts),
  };

  srand (20221);
  for (size_t i = 0; i < OLD_SIZE; ++i)
    old_bytes[i] = rand () % 255 + 1;
  return cmocka_run_group_tests (tests, NULL, NULL);
}
