/* The snapshot table, and the L1 tables of the snapshots.
 *
 * Snapshots are counted like the active disk: one that is forgotten is
 * destroyed by the next repair.  So whatever cannot be followed here makes the
 * check incomplete.  An L1 table that lies on another L1 table is followed (it
 * holds L1 entries, and both may be in use); one that lies on an L2 table or on
 * the snapshot table would read as nonsense and is not, unless what lies there is
 * an L1 table: then it is the L1 entry that names it as an L2 table which is wrong.
 *
 * L1 tables that add up to more bytes than the file has overlap without end:
 * from there on they are not followed, which bounds the work.
 *
 * LIMIT: in a sparse file of terabytes 65,536 snapshots can each have an L1 table
 * of 32 MiB; all of these holes are read, which takes long and can be cancelled.
 *
 * An entry of the snapshot table that cannot be right costs itself only: behind
 * it the table is searched for the next bytes that are an entry without any doubt
 * (entry_certain), and from then on nothing less is accepted, as the count no longer
 * tells where the table ends.  The same goes for a table whose count is absurd.
 *
 * Deliberately not here: whether a snapshot's size or VM state makes sense.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "check/check-int.h"
#include "dev/ahead.h"

#define MAX_ENTRY_BYTES (UINT64_C (140) << 10)  /* the lengths in an entry allow no more */
#define FIRST_READ  (UINT64_C (64) << 10)       /* of the snapshot table, bytes */
#define NO_SNAPSHOT FINDING_NO_OFF
#define BATCH_TABLES 64
#define BATCH_BYTES (UINT64_C (8) << 20)        /* of L1 tables that are held at once */

/* snapshot: its position in c->snapshots, or NO_SNAPSHOT: then index says where in the table. */
static int
snapshot_finding (struct checker *k, enum finding_id id, uint64_t snapshot, uint64_t index,
                  uint64_t host_off, uint64_t found, struct err *err)
{
  set_incomplete (k);
  return add_finding (k, (struct finding) {
      .id = id, .snapshot_index = snapshot == NO_SNAPSHOT ? FINDING_ACTIVE : (int32_t) snapshot,
      .host_off = host_off, .guest_off = FINDING_NO_OFF, .index = index, .found = found }, err);
}

/* --- the table */

