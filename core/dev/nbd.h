/* A far disk: an NBD export, through libnbd. */
#ifndef QR_DEV_NBD_H
#define QR_DEV_NBD_H

#include "dev/bdev.h"

#define NBD_DEFAULT_TIMEOUT   30        /* seconds */
#define NBD_DEFAULT_RECONNECT 60        /* seconds */

struct nbd_options {
  unsigned timeout;             /* seconds without a sign of life after which a connection that
                                   owes answers counts as broken; 0 = default */
  unsigned reconnect;           /* seconds for which a lost export is looked for again before
                                   requests fail; 0: they fail at once */
  bool local_files;             /* the URI may name files of this machine (keys for TLS): only if
                                   it is the operator's, not one found in an image */
};

/* Is this the URI of an NBD export, and not the name of a file? */
bool nbd_is_uri (const char *name);

/* Connect to the export that uri names (nbd, nbds, with +unix or +vsock).  The device is
 * read-only until bdev_make_writable, which fails with -EROFS if the export is; it cannot grow;
 * it is far.  Nothing locks an export: LIMIT, another client may write to it meanwhile.
 *
 * A connection that is lost is made again.  Requests that change nothing are then sent once more;
 * one that changes something fails, since the server may still carry out the first one, later.
 * Once changes were acknowledged but not flushed when a connection was lost, every later flush
 * fails: the server may have crashed and forgotten them.  Errors:
 *
 *   -ENOTCONN    the export cannot be reached, or breaks off whenever it is asked for this
 *   others       the server's own answer: -EIO, -ENOSPC, ...
 *
 * bdev_read_many keeps many requests in flight, joins ranges that touch, and does not ask for
 * what the server says is a hole.  bdev_cache reads ahead into RAM and returns at once.
 */
int nbd_open (const char *uri, const struct nbd_options *opts, struct bdev **ret, struct err *err);

/* Before this process forks: let every NBD device come to rest.  Its thread is ended once nothing is under way; the next request, in
 * whichever process makes it, starts another.  Only one of the two processes may make requests
 * after the fork.
 */
void nbd_rest (void);

/* This process is about to end: NBD devices that were never written to need not look for a lost
 * server any more, so that nobody waits for one longer than a second.  Those that were go on, for the
 * sake of the data.  May be called from a signal handler.
 */
void nbd_hurry (void);

#endif /* QR_DEV_NBD_H */
