/* What could not be read while the image was checked and served: see report.h.
 *
 * Known only by and by, so what is written at the start may be less than what is written at the
 * end; the export report.json says what is known when it is opened.
 */
#include <inttypes.h>

#include "check/words.h"
#include "report.h"

#define SHOWN 3                 /* ranges in a line */

static void
json_ranges (FILE *fp, const char *name, const char *space, struct bdev *watch, bool *begun)
{
  struct watch_notes notes;

  if (!watch || watch_notes (watch, &notes, NULL) < 0)
    return;
  if (notes.bytes) {
    fprintf (fp, "%s\n    \"%s\": { \"bytes\": %" PRIu64 ", \"ranges\": [",
             *begun ? "," : ",\n  \"read-errors\": {", name, notes.bytes);
    for (size_t i = 0; i < notes.ranges.len; ++i)
      fprintf (fp, "%s\n      { \"%s-offset\": %" PRIu64 ", \"%s-length\": %" PRIu64 " }",
               i ? "," : "", space, notes.ranges.ptr[i].off, space, notes.ranges.ptr[i].len);
    fputs ("] }", fp);
    *begun = true;
  }
  vec_reset (&notes.ranges);
}

void
report_read_errors_json (FILE *fp, const struct stack *s)
{
  bool begun = false;

  json_ranges (fp, "image", "host", s->top.watch, &begun);
  json_ranges (fp, "data-file", "host", s->data.watch, &begun);
  json_ranges (fp, "disk", "guest", s->guest_watch, &begun);
  if (begun)
    fputs ("\n  }", fp);
}

static bool
text_ranges (FILE *fp, const char *what, struct bdev *watch)
{
  struct watch_notes notes;
  struct line l;
  size_t i;

  if (!watch || watch_notes (watch, &notes, NULL) < 0)
    return false;
  if (notes.bytes) {
    line_begin (&l, fp);
    fputs ("COULD NOT BE READ of ", l.fp);
    fprintf (l.fp, "%s: ", what);
    report_size (l.fp, notes.bytes);
    for (i = 0; i < notes.ranges.len && i < SHOWN; ++i) {
      fputs (i ? ", " : ": at ", l.fp);
      report_place (l.fp, notes.ranges.ptr[i].off);
    }
    if (notes.ranges.len > i)
      fprintf (l.fp, ", and %zu more", notes.ranges.len - i);
    line_end (&l, fp);
  }
  vec_reset (&notes.ranges);
  return notes.bytes > 0;
}

bool
report_read_errors_text (FILE *fp, const struct stack *s)
{
  bool any = text_ranges (fp, "the image", s->top.watch);

  any = text_ranges (fp, "its data file", s->data.watch) || any;
  return text_ranges (fp, "the guest disk", s->guest_watch) || any;
}