/* The table as far as it was read; its length is known only from its entries. */
struct snaptab {
  uint8_t *buf;
  uint64_t len;                 /* bytes read */
  uint64_t limit;               /* bytes that can be read */
  uint64_t off;                 /* of the next entry, from the start of the table */
  bool unreadable;              /* the device could not read on */
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
  t->unreadable = r < 0;
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

/* --- what an entry must look like */

static bool
printable (const uint8_t *p, uint64_t n, uint8_t last)
{
  for (uint64_t i = 0; i < n; ++i)
    if (p[i] < 0x20 || p[i] == 0x7f || p[i] > last)
      return false;
  return true;
}

/* The shape that every writer gives it, wherever its L1 table is said to be. */
static bool
entry_plausible (const struct snaptab *t, uint64_t off)
{
  const uint8_t *p = t->buf + off;
  uint64_t id_len, name_len, extra_len;

  if (!range_fits (off, SNAPSHOT_FIXED_LENGTH, t->len))
    return false;
  id_len = load_be16 (p + 12);
  name_len = load_be16 (p + 14);
  extra_len = load_be32 (p + 36);
  return extra_len <= MAX_SNAPSHOT_EXTRA_BYTES && extra_len % 8 == 0 &&
         load_be32 (p + 20) < 1000000000 &&
         range_fits (off + SNAPSHOT_FIXED_LENGTH + extra_len, id_len + name_len, t->len) &&
         printable (p + SNAPSHOT_FIXED_LENGTH + extra_len, id_len, 0x7e) &&
         printable (p + SNAPSHOT_FIXED_LENGTH + extra_len + id_len, name_len, 0xff);
}

/* No doubt about it. */
static bool
entry_certain (const struct checker *k, const struct snaptab *t, uint64_t off)
{
  const uint8_t *p = t->buf + off;
  uint64_t l1_bytes, id_len;

  if (!range_fits (off, SNAPSHOT_FIXED_LENGTH, t->len))
    return false;
  l1_bytes = load_be32 (p + 8) * UINT64_C (8);
  id_len = load_be16 (p + 12);
  return l1_bytes > 0 && l1_bytes <= MAX_L1_BYTES && id_len > 0 && id_len < 128 &&
         table_fits (k, load_be64 (p), l1_bytes) && entry_plausible (t, off);
}

/* Move t->off to the next certain entry behind it.  1 = there is one, 0 = none, or -errno. */
static int
resynchronise (struct checker *k, struct snaptab *t, struct err *err)
{
  struct err why = { 0 };
  uint64_t off = t->off;
  int r;

  for (;;) {
    for (off += 8; range_fits (off, SNAPSHOT_FIXED_LENGTH, t->len); off += 8)
      if (entry_certain (k, t, off)) {
        t->off = off;
        return 1;
      }
    /* LIMIT: an entry across the end of what is read is found only if all of it is. */
    r = check_cancelled (k, err);
    if (r < 0)
      return r;
    off = MAX (t->off, (t->len > MAX_ENTRY_BYTES ? t->len - MAX_ENTRY_BYTES : 0) & ~UINT64_C (7));
    r = read_more (k, t, t->len + 1, &why);
    if (r == -ENOMEM)
      return err_set (err, ENOMEM, "out of memory");
    if (r <= 0)
      return 0;
  }
}

/* Entry i decoded: can it be one, or did its lengths lead astray? */
static bool
accept_entry (struct checker *k, struct snaptab *t, uint32_t i, const struct snapshot *s,
              bool certain_only)
{
  uint64_t end = s->entry_off + s->entry_len;

  if (certain_only)
    return entry_certain (k, t, s->entry_off);
  /* No program writes that; it is what follows a table whose count is too high. */
  if (s->id[0] == 0 && s->l1_entries == 0)
    return false;
  if (entry_plausible (t, s->entry_off) || i + 1 == k->c->header.nr_snapshots)
    return true;
  if (end + SNAPSHOT_FIXED_LENGTH + 1024 > t->len && read_more (k, t, end + MAX_ENTRY_BYTES, NULL) < 0)
    return true;
  return entry_certain (k, t, end);
}

/* Take the entry at t->off.  1 = done, 0 = there is none that can be right, or -errno. */
static int
take_entry (struct checker *k, struct snaptab *t, uint32_t i, bool certain_only, struct err *err)
{
  struct snapshot s;
  int r = next_snapshot (k, t, &s, err);

  if (r <= 0)
    return r;
  if (!accept_entry (k, t, i, &s, certain_only)) {
    free (s.id);
    free (s.name);
    return 0;
  }
  if (snapshot_vec_push (&k->c->snapshots, s) < 0) {
    free (s.id);
    free (s.name);
    return err_set (err, ENOMEM, "out of memory");
  }
  r = check_extra_data (k, k->c->snapshots.len - 1, k->c->header.snapshots_host_off + t->off, &s,
                        err);
  t->off += s.entry_len;
  return r < 0 ? r : 1;
}

static int
read_snapshots (struct checker *k, struct snaptab *t, struct err *err)
{
  const struct header *h = &k->c->header;
  bool absurd = h->nr_snapshots > MAX_SNAPSHOTS, certain_only = absurd;

  for (uint32_t i = 0; i < MIN (h->nr_snapshots, MAX_SNAPSHOTS); ++i) {
    int r = take_entry (k, t, i, certain_only, err);

    /* What comes there may be right. */
    if (r == 0 && t->unreadable)
      return snapshot_finding (k, FINDING_SNAPSHOT_TABLE_UNREADABLE, NO_SNAPSHOT, i,
                               h->snapshots_host_off + t->len, 0, err);
    if (r == 0 && !absurd) {
      r = snapshot_finding (k, FINDING_SNAPSHOT_ENTRY_BAD, NO_SNAPSHOT, i,
                            h->snapshots_host_off + t->off, 0, err);
      if (r == 0)
        r = resynchronise (k, t, err);
      certain_only = true;
    }
    if (r <= 0)
      return r;
  }
  return 0;
}

/* Does [off, off+len) lie on nothing but L2 tables? */
static bool
lies_on_l2_only (const struct checker *k, uint64_t off, uint64_t len)
{
  for (uint64_t end = off + len; off < end; off += k->g->cluster_size)
    if (ownermap_get (k->meta, off >> k->g->cluster_bits) > 1 + !!l2_set_find (&k->l2, off))
      return false;
  return true;
}

/* What lies in [off, off+len) is winner's, so the L2 tables there are none. */
static int
beat_l2_tables (struct checker *k, uint64_t off, uint64_t len, struct owner winner,
                struct err *err)
{
  int r = 0;

