/* Level all, the snapshot table: snapshots that cannot be right are dropped one by
 * one, all others stay byte for byte, and get the extra data that version 3 demands.
 *
 * A table that loses an entry in its midst, or whose entries grow, is written anew to
 * clusters of its own and flushed, and then one write of 12 bytes to the header
 * switches to it: cut off before that, all snapshots are still there (I5, I6).  If
 * only the last ones go, the header alone changes.  Only on a device without room the
 * table is rewritten where it lies.
 *
 * How large the disk was when a snapshot was taken that does not say so: as large as it is
 * now, which is what everybody assumes, but not larger than its L1 table can map; and
 * at least as large as what its tables map, since the disk may have shrunk.  The
 * last does not hold if there is a VM state, which is mapped behind the disk.
 *
 * Deliberately not here: bad entries in the tables of snapshots that stay
 * (heal-entries.c).
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/endian.h"
#include "base/num.h"
#include "heal/heal-int.h"

/* --- which of them go */

static uint64_t
total (const struct heal *h, enum finding_id id)
{
  return h->c->findings.totals[id];
}

/* Why snapshot i goes. */
static enum finding_id
reason (const struct check *c, size_t i)
{
  for (size_t j = 0; j < c->findings.runs.len; ++j) {
    const struct finding *f = &c->findings.runs.ptr[j];

    if ((f->id == FINDING_SNAPSHOT_L1_OUTSIDE || f->id == FINDING_SNAPSHOT_OVERLAP) &&
        i >= f->index && i - f->index < f->count)
      return f->id;
  }
  return FINDING_SNAPSHOT_OVERLAP;
}

/* Is the whole table gone, and what says so? */
static bool
table_lost (const struct heal *h, enum finding_id *why)
{
  *why = total (h, FINDING_SNAPSHOT_TABLE_OUTSIDE) ? FINDING_SNAPSHOT_TABLE_OUTSIDE
                                                   : FINDING_TOO_MANY_SNAPSHOTS;
  /* A count without a place was never anything but a count, nor a place without one. */
  return total (h, *why) && h->c->snapshots.len == 0 && h->c->header.snapshots_host_off
         && h->c->header.nr_snapshots;
}

/* n snapshots, or an unknown number of them, of which nothing is known. */
static int
lose_unknown (struct lost *lost, uint64_t n, enum finding_id why)
{
  int r = 0;

  while (n-- > 0 && r == 0)
    r = lost_add_snapshot (lost, NULL, NULL, why);
  return r;
}

/* List what goes.  *kept: how many stay. */
static int
list_lost (struct heal *h, struct lost *lost, uint64_t *kept, struct err *err)
{
  const struct check *c = h->c;
  enum finding_id why;
  int r = lose_unknown (lost, total (h, FINDING_SNAPSHOT_ENTRY_BAD), FINDING_SNAPSHOT_ENTRY_BAD);

  if (r == 0 && table_lost (h, &why))
    r = lose_unknown (lost, 1, why);
  *kept = 0;
  for (size_t i = 0; i < c->snapshots.len && r == 0; ++i) {
    const struct snapshot *s = &c->snapshots.ptr[i];

    if (s->unusable)
      r = lost_add_snapshot (lost, s->id, s->name, reason (c, i));
    *kept += !s->unusable;
  }
  return r < 0 ? err_set (err, ENOMEM, "out of memory") : 0;
}

static bool
lacks_extra_data (const struct heal *h, const struct snapshot *s)
{
  return h->g.version >= 3 && s->extra_len < SNAPSHOT_V3_EXTRA_LENGTH;
}

/* Does every snapshot that stays lie where it lay, with nothing between them? */
static bool
is_prefix (const struct heal *h)
{
  uint64_t off = 0;
  bool gone = false;

  for (size_t i = 0; i < h->c->snapshots.len; ++i) {
    const struct snapshot *s = &h->c->snapshots.ptr[i];

    if (s->unusable) {
      gone = true;
      continue;
    }
    if (gone || s->entry_off != off || lacks_extra_data (h, s))
      return false;
    off += s->entry_len;
  }
  return true;
}

/* --- how large the disk was */

/* One past the last entry of a table at host_off that is not 0; entries are step bytes. */
static int
used_entries (struct heal *h, uint64_t host_off, uint64_t nr, unsigned step, uint64_t *used,
              struct err *err)
{
  int r = 0;

