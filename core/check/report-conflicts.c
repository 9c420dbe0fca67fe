/* Who lies on whom: both owners of a cluster that two structures claim, named
 * in words for people and in members for programs.  See report.h.
 *
 * Which of them wins is decided by the check; this file only tells.
 */
#include <inttypes.h>

#include "check/report.h"
#include "check/words.h"

static const char *
kind_word (enum owner_kind kind)
{
  switch (kind) {
  case OWNER_HEADER: return "header";
  case OWNER_L1_TABLE: return "l1-table";
  case OWNER_L2_TABLE: return "l2-table";
  case OWNER_REFCOUNT_TABLE: return "refcount-table";
  case OWNER_REFCOUNT_BLOCK: return "refcount-block";
  case OWNER_SNAPSHOT_TABLE: return "snapshot-table";
  case OWNER_BITMAP: return "bitmap";
  case OWNER_CRYPTO_HEADER: return "encryption-header";
  case OWNER_DATA: return "guest-data";
  }
  return "guest-data";
}

static bool
numbered (enum owner_kind kind)
{
  return kind == OWNER_L2_TABLE || kind == OWNER_REFCOUNT_BLOCK;
}

/* Of the disk at all, so that a snapshot can be meant? */
static bool
of_a_disk (enum owner_kind kind)
{
  return kind == OWNER_L1_TABLE || kind == OWNER_L2_TABLE || kind == OWNER_DATA;
}

static void
words (FILE *fp, const struct check *c, const struct owner *o)
{
  switch (o->kind) {
  case OWNER_HEADER: fputs ("the header", fp); break;
  case OWNER_L1_TABLE: fputs ("the L1 table", fp); break;
  case OWNER_L2_TABLE: fprintf (fp, "the L2 table of L1 entry %" PRIu64, o->index); break;
  case OWNER_REFCOUNT_TABLE: fputs ("the refcount table", fp); break;
  case OWNER_REFCOUNT_BLOCK: fprintf (fp, "refcount block %" PRIu64, o->index); break;
  case OWNER_SNAPSHOT_TABLE: fputs ("the snapshot table", fp); break;
  case OWNER_BITMAP: fputs ("a bitmap", fp); break;
  case OWNER_CRYPTO_HEADER: fputs ("the encryption header", fp); break;
  case OWNER_DATA:
    fputs ("guest data at ", fp);
    report_place (fp, o->guest_off);
    break;
  }
  if (!of_a_disk (o->kind) || o->snapshot_index < 0)
    return;
  fprintf (fp, " of snapshot %" PRId32, o->snapshot_index);
  if ((size_t) o->snapshot_index < c->snapshots.len) {
    putc (' ', fp);
    report_name (fp, c->snapshots.ptr[o->snapshot_index].name);
  }
}

static void
json_owner (FILE *fp, const struct check *c, const struct owner *o)
{
  fprintf (fp, "{ \"kind\": \"%s\"", kind_word (o->kind));
  if (numbered (o->kind))
    fprintf (fp, ", \"index\": %" PRIu64, o->index);
  if (of_a_disk (o->kind) && o->snapshot_index >= 0)
    fprintf (fp, ", \"snapshot\": %" PRId32, o->snapshot_index);
  if (o->guest_len)
    fprintf (fp, ", \"guest-offset\": %" PRIu64 ", \"guest-length\": %" PRIu64, o->guest_off,
             o->guest_len);
  fputs (" }", fp);
}

void
report_json_conflicts (FILE *fp, const struct check *c, const char *indent)
{
  for (size_t i = 0; i < c->conflicts.len; ++i) {
    const struct conflict *k = &c->conflicts.ptr[i];

    fprintf (fp, "%s%s{ \"host-offset\": %" PRIu64 ", \"host-length\": %" PRIu64 ", \"winner\": ",
             i ? ",\n" : "\n", indent, k->host_off, k->host_len);
    json_owner (fp, c, &k->winner);
    fputs (", \"loser\": ", fp);
    json_owner (fp, c, &k->loser);
    fputs (" }", fp);
  }
}

void
report_conflicts_text (FILE *fp, const struct check *c, unsigned max)
{
  uint64_t total = c->nr_conflicts;

  if (total == 0)
    return;
  fprintf (fp, "claimed twice: %" PRIu64 " place%s\n", total, total == 1 ? "" : "s");
  for (size_t i = 0; i < c->conflicts.len && i < max; ++i) {
    const struct conflict *k = &c->conflicts.ptr[i];
    struct line l;

    line_begin (&l, fp);
    fputs ("    ", l.fp);
    report_size (l.fp, k->host_len);
    fprintf (l.fp, " at host 0x%" PRIx64 ": ", k->host_off);
    words (l.fp, c, &k->winner);
    fputs (", not ", l.fp);
    words (l.fp, c, &k->loser);
    line_end (&l, fp);
  }
  if (total > max)
    fprintf (fp, "    ... and %" PRIu64 " more; report=FILE lists them\n", total - max);
}
