/* The snapshot table, and the L1 tables of the snapshots.
 *
 * Snapshots are counted like the active disk: one that is forgotten is
 * destroyed by the next repair.  So whatever cannot be followed here makes the
 * check incomplete.  An L1 table that lies on another L1 table is followed (it
 * holds L1 entries, and both may be in use); one that lies on an L2 table or on
 * the snapshot table would read as nonsense and is not.
 *
 * L1 tables that add up to more bytes than the file has overlap without end:
 * from there on they are not followed, which bounds the work.
 *
 * LIMIT: in a sparse file of terabytes 65,536 snapshots can each have an L1 table
 * of 32 MiB; all of these holes are read, which takes long and can be cancelled.
 *
 * Deliberately not here: whether a snapshot's size or VM state makes sense.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "check/check-int.h"

#define FIRST_READ  (UINT64_C (64) << 10)       /* of the snapshot table, bytes */
#define BATCH_BYTES (UINT64_C (8) << 20)        /* of L1 tables that are held at once */

static int
snapshot_finding (struct checker *k, enum finding_id id, uint64_t index, uint64_t host_off,
                  uint64_t found, struct err *err)
{
  set_incomplete (k);
  return add_finding (k, (struct finding) {
      .id = id, .snapshot_index = index == FINDING_NO_OFF ? FINDING_ACTIVE : (int32_t) index,
      .host_off = host_off, .guest_off = FINDING_NO_OFF,
      .index = index == FINDING_NO_OFF ? 0 : index, .found = found }, err);
}

/* --- the table */

/* The table as far as it was read; its length is known only from its entries. */
struct snaptab {
  uint8_t *buf;
  uint64_t len;                 /* bytes read */
  uint64_t limit;               /* bytes that can be read */
  uint64_t off;                 /* of the next entry, from the start of the table */
};

/* 1 = there is more now, 0 = there is no more to read, or -errno. */
static int
read_more (struct checker *k, struct snaptab *t, uint64_t need, struct err *err)
{
  uint64_t want = MIN (t->limit, MAX (MAX (t->len * 2, FIRST_READ), need));
  uint8_t *p;
  int r;

  if (want <= t->len)
    return 0;
  p = realloc (t->buf, want);
  if (p == NULL)
    return err_set (err, ENOMEM, "out of memory");
  t->buf = p;
  r = bdev_pread_padded (k->d, p + t->len, want - t->len,
                         k->c->header.snapshots_host_off + t->len, err);
  if (r < 0)
    return r;
  t->len = want;
  return 1;
}

/* Decode entry i.  1 = done, 0 = it can't be right or can't be read, or -ENOMEM. */
static int
next_snapshot (struct checker *k, struct snaptab *t, struct snapshot *s, struct err *err)
{
  for (;;) {
    struct err why = { 0 };
    uint64_t need;
    int r = snapshot_decode (t->buf, t->len, t->off, s, &need, &why);

    if (r == 0)
      return 1;
    if (r == -EINVAL)
      return 0;
    if (r == -EAGAIN) {
      r = read_more (k, t, t->off + need, &why);
      if (r > 0)
        continue;
      if (r != -ENOMEM)
        return 0;
    }
    return err_set (err, -r, "%s", why.msg);
  }
}

/* Version 3 must have the first two fields of it.  All else can be followed without. */
static int
check_extra_data (struct checker *k, uint32_t i, uint64_t host_off, const struct snapshot *s,
                  struct err *err)
{
  if (k->c->header.version < 3 || s->extra_len >= SNAPSHOT_V3_EXTRA_LENGTH)
    return 0;
  return add_finding (k, (struct finding) {
      .id = FINDING_SNAPSHOT_EXTRA_SHORT, .snapshot_index = i, .host_off = host_off,
      .guest_off = FINDING_NO_OFF, .index = i, .found = s->extra_len,
      .expected = SNAPSHOT_V3_EXTRA_LENGTH }, err);
}

