/* Where debug text goes.  The core never prints: the program that embeds it
 * installs a hook, or nothing is said.
 */
#ifndef QR_BASE_LOG_H
#define QR_BASE_LOG_H

typedef void (*log_hook) (const char *msg);

/* Not thread-safe: install before any other call into the core.  NULL = silence. */
void log_set_debug_hook (log_hook hook);

void log_debug (const char *fmt, ...)
  __attribute__ ((format (printf, 1, 2)));

#endif /* QR_BASE_LOG_H */
