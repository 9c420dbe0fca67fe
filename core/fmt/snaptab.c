/* See snaptab.h.  Version 2 entries may lack extra data, so its fields are
 * taken where they are present and not demanded.
 */
#include <errno.h>
#include <string.h>

#include "base/endian.h"
#include "base/num.h"
#include "fmt/snaptab.h"

int
snapshot_decode (const uint8_t *table, uint64_t len, uint64_t off,
                 struct snapshot *s, uint64_t *need, struct err *err)
{
  const uint8_t *p;
  uint32_t id_len, name_len, extra_len;
  uint64_t avail = off <= len ? len - off : 0;

  memset (s, 0, sizeof *s);
  *need = SNAPSHOT_FIXED_LENGTH;
  if (avail < *need)
    return -EAGAIN;
  p = table + off;              /* table may be NULL before */
  id_len = load_be16 (p + 12);
  name_len = load_be16 (p + 14);
  extra_len = load_be32 (p + 36);
  if (extra_len > MAX_SNAPSHOT_EXTRA_BYTES)
    return err_set (err, EINVAL, "the snapshot table entry at byte %llu of the table has "
                    "%u bytes of extra data, at most %u make sense",
                    (unsigned long long) off, extra_len, MAX_SNAPSHOT_EXTRA_BYTES);
  *need = ROUND_UP (SNAPSHOT_FIXED_LENGTH + (uint64_t) extra_len + id_len + name_len, 8);
  /* The padding of the last entry may be missing. */
  if (avail < SNAPSHOT_FIXED_LENGTH + (uint64_t) extra_len + id_len + name_len)
    return -EAGAIN;
  s->extra_len = extra_len;
  s->entry_off = off;
  s->entry_len = *need;
  s->l1_host_off = load_be64 (p);
  s->l1_entries = load_be32 (p + 8);
  s->vm_state_bytes = load_be32 (p + 32);
  if (extra_len >= 8)
    s->vm_state_bytes = load_be64 (p + 40);
  if (extra_len >= 16)
    s->size = load_be64 (p + 48);
  p += SNAPSHOT_FIXED_LENGTH + extra_len;
  s->id = strndup ((const char *) p, id_len);
  s->name = strndup ((const char *) p + id_len, name_len);
  if (!s->id || !s->name) {
    free (s->id);
    free (s->name);
    return err_set (err, ENOMEM, "out of memory");
  }
  return 0;
}

void
snapshot_vec_reset (struct snapshot_vec *v)
{
  for (size_t i = 0; i < v->len; ++i) {
    free (v->ptr[i].id);
    free (v->ptr[i].name);
  }
  vec_reset (v);
}