  for (uint64_t end = off + len; off < end && r == 0; off += k->g->cluster_size) {
    struct l2_table *t = l2_set_find (&k->l2, off);

    if (t == NULL)
      continue;
    t->fate = FINDING_L2_TABLE_NONSENSE;
    set_incomplete (k);
    r = conflict_add (k, off, k->g->cluster_size, winner, l2_owner (t), err);
  }
  return r;
}

/* Have all entries what those of an L2 table would have by great accident only? */
static bool
looks_like_snapshots (const struct checker *k)
{
  const struct snapshot_vec *v = &k->c->snapshots;

  for (size_t i = 0; i < v->len; ++i)
    if (!v->ptr[i].id[0] || v->ptr[i].l1_entries == 0
        || !table_fits (k, v->ptr[i].l1_host_off, v->ptr[i].l1_entries * UINT64_C (8)))
      return false;
  return v->len > 0;
}

/* The snapshot table, len bytes, lies on something. */
static int
contest_table (struct checker *k, uint64_t len, struct err *err)
{
  uint64_t off = k->c->header.snapshots_host_off, whole = ROUND_UP (len, k->g->cluster_size);
  struct owner o = { .kind = OWNER_SNAPSHOT_TABLE, .snapshot_index = FINDING_ACTIVE };
  int r;

  if (looks_like_snapshots (k) && lies_on_l2_only (k, off, whole))
    return beat_l2_tables (k, off, whole, o, err);
  r = overlap_add (k, (struct overlap) {
      .ci = off >> k->g->cluster_bits, .n = whole >> k->g->cluster_bits, .loser = o }, err);
  return r < 0 ? r : snapshot_finding (k, FINDING_SNAPSHOT_OVERLAP, NO_SNAPSHOT, 0, off, 0, err);
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
    return snapshot_finding (k, FINDING_SNAPSHOT_TABLE_OUTSIDE, NO_SNAPSHOT, 0,
                             h->snapshots_host_off, h->snapshots_host_off, err);
  t.limit = MIN (MAX_SNAPSHOT_TABLE_BYTES, k->end - h->snapshots_host_off);
  r = read_more (k, &t, 1, &why);
  if (r == -ENOMEM)
    r = err_set (err, ENOMEM, "%s", why.msg);
  else if (r < 0)
    r = snapshot_finding (k, FINDING_SNAPSHOT_TABLE_UNREADABLE, NO_SNAPSHOT, 0,
                          h->snapshots_host_off, h->snapshots_host_off, err);
  else
    r = read_snapshots (k, &t, err);
  free (t.buf);
  len = MIN (MAX (t.off, 1), t.limit);
  /* Where not one entry of an absurd number is certain, something else may lie there. */
  if (r < 0 || (k->c->snapshots.len == 0 && h->nr_snapshots > MAX_SNAPSHOTS))
    return r;
  r = claim_meta (k, h->snapshots_host_off, len, &conflict, err);
  k->snaptab_len = len;
  return r == 0 && conflict ? contest_table (k, len, err) : r;
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
    if (l2_set_find (&k->l2, off))
      return true;
  return false;
}

/* --- an L1 table where an L1 entry says that an L2 table is */

#define MAX_EVIDENCE (UINT64_C (1) << 20)       /* bytes of an L1 table that is looked at */
#define SAMPLE       4                          /* tables that its first entries name */

/* Add up what entries of an L2 table at host_off can be right, and what can't. */
static int
weigh_l2 (struct checker *k, uint64_t host_off, uint64_t *good, uint64_t *bad, struct err *err)
{
  CLEANUP_FREE uint8_t *table = malloc (k->g->cluster_size);

  if (table == NULL)
    return err_set (err, ENOMEM, "out of memory");
  if (bdev_pread_padded (k->d, table, k->g->cluster_size, host_off, NULL) < 0)
    return 0;
  for (uint64_t i = 0; i < k->g->l2_entries; ++i) {
    uint64_t raw = l2_raw (table, i, k->g);
    struct l2_entry e = l2_entry_decode (raw, l2_bitmap (table, i, k->g), k->g);
    bool possible = !e.reserved && (e.kind == CLUSTER_COMPRESSED ||
                                    IS_ALIGNED (e.host_off, k->g->cluster_size)) &&
                    (e.host_off == 0 || range_fits (e.host_off, e.host_len, k->end));

    if (raw)
      ++*(possible ? good : bad);
  }
  return 0;
}

/* Do these bytes, len with the rest of the last cluster, hold the L1 table that s says?
 * Its entries are possible, there is nothing behind them, and what they name are L2
 * tables.  An L2 table looks like that only if its first entries map L2 tables.
 */
static int
weigh_l1 (struct checker *k, const struct snapshot *s, const uint8_t *buf, uint64_t len, bool *yes,
          struct err *err)
{
  uint64_t good = 0, bad = 0, seen = 0;
  int r = 0;

