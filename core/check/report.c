/* Findings as text for people and as JSON for programs: see report.h.
 *
 * The reader of the text may be an operator at night: what is wrong, how much
 * of it, where, and whether it matters, in few lines; a table that is lost is
 * one line, not one for each of its entries.  Everything that comes from the
 * image as bytes (snapshot names) is escaped.
 *
 * However much is wrong, the text keeps to the number of lines that it is given:
 * it says less about each kind then, and about the worst first.
 *
 * Deliberately not here: how it was mended (the stack's report).
 */
#include <inttypes.h>
#include <string.h>

#include "base/num.h"
#include "check/report.h"
#include "check/words.h"

/* What found and expected of a kind mean. */
enum value_form {
  VALUE_NONE,
  VALUE_ENTRY,                  /* found is a raw table entry */
  VALUE_BITS,                   /* found is a set of bits */
  VALUE_FOUND,                  /* found is a number */
  VALUE_PAIR,                   /* found and expected are numbers */
  VALUE_FLAG,                   /* found is a raw entry, expected what its flag must be */
  VALUE_GUEST,                  /* expected is a guest offset */
};

static enum value_form
value_form (enum finding_id id)
{
  switch (id) {
  case FINDING_L1_TOO_SMALL:
  case FINDING_L1_TOO_LARGE:
  case FINDING_L1_CUT:
  case FINDING_REFCOUNT_LOW:
  case FINDING_REFCOUNT_HIGH:
  case FINDING_REFCOUNT_PAST_END:
  case FINDING_REFCOUNT_OVERFLOW:
  case FINDING_RT_TOO_SMALL:
  case FINDING_RT_UNTRUSTED:
    return VALUE_PAIR;
  case FINDING_HEADER_LENGTH_WRONG:
  case FINDING_TOO_MANY_SNAPSHOTS:
  case FINDING_ORPHANED_DATA:
  case FINDING_RT_TOO_LARGE:
    return VALUE_FOUND;
  case FINDING_AUTOCLEAR_UNKNOWN:
  case FINDING_BACKING_FORMAT_MISSPELT:
  case FINDING_RAW_WITHOUT_DATA_FILE:
    return VALUE_BITS;
  case FINDING_L1_COPIED_WRONG:
  case FINDING_L2_COPIED_WRONG:
    return VALUE_FLAG;
  case FINDING_CLUSTER_SHARED:
  case FINDING_SNAPSHOT_CLUSTER_REUSED:
    return VALUE_GUEST;
  case FINDING_L1_ENTRY_RESERVED:
  case FINDING_L1_ENTRY_UNALIGNED:
  case FINDING_L1_ENTRY_OUTSIDE:
  case FINDING_L1_ENTRY_OVERLAP:
  case FINDING_L2_TABLE_SHARED:
  case FINDING_L2_TABLE_NONSENSE:
  case FINDING_DATA_FILE_PLACE_WRONG:
  case FINDING_L2_ENTRY_RESERVED:
  case FINDING_L2_ENTRY_UNALIGNED:
  case FINDING_L2_ENTRY_OUTSIDE:
  case FINDING_L2_ENTRY_OVERLAP:
  case FINDING_SUBCLUSTERS_INVALID:
  case FINDING_STREAM_BROKEN:
  case FINDING_STREAM_UNREADABLE:
  case FINDING_BITMAP_DAMAGED:
  case FINDING_RB_MISSING:
  case FINDING_RB_BAD_ENTRY:
  case FINDING_RB_OVERLAP:
  case FINDING_RB_UNREADABLE:
    return VALUE_ENTRY;
  default:
    return VALUE_NONE;
  }
}

/* Bytes of the file that a run is about; 0 = no more than its offset is known. */
static uint64_t
host_length (const struct finding *f, const struct geom *g)
{
  uint64_t unit = 0, len;

  if (finding_kinds[f->id].unit == UNIT_CLUSTERS)
    unit = g->cluster_size;
  else if (finding_kinds[f->id].code[0] == 'R' && finding_kinds[f->id].unit == UNIT_ENTRIES)
    unit = g->rb_entries << g->cluster_bits;
  if (unit == 0 || f->host_off == FINDING_NO_OFF || mul_overflows (unit, f->count, &len) ||
      !range_fits (f->host_off, len, UINT64_MAX))
    return 0;
  return len;
}

static bool
has_index (const struct finding *f)
{
  const struct finding_kind *kind = &finding_kinds[f->id];

  return kind->unit == UNIT_ENTRIES || f->id == FINDING_CLUSTER_SHARED ||
         f->id == FINDING_SNAPSHOT_CLUSTER_REUSED ||
         f->id == FINDING_L2_TABLE_UNREADABLE;
}

