/* Writing an overlay into its source.  The overlay is the journal: it is whole
 * and durable before the source changes, so the copy can be cut off anywhere and
 * made again from the start.
 *
 *   journal_mark   OVERLAY_COMMITTING, durably    from here on only both are whole
 *   journal_copy   into the source, durably
 *   journal_mark   OVERLAY_DONE, durably          from here on it is never used again
 *
 * after which the caller removes the file.  A start that finds it committing calls
 * journal_accept, then journal_copy and the rest.
 *
 * file is always the overlay's own file, source what lies under it, and healed
 * the two together (see overlay.h).  The caller has the source locked against
 * other writers, and nobody writes to healed meanwhile.
 */
#ifndef QR_HEAL_JOURNAL_H
#define QR_HEAL_JOURNAL_H

#include "base/progress.h"
#include "dev/bdev.h"
#include "heal/fingerprint.h"

struct journal_result {
  uint64_t bytes_written;       /* that differed in the source */
  uint64_t bytes_zeroed;        /* likewise */
  uint64_t old_size, new_size;  /* bytes of the source */
};

/* Make the overlay durable and note its new state in it, durably.  healed is
 * flushed, and read, only on the way to OVERLAY_COMMITTING.  After a failure the old
 * state may be in force, or the new one.
 */
int journal_mark (struct bdev *file, struct bdev *healed, struct bdev *source,
                  enum overlay_state state, struct err *err);

/* May the journal in file, which is committing, be copied into source?  Then
 * *healed is what the source is to be.  -EINVAL if not, with what to do: it is
 * damaged, or the source is another or was changed since.
 */
int journal_accept (struct bdev *file, struct bdev *source, struct bdev **healed,
                    struct err *err);

/* Is there room in source for healed?  To be asked before OVERLAY_COMMITTING.  -ENOSPC if
 * not: source is too small and cannot grow.  (Zeros at the end, less than a sector, need none.)
 */
int journal_fits (struct bdev *healed, struct bdev *source, struct err *err);

/* Make source have the size and the bytes of healed, durably.  Reads only what
 * the overlay holds, and writes only what differs, unless it was begun before
 * (again).  The source never gets shorter.  See journal_fits.
 */
int journal_copy (struct bdev *file, struct bdev *healed, struct bdev *source, bool again,
                  struct progress *progress, struct journal_result *res, struct err *err);

#endif /* QR_HEAL_JOURNAL_H */
