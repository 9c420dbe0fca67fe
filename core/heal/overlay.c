/* See overlay.h.
 *
 * outer_guest_off == inner_host_off: what the damaged image calls a host offset
 * is a guest offset of the overlay.  Nothing is translated; this file only
 * builds the composition image (file overlay, backing source).
 *
 * An overlay remembers its source in a private header extension: length, time of
 * the last change where the source has one, and checksums of the first and last
 * MiB and of 256 samples between them.  Laid over other bytes than those it was made
 * from, it would be a new way to destroy a disk, so any difference is refused.
 * LIMIT: on a block device, which has no usable time, a change outside the
 * sampled bytes goes unnoticed.
 *
 * I1: the source is only ever read here.  A new overlay appears under its name
 * when it is whole and durable, or not at all.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <zlib.h>

#include "base/cleanup.h"
#include "base/endian.h"
#include "base/num.h"
#include "check/check.h"
#include "dev/file.h"
#include "dev/mem.h"
#include "heal/overlay.h"
#include "img/image.h"

#define OVERLAY_EXT          UINT32_C (0x71637266)      /* "qcrf" */
#define OVERLAY_EXT_VERSION  1
#define OVERLAY_CLUSTER_BITS 16

/* Fields of the extension, big-endian, in this order. */
struct fingerprint {
  uint32_t version;
  uint32_t has_mtime;
  uint64_t source_size;         /* bytes */
  uint64_t mtime_sec;
  uint32_t mtime_nsec;
  uint32_t edges_crc;           /* first and last MiB */
  uint32_t samples_crc;
};
#define FINGERPRINT_LENGTH 40

static void
fingerprint_encode (const struct fingerprint *f, uint8_t buf[FINGERPRINT_LENGTH])
{
  memset (buf, 0, FINGERPRINT_LENGTH);
  store_be32 (buf, f->version);
  store_be32 (buf + 4, f->has_mtime);
  store_be64 (buf + 8, f->source_size);
  store_be64 (buf + 16, f->mtime_sec);
  store_be32 (buf + 24, f->mtime_nsec);
  store_be32 (buf + 28, f->edges_crc);
  store_be32 (buf + 32, f->samples_crc);
}

static void
fingerprint_decode (const uint8_t buf[FINGERPRINT_LENGTH], struct fingerprint *f)
{
  f->version = load_be32 (buf);
  f->has_mtime = load_be32 (buf + 4);
  f->source_size = load_be64 (buf + 8);
  f->mtime_sec = load_be64 (buf + 16);
  f->mtime_nsec = load_be32 (buf + 24);
  f->edges_crc = load_be32 (buf + 28);
  f->samples_crc = load_be32 (buf + 32);
}

static int
crc_range (struct bdev *d, uint64_t off, uint64_t len, uint8_t *buf, uint32_t *crc,
           struct err *err)
{
  int r;

  if (off >= bdev_size (d))
    return 0;
  len = MIN (len, bdev_size (d) - off);
  r = bdev_pread (d, buf, len, off, err);
  if (r == 0)
    *crc = crc32 (*crc, buf, len);
  return r;
}

#define EDGE       (UINT64_C (1) << 20)
#define NR_SAMPLES 256
#define SAMPLE     4096

static int
fingerprint_take (struct bdev *source, struct fingerprint *f, struct err *err)
{
  CLEANUP_FREE uint8_t *buf = malloc (EDGE);
  uint64_t size = bdev_size (source);
  struct file_identity id;
  int r;

  if (!buf)
    return err_set (err, ENOMEM, "out of memory");
  *f = (struct fingerprint) { .version = OVERLAY_EXT_VERSION, .source_size = size };
  r = file_identity (source, &id, err);
  if (r < 0)
    return r;
  f->has_mtime = id.has_mtime;
  if (id.has_mtime) {
    f->mtime_sec = id.mtime.tv_sec;
    f->mtime_nsec = id.mtime.tv_nsec;
  }
  r = crc_range (source, 0, EDGE, buf, &f->edges_crc, err);
  if (r == 0 && size > EDGE)
    r = crc_range (source, size - EDGE, EDGE, buf, &f->edges_crc, err);
  for (uint64_t i = 1; r == 0 && size > 2 * EDGE && i <= NR_SAMPLES; ++i)
    r = crc_range (source, size / (NR_SAMPLES + 1) * i, SAMPLE, buf, &f->samples_crc, err);
  return r;
}

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