/* --- text */

static const char *
unit_name (const struct finding_kind *kind, uint64_t n)
{
  switch (kind->unit) {
  case UNIT_CLUSTERS: return n == 1 ? "cluster" : "clusters";
  case UNIT_ENTRIES: return n == 1 ? "entry" : "entries";
  default: return n == 1 ? "place" : "places";
  }
}

static void
print_values (FILE *fp, const struct finding *f)
{
  switch (value_form (f->id)) {
  case VALUE_NONE:
    break;
  case VALUE_ENTRY:
    if (f->found)
      fprintf (fp, ", entry 0x%" PRIx64, f->found);
    break;
  case VALUE_FLAG:
    fprintf (fp, ", entry 0x%" PRIx64 ", must be %s", f->found, f->expected ? "set" : "clear");
    break;
  case VALUE_BITS:
    fprintf (fp, ", bits 0x%" PRIx64, f->found);
    break;
  case VALUE_FOUND:
    fprintf (fp, ", found %" PRIu64, f->found);
    break;
  case VALUE_PAIR:
    fprintf (fp, ", found %" PRIu64 ", expected %" PRIu64, f->found, f->expected);
    break;
  case VALUE_GUEST:
    fprintf (fp, ", same as guest 0x%" PRIx64, f->expected);
    break;
  }
  if (f->count > 1 && value_form (f->id) != VALUE_NONE)
    fputs (" (the first)", fp);
}

/* "host [0x50000, 0x60000), guest [0x0, 0x10000), found 0, expected 1" */
static void
print_place (FILE *fp, const struct check *c, const struct finding *f)
{
  uint64_t len = host_length (f, &c->geom);
  const char *sep = "";

  if (f->snapshot_index >= 0) {
    fprintf (fp, "snapshot %" PRId32, f->snapshot_index);
    if ((size_t) f->snapshot_index < c->snapshots.len) {
      putc (' ', fp);
      report_name (fp, c->snapshots.ptr[f->snapshot_index].name);
    }
    sep = ", ";
  }
  if (f->guest_off != FINDING_NO_OFF) {
    fprintf (fp, "%sguest [0x%" PRIx64 ", 0x%" PRIx64 ")", sep, f->guest_off,
             f->guest_off + f->guest_len);
    sep = ", ";
  }
  if (len) {
    fprintf (fp, "%shost [0x%" PRIx64 ", 0x%" PRIx64 ")", sep, f->host_off, f->host_off + len);
    sep = ", ";
  }
  else if (f->host_off != FINDING_NO_OFF) {
    fprintf (fp, "%s%s 0x%" PRIx64, sep,
             finding_kinds[f->id].unit == UNIT_ENTRIES ? "table at host" : "at host", f->host_off);
    sep = ", ";
  }
  if (f->guest_off == FINDING_NO_OFF && f->snapshot_index < 0 && has_index (f)) {
    fprintf (fp, "%sentry %" PRIu64, sep, f->index);
    if (f->count > 1)
      fprintf (fp, "-%" PRIu64, f->index + f->count - 1);
  }
  print_values (fp, f);
}

/* The title up to the part that explains the numbers. */
static int
title_length (const struct finding_kind *kind)
{
  const char *end = strstr (kind->title, "; found");

  return end ? end - kind->title : (int) strlen (kind->title);
}

static const char *
level_name (enum repair_level level)
{
  static const char *const names[] = { "off", "refcounts", "all", "salvage" };

  return level < REPAIR_NEVER ? names[level] : NULL;
}

/* The runs of one kind. */
struct slice {
  const struct finding *runs;
  size_t n;
};

/* How much is said about each kind. */
struct detail {
  bool advice;                  /* what it means, on a line of its own */
  unsigned max_runs;            /* 0: the first place stands behind the title */
};

static unsigned
lines_of_kind (const struct check *c, const struct slice *s, struct detail d)
{
  unsigned shown = MIN (s->n, d.max_runs);

  return 1 + shown + (d.max_runs && (s->n > shown || c->findings.dropped[s->runs->id]))
         + d.advice;
}

static void
print_title (FILE *fp, const struct check *c, const struct slice *s, bool with_place)
{
  const struct finding_kind *kind = &finding_kinds[s->runs->id];
  uint64_t total = c->findings.totals[s->runs->id];
  struct line l;

  line_begin (&l, fp);
  fprintf (l.fp, "%s %.*s", kind->code, title_length (kind), kind->title);
  if (kind->unit != UNIT_ONE || total > 1)
    fprintf (l.fp, ": %" PRIu64 " %s", total, unit_name (kind, total));
  if (with_place) {
    fputs (s->n > 1 ? "; first: " : "; ", l.fp);
    print_place (l.fp, c, s->runs);
  }
  line_end (&l, fp);
}

