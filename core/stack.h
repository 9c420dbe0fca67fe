/* The whole story: open -> check -> overlay -> heal -> check again -> serve.
 * READ stack.c FIRST.
 */
#ifndef QR_STACK_H
#define QR_STACK_H

#include <pthread.h>

#include "chain.h"
#include "heal/orphans.h"
#include "inplace.h"

enum stack_check {
  STACK_CHECK_YES,              /* check=true */
  STACK_CHECK_NO,               /* check=false: serve read-only without looking */
  STACK_CHECK_DEEP,             /* check=deep: decompress everything that is compressed, too */
};

struct stack_options {
  const char *file;             /* path of the image, or the URI of an NBD export */
  const char *overlay;          /* path, or NULL */
  const char *cache;            /* path of a file that keeps what is read from the image; or NULL */
  bool inplace;                 /* write repairs, and the overlay, into the image */
  bool discard_orphans;         /* in place: free also what may be lost data */
  enum repair_level repair;
  enum stack_check check;
  struct follow_policy backing;
  struct follow_policy data_file;
  const char *snapshot;         /* serve this one (ID or name) as the guest disk; or NULL */
  size_t cache_size;            /* bytes for cached metadata; 0 = default */
  struct source_options source; /* force_share: serves read-only */
  bool lost_error;              /* lost ranges fail with EIO, instead of reading as zeros */
  struct progress *progress;    /* or NULL */
};

/* Constant once stack_open returned, but for orphans. */
struct stack {
  struct layer top;             /* the image; its path as given */
  struct layer data;            /* its external data file, if it has one */
  struct layer_vec chain;       /* what lies behind it, nearest first */
  char *overlay;                /* path as given, or NULL */
  char *data_overlay;           /* path of the overlay over the data file, or NULL */
  enum repair_level repair;
  size_t cache_size;
  struct inplace inplace;
  bool overlay_created;         /* by this start */
  bool cache_created;           /* likewise */
  bool cached;                  /* there is one */
  bool data_overlay_created;
  bool overlay_reused;          /* it was there, and the check looked through it */
  bool lost_error;              /* as told */
  bool live;                    /* force-share: somebody may be writing, findings may be transient */
  bool writable;                /* the guest may write */
  char *why_read_only;          /* a sentence for people; NULL if writable */
  char *why_no_guest;           /* likewise, if the guest disk cannot be read (encrypted) */
  struct bdev *backing;         /* what unallocated clusters read from, or NULL */
  struct bdev *guest;           /* the guest disk; NULL if it can't be served */
  struct bdev *guest_watch;     /* knows what of it could not be read (dev/watch.h); or NULL */
  pthread_mutex_t orphans_lock;
  struct orphans *orphans;      /* protected by orphans_lock until made: see lost-found.h */
};

/* Open, check, heal as the options say and prepare the guest disk.  On failure
 * -errno with a message that says what to do next; *ret is set even then if a
 * check was made (guest is NULL), so that a report can be written, else NULL.
 * A guest disk that only a key could read is no failure: see why_no_guest.
 */
int stack_open (const struct stack_options *opts, struct stack **ret, struct err *err);

/* The disk as an internal snapshot remembers it, read-only; by name, or by ID if
 * no name fits.  The caller owns *ret.  -ENOENT if there is no such snapshot.
 */
int stack_open_snapshot (struct stack *s, const char *name, struct bdev **ret, struct err *err);

/* Snapshots of the image as it is now. */
const struct snapshot_vec *stack_snapshots (const struct stack *s);

/* Flush and close.  s may be NULL.  Returns the first error of the flush. */
int stack_close (struct stack *s, struct err *err);

#endif /* QR_STACK_H */
