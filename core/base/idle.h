/* Things that are costly to make and wait to be used again: decoders, buffers.  There are as
 * many as were in use at once, up to a limit; whoever owns the list frees them at the end.
 */
#ifndef QR_BASE_IDLE_H
#define QR_BASE_IDLE_H

#include <stdbool.h>
#include <stddef.h>

#include "base/cleanup.h"

#define MAX_IDLE 16

struct idle {
  pthread_mutex_t lock;
  /* protected by lock */
  void *ptr[MAX_IDLE];
  unsigned nr;
};

#define IDLE_INIT { .lock = PTHREAD_MUTEX_INITIALIZER }

/* NULL if none is idle: then make one. */
static inline void *
idle_take (struct idle *idle)
{
  LOCK_SCOPE (&idle->lock);

  return idle->nr > 0 ? idle->ptr[--idle->nr] : NULL;
}

/* False if there are max, at most MAX_IDLE, already: then free it. */
static inline bool
idle_give (struct idle *idle, void *p, unsigned max)
{
  LOCK_SCOPE (&idle->lock);

  if (idle->nr >= max)
    return false;
  idle->ptr[idle->nr++] = p;
  return true;
}

#endif /* QR_BASE_IDLE_H */
