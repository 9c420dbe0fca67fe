/* See chain.h.
 *
 * The chain is opened from the top down, since each layer names the next, and
 * made into devices from the bottom up, since each device reads from the one
 * behind it.  No recursion: its depth is the images' choice.
 *
 * A backing file's format is never guessed: a guest could have written a qcow2
 * header into its raw disk to be shown a file of the host.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/cleanup.h"
#include "chain.h"
#include "img/image.h"
#include "lost-view.h"

/* --- which file, and what it is */

static int
refuse_backing (const struct layer *l, const char *name, struct err *err)
{
  return err_set (err, EPERM, "%s has a backing file, \"%s\", and files that an image names are "
                  "not opened unasked.  Add backing=follow to open it, backing=FILE to use "
                  "another, or backing=none to read zeros in its place", l->path, name);
}

static int
known_format (const struct layer *l, const char *path, const char *format, bool *raw,
              struct err *err)
{
  if (format && (!strcmp (format, "raw") || !strcmp (format, "qcow2"))) {
    *raw = format[0] == 'r';
    return 0;
  }
  if (format)
    return err_set (err, ENOTSUP, "%s says that its backing file %s has the format \"%s\"; only raw "
                    "and qcow2 are served", l->path, path, format);
  return err_set (err, EINVAL, "%s does not say what its backing file %s is, and that is not "
                  "guessed, since a guess can be abused.  Say backing=qcow2:%s or backing=raw:%s",
                  l->path, path, path, path);
}

/* The file behind l.  *path stays NULL if there is none, or none is wanted. */
static int
next_file (struct layer *l, bool top, const struct chain_options *opts, char **path, bool *raw,
           bool *from_image, struct err *err)
{
  const struct check *c = layer_now (l);
  CLEANUP_FREE char *ext = layer_string_ext (l, EXT_BACKING_FORMAT);
  CLEANUP_FREE char *misspelt = layer_string_ext (l, EXT_BACKING_FORMAT_CROSVM);
  const char *name = c->backing_name ? c->backing_name : "(unreadable)";
  const char *format = ext ? ext : misspelt;
  int r;

  *from_image = !(opts->backing.follow == FOLLOW_FILE && top);
  if (c->header.backing_off == 0 || opts->backing.follow == FOLLOW_NONE)
    return 0;
  if (!*from_image) {
    *path = strdup (opts->backing.path);
    if (!*path)
      return err_set (err, ENOMEM, "out of memory");
    if (opts->backing.format)
      format = opts->backing.format;
  }
  else {
    if (opts->backing.follow != FOLLOW_NAMES || !c->backing_name)
      return refuse_backing (l, name, err);
    r = layer_resolve (l, name, path, err);
    if (r < 0)
      return r;
  }
  return known_format (l, *path, format, raw, err);
}

/* --- loops */

static bool
same_file (const char *a, const char *b)
{
  struct stat sa, sb;

  if (nbd_is_uri (a) || nbd_is_uri (b))
    return strcmp (a, b) == 0;  /* two URIs of one export: MAX_CHAIN ends that */
  return stat (a, &sa) == 0 && stat (b, &sb) == 0
         && (S_ISBLK (sa.st_mode) && S_ISBLK (sb.st_mode)
             ? sa.st_rdev == sb.st_rdev
             : sa.st_dev == sb.st_dev && sa.st_ino == sb.st_ino);
}

static int
check_loop (const struct layer *top, const struct layer_vec *layers, const char *path,
            struct err *err)
{
  bool loop = same_file (top->path, path);

  for (size_t i = 0; i < layers->len; ++i)
    loop = loop || same_file (layers->ptr[i].path, path);
  if (loop)
    return err_set (err, ELOOP, "%s is its own backing file, by way of %zu others: a loop",
                    path, layers->len);
  if (layers->len >= MAX_CHAIN)
    return err_set (err, ELOOP, "%s has more than %d backing files behind it; that can't be meant",
                    top->path, MAX_CHAIN);
  return 0;
}

/* --- one layer */

