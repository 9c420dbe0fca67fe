/* The report for people: see report.h.
 *
 * A screenful at most, whatever the damage: the worst findings first, then what
 * was mended, what is lost in bytes of the guest disk, what was claimed twice, orphans,
 * and last what everybody looks for: how the disk is served, and what to do.
 * What does not fit is counted here and is whole in the other report.
 */
#include <inttypes.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "check/orphans.h"
#include "check/report.h"
#include "check/words.h"
#include "report.h"

#define SCREENFUL 24
#define LINES_AT_LEAST 6        /* for findings, however long the rest is */
#define LINES_REMAINING 5       /* for what remains after a repair, and for each backing file */
#define BACKING_SHOWN 1
#define LOST_SHOWN 3            /* ranges of a disk; snapshots */
#define DISKS_SHOWN 2
#define CONFLICTS_SHOWN 2

/* --- what was mended */

/* " 3 things done;", or nothing for none. */
static void
text_count (FILE *fp, uint64_t n, const char *thing, const char *done)
{
  if (n)
    fprintf (fp, " %" PRIu64 " %s%s %s;", n, thing, n == 1 ? "" : "s", done);
}

static void
text_entries (FILE *fp, const struct heal_result *h)
{
  text_count (fp, h->structures, "damaged structure", "mended");
  if (h->entries_cleared)
    fprintf (fp, " %" PRIu64 " lost entr%s cleared;", h->entries_cleared,
             h->entries_cleared == 1 ? "y" : "ies");
  if (h->entries_corrected)
    fprintf (fp, " %" PRIu64 " entr%s set right;", h->entries_corrected,
             h->entries_corrected == 1 ? "y" : "ies");
  text_count (fp, h->clusters_split, "shared cluster", "given a place of its own");
  text_count (fp, h->clusters_unsplit, "cluster", "left shared");
}

static void
text_healed (FILE *fp, const struct layer *l)
{
  const struct heal_result *h = &l->result;

  fprintf (fp, "mended:");
  text_entries (fp, h);
  if (h->rebuilt)
    fprintf (fp, " refcounts rebuilt (table at 0x%" PRIx64 ", %" PRIu64 " block%s);",
             h->rt_host_off, h->blocks_written, h->blocks_written == 1 ? "" : "s");
  if (h->refcount_bits)
    fprintf (fp, " refcounts widened to %u bits;", h->refcount_bits);
  text_count (fp, h->blocks_replaced, "refcount block", "replaced");
  text_count (fp, h->refcounts_raised, "refcount", "raised");
  text_count (fp, h->refcounts_lowered, "leaked cluster", "freed");
  text_count (fp, h->copied_fixed, "COPIED flag", "set right");
  if (h->dirty_cleared)
    fprintf (fp, " dirty bit cleared;");
  if (h->corrupt_cleared)
    fprintf (fp, " corrupt bit cleared;");
  text_count (fp, h->leaks_kept, "leaked cluster", "kept, since not everything could be followed");
  fprintf (fp, "\n");
}

static void
text_after (FILE *fp, const struct layer *l)
{
  if (!l->after)
    return;
  text_healed (fp, l);
  if (check_sound (l->after))
    fprintf (fp, "checked again: sound\n");
  else {
    fprintf (fp, "checked again, this remains:\n");
    report_text (fp, l->after, LINES_REMAINING);
  }
}

/* --- what is lost */

static bool
same_disk (const struct lost_range *a, const struct lost_range *b)
{
  return a->snapshot_id == b->snapshot_id
         || (a->snapshot_id && b->snapshot_id && strcmp (a->snapshot_id, b->snapshot_id) == 0);
}

/* One line about n ranges of one disk. */
static void
text_lost_disk (FILE *fp, const struct lost_range *r, size_t n)
{
  uint64_t bytes = 0;
  struct line l;
  size_t i;

  for (i = 0; i < n; ++i)
    bytes += r[i].guest_len;
  line_begin (&l, fp);
  fputs ("LOST of ", l.fp);
  if (r->snapshot_id) {
    fputs ("snapshot ", l.fp);
    report_name (l.fp, r->snapshot_name);
  }
  else
    fputs ("the guest disk", l.fp);
  fputs (": ", l.fp);
  report_size (l.fp, bytes);
  for (i = 0; i < n && i < LOST_SHOWN; ++i) {
    fputs (i ? ", " : ": ", l.fp);
    if (n > 1) {
      report_size (l.fp, r[i].guest_len);
      putc (' ', l.fp);
    }
    fputs ("at ", l.fp);
    report_place (l.fp, r[i].guest_off);
    fprintf (l.fp, " (%s)", r[i].why < NR_FINDINGS ? finding_kinds[r[i].why].code : "no backing file");
  }
  if (n > i)
    fprintf (l.fp, ", and %zu more", n - i);
  line_end (&l, fp);
}

static void
text_lost_snapshots (FILE *fp, const struct lost_snapshot_vec *v)
{
  struct line l;
  size_t i;

  if (v->len == 0)
    return;
  line_begin (&l, fp);
  fprintf (l.fp, "LOST snapshot%s: ", v->len == 1 ? "" : "s");
  for (i = 0; i < v->len && i < LOST_SHOWN; ++i) {
    fputs (i ? ", " : "", l.fp);
    if (v->ptr[i].name && v->ptr[i].name[0])
      report_name (l.fp, v->ptr[i].name);
    else
      fputs ("of unknown name", l.fp);
    if (v->ptr[i].why < NR_FINDINGS)
      fprintf (l.fp, " (%s)", finding_kinds[v->ptr[i].why].code);
  }
  if (v->len > i)
    fprintf (l.fp, ", and %zu more", v->len - i);
  line_end (&l, fp);
}

