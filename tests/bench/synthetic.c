/* synthetic [-a] [-s] CLUSTER_BITS DISK_BITS
 *
 * Checks a full, sound image of 2^DISK_BITS bytes that exists nowhere: a block
 * device makes each byte of its metadata when it is read.  So a check of 1 PiB can
 * be measured on any machine, without a file system that holds it, and nothing but
 * the check and that device is in the figures.
 *
 *   -s  scattered: the clusters of each L2 table lie in no order, the way a disk
 *       looks that was written at random; without it they lie in a row
 *   -a  the device alone: read all tables, check nothing.  What is left of the
 *       check's time is the check's
 *
 * Prints one JSON object: seconds, CPU seconds, bytes of metadata.  Exit 1 if the
 * check does not find the image sound.
 *
 * The layout, in clusters: header, refcount table, L1 table, refcount blocks, L2
 * tables, data.  Each is a row of clusters, so every table entry is a sum.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/endian.h"
#include "base/num.h"
#include "check/check.h"
#include "dev/bdev.h"
#include "dev/many.h"
#include "fmt/format.h"
#include "fmt/header.h"

#define REFCOUNT_ORDER   4      /* 16 bits, as qemu-img makes them */
#define REFCOUNTS_A_WORD 4
#define MAP_LIMIT        (UINT64_C (1) << 40)   /* the limit is the machine's memory */
#define HEADER_BYTES     512
#define SCATTER          5      /* odd: i * SCATTER modulo a power of two hits each once */

/* What lies in a row of clusters. */
enum part { RT, L1, RB, L2, DATA, NR_PARTS };

struct row {
  uint64_t first, nr;           /* clusters */
};

struct synthetic {
  struct bdev d;
  /* constant after synthetic_init */
  unsigned bits;                /* log2 of the cluster size */
  bool scattered;
  uint64_t clusters;            /* of the whole file */
  uint64_t in_table;            /* entries of an L2 table, a power of two */
  struct row row[NR_PARTS];
  uint8_t header[HEADER_BYTES];
};

/* --- the device */

static uint64_t
l2_entry (const struct synthetic *s, uint64_t i)
{
  uint64_t mask = s->in_table - 1;

  if (s->scattered)
    i = (i & ~mask) | (i * SCATTER & mask);
  return ENTRY_COPIED | (s->row[DATA].first + i) << s->bits;
}

/* Four refcounts: one for each cluster of the file. */
static uint64_t
refcount_word (const struct synthetic *s, uint64_t i)
{
  uint64_t first = i * REFCOUNTS_A_WORD, word = 0;

  if (first + REFCOUNTS_A_WORD <= s->clusters)
    return UINT64_C (0x0001000100010001);
  for (uint64_t j = 0; j < REFCOUNTS_A_WORD && first + j < s->clusters; ++j)
    word |= UINT64_C (1) << (48 - 16 * j);
  return word;
}

/* The ith 8 bytes of a part, as a number. */
static inline uint64_t
word_of (const struct synthetic *s, enum part p, uint64_t i)
{
  switch (p) {
  case RT: return i < s->row[RB].nr ? (s->row[RB].first + i) << s->bits : 0;
  case L1: return i < s->row[L2].nr ? ENTRY_COPIED | (s->row[L2].first + i) << s->bits : 0;
  case RB: return refcount_word (s, i);
  case L2: return l2_entry (s, i);
  default: return 0;
  }
}

/* Whole words; apart for each part, so that the compiler sees a constant. */
static void
fill_words (const struct synthetic *s, enum part p, uint8_t *buf, uint64_t first, uint64_t nr)
{
#define FILL(P)                                                 \
  case P:                                                       \
    for (uint64_t i = 0; i < nr; ++i)                           \
      store_be64 (buf + i * 8, word_of (s, P, first + i));      \
    break
  switch (p) {
  FILL (RT);
  FILL (L1);
  FILL (RB);
  FILL (L2);
  default: memset (buf, 0, nr * 8);
  }
#undef FILL
}

