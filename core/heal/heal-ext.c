/* The list of header extensions: one that reaches past its space hides all that
 * follow it, and those may say where the encryption header, the bitmaps or the
 * external data file are.
 *
 * What is wrong is taken to be a length, since a wrong type is an unknown
 * extension and harmless.  The first extension of the list whose length its type does
 * not allow is the one to be mended, as its neighbour may only look damaged because of
 * it.  In this order:
 *
 *   1. The length that its type or its contents demand, if what follows then is
 *      an extension or the end of the list.
 *   2. The next place from which a list of known extensions leads to the end
 *      without a fault: up to there it reaches.  If its type allows no such length it
 *      is taken out.
 *   3. The list ends before it.
 *
 * The name of the backing file lies behind the list and does not move with it: its
 * place is in the header.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/endian.h"
#include "base/num.h"
#include "heal/heal-ext.h"

#define MAX_FORMAT_NAME   15    /* QEMU takes no more */

/* --- the list */

int
ext_list_read (struct heal *h, struct ext_list *l, struct err *err)
{
  uint64_t size = h->g.cluster_size;
  int r;

  memset (l, 0, sizeof *l);
  l->cluster = malloc (size);
  if (!l->cluster)
    return err_set (err, ENOMEM, "out of memory");
  r = bdev_pread_padded (h->d, l->cluster, size, 0, err);
  if (r < 0)
    return r;
  header_decode (l->cluster, size, &l->header);
  return header_decode_extensions (l->cluster, &l->header, err);
}

void
ext_list_reset (struct ext_list *l)
{
  header_reset (&l->header);
  free (l->cluster);
  l->cluster = NULL;
}

uint64_t
ext_list_cut (struct ext_list *l, const struct header_ext *ext)
{
  uint64_t from = ext->host_off - EXT_HEADER_LENGTH;
  uint64_t end = MAX (l->header.exts_end, ext->host_off);
  uint64_t next = MIN (ROUND_UP (ext->host_off + ext->len, 8), end);

  /* The zeros are the end of the list, wherever it was before. */
  memmove (l->cluster + from, l->cluster + next, end - next);
  memset (l->cluster + end - (next - from), 0, next - from);
  return end;
}

/* --- what an extension can be */

static bool
is_printable (uint8_t c)
{
  return c >= 0x20 && c != 0x7f;        /* names may be UTF-8 */
}

static bool
bytes_printable (const uint8_t *p, uint64_t n)
{
  for (uint64_t i = 0; i < n; ++i)
    if (!is_printable (p[i]))
      return false;
  return true;
}

uint64_t
printable_run (const uint8_t *p, uint64_t off, uint64_t limit)
{
  uint64_t n = 0;

  while (off + n < limit && is_printable (p[off + n]))
    ++n;
  return n;
}

static bool
type_is_known (uint32_t type)
{
  return type == EXT_BACKING_FORMAT || type == EXT_BACKING_FORMAT_CROSVM ||
         type == EXT_FEATURE_NAMES || type == EXT_BITMAPS || type == EXT_CRYPTO_HEADER ||
         type == EXT_DATA_FILE;
}

/* The longest text that an extension of that type holds; 0 if it holds none. */
static uint64_t
text_limit (uint32_t type)
{
  if (type == EXT_BACKING_FORMAT || type == EXT_BACKING_FORMAT_CROSVM)
    return MAX_FORMAT_NAME;
  return type == EXT_DATA_FILE ? MAX_BACKING_NAME : 0;
}

/* Is e, which fits, as long as an extension of its type can be? */
static bool
length_allowed (const uint8_t *cluster, const struct header_ext *e)
{
  uint64_t most = text_limit (e->type);

  if (most)
    return e->len > 0 && e->len <= most && bytes_printable (cluster + e->host_off, e->len);
  switch (e->type) {
  case EXT_BITMAPS:
    return e->len == BITMAPS_EXT_LENGTH;
  case EXT_CRYPTO_HEADER:
    return e->len == CRYPTO_EXT_LENGTH;
  case EXT_FEATURE_NAMES:
    return e->len % FEATURE_NAME_ENTRY_LENGTH == 0;
  default:
    return true;
  }
}

static struct header_ext
ext_at (const uint8_t *cluster, uint64_t off)
{
  return (struct header_ext) { .type = load_be32 (cluster + off),
                               .len = load_be32 (cluster + off + 4),
                               .host_off = off + EXT_HEADER_LENGTH };
}

/* Does a list at off lead to its end without a fault?  *known: extensions of known types in it. */
static bool
list_is_sound (const uint8_t *cluster, uint64_t off, uint64_t limit, unsigned *known)
{
  *known = 0;
  while (range_fits (off, EXT_HEADER_LENGTH, limit)) {
    struct header_ext e = ext_at (cluster, off);

    if (e.type == EXT_END)
      return e.len == 0;
    if (!range_fits (e.host_off, e.len, limit) || !length_allowed (cluster, &e))
      return false;
    *known += type_is_known (e.type);
    off = ROUND_UP (e.host_off + e.len, 8);
  }
  return off <= ROUND_UP (limit, 8);
}

/* Could the extension before it end at off?  The next one may itself be damaged. */
static bool
list_goes_on (const uint8_t *cluster, uint64_t off, uint64_t limit)
{
  unsigned known;

  if (off > limit)
    return false;
  if (range_fits (off, EXT_HEADER_LENGTH, limit) && type_is_known (load_be32 (cluster + off)))
    return true;
  return list_is_sound (cluster, off, limit, &known);
}

