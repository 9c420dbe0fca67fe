/* Small sound qcow2 images in RAM, for the fuzzer to damage. */
#ifndef QR_TESTS_BASES_H
#define QR_TESTS_BASES_H

#include <stdint.h>

struct base_region {
  uint64_t off, len;            /* bytes; len is a multiple of 8 */
};

struct base {
  uint8_t *bytes;
  uint64_t len;
  uint64_t cluster_size;
  /* Where its structures lie, so that damage hits something that matters. */
  struct base_region regions[16];
  unsigned nr_regions;
};

extern const unsigned nr_bases;

/* The i-th one, i < nr_bases.  Made once; not to be changed. */
const struct base *base_get (unsigned i);

#endif /* QR_TESTS_BASES_H */