  *used = 0;
  for (uint64_t end = nr; end > 0 && *used == 0 && r == 0;) {
    uint64_t n = MIN (end, h->g.cluster_size / step);

    end -= n;
    r = bdev_pread_padded (h->d, h->buf, n * step, host_off + end * step, err);
    for (uint64_t i = n * step; r == 0 && i > 0 && *used == 0; --i)
      if (h->buf[i - 1])
        *used = end + (i - 1) / step + 1;
  }
  return r;
}

/* Where the last L2 table of the snapshot is: 0 if there is none that can be read. *l1_index:
 * its entry.
 */
static int
last_table (struct heal *h, const struct snapshot *s, uint64_t *l2, uint64_t *l1_index,
            struct err *err)
{
  uint64_t tables;
  uint8_t raw[8];
  int r = used_entries (h, s->l1_host_off, s->l1_entries, 8, &tables, err);

  *l2 = 0;
  if (r < 0 || tables == 0)
    return r;
  *l1_index = tables - 1;
  r = bdev_pread_padded (h->d, raw, sizeof raw, s->l1_host_off + *l1_index * 8, err);
  if (r < 0)
    return r;
  *l2 = load_be64 (raw) & L1E_OFF_MASK;
  if (!IS_ALIGNED (*l2, h->g.cluster_size) || *l2 >= bdev_size (h->d))
    *l2 = 0;                    /* it is going to be cleared */
  return 0;
}

/* Bytes of the disk up to the last cluster that the snapshot's tables map. */
static int
mapped_end (struct heal *h, const struct snapshot *s, uint64_t *end, struct err *err)
{
  uint64_t l2, l1_index, clusters;
  int r = last_table (h, s, &l2, &l1_index, err);

  *end = 0;
  if (r < 0 || l2 == 0)
    return r;
  r = used_entries (h, l2, h->g.l2_entries, h->g.l2e_size, &clusters, err);
  *end = l1_index * h->g.l2_coverage + (clusters << h->g.cluster_bits);
  return r;
}

static int
disk_size (struct heal *h, const struct snapshot *s, uint64_t *size, struct err *err)
{
  uint64_t coverage, end = 0;
  int r = 0;

  if (mul_overflows (s->l1_entries, h->g.l2_coverage, &coverage))
    coverage = UINT64_MAX;
  *size = MIN (coverage, h->c->header.size);
  if (s->vm_state_bytes == 0)
    r = mapped_end (h, s, &end, err);
  *size = MAX (*size, MIN (end, coverage));
  return r;
}

/* --- the new table */

struct new_table {
  uint8_t *buf;                 /* owned */
  uint64_t len;
};

/* Give the entry of len bytes at p the extra data; there is room for it. Its new length. */
static uint64_t
add_extra_data (uint8_t *p, const struct snapshot *s, uint64_t size)
{
  uint64_t strings = (uint64_t) load_be16 (p + 12) + load_be16 (p + 14);
  uint8_t *extra = p + SNAPSHOT_FIXED_LENGTH;
  uint64_t len = SNAPSHOT_FIXED_LENGTH + SNAPSHOT_V3_EXTRA_LENGTH + strings;

  memmove (extra + SNAPSHOT_V3_EXTRA_LENGTH, extra + s->extra_len, strings);
  store_be64 (extra, s->vm_state_bytes);
  store_be64 (extra + 8, size);
  store_be32 (p + 36, SNAPSHOT_V3_EXTRA_LENGTH);
  memset (p + len, 0, ROUND_UP (len, 8) - len);
  return ROUND_UP (len, 8);
}

static int
add_entry (struct heal *h, struct new_table *t, const struct snapshot *s, struct err *err)
{
  uint8_t *p = t->buf + t->len;
  uint64_t size = 0;
  int r = bdev_pread_padded (h->d, p, s->entry_len, h->c->header.snapshots_host_off + s->entry_off,
                             err);

  t->len += s->entry_len;
  if (r < 0 || !lacks_extra_data (h, s))
    return r;
  r = disk_size (h, s, &size, err);
  t->len += add_extra_data (p, s, size) - s->entry_len;
  return r;
}

static bool
range_of_entry (void *opaque, uint64_t i, struct bdev_range *range)
{
  const struct heal *h = opaque;
  const struct snapshot *s = &h->c->snapshots.ptr[i];

  *range = (struct bdev_range) { h->c->header.snapshots_host_off + s->entry_off, s->entry_len };
  return !s->unusable;
}

