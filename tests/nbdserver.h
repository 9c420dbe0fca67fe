/* An NBD server inside a test, which does what the test says, request by request.
 *
 * Newstyle fixed handshake; simple replies, or structured ones with base:allocation.  A thread for
 * each connection; the disk is a buffer of the test's.  What arrives is listed, but for
 * goodbyes, which are counted.
 */
#ifndef QR_TESTS_NBDSERVER_H
#define QR_TESTS_NBDSERVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { SRV_READ, SRV_WRITE, SRV_DISC, SRV_FLUSH, SRV_TRIM, SRV_CACHE, SRV_ZERO, SRV_STATUS,
       SRV_KINDS };

/* What becomes of a request. */
enum nbdserver_answer {
  SRV_ANSWER,                   /* carried out */
  SRV_EIO,                      /* this error */
  SRV_SHUTDOWN,                 /* ESHUTDOWN */
  SRV_HOLD,                     /* neither carried out nor answered until nbdserver_release; then
                                   a read gets the bytes of now */
  SRV_DROP,                     /* all connections are closed instead */
  SRV_DO_AND_DROP,              /* carried out, then all connections are closed without a reply */
  SRV_HALF,                     /* a read: half of the reply, then all connections are closed */
  SRV_SHORT,                    /* a structured reply to a read, whole by its own account, without its
                                   second half */
};

struct nbdserver_request {
  unsigned conn;                /* counted from 1 */
  unsigned kind, flags;         /* as on the wire */
  uint64_t off, len;
};

struct nbdserver_options {
  const char *path;             /* of the socket */
  uint8_t *disk;
  uint64_t size;                /* bytes */
  uint32_t minimum, maximum;    /* block sizes to tell; 0: none */
  bool read_only, multi_conn, structured, no_fua, no_flush;
  /* Called for each request, by one thread at a time; NULL: SRV_ANSWER. */
  enum nbdserver_answer (*decide) (void *opaque, const struct nbdserver_request *);
  void *opaque;
};

struct nbdserver;

struct nbdserver *nbdserver_start (const struct nbdserver_options *opts);
void nbdserver_stop (struct nbdserver *s);

/* Close all connections, and listen no more; then again, with another size perhaps. */
void nbdserver_go_away (struct nbdserver *s);
void nbdserver_come_back (struct nbdserver *s, uint64_t size);

/* From now on nothing is answered, not even the handshake; false: again, and what was held. */
void nbdserver_stall (struct nbdserver *s, bool on);

/* Another rule from now on. */
void nbdserver_decide (struct nbdserver *s,
                       enum nbdserver_answer (*decide) (void *, const struct nbdserver_request *),
                       void *opaque);

/* Answer what is held. */
void nbdserver_release (struct nbdserver *s);

/* Wait until so many requests of the kind have come, in all, or are held; 20 seconds at most. */
bool nbdserver_await (struct nbdserver *s, unsigned kind, unsigned nr);
bool nbdserver_await_held (struct nbdserver *s, unsigned nr);

/* The requests so far do not count. */
void nbdserver_forget (struct nbdserver *s);

unsigned nbdserver_count (struct nbdserver *s, unsigned kind);
unsigned nbdserver_conns (struct nbdserver *s);         /* made so far */

/* The requests so far, a copy; *nr of them.  The caller frees. */
struct nbdserver_request *nbdserver_list (struct nbdserver *s, size_t *nr);

#endif /* QR_TESTS_NBDSERVER_H */
