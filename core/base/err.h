/* Errors as values: a negative errno to branch on, a sentence to read. */
#ifndef QR_BASE_ERR_H
#define QR_BASE_ERR_H

/* Whoever first knows the cause fills it; callers pass it up as it is. */
struct err {
  int code;                     /* positive errno, 0 = nothing set */
  char msg[1024];
};

/* Record the cause and return -code, so that `return err_set (err, EIO, ...)'
 * is the whole error path.  The first message wins: a later one is dropped.
 * err may be NULL.  code must be positive.
 */
int err_set (struct err *err, int code, const char *fmt, ...)
  __attribute__ ((format (printf, 3, 4)));

/* Put a sentence in front of the recorded message ("what we were doing: cause").
 * Does nothing if err is NULL or empty.
 */
void err_prefix (struct err *err, const char *fmt, ...)
  __attribute__ ((format (printf, 2, 3)));

/* Forget what was recorded, to try something else. */
void err_clear (struct err *err);

#endif /* QR_BASE_ERR_H */
