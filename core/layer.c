/* See layer.h.
 *
 * Names found in an image are untrusted: they are bytes until somebody who may
 * decide has decided (chain.c), and never interpreted beyond "a path".
 *
 * I1: the source is opened read-only here, always.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "dev/file.h"
#include "heal/cache-file.h"
#include "heal/overlay.h"
#include "layer.h"

static int
open_source (const char *path, bool from_image, const struct source_options *opts,
             struct bdev **ret, struct err *err)
{
  struct nbd_options nbd = { .timeout = opts->timeout, .reconnect = opts->reconnect,
                             .local_files = !from_image };

  if (nbd_is_uri (path))
    return nbd_open (path, &nbd, ret, err);
  return file_open (path, opts->force_share ? FILE_NO_LOCK : 0, ret, err);
}

int
layer_open (struct layer *l, const char *path, bool from_image,
            const struct source_options *opts, struct err *err)
{
  struct bdev *d = NULL;
  int r;

  memset (l, 0, sizeof *l);
  l->path = strdup (path);
  if (!l->path)
    return err_set (err, ENOMEM, "out of memory");
  r = open_source (path, from_image, opts, &d, err);
  if (r == 0)
    r = watch_new (d, d->far, &l->watch, err);
  bdev_unref (d);
  if (r < 0)
    return r;
  l->source = bdev_ref (l->watch);
  l->healed = bdev_ref (l->source);
  return 0;
}

int
layer_keep (struct layer *l, const char *path, bool *created, struct err *err)
{
  struct bdev *cache;
  int r = cache_file_open (path, l->source, l->path, &cache, created, err);

  if (r < 0)
    return r;
  bdev_unref (l->source);
  bdev_unref (l->healed);
  l->source = cache;
  l->healed = bdev_ref (cache);
  return 0;
}

void
layer_reset (struct layer *l)
{
  bdev_unref (l->healed);
  bdev_unref (l->overlay);
  bdev_unref (l->source);
  bdev_unref (l->watch);
  check_free (l->before);
  check_free (l->after);
  lost_reset (&l->lost);
  free (l->path);
  memset (l, 0, sizeof *l);
}

struct check_options
layer_check_options (const struct layer *l, struct progress *progress)
{
  return (struct check_options) {
    .progress = progress, .keep_orphans = l->keep_orphans,
    /* Once the repair has begun, orphans may not look like any more than leaks. */
    .keep_leaks = l->keep_orphans && l->before && orphan_findings (l->before),
  };
}

/* Reads of the source that failed since it was out of reach. */
static uint64_t
nr_unreachable (struct layer *l)
{
  struct watch_notes notes;

  if (!l->watch || watch_notes (l->watch, &notes, NULL) < 0)
    return 0;
  vec_reset (&notes.ranges);
  return notes.unreachable;
}

/* What was found while the source was out of reach says nothing about it. */
static int
refuse_if_lost (struct layer *l, uint64_t before, const char *doing, struct err *err)
{
  if (nr_unreachable (l) == before)
    return 0;
  err_clear (err);
  return err_set (err, ENOTCONN, "%s: the server could not be reached any more while the image was "
                  "being %s.  Nothing was concluded from that; start again once it is there",
                  l->path, doing);
}

int
layer_check (struct layer *l, bool deep, struct progress *progress, struct err *err)
{
  struct check_options copts = layer_check_options (l, progress);
  uint64_t unreachable = nr_unreachable (l);
  int r;

  copts.deep = deep;
  r = check_run (l->healed, &copts, &l->before, err);
  if (r < 0 && err && strncmp (err->msg, l->path, strlen (l->path)) != 0)
    err_prefix (err, "%s", l->path);
  if (refuse_if_lost (l, unreachable, "checked", err) == 0)
    return r;
  check_free (l->before);
  l->before = NULL;
  return -ENOTCONN;
}

/* --- overlays */

static uint64_t
saturating_add (uint64_t a, uint64_t b)
{
  uint64_t r;

  return add_overflows (a, b, &r) ? UINT64_MAX : r;
}

/* The healed file can never need more: what is there, the whole guest disk once
 * more, and metadata for it.  LIMIT: at most 16 TiB more than the source, so that
 * a hostile virtual size does not make an enormous L1 table; the guest gets
 * ENOSPC past that.
 */
static uint64_t
max_healed_size (const struct layer *l, uint64_t guest)
{
  uint64_t source = bdev_size (l->source);
  uint64_t more = saturating_add (saturating_add (guest, guest / 8),
                                  saturating_add (source / 16, UINT64_C (64) << 20));

  return saturating_add (source, MIN (more, UINT64_C (16) << 40));
}

static void
put_on_top (struct layer *l, struct bdev *healed)
{
  bdev_unref (l->healed);
  l->healed = healed;
}

int
layer_lay_file (struct layer *l, const char *overlay_path, uint64_t guest_size,
                size_t cache_size, bool *created, struct err *err)
{
  struct overlay_options oopts = {
    .source_path = l->path, .cache_size = cache_size, .max_size = max_healed_size (l, guest_size),
    .file = &l->overlay, .direct = l->journal,
  };
  struct bdev *healed;
  int r = overlay_open (overlay_path, l->source, &oopts, &healed, created, err);

  if (r == 0)
    put_on_top (l, healed);
  return r;
}