  for (uint64_t i = 0, n = 0; i < s->l1_entries && n < SAMPLE; ++i)
    if (load_be64 (buf + i * 8)) {
      ahead_hint (k->d, load_be64 (buf + i * 8) & L1E_OFF_MASK, k->g->cluster_size);
      ++n;
    }
  *yes = zero_words (buf + s->l1_entries * 8, len / 8 - s->l1_entries) == len / 8 - s->l1_entries;
  for (uint64_t i = 0; i < s->l1_entries && *yes && r == 0; ++i) {
    uint64_t raw = load_be64 (buf + i * 8), off = raw & L1E_OFF_MASK;

    if (raw == 0)
      continue;
    *yes = !(raw & L1E_RESERVED_MASK) && table_fits (k, off, k->g->cluster_size);
    if (*yes && seen++ < SAMPLE)
      r = weigh_l2 (k, off, &good, &bad, err);
  }
  *yes = *yes && good > bad;
  return r;
}

/* The L1 table of snapshot i lies on something.  If that is nothing but L2 tables, and
 * what lies there is an L1 table, then the L1 entries that lead there are wrong:
 * *won, and the L2 tables are none.
 */
static int
contest_l1 (struct checker *k, size_t i, bool *won, struct err *err)
{
  const struct snapshot *s = &k->c->snapshots.ptr[i];
  uint64_t len = ROUND_UP (s->l1_entries * UINT64_C (8), k->g->cluster_size);
  CLEANUP_FREE uint8_t *buf = NULL;
  int r;

  *won = false;
  if (len > MAX_EVIDENCE || !lies_on_l2_only (k, s->l1_host_off, len))
    return 0;
  buf = malloc (len);
  if (buf == NULL)
    return err_set (err, ENOMEM, "out of memory");
  if (bdev_pread_padded (k->d, buf, len, s->l1_host_off, NULL) < 0)
    return 0;
  r = weigh_l1 (k, s, buf, len, won, err);
  if (r < 0 || !*won)
    return r;
  return beat_l2_tables (k, s->l1_host_off, len,
                         (struct owner) { .kind = OWNER_L1_TABLE, .snapshot_index = i }, err);
}

static int
l1_unusable (struct checker *k, size_t i, enum finding_id id, uint64_t found, struct err *err)
{
  struct snapshot *s = &k->c->snapshots.ptr[i];

  s->unusable = true;
  return snapshot_finding (k, id, i, i, s->l1_host_off, found, err);
}

/* Claim the L1 table of snapshot i.  *follow: its entries are to be read.
 * *total: bytes of all L1 tables so far.
 */
static int
claim_snapshot_l1 (struct checker *k, size_t i, uint64_t *total, bool *follow, struct err *err)
{
  const struct snapshot *s = &k->c->snapshots.ptr[i];
  uint64_t bytes = (uint64_t) s->l1_entries * 8, ci = s->l1_host_off >> k->g->cluster_bits;
  bool conflict = false, won = false;
  int r;

  *follow = false;
  if (bytes == 0)
    return 0;
  if (bytes > MAX_L1_BYTES || !table_fits (k, s->l1_host_off, bytes))
    return l1_unusable (k, i, FINDING_SNAPSHOT_L1_OUTSIDE, s->l1_host_off, err);
  *total += bytes;
  if (*total > k->end)
    return l1_unusable (k, i, FINDING_SNAPSHOT_OVERLAP, 0, err);
  r = claim_meta (k, s->l1_host_off, bytes, &conflict, err);
  if (r == 0 && conflict)
    r = contest_l1 (k, i, &won, err);
  if (r < 0)
    return r;
  *follow = !conflict || won || !lies_on_others (k, s);
  if (!conflict || won)
    return 0;
  r = l1_unusable (k, i, FINDING_SNAPSHOT_OVERLAP, 0, err);
  return r < 0 ? r : overlap_add (k, (struct overlap) {
      .ci = ci, .n = DIV_ROUND_UP (bytes, k->g->cluster_size),
      .loser = { .kind = OWNER_L1_TABLE, .snapshot_index = i } }, err);
}

static int
l1_unreadable (struct checker *k, uint32_t snapshot, const struct table_load *load,
               struct err *err)
{
  return snapshot_finding (k, FINDING_SNAPSHOT_L1_OUTSIDE, snapshot, snapshot, load->host_off,
                           load->host_off, err);
}

/* What is to be done with each L1 table. */
struct following {
  l1_fn fn;
  void *opaque;
  bool again;                   /* what can't be read was said before */
};

/* One batch: read the L1 tables, then call fn for each in order. */
static int
follow_batch (struct checker *k, const struct following *f, const uint32_t *snapshots,
              struct table_load *loads, size_t nr, struct err *err)
{
  int r = load_tables (k, loads, nr, err);

