/* See log.h. */
#include <stdarg.h>
#include <stdio.h>

#include "log.h"

static log_hook debug_hook, notice_hook;

void
log_set_debug_hook (log_hook hook)
{
  debug_hook = hook;
}

void
log_set_notice_hook (log_hook hook)
{
  notice_hook = hook;
}

static void
say (log_hook hook, const char *fmt, va_list args)
{
  char msg[1024];

  if (!hook)
    return;
  vsnprintf (msg, sizeof msg, fmt, args);
  hook (msg);
}

void
log_debug (const char *fmt, ...)
{
  va_list args;

  va_start (args, fmt);
  say (debug_hook, fmt, args);
  va_end (args);
}

void
log_notice (const char *fmt, ...)
{
  va_list args;

  va_start (args, fmt);
  say (notice_hook, fmt, args);
  va_end (args);
}