static void
print_kind (FILE *fp, const struct check *c, const struct slice *s, struct detail d)
{
  const struct finding_kind *kind = &finding_kinds[s->runs->id];
  uint64_t total = c->findings.totals[s->runs->id], shown = 0;
  struct line l;
  size_t i;

  print_title (fp, c, s, d.max_runs == 0);
  for (i = 0; i < s->n && i < d.max_runs; ++i) {
    line_begin (&l, fp);
    fputs ("    ", l.fp);
    print_place (l.fp, c, &s->runs[i]);
    line_end (&l, fp);
    shown += s->runs[i].count;
  }
  if (d.max_runs && total > shown)
    fprintf (fp, "    ... and %s%zu more places (%" PRIu64 " %s); report=FILE lists them\n",
             c->findings.dropped[s->runs->id] ? "more than " : "", s->n - i, total - shown,
             unit_name (kind, total - shown));
  if (!d.advice)
    return;
  line_begin (&l, fp);
  fprintf (l.fp, "    -> %s", kind->advice);
  if (level_name (kind->level))
    fprintf (l.fp, " (mended by repair=%s)", level_name (kind->level));
  line_end (&l, fp);
}

static void
print_totals (FILE *fp, const struct check *c)
{
  static const char *const names[NR_SEVERITIES][2] = {
    [SEV_NOTE] = { "note", "notes" },
    [SEV_LEAK] = { "leaked cluster", "leaked clusters" },
    [SEV_CORRUPT] = { "corruption", "corruptions" },
    [SEV_FATAL] = { "fatal error", "fatal errors" },
  };
  const char *sep = "";

  for (int s = NR_SEVERITIES; s-- > 0;) {
    uint64_t n = c->findings.per_severity[s];

    if (n == 0)
      continue;
    fprintf (fp, "%s%" PRIu64 " %s", sep, n, names[s][n != 1]);
    sep = ", ";
  }
  if (*sep == '\0')
    fputs ("no errors were found", fp);
  putc ('\n', fp);
  if (c->incomplete)
    fputs ("parts of the image could not be followed: as long as that is so, "
           "no cluster is freed\n", fp);
}

/* Slices of the runs, kind by kind, the most severe first.  Returns how many. */
static size_t
by_severity (const struct check *c, struct slice slices[NR_FINDINGS])
{
  const struct finding_vec *v = &c->findings.runs;
  size_t nr = 0, n;

  for (int severity = NR_SEVERITIES; severity-- > 0;)
    for (size_t i = 0; i < v->len; i += n) {
      for (n = 1; i + n < v->len && v->ptr[i + n].id == v->ptr[i].id; ++n)
        ;
      if ((int) finding_kinds[v->ptr[i].id].severity == severity)
        slices[nr++] = (struct slice) { &v->ptr[i], n };
    }
  return nr;
}

/* The most that can be said of each kind in so many lines. */
static struct detail
choose_detail (const struct check *c, const struct slice *slices, size_t nr, unsigned max_lines)
{
  static const struct detail details[] = { { true, 3 }, { true, 1 }, { true, 0 }, { false, 0 } };
  size_t k = 0;

  for (; k + 1 < sizeof details / sizeof details[0]; ++k) {
    unsigned lines = 0;

    for (size_t i = 0; i < nr; ++i)
      lines += lines_of_kind (c, &slices[i], details[k]);
    if (lines <= max_lines)
      break;
  }
  return details[k];
}

static void
print_more_kinds (FILE *fp, const struct slice *slices, size_t nr)
{
  struct line l;

  line_begin (&l, fp);
  fprintf (l.fp, "... and %zu more kind%s; report=FILE lists them:", nr, nr == 1 ? "" : "s");
  for (size_t i = 0; i < nr; ++i)
    fprintf (l.fp, " %s", finding_kinds[slices[i].runs->id].code);
  line_end (&l, fp);
}

void
report_text (FILE *fp, const struct check *c, unsigned max_lines)
{
  struct slice slices[NR_FINDINGS];
  size_t nr = by_severity (c, slices), shown = nr;
  unsigned room = max_lines > 3 ? max_lines - 1 - c->incomplete : 1;
  struct detail d = choose_detail (c, slices, nr, room);

  if (!d.advice && nr > room)
    shown = room - 1;
  for (size_t i = 0; i < shown; ++i)
    print_kind (fp, c, &slices[i], d);
  if (shown < nr)
    print_more_kinds (fp, &slices[shown], nr - shown);
  print_totals (fp, c);
}

