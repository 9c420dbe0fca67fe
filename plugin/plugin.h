/* What the files of the plugin share: the one image that it serves. */
#ifndef QR_PLUGIN_PLUGIN_H
#define QR_PLUGIN_PLUGIN_H

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include "plugin/config.h"
#include "stack.h"

/* The image that is served; NULL until start and after stop.  Constant between
 * them, while the callbacks of connections run.
 */
extern struct stack *served;

/* start.c: nbdkit's .get_ready, and the way back.  start returns 0 or -1 after
 * nbdkit_error.  stop may be called again.
 */
int start (void);
void stop (void);

/* quit.c: nbdkit's .after_fork: from the signal on that ends nbdkit, nobody waits for a far server
 * that is gone.  unwatch: before this code is unloaded.
 */
int quit_watch (void);
void quit_unwatch (void);

/* limit.c: while it is served, a file that may not grow any more is an error for the guest, not the
 * end of the process.  unwatch: before this code is unloaded.
 */
void limit_watch (void);
void limit_unwatch (void);

/* memory.c: once, before anything large is allocated; and when the last client has gone. */
void memory_set_up (void);
void memory_give_back (void);

/* report-file.c: write the JSON report to path, whole or not at all.  s may be
 * NULL (nothing could be opened), failure too (nothing went wrong).  0 or
 * -errno.
 */
int report_file_write (const char *path, const struct stack *s, const struct err *failure,
                       struct err *err);

/* The handle of a connection. */
struct export {
  struct bdev *d;               /* own reference */
  bool writable;
  const char *description;      /* static */
  struct export *next;          /* of those that are open; exports.c */
};

/* exports.c: handles of connections and what is negotiated for them. */
void *exports_open (int readonly);
void exports_close (void *handle);
void exports_close_all (void);  /* after io_stop */
int exports_list (int readonly, int is_tls, struct nbdkit_exports *exports);
const char *exports_default (int readonly, int is_tls);
const char *exports_description (void *handle);
int64_t exports_get_size (void *handle);
int exports_can_write (void *handle);
int exports_block_size (void *handle, uint32_t *minimum, uint32_t *preferred, uint32_t *maximum);

/* io.c: requests.  handle is a struct export.  io_start before the first (0 or
 * -errno); after io_stop none runs, and later ones fail.
 */
int io_start (void);
void io_stop (void);
int io_pread (void *handle, void *buf, uint32_t count, uint64_t guest_off, uint32_t flags);
int io_pwrite (void *handle, const void *buf, uint32_t count, uint64_t guest_off, uint32_t flags);
int io_zero (void *handle, uint32_t count, uint64_t guest_off, uint32_t flags);
int io_trim (void *handle, uint32_t count, uint64_t guest_off, uint32_t flags);
int io_flush (void *handle, uint32_t flags);
int io_extents (void *handle, uint32_t count, uint64_t guest_off, uint32_t flags,
                struct nbdkit_extents *extents);
int io_cache (void *handle, uint32_t count, uint64_t guest_off, uint32_t flags);

#endif /* QR_PLUGIN_PLUGIN_H */