/* --- the right length */

static bool
ends_here (const uint8_t *cluster, const struct header_ext *e, uint64_t len, uint64_t limit)
{
  uint64_t end = e->host_off + len, next = ROUND_UP (end, 8);

  if (next > limit)
    return false;
  for (uint64_t i = end; i < next; ++i)
    if (cluster[i])
      return false;
  return list_goes_on (cluster, next, limit);
}

static uint64_t
whole_feature_names (const uint8_t *cluster, const struct header_ext *e, uint64_t limit)
{
  uint64_t len = 0;

  for (; range_fits (e->host_off + len, FEATURE_NAME_ENTRY_LENGTH, limit);
       len += FEATURE_NAME_ENTRY_LENGTH) {
    const uint8_t *p = cluster + e->host_off + len;

    if (p[0] > FEATURE_AUTOCLEAR || p[1] > 63 ||
        printable_run (p, 2, FEATURE_NAME_ENTRY_LENGTH) == 0)
      break;
  }
  return len;
}

/* The length that type and contents demand; 0 if they demand none that can be. */
static uint64_t
demanded_length (const uint8_t *cluster, const struct header_ext *e, uint64_t limit)
{
  uint64_t len = 0, most = text_limit (e->type);

  if (most) {
    /* Text may run into the type of the next extension, which can be a letter. */
    len = MIN (printable_run (cluster, e->host_off, limit), most);
    while (len > 0 && !ends_here (cluster, e, len, limit))
      --len;
    return len;
  }
  if (e->type == EXT_BITMAPS)
    len = BITMAPS_EXT_LENGTH;
  else if (e->type == EXT_CRYPTO_HEADER)
    len = CRYPTO_EXT_LENGTH;
  else if (e->type == EXT_FEATURE_NAMES)
    len = whole_feature_names (cluster, e, limit);
  return len > 0 && ends_here (cluster, e, len, limit) ? len : 0;
}

/* Where the next list begins that holds a known extension and has no fault; 0 = nowhere. */
static uint64_t
find_next (const uint8_t *cluster, const struct header_ext *e, uint64_t limit)
{
  for (uint64_t off = e->host_off; range_fits (off, EXT_HEADER_LENGTH, limit); off += 8) {
    unsigned known;

    if (type_is_known (load_be32 (cluster + off)) && list_is_sound (cluster, off, limit, &known) &&
        known > 0)
      return off;
  }
  return 0;
}

/* --- mending */

static int
set_length (struct heal *h, const struct header_ext *e, uint32_t len, struct err *err)
{
  uint8_t field[4];

  store_be32 (field, len);
  return heal_write (h, field, sizeof field, e->host_off - 4, err);
}

static int
end_list (struct heal *h, uint64_t off, struct err *err)
{
  static const uint8_t end[EXT_HEADER_LENGTH];

  return heal_write (h, end, sizeof end, off, err);
}

/* The extension to be mended.  limit: where the name of the backing file begins, or the
 * cluster ends.
 */
static struct header_ext
find_culprit (const struct ext_list *l, uint64_t limit)
{
  const struct header *header = &l->header;

  for (size_t i = 0; i < header->exts.len; ++i) {
    const struct header_ext *e = &header->exts.ptr[i];

    /* What fits is wrong only if there is a length that is better. */
    if (!length_allowed (l->cluster, e) && demanded_length (l->cluster, e, limit))
      return *e;
  }
  return ext_at (l->cluster, header->exts_end);
}

static int
mend_one (struct heal *h, struct ext_list *l, struct err *err)
{
  const struct header *header = &l->header;
  uint64_t limit = h->g.cluster_size, len, next, off;
  struct header_ext e;

  if (header->backing_off >= header->header_length && header->backing_off < limit)
    limit = header->backing_off;
  e = find_culprit (l, limit);
  len = demanded_length (l->cluster, &e, limit);
  if (len)
    return set_length (h, &e, len, err);
  next = find_next (l->cluster, &e, limit);
  if (next == 0)
    return end_list (h, e.host_off - EXT_HEADER_LENGTH, err);
  e.len = next - e.host_off;
  if (!type_is_known (e.type) || e.type == EXT_FEATURE_NAMES)
    return set_length (h, &e, e.len, err);
  /* Behind the damage nothing was decoded: all up to the limit moves. */
  l->header.exts_end = ROUND_DOWN (limit, 8);
  next = ext_list_cut (l, &e);
  off = e.host_off - EXT_HEADER_LENGTH;
  return heal_write (h, l->cluster + off, next - off, off, err);
}

int
ext_list_mend (struct heal *h, struct err *err)
{
  bool damaged = true;
  int r = 0;

  /* Each step mends one that comes later in the cluster, or takes one away. */
  for (uint64_t n = h->g.cluster_size / EXT_HEADER_LENGTH; n > 0 && damaged && r == 0; --n) {
    struct ext_list l;

    r = ext_list_read (h, &l, err);
    damaged = r == 0 && l.header.exts_damaged;
    if (damaged) {
      r = mend_one (h, &l, err);
      h->res->structures++;
    }
    ext_list_reset (&l);
  }
  return r;
}
