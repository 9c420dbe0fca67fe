/* The header and its extensions: bytes <-> struct.  Pure: no I/O, and no
 * judgement beyond "can anything be read at all".
 */
#ifndef QR_FMT_HEADER_H
#define QR_FMT_HEADER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "base/vec.h"
#include "fmt/format.h"

struct header_ext {
  uint32_t type;
  uint32_t len;                 /* bytes of data, without padding */
  uint64_t host_off;            /* byte offset of the data in the file */
};
DEFINE_VEC (header_ext_vec, struct header_ext);

/* Field names are the specification's, with units where it lacks them. */
struct header {
  uint32_t magic;
  uint32_t version;
  uint64_t backing_off;
  uint32_t backing_len;
  uint32_t cluster_bits;
  uint64_t size;                /* virtual disk size, bytes */
  uint32_t crypt_method;
  uint32_t l1_entries;
  uint64_t l1_host_off;
  uint64_t rt_host_off;
  uint32_t rt_clusters;
  uint32_t nr_snapshots;
  uint64_t snapshots_host_off;
  /* Version 3; version 2 gets the values that it implies. */
  uint64_t incompatible;
  uint64_t compatible;
  uint64_t autoclear;
  uint32_t refcount_order;
  uint32_t header_length;       /* bytes; where the field makes no sense, what it must be */
  uint32_t header_length_found; /* the field */
  uint8_t compression_type;
  /* From header_decode_extensions. */
  struct header_ext_vec exts;
  bool exts_damaged;            /* an extension is longer than its space or has an impossible length */
  uint64_t exts_end;            /* offset of the first byte after the last sound one */
};

/* The longest fixed part that header_decode looks at. */
#define HEADER_FIXED_LENGTH 112

/* Decode the fixed fields from the first len bytes of the file (a shorter file
 * is padded with zeros by the caller; len >= HEADER_FIXED_LENGTH).  Any bytes
 * decode to something; ask header_usable.
 */
void header_decode (const uint8_t *buf, size_t len, struct header *h);

/* 0 if cluster size, version, refcount width and features are such that the
 * rest of the image can be understood; -EINVAL (not a qcow2 header) or -ENOTSUP
 * (unknown version or incompatible feature) with a message otherwise.
 */
int header_usable (const struct header *h, struct err *err);

/* Is it the incompatible features that header_usable refused?  Then the geometry
 * is good, and a second look at the first cluster may tell their names.
 */
bool header_unknown_features (const struct header *h);

/* Say that again, with the names that the image's own feature name table gives
 * (printable characters only).  h must not have extensions yet.  Returns -ENOTSUP, or
 * -ENOMEM.
 */
int header_refuse_features (const uint8_t *cluster, struct header *h, struct err *err);

#define FEATURE_INCOMPATIBLE 0          /* types in the feature name table */
#define FEATURE_COMPATIBLE   1
#define FEATURE_AUTOCLEAR    2
#define FEATURE_NAME_SIZE    47         /* bytes, with the terminating zero */

/* What the feature name table, if there is one, calls that bit.  h with its
 * extensions.  Untrusted bytes: what can't be printed becomes a '?'.  false if it
 * has no name.
 */
bool header_feature_name (const struct header *h, const uint8_t *cluster, uint8_t type,
                          unsigned bit, char name[FEATURE_NAME_SIZE]);

/* Find the extensions.  cluster is the first cluster, padded with zeros.
 * Damage is noted in h->exts_damaged.  0 or -ENOMEM.
 */
int header_decode_extensions (const uint8_t *cluster, struct header *h, struct err *err);

/* Does the backing file's name lie where it cannot?  QEMU refuses a place outside the
 * first cluster even for a name of no bytes.
 */
bool header_backing_outside (const struct header *h);

/* First extension of that type, or NULL. */
const struct header_ext *header_find_ext (const struct header *h, uint32_t type);

void header_reset (struct header *h);

/* What follows from cluster_bits, refcount_order and the features. */
struct geom {
  uint32_t version;
  unsigned cluster_bits;
  uint64_t cluster_size;        /* bytes */
  unsigned l2e_size;            /* bytes of an L2 entry: 8, or 16 with extended L2 entries */
  unsigned l2_bits;             /* log2 of entries in an L2 table */
  uint64_t l2_entries;          /* entries in an L2 table */
  uint64_t l2_coverage;         /* guest bytes that one L2 table maps */
  unsigned refcount_order;
  unsigned refcount_bits;       /* width of a refcount, 1..64 */
  unsigned rb_bits;             /* log2 of refcounts in a refcount block */
  uint64_t rb_entries;          /* refcounts in a refcount block */
  uint64_t refcount_max;        /* largest refcount that the width can hold */
  bool extended_l2;
  bool data_file;               /* guest clusters lie in another file: not refcounted here */
};

/* h must be header_usable. */
void geom_init (struct geom *g, const struct header *h);

/* L1 entries that a virtual disk of size bytes needs. */
uint64_t geom_l1_entries (const struct geom *g, uint64_t size);

/* What image_create is to write. */
struct header_template {
  uint32_t version;             /* 2 or 3 */
  unsigned cluster_bits;
  unsigned refcount_order;      /* must be 4 in version 2 */
  uint64_t size;
  uint32_t l1_entries;
  uint64_t l1_host_off, rt_host_off;
  uint32_t rt_clusters;
  const char *backing_name;     /* or NULL */
  const char *backing_format;   /* or NULL */
  uint32_t private_ext_type;    /* 0 = none */
  const void *private_ext;
  uint32_t private_ext_len;
};

/* Write a new header cluster into buf (one cluster of zeros).  -EINVAL if the
 * names do not fit.
 */
int header_encode (const struct header_template *t, uint8_t *buf, struct err *err);

#endif /* QR_FMT_HEADER_H */