static int
heal_layer (struct layer *l, const struct chain_options *opts, struct err *err)
{
  int r = layer_check (l, false, opts->progress, err);

  if (r < 0)
    return r;
  if (l->before->header.crypt_method != CRYPT_NONE)
    return err_set (err, ENOTSUP, "%s is encrypted, and what is behind an image must be readable",
                    l->path);
  if (l->before->findings.per_severity[SEV_FATAL])
    return err_set (err, EINVAL, "%s: the damage is too great: its mapping cannot be read.  "
                    "backing=none does without it", l->path);
  if (check_sound (l->before) || !heal_needed (l->before, opts->repair))
    return 0;
  r = layer_lay_memory (l, err);
  return r < 0 ? r : layer_heal (l, opts->repair, opts->progress, err);
}

static int
open_next (struct layer *top, struct layer_vec *layers, const char *path, bool raw,
           bool from_image, const struct chain_options *opts, struct err *err)
{
  struct layer l;
  int r = check_loop (top, layers, path, err);

  if (r < 0)
    return r;
  if (layer_vec_reserve (layers, 1) < 0)
    return err_set (err, ENOMEM, "out of memory");
  r = layer_open (&l, path, from_image, &opts->source, err);
  if (r < 0)
    err_prefix (err, "the backing file of %s cannot be opened (backing=none does without it, "
                "backing=FILE names another)",
                layers->len ? layers->ptr[layers->len - 1].path : top->path);
  l.raw = raw;
  if (r == 0 && !raw)
    r = heal_layer (&l, opts, err);
  layer_vec_push (layers, l);   /* also if it failed: a report wants to show it */
  return r;
}

/* The device of a layer, on top of what is behind it. */
static int
make_device (struct layer *l, struct bdev *behind, const struct chain_options *opts,
             struct bdev **ret, struct err *err)
{
  struct image_options iopts = { .backing = behind, .read_only = true,
                                 .careful = !l->raw && !check_sound (l->before) };
  struct layer data = { NULL };
  int r = 0;

  if (l->raw) {
    *ret = bdev_ref (l->healed);
    return 0;
  }
  if (l->before->geom.data_file) {
    r = chain_data_file (l, false, opts, &data, err);
    iopts.data_file = data.healed;
  }
  if (r == 0)
    r = image_open (l->healed, &iopts, ret, err);
  layer_reset (&data);
  if (r == 0 && opts->lost_error) {
    r = lost_view_guard (ret, &l->lost, NULL, err);
    if (r < 0)
      bdev_unref (*ret);
  }
  return r;
}

int
chain_open (struct layer *top, const struct chain_options *opts,
            struct layer_vec *layers, struct bdev **backing, struct err *err)
{
  struct layer *last = top;
  struct bdev *behind = NULL, *d;
  int r = 0;

  *backing = NULL;
  while (r == 0 && !last->raw) {
    CLEANUP_FREE char *path = NULL;
    bool raw = false, from_image;

    r = next_file (last, last == top, opts, &path, &raw, &from_image, err);
    if (r < 0 || !path)
      break;
    r = open_next (top, layers, path, raw, from_image, opts, err);
    if (r == 0)
      last = &layers->ptr[layers->len - 1];
  }
  for (size_t i = layers->len; r == 0 && i-- > 0; ) {
    r = make_device (&layers->ptr[i], behind, opts, &d, err);
    if (r == 0) {
      bdev_unref (behind);
      behind = d;
    }
  }
  if (r == 0)
    *backing = behind;
  else
    bdev_unref (behind);
  return r;
}

/* --- external data files */

int
chain_data_file (struct layer *l, bool top, const struct chain_options *opts,
                 struct layer *data, struct err *err)
{
  CLEANUP_FREE char *name = layer_string_ext (l, EXT_DATA_FILE);
  CLEANUP_FREE char *path = NULL;
  bool from_image = !(opts->data_file.follow == FOLLOW_FILE && top);
  int r = 0;

  if (!from_image) {
    path = strdup (opts->data_file.path);
    if (!path)
      r = err_set (err, ENOMEM, "out of memory");
  }
  else if (opts->data_file.follow != FOLLOW_NAMES)
    return err_set (err, EPERM, "%s keeps its guest data in an external file, \"%s\", and files "
                    "that an image names are not opened unasked.  Add data-file=follow to open "
                    "it, or data-file=FILE to use another", l->path, name ? name : "(unnamed)");
  else if (!name)
    return err_set (err, EINVAL, "%s does not say where its external data file is; say "
                    "data-file=FILE", l->path);
  else
    r = layer_resolve (l, name, &path, err);
  if (r == 0)
    r = layer_open (data, path, from_image, &opts->source, err);
  if (r < 0)
    return r;
  data->raw = true;
  return 0;
}