/* Does disk_size look into the tables of snapshot i, and where do these begin? */
static bool
range_of_l1 (void *opaque, uint64_t i, struct bdev_range *range)
{
  const struct heal *h = opaque;
  const struct snapshot *s = &h->c->snapshots.ptr[i];

  *range = (struct bdev_range) { s->l1_host_off, s->l1_entries * UINT64_C (8) };
  return !s->unusable && lacks_extra_data (h, s) && s->vm_state_bytes == 0;
}

static void
scout_l1 (void *opaque, uint64_t i)
{
  struct heal *h = opaque;
  uint64_t l2, l1_index;

  if (last_table (h, &h->c->snapshots.ptr[i], &l2, &l1_index, NULL) == 0 && l2)
    ahead_hint (h->d, l2, h->g.cluster_size);
}

/* Those that stay, in their order. */
static int
build_table (struct heal *h, struct new_table *t, struct err *err)
{
  const struct snapshot_vec *v = &h->c->snapshots;
  struct ahead entries, l1s;
  uint64_t room = 0;
  int r = 0;

  for (size_t i = 0; i < v->len; ++i)
    room += v->ptr[i].entry_len + SNAPSHOT_V3_EXTRA_LENGTH;
  t->len = 0;
  t->buf = malloc (MAX (room, 1));
  if (!t->buf)
    return err_set (err, ENOMEM, "out of memory");
  ahead_init (&entries, h->d, v->len, range_of_entry, h);
  ahead_init (&l1s, h->d, v->len, range_of_l1, h);
  l1s.scout = scout_l1;
  for (size_t i = 0; i < v->len && r == 0; ++i) {
    ahead_at (&entries, i);
    ahead_at (&l1s, i);
    if (!v->ptr[i].unusable)
      r = add_entry (h, t, &v->ptr[i], err);
  }
  return r;
}

/* Bytes at the old place that were the table's. */
static uint64_t
old_room (const struct heal *h)
{
  const struct snapshot *last = &h->c->snapshots.ptr[h->c->snapshots.len - 1];

  return ROUND_UP (last->entry_off + last->entry_len, h->g.cluster_size);
}

static int
write_table (struct heal *h, uint64_t *host_off, struct err *err)
{
  struct new_table t;
  int r = build_table (h, &t, err);

  if (r == 0) {
    r = heal_place (h, DIV_ROUND_UP (t.len, h->g.cluster_size), host_off, err);
    if (r == -ENOSPC && t.len <= old_room (h)) {
      err_clear (err);
      r = 0;                    /* then where it lies */
    }
  }
  if (r == 0)
    r = heal_write (h, t.buf, t.len, *host_off, err);
  free (t.buf);
  return r < 0 ? r : bdev_flush (h->d, err);    /* as I5 */
}

static int
write_fields (struct heal *h, uint32_t nr, uint64_t host_off, struct err *err)
{
  uint8_t fields[12];

  store_be32 (fields, nr);
  store_be64 (fields + 4, host_off);
  return heal_write (h, fields, sizeof fields, HEADER_OFF_NB_SNAPSHOTS, err);
}

int
heal_snapshots (struct heal *h, struct lost *lost, struct err *err)
{
  uint64_t host_off = h->c->header.snapshots_host_off, kept;
  bool wrong = total (h, FINDING_SNAPSHOT_TABLE_OUTSIDE) || total (h, FINDING_TOO_MANY_SNAPSHOTS) ||
               total (h, FINDING_SNAPSHOT_ENTRY_BAD);
  int r;

  /* A new table would lack those that the device did not give us. */
  if (total (h, FINDING_SNAPSHOT_TABLE_UNREADABLE))
    return 0;
  for (size_t i = 0; i < h->c->snapshots.len && !wrong; ++i)
    wrong = h->c->snapshots.ptr[i].unusable || lacks_extra_data (h, &h->c->snapshots.ptr[i]);
  if (!wrong)
    return 0;
  r = list_lost (h, lost, &kept, err);
  if (r == 0 && kept == 0)
    host_off = 0;
  else if (r == 0 && !is_prefix (h))
    r = write_table (h, &host_off, err);
  if (r == 0)
    r = write_fields (h, kept, host_off, err);
  if (r == 0)
    h->res->structures++;
  return r;
}
