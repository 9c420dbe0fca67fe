/* Small pieces that all reports are written with. */
#ifndef QR_CHECK_WORDS_H
#define QR_CHECK_WORDS_H

#include <stdint.h>
#include <stdio.h>

#define TEXT_COLUMNS 100        /* longer lines are cut, except what tells people what to do */

/* A JSON string literal of s, with everything outside printable ASCII escaped
 * (file names and snapshot names are untrusted bytes).
 */
void report_json_string (FILE *fp, const char *s);

/* The same for people: at most 32 characters of it. */
void report_name (FILE *fp, const char *s);

/* Bytes as people say them: "64 KiB", "1.5 GiB", "4097 bytes". */
void report_size (FILE *fp, uint64_t bytes);

/* A place in a disk: as a size where that is exact ("1.5 GiB"), else "0x1234". */
void report_place (FILE *fp, uint64_t off);

/* A line that is being put together; NULL if there is no memory. */
struct line {
  FILE *fp;
  char *text;
  size_t len;
};

/* begin: write to l->fp, which is somewhere even without memory.  end: the line
 * goes to fp, cut to TEXT_COLUMNS, with the newline.
 */
void line_begin (struct line *l, FILE *fp);
void line_end (struct line *l, FILE *fp);

#endif /* QR_CHECK_WORDS_H */
