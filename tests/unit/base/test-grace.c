/* Grace periods: what was taken out is not used after grace_wait, by anybody.
 * Readers dereference what they find; the remover poisons and frees it, so that
 * a grace period that ends too soon shows as poison, under the address sanitizer
 * as a use after free, and under the thread sanitizer as a race.
 */
#include <sched.h>
#include <unistd.h>

#include "unit/unit.h"

#include "base/grace.h"

#define GOOD 0x600dUL
#define READERS 3
#define REMOVERS 2
#define ROUNDS 500

struct shared {
  struct grace g;
  _Atomic (unsigned long *) item[REMOVERS];
  atomic_bool stop, bad;
  atomic_ulong reads;
};

struct remover {
  struct shared *s;
  unsigned index;
};

static void *
reader (void *opaque)
{
  struct shared *s = opaque;

  while (!atomic_load (&s->stop)) {
    unsigned t = grace_enter (&s->g), inner = grace_enter (&s->g);

    for (unsigned i = 0; i < REMOVERS; ++i)
      for (unsigned again = 0; again < 50; ++again) {
        unsigned long *p = atomic_load_explicit (&s->item[i], memory_order_acquire);

        if (*(volatile unsigned long *) p != GOOD)
          atomic_store (&s->bad, true);
      }
    grace_leave (&s->g, inner);
    grace_leave (&s->g, t);
    atomic_fetch_add (&s->reads, 1);
  }
  return NULL;
}

static unsigned long *
new_item (void)
{
  unsigned long *p = malloc (sizeof *p);

  *p = GOOD;
  return p;
}

static void *
remover (void *opaque)
{
  struct remover *me = opaque;
  struct shared *s = me->s;

  for (unsigned i = 0; i < ROUNDS; ++i) {
    unsigned long *old = atomic_exchange_explicit (&s->item[me->index], new_item (),
                                                   memory_order_acq_rel);

    grace_wait (&s->g);
    *(volatile unsigned long *) old = 0xdead;
    free (old);
  }
  return NULL;
}

static void
nothing_removed_is_used (void **state)
{
  static struct shared s;
  pthread_t r[READERS], w[REMOVERS];
  struct remover removers[REMOVERS];

  assert_int_equal (grace_init (&s.g), 0);
  for (unsigned i = 0; i < REMOVERS; ++i)
    atomic_store (&s.item[i], new_item ());
  for (unsigned i = 0; i < READERS; ++i)
    assert_int_equal (pthread_create (&r[i], NULL, reader, &s), 0);
  while (atomic_load (&s.reads) < READERS)      /* a busy machine may run them late */
    sched_yield ();
  for (unsigned i = 0; i < REMOVERS; ++i) {
    removers[i] = (struct remover) { &s, i };
    assert_int_equal (pthread_create (&w[i], NULL, remover, &removers[i]), 0);
  }
  for (unsigned i = 0; i < REMOVERS; ++i)
    pthread_join (w[i], NULL);
  atomic_store (&s.stop, true);
  for (unsigned i = 0; i < READERS; ++i)
    pthread_join (r[i], NULL);
  assert_false (atomic_load (&s.bad));
  for (unsigned i = 0; i < REMOVERS; ++i)
    free (atomic_load (&s.item[i]));
  grace_destroy (&s.g);
}

struct waiter {
  struct grace g;
  atomic_bool done;
  atomic_bool left;
  bool left_before_done;
};

static void *
wait_once (void *opaque)
{
  struct waiter *w = opaque;

  grace_wait (&w->g);
  w->left_before_done = atomic_load (&w->left);
  atomic_store (&w->done, true);
  return NULL;
}

/* A section that is open holds the waiter, but one that began later does not. */
static void
waits_for_earlier_sections_only (void **state)
{
  static struct waiter w;
  pthread_t t;
  unsigned before, after;

  assert_int_equal (grace_init (&w.g), 0);
  before = grace_enter (&w.g);
  assert_int_equal (pthread_create (&t, NULL, wait_once, &w), 0);
  while (atomic_load (&w.g.epoch) == 0)         /* until the waiter has begun */
    sched_yield ();
  after = grace_enter (&w.g);
  assert_false (atomic_load (&w.done));
  atomic_store (&w.left, true);
  grace_leave (&w.g, before);
  pthread_join (t, NULL);                       /* with `after' still open */
  assert_true (w.left_before_done);
  grace_leave (&w.g, after);
  grace_wait (&w.g);                            /* nobody inside: returns at once */
  grace_destroy (&w.g);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (nothing_removed_is_used),
    cmocka_unit_test (waits_for_earlier_sections_only),
  };

  alarm (400);                  /* what waits for ever is a failure, too */
  return cmocka_run_group_tests (tests, NULL, NULL);
}
