/* The header: what the encoder writes the decoder reads, what qemu-img writes
 * the decoder reads, and what nobody should have written is refused or noted.
 */
#include "unit/unit.h"

#include "base/endian.h"
#include "base/num.h"
#include "fmt/header.h"

#define CLUSTER 65536

static uint8_t cluster[CLUSTER];

static const struct header_template plain = {
  .version = 3, .cluster_bits = 16, .refcount_order = 4, .size = UINT64_C (10) << 30,
  .l1_entries = 20, .l1_host_off = 3 * CLUSTER, .rt_host_off = CLUSTER, .rt_clusters = 1,
};

static void
encode (const struct header_template *t)
{
  struct err err = { 0 };

  memset (cluster, 0, sizeof cluster);
  assert_ok (header_encode (t, cluster, &err), &err);
}

static struct header
decode (void)
{
  struct err err = { 0 };
  struct header h;

  header_decode (cluster, sizeof cluster, &h);
  assert_ok (header_usable (&h, &err), &err);
  assert_ok (header_decode_extensions (cluster, &h, &err), &err);
  return h;
}

static void
round_trip_v3 (void **state)
{
  static const uint8_t private[13] = "fingerprint!";
  struct header_template t = plain;
  const struct header_ext *ext;
  struct header h;

  t.backing_name = "/images/damaged.qcow2";
  t.backing_format = "raw";
  t.private_ext_type = 0x51525231;
  t.private_ext = private;
  t.private_ext_len = sizeof private;
  encode (&t);
  h = decode ();
  assert_int_equal (h.version, 3);
  assert_int_equal (h.cluster_bits, 16);
  assert_int_equal (h.refcount_order, 4);
  assert_true (h.size == t.size);
  assert_int_equal (h.l1_entries, 20);
  assert_true (h.l1_host_off == t.l1_host_off);
  assert_true (h.rt_host_off == t.rt_host_off);
  assert_int_equal (h.rt_clusters, 1);
  assert_int_equal (h.nr_snapshots, 0);
  assert_true (h.incompatible == 0 && h.compatible == 0 && h.autoclear == 0);
  assert_false (h.exts_damaged);
  assert_int_equal (h.exts.len, 2);
  ext = header_find_ext (&h, EXT_BACKING_FORMAT);
  assert_non_null (ext);
  assert_int_equal (ext->len, 3);
  assert_memory_equal (cluster + ext->host_off, "raw", 3);
  ext = header_find_ext (&h, 0x51525231);
  assert_non_null (ext);
  assert_int_equal (ext->len, sizeof private);
  assert_memory_equal (cluster + ext->host_off, private, sizeof private);
  assert_null (header_find_ext (&h, EXT_BITMAPS));
  assert_int_equal (h.backing_len, strlen (t.backing_name));
  assert_memory_equal (cluster + h.backing_off, t.backing_name, h.backing_len);
  header_reset (&h);
}

static void
round_trip_v2 (void **state)
{
  struct header_template t = plain;
  struct header h;

  t.version = 2;
  t.backing_name = "base.img";
  encode (&t);
  /* Bytes that would be feature bits in version 3 mean nothing here. */
  assert_int_equal (load_be32 (cluster + HEADER_OFF_VERSION), 2);
  h = decode ();
  assert_int_equal (h.header_length, HEADER_V2_LENGTH);
  assert_int_equal (h.refcount_order, 4);
  assert_true (h.incompatible == 0);
  assert_memory_equal (cluster + h.backing_off, "base.img", 8);
  header_reset (&h);
}

static void
names_that_do_not_fit (void **state)
{
  struct header_template t = plain;
  struct err err = { 0 };
  char name[1100];

  memset (name, 'n', sizeof name);
  name[MAX_BACKING_NAME] = '\0';
  t.backing_name = name;
  encode (&t);
  name[MAX_BACKING_NAME] = 'n';
  name[MAX_BACKING_NAME + 1] = '\0';
  memset (cluster, 0, sizeof cluster);
  assert_int_equal (header_encode (&t, cluster, &err), -EINVAL);
  /* The smallest cluster: nothing may be written behind it. */
  name[450] = '\0';
  t.cluster_bits = 9;
  memset (cluster, 0, sizeof cluster);
  assert_int_equal (header_encode (&t, cluster, NULL), -EINVAL);
  t.backing_name = NULL;
  t.private_ext_type = 1;
  t.private_ext = name;
  t.private_ext_len = 400;
  assert_int_equal (header_encode (&t, cluster, NULL), -EINVAL);
  for (unsigned i = 512; i < 4096; ++i)
    assert_int_equal (cluster[i], 0);
}

