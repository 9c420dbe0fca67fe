/* The snapshot table: as qemu-img writes it, and cut off at every byte. */
#include "unit/unit.h"

#include "base/endian.h"
#include "fmt/format.h"
#include "fmt/snaptab.h"

struct made {
  uint8_t *bytes;               /* on the heap, so that the sanitizer sees reads behind it */
  uint64_t len, exact;          /* with padding, and without */
};

static struct made
make (uint32_t extra, const char *id, const char *name)
{
  struct made m = { .exact = 40 + extra + strlen (id) + strlen (name) };

  m.len = (m.exact + 7) & ~UINT64_C (7);
  m.bytes = calloc (1, m.len);
  store_be64 (m.bytes, 0x70000);
  store_be32 (m.bytes + 8, 5);
  store_be16 (m.bytes + 12, strlen (id));
  store_be16 (m.bytes + 14, strlen (name));
  store_be32 (m.bytes + 32, 1234);
  store_be32 (m.bytes + 36, extra);
  if (extra >= 8)
    store_be64 (m.bytes + 40, UINT64_C (5) << 32);
  if (extra >= 16)
    store_be64 (m.bytes + 48, UINT64_C (1) << 40);
  memcpy (m.bytes + 40 + extra, id, strlen (id));
  memcpy (m.bytes + 40 + extra + strlen (id), name, strlen (name));
  return m;
}

static void
check_decoded (const struct snapshot *s, uint32_t extra)
{
  assert_true (s->l1_host_off == 0x70000);
  assert_int_equal (s->l1_entries, 5);
  assert_true (s->vm_state_bytes == (extra >= 8 ? UINT64_C (5) << 32 : 1234));
  assert_true (s->size == (extra >= 16 ? UINT64_C (1) << 40 : 0));
  assert_string_equal (s->id, "17");
  assert_string_equal (s->name, "before upgrade");
  free (s->id);
  free (s->name);
}

static void
cut_off_anywhere (void **state)
{
  static const uint32_t extras[] = { 0, 8, 16, 24, 1024 };

  for (size_t i = 0; i < sizeof extras / sizeof extras[0]; ++i) {
    struct made m = make (extras[i], "17", "before upgrade");

    for (uint64_t len = 0; len <= m.len; ++len) {
      uint8_t *cut = malloc (len ? len : 1);
      struct snapshot s;
      uint64_t need = 0;
      int r;

      memcpy (cut, m.bytes, len);
      r = snapshot_decode (cut, len, 0, &s, &need, NULL);
      if (len >= m.exact) {     /* the padding of the last one may be missing */
        assert_int_equal (r, 0);
        assert_int_equal (s.entry_len, m.len);
        check_decoded (&s, extras[i]);
      }
      else {
        assert_int_equal (r, -EAGAIN);
        /* What it asks for is enough to get further. */
        assert_true (need > len && need <= m.len);
      }
      free (cut);
    }
    free (m.bytes);
  }
}

static void
nonsense_is_refused (void **state)
{
  static const uint32_t extras[] = { MAX_SNAPSHOT_EXTRA_BYTES + 1, INT32_MAX, UINT32_MAX };
  struct made m = make (16, "17", "x");
  struct snapshot s;
  struct err err = { 0 };
  uint64_t need;

  for (size_t i = 0; i < sizeof extras / sizeof extras[0]; ++i) {
    store_be32 (m.bytes + 36, extras[i]);
    assert_int_equal (snapshot_decode (m.bytes, m.len, 0, &s, &need, &err), -EINVAL);
    assert_int_equal (err.code, EINVAL);
    err_clear (&err);
  }
  /* The longest strings: more is wanted, and not more than they can be. */
  store_be32 (m.bytes + 36, 1024);
  memset (m.bytes + 12, 0xff, 4);
  assert_int_equal (snapshot_decode (m.bytes, m.len, 0, &s, &need, NULL), -EAGAIN);
  assert_int_equal (need, (40 + 1024 + 2 * 65535 + 7) / 8 * 8);
  /* An entry that starts behind what is known. */
  assert_int_equal (snapshot_decode (m.bytes, m.len, m.len + 8, &s, &need, NULL), -EAGAIN);
  assert_int_equal (snapshot_decode (m.bytes, m.len, UINT64_MAX - 7, &s, &need, NULL), -EAGAIN);
  free (m.bytes);
}

/* Strings are bytes as found: a NUL inside ends the copy and nothing more. */
static void
strings_with_nul (void **state)
{
  struct made m = make (16, "1\1\1", "ab\1d");
  struct snapshot s;
  uint64_t need;

  m.bytes[40 + 16 + 1] = 0;
  m.bytes[40 + 16 + 3 + 2] = 0;
  assert_int_equal (snapshot_decode (m.bytes, m.len, 0, &s, &need, NULL), 0);
  assert_string_equal (s.id, "1");
  assert_string_equal (s.name, "ab");
  assert_int_equal (s.entry_len, m.len);
  free (s.id);
  free (s.name);
  free (m.bytes);
}

static void
qemu_wrote_it (void **state)
{
  static const char *const names[] = { "first", "the second one", "3" };
  static uint8_t image[4 << 20];
  struct snapshot_vec v = VEC_INIT;
  char *folder;
  char path[256];
  uint64_t table, off = 0, len;
  FILE *f;

  require_program ("qemu-img");
  folder = make_folder ();
  snprintf (path, sizeof path, "%s/s.qcow2", folder);
  assert_int_equal (run ("qemu-img create -f qcow2 %s 64M", path), 0);
  for (unsigned i = 0; i < 3; ++i)
    assert_int_equal (run ("qemu-img snapshot -c '%s' %s", names[i], path), 0);
  f = fopen (path, "r");
  assert_non_null (f);
  len = fread (image, 1, sizeof image, f);
  fclose (f);
  remove_folder (folder);
  assert_int_equal (load_be32 (image + HEADER_OFF_NB_SNAPSHOTS), 3);
  table = load_be64 (image + HEADER_OFF_SNAPSHOTS);
  assert_true (table > 0 && table < len);
  for (unsigned i = 0; i < 3; ++i) {
    struct snapshot s;
    uint64_t need;
    char id[2] = { '1' + i, 0 };

    assert_int_equal (snapshot_decode (image + table, len - table, off, &s, &need, NULL), 0);
    assert_int_equal (s.entry_off, off);
    assert_string_equal (s.name, names[i]);
    assert_string_equal (s.id, id);
    assert_int_equal (s.size, 64 << 20);
    assert_int_equal (s.l1_entries, 1);
    off += s.entry_len;
    assert_int_equal (snapshot_vec_push (&v, s), 0);
  }
  snapshot_vec_reset (&v);
  assert_int_equal (v.len, 0);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (cut_off_anywhere),
    cmocka_unit_test (nonsense_is_refused),
    cmocka_unit_test (strings_with_nul),
    cmocka_unit_test (qemu_wrote_it),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
