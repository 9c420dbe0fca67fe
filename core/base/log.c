/* See log.h. */
#include <stdarg.h>
#include <stdio.h>

#include "log.h"

static log_hook debug_hook;

void
log_set_debug_hook (log_hook hook)
{
  debug_hook = hook;
}

void
log_debug (const char *fmt, ...)
{
  char msg[1024];
  va_list args;

  if (!debug_hook)
    return;
  va_start (args, fmt);
  vsnprintf (msg, sizeof msg, fmt, args);
  va_end (args);
  debug_hook (msg);
}
