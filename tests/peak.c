/* peak [-v MIB] FILE COMMAND [ARG...]
 *
 * Runs the command and writes to FILE how many milliseconds it took, the largest
 * resident set of it or of any of its children, in KiB, and the CPU seconds of all
 * of them.  With -v it and
 * its children get no more than that much address space.  Ends as the command
 * does; 128 + signal if that killed it.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static int64_t
now_us (void)
{
  struct timespec ts;

  clock_gettime (CLOCK_MONOTONIC, &ts);
  return (int64_t) ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

static double
seconds (struct timeval t)
{
  return t.tv_sec + t.tv_usec / 1e6;
}

int
main (int argc, char **argv)
{
  struct rusage ru;
  int64_t begun;
  FILE *fp;
  pid_t pid;
  int status;

  if (argc > 2 && strcmp (argv[1], "-v") == 0) {
    struct rlimit limit = { .rlim_cur = strtoull (argv[2], NULL, 0) << 20 };

    limit.rlim_max = limit.rlim_cur;
    if (setrlimit (RLIMIT_AS, &limit) == -1) {
      perror ("peak: setrlimit");
      return 126;
    }
    argv += 2;
    argc -= 2;
  }
  if (argc < 3) {
    fprintf (stderr, "peak [-v MIB] FILE COMMAND [ARG...]\n");
    return 126;
  }
  begun = now_us ();
  pid = fork ();
  if (pid == 0) {
    execvp (argv[2], argv + 2);
    perror (argv[2]);
    _exit (127);
  }
  if (pid == -1 || wait4 (pid, &status, 0, &ru) == -1) {
    perror ("peak");
    return 126;
  }
  fp = fopen (argv[1], "w");
  if (fp == NULL || fprintf (fp, "%.1f %ld %.3f\n", (now_us () - begun) / 1000.0, ru.ru_maxrss,
               seconds (ru.ru_utime) + seconds (ru.ru_stime)) < 0 || fclose (fp) == EOF) {
    perror (argv[1]);
    return 126;
  }
  return WIFSIGNALED (status) ? 128 + WTERMSIG (status) : WEXITSTATUS (status);
}