/* len bytes at byte off of a part; neither need be a multiple of 8. */
static void
fill (const struct synthetic *s, enum part p, uint8_t *buf, uint64_t off, uint64_t len)
{
  while (len > 0) {
    uint64_t skip = off % 8, n = MIN (len, 8 - skip);
    uint8_t word[8];

    if (skip == 0 && len >= 8) {
      n = ROUND_DOWN (len, 8);
      fill_words (s, p, buf, off / 8, n / 8);
    }
    else {
      fill_words (s, p, word, off / 8, 1);
      memcpy (buf, word + skip, n);
    }
    buf += n;
    off += n;
    len -= n;
  }
}

static void
fill_header (const struct synthetic *s, uint8_t *buf, uint64_t off, uint64_t len)
{
  uint64_t n = off < HEADER_BYTES ? MIN (len, HEADER_BYTES - off) : 0;

  memcpy (buf, s->header + (n ? off : 0), n);
  memset (buf + n, 0, len - n);
}

static int
synthetic_pread (struct bdev *d, void *vbuf, size_t len, uint64_t off, struct err *err)
{
  const struct synthetic *s = (const struct synthetic *) d;
  uint8_t *buf = vbuf;

  while (len > 0) {
    uint64_t start = 0, end = UINT64_C (1) << s->bits, n;
    int p;

    /* Which row: -1 is the header, one cluster. */
    for (p = -1; off >= end; ) {
      const struct row *r = &s->row[++p];

      start = r->first << s->bits;
      end = (r->first + r->nr) << s->bits;
    }
    n = MIN (len, end - off);
    if (p < 0)
      fill_header (s, buf, off, n);
    else
      fill (s, p, buf, off - start, n);
    buf += n;
    off += n;
    len -= n;
  }
  return 0;
}

static void
synthetic_close (struct bdev *d)
{
  free (d);
}

static const struct bdev_ops synthetic_ops = {
  .kind = "synthetic",
  .pread = synthetic_pread,
  .read_many = many_read,
  .close = synthetic_close,
};

/* --- its layout */

static uint64_t
per_cluster (unsigned bits, uint64_t n)
{
  return DIV_ROUND_UP (n, (UINT64_C (1) << bits) / 8);
}

/* Refcount blocks count themselves and their table, so they are made more until
 * they are enough.
 */
static void
lay_out (struct synthetic *s, unsigned disk_bits)
{
  uint64_t in_block = (UINT64_C (1) << s->bits) * 8 >> REFCOUNT_ORDER;
  uint64_t needed = 0;

  s->row[DATA].nr = UINT64_C (1) << (disk_bits - s->bits);
  s->row[L2].nr = s->row[DATA].nr / s->in_table;
  s->row[L1].nr = per_cluster (s->bits, s->row[L2].nr);
  do {
    s->row[RB].nr = needed;
    s->row[RT].nr = MAX (per_cluster (s->bits, needed), UINT64_C (1));
    s->clusters = 1;
    for (int p = 0; p < NR_PARTS; ++p) {
      s->row[p].first = s->clusters;
      s->clusters += s->row[p].nr;
    }
    needed = DIV_ROUND_UP (s->clusters, in_block);
  } while (needed > s->row[RB].nr);
}

static void
make_header (struct synthetic *s, unsigned disk_bits)
{
  uint8_t *h = s->header;

  store_be32 (h + HEADER_OFF_MAGIC, HEADER_MAGIC);
  store_be32 (h + HEADER_OFF_VERSION, 3);
  store_be32 (h + HEADER_OFF_CLUSTER_BITS, s->bits);
  store_be64 (h + HEADER_OFF_SIZE, UINT64_C (1) << disk_bits);
  store_be32 (h + HEADER_OFF_L1_SIZE, s->row[L2].nr);
  store_be64 (h + HEADER_OFF_L1_TABLE, s->row[L1].first << s->bits);
  store_be64 (h + HEADER_OFF_RT, s->row[RT].first << s->bits);
  store_be32 (h + HEADER_OFF_RT_CLUSTERS, s->row[RT].nr);
  store_be32 (h + HEADER_OFF_REFCOUNT_ORDER, REFCOUNT_ORDER);
  store_be32 (h + HEADER_OFF_HEADER_LENGTH, HEADER_V3_MIN_LENGTH);
}

