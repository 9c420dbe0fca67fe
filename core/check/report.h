/* Findings -> text for people, JSON for programs.  The only formatter. */
#ifndef QR_CHECK_REPORT_H
#define QR_CHECK_REPORT_H

#include <stdio.h>

#include "check/check.h"

/* One line a run of findings: code, title, how many, where; at most max_runs
 * runs a kind and then "N more places"; what it means, once a kind; totals last.
 * Ranges are half-open.
 */
void report_text (FILE *fp, const struct check *c, unsigned max_runs);

/* A JSON string literal of s, with everything outside printable ASCII escaped
 * (file names and snapshot names are untrusted bytes).
 */
void report_json_string (FILE *fp, const char *s);

/* The members of the "findings" array, one object a line, each line begun with
 * indent, without comma after the last.  qemu-img's fields are written by the
 * stack's report.
 *
 *   code, name, title, severity, mended-by  from the table of findings; mended-by
 *                             is a repair level, null = nothing mends it
 *   count, unit               items in this run; "clusters", "entries" or "one"
 *   host-offset               bytes; for clusters host-length too
 *   guest-offset, guest-length  bytes
 *   snapshot                  position in the snapshot table; absent: active disk
 *   index                     entry number
 *   entry                     the raw table entry, as a string "0x..."
 *   found, expected           numbers
 *
 * Members that do not apply are absent.
 */
void report_json_findings (FILE *fp, const struct check *c, const char *indent);

#endif /* QR_CHECK_REPORT_H */
