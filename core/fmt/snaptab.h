/* The snapshot table: bytes -> structs.  Pure. */
#ifndef QR_FMT_SNAPTAB_H
#define QR_FMT_SNAPTAB_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"
#include "base/vec.h"
#include "fmt/header.h"

struct snapshot {
  uint64_t l1_host_off;
  uint32_t l1_entries;
  uint64_t vm_state_bytes;
  uint64_t size;                /* virtual disk size when it was taken; 0 = not recorded */
  uint32_t extra_len;           /* bytes of extra data; version 3 requires 16 */
  uint64_t entry_off;           /* bytes from the start of the snapshot table */
  uint64_t entry_len;           /* bytes, with padding */
  char *id, *name;              /* owned, NUL-terminated copies; bytes as found */
  bool unusable;                /* set by the check: its L1 table is not where it could be */
};
DEFINE_VEC (snapshot_vec, struct snapshot);

/* Decode the entry that starts at table + off.  len is the number of bytes
 * known.  0 and *s filled (strings owned by the caller), -EAGAIN if the entry
 * needs more bytes than len (then *need says how many from off), -EINVAL if
 * it can't be right, -ENOMEM.
 */
int snapshot_decode (const uint8_t *table, uint64_t len, uint64_t off,
                     struct snapshot *s, uint64_t *need, struct err *err);

void snapshot_vec_reset (struct snapshot_vec *v);

#endif /* QR_FMT_SNAPTAB_H */
