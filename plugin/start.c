/* Start and stop: open the image by way of core/stack, and tell people about it.
 *
 * Runs in nbdkit's get_ready: in the foreground, before it forks, changes
 * directory or listens.  What was found and mended goes to stderr as text; to
 * the report file as JSON, also when the start is refused, since then it is
 * needed most.  Nothing is printed to stdout: with nbdkit -s that is the client.
 */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "plugin/config.h"
#include "plugin/plugin.h"
#include "dev/nbd.h"
#include "report.h"

struct stack *served;

/* --- the line that shows how far the work has come, on terminals only */

#define SHOW_AFTER_MS 2000      /* shorter work needs none */
#define SHOW_EVERY_MS 200

struct meter {
  uint64_t begun_ms, shown_ms;
  bool shown;                   /* there is a line to be wiped */
};

static uint64_t
now_ms (void)
{
  struct timespec ts;

  clock_gettime (CLOCK_MONOTONIC, &ts);
  return (uint64_t) ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

static void
meter_update (void *opaque, const char *phase, uint64_t done, uint64_t total)
{
  struct meter *m = opaque;
  uint64_t now = now_ms ();

  if (now - m->begun_ms < SHOW_AFTER_MS || now - m->shown_ms < SHOW_EVERY_MS)
    return;
  m->shown_ms = now;
  m->shown = true;
  if (total)
    fprintf (stderr, "\rqcow2repair: %s: %d %%\033[K", phase, (int) (100.0 * done / total));
  else
    fprintf (stderr, "\rqcow2repair: %s\033[K", phase);
  fflush (stderr);
}

static void
meter_wipe (struct meter *m)
{
  if (m->shown)
    fputs ("\r\033[K", stderr);
}

/* --- */

/* What nbdkit's user must know if the image is opened by nobody's leave. */
static int
refuse_start (struct stack *s, const struct err *failure)
{
  struct err err = { 0 };

  if (s)
    report_write_text (stderr, s);
  if (config.report && report_file_write (config.report, s, failure, &err) < 0)
    nbdkit_error ("%s", err.msg);
  nbdkit_error ("%s", failure->msg);
  err_clear (&err);
  stack_close (s, &err);
  return -1;
}

int
start (void)
{
  struct meter meter = { .begun_ms = now_ms () };
  struct progress progress = { .update = meter_update, .opaque = &meter };
  struct stack_options opts = config.stack;
  struct stack *s = NULL;
  struct err err = { 0 };
  int r;

  if (isatty (STDERR_FILENO))
    opts.progress = &progress;
  r = io_start ();
  if (r == 0)
    r = stack_open (&opts, &s, &err);
  meter_wipe (&meter);
  if (r < 0) {
    if (err.code == 0)
      err_set (&err, -r, "%s: %s", opts.file, strerror (-r));
    return refuse_start (s, &err);
  }
  report_write_text (stderr, s);
  if (config.report && report_file_write (config.report, s, NULL, &err) < 0) {
    nbdkit_error ("%s", err.msg);
    err_clear (&err);
    stack_close (s, &err);
    return -1;
  }
  nbd_rest ();                  /* nbdkit is about to fork */
  served = s;
  return 0;
}

/* What could not be read of it is known now, and was not when the report was written. */
static void
tell_read_errors (void)
{
  struct err err = { 0 };
  CLEANUP_FREE char *text = NULL;
  size_t len;
  FILE *fp = open_memstream (&text, &len);
  bool any = fp && report_read_errors_text (fp, served);

  if (fp)
    fclose (fp);
  if (!any)
    return;
  for (char *line = text, *end; line && (end = strchr (line, '\n')); line = end + 1)
    nbdkit_error ("%s: %.*s", served->top.path, (int) (end - line), line);
  if (config.report && report_file_write (config.report, served, NULL, &err) < 0)
    nbdkit_error ("%s", err.msg);
}

void
stop (void)
{
  struct err err = { 0 };
  int r;

  if (!served)
    return;
  nbd_hurry ();
  io_stop ();
  tell_read_errors ();
  exports_close_all ();
  r = stack_close (served, &err);
  served = NULL;
  if (r < 0)
    nbdkit_error ("closing the image: %s; what was not flushed before is lost",
                  err.code ? err.msg : strerror (-r));
}
