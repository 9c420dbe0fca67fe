/* Prints the table of findings (core/check/findings.def) as Markdown, for
 * docs/FINDINGS.md, or as POD, for the man page:  gen-findings md|pod
 */
#include <ctype.h>
#include <stdio.h>
#include <string.h>

#include "check/finding.h"

static const struct finding_kind kinds[] = {
#define FINDING(code, name, severity, level, unit, title, advice) \
  { #code, #name, severity, level, unit, title, advice },
#include "check/findings.def"
#undef FINDING
};

static const char *const severities[NR_SEVERITIES] = {
  [SEV_NOTE] = "note", [SEV_LEAK] = "leak", [SEV_CORRUPT] = "corruption", [SEV_FATAL] = "fatal",
};

static const char *const levels[] = {
  [REPAIR_OFF] = "off", [REPAIR_REFCOUNTS] = "refcounts", [REPAIR_ALL] = "all",
  [REPAIR_SALVAGE] = "salvage", [REPAIR_NEVER] = "never",
};

static const struct phase {
  char letter;
  const char *title;
} phases[] = {
  { 'H', "Header" }, { 'T', "Tables of the mapping" }, { 'C', "Compressed data" },
  { 'S', "Snapshots" }, { 'X', "Bitmaps and encryption header" }, { 'R', "Refcounts" },
  { 'O', "Orphans" }, { 'D', "Device" },
};

static const char *
phase_title (char letter)
{
  for (size_t i = 0; i < sizeof phases / sizeof phases[0]; ++i) {
    if (phases[i].letter == letter)
      return phases[i].title;
  }
  return "Other";
}

static const char *
level_words (enum repair_level level)
{
  switch (level) {
  case REPAIR_SALVAGE: return "repair=salvage, not in this version";
  case REPAIR_NEVER: return "nothing to mend";
  case REPAIR_ALL: return "repair=all";
  default: return "repair=refcounts";
  }
}

static void
print_md (const struct finding_kind *k, int new_phase)
{
  if (new_phase)
    printf ("\n## %s\n\n| code | what is wrong | severity | mended by | what it means |\n"
            "|---|---|---|---|---|\n", phase_title (k->code[0]));
  printf ("| %s `%s` | %s | %s | %s | %s |\n", k->code, k->name, k->title,
          severities[k->severity], levels[k->level], k->advice);
}

static void
print_pod (const struct finding_kind *k, int new_phase)
{
  if (new_phase)
    printf ("%s=head2 %s\n\n=over 4\n\n", k == kinds ? "\n" : "=back\n\n",
            phase_title (k->code[0]));
  printf ("=item B<%s> %s (%s; %s)\n\n%c%s.\n\n", k->code, k->title, severities[k->severity],
          level_words (k->level), toupper ((unsigned char) k->advice[0]), k->advice + 1);
}

int
main (int argc, char **argv)
{
  int pod = argc == 2 && strcmp (argv[1], "pod") == 0;

  if (argc != 2 || (!pod && strcmp (argv[1], "md") != 0)) {
    fprintf (stderr, "usage: %s md|pod\n", argv[0]);
    return 2;
  }
  if (!pod)
    printf ("# Findings\n\n"
            "Made by `make docs` from core/check/findings.def: edit that, not this.\n\n"
            "A code is stable and never used for anything else.  Severities: a *note* is worth knowing;\n"
            "a *leak* wastes space, the image counts as sound; *corruption* means that writing may\n"
            "destroy data; *fatal* means that the guest disk cannot be served.\n");
  for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; ++i)
    (pod ? print_pod : print_md) (&kinds[i], i == 0 || kinds[i].code[0] != kinds[i - 1].code[0]);
  if (pod)
    printf ("=back\n\n");
  return 0;
}