static int
read_snapshots (struct checker *k, struct snaptab *t, struct err *err)
{
  const struct header *h = &k->c->header;

  for (uint32_t i = 0; i < h->nr_snapshots; ++i) {
    struct snapshot s;
    int r = next_snapshot (k, t, &s, err);

    if (r < 0)
      return r;
    if (r == 0)
      return snapshot_finding (k, FINDING_SNAPSHOT_ENTRY_BAD, i, h->snapshots_host_off + t->off,
                               0, err);
    if (snapshot_vec_push (&k->c->snapshots, s) < 0) {
      free (s.id);
      free (s.name);
      return err_set (err, ENOMEM, "out of memory");
    }
    r = check_extra_data (k, i, h->snapshots_host_off + t->off, &s, err);
    if (r < 0)
      return r;
    t->off += s.entry_len;
  }
  return 0;
}

static int
check_snapshot_table (struct checker *k, struct err *err)
{
  const struct header *h = &k->c->header;
  struct snaptab t = { 0 };
  struct err why = { 0 };
  bool conflict = false;
  uint64_t len;
  int r;

  if (!table_fits (k, h->snapshots_host_off, 1))
    return snapshot_finding (k, FINDING_SNAPSHOT_TABLE_OUTSIDE, FINDING_NO_OFF,
                             h->snapshots_host_off, h->snapshots_host_off, err);
  t.limit = MIN (MAX_SNAPSHOT_TABLE_BYTES, k->end - h->snapshots_host_off);
  r = read_more (k, &t, 1, &why);
  if (r == -ENOMEM)
    r = err_set (err, ENOMEM, "%s", why.msg);
  else if (r < 0)
    r = snapshot_finding (k, FINDING_SNAPSHOT_TABLE_OUTSIDE, FINDING_NO_OFF,
                          h->snapshots_host_off, h->snapshots_host_off, err);
  else
    r = read_snapshots (k, &t, err);
  free (t.buf);
  len = MIN (MAX (t.off, 1), t.limit);
  if (r == 0)
    r = claim_meta (k, h->snapshots_host_off, len, &conflict, err);
  if (r == 0 && conflict)
    r = snapshot_finding (k, FINDING_SNAPSHOT_OVERLAP, FINDING_NO_OFF, h->snapshots_host_off, 0,
                          err);
  return r;
}

/* --- the L1 tables */

/* Does the L1 table lie on something that is no L1 table? */
static bool
lies_on_others (struct checker *k, const struct snapshot *s)
{
  uint64_t len = (uint64_t) s->l1_entries * 8, end = s->l1_host_off + len;
  const struct snapshot_vec *v = &k->c->snapshots;
  uint64_t table_len = v->ptr[v->len - 1].entry_off + v->ptr[v->len - 1].entry_len;

  if (ranges_overlap (s->l1_host_off, ROUND_UP (len, k->g->cluster_size),
                      k->c->header.snapshots_host_off, table_len))
    return true;
  for (uint64_t off = s->l1_host_off; off < end; off += k->g->cluster_size)
    if (l2_set_has (&k->l2, off))
      return true;
  return false;
}

/* Claim the L1 table of snapshot i.  *follow: its entries are to be read.
 * *total: bytes of all L1 tables so far.
 */
static int
claim_snapshot_l1 (struct checker *k, size_t i, uint64_t *total, bool *follow, struct err *err)
{
  const struct snapshot *s = &k->c->snapshots.ptr[i];
  uint64_t bytes = (uint64_t) s->l1_entries * 8;
  bool conflict = false;
  int r;

  *follow = false;
  if (bytes == 0)
    return 0;
  if (bytes > MAX_L1_BYTES || !table_fits (k, s->l1_host_off, bytes))
    return snapshot_finding (k, FINDING_SNAPSHOT_L1_OUTSIDE, i, s->l1_host_off, s->l1_host_off,
                             err);
  *total += bytes;
  if (*total > k->end)
    return snapshot_finding (k, FINDING_SNAPSHOT_OVERLAP, i, s->l1_host_off, 0, err);
  r = claim_meta (k, s->l1_host_off, bytes, &conflict, err);
  if (r < 0)
    return r;
  *follow = !conflict || !lies_on_others (k, s);
  return conflict ? snapshot_finding (k, FINDING_SNAPSHOT_OVERLAP, i, s->l1_host_off, 0, err) : 0;
}

