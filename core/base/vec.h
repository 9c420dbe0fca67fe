/* A growable array with a type of its own.
 *
 *   DEFINE_VEC (u64vec, uint64_t);
 *   struct u64vec v = VEC_INIT;
 *   if (u64vec_push (&v, 42) < 0) ...       -ENOMEM
 *   v.ptr[i], v.len
 *   vec_reset (&v);
 */
#ifndef QR_BASE_VEC_H
#define QR_BASE_VEC_H

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define VEC_INIT { NULL, 0, 0 }

#define DEFINE_VEC(name, type)                                          \
  struct name { type *ptr; size_t len, cap; };                          \
                                                                        \
  /* Make room for n more items; 0 or -ENOMEM. */                       \
  static inline __attribute__ ((unused)) int                            \
  name##_reserve (struct name *v, size_t n)                             \
  {                                                                     \
    size_t want, bytes;                                                 \
    type *p;                                                            \
                                                                        \
    if (__builtin_add_overflow (v->len, n, &want))                      \
      return -ENOMEM;                                                   \
    if (want <= v->cap)                                                 \
      return 0;                                                         \
    if (want < v->cap + v->cap / 2)                                     \
      want = v->cap + v->cap / 2;                                       \
    if (want < 8)                                                       \
      want = 8;                                                         \
    if (__builtin_mul_overflow (want, sizeof (type), &bytes))           \
      return -ENOMEM;                                                   \
    p = realloc (v->ptr, bytes);                                        \
    if (p == NULL)                                                      \
      return -ENOMEM;                                                   \
    v->ptr = p;                                                         \
    v->cap = want;                                                      \
    return 0;                                                           \
  }                                                                     \
                                                                        \
  static inline __attribute__ ((unused)) int                            \
  name##_push (struct name *v, type item)                               \
  {                                                                     \
    int r = name##_reserve (v, 1);                                      \
                                                                        \
    if (r == 0)                                                         \
      v->ptr[v->len++] = item;                                          \
    return r;                                                           \
  }                                                                     \
  struct name

#define vec_reset(v)                                                    \
  do {                                                                  \
    free ((v)->ptr);                                                    \
    (v)->ptr = NULL;                                                    \
    (v)->len = (v)->cap = 0;                                            \
  } while (0)

#endif /* QR_BASE_VEC_H */
