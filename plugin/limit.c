/* A limit of file sizes (RLIMIT_FSIZE, LimitFSIZE= of systemd): see plugin.h.
 *
 * Whoever makes a file longer than that gets an error, but not if SIGXFSZ ended the process before.
 * One guest's write would take the disk away from all.  A handler that does nothing prevents it; ignoring
 * the signal would do so for the programs that nbdkit runs as well.
 *
 * Only while it is served: until then nobody depends on the process, and being killed is safe.
 */
#include <signal.h>
#include <string.h>

#include "plugin/plugin.h"

static bool watched;

static void
nothing (int sig)
{
}

void
limit_watch (void)
{
  struct sigaction sa;

  if (sigaction (SIGXFSZ, NULL, &sa) == -1 || sa.sa_flags & SA_SIGINFO || sa.sa_handler != SIG_DFL)
    return;
  memset (&sa, 0, sizeof sa);
  sa.sa_handler = nothing;
  sa.sa_flags = SA_RESTART;
  watched = sigaction (SIGXFSZ, &sa, NULL) == 0;
}

void
limit_unwatch (void)
{
  if (watched)
    signal (SIGXFSZ, SIG_DFL);
  watched = false;
}