static int
usable (unsigned off, unsigned bytes, uint64_t value)
{
  struct header h;

  encode (&plain);
  switch (bytes) {
  case 1: cluster[off] = value; break;
  case 4: store_be32 (cluster + off, value); break;
  case 8: store_be64 (cluster + off, value); break;
  }
  header_decode (cluster, sizeof cluster, &h);
  return header_usable (&h, NULL);
}

/* Lengths that make no sense: what follows the fixed fields says what is right. */
static void
wrong_header_length (void **state)
{
  static const uint32_t lengths[] = { 0, 8, 72, 103, 105, 109, CLUSTER + 8, UINT32_MAX };

  for (unsigned i = 0; i < sizeof lengths / sizeof *lengths; ++i) {
    struct header h;

    assert_int_equal (usable (HEADER_OFF_HEADER_LENGTH, 4, lengths[i]), 0);
    header_decode (cluster, sizeof cluster, &h);
    assert_int_equal (h.header_length_found, lengths[i]);
    assert_int_equal (h.header_length, 112);
    store_be32 (cluster + 104, EXT_FEATURE_NAMES);
    header_decode (cluster, sizeof cluster, &h);
    assert_int_equal (h.header_length, 104);
    assert_int_equal (h.compression_type, 0);
  }
}

static void
unusable_headers (void **state)
{
  assert_int_equal (usable (0, 0, 0), 0);
  assert_int_equal (usable (HEADER_OFF_MAGIC, 4, 0x51464900), -EINVAL);
  assert_int_equal (usable (HEADER_OFF_VERSION, 4, 1), -ENOTSUP);
  assert_int_equal (usable (HEADER_OFF_VERSION, 4, 4), -ENOTSUP);
  assert_int_equal (usable (HEADER_OFF_CLUSTER_BITS, 4, 8), -EINVAL);
  assert_int_equal (usable (HEADER_OFF_CLUSTER_BITS, 4, 9), 0);
  assert_int_equal (usable (HEADER_OFF_CLUSTER_BITS, 4, 21), 0);
  assert_int_equal (usable (HEADER_OFF_CLUSTER_BITS, 4, 22), -EINVAL);
  assert_int_equal (usable (HEADER_OFF_CLUSTER_BITS, 4, UINT32_MAX), -EINVAL);
  assert_int_equal (usable (HEADER_OFF_REFCOUNT_ORDER, 4, 0), 0);
  assert_int_equal (usable (HEADER_OFF_REFCOUNT_ORDER, 4, 6), 0);
  assert_int_equal (usable (HEADER_OFF_REFCOUNT_ORDER, 4, 7), -EINVAL);
  assert_int_equal (usable (HEADER_OFF_HEADER_LENGTH, 4, 104), 0);
  assert_int_equal (usable (HEADER_OFF_HEADER_LENGTH, 4, CLUSTER), 0);
  assert_int_equal (usable (HEADER_OFF_CRYPT_METHOD, 4, CRYPT_LUKS), 0);
  assert_int_equal (usable (HEADER_OFF_CRYPT_METHOD, 4, 3), -ENOTSUP);
}