static int
fingerprint_compare (const struct fingerprint *then, const struct fingerprint *now,
                     const char *path, const char *source, struct err *err)
{
  char a[96], b[96];

  if (then->version != OVERLAY_EXT_VERSION)
    return err_set (err, EINVAL, "%s: this overlay was made by a newer version (%u)",
                    path, then->version);
  if (then->source_size != now->source_size)
    return err_set (err, EINVAL, "%s: this overlay belongs to an image of %" PRIu64 " bytes, but "
                    "%s has %" PRIu64 ".  Name the image that it was made for, or another overlay",
                    path, then->source_size, source, now->source_size);
  if (then->edges_crc != now->edges_crc || then->samples_crc != now->samples_crc)
    return err_set (err, EINVAL, "%s: this overlay was made for an image with other contents than "
                    "%s has now: it is another image, or it was written to since.  Name the "
                    "right image; if this one was changed on purpose (committed, for example), "
                    "use a new overlay", path, source);
  if (then->has_mtime && now->has_mtime
      && (then->mtime_sec != now->mtime_sec || then->mtime_nsec != now->mtime_nsec)) {
    format_time (then->mtime_sec, then->mtime_nsec, a, sizeof a);
    format_time (now->mtime_sec, now->mtime_nsec, b, sizeof b);
    return err_set (err, EINVAL, "%s: %s was changed at %s, after this overlay was made over it "
                    "(then: %s), so the overlay no longer fits.  If you are certain that the "
                    "bytes are the same (a plain copy): touch -d '%s' %s",
                    path, source, b, a, a, source);
  }
  return 0;
}

/* --- making one */

/* A header name that QEMU takes for a plain file, from wherever it is started:
 * relative if both lie in one directory (they can then be moved together).
 */
static char *
backing_name (const char *overlay_path, const char *source_path)
{
  CLEANUP_FREE char *source = realpath (source_path, NULL);
  CLEANUP_FREE char *overlay = strdup (overlay_path);
  CLEANUP_FREE char *dir = overlay ? realpath (dirname (overlay), NULL) : NULL;
  char *slash, *name = NULL;

  if (!source || !dir)
    return NULL;
  slash = strrchr (source, '/');
  if (strlen (dir) == (size_t) (slash - source) && !strncmp (dir, source, slash - source)) {
    /* "a:b" would be protocol "a". */
    if (asprintf (&name, "%s%s", strchr (slash + 1, ':') ? "./" : "", slash + 1) < 0)
      name = NULL;
    return name;
  }
  return strdup (source);
}

static int
create_on (struct bdev *file, struct bdev *source, const struct overlay_options *opts,
           const char *name, struct err *err)
{
  uint8_t ext[FINGERPRINT_LENGTH];
  struct fingerprint f;
  struct image_params p = {
    .version = 3, .cluster_bits = OVERLAY_CLUSTER_BITS, .refcount_order = 4,
    /* QEMU counts disks in sectors of 512 bytes. */
    .size = ROUND_UP (bdev_size (source), 512),
    .max_size = MAX (opts->max_size, ROUND_UP (bdev_size (source), 512)),
    .backing_name = name, .backing_format = name ? "raw" : NULL,
  };
  int r = 0;

  if (name) {
    r = fingerprint_take (source, &f, err);
    fingerprint_encode (&f, ext);
    p.private_ext_type = OVERLAY_EXT;
    p.private_ext = ext;
    p.private_ext_len = sizeof ext;
  }
  if (r == 0)
    r = image_create (file, &p, err);
  return r;
}