  for (size_t i = 0; i < nr && r == 0; ++i) {
    uint64_t *l1 = (uint64_t *) loads[i].buf, n = loads[i].len / 8;

    if (loads[i].r < 0) {
      r = f->again ? 0 : l1_unreadable (k, snapshots[i], &loads[i], err);
      continue;
    }
    for (uint64_t j = 0; j < n; ++j)
      l1[j] = load_be64 (&l1[j]);
    r = f->fn (k, f->opaque, l1, n, snapshots[i], loads[i].host_off, err);
  }
  return r;
}

/* Take tables from the list until the batch is full; their number and bytes. */
static size_t
fill_batch (struct checker *k, const uint32_t *list, size_t nr, uint32_t *snapshots,
            struct table_load *loads, uint64_t *bytes)
{
  size_t n;

  *bytes = 0;
  for (n = 0; n < BATCH_TABLES && n < nr; ++n) {
    const struct snapshot *s = &k->c->snapshots.ptr[list[n]];
    uint64_t len = (uint64_t) s->l1_entries * 8;

    if (n > 0 && *bytes + len > BATCH_BYTES)
      break;
    loads[n] = (struct table_load) { .host_off = s->l1_host_off, .len = len };
    snapshots[n] = list[n];
    *bytes += len;
  }
  return n;
}

static int
follow_snapshots (struct checker *k, const struct following *f, struct err *err)
{
  struct table_load loads[BATCH_TABLES];
  uint32_t snapshots[BATCH_TABLES];
  CLEANUP_FREE uint8_t *buf = NULL;
  size_t cap = 0, n, nr = k->followed.len;
  int r = 0;

  for (size_t i = 0; i < nr && r == 0; i += n) {
    uint64_t bytes;

    progress_update (k->progress, "tables", i, nr);
    n = fill_batch (k, k->followed.ptr + i, nr - i, snapshots, loads, &bytes);
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
      r = follow_batch (k, f, snapshots, loads, n, err);
  }
  return r;
}

static int
claim_tables_of (struct checker *k, void *opaque, const uint64_t *l1, uint64_t nr,
                 int32_t snapshot_index, uint64_t l1_host_off, struct err *err)
{
  return claim_l2_tables (k, l1, 0, nr, snapshot_index, l1_host_off, err);
}

int
for_each_l1 (struct checker *k, l1_fn fn, void *opaque, struct err *err)
{
  struct following again = { fn, opaque, true };
  int r = fn (k, opaque, k->l1, k->nr_l1, FINDING_ACTIVE, k->c->header.l1_host_off, err);

  return r < 0 ? r : follow_snapshots (k, &again, err);
}

/* Claim all before any is followed, so that none of them is taken for free. */
static int
check_snapshot_l1s (struct checker *k, struct err *err)
{
  static const struct following claim = { claim_tables_of, NULL, false };
  uint64_t total = 0;
  size_t i;
  int r = 0;

  for (i = 0; i < k->c->snapshots.len && total <= k->end && r == 0; ++i) {
    bool yes;

    r = claim_snapshot_l1 (k, i, &total, &yes, err);
    if (r == 0 && yes && u32_vec_push (&k->followed, i) < 0)
      r = err_set (err, ENOMEM, "out of memory");
  }
  for (; i < k->c->snapshots.len; ++i)
    k->c->snapshots.ptr[i].unusable = true;
  return r < 0 ? r : follow_snapshots (k, &claim, err);
}

static bool
could_be_a_place (const struct checker *k, uint64_t host_off)
{
  return IS_ALIGNED (host_off, k->g->cluster_size) && host_off <= INT64_MAX;
}

int
check_snapshots (struct checker *k, struct err *err)
{
  const struct header *h = &k->c->header;
  int r = 0;

  /* Nobody looks there then, but QEMU opens no image whose field cannot be a place. */
  if (h->nr_snapshots == 0)
    return could_be_a_place (k, h->snapshots_host_off) ? 0
           : snapshot_finding (k, FINDING_SNAPSHOT_TABLE_OUTSIDE, NO_SNAPSHOT, 0,
                               h->snapshots_host_off, h->snapshots_host_off, err);
  if (h->nr_snapshots > MAX_SNAPSHOTS) {
    r = snapshot_finding (k, FINDING_TOO_MANY_SNAPSHOTS, NO_SNAPSHOT, 0, HEADER_OFF_NB_SNAPSHOTS,
                          h->nr_snapshots, err);
    if (r < 0 || !table_fits (k, h->snapshots_host_off, 1))
      return r;
  }
  r = check_snapshot_table (k, err);
  if (r == 0 && k->c->snapshots.len)
    r = check_snapshot_l1s (k, err);
  return r;
}
