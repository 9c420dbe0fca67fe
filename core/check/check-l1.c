/* The active L1 table: where it is, and how many entries of it are its own.
 *
 * l1_size in the header may be wrong either way, and the virtual size says how
 * many entries are needed:
 *
 *   too small   the bytes behind the table are looked at once everything else
 *               that claims whole tables is known (check_l1_tail).  If they hold
 *               L1 entries, they are followed as if the header said so, so that
 *               what they name is no leak.  First the rest of the table's own
 *               last cluster (zeros will do), then further clusters, which must be
 *               nobody else's and must not be all zero: zeros may be anything.
 *   too large   entries past the needed ones are legal, if they are possible and
 *               do not lie on tables that the needed ones name.  Else the tail is
 *               not the table's (H07), and the check goes by what is needed.
 *   cut off     entries behind the end of the file are lost (H09).
 *
 * Only a table that cannot be placed or read at all is fatal (H05, T07).
 *
 * Deliberately not here: what the entries name (check-tables.c).
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "check/check-int.h"

#define MAX_L1_ENTRIES (MAX_L1_BYTES / 8)

static int
l1_problem (struct checker *k, enum finding_id id, uint64_t found, uint64_t expected,
            struct err *err)
{
  if (id != FINDING_L1_TOO_SMALL)
    set_incomplete (k);
  return add_finding (k, (struct finding) {
      .id = id, .snapshot_index = FINDING_ACTIVE, .host_off = k->c->header.l1_host_off,
      .guest_off = 0, .guest_len = k->c->header.size, .found = found, .expected = expected }, err);
}

/* Entries [first, first + nr) of the table, in host byte order. *ok: they could be read. */
static int
load_entries (struct checker *k, uint64_t *buf, uint64_t first, uint64_t nr, bool *ok,
              struct err *err)
{
  struct table_load load = {
    .host_off = k->c->header.l1_host_off + first * 8, .len = nr * 8, .buf = (uint8_t *) buf,
  };
  int r = load_tables (k, &load, 1, err);

  *ok = r == 0 && load.r == 0;
  for (uint64_t i = 0; *ok && i < nr; ++i)
    buf[i] = load_be64 (&buf[i]);
  return r;
}

/* Could it be an entry of an L1 table?  0 could. */
static bool
entry_possible (const struct checker *k, uint64_t raw)
{
  return raw == 0 || (!(raw & L1E_RESERVED_MASK) &&
                      table_fits (k, raw & L1E_OFF_MASK, k->g->cluster_size));
}

/* --- too large */

/* Does the tail lie on the refcount table, or on an L2 table that entries before it name? */
static bool
tail_lies_on_tables (const struct checker *k, uint64_t needed, uint64_t nr)
{
  const struct header *h = &k->c->header;
  uint64_t begin = ROUND_UP (h->l1_host_off + needed * 8, k->g->cluster_size);
  uint64_t end = h->l1_host_off + nr * 8;

  if (begin >= end)
    return false;
  if (h->rt_host_off >= begin && h->rt_host_off < end)
    return true;
  for (uint64_t i = 0; i < needed; ++i) {
    uint64_t off = k->l1[i] & L1E_OFF_MASK;

    if (off >= begin && off < end)
      return true;
  }
  return false;
}

/* k->l1 holds nr entries, more than needed: are those past them the table's? */
static bool
tail_is_sound (const struct checker *k, uint64_t needed, uint64_t nr)
{
  for (uint64_t i = needed; i < nr; ++i)
    if (!entry_possible (k, k->l1[i]))
      return false;
  return !tail_lies_on_tables (k, needed, nr);
}

/* --- the table as the header has it */

