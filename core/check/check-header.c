/* Check of the header: features, extensions, backing file name.
 *
 * Only a header that header_usable accepts gets this far.  What could own
 * clusters without our knowing (an extension, a feature of the future) makes
 * the check incomplete, so that nothing of it is ever freed.
 *
 * Deliberately not here: the fields that name tables, which the phases of these
 * tables judge.
 */
#include <errno.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "check/check-int.h"
#include "dev/ahead.h"

#define HEAD_BYTES (UINT64_C (1) << 20) /* of most files, what the first phases read is here */

static int
header_finding (struct checker *k, enum finding_id id, uint64_t host_off, uint64_t found,
                struct err *err)
{
  return add_finding (k, (struct finding) {
      .id = id, .snapshot_index = FINDING_ACTIVE, .host_off = host_off,
      .guest_off = FINDING_NO_OFF, .found = found }, err);
}

static int
check_features (struct checker *k, struct err *err)
{
  const struct header *h = &k->c->header;
  int r = 0;

  if (h->header_length != h->header_length_found)
    r = header_finding (k, FINDING_HEADER_LENGTH_WRONG, HEADER_OFF_HEADER_LENGTH,
                        h->header_length_found, err);
  if (r < 0)
    return r;
  if (h->incompatible & INCOMPAT_DIRTY)
    r = header_finding (k, FINDING_DIRTY, HEADER_OFF_INCOMPATIBLE, h->incompatible, err);
  if (r == 0 && (h->incompatible & INCOMPAT_CORRUPT))
    r = header_finding (k, FINDING_CORRUPT_BIT, HEADER_OFF_INCOMPATIBLE, h->incompatible, err);
  if (r == 0 && (h->autoclear & ~AUTOCLEAR_KNOWN))
    r = header_finding (k, FINDING_AUTOCLEAR_UNKNOWN, HEADER_OFF_AUTOCLEAR,
                        h->autoclear & ~AUTOCLEAR_KNOWN, err);
  if (r == 0 && (h->autoclear & AUTOCLEAR_DATA_FILE_RAW) && !k->g->data_file)
    r = header_finding (k, FINDING_RAW_WITHOUT_DATA_FILE, HEADER_OFF_AUTOCLEAR,
                        AUTOCLEAR_DATA_FILE_RAW, err);
  if ((h->autoclear & ~AUTOCLEAR_KNOWN) || (h->compatible & ~COMPAT_LAZY_REFCOUNTS))
    set_incomplete (k);
  return r;
}

static bool
ext_is_known (uint32_t type)
{
  switch (type) {
  case EXT_BACKING_FORMAT:
  case EXT_BACKING_FORMAT_CROSVM:
  case EXT_FEATURE_NAMES:
  case EXT_BITMAPS:
  case EXT_CRYPTO_HEADER:
  case EXT_DATA_FILE:
    return true;
  default:
    return false;
  }
}

static int
check_header_extensions (struct checker *k, const uint8_t *cluster, struct err *err)
{
  struct header *h = &k->c->header;
  const struct header_ext *misspelt;
  int r = header_decode_extensions (cluster, h, err);

  if (r < 0)
    return r;
  for (size_t i = 0; i < h->exts.len; ++i)
    if (!ext_is_known (h->exts.ptr[i].type))
      set_incomplete (k);
  misspelt = header_find_ext (h, EXT_BACKING_FORMAT_CROSVM);
  if (misspelt)
    r = header_finding (k, FINDING_BACKING_FORMAT_MISSPELT, misspelt->host_off - 8, misspelt->type,
                        err);
  if (r < 0 || !h->exts_damaged)
    return r;
  set_incomplete (k);
  return header_finding (k, FINDING_EXTENSIONS_DAMAGED, h->exts_end, 0, err);
}

static int
check_backing_name (struct checker *k, const uint8_t *cluster, struct err *err)
{
  const struct header *h = &k->c->header;

  if (header_backing_outside (h))
    return header_finding (k, FINDING_BACKING_NAME_OUTSIDE, HEADER_OFF_BACKING_OFF,
                           h->backing_off, err);
  if (h->backing_off == 0)
    return 0;
  k->c->backing_name = strndup ((const char *) cluster + h->backing_off, h->backing_len);
  return k->c->backing_name ? 0 : err_set (err, ENOMEM, "out of memory");
}

/* Name the features that were refused, where the image has names for them. */
static int
refuse_features (struct checker *k, struct err *err)
{
  uint64_t cluster_size = UINT64_C (1) << k->c->header.cluster_bits;
  CLEANUP_FREE uint8_t *cluster = malloc (cluster_size);

  if (cluster == NULL || bdev_pread_padded (k->d, cluster, cluster_size, 0, NULL) < 0)
    return -ENOTSUP;            /* the bits were named */
  return header_refuse_features (cluster, &k->c->header, err);
}

/* What is left of a file that was cut inside its header is nothing. */
static int
refuse_cut_header (const struct checker *k, struct err *err)
{
  unsigned length = k->c->header.version >= 3 ? HEADER_V3_MIN_LENGTH : HEADER_V2_LENGTH;

  if (k->c->file_size >= length)
    return 0;
  return err_set (err, EINVAL, "the file has %llu bytes and ends inside the qcow2 header (%u bytes): "
                  "it was cut short, and nothing of the disk is in it",
                  (unsigned long long) k->c->file_size, length);
}

int
check_header (struct checker *k, struct err *err)
{
  struct check *c = k->c;
  uint8_t fixed[HEADER_FIXED_LENGTH];
  CLEANUP_FREE uint8_t *cluster = NULL;
  int r;

  ahead_hint (k->d, 0, HEAD_BYTES);
  r = bdev_pread_padded (k->d, fixed, sizeof fixed, 0, err);
  if (r < 0)
    return r;
  header_decode (fixed, sizeof fixed, &c->header);
  r = header_usable (&c->header, err);
  if (r == -ENOTSUP && header_unknown_features (&c->header))
    r = refuse_features (k, err);
  if (r == 0)
    r = refuse_cut_header (k, err);
  if (r < 0) {
    err_prefix (err, "%s", k->d->name);
    return r;
  }
  geom_init (&c->geom, &c->header);
  k->end = c->file_size > UINT64_MAX - k->g->cluster_size
             ? ROUND_DOWN (c->file_size, k->g->cluster_size)
             : ROUND_UP (c->file_size, k->g->cluster_size);
  k->cut_ci = IS_ALIGNED (c->file_size, k->g->cluster_size)
                ? UINT64_MAX : c->file_size >> k->g->cluster_bits;
  c->stats.total_clusters = DIV_ROUND_UP (c->header.size, k->g->cluster_size);
  cluster = malloc (k->g->cluster_size);
  if (cluster == NULL)
    return err_set (err, ENOMEM, "out of memory");
  r = bdev_pread_padded (k->d, cluster, k->g->cluster_size, 0, err);
  if (r == 0)
    r = claim_meta (k, 0, k->g->cluster_size, NULL, err);
  if (r == 0)
    r = check_features (k, err);
  if (r == 0)
    r = check_header_extensions (k, cluster, err);
  if (r == 0)
    r = check_backing_name (k, cluster, err);
  return r;
}
