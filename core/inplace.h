/* inplace=true: the repair is written into the image itself, by way of a journal
 * (heal/journal.h) that is an overlay beside it.
 */
#ifndef QR_INPLACE_H
#define QR_INPLACE_H

#include "heal/journal.h"

/* How the names of journals end. */
#define INPLACE_SUFFIX ".qcow2repair-journal"

struct stack;
struct progress;

/* Constant once stack_open returned. */
struct inplace {
  bool wanted;                  /* inplace=true */
  bool named;                   /* the journal is an overlay that the operator named */
  bool resumed;                 /* an earlier start had begun to write it into the image */
  bool marked;                  /* the image may be part old, part new: the journal must stay */
  bool committed;               /* all of it is in the image, and the journal is gone */
  char *journal;                /* its path, or NULL if none was needed */
  char *link;                   /* the link that leads to it, or NULL; see inplace.c */
  char *data_journal;           /* that of the external data file, or NULL */
  char *note;                   /* a sentence for people about what was found, or NULL */
  struct journal_result result; /* what was written into the image */
  struct journal_result data_result;
};

/* For every start, once the source is open and locked.  Without inplace=true: is
 * the source a part of something that was being written?  Then it is refused.
 * With it: make the source writable; copy a journal that is there, all but the
 * last steps, or remove one that was never to be.
 */
int inplace_begin (struct stack *s, struct progress *progress, struct err *err);

/* Where the journal is to be made; the caller frees. */
int inplace_journal_path (struct stack *s, char **ret, struct err *err);

/* s->top.healed is sound: make the source that, durably, and remove the journal.
 * Also ends what inplace_begin resumed.  After a failure the journal is there
 * still if it is needed, and the message says so.
 */
int inplace_commit (struct stack *s, struct progress *progress, struct err *err);

/* A start has failed: take back what was prepared and not used. */
void inplace_undo (struct stack *s);

void inplace_reset (struct inplace *ip);

#endif /* QR_INPLACE_H */