/* *nr: entries that are to be read; less than the header says if that can't be. */
static int
choose_length (struct checker *k, uint64_t needed, uint64_t *nr, struct err *err)
{
  const struct header *h = &k->c->header;
  uint64_t inside = (MAX (k->c->file_size, h->l1_host_off) - h->l1_host_off) / 8;
  uint64_t want = h->l1_entries;
  int r = 0;

  if (want > needed && (want > MAX_L1_ENTRIES ||
                        !range_fits (h->l1_host_off, want * 8, k->end))) {
    r = l1_problem (k, FINDING_L1_TOO_LARGE, want, needed, err);
    want = MIN (needed, MAX_L1_ENTRIES);
    k->c->l1_entries_right = want;
  }
  *nr = MIN (want, inside);
  if (r < 0 || *nr == want)
    return r;
  r = l1_problem (k, FINDING_L1_CUT, *nr, want, err);
  return r < 0 ? r : bad_add (k, (struct bad_run) {
      .table_host_off = h->l1_host_off, .index = *nr, .count = want - *nr, .in_l1 = true,
      .snapshot_index = FINDING_ACTIVE, .why = FINDING_L1_CUT, .fix = BAD_LOST }, err);
}

/* Read nr entries, and drop those that are not the table's. */
static int
load_active_l1 (struct checker *k, uint64_t needed, uint64_t nr, struct err *err)
{
  bool ok;
  int r;

  k->l1 = malloc (MAX (nr, 1) * 8);
  if (k->l1 == NULL)
    return err_set (err, ENOMEM, "out of memory");
  r = load_entries (k, k->l1, 0, nr, &ok, err);
  if (r < 0)
    return r;
  if (!ok)
    return l1_problem (k, FINDING_L1_UNREADABLE, 0, 0, err);
  k->nr_l1 = nr;
  /* Without a size that makes sense there is no telling what is too much. */
  if (needed > 0 && nr > needed && !tail_is_sound (k, needed, nr)) {
    k->nr_l1 = k->c->l1_entries_right = needed;
    r = l1_problem (k, FINDING_L1_TOO_LARGE, k->c->header.l1_entries, needed, err);
  }
  return r;
}

int
check_active_l1 (struct checker *k, struct err *err)
{
  const struct header *h = &k->c->header;
  uint64_t needed = geom_l1_entries (k->g, h->size), nr;
  int r = 0;

  progress_update (k->progress, "tables", 0, 1);
  k->c->l1_entries_right = h->l1_entries;
  if (h->l1_entries < needed) {
    r = l1_problem (k, FINDING_L1_TOO_SMALL, h->l1_entries, needed, err);
    if (needed <= MAX_L1_ENTRIES)
      k->c->l1_entries_right = needed;
  }
  if (r < 0 || (h->l1_entries == 0 && needed == 0))
    return r;
  if (!table_fits (k, h->l1_host_off, 1))
    return l1_problem (k, FINDING_L1_OUTSIDE, h->l1_host_off, 0, err);
  r = choose_length (k, needed, &nr, err);
  if (r == 0)
    r = load_active_l1 (k, needed, nr, err);
  if (r == 0 && nr > 0)
    r = claim_meta (k, h->l1_host_off, (k->nr_l1 ? k->nr_l1 : nr) * 8, NULL, err);
  if (r == 0)
    r = claim_l2_tables (k, k->l1, 0, k->nr_l1, FINDING_ACTIVE, h->l1_host_off, err);
  k->c->l1_entries_followed = k->nr_l1;
  k->c->l1_must_move = !range_fits (h->l1_host_off, k->c->l1_entries_right * UINT64_C (8), k->end);
  return r;
}

/* --- too small */

static int
compare_u64s (const void *pa, const void *pb)
{
  const uint64_t *a = pa, *b = pb;

  return *a < *b ? -1 : *a > *b;
}

/* Could it name an L2 table: one of its own, or one that a snapshot has, too? */
static bool
names_table (const struct checker *k, uint64_t raw)
{
  uint64_t off = raw & L1E_OFF_MASK;

  return entry_possible (k, raw)
         && (ownermap_get (k->meta, off >> k->g->cluster_bits) == 0 || l2_set_find (&k->l2, off));
}

/* Of nr words, how many that are not 0 can be L1 entries, and how many cannot? */
static int
weigh_entries (const struct checker *k, const uint64_t *p, uint64_t nr, uint64_t *good,
               uint64_t *bad, struct err *err)
{
  struct u64_vec offs = VEC_INIT;
  int r = 0;

  *good = *bad = 0;
  for (uint64_t i = 0; i < nr && r == 0; ++i) {
    if (p[i] == 0)
      continue;
    if (names_table (k, p[i]))
      r = u64_vec_push (&offs, p[i] & L1E_OFF_MASK);
    else
      ++*bad;
  }
  if (offs.len)
    qsort (offs.ptr, offs.len, sizeof *offs.ptr, compare_u64s);
  for (size_t i = 0; i < offs.len; ++i)
    ++*(i && offs.ptr[i] == offs.ptr[i - 1] ? bad : good);
  vec_reset (&offs);
  return r < 0 ? err_set (err, ENOMEM, "out of memory") : 0;
}