static void
features (void **state)
{
  struct header h;

  /* Incompatible: refused if unknown; the other two kinds never are. */
  assert_int_equal (usable (HEADER_OFF_INCOMPATIBLE, 8, INCOMPAT_DIRTY | INCOMPAT_CORRUPT), 0);
  for (unsigned bit = 5; bit < 64; ++bit)
    assert_int_equal (usable (HEADER_OFF_INCOMPATIBLE, 8, UINT64_C (1) << bit), -ENOTSUP);
  assert_int_equal (usable (HEADER_OFF_COMPATIBLE, 8, UINT64_MAX), 0);
  assert_int_equal (usable (HEADER_OFF_AUTOCLEAR, 8, UINT64_MAX), 0);
  /* The compression field and its bit must agree; the encoder's length covers it. */
  assert_int_equal (usable (HEADER_OFF_COMPRESSION, 1, 1), -EINVAL);
  assert_int_equal (usable (HEADER_OFF_INCOMPATIBLE, 8, INCOMPAT_COMPRESSION), -EINVAL);
  encode (&plain);
  store_be64 (cluster + HEADER_OFF_INCOMPATIBLE, INCOMPAT_COMPRESSION);
  cluster[HEADER_OFF_COMPRESSION] = 1;
  h = decode ();
  assert_int_equal (h.compression_type, 1);
  cluster[HEADER_OFF_COMPRESSION] = 2;
  header_decode (cluster, sizeof cluster, &h);
  assert_int_equal (header_usable (&h, NULL), -ENOTSUP);
  /* A header that ends before the field has none, whatever lies there. */
  encode (&plain);
  store_be32 (cluster + HEADER_OFF_HEADER_LENGTH, 104);
  cluster[HEADER_OFF_COMPRESSION] = 77;
  header_decode (cluster, sizeof cluster, &h);
  assert_int_equal (h.compression_type, 0);
  /* Extended L2 entries: 32 subclusters of at least 512 bytes. */
  encode (&plain);
  store_be64 (cluster + HEADER_OFF_INCOMPATIBLE, INCOMPAT_EXTENDED_L2);
  store_be32 (cluster + HEADER_OFF_CLUSTER_BITS, 13);
  header_decode (cluster, sizeof cluster, &h);
  assert_int_equal (header_usable (&h, NULL), -EINVAL);
  store_be32 (cluster + HEADER_OFF_CLUSTER_BITS, 14);
  header_decode (cluster, sizeof cluster, &h);
  assert_int_equal (header_usable (&h, NULL), 0);
}

static void
put_ext (uint64_t off, uint32_t type, uint32_t len)
{
  store_be32 (cluster + off, type);
  store_be32 (cluster + off + 4, len);
}

static void
damaged_extensions (void **state)
{
  static const uint32_t lengths[] = { CLUSTER - 127, CLUSTER, INT32_MAX, UINT32_MAX - 7, UINT32_MAX };
  struct header h;

  for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; ++i) {
    encode (&plain);
    put_ext (112, 0xabcdef01, 5);               /* sound, padded to 8 */
    put_ext (128, EXT_BITMAPS, lengths[i]);
    h = decode ();
    assert_true (h.exts_damaged);
    assert_int_equal (h.exts.len, 1);
    assert_int_equal (h.exts_end, 128);
    header_reset (&h);
  }
  /* One that ends exactly with the cluster, without an end marker, is sound. */
  encode (&plain);
  put_ext (112, 0xabcdef01, CLUSTER - 120);
  h = decode ();
  assert_false (h.exts_damaged);
  assert_int_equal (h.exts.len, 1);
  assert_int_equal (h.exts_end, CLUSTER);
  header_reset (&h);
  /* Extensions end where the backing file name begins. */
  encode (&plain);
  put_ext (112, 0xabcdef01, 100);
  store_be64 (cluster + HEADER_OFF_BACKING_OFF, 160);
  h = decode ();
  assert_true (h.exts_damaged);
  header_reset (&h);
  /* Any bytes at all: it ends, and what it reports lies in the cluster. */
  for (uint64_t seed = 1; seed < 2000; ++seed) {
    uint64_t rng = seed;

    encode (&plain);
    for (unsigned i = 112; i < 1024; ++i)
      cluster[i] = test_random (&rng) % 4 ? 0 : test_random (&rng);
    h = decode ();
    for (size_t i = 0; i < h.exts.len; ++i)
      assert_true (range_fits (h.exts.ptr[i].host_off, h.exts.ptr[i].len, CLUSTER));
    assert_true (h.exts_end >= 112 && h.exts_end <= CLUSTER);
    header_reset (&h);
  }
}

