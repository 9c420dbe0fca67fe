/* What became of an image: JSON for programs, a screenful for people. */
#ifndef QR_REPORT_H
#define QR_REPORT_H

#include <stdio.h>

#include "stack.h"

/* The report as one JSON object.  The members that qemu-img check
 * --output=json has keep its names and meaning (zero ones left out where it
 * leaves them out).  s may be NULL and failure may be NULL or empty.
 * 0, or -errno if fp could not be written.
 */
int report_write_json (FILE *fp, const struct stack *s, const struct err *failure);

/* A screenful at most, 24 lines: what is wrong, what was mended, what is lost,
 * how it is served.
 */
void report_write_text (FILE *fp, const struct stack *s);

/* What could not be read so far: a member of the JSON report, if there is anything; and a line
 * each for people (false: there is nothing).
 */
void report_read_errors_json (FILE *fp, const struct stack *s);
bool report_read_errors_text (FILE *fp, const struct stack *s);

#endif /* QR_REPORT_H */
