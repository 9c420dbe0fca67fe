/* Release at the end of the scope, on every path out of it. */
#ifndef QR_BASE_CLEANUP_H
#define QR_BASE_CLEANUP_H

#include <assert.h>
#include <pthread.h>
#include <stdlib.h>

static inline void
cleanup_free (void *p)
{
  free (*(void **) p);
}

/* CLEANUP_FREE char *s = malloc (10); */
#define CLEANUP_FREE __attribute__ ((cleanup (cleanup_free)))

static inline pthread_mutex_t *
lock_mutex (pthread_mutex_t *m)
{
  int r = pthread_mutex_lock (m);
  assert (r == 0);
  (void) r;
  return m;
}

static inline void
cleanup_unlock (pthread_mutex_t **m)
{
  int r = pthread_mutex_unlock (*m);
  assert (r == 0);
  (void) r;
}

/* Hold mutex *m until the end of the enclosing scope. */
#define LOCK_SCOPE(m) LOCK_SCOPE_1 (m, __LINE__)
#define LOCK_SCOPE_1(m, line) LOCK_SCOPE_2 (m, line)
#define LOCK_SCOPE_2(m, line)                                   \
  __attribute__ ((cleanup (cleanup_unlock), unused))            \
  pthread_mutex_t *scoped_lock_##line = lock_mutex (m)

#endif /* QR_BASE_CLEANUP_H */