static void
geometry (void **state)
{
  struct header h;
  struct geom g;

  encode (&plain);
  h = decode ();
  geom_init (&g, &h);
  assert_int_equal (g.l2_entries, 8192);
  assert_true (g.l2_coverage == UINT64_C (512) << 20);
  assert_int_equal (g.rb_entries, 32768);
  assert_int_equal (g.refcount_max, 65535);
  assert_int_equal (geom_l1_entries (&g, 0), 0);
  assert_int_equal (geom_l1_entries (&g, 1), 1);
  assert_int_equal (geom_l1_entries (&g, g.l2_coverage), 1);
  assert_int_equal (geom_l1_entries (&g, g.l2_coverage + 1), 2);
  assert_true (geom_l1_entries (&g, UINT64_MAX) == UINT64_C (1) << 35);

  h.cluster_bits = 9;
  h.refcount_order = 6;
  geom_init (&g, &h);
  assert_int_equal (g.l2_entries, 64);
  assert_int_equal (g.rb_entries, 64);
  assert_true (g.refcount_max == UINT64_MAX);

  h.cluster_bits = 21;
  h.refcount_order = 0;
  h.incompatible = INCOMPAT_EXTENDED_L2;
  geom_init (&g, &h);
  assert_int_equal (g.l2e_size, 16);
  assert_int_equal (g.l2_entries, 131072);
  assert_int_equal (g.rb_entries, 16 * 1024 * 1024);
  assert_int_equal (g.refcount_max, 1);
}

/* The judge: images that qemu-img made. */
static void
qemu_wrote_it (void **state)
{
  static const struct { const char *opts; uint32_t version, bits, order; uint64_t incompat; } t[] = {
    { "compat=0.10,cluster_size=512", 2, 9, 4, 0 },
    { "cluster_size=2M,refcount_bits=64", 3, 21, 6, 0 },
    { "cluster_size=4k,refcount_bits=1", 3, 12, 0, 0 },
    { "extended_l2=on,compression_type=zstd", 3, 16, 4,
      INCOMPAT_EXTENDED_L2 | INCOMPAT_COMPRESSION },
  };
  char *folder, path[256];

  require_program ("qemu-img");
  folder = make_folder ();
  for (size_t i = 0; i < sizeof t / sizeof t[0]; ++i) {
    struct header h;
    FILE *f;

    snprintf (path, sizeof path, "%s/%zu.qcow2", folder, i);
    assert_int_equal (run ("qemu-img create -f qcow2 -u -F raw -b some.img -o %s %s 100M",
                           t[i].opts, path), 0);
    memset (cluster, 0, sizeof cluster);
    f = fopen (path, "r");
    assert_non_null (f);
    assert_true (fread (cluster, 1, sizeof cluster, f) > 512);
    fclose (f);
    h = decode ();
    assert_int_equal (h.version, t[i].version);
    assert_int_equal (h.cluster_bits, t[i].bits);
    assert_int_equal (h.refcount_order, t[i].order);
    assert_true (h.incompatible == t[i].incompat);
    assert_int_equal (h.size, 100 << 20);
    assert_false (h.exts_damaged);
    assert_memory_equal (cluster + h.backing_off, "some.img", h.backing_len);
    assert_non_null (header_find_ext (&h, EXT_BACKING_FORMAT));
    header_reset (&h);
  }
  remove_folder (folder);
}

/* What the image calls the bits that we do not know; QEMU's table names those
 * that both know.
 */