/* --- JSON */

static void
json_values (FILE *fp, const struct finding *f)
{
  switch (value_form (f->id)) {
  case VALUE_NONE:
    break;
  case VALUE_ENTRY:
  case VALUE_BITS:
    fprintf (fp, ", \"entry\": \"0x%" PRIx64 "\"", f->found);
    break;
  case VALUE_FLAG:
    fprintf (fp, ", \"entry\": \"0x%" PRIx64 "\", \"expected\": %" PRIu64, f->found, f->expected);
    break;
  case VALUE_FOUND:
    fprintf (fp, ", \"found\": %" PRIu64, f->found);
    break;
  case VALUE_PAIR:
    fprintf (fp, ", \"found\": %" PRIu64 ", \"expected\": %" PRIu64, f->found, f->expected);
    break;
  case VALUE_GUEST:
    fprintf (fp, ", \"expected\": %" PRIu64, f->expected);
    break;
  }
}

static bool
overlap (uint64_t a, uint64_t a_len, uint64_t b, uint64_t b_len)
{
  return a <= b ? b - a < a_len : a - b < b_len;
}

/* Are a and b, of one kind, about the same thing? */
static bool
same_place (const struct finding *a, const struct finding *b, const struct geom *g)
{
  if (a->snapshot_index != b->snapshot_index)
    return false;
  if (has_index (a))
    return overlap (a->index, a->count, b->index, b->count);
  if (finding_kinds[a->id].unit == UNIT_CLUSTERS)
    return overlap (a->host_off, host_length (a, g), b->host_off, host_length (b, g));
  return a->guest_off == b->guest_off;
}

/* Is it gone from a check made after the repair?  If not all of that check's
 * findings were kept, what is not there proves nothing.
 */
static bool
mended (const struct finding *f, const struct check *after)
{
  const struct finding_vec *v;
  size_t i = 0, end;

  if (!after)
    return false;
  if (after->findings.totals[f->id] == 0)
    return true;
  v = &after->findings.runs;
  for (end = v->len; i < end;) {        /* the first of this kind */
    size_t mid = i + (end - i) / 2;

    if (v->ptr[mid].id < f->id)
      i = mid + 1;
    else
      end = mid;
  }
  for (; i < v->len && v->ptr[i].id == f->id; ++i)
    if (same_place (f, &v->ptr[i], &after->geom))
      return false;
  return !after->findings.dropped[f->id];
}

static void
json_finding (FILE *fp, const struct check *c, const struct finding *f, const struct check *after)
{
  static const char *const severities[] = { "note", "leak", "corruption", "fatal" };
  static const char *const units[] = { "clusters", "entries", "one" };
  const struct finding_kind *kind = &finding_kinds[f->id];
  const char *level = level_name (kind->level);
  uint64_t len = host_length (f, &c->geom);

  fprintf (fp, "{ \"code\": \"%s\", \"name\": \"%s\", \"severity\": \"%s\", \"mended-by\": ",
           kind->code, kind->name, severities[kind->severity]);
  if (level)
    fprintf (fp, "\"%s\"", level);
  else
    fputs ("null", fp);
  fprintf (fp, ", \"count\": %" PRIu64 ", \"unit\": \"%s\"", f->count, units[kind->unit]);
  if (f->host_off != FINDING_NO_OFF)
    fprintf (fp, ", \"host-offset\": %" PRIu64, f->host_off);
  if (len)
    fprintf (fp, ", \"host-length\": %" PRIu64, len);
  if (f->guest_off != FINDING_NO_OFF)
    fprintf (fp, ", \"guest-offset\": %" PRIu64 ", \"guest-length\": %" PRIu64, f->guest_off,
             f->guest_len);
  if (f->snapshot_index >= 0)
    fprintf (fp, ", \"snapshot\": %" PRId32, f->snapshot_index);
  if (has_index (f))
    fprintf (fp, ", \"index\": %" PRIu64, f->index);
  json_values (fp, f);
  if (after != c)
    fprintf (fp, ", \"mended\": %s", mended (f, after) ? "true" : "false");
  fputs (", \"title\": ", fp);
  report_json_string (fp, kind->title);
  fputs (" }", fp);
}

void
report_json_findings (FILE *fp, const struct check *c, const struct check *after,
                      const char *indent)
{
  const struct finding_vec *v = &c->findings.runs;

  for (size_t i = 0; i < v->len; ++i) {
    fprintf (fp, "%s%s", i ? ",\n" : "\n", indent);
    json_finding (fp, c, &v->ptr[i], after);
  }
}
