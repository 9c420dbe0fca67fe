/* A local file that keeps what was read from a source, so that nothing is read from there twice:
 * by a recovery that goes on where an earlier one was interrupted, or from a disk that is failing.
 *
 * It is an ordinary qcow2 file whose raw backing file is the source, like an overlay (overlay.h),
 * but holds the source's own bytes; its fingerprint says so (OVERLAY_CACHE).
 */
#ifndef QR_HEAL_CACHE_FILE_H
#define QR_HEAL_CACHE_FILE_H

#include "dev/bdev.h"

/* The bytes of source, kept in the file at path, which is made if nothing is there.  source_path:
 * as in overlay_options.  Takes its own reference to source.  Read-only for good, since a write
 * would have to go to both.  -EINVAL, with what to do, if the file is no cache of ours, or that of
 * another source or of one that was changed since: besides the fingerprint, some hundred places of
 * what is kept, other ones each time, are compared with the source.  *created: there was none.
 *
 * A file that cannot take more (no space) is used as it is, with a notice; one that cannot be read
 * is done without.  What was kept in the last second in which anything was may be read again after
 * this program was killed.
 */
int cache_file_open (const char *path, struct bdev *source, const char *source_path,
                     struct bdev **ret, bool *created, struct err *err);

#endif /* QR_HEAL_CACHE_FILE_H */
