/* How far long work has come, and a way to stop it.  No printing here. */
#ifndef QR_BASE_PROGRESS_H
#define QR_BASE_PROGRESS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct progress {
  /* Called now and then, from any thread, never from two at once.  phase is a
   * static string; done and total are in units of the phase's choice.
   */
  void (*update) (void *opaque, const char *phase, uint64_t done, uint64_t total);
  void *opaque;
  atomic_bool cancelled;        /* set by anybody; the work returns -ECANCELED soon */
};

/* p may be NULL. */
static inline void
progress_update (struct progress *p, const char *phase, uint64_t done, uint64_t total)
{
  if (p && p->update)
    p->update (p->opaque, phase, done, total);
}

static inline bool
progress_cancelled (struct progress *p)
{
  return p && atomic_load_explicit (&p->cancelled, memory_order_relaxed);
}

#endif /* QR_BASE_PROGRESS_H */
