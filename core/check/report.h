/* Findings -> text for people, JSON for programs.  The only formatter. */
#ifndef QR_CHECK_REPORT_H
#define QR_CHECK_REPORT_H

#include <stdio.h>

#include "check/check.h"

/* What is wrong, the most severe first, in at most max_lines lines (never less
 * than three): of each kind its code, title and number, and as there is room the
 * first places and what it means; totals last.  Ranges are half-open.
 */
void report_text (FILE *fp, const struct check *c, unsigned max_lines);

/* The clusters that two structures claim, both named: at most max, and how many
 * there are; nothing if there are none.
 */
void report_conflicts_text (FILE *fp, const struct check *c, unsigned max);

/* The members of the "findings" array: see docs/report.md.  One object a line,
 * each line begun with indent, without comma after the last.  after: the check
 * made after the repair, which tells what was mended, or NULL if nothing was;
 * c itself: leave that out.  Members that do not apply are absent.
 */
void report_json_findings (FILE *fp, const struct check *c, const struct check *after,
                           const char *indent);

/* Likewise the list of conflicts. */
void report_json_conflicts (FILE *fp, const struct check *c, const char *indent);

#endif /* QR_CHECK_REPORT_H */
