/* The fuzzer's target without the fuzzer:
 *
 *     replay FILE...           run these inputs; ends with SIGABRT if a promise is broken
 *     replay --random N SEED   run N random inputs; the one that breaks a promise becomes random.input
 *     replay --base I OUT      write the I-th base image; exit 1 if there are not so many
 *     replay --damaged FILE OUT    write the damaged image of one
 *     replay --healed FILE OUT run one, and write what is left of the image, if it is said to be sound
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/num.h"
#include "bases.h"
#include "fuzz-image.h"

static FILE *
must_open (const char *path, const char *mode)
{
  FILE *fp = fopen (path, mode);

  if (!fp) {
    perror (path);
    exit (2);
  }
  return fp;
}

static const char *out_path;
static bool healed;

static void
save (struct bdev *d)
{
  static uint8_t buf[65536];
  FILE *fp = must_open (out_path, "wb");
  uint64_t size = MIN (bdev_size (d), UINT64_C (64) << 20);

  for (uint64_t off = 0; off < size; off += sizeof buf) {
    size_t n = MIN (size - off, sizeof buf);

    if (bdev_pread (d, buf, n, off, NULL) < 0 || fwrite (buf, 1, n, fp) != n)
      exit (2);
  }
  if (fclose (fp) != 0)
    exit (2);
}

static void
replay (const char *path)
{
  static uint8_t input[4096];
  FILE *fp = must_open (path, "rb");
  size_t n = fread (input, 1, sizeof input, fp);

  fclose (fp);
  fprintf (stderr, "%s\n", path);
  if (n < 2)
    return;
  if (out_path && !healed) {
    struct bdev *d = fuzz_damaged (input, n);

    save (d);
    bdev_unref (d);
  }
  else
    fuzz_image (input, n, out_path ? save : NULL);
}

static uint64_t
next_random (uint64_t *state)
{
  uint64_t x = *state += UINT64_C (0x9e3779b97f4a7c15);

  x = (x ^ x >> 30) * UINT64_C (0xbf58476d1ce4e5b9);
  return x ^ x >> 31;
}

static uint8_t data[2 + 12 * 12];
static size_t len;

static void
keep_input (int sig)
{
  FILE *fp = must_open ("random.input", "wb");

  fwrite (data, 1, len, fp);
  fclose (fp);
}

static void
replay_random (unsigned n, uint64_t seed)
{
  signal (SIGABRT, keep_input);
  for (unsigned i = 0; i < n; ++i) {
    len = 2 + 12 * (next_random (&seed) % 13);

    for (size_t j = 0; j < len; ++j) {
      data[j] = next_random (&seed) >> 24;
      /* Small values mean more. */
      if (j > 2 && (j - 2) % 12 > 4 && (next_random (&seed) >> 24) % 4)
        data[j] = 0;
    }
    fuzz_image (data, len, NULL);
  }
}

int
main (int argc, char **argv)
{
  if (argc == 4 && strcmp (argv[1], "--random") == 0)
    replay_random (atoi (argv[2]), atoi (argv[3]));
  else if (argc == 4 && strcmp (argv[1], "--base") == 0) {
    unsigned i = atoi (argv[2]);
    FILE *fp;

    if (i >= nr_bases)
      return 1;
    fp = must_open (argv[3], "wb");
    if (fwrite (base_get (i)->bytes, base_get (i)->len, 1, fp) != 1 || fclose (fp) != 0)
      return 2;
  }
  else if (argc == 4 && (strcmp (argv[1], "--damaged") == 0 || strcmp (argv[1], "--healed") == 0)) {
    healed = argv[1][2] == 'h';
    out_path = argv[3];
    replay (argv[2]);
  }
  else
    for (int i = 1; i < argc; ++i)
      replay (argv[i]);
  return 0;
}
