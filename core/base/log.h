/* Where text goes that is no error of any one request.  The core never prints: the
 * program that embeds it installs hooks, or nothing is said.
 */
#ifndef QR_BASE_LOG_H
#define QR_BASE_LOG_H

typedef void (*log_hook) (const char *msg);

/* Not thread-safe: install before any other call into the core.  NULL = silence. */
void log_set_debug_hook (log_hook hook);
void log_set_notice_hook (log_hook hook);

/* For whoever looks for a mistake of ours. */
void log_debug (const char *fmt, ...)
  __attribute__ ((format (printf, 1, 2)));

/* For the operator: something happened that they may have to see to, and no request has
 * failed (yet).  Any thread.
 */
void log_notice (const char *fmt, ...)
  __attribute__ ((format (printf, 1, 2)));

#endif /* QR_BASE_LOG_H */
