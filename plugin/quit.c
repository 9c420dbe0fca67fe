/* The beginning of the end: see plugin.h.
 *
 * When nbdkit is told to end, it first waits for its workers, and these may wait for a server that
 * is gone, for as long as reconnect= says.  nbdkit has no callback for that moment, so its signal
 * handlers get company: ours tells the far devices to hurry, then calls nbdkit's own.
 */
#include <signal.h>
#include <string.h>

#include "dev/nbd.h"
#include "plugin/plugin.h"

static const int signals[] = { SIGINT, SIGQUIT, SIGTERM, SIGHUP };

#define NR_SIGNALS (sizeof signals / sizeof signals[0])

static struct sigaction nbdkits[NR_SIGNALS];
static bool watched[NR_SIGNALS];

static void
quit (int sig, siginfo_t *info, void *context)
{
  nbd_hurry ();
  for (size_t i = 0; i < NR_SIGNALS; ++i) {
    if (signals[i] != sig)
      continue;
    if (nbdkits[i].sa_flags & SA_SIGINFO)
      nbdkits[i].sa_sigaction (sig, info, context);
    else
      nbdkits[i].sa_handler (sig);
  }
}

int
quit_watch (void)
{
  for (size_t i = 0; i < NR_SIGNALS; ++i) {
    struct sigaction sa;

    /* What nbdkit does not handle, or ignores, is none of our business. */
    if (sigaction (signals[i], NULL, &nbdkits[i]) == -1
        || (!(nbdkits[i].sa_flags & SA_SIGINFO)
            && (nbdkits[i].sa_handler == SIG_DFL || nbdkits[i].sa_handler == SIG_IGN)))
      continue;
    sa = nbdkits[i];
    sa.sa_flags |= SA_SIGINFO;
    sa.sa_sigaction = quit;
    watched[i] = sigaction (signals[i], &sa, NULL) == 0;
  }
  return 0;
}

void
quit_unwatch (void)
{
  for (size_t i = 0; i < NR_SIGNALS; ++i)
    if (watched[i])
      sigaction (signals[i], &nbdkits[i], NULL);
}
