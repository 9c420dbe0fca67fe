/* Grace periods: wait until nobody can still be using what they found earlier.
 *
 *   reader                              remover
 *     t = grace_enter (&g);               take it out of the shared structure
 *     find something, use it              grace_wait (&g);
 *     grace_leave (&g, t);                reuse or free it
 *
 * Entering and leaving take no lock and touch one cache line that few other
 * threads touch, so that reads scale; waiting is slow and rare.
 */
#ifndef QR_BASE_GRACE_H
#define QR_BASE_GRACE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#define GRACE_STRIPES 16

struct grace_stripe {
  _Atomic uint64_t inside[2];   /* sections entered and not left, by parity of the epoch */
} __attribute__ ((aligned (64)));

struct grace {
  struct grace_stripe stripe[GRACE_STRIPES];
  _Atomic uint64_t epoch;       /* changed under wait_lock */
  pthread_mutex_t wait_lock;    /* held through a whole grace period; taken last */
};

/* 0 or -errno. */
int grace_init (struct grace *g);

/* Nobody may be inside. */
void grace_destroy (struct grace *g);

/* Begin a section; never blocks.  Sections may nest, may block, and may be left
 * by another thread than entered them.
 */
unsigned grace_enter (struct grace *g);
void grace_leave (struct grace *g, unsigned token);

/* Return once every section that was entered before the call has been left.
 * Blocks; must not be called inside a section of g, nor with a lock held that
 * a section waits for.
 */
void grace_wait (struct grace *g);

#endif /* QR_BASE_GRACE_H */