static void
feature_names (void **state)
{
  struct header h;
  struct err err = { 0 };
  char name[FEATURE_NAME_SIZE];
  uint8_t *p;

  encode (&plain);
  h = decode ();
  p = cluster + h.exts_end;
  header_reset (&h);
  store_be32 (p, EXT_FEATURE_NAMES);
  store_be32 (p + 4, 4 * FEATURE_NAME_ENTRY_LENGTH + 7);        /* half an entry at the end */
  p += 8;
  memset (p, 0, 5 * FEATURE_NAME_ENTRY_LENGTH);
  p[0] = 2;                     /* another type, same bit */
  p[1] = 40;
  strcpy ((char *) p + 2, "autoclear");
  p += FEATURE_NAME_ENTRY_LENGTH;
  p[1] = 40;
  strcpy ((char *) p + 2, "time\x1b[travel\"");
  p += FEATURE_NAME_ENTRY_LENGTH;
  p[1] = 41;
  memset (p + 2, 'x', 46);      /* no zero at its end */
  p += FEATURE_NAME_ENTRY_LENGTH;
  p[1] = 42;                    /* empty */
  p += FEATURE_NAME_ENTRY_LENGTH;
  p[1] = 43;
  strcpy ((char *) p + 2, "cut");
  store_be64 (cluster + HEADER_OFF_INCOMPATIBLE, UINT64_C (15) << 40);
  header_decode (cluster, sizeof cluster, &h);
  assert_int_equal (header_usable (&h, &err), -ENOTSUP);
  assert_true (header_unknown_features (&h));
  assert_int_equal (header_refuse_features (cluster, &h, &err), -ENOTSUP);
  assert_non_null (strstr (err.msg, ": \"time?[travel?\" (bit 40), \"xxx"));
  assert_non_null (strstr (err.msg, "xxx\" (bit 41), bit 42, bit 43; "));
  assert_true (header_feature_name (&h, cluster, FEATURE_INCOMPATIBLE, 41, name));
  assert_int_equal (strlen (name), 46);
  assert_true (header_feature_name (&h, cluster, FEATURE_AUTOCLEAR, 40, name));
  assert_string_equal (name, "autoclear");
  assert_false (header_feature_name (&h, cluster, FEATURE_COMPATIBLE, 40, name));
  header_reset (&h);
  /* All of them, with long names or without: a message of bounded length. */
  err_clear (&err);
  store_be64 (cluster + HEADER_OFF_INCOMPATIBLE, UINT64_MAX);
  header_decode (cluster, sizeof cluster, &h);
  assert_int_equal (header_refuse_features (cluster, &h, &err), -ENOTSUP);
  assert_non_null (strstr (err.msg, "a newer version may"));
  header_reset (&h);
  encode (&plain);
  h = decode ();
  assert_false (header_unknown_features (&h));
  assert_false (header_feature_name (&h, cluster, FEATURE_INCOMPATIBLE, 0, name));
  header_reset (&h);
}

/* QEMU writes a table; its names are those of its bits. */
static void
qemus_feature_names (void **state)
{
  char *folder, path[512], name[FEATURE_NAME_SIZE];
  struct header h;
  FILE *f;

  require_program ("qemu-img");
  folder = make_folder ();
  snprintf (path, sizeof path, "%s/f.qcow2", folder);
  assert_int_equal (run ("qemu-img create -f qcow2 %s 1M", path), 0);
  memset (cluster, 0, sizeof cluster);
  f = fopen (path, "r");
  assert_non_null (f);
  assert_true (fread (cluster, 1, sizeof cluster, f) > 512);
  fclose (f);
  h = decode ();
  assert_true (header_feature_name (&h, cluster, FEATURE_INCOMPATIBLE, 0, name));
  assert_string_equal (name, "dirty bit");
  assert_true (header_feature_name (&h, cluster, FEATURE_COMPATIBLE, 0, name));
  assert_string_equal (name, "lazy refcounts");
  assert_false (header_feature_name (&h, cluster, FEATURE_INCOMPATIBLE, 63, name));
  header_reset (&h);
  remove_folder (folder);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (round_trip_v3),
    cmocka_unit_test (round_trip_v2),
    cmocka_unit_test (names_that_do_not_fit),
    cmocka_unit_test (unusable_headers),
    cmocka_unit_test (wrong_header_length),
    cmocka_unit_test (features),
    cmocka_unit_test (damaged_extensions),
    cmocka_unit_test (geometry),
    cmocka_unit_test (feature_names),
    cmocka_unit_test (qemus_feature_names),
    cmocka_unit_test (qemu_wrote_it),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
