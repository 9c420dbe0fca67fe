/* Findings as text for people and as JSON for programs: see report.h.
 *
 * The reader of the text may be an operator at night: what is wrong, how much
 * of it, where, and whether it matters, in few lines; a table that is lost is
 * one line, not one for each of its entries.  Everything that comes from the
 * image as bytes (snapshot names) is escaped.
 *
 * Deliberately not here: what was done about it (the stack's report).
 */
#include <inttypes.h>
#include <string.h>

#include "base/num.h"
#include "check/report.h"

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

void
report_json_string (FILE *fp, const char *s)
{
  putc ('"', fp);
  for (const unsigned char *p = (const unsigned char *) s; *p; ++p)
    if (*p == '"' || *p == '\\')
      fprintf (fp, "\\%c", *p);
    else if (*p >= 0x20 && *p < 0x7f)
      putc (*p, fp);
    else
      fprintf (fp, "\\u%04x", *p);
  putc ('"', fp);
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
      report_json_string (fp, c->snapshots.ptr[f->snapshot_index].name);
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

/* Runs [first, first+n) are all of one kind. */
static void
print_kind (FILE *fp, const struct check *c, const struct finding *runs, size_t n,
            unsigned max_runs)
{
  const struct finding_kind *kind = &finding_kinds[runs->id];
  uint64_t total = c->findings.totals[runs->id], shown = 0;
  size_t i;

  fprintf (fp, "%s %.*s", kind->code, title_length (kind), kind->title);
  if (kind->unit != UNIT_ONE || total > 1)
    fprintf (fp, ": %" PRIu64 " %s", total, unit_name (kind, total));
  putc ('\n', fp);
  for (i = 0; i < n && i < max_runs; ++i) {
    fputs ("    ", fp);
    print_place (fp, c, &runs[i]);
    putc ('\n', fp);
    shown += runs[i].count;
  }
  if (total > shown && max_runs > 0) {
    fprintf (fp, "    ... and %s%zu more places (%" PRIu64 " %s)\n",
             c->findings.dropped[runs->id] ? "more than " : "", n - i, total - shown,
             unit_name (kind, total - shown));
  }
  fprintf (fp, "    -> %s", kind->advice);
  if (level_name (kind->level))
    fprintf (fp, " (mended by repair=%s)", level_name (kind->level));
  putc ('\n', fp);
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
    fputs ("parts of the image could not be followed: "
           "clusters without a known owner are left alone\n", fp);
}

void
report_text (FILE *fp, const struct check *c, unsigned max_runs)
{
  const struct finding_vec *v = &c->findings.runs;
  size_t i = 0, n;

  for (; i < v->len; i += n) {
    for (n = 1; i + n < v->len && v->ptr[i + n].id == v->ptr[i].id; ++n)
      ;
    print_kind (fp, c, &v->ptr[i], n, max_runs);
  }
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

static void
json_finding (FILE *fp, const struct check *c, const struct finding *f)
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
  fputs (", \"title\": ", fp);
  report_json_string (fp, kind->title);
  fputs (" }", fp);
}

void
report_json_findings (FILE *fp, const struct check *c, const char *indent)
{
  const struct finding_vec *v = &c->findings.runs;

  for (size_t i = 0; i < v->len; ++i) {
    fputs (indent, fp);
    json_finding (fp, c, &v->ptr[i]);
    fputs (i + 1 < v->len ? ",\n" : "\n", fp);
  }
}