static void
text_lost (FILE *fp, const struct lost *lost)
{
  const struct lost_range_vec *v = &lost->ranges;
  size_t disks = 0, more = 0, n;

  for (size_t i = 0; i < v->len; i += n) {
    for (n = 1; i + n < v->len && same_disk (&v->ptr[i], &v->ptr[i + n]); ++n)
      ;
    if (disks++ < DISKS_SHOWN)
      text_lost_disk (fp, &v->ptr[i], n);
    else
      ++more;
  }
  if (more)
    fprintf (fp, "LOST ranges of %zu more snapshot%s; report=FILE lists them\n", more,
             more == 1 ? "" : "s");
  text_lost_snapshots (fp, &lost->snapshots);
}

/* --- all of it */


/* Sound files behind the image are worth no line, and many bad ones a line each. */
static void
text_chain (FILE *fp, const struct stack *s)
{
  unsigned shown = 0;

  for (size_t i = 0; i < s->chain.len; ++i) {
    const struct layer *l = &s->chain.ptr[i];

    if (!l->before || !findings_any (&l->before->findings, SEV_LEAK) || shown++ >= BACKING_SHOWN)
      continue;
    fprintf (fp, "checked the backing file %s:\n", l->path);
    report_text (fp, l->before, LINES_REMAINING);
    text_after (fp, l);
    text_lost (fp, &l->lost);
  }
  if (shown > BACKING_SHOWN)
    fprintf (fp, "%u more backing files are damaged; report=FILE has all\n", shown - BACKING_SHOWN);
}

/* Not for mere leaks, which the findings tell. */
static void
text_orphans (FILE *fp, const struct layer *l)
{
  const struct orphan_stats *o = layer_orphans (l);

  if (orphan_findings (l->before) == 0 && o != &l->source_orphans)
    return;
  fprintf (fp, "orphans: ");
  report_size (fp, o->clusters << l->before->geom.cluster_bits);
  if (o->tables)
    fprintf (fp, ", with %" PRIu64 " lost table%s%s", o->tables, o->tables == 1 ? "" : "s",
             o->sampled ? " or more" : "");
  fprintf (fp, ", served as the export lost+found%s\n",
           l->healed != l->source ? "; the image keeps them" : "");
}

static void
text_committed (FILE *fp, const struct inplace *ip)
{
  if (ip->note)
    fprintf (fp, "note: %s\n", ip->note);
  if (!ip->committed)
    return;
  fprintf (fp, "%s: %" PRIu64 " bytes written, %" PRIu64 " zeroed; the journal %s was removed\n",
           ip->resumed ? "a commit that had been cut off was finished" : "committed to the image",
           ip->result.bytes_written + ip->data_result.bytes_written,
           ip->result.bytes_zeroed + ip->data_result.bytes_zeroed, ip->journal);
}

static void
text_verdict (FILE *fp, const struct stack *s)
{
  if (!s->guest)
    fprintf (fp, "the guest disk is not served%s%s\n", s->why_no_guest ? ": " : "",
             s->why_no_guest ? s->why_no_guest : "");
  else if (s->writable)
    fprintf (fp, "serving read-write, %s%s%s\n",
             s->overlay ? "writes go to the overlay " : "in place",
             s->overlay ? s->overlay : "",
             s->inplace.committed ? "; the repair was written to the image" : "");
  else
    fprintf (fp, "serving READ-ONLY: %s\n", s->why_read_only ? s->why_read_only : "");
}

/* Everything but the findings: it comes after them, and leaves them the rest of
 * the screen.
 */
static void
text_tail (FILE *fp, const struct stack *s)
{
  text_after (fp, &s->top);
  text_lost (fp, &s->top.lost);
  if (s->top.before) {
    report_conflicts_text (fp, s->top.before, CONFLICTS_SHOWN);
    text_orphans (fp, &s->top);
  }
  text_chain (fp, s);
  report_read_errors_text (fp, s);
  text_committed (fp, &s->inplace);
  text_verdict (fp, s);
}

/* Of a terminal: long ones count for more than one. */
static unsigned
count_lines (const char *s)
{
  unsigned n = 0;

  while (*s) {
    size_t len = strcspn (s, "\n");

    n += len ? DIV_ROUND_UP (len, TEXT_COLUMNS) : 1;
    s += len + (s[len] != 0);
  }
  return n;
}

void
report_write_text (FILE *fp, const struct stack *s)
{
  CLEANUP_FREE char *tail = NULL;
  size_t len;
  FILE *mem = open_memstream (&tail, &len);
  unsigned used = 1;

  if (mem) {
    text_tail (mem, s);
    used += fclose (mem) == 0 && tail ? count_lines (tail) : 0;
  }
  if (s->top.before) {
    fprintf (fp, "checked %s%s%s%s:\n", s->top.path, s->overlay_reused ? " as changed by " : "",
             !s->overlay_reused ? "" : s->overlay ? s->overlay : s->inplace.journal,
             s->live ? " (in use elsewhere: findings may be transient)" : "");
    report_text (fp, s->top.before, used + LINES_AT_LEAST < SCREENFUL ? SCREENFUL - used
                                                                      : LINES_AT_LEAST);
  }
  if (tail)
    fputs (tail, fp);
  else
    text_tail (fp, s);
}