/* One batch: read the L1 tables, then claim what they name in order. */
static int
follow_batch (struct checker *k, const uint32_t *snapshots, struct table_load *loads, size_t nr,
              struct err *err)
{
  int r = load_tables (k, loads, nr, err);

  for (size_t i = 0; i < nr && r == 0; ++i) {
    uint64_t *l1 = (uint64_t *) loads[i].buf, n = loads[i].len / 8;

    if (loads[i].r < 0) {
      r = snapshot_finding (k, FINDING_SNAPSHOT_L1_OUTSIDE, snapshots[i], loads[i].host_off,
                            loads[i].host_off, err);
      continue;
    }
    for (uint64_t j = 0; j < n; ++j)
      l1[j] = load_be64 (&l1[j]);
    r = claim_l2_tables (k, l1, n, snapshots[i], loads[i].host_off, err);
  }
  return r;
}

DEFINE_VEC (u32_vec, uint32_t);

static int
follow_snapshots (struct checker *k, const uint32_t *follow, size_t nr, struct err *err)
{
  struct table_load loads[64];
  uint32_t snapshots[64];
  CLEANUP_FREE uint8_t *buf = NULL;
  size_t cap = 0, n;
  int r = 0;

  for (size_t i = 0; i < nr && r == 0; i += n) {
    uint64_t bytes = 0;

    progress_update (k->progress, "tables", i, nr);
    for (n = 0; n < 64 && i + n < nr; ++n) {
      const struct snapshot *s = &k->c->snapshots.ptr[follow[i + n]];
      uint64_t len = (uint64_t) s->l1_entries * 8;

      if (n > 0 && bytes + len > BATCH_BYTES)
        break;
      loads[n] = (struct table_load) { .host_off = s->l1_host_off, .len = len };
      snapshots[n] = follow[i + n];
      bytes += len;
    }
    if (bytes > cap) {
      free (buf);
      cap = bytes;
      buf = malloc (cap);
      if (buf == NULL)
        return err_set (err, ENOMEM, "out of memory");
    }
    bytes = 0;
    for (size_t j = 0; j < n; ++j) {
      loads[j].buf = buf + bytes;
      bytes += loads[j].len;
    }
    r = check_cancelled (k, err);
    if (r == 0)
      r = follow_batch (k, snapshots, loads, n, err);
  }
  return r;
}

/* Claim all before any is followed, so that none of them is taken for free. */
static int
check_snapshot_l1s (struct checker *k, struct err *err)
{
  struct u32_vec follow = VEC_INIT;
  uint64_t total = 0;
  int r = 0;

  for (size_t i = 0; i < k->c->snapshots.len && total <= k->end && r == 0; ++i) {
    bool yes;

    r = claim_snapshot_l1 (k, i, &total, &yes, err);
    if (r == 0 && yes && u32_vec_push (&follow, i) < 0)
      r = err_set (err, ENOMEM, "out of memory");
  }
  if (r == 0)
    r = follow_snapshots (k, follow.ptr, follow.len, err);
  vec_reset (&follow);
  return r;
}

int
check_snapshots (struct checker *k, struct err *err)
{
  const struct header *h = &k->c->header;
  int r;

  if (h->nr_snapshots == 0)
    return 0;
  if (h->nr_snapshots > MAX_SNAPSHOTS)
    return snapshot_finding (k, FINDING_TOO_MANY_SNAPSHOTS, FINDING_NO_OFF, HEADER_OFF_NB_SNAPSHOTS,
                             h->nr_snapshots, err);
  r = check_snapshot_table (k, err);
  if (r == 0 && k->c->snapshots.len)
    r = check_snapshot_l1s (k, err);
  return r;
}
