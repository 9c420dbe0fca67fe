/* Level all, the header: its length, the extensions, the backing file's name, and
 * where the active L1 table is and how long.
 *
 * The L1 table: the check says how many entries it must have and whether there is
 * room for them where it lies.  If not it moves, and the order is that of I5: the new
 * table is whole and flushed before the one write that switches the header to it.
 * Entries that were cut off by the end of the file are zeros in it; that they are lost,
 * and what is to become of them where there is a backing file, heal_entries knows.
 *
 * The name of the backing file is said nowhere else.  But QEMU writes it right behind
 * the extensions and fills the rest with zeros, so if either its place or its length is
 * right, the other follows.  If not, the image goes on without: a name that is guessed
 * could be that of another disk.
 *
 * Deliberately not here: the fields of the refcount structure (heal-refcounts.c),
 * of the snapshot table (heal-snapshots.c), and the feature bits (heal_finish).
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/endian.h"
#include "base/num.h"
#include "heal/heal-ext.h"

static bool
found (const struct heal *h, enum finding_id id)
{
  return findings_has (&h->c->findings, id);
}

static int
write_length (struct heal *h, struct err *err)
{
  uint8_t field[4];

  if (!found (h, FINDING_HEADER_LENGTH_WRONG))
    return 0;
  store_be32 (field, h->c->header.header_length);
  h->res->structures++;
  return heal_write (h, field, sizeof field, HEADER_OFF_HEADER_LENGTH, err);
}

/* --- the name of the backing file */

/* Where it is if it lies right behind the extensions; l is how the header has it. */
static int
find_name (const struct ext_list *l, uint64_t *off, uint32_t *len, struct err *err)
{
  uint64_t limit = UINT64_C (1) << l->header.cluster_bits, n;
  struct header whole;
  int r;

  *off = 0;
  header_decode (l->cluster, limit, &whole);
  whole.backing_off = 0;        /* it must not cut the list short */
  r = header_decode_extensions (l->cluster, &whole, err);
  if (r == 0 && !whole.exts_damaged && range_fits (whole.exts_end, 8, limit)) {
    uint64_t at = whole.exts_end + 8;

    n = printable_run (l->cluster, at, limit);
    if (n > 0 && n <= MAX_BACKING_NAME && (at + n == limit || l->cluster[at + n] == 0) &&
        (n == l->header.backing_len || at == l->header.backing_off)) {
      *off = at;
      *len = n;
    }
  }
  header_reset (&whole);
  return r;
}

/* A place in the midst of the extensions makes these look damaged.  last: nothing is
 * left to be mended that could tell more.
 */
static int
mend_name (struct heal *h, bool last, struct err *err)
{
  uint8_t fields[12] = { 0 };
  struct ext_list l;
  uint64_t off = 0;
  uint32_t len = 0;
  int r = ext_list_read (h, &l, err);
  bool outside = r == 0 && header_backing_outside (&l.header);

  if (outside || (r == 0 && l.header.backing_off && l.header.exts_damaged))
    r = find_name (&l, &off, &len, err);
  if (r == 0 && (off || (outside && last))) {
    if (off) {
      store_be64 (fields, off);
      store_be32 (fields + 8, len);
    }
    h->res->structures++;
    r = heal_write (h, fields, sizeof fields, HEADER_OFF_BACKING_OFF, err);
  }
  ext_list_reset (&l);
  return r;
}

/* crosvm writes the right format with the wrong type.  If the right type is there, too,
 * QEMU has written since, and the other is an unknown extension that it kept.
 */
static int
mend_backing_format (struct heal *h, struct err *err)
{
  struct ext_list l;
  int r = ext_list_read (h, &l, err);
  const struct header_ext *misspelt = r < 0 ? NULL
                                      : header_find_ext (&l.header, EXT_BACKING_FORMAT_CROSVM);

  if (misspelt) {
    uint64_t off = misspelt->host_off - EXT_HEADER_LENGTH, end = off + 4;

    if (header_find_ext (&l.header, EXT_BACKING_FORMAT))
      end = ext_list_cut (&l, misspelt);
    else
      store_be32 (l.cluster + off, EXT_BACKING_FORMAT);
    h->res->structures++;
    r = heal_write (h, l.cluster + off, end - off, off, err);
  }
  ext_list_reset (&l);
  return r;
}

/* --- the active L1 table */

