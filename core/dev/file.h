/* Regular files and Linux block devices as block devices. */
#ifndef QR_DEV_FILE_H
#define QR_DEV_FILE_H

#include <stdbool.h>

#include "dev/bdev.h"

enum {
  FILE_WRITE   = 1,             /* open for reading and writing, and lock as a writer */
  FILE_NO_LOCK = 2,             /* force-share: neither take nor test locks; excludes FILE_WRITE */
};

/* Open an existing regular file or block device.  Directories, FIFOs, sockets
 * and character devices are refused without blocking on them.  Takes QEMU's
 * image locks: open file description locks on bytes 100+i ("I use permission
 * i") and 200+i ("nobody else may"); a conflict is -EAGAIN with a message that
 * says who is likely to hold it and what to do.  A file system that has no
 * such locks is used without.  Regular files can grow, block devices cannot.
 *
 * bdev_make_writable raises the locks on the descriptor that holds them, so that there is no
 * instant at which another writer could slip in, then opens the same inode (not the path)
 * again; FILE_NO_LOCK devices: -EINVAL.
 */
int file_open (const char *path, unsigned flags, struct bdev **ret, struct err *err);

/* Create path, which must not exist (-EEXIST), mode 0600-0644 by umask, empty,
 * opened FILE_WRITE.
 */
int file_create (const char *path, struct bdev **ret, struct err *err);

/* The same without a name, in the folder of path, until file_publish gives it that
 * one, durably (-EEXIST if it is taken); gone if it is closed before.  -ENOTSUP where
 * the file system has no such files.
 */
int file_create_unnamed (const char *path, struct bdev **ret, struct err *err);
int file_publish (struct bdev *d, const char *path, struct err *err);

/* Take from d all permissions of others that the file at path does not give them; path NULL: all. */
int file_copy_mode (struct bdev *d, const char *path, struct err *err);

/* Make durable that path exists, or that it does not any more.  0 also on file
 * systems that cannot sync a directory.
 */
int file_sync_folder (const char *path, struct err *err);

/* Remove path, durably.  0 also if nothing was there. */
int file_remove (const char *path, struct err *err);

#endif /* QR_DEV_FILE_H */
