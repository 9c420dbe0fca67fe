/* See header.h.  Only the fields at fixed places are ever rewritten in an
 * existing image (by whoever owns the change, at the offsets of format.h), so
 * that extensions nobody here understands survive; the encoder below is for
 * new images only.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/endian.h"
#include "base/num.h"
#include "fmt/header.h"

/* The field is believed if it can be.  Else the header is as long as QEMU has
 * written it since there are compression types, if the bytes that this adds look it
 * (type and padding: taken for an extension they would be the end of them all), or
 * as short as can be.
 */
static uint32_t
right_length (const uint8_t *buf, uint32_t length, uint32_t cluster_bits)
{
  static const uint8_t padding[7];

  if (length >= HEADER_V3_MIN_LENGTH && IS_ALIGNED (length, 8) &&
      (cluster_bits > MAX_CLUSTER_BITS || length <= UINT64_C (1) << cluster_bits))
    return length;
  if (buf[HEADER_OFF_COMPRESSION] <= 1 && memcmp (buf + HEADER_OFF_COMPRESSION + 1, padding, 7) == 0)
    return HEADER_FIXED_LENGTH;
  return HEADER_V3_MIN_LENGTH;
}

void
header_decode (const uint8_t *buf, size_t len, struct header *h)
{
  memset (h, 0, sizeof *h);
  if (len < HEADER_FIXED_LENGTH)
    return;
  h->magic = load_be32 (buf + HEADER_OFF_MAGIC);
  h->version = load_be32 (buf + HEADER_OFF_VERSION);
  h->backing_off = load_be64 (buf + HEADER_OFF_BACKING_OFF);
  h->backing_len = load_be32 (buf + HEADER_OFF_BACKING_LEN);
  h->cluster_bits = load_be32 (buf + HEADER_OFF_CLUSTER_BITS);
  h->size = load_be64 (buf + HEADER_OFF_SIZE);
  h->crypt_method = load_be32 (buf + HEADER_OFF_CRYPT_METHOD);
  h->l1_entries = load_be32 (buf + HEADER_OFF_L1_SIZE);
  h->l1_host_off = load_be64 (buf + HEADER_OFF_L1_TABLE);
  h->rt_host_off = load_be64 (buf + HEADER_OFF_RT);
  h->rt_clusters = load_be32 (buf + HEADER_OFF_RT_CLUSTERS);
  h->nr_snapshots = load_be32 (buf + HEADER_OFF_NB_SNAPSHOTS);
  h->snapshots_host_off = load_be64 (buf + HEADER_OFF_SNAPSHOTS);
  if (h->version < 3) {
    h->refcount_order = 4;
    h->header_length = h->header_length_found = HEADER_V2_LENGTH;
    return;
  }
  h->incompatible = load_be64 (buf + HEADER_OFF_INCOMPATIBLE);
  h->compatible = load_be64 (buf + HEADER_OFF_COMPATIBLE);
  h->autoclear = load_be64 (buf + HEADER_OFF_AUTOCLEAR);
  h->refcount_order = load_be32 (buf + HEADER_OFF_REFCOUNT_ORDER);
  h->header_length_found = load_be32 (buf + HEADER_OFF_HEADER_LENGTH);
  h->header_length = right_length (buf, h->header_length_found, h->cluster_bits);
  if (h->header_length > HEADER_OFF_COMPRESSION)
    h->compression_type = buf[HEADER_OFF_COMPRESSION];
}

/* The features are judged after the rest, since a damaged version or length
 * explains nonsense bits better than a feature of the future does.
 */
static int
check_features (const struct header *h, struct err *err)
{
  uint64_t unknown = h->incompatible & ~INCOMPAT_KNOWN;

  if (unknown)
    return err_set (err, ENOTSUP,
                    "it uses incompatible features that this program does not know "
                    "(bits 0x%llx); a newer version may", (unsigned long long) unknown);
  if ((h->incompatible & INCOMPAT_EXTENDED_L2) && h->cluster_bits < 14)
    return err_set (err, EINVAL, "extended L2 entries need clusters of 16 KiB or more, "
                    "but cluster_bits is %u", h->cluster_bits);
  if (!!(h->incompatible & INCOMPAT_COMPRESSION) != (h->compression_type != 0))
    return err_set (err, EINVAL, "compression type %u contradicts the compression feature bit",
                    h->compression_type);
  if (h->compression_type > 1)
    return err_set (err, ENOTSUP, "compression type %u is not known", h->compression_type);
  if (h->crypt_method > CRYPT_LUKS)
    return err_set (err, ENOTSUP, "encryption method %u is not known", h->crypt_method);
  return 0;
}

