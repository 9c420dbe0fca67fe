/* Level all, the persistent bitmaps: those that cannot be right are dropped one by
 * one, or all of them if nothing says where they are.  They say what changed
 * since a backup, so the price of one that is gone is a full backup; the price of
 * one that is wrong is an image that QEMU does not open.
 *
 * A directory that loses an entry is written anew to clusters of its own and flushed,
 * then one write to the extension switches to it.  If only the last ones go, the
 * extension alone changes.  Where none is left, the extension goes, and the bit with it.
 *
 * The extension is looked up anew here: what was done to the list before may have
 * moved it, or have changed its length.  In the second case the next check judges it.
 *
 * Deliberately not here: bitmaps of an image whose autoclear bit is not set: QEMU
 * ignores them.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/endian.h"
#include "base/num.h"
#include "heal/heal-ext.h"

/* Fields of the extension. */
#define EXT_OFF_NR       0
#define EXT_OFF_RESERVED 4
#define EXT_OFF_DIR_LEN  8
#define EXT_OFF_DIR      16

/* The bit and the extension go with one write: each without the other means something. */
static int
drop_all (struct heal *h, struct ext_list *l, const struct header_ext *ext, struct err *err)
{
  uint64_t from = ext->host_off - EXT_HEADER_LENGTH, end = ext_list_cut (l, ext);

  if (l->header.version >= 3) {
    from = HEADER_OFF_AUTOCLEAR;
    store_be64 (l->cluster + from, l->header.autoclear & ~AUTOCLEAR_BITMAPS);
  }
  return heal_write (h, l->cluster + from, end - from, from, err);
}

/* Are those that go the last ones?  *len: bytes of the directory that stay. */
static bool
is_prefix (const struct bitmap_state_vec *v, uint64_t *len)
{
  bool gone = false, prefix = true;

  *len = 0;
  for (size_t i = 0; i < v->len; ++i) {
    gone = gone || v->ptr[i].damaged;
    prefix = prefix && (v->ptr[i].damaged || !gone);
    *len += v->ptr[i].damaged ? 0 : v->ptr[i].dir_len;
  }
  return prefix;
}

/* Write a directory of len bytes without the damaged ones.  *host_off: the old one's place,
 * then the new one's.
 */
static int
write_directory (struct heal *h, uint64_t len, uint64_t *host_off, struct err *err)
{
  const struct bitmap_state_vec *v = &h->c->bitmaps;
  CLEANUP_FREE uint8_t *dir = malloc (MAX (len, 1));
  uint64_t off = 0;
  int r = 0;

  if (!dir)
    return err_set (err, ENOMEM, "out of memory");
  if (v->len)                   /* of some hundred KiB at most */
    ahead_hint (h->d, *host_off, v->ptr[v->len - 1].dir_off + v->ptr[v->len - 1].dir_len);
  for (size_t i = 0; i < v->len && r == 0; ++i) {
    if (v->ptr[i].damaged)
      continue;
    r = bdev_pread_padded (h->d, dir + off, v->ptr[i].dir_len, *host_off + v->ptr[i].dir_off, err);
    off += v->ptr[i].dir_len;
  }
  if (r < 0)
    return r;
  r = heal_place (h, DIV_ROUND_UP (len, h->g.cluster_size), host_off, err);
  if (r == -ENOSPC) {
    err_clear (err);
    r = 0;                      /* then where it lies, where it has become shorter */
  }
  if (r == 0)
    r = heal_write (h, dir, len, *host_off, err);
  return r < 0 ? r : bdev_flush (h->d, err);
}

static int
drop_some (struct heal *h, const struct ext_list *l, const struct header_ext *ext, uint32_t kept,
           struct err *err)
{
  const uint8_t *old = l->cluster + ext->host_off;
  uint64_t len, host_off = load_be64 (old + EXT_OFF_DIR);
  uint8_t data[BITMAPS_EXT_LENGTH] = { 0 };
  int r = 0;

  if (!is_prefix (&h->c->bitmaps, &len))
    r = write_directory (h, len, &host_off, err);
  store_be32 (data + EXT_OFF_NR, kept);
  store_be64 (data + EXT_OFF_DIR_LEN, len);
  store_be64 (data + EXT_OFF_DIR, host_off);
  return r < 0 ? r : heal_write (h, data, sizeof data, ext->host_off, err);
}

/* Is it the extension that the check speaks of? */
static bool
is_same (const struct heal *h, const struct header_ext *ext)
{
  const struct header_ext *seen = header_find_ext (&h->c->header, EXT_BITMAPS);

  return seen && ext && seen->len == ext->len;
}

int
heal_bitmaps (struct heal *h, struct err *err)
{
  const struct check *c = h->c;
  const struct header_ext *ext;
  uint32_t kept = 0;
  struct ext_list l;
  int r;

  for (size_t i = 0; i < c->bitmaps.len; ++i)
    kept += !c->bitmaps.ptr[i].damaged;
  if (!c->bitmap_dir_damaged && kept == c->bitmaps.len)
    return 0;
  r = ext_list_read (h, &l, err);
  ext = r < 0 ? NULL : header_find_ext (&l.header, EXT_BITMAPS);
  if (r == 0 && is_same (h, ext)) {
    r = c->bitmap_dir_damaged || kept == 0 ? drop_all (h, &l, ext, err)
                                           : drop_some (h, &l, ext, kept, err);
    if (r == 0)
      h->res->structures++;
  }
  ext_list_reset (&l);
  return r;
}
