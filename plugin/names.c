/* See names.h.  The usual edit distance with swaps of neighbours, over three
 * rows of a table; words longer than any parameter are never near to one.
 */
#include <ctype.h>
#include <string.h>

#include "base/num.h"
#include "plugin/names.h"

#define MAX_WORD 32

static char
fold (char c)
{
  return c == '_' ? '-' : (char) tolower ((unsigned char) c);
}

/* Both at most MAX_WORD long. */
static unsigned
distance (const char *a, size_t a_len, const char *b, size_t b_len)
{
  unsigned rows[3][MAX_WORD + 1];

  for (size_t j = 0; j <= b_len; ++j)
    rows[0][j] = j;
  for (size_t i = 1; i <= a_len; ++i) {
    unsigned *row = rows[i % 3], *above = rows[(i - 1) % 3], *two_above = rows[(i + 1) % 3];

    row[0] = i;
    for (size_t j = 1; j <= b_len; ++j) {
      char x = fold (a[i - 1]), y = fold (b[j - 1]);

      row[j] = MIN (above[j] + 1, row[j - 1] + 1);
      row[j] = MIN (row[j], above[j - 1] + (x != y));
      if (i > 1 && j > 1 && x == fold (b[j - 2]) && y == fold (a[i - 2]))
        row[j] = MIN (row[j], two_above[j - 2] + 1);
    }
  }
  return rows[a_len % 3][b_len];
}

const char *
name_nearest (const char *word, const char *const *names)
{
  size_t len = strlen (word);
  unsigned best = MIN (3, len / 3 + 1);         /* one more than is near enough */
  const char *ret = NULL;

  if (len > MAX_WORD)
    return NULL;
  for (; *names; ++names) {
    unsigned d = distance (word, len, *names, MIN (strlen (*names), MAX_WORD));

    if (d < best) {
      best = d;
      ret = *names;
    }
  }
  return ret;
}