/* Write a new table of n clusters: the entries that the check went by, then zeros. */
static int
copy_l1 (struct heal *h, uint64_t host_off, uint64_t clusters, struct err *err)
{
  uint64_t bytes = h->c->l1_entries_followed * UINT64_C (8);
  struct ahead ahead;
  int r = 0;

  ahead_init_bytes (&ahead, h->d, h->c->header.l1_host_off, bytes, h->g.cluster_size);
  for (uint64_t done = 0; done < clusters << h->g.cluster_bits && r == 0;
       done += h->g.cluster_size) {
    uint64_t n = done < bytes ? MIN (bytes - done, h->g.cluster_size) : 0;

    memset (h->buf, 0, h->g.cluster_size);
    ahead_at (&ahead, done >> h->g.cluster_bits);
    if (n > 0)
      r = bdev_pread_padded (h->d, h->buf, n, h->c->header.l1_host_off + done, err);
    if (r == 0)
      r = heal_write (h, h->buf, h->g.cluster_size, host_off + done, err);
  }
  return r;
}

/* Bad entries of the table are now elsewhere: heal_entries comes after us. */
static void
follow_l1 (struct check *c, uint64_t host_off)
{
  for (size_t i = 0; i < c->bad.len; ++i)
    if (c->bad.ptr[i].in_l1 && c->bad.ptr[i].snapshot_index == FINDING_ACTIVE)
      c->bad.ptr[i].table_host_off = host_off;
}

static int
move_l1 (struct heal *h, uint64_t *host_off, struct err *err)
{
  uint64_t clusters = DIV_ROUND_UP (h->c->l1_entries_right * UINT64_C (8), h->g.cluster_size);
  int r = heal_place (h, clusters, host_off, err);

  return r < 0 ? r : copy_l1 (h, *host_off, clusters, err);
}

/* It has room where it lies: entries that nobody has looked at become 0.  They are past
 * the end of the file, whose last cluster may not have been anybody's.
 */
static int
extend_l1 (struct heal *h, struct err *err)
{
  const struct check *c = h->c;
  uint64_t host_off = c->header.l1_host_off + c->l1_entries_followed * UINT64_C (8);
  uint64_t end = c->header.l1_host_off + c->l1_entries_right * UINT64_C (8), n;
  int r = 0;

  memset (h->buf, 0, h->g.cluster_size);
  for (uint64_t off = host_off; off < end && r == 0; off += n) {
    uint64_t ci = off >> h->g.cluster_bits;

    n = MIN (end - off, ((ci + 1) << h->g.cluster_bits) - off);
    if (ownermap_get (c->owners, ci) == 0)
      r = ownermap_claim (c->owners, ci, 1, 1, NULL, err);
    if (r == 0)
      r = heal_write (h, h->buf, n, off, err);
  }
  return r;
}

static int
write_l1_fields (struct heal *h, uint64_t host_off, struct err *err)
{
  uint8_t fields[12];
  int r = bdev_flush (h->d, err);       /* I5 */

  store_be32 (fields, h->c->l1_entries_right);
  store_be64 (fields + 4, host_off);
  return r < 0 ? r : heal_write (h, fields, sizeof fields, HEADER_OFF_L1_SIZE, err);
}

static int
mend_l1 (struct heal *h, struct err *err)
{
  struct check *c = h->c;
  uint64_t host_off = c->header.l1_host_off, right = c->l1_entries_right;
  bool move = c->l1_must_move || (!h->d->can_grow && right > c->l1_entries_followed);
  int r = 0;

  if (found (h, FINDING_L1_OUTSIDE) || found (h, FINDING_L1_UNREADABLE) ||
      (right == c->header.l1_entries && !found (h, FINDING_L1_CUT)))
    return 0;
  if (move)
    r = move_l1 (h, &host_off, err);
  else if (right > c->l1_entries_followed)
    r = extend_l1 (h, err);
  if (r == 0 && (right != c->header.l1_entries || host_off != c->header.l1_host_off))
    r = write_l1_fields (h, host_off, err);
  if (r < 0)
    return r;
  h->res->structures++;
  follow_l1 (c, host_off);
  c->header.l1_host_off = host_off;
  c->header.l1_entries = right;
  return 0;
}

int
heal_header (struct heal *h, struct lost *lost, struct err *err)
{
  int r = write_length (h, err);

  if (r == 0 && (found (h, FINDING_BACKING_NAME_OUTSIDE) || found (h, FINDING_EXTENSIONS_DAMAGED)))
    r = mend_name (h, false, err);
  if (r == 0 && found (h, FINDING_EXTENSIONS_DAMAGED))
    r = ext_list_mend (h, err);
  if (r == 0 && found (h, FINDING_BACKING_NAME_OUTSIDE))
    r = mend_name (h, true, err);
  if (r == 0 && found (h, FINDING_BACKING_FORMAT_MISSPELT))
    r = mend_backing_format (h, err);
  return r < 0 ? r : mend_l1 (h, err);
}
