/* The list of header extensions, as it is on the device now: mending of one
 * extension moves or uncovers others, so it is read anew for each step.
 */
#ifndef QR_HEAL_EXT_H
#define QR_HEAL_EXT_H

#include "heal/heal-int.h"

#define EXT_HEADER_LENGTH 8

struct ext_list {
  uint8_t *cluster;             /* the first cluster, padded with zeros; owned */
  struct header header;         /* with its extensions */
};

/* Call ext_list_reset after it, whatever it returned.  0 or -errno. */
int ext_list_read (struct heal *h, struct ext_list *l, struct err *err);
void ext_list_reset (struct ext_list *l);

/* Take an extension out of l->cluster; those behind it move up, byte for byte.  What
 * changed lies between its header and the offset that is returned, and is to be
 * written by the caller.  The rest of l is stale then.
 */
uint64_t ext_list_cut (struct ext_list *l, const struct header_ext *ext);

/* Mend every extension that reaches past its space, or end the list there. */
int ext_list_mend (struct heal *h, struct err *err);

/* Bytes of text at off, up to limit. */
uint64_t printable_run (const uint8_t *p, uint64_t off, uint64_t limit);

#endif /* QR_HEAL_EXT_H */
