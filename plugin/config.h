/* The parameters of the plugin, parsed and judged. */
#ifndef QR_PLUGIN_CONFIG_H
#define QR_PLUGIN_CONFIG_H

#include "stack.h"

/* What the command line asked for; constant after config_complete. */
struct config {
  struct stack_options stack;   /* paths in it are absolute; progress is not set */
  char *report;                 /* absolute path, or NULL */
  const char *backing, *data_file;      /* the paths in stack, owned here */
};

extern struct config config;

/* nbdkit's .config: one key=value.  0 or -1 after nbdkit_error. */
int config_set (const char *key, const char *value);

/* nbdkit's .config_complete: make paths absolute, refuse contradictions.  0 or
 * -1 after nbdkit_error.
 */
int config_complete (void);

void config_reset (void);

/* The keys, separated by commas, for --dump-plugin and messages. */
void config_print_keys (char *buf, size_t len, const char *separator);

/* Shown by nbdkit --help. */
extern const char config_help[];

#endif /* QR_PLUGIN_CONFIG_H */