/* Are the clusters of [off, end) free for an L1 table, as far as tables are known? */
static bool
clusters_free (const struct checker *k, uint64_t off, uint64_t end)
{
  const struct header *h = &k->c->header;
  uint64_t ci = off >> k->g->cluster_bits, end_ci = DIV_ROUND_UP (end, k->g->cluster_size);

  return ownermap_find (k->meta, ci, end_ci, true) == end_ci &&
         !ranges_overlap (off, end - off, h->rt_host_off,
                          (uint64_t) h->rt_clusters << k->g->cluster_bits);
}

/* Take entries [k->nr_l1, to), if that is what lies there.  In the table's own
 * last cluster it is, unless most of it is impossible; in others (fresh), which
 * may be anybody's, all of it must be possible.  *taken tells; *nothing: there are
 * only zeros, so that nothing is lost if they are not taken.
 */
static int
take_entries (struct checker *k, uint64_t to, bool fresh, bool *taken, bool *nothing,
              struct err *err)
{
  uint64_t first = k->nr_l1, nr = to - first, off = k->c->header.l1_host_off, good = 0, bad = 0;
  uint64_t *p;
  bool ok;
  int r;

  *taken = *nothing = nr == 0;
  if (nr == 0 || (fresh && !clusters_free (k, off + first * 8, off + to * 8)))
    return 0;
  p = realloc (k->l1, to * 8);
  if (p == NULL)
    return err_set (err, ENOMEM, "out of memory");
  k->l1 = p;
  r = load_entries (k, p + first, first, nr, &ok, err);
  if (r == 0 && ok)
    r = weigh_entries (k, p + first, nr, &good, &bad, err);
  *nothing = ok && good + bad == 0;
  if (r < 0 || !ok || (fresh ? bad > 0 || good == 0 : bad > good))
    return r;
  if (fresh)
    r = claim_meta (k, off + first * 8, nr * 8, NULL, err);
  if (r == 0)
    r = claim_l2_tables (k, k->l1, first, to, FINDING_ACTIVE, off, err);
  k->c->l1_entries_followed = k->nr_l1 = to;
  *taken = true;
  return r;
}

/* What the entries from k->nr_l1 on would map is lost: others have their place. */
static int
lose_tail (struct checker *k, struct err *err)
{
  return bad_add (k, (struct bad_run) {
      .table_host_off = k->c->header.l1_host_off, .index = k->nr_l1,
      .count = k->c->l1_entries_right - k->nr_l1, .in_l1 = true,
      .snapshot_index = FINDING_ACTIVE, .why = FINDING_L1_TOO_SMALL, .fix = BAD_UNREADABLE }, err);
}

int
check_l1_tail (struct checker *k, struct err *err)
{
  uint64_t right = k->c->l1_entries_right, inside, own;
  bool taken, nothing;
  int r;

  if (!findings_has (&k->c->findings, FINDING_L1_TOO_SMALL) || k->l1 == NULL ||
      k->nr_l1 < k->c->header.l1_entries || right <= k->nr_l1)
    return 0;
  inside = MIN (right, (k->c->file_size - k->c->header.l1_host_off) / 8);
  own = ROUND_UP (k->nr_l1 * 8, k->g->cluster_size) / 8;
  own = MAX (MIN (own, inside), k->nr_l1);
  r = take_entries (k, own, false, &taken, &nothing, err);
  if (r == 0 && taken)
    r = take_entries (k, MAX (inside, k->nr_l1), true, &taken, &nothing, err);
  if (r == 0 && !taken && !nothing)
    r = lose_tail (k, err);
  /* What is left of its own last cluster past the end of the file is room, too. */
  if (!taken || ROUND_UP (k->nr_l1 * 8, k->g->cluster_size) < right * 8)
    k->c->l1_must_move = true;
  return r;
}