int
header_usable (const struct header *h, struct err *err)
{
  if (h->magic != HEADER_MAGIC)
    return err_set (err, EINVAL, "it does not start with the qcow2 magic "
                    "(found 0x%08x, expected 0x%08x)", h->magic, HEADER_MAGIC);
  if (h->version != 2 && h->version != 3)
    return err_set (err, ENOTSUP, "qcow version %u is not supported, only 2 and 3", h->version);
  if (h->cluster_bits < MIN_CLUSTER_BITS || h->cluster_bits > MAX_CLUSTER_BITS)
    return err_set (err, EINVAL, "cluster_bits is %u, valid are %u to %u",
                    h->cluster_bits, MIN_CLUSTER_BITS, MAX_CLUSTER_BITS);
  if (h->refcount_order > MAX_REFCOUNT_ORDER)
    return err_set (err, EINVAL, "refcount_order is %u, valid are 0 to %u",
                    h->refcount_order, MAX_REFCOUNT_ORDER);
  return check_features (h, err);
}

/* Lengths that the specification leaves no choice about. */
static bool
ext_length_possible (const struct header_ext *ext)
{
  switch (ext->type) {
  case EXT_BITMAPS:
    return ext->len == BITMAPS_EXT_LENGTH;
  case EXT_CRYPTO_HEADER:
    return ext->len == CRYPTO_EXT_LENGTH;
  case EXT_FEATURE_NAMES:
    return ext->len % FEATURE_NAME_ENTRY_LENGTH == 0;
  default:
    return true;
  }
}

int
header_decode_extensions (const uint8_t *cluster, struct header *h, struct err *err)
{
  uint64_t cluster_size = UINT64_C (1) << h->cluster_bits;
  uint64_t off = h->header_length;
  uint64_t limit = cluster_size;

  /* The backing file name follows the extensions. */
  if (h->backing_off >= off && h->backing_off < limit)
    limit = h->backing_off;
  h->exts_end = off;
  while (range_fits (off, 8, limit)) {
    struct header_ext ext = {
      .type = load_be32 (cluster + off),
      .len = load_be32 (cluster + off + 4),
      .host_off = off + 8,
    };

    /* QEMU demands a length that fits even of the end. */
    if (!range_fits (ext.host_off, ext.len, limit)) {
      h->exts_damaged = true;
      return 0;
    }
    if (ext.type == EXT_END)
      return 0;
    if (header_ext_vec_push (&h->exts, ext) < 0)
      return err_set (err, ENOMEM, "out of memory");
    /* Where the next one begins is unknown then. */
    if (!ext_length_possible (&ext)) {
      h->exts_damaged = true;
      return 0;
    }
    off = ROUND_UP (ext.host_off + ext.len, 8);
    h->exts_end = MIN (off, limit);
  }
  return 0;
}

bool
header_unknown_features (const struct header *h)
{
  return h->magic == HEADER_MAGIC && h->version == 3 && h->cluster_bits >= MIN_CLUSTER_BITS &&
         h->cluster_bits <= MAX_CLUSTER_BITS && (h->incompatible & ~INCOMPAT_KNOWN);
}

bool
header_feature_name (const struct header *h, const uint8_t *cluster, uint8_t type, unsigned bit,
                     char name[FEATURE_NAME_SIZE])
{
  const struct header_ext *ext = header_find_ext (h, EXT_FEATURE_NAMES);

  for (uint32_t i = 0; ext && i < ext->len / FEATURE_NAME_ENTRY_LENGTH; ++i) {
    const uint8_t *p = cluster + ext->host_off + i * FEATURE_NAME_ENTRY_LENGTH;
    unsigned n;

    if (p[0] != type || p[1] != bit || p[2] == 0)
      continue;
    for (n = 0; n < FEATURE_NAME_SIZE - 1 && p[2 + n]; ++n)
      name[n] = p[2 + n] >= 0x20 && p[2 + n] < 0x7f && p[2 + n] != '"' ? p[2 + n] : '?';
    name[n] = 0;
    return true;
  }
  return false;
}

int
header_refuse_features (const uint8_t *cluster, struct header *h, struct err *err)
{
  uint64_t unknown = h->incompatible & ~INCOMPAT_KNOWN;
  char name[FEATURE_NAME_SIZE], list[640];
  const char *sep = "";
  size_t n = 0;
  int r;

  err_clear (err);
  r = header_decode_extensions (cluster, h, err);
  if (r < 0)
    return r;
  list[0] = 0;
  for (unsigned bit = 0; bit < 64; ++bit) {
    if (!(unknown >> bit & 1))
      continue;
    if (n > sizeof list - 100) {
      snprintf (list + n, sizeof list - n, " and more");
      break;
    }
    if (header_feature_name (h, cluster, FEATURE_INCOMPATIBLE, bit, name))
      n += snprintf (list + n, sizeof list - n, "%s\"%s\" (bit %u)", sep, name, bit);
    else
      n += snprintf (list + n, sizeof list - n, "%sbit %u", sep, bit);
    sep = ", ";
  }
  return err_set (err, ENOTSUP, "it uses incompatible features that this program does not know: "
                  "%s; a newer version may", list);
}