int
layer_lay_memory (struct layer *l, struct err *err)
{
  /* Nobody writes there, but zeros in the place of what is lost may take as much room. */
  struct overlay_options oopts = {
    .source_path = l->path, .max_size = max_healed_size (l, l->before->header.size),
  };
  struct bdev *healed;
  int r = overlay_in_memory (l->source, &oopts, &healed, err);

  if (r == 0)
    put_on_top (l, healed);
  return r;
}

void
layer_lift (struct layer *l)
{
  put_on_top (l, bdev_ref (l->source));
  bdev_unref (l->overlay);
  l->overlay = NULL;
  l->journal = false;
  check_free (l->after);
  l->after = NULL;
  l->result = (struct heal_result) { 0 };
}

/* Heal what c says at the level of refcounts, and check again, into l->after. */
static int
heal_refcounts (struct layer *l, struct check *c, enum repair_level level,
                struct check_options *copts, struct err *err)
{
  struct check *after = NULL;
  int r = heal_run (l->healed, c, level, copts->progress, &l->result, err);

  /* What had to be kept is no damage that remains: with a refcount, nobody writes there. */
  copts->keep_leaks |= l->result.leaks_kept > 0;
  if (r == 0)
    r = check_run (l->healed, copts, &after, err);
  if (r == 0)
    r = heal_finish (l->healed, after, &l->result, err);
  if (after) {
    check_free (l->after);
    l->after = after;
  }
  return r;
}

static bool
copied_wrong (const struct check *c)
{
  return findings_has (&c->findings, FINDING_L1_COPIED_WRONG)
         || findings_has (&c->findings, FINDING_L2_COPIED_WRONG);
}

/* What the guest can see first, then the refcounts that follow from it. */
static int
heal_and_check (struct layer *l, enum repair_level level, const struct check_options *copts,
                struct err *err)
{
  struct check_options after = *copts;
  struct check *now = l->before;
  int r = 0;

  if (level >= REPAIR_ALL)
    r = heal_all (l->healed, &now, copts, &l->result, &l->lost, err);
  if (r == 0)
    r = heal_refcounts (l, now, level, &after, err);
  if (now != l->before)
    check_free (now);
  /* The flags were left alone if a refcount table lay on what the mapping names; it has moved. */
  if (r == 0 && copied_wrong (l->after))
    r = heal_refcounts (l, l->after, level, &after, err);
  /* In RAM nobody writes, so nothing is gained by copies there. */
  if (r == 0 && level >= REPAIR_ALL && l->overlay)
    r = heal_split (l->healed, &l->after, &after, &l->result, err);
  return r;
}

int
layer_heal (struct layer *l, enum repair_level level, struct progress *progress,
            struct err *err)
{
  struct check_options copts = layer_check_options (l, progress);
  uint64_t unreachable = nr_unreachable (l);
  int r = heal_and_check (l, level, &copts, err);

  if (r < 0)
    err_prefix (err, "%s: healing failed", l->path);
  return refuse_if_lost (l, unreachable, "healed", err) < 0 ? -ENOTCONN : r;
}

/* --- names in the header */

#define MAX_NAME 1023

char *
layer_string_ext (struct layer *l, uint32_t type)
{
  const struct header_ext *ext = header_find_ext (&layer_now (l)->header, type);
  char *s;

  if (!ext || ext->len == 0 || ext->len > MAX_NAME)
    return NULL;
  s = calloc (1, ext->len + 1);
  if (s && bdev_pread (l->healed, s, ext->len, ext->host_off, NULL) < 0) {
    free (s);
    s = NULL;
  }
  return s;
}

/* QEMU takes "word:" before any slash for a protocol. */
static bool
has_protocol (const char *name)
{
  return name[strcspn (name, ":/")] == ':';
}

int
layer_resolve (const struct layer *l, const char *name, char **path, struct err *err)
{
  CLEANUP_FREE char *real = NULL;
  char *slash;

  if (strncmp (name, "file:", 5) == 0)
    name += 5;
  else if (has_protocol (name) && !nbd_is_uri (name))
    return err_set (err, ENOTSUP, "%s names \"%s\", which is neither a plain file nor the URI of an "
                    "NBD export; this version opens only those", l->path, name);
  if (name[0] == '/' || nbd_is_uri (name)) {
    *path = strdup (name);
    return *path ? 0 : err_set (err, ENOMEM, "out of memory");
  }
  if (nbd_is_uri (l->path))
    return err_set (err, ENOTSUP, "%s names \"%s\", as seen from the folder that it lies in, but an "
                    "NBD export lies in none.  Name the file, or the URI that leads to it", l->path,
                    name);
  real = realpath (l->path, NULL);
  slash = real ? strrchr (real, '/') : NULL;
  if (!slash || asprintf (path, "%.*s/%s", (int) (slash - real), real, name) < 0)
    return err_set (err, errno ? errno : ENOMEM, "%s: cannot tell the folder it lies in: %m",
                    l->path);
  return 0;
}
