/* See words.h.
 *
 * All bytes that come from an image (names of files and snapshots) leave
 * through this file, and only as printable ASCII: a name cannot move the cursor
 * of whoever reads about it, or end a JSON string.
 */
#include <inttypes.h>
#include <stdlib.h>

#include "base/num.h"
#include "check/words.h"

static void
put_escaped (FILE *fp, unsigned char c)
{
  if (c == '"' || c == '\\')
    fprintf (fp, "\\%c", c);
  else if (c >= 0x20 && c < 0x7f)
    putc (c, fp);
  else
    fprintf (fp, "\\u%04x", c);
}

void
report_json_string (FILE *fp, const char *s)
{
  putc ('"', fp);
  for (; *s; ++s)
    put_escaped (fp, (unsigned char) *s);
  putc ('"', fp);
}

void
report_name (FILE *fp, const char *s)
{
  unsigned n = 0;

  putc ('"', fp);
  for (; *s && n < 32; ++s, ++n)
    put_escaped (fp, (unsigned char) *s);
  fputs (*s ? "...\"" : "\"", fp);
}

static const char *const units[] = { "bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB" };

/* The largest unit of which there is at least one; its shift is *shift. */
static unsigned
unit_of (uint64_t bytes, unsigned *shift)
{
  unsigned u = 0;

  while (u + 1 < sizeof units / sizeof units[0] && bytes >> (10 * (u + 1)))
    ++u;
  *shift = 10 * u;
  return u;
}

void
report_size (FILE *fp, uint64_t bytes)
{
  unsigned shift, u = unit_of (bytes, &shift);
  uint64_t rest = u ? bytes & ((UINT64_C (1) << shift) - 1) : 0;

  fprintf (fp, "%" PRIu64, bytes >> shift);
  if (rest)                     /* tenths, downwards: never more than there is */
    fprintf (fp, ".%u", (unsigned) ((rest >> (shift - 10)) * 10 >> 10));
  fprintf (fp, " %s", bytes == 1 ? "byte" : units[u]);
}

void
report_place (FILE *fp, uint64_t off)
{
  unsigned shift;

  unit_of (off, &shift);
  if (off == 0)
    putc ('0', fp);
  else if (shift && (off & ((UINT64_C (1) << shift) - 1)) * 2 % (UINT64_C (1) << shift) == 0)
    report_size (fp, off);      /* whole, or and a half */
  else
    fprintf (fp, "0x%" PRIx64, off);
}

void
line_begin (struct line *l, FILE *fp)
{
  l->text = NULL;
  l->fp = open_memstream (&l->text, &l->len);
  if (!l->fp)
    l->fp = fp;
}

void
line_end (struct line *l, FILE *fp)
{
  if (l->fp != fp && fclose (l->fp) == 0 && l->text) {
    if (l->len > TEXT_COLUMNS)
      fprintf (fp, "%.*s...", TEXT_COLUMNS - 3, l->text);
    else
      fputs (l->text, fp);
  }
  free (l->text);
  putc ('\n', fp);
}