static int
publish (const char *tmp, const char *path, struct err *err)
{
  CLEANUP_FREE char *copy = strdup (path);
  int fd;

  if (renameat2 (AT_FDCWD, tmp, AT_FDCWD, path, RENAME_NOREPLACE) < 0
      && (errno != EINVAL || link (tmp, path) < 0 || unlink (tmp) < 0))
    return err_set (err, errno, "%s: cannot create the overlay: %m", path);
  fd = copy ? open (dirname (copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
  if (fd >= 0) {
    fsync (fd);         /* best effort: not every file system can sync a directory */
    close (fd);
  }
  return 0;
}

/* The overlay is to hold the guest's data: who may not read the image may not
 * read that either.
 */
static int
copy_mode (const char *tmp, const char *source_path, struct err *err)
{
  struct stat source, st;

  if (stat (source_path, &source) < 0 || stat (tmp, &st) < 0
      || chmod (tmp, st.st_mode & (source.st_mode | S_IRUSR | S_IWUSR) & 0777) < 0)
    return err_set (err, errno, "%s: cannot set the permissions: %m", tmp);
  return 0;
}

static int
create_file (const char *path, struct bdev *source, const struct overlay_options *opts,
             struct err *err)
{
  CLEANUP_FREE char *name = backing_name (path, opts->source_path);
  CLEANUP_FREE char *tmp = NULL;
  struct bdev *file = NULL;
  int r;

  if (!name)
    return err_set (err, errno ? errno : ENOMEM, "%s: cannot create the overlay: %m", path);
  if (asprintf (&tmp, "%s.%ld.new", path, (long) getpid ()) < 0) {
    tmp = NULL;
    return err_set (err, ENOMEM, "out of memory");
  }
  r = file_create (tmp, &file, err);
  if (r < 0)
    return r;
  r = copy_mode (tmp, opts->source_path, err);
  if (r == 0)
    r = create_on (file, source, opts, name, err);
  bdev_unref (file);
  if (r == 0)
    r = publish (tmp, path, err);
  if (r < 0)
    unlink (tmp);
  return r;
}

/* --- using one */

static int
read_fingerprint (struct bdev *file, const struct check *c, struct fingerprint *f,
                  struct err *err)
{
  const struct header_ext *ext = header_find_ext (&c->header, OVERLAY_EXT);
  uint8_t buf[FINGERPRINT_LENGTH];
  int r;

  if (!ext || ext->len != FINGERPRINT_LENGTH)
    return err_set (err, EINVAL, "%s: this is a qcow2 image, but no overlay of this program.  "
                    "It was left alone; name a file that does not exist yet", file->name);
  r = bdev_pread (file, buf, sizeof buf, ext->host_off, err);
  if (r == 0)
    fingerprint_decode (buf, f);
  return r;
}

/* Is the file a sound overlay made for source? */
static int
judge_existing (struct bdev *file, struct bdev *source, struct err *err)
{
  struct fingerprint then = { 0 }, now = { 0 };
  struct check_options copts = { .memory_limit = 0 };
  struct check *c = NULL;
  int r = check_run (file, &copts, &c, err);

  if (r < 0) {
    err_prefix (err, "%s: the overlay cannot be used", file->name);
    return r;
  }
  r = read_fingerprint (file, c, &then, err);
  if (r == 0)
    r = fingerprint_take (source, &now, err);
  if (r == 0)
    r = fingerprint_compare (&then, &now, file->name, source->name, err);
  if (r == 0 && !check_sound (c))
    r = err_set (err, EINVAL, "%s: the overlay itself is damaged.  Look at it with `qemu-img "
                 "check'; the image under it is untouched, so a new overlay can be made, which "
                 "loses what was written into this one", file->name);
  check_free (c);
  return r;
}

static int
compose (struct bdev *file, struct bdev *source, const struct overlay_options *opts,
         struct bdev **healed, struct err *err)
{
  struct image_options iopts = { .backing = source, .cache_size = opts->cache_size };
  int r = image_open (file, &iopts, healed, err);

  if (r == 0)
    image_set_growable (*healed, source->can_grow);
  return r;
}

int
overlay_open (const char *path, struct bdev *source, const struct overlay_options *opts,
              struct bdev **healed, bool *created, struct err *err)
{
  bool absent = access (path, F_OK) < 0;
  struct bdev *file = NULL;
  int r = 0;

  *created = false;
  if (absent)
    r = create_file (path, source, opts, err);
  if (r == 0)
    r = file_open (path, FILE_WRITE, &file, err);
  /* Not before it is locked: what bears the name until then may be another's,
   * started at the same time, and the caller removes what it has created.
   */
  if (r == 0)
    *created = absent;
  if (r == 0 && !absent)
    r = judge_existing (file, source, err);
  if (r == 0)
    r = compose (file, source, opts, healed, err);
  bdev_unref (file);
  return r;
}

int
overlay_in_memory (struct bdev *source, const struct overlay_options *opts,
                   struct bdev **healed, struct err *err)
{
  struct bdev *mem = NULL;
  int r = mem_new ("overlay in memory", 0, true, &mem, err);

  if (r == 0)
    r = create_on (mem, source, opts, NULL, err);
  if (r == 0)
    r = compose (mem, source, opts, healed, err);
  bdev_unref (mem);
  return r;
}