bool
header_backing_outside (const struct header *h)
{
  return h->backing_off != 0
         && (h->backing_len == 0 || h->backing_len > MAX_BACKING_NAME
             || !range_fits (h->backing_off, h->backing_len, UINT64_C (1) << h->cluster_bits));
}

const struct header_ext *
header_find_ext (const struct header *h, uint32_t type)
{
  for (size_t i = 0; i < h->exts.len; ++i)
    if (h->exts.ptr[i].type == type)
      return &h->exts.ptr[i];
  return NULL;
}

void
header_reset (struct header *h)
{
  vec_reset (&h->exts);
}

void
geom_init (struct geom *g, const struct header *h)
{
  memset (g, 0, sizeof *g);
  g->version = h->version;
  g->cluster_bits = h->cluster_bits;
  g->cluster_size = UINT64_C (1) << h->cluster_bits;
  g->extended_l2 = !!(h->incompatible & INCOMPAT_EXTENDED_L2);
  g->data_file = !!(h->incompatible & INCOMPAT_DATA_FILE);
  g->l2e_size = g->extended_l2 ? 16 : 8;
  g->l2_bits = h->cluster_bits - (g->extended_l2 ? 4 : 3);
  g->l2_entries = UINT64_C (1) << g->l2_bits;
  g->l2_coverage = g->l2_entries << g->cluster_bits;
  g->refcount_order = h->refcount_order;
  g->refcount_bits = 1u << h->refcount_order;
  g->rb_bits = h->cluster_bits + 3 - h->refcount_order;
  g->rb_entries = UINT64_C (1) << g->rb_bits;
  g->refcount_max = g->refcount_bits == 64 ? UINT64_MAX
                                           : (UINT64_C (1) << g->refcount_bits) - 1;
}

uint64_t
geom_l1_entries (const struct geom *g, uint64_t size)
{
  return DIV_ROUND_UP (size, g->l2_coverage);
}

struct writer {
  uint8_t *buf;
  uint64_t off, limit;
  bool overflow;
};

static void
put_ext (struct writer *w, uint32_t type, const void *data, uint32_t len)
{
  if (!range_fits (w->off, 8 + ROUND_UP (len, 8), w->limit)) {
    w->overflow = true;
    return;
  }
  store_be32 (w->buf + w->off, type);
  store_be32 (w->buf + w->off + 4, len);
  if (len)
    memcpy (w->buf + w->off + 8, data, len);
  w->off += 8 + ROUND_UP (len, 8);
}

int
header_encode (const struct header_template *t, uint8_t *buf, struct err *err)
{
  struct writer w = { .buf = buf, .limit = UINT64_C (1) << t->cluster_bits };
  size_t name_len = t->backing_name ? strlen (t->backing_name) : 0;

  store_be32 (buf + HEADER_OFF_MAGIC, HEADER_MAGIC);
  store_be32 (buf + HEADER_OFF_VERSION, t->version);
  store_be32 (buf + HEADER_OFF_CLUSTER_BITS, t->cluster_bits);
  store_be64 (buf + HEADER_OFF_SIZE, t->size);
  store_be32 (buf + HEADER_OFF_L1_SIZE, t->l1_entries);
  store_be64 (buf + HEADER_OFF_L1_TABLE, t->l1_host_off);
  store_be64 (buf + HEADER_OFF_RT, t->rt_host_off);
  store_be32 (buf + HEADER_OFF_RT_CLUSTERS, t->rt_clusters);
  w.off = HEADER_V2_LENGTH;
  if (t->version >= 3) {
    store_be32 (buf + HEADER_OFF_REFCOUNT_ORDER, t->refcount_order);
    store_be32 (buf + HEADER_OFF_HEADER_LENGTH, HEADER_FIXED_LENGTH);
    w.off = HEADER_FIXED_LENGTH;
  }
  if (t->backing_format)
    put_ext (&w, EXT_BACKING_FORMAT, t->backing_format, strlen (t->backing_format));
  if (t->private_ext_type)
    put_ext (&w, t->private_ext_type, t->private_ext, t->private_ext_len);
  put_ext (&w, EXT_END, NULL, 0);
  if (name_len) {
    if (w.overflow || name_len > MAX_BACKING_NAME || !range_fits (w.off, name_len, w.limit))
      return err_set (err, EINVAL, "the name of the backing file is too long (%zu bytes): %s",
                      name_len, t->backing_name);
    memcpy (buf + w.off, t->backing_name, name_len);
    store_be64 (buf + HEADER_OFF_BACKING_OFF, w.off);
    store_be32 (buf + HEADER_OFF_BACKING_LEN, name_len);
  }
  if (w.overflow)
    return err_set (err, EINVAL, "the header extensions do not fit in one cluster");
  return 0;
}
