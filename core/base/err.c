/* See err.h.  Messages have a fixed size: an error path must not need memory. */
#include <assert.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "err.h"

int
err_set (struct err *err, int code, const char *fmt, ...)
{
  assert (code > 0);
  if (err && err->code == 0) {
    va_list args;

    err->code = code;
    va_start (args, fmt);
    vsnprintf (err->msg, sizeof err->msg, fmt, args);
    va_end (args);
  }
  return -code;
}

void
err_prefix (struct err *err, const char *fmt, ...)
{
  char cause[sizeof err->msg];
  va_list args;
  int n;

  if (!err || err->code == 0)
    return;
  memcpy (cause, err->msg, sizeof cause);
  va_start (args, fmt);
  n = vsnprintf (err->msg, sizeof err->msg, fmt, args);
  va_end (args);
  if (n >= 0 && (size_t) n < sizeof err->msg)
    snprintf (err->msg + n, sizeof err->msg - n, ": %s", cause);
}

void
err_clear (struct err *err)
{
  if (err) {
    err->code = 0;
    err->msg[0] = '\0';
  }
}
