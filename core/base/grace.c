/* See grace.h.  Sections are counted by the parity of the epoch in which they
 * began, in one of several stripes so that threads do not fight for one cache
 * line.  A grace period moves on to the next epoch and waits until the counters
 * of the previous parity have been zero, each once.
 *
 * Why that is enough: a section counts only if the epoch was still the same
 * after it was counted, else it is uncounted and tried again.  So whoever is
 * inside at the time of the move, with the parity that is waited for, was
 * counted before it; and the sections of the epoch before that, which have the
 * other parity, were waited for by the previous grace period, which was over
 * when wait_lock was taken.  A late comer who read the old epoch can only raise
 * an old counter for a moment.
 *
 * All atomics are sequentially consistent: the argument needs "count, then look
 * at the epoch" here and "move the epoch, then look at the counts" there to be
 * seen in one order.
 */
#include <sched.h>
#include <time.h>

#include "base/cleanup.h"
#include "base/grace.h"

int
grace_init (struct grace *g)
{
  for (unsigned i = 0; i < GRACE_STRIPES; ++i) {
    atomic_init (&g->stripe[i].inside[0], 0);
    atomic_init (&g->stripe[i].inside[1], 0);
  }
  atomic_init (&g->epoch, 0);
  return -pthread_mutex_init (&g->wait_lock, NULL);
}

void
grace_destroy (struct grace *g)
{
  for (unsigned i = 0; i < GRACE_STRIPES; ++i) {
    assert (atomic_load (&g->stripe[i].inside[0]) == 0);
    assert (atomic_load (&g->stripe[i].inside[1]) == 0);
  }
  pthread_mutex_destroy (&g->wait_lock);
}

/* Threads are dealt out to the stripes in turn. */
static unsigned
my_stripe (void)
{
  static atomic_uint next;
  static _Thread_local unsigned mine;   /* 0 = none yet */

  if (mine == 0)
    mine = atomic_fetch_add_explicit (&next, 1, memory_order_relaxed) % GRACE_STRIPES + 1;
  return mine - 1;
}

unsigned
grace_enter (struct grace *g)
{
  unsigned stripe = my_stripe ();

  for (;;) {
    uint64_t epoch = atomic_load (&g->epoch);
    _Atomic uint64_t *inside = &g->stripe[stripe].inside[epoch & 1];

    atomic_fetch_add (inside, 1);
    if (atomic_load (&g->epoch) == epoch)
      return stripe * 2 + (epoch & 1);
    atomic_fetch_sub (inside, 1);
  }
}

void
grace_leave (struct grace *g, unsigned token)
{
  uint64_t before = atomic_fetch_sub (&g->stripe[token / 2].inside[token & 1], 1);

  assert (before > 0);
  (void) before;
}

/* Sections last as long as a read does: microseconds from RAM, milliseconds
 * from a disk.
 */
static void
wait_for_zero (const _Atomic uint64_t *inside)
{
  for (unsigned tries = 0; atomic_load (inside) != 0; ++tries) {
    if (tries < 4)
      sched_yield ();
    else {
      unsigned shift = tries - 4 < 6 ? tries - 4 : 6;
      struct timespec ts = { .tv_nsec = 16000l << shift };      /* up to 1 ms */

      nanosleep (&ts, NULL);
    }
  }
}

void
grace_wait (struct grace *g)
{
  /* Read by a modifying operation, so that whoever moves the epoch next passes
   * on what the caller did before, and not only what the mover did.
   */
  uint64_t called_at = atomic_fetch_add (&g->epoch, 0);
  uint64_t epoch;

  LOCK_SCOPE (&g->wait_lock);
  epoch = atomic_load (&g->epoch);
  if (epoch != called_at)
    return;                     /* a whole grace period went by while we queued */
  atomic_store (&g->epoch, epoch + 1);
  for (unsigned i = 0; i < GRACE_STRIPES; ++i)
    wait_for_zero (&g->stripe[i].inside[epoch & 1]);
}
