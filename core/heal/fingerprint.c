/* See fingerprint.h.
 *
 * The extension is rewritten in place by one small write that lies inside one
 * sector of the overlay's first, so that a crash leaves the old state or the new.
 */
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <zlib.h>

#include "base/cleanup.h"
#include "base/endian.h"
#include "base/num.h"
#include "fmt/header.h"
#include "heal/fingerprint.h"

#define VERSION_PLAIN 1
#define VERSION_STATE 2

enum { HAS_MTIME = 1, EDGES_UNREAD = 2, SAMPLES_UNREAD = 4 };

void
fingerprint_encode (const struct fingerprint *f, uint8_t buf[FINGERPRINT_LENGTH])
{
  bool plain = f->state == OVERLAY_PLAIN && !f->edges_unread && !f->samples_unread;

  store_be32 (buf, plain ? VERSION_PLAIN : VERSION_STATE);
  store_be32 (buf + 4, (f->has_mtime ? HAS_MTIME : 0) | (f->edges_unread ? EDGES_UNREAD : 0)
                       | (f->samples_unread ? SAMPLES_UNREAD : 0));
  store_be64 (buf + 8, f->source_size);
  store_be64 (buf + 16, f->mtime_sec);
  store_be32 (buf + 24, f->mtime_nsec);
  store_be32 (buf + 28, f->edges_crc);
  store_be32 (buf + 32, f->samples_crc);
  store_be32 (buf + 36, f->state);
}

/* false: made by a newer version. */
static bool
decode (const uint8_t buf[FINGERPRINT_LENGTH], struct fingerprint *f)
{
  uint32_t version = load_be32 (buf), state = version == VERSION_PLAIN ? 0 : load_be32 (buf + 36);
  uint32_t flags = load_be32 (buf + 4);

  f->has_mtime = flags & HAS_MTIME;
  f->edges_unread = flags & EDGES_UNREAD;
  f->samples_unread = flags & SAMPLES_UNREAD;
  f->source_size = load_be64 (buf + 8);
  f->mtime_sec = load_be64 (buf + 16);
  f->mtime_nsec = load_be32 (buf + 24);
  f->edges_crc = load_be32 (buf + 28);
  f->samples_crc = load_be32 (buf + 32);
  f->state = (enum overlay_state) state;
  return version >= VERSION_PLAIN && version <= VERSION_STATE && state <= OVERLAY_CACHE;
}

/* --- taking it */

#define EDGE       (UINT64_C (1) << 20)
#define NR_SAMPLES 256
#define SAMPLE     4096
#define NR_EDGES   2
#define MAX_RANGES (NR_EDGES + NR_SAMPLES)

/* What is looked at: the edges, then the samples, none past the end of d. */
static size_t
choose_ranges (struct bdev *d, struct bdev_range *ranges)
{
  uint64_t size = bdev_size (d);
  size_t nr = 0;

  ranges[nr++] = (struct bdev_range) { 0, MIN (EDGE, size) };
  ranges[nr++] = (struct bdev_range) { size > EDGE ? size - EDGE : 0, size > EDGE ? EDGE : 0 };
  for (uint64_t i = 1; size > 2 * EDGE && i <= NR_SAMPLES; ++i) {
    uint64_t off = size / (NR_SAMPLES + 1) * i;

    ranges[nr++] = (struct bdev_range) { off, MIN (SAMPLE, size - off) };
  }
  return nr;
}

struct summing {
  const struct bdev_range *ranges;
  uint32_t crcs[MAX_RANGES];    /* each written by one callback */
  bool unread[MAX_RANGES];      /* likewise */
  bool tolerant;                /* of bad sectors */
  pthread_mutex_t lock;
  struct err why;               /* protected by lock: of the first range that cannot be read */
};

static int
sum_range (void *opaque, size_t i, const void *buf, int r, const struct err *why)
{
  struct summing *s = opaque;

  if (r == 0) {
    s->crcs[i] = crc32 (0, buf, s->ranges[i].len);
    return 0;
  }
  if (r == -EIO && s->tolerant) {
    s->unread[i] = true;
    return 0;
  }
  LOCK_SCOPE (&s->lock);
  if (s->why.code == 0)
    s->why = *why;
  return r;
}

/* All ranges are asked for at once, for sources that are far; the checksums of each are
 * then put together in order, as if they had been read one after the other.
 */
static int
take_sums (struct bdev *d, bool tolerant, struct fingerprint *f, struct err *err)
{
  struct bdev_range ranges[MAX_RANGES];
  struct summing s = { .ranges = ranges, .tolerant = tolerant };
  size_t nr = choose_ranges (d, ranges);
  struct err why = { 0 };
  int r;

  pthread_mutex_init (&s.lock, NULL);
  r = bdev_read_many (d, ranges, nr, sum_range, &s, &why);
  pthread_mutex_destroy (&s.lock);
  if (r < 0)
    return err_set (err, -r, "%s", s.why.code ? s.why.msg : why.msg);
  f->edges_crc = f->samples_crc = 0;
  for (size_t i = 0; i < nr; ++i) {
    uint32_t *crc = i < NR_EDGES ? &f->edges_crc : &f->samples_crc;

    if (s.unread[i])
      *(i < NR_EDGES ? &f->edges_unread : &f->samples_unread) = true;
    *crc = crc32_combine (*crc, s.crcs[i], ranges[i].len);
  }
  return 0;
}

int
fingerprint_sums (struct bdev *d, struct fingerprint *f, struct err *err)
{
  return take_sums (d, false, f, err);
}

