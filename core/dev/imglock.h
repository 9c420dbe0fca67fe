/* QEMU's image locks: open file description locks on single bytes.  Byte 100+i
 * says "I use permission i", byte 200+i says "nobody else may use it"; i is 0
 * for reading consistent data, 1 for writing, 3 for resizing.  All are shared
 * locks; whoever has placed its own asks whether the opposite bytes are free of
 * others'.
 */
#ifndef QR_DEV_IMGLOCK_H
#define QR_DEV_IMGLOCK_H

#include <stdbool.h>

#include "base/err.h"

/* Lock fd, which stays open as long as the locks are wanted, as a reader
 * (consistent reads; nobody else writes or resizes) or as a writer (writes and
 * resizes too).  May be called again to turn a reader into a writer.  Name is
 * for messages.  0 (also if the file system has no such locks), or -EAGAIN if
 * somebody else is in the way; then what this call added is dropped again,
 * which for a new reader may leave locks that only closing fd releases.
 */
int imglock_take (int fd, const char *name, bool writer, struct err *err);

/* From writer back to reader. */
void imglock_lower (int fd);

#endif /* QR_DEV_IMGLOCK_H */