static struct synthetic *
synthetic_new (unsigned cluster_bits, unsigned disk_bits, bool scattered)
{
  struct synthetic *s = calloc (1, sizeof *s);
  struct err err = { 0 };

  if (s == NULL)
    return NULL;
  s->bits = cluster_bits;
  s->in_table = UINT64_C (1) << (cluster_bits - 3);
  s->scattered = scattered;
  lay_out (s, disk_bits);
  make_header (s, disk_bits);
  if (bdev_init (&s->d, &synthetic_ops, "synthetic", s->clusters << cluster_bits,
                 false, false, &err) < 0) {
    free (s);
    return NULL;
  }
  return s;
}

/* --- what is measured */

static int
look_at_nothing (void *opaque, size_t index, const void *buf, int r, const struct err *why)
{
  return 0;
}

/* Refcount blocks and L2 tables, one range a cluster, as the check reads them. */
static int
read_all (struct synthetic *s, struct err *err)
{
  uint64_t first = s->row[RB].first, nr = s->row[RB].nr + s->row[L2].nr;
  struct bdev_range *ranges = calloc (nr, sizeof *ranges);
  int r;

  if (ranges == NULL)
    return err_set (err, ENOMEM, "no memory for %" PRIu64 " ranges", nr);
  for (uint64_t i = 0; i < nr; ++i) {
    ranges[i].off = (first + i) << s->bits;
    ranges[i].len = (size_t) 1 << s->bits;
  }
  r = bdev_read_many (&s->d, ranges, nr, look_at_nothing, NULL, err);
  free (ranges);
  return r;
}

/* 0 if it is found sound, and every cluster was seen. */
static int
check_all (struct synthetic *s, struct err *err)
{
  struct check_options opts = { .memory_limit = MAP_LIMIT };
  struct check *c;
  int r = check_run (&s->d, &opts, &c, err);

  if (r < 0)
    return r;
  if (findings_any (&c->findings, SEV_NOTE) ||
      c->stats.allocated_clusters != s->row[DATA].nr)
    r = err_set (err, EINVAL, "the image is not what it should be");
  check_free (c);
  return r;
}

static double
seconds (struct timespec t)
{
  return t.tv_sec + t.tv_nsec / 1e9;
}

static double
now (clockid_t clock)
{
  struct timespec t;

  clock_gettime (clock, &t);
  return seconds (t);
}

static void
print_result (const struct synthetic *s, double wall, double cpu)
{
  printf ("{\"seconds\": %.4f, \"cpu_s\": %.4f, \"bytes\": %" PRIu64 "}\n",
          wall, cpu, s->row[DATA].first << s->bits);
}

static void
usage (void)
{
  fprintf (stderr, "synthetic [-a] [-s] CLUSTER_BITS DISK_BITS\n");
  exit (2);
}

int
main (int argc, char **argv)
{
  bool alone = false, scattered = false;
  struct err err = { 0 };
  struct synthetic *s;
  unsigned bits, disk_bits;
  double wall, cpu;
  int opt, r;

  while ((opt = getopt (argc, argv, "as")) != -1) {
    switch (opt) {
    case 'a': alone = true; break;
    case 's': scattered = true; break;
    default: usage ();
    }
  }
  if (argc - optind != 2)
    usage ();
  bits = strtoul (argv[optind], NULL, 10);
  disk_bits = strtoul (argv[optind + 1], NULL, 10);
  /* Whole L2 tables only. */
  if (bits < MIN_CLUSTER_BITS || bits > MAX_CLUSTER_BITS ||
      disk_bits > 55 || disk_bits < 2 * bits - 3)
    usage ();
  s = synthetic_new (bits, disk_bits, scattered);
  if (s == NULL) {
    perror ("synthetic");
    return 1;
  }
  wall = now (CLOCK_MONOTONIC);
  cpu = now (CLOCK_PROCESS_CPUTIME_ID);
  r = alone ? read_all (s, &err) : check_all (s, &err);
  wall = now (CLOCK_MONOTONIC) - wall;
  cpu = now (CLOCK_PROCESS_CPUTIME_ID) - cpu;
  if (r < 0)
    fprintf (stderr, "synthetic: %s\n", err.msg);
  else
    print_result (s, wall, cpu);
  bdev_unref (&s->d);
  return r < 0;
}