int
fingerprint_of_source (struct bdev *source, struct fingerprint *f, struct err *err)
{
  struct bdev_identity id;
  int r = bdev_identity (source, &id, err);

  if (r < 0)
    return r;
  *f = (struct fingerprint) { .source_size = bdev_size (source), .has_mtime = id.has_mtime };
  if (id.has_mtime) {
    f->mtime_sec = id.mtime.tv_sec;
    f->mtime_nsec = id.mtime.tv_nsec;
  }
  return take_sums (source, true, f, err);
}

/* --- reading it */

/* The extension of the overlay in file; *host_off stays 0 if it has none. */
static int
find_ext (struct bdev *file, struct header *h, uint64_t *host_off, struct err *err)
{
  CLEANUP_FREE uint8_t *cluster = NULL;
  uint8_t fixed[HEADER_FIXED_LENGTH];
  const struct header_ext *ext;
  int r = bdev_pread_padded (file, fixed, sizeof fixed, 0, err);

  if (r < 0)
    return r;
  header_decode (fixed, sizeof fixed, h);
  if (h->magic == 0)
    return err_set (err, ENODATA, "%s: there is no qcow2 header in it", file->name);
  if (header_usable (h, NULL) < 0)
    return 0;
  cluster = malloc (UINT64_C (1) << h->cluster_bits);
  if (!cluster)
    return err_set (err, ENOMEM, "out of memory");
  r = bdev_pread_padded (file, cluster, UINT64_C (1) << h->cluster_bits, 0, err);
  if (r == 0)
    r = header_decode_extensions (cluster, h, err);
  ext = r == 0 ? header_find_ext (h, FINGERPRINT_EXT) : NULL;
  if (ext && ext->len == FINGERPRINT_LENGTH)
    *host_off = ext->host_off;
  return r;
}

int
fingerprint_read (struct bdev *file, struct fingerprint *f, uint64_t *host_off,
                  struct err *err)
{
  struct header h = { 0 };
  uint8_t buf[FINGERPRINT_LENGTH];
  int r;

  *host_off = 0;
  r = find_ext (file, &h, host_off, err);
  header_reset (&h);
  if (r < 0)
    return r;
  if (*host_off == 0)
    return err_set (err, EINVAL, "%s: this is no overlay of this program.  It was left alone; "
                    "name a file that does not exist yet", file->name);
  r = bdev_pread (file, buf, sizeof buf, *host_off, err);
  if (r == 0 && !decode (buf, f))
    r = err_set (err, EINVAL, "%s: this overlay was made by a newer version (%u)",
                 file->name, load_be32 (buf));
  return r;
}

/* --- judging it */

static void
format_time (uint64_t sec, uint32_t nsec, char *buf, size_t len)
{
  time_t t = sec;
  struct tm tm;
  char s[64] = "?";

  if (gmtime_r (&t, &tm))
    strftime (s, sizeof s, "%Y-%m-%d %H:%M:%S", &tm);
  snprintf (buf, len, "%s.%09u UTC", s, nsec);
}

int
fingerprint_compare (const struct fingerprint *then, const struct fingerprint *now,
                     const char *path, const char *source, struct err *err)
{
  const char *what = then->state == OVERLAY_CACHE ? "cache" : "overlay";
  char a[96], b[96];

  if (then->source_size != now->source_size)
    return err_set (err, EINVAL, "%s: this %s belongs to an image of %" PRIu64 " bytes, but "
                    "%s has %" PRIu64 ".  Name the image that it was made for, or another %s",
                    path, what, then->source_size, source, now->source_size, what);
  if ((then->edges_crc != now->edges_crc && !then->edges_unread && !now->edges_unread)
      || (then->samples_crc != now->samples_crc && !then->samples_unread && !now->samples_unread))
    return err_set (err, EINVAL, "%s: this %s was made for an image with other contents than "
                    "%s has now: it is another image, or it was written to since.  Name the "
                    "right image; if this one was changed on purpose (committed, for example), "
                    "use a new %s", path, what, source, what);
  if (then->has_mtime && now->has_mtime
      && (then->mtime_sec != now->mtime_sec || then->mtime_nsec != now->mtime_nsec)) {
    format_time (then->mtime_sec, then->mtime_nsec, a, sizeof a);
    format_time (now->mtime_sec, now->mtime_nsec, b, sizeof b);
    return err_set (err, EINVAL, "%s: %s was changed at %s, after this %s was made over it "
                    "(then: %s), so the %s no longer fits.  If you are certain that the "
                    "bytes are the same (a plain copy): touch -d '%s' %s",
                    path, source, b, what, a, what, a, source);
  }
  return 0;
}

int
fingerprint_refuse_state (const struct fingerprint *f, const char *path, const char *source,
                          struct err *err)
{
  if (f->state == OVERLAY_PLAIN)
    return err_set (err, EINVAL, "%s: this is an overlay, and no cache of what was read from %s.  Name "
                    "it with overlay=, and a file that does not exist yet with cache=", path, source);
  if (f->state == OVERLAY_CACHE)
    return err_set (err, EINVAL, "%s: this is a cache of what was read from %s, and no overlay.  Name it "
                    "with cache=, and a file that does not exist yet with overlay=", path, source);
  if (f->state == OVERLAY_COMMITTING)
    return err_set (err, EINVAL, "%s: this overlay is being written into %s, which was cut off: "
                    "only both together are whole.  Add inplace=true to finish that", path, source);
  return err_set (err, EINVAL, "%s: this overlay has been written into %s already; remove it, "
                  "or name a file that does not exist yet", path, source);
}
