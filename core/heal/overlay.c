/* See overlay.h.
 *
 * outer_guest_off == inner_host_off: what the damaged image calls a host offset
 * is a guest offset of the overlay.  Nothing is translated; this file only
 * builds the composition image (file overlay, backing source).
 *
 * An overlay remembers its source in a private header extension (fingerprint.h).
 * Laid over other bytes than those it was made from, it would be a new way to
 * destroy a disk, so any difference is refused.
 *
 * I1: the source is only ever read here.  A new overlay appears under its name
 * when it is whole and durable, or not at all.
 */
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "check/check.h"
#include "dev/file.h"
#include "dev/mem.h"
#include "dev/nbd.h"
#include "heal/fingerprint.h"
#include "heal/overlay.h"
#include "img/image.h"

/* --- making one */

/* A header name that QEMU takes for a plain file, from wherever it is started:
 * relative if both lie in one directory (they can then be moved together).  The URI of an NBD
 * export is one that QEMU understands as it is.
 */
static char *
backing_name (const char *overlay_path, const char *source_path)
{
  CLEANUP_FREE char *source = nbd_is_uri (source_path) ? NULL : realpath (source_path, NULL);
  CLEANUP_FREE char *overlay = strdup (overlay_path);
  CLEANUP_FREE char *dir = overlay ? realpath (dirname (overlay), NULL) : NULL;
  char *slash, *name = NULL;

  if (nbd_is_uri (source_path))
    return strdup (source_path);
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
  struct fingerprint f = { .state = OVERLAY_PLAIN };
  enum overlay_state state = opts->cache ? OVERLAY_CACHE : OVERLAY_PLAIN;
  struct image_params p = {
    .version = 3, .cluster_bits = OVERLAY_CLUSTER_BITS, .refcount_order = 4,
    /* QEMU counts disks in sectors of 512 bytes. */
    .size = ROUND_UP (bdev_size (source), 512),
    .max_size = MAX (opts->max_size, ROUND_UP (bdev_size (source), 512)),
    .backing_name = name, .backing_format = name ? "raw" : NULL,
  };
  int r = 0;

  if (name) {
    r = fingerprint_of_source (source, &f, err);
    f.state = state;
    fingerprint_encode (&f, ext);
    p.private_ext_type = FINGERPRINT_EXT;
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
  if (renameat2 (AT_FDCWD, tmp, AT_FDCWD, path, RENAME_NOREPLACE) < 0
      && (errno != EINVAL || link (tmp, path) < 0 || unlink (tmp) < 0))
    return err_set (err, errno, "%s: cannot create the overlay: %m", path);
  return file_sync_folder (path, err);
}

/* The overlay is made without a name where the file system can do that, so that
 * nothing has to be tidied up after whoever was killed here; else under another.
 */
static int
create_nameless (const char *path, struct bdev **file, char **tmp, struct err *err)
{
  struct err why = { 0 };
  int r = file_create_unnamed (path, file, &why);

  if (r == 0)
    return 0;
  if (r != -ENOTSUP)
    return err_set (err, -r, "%s", why.msg);
  if (asprintf (tmp, "%s.%ld.new", path, (long) getpid ()) < 0) {
    *tmp = NULL;
    return err_set (err, ENOMEM, "out of memory");
  }
  return file_create (*tmp, file, err);
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
  r = opts->direct ? file_create (path, &file, err) : create_nameless (path, &file, &tmp, err);
  if (r < 0)
    return r;
  /* It is to hold the guest's data: who may not read the image may not read that either. */
  r = file_copy_mode (file, nbd_is_uri (opts->source_path) ? NULL : opts->source_path, err);
  if (r == 0)
    r = create_on (file, source, opts, name, err);
  if (r == 0 && !opts->direct)
    r = tmp ? publish (tmp, path, err) : file_publish (file, path, err);
  bdev_unref (file);
  if (r < 0 && (opts->direct || tmp))
    unlink (opts->direct ? path : tmp);
  return r;
}

/* --- using one */

/* An overlay that is itself damaged is trusted with nothing. */
static int
judge_soundness (struct bdev *file, struct err *err)
{
  struct check_options copts = { .memory_limit = 0 };
  struct check *c = NULL;
  int r = check_run (file, &copts, &c, err);

  if (r < 0)
    err_prefix (err, "%s: the overlay cannot be used", file->name);
  else if (!check_sound (c))
    r = err_set (err, EINVAL, "%s: the overlay itself is damaged.  Look at it with `qemu-img "
                 "check'; unless it was being written into the image, that is untouched, so a new "
                 "overlay can be made, which loses what was written into this one", file->name);
  check_free (c);
  return r;
}

/* Is the file a sound overlay made for source? */
static int
judge_existing (struct bdev *file, struct bdev *source, const struct overlay_options *opts,
                struct err *err)
{
  struct fingerprint then, now;
  uint64_t host_off;
  int r = fingerprint_read (file, &then, &host_off, err);

  if (r == 0 && then.state != (opts->cache ? OVERLAY_CACHE : OVERLAY_PLAIN))
    r = fingerprint_refuse_state (&then, file->name, source->name, err);
  if (r == 0)
    r = fingerprint_of_source (source, &now, err);
  if (r == 0)
    r = fingerprint_compare (&then, &now, file->name, source->name, err);
  if (r == 0)
    r = judge_soundness (file, err);
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
    r = judge_existing (file, source, opts, err);
  if (r == 0)
    r = compose (file, source, opts, healed, err);
  if (r == 0 && opts->file)
    *opts->file = bdev_ref (file);
  bdev_unref (file);
  return r;
}

int
overlay_reopen (struct bdev *file, struct bdev *source, struct bdev **healed, struct err *err)
{
  struct overlay_options opts = { .cache_size = 0 };
  int r = judge_soundness (file, err);

  return r < 0 ? r : compose (file, source, &opts, healed, err);
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
