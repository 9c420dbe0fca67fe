/* The whole story of one image, top to bottom:
 *
 *   source   = the file, opened read-only, locked against writers
 *   healed   = source, as an overlay changes it (a file, or RAM, or none)
 *   check    = what is wrong with healed
 *   behind   = backing files and data file, as far as the operator allows
 *   heal     = what the level allows, written to the overlay; then check again
 *   guest    = the guest's view of healed, on top of what is behind it
 *
 * Whether the guest may write is decided here and nowhere else:
 *
 *   sound or leaking, no overlay   in place (the locks are raised, never released between)
 *   inplace=true                   in place, once the repair is in the image (inplace.c)
 *   overlay=FILE                   into the overlay, once the healed image is sound
 *   damaged, no overlay            read-only: the repair lives in RAM
 *   anything else                  read-only, and why_read_only says why
 *
 * I1: the source is opened for writing in the first two cases only; in the second
 * it is changed by the commit alone, whose journal is durable first.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "base/num.h"
#include "dev/file.h"
#include "dev/readahead.h"
#include "img/image.h"
#include "lost-found.h"
#include "lost-view.h"
#include "stack.h"

static void __attribute__ ((format (printf, 2, 3)))
read_only_because (struct stack *s, const char *fmt, ...)
{
  va_list args;

  if (s->why_read_only)
    return;
  va_start (args, fmt);
  if (vasprintf (&s->why_read_only, fmt, args) < 0)
    s->why_read_only = NULL;
  va_end (args);
}

/* --- refusals */

/* Does the L1 table, as the header has it, lie inside the file?  image_open asks that. */
static bool
l1_inside (const struct check *c)
{
  uint64_t bytes = c->header.l1_entries * UINT64_C (8);

  return bytes <= MAX_L1_BYTES
         && range_fits (c->header.l1_host_off, bytes, ROUND_UP (c->file_size, c->geom.cluster_size));
}

/* Can a guest disk come of this at all? */
static int
judge (struct stack *s, struct err *err)
{
  const struct check *c = s->top.before;

  if (c->findings.per_severity[SEV_FATAL])
    return err_set (err, EINVAL, "%s: the damage is too great for this version: the mapping of "
                    "the guest disk cannot be read (see the findings).  Nothing was changed",
                    s->top.path);
  if (c->l1_entries_right < geom_l1_entries (&c->geom, c->header.size))
    return err_set (err, EINVAL, "%s: the header says that the disk has %llu bytes, more than any L1 "
                    "table can map with clusters of %llu bytes.  That field is damaged, and no level "
                    "mends it.  Nothing was changed", s->top.path,
                    (unsigned long long) c->header.size, (unsigned long long) c->geom.cluster_size);
  if (findings_has (&c->findings, FINDING_L1_TOO_SMALL) && s->repair < REPAIR_ALL)
    return err_set (err, EINVAL, "%s: the L1 table is too small for the disk that the header "
                    "describes; repair=all mends this.  Nothing was changed", s->top.path);
  if (s->repair < REPAIR_ALL && !l1_inside (c))
    return err_set (err, EINVAL, "%s: the L1 table has more entries, the header says, than can be read; "
                    "repair=all mends this.  Nothing was changed", s->top.path);
  if (c->header.crypt_method != CRYPT_NONE
      && asprintf (&s->why_no_guest, "the guest disk is encrypted (%s), and this program has no key; "
                   "the image itself can be fetched as the export healed.qcow2",
                   c->header.crypt_method == CRYPT_LUKS ? "LUKS" : "AES") < 0)
    return err_set (err, ENOMEM, "out of memory");
  return 0;
}

/* --- the files behind it */

static int
open_behind (struct stack *s, const struct stack_options *opts, struct err *err)
{
  struct chain_options copts = {
    .backing = opts->backing, .data_file = opts->data_file, .repair = s->repair,
    .source = opts->source, .lost_error = opts->lost_error,
    .progress = opts->progress,
  };
  int r = chain_open (&s->top, &copts, &s->chain, &s->backing, err);

  if (r == 0 && s->top.before->geom.data_file)
    r = chain_data_file (&s->top, true, &copts, &s->data, err);
  return r;
}

/* --- healing */

static const char *
level_name (enum repair_level level)
{
  return level == REPAIR_OFF ? "off" : level == REPAIR_REFCOUNTS ? "refcounts" : "all";
}

static int
lay_overlay (struct stack *s, bool *created, struct err *err)
{
  uint64_t guest_size = s->top.before ? s->top.before->header.size : 0;

  return layer_lay_file (&s->top, s->overlay, guest_size, s->cache_size, created, err);
}

/* A far image cannot grow, but what lies over it can: an export is seldom written into, and if this
 * one is, later, journal_fits tells.  Healing goes past the end only if there is no room inside.
 */
static void
give_room (struct layer *l)
{
  if (l->healed != l->source && nbd_is_uri (l->path))
    image_set_growable (l->healed, true);
}

/* Only an overlay that the operator named, or an image that needs no repair, is
 * left as the place of guest writes.
 */
static int
heal_as_told (struct stack *s, const struct stack_options *opts, struct err *err)
{
  struct progress *progress = opts->progress;
  struct layer *top = &s->top;
  bool sound = check_sound (top->before);
  bool can_heal = heal_needed (top->before, s->repair);
  int r = 0;

  if (s->overlay && !s->overlay_reused)
    r = lay_overlay (s, &s->overlay_created, err);
  else if (!s->overlay && !sound && can_heal)
    r = layer_lay_memory (top, err);
  if (r < 0)
    return r;
  give_room (top);
  if (can_heal && (s->overlay || !sound))
    r = layer_heal (top, s->repair, progress, err);
  if (r == 0 && !s->overlay && !sound)
    read_only_because (s, s->repair == REPAIR_OFF
                       ? "it is damaged and repair=off; overlay=FILE with repair=refcounts "
                         "makes a writable one"
                       : "it is damaged and the repair is held in memory; "
                         "add overlay=FILE to keep it and to allow writes");
  if (r == 0 && !check_sound (layer_now (top)))
    read_only_because (s, "damage remains that repair=%s does not mend", level_name (s->repair));
  return r;
}

/* The files behind it, as soon as the header can be believed about their names: at once,
 * or once it has been mended.
 */
static int
open_behind_if (struct stack *s, const struct stack_options *opts, bool mended, struct err *err)
{
  const struct findings *fs = &s->top.before->findings;
  bool doubtful = s->repair >= REPAIR_ALL
                  && (findings_has (fs, FINDING_EXTENSIONS_DAMAGED)
                      || findings_has (fs, FINDING_BACKING_NAME_OUTSIDE));

  return doubtful == mended ? open_behind (s, opts, err) : 0;
}

/* No file is made, or it is no more. */
static int
leave_alone (struct stack *s, const struct stack_options *opts, struct err *err)
{
  free (s->overlay);
  s->overlay = NULL;
  return open_behind_if (s, opts, true, err);
}

/* Nothing but leaks, and the journal failed: that is no reason not to serve it.  Should its file stay,
 * even come back after a crash, it is not marked "committing", and the next start removes it.
 */
static void
give_up_journal (struct stack *s, struct err *err)
{
  struct layer *top = &s->top;

  log_notice ("%s: %s.  It has leaks only, which endanger nothing, so it is served as it is",
              top->path, err->msg);
  err_clear (err);
  layer_lift (top);
  inplace_undo (s);
  s->overlay_created = false;
}

/* Make the journal, and the repair in it. */
static int
heal_journal (struct stack *s, struct progress *progress, struct err *err)
{
  struct layer *top = &s->top;
  int r = 0;

  if (!s->overlay_reused && !s->inplace.resumed) {
    top->journal = !s->overlay;
    if (!s->overlay)
      r = inplace_journal_path (s, &s->overlay, err);
    if (r == 0)
      r = lay_overlay (s, &s->overlay_created, err);
  }
  if (r == 0 && s->overlay_reused && !s->inplace.resumed)
    r = lost_found_kept (s, progress, err);
  if (r == 0 && !s->inplace.resumed && heal_needed (top->before, s->repair))
    r = layer_heal (top, s->repair, progress, err);
  if (r == 0 && !s->inplace.resumed)    /* a full disk may show only now */
    r = bdev_flush (top->healed, err);
  return r;
}

/* inplace=true: the overlay is a journal.  It is made where there is something to
 * repair, and written into the image once it is whole and sound.  Leaks alone are no
 * reason, but for those that make QEMU call the image corrupt.
 */
static int
heal_in_place (struct stack *s, const struct stack_options *opts, struct err *err)
{
  struct progress *progress = opts->progress;
  struct layer *top = &s->top;
  bool leaks_only = check_sound (top->before) && !s->overlay_reused && !s->inplace.resumed;
  int r;

  if (leaks_only && !(top->before->copied_ahead && heal_needed (top->before, s->repair)))
    return leave_alone (s, opts, err);
  r = heal_journal (s, progress, err);
  /* An overlay that was named might be used again, by then over another image. */
  if (r < 0 && leaks_only && !s->inplace.named && r != -ECANCELED && r != -ENOTCONN) {
    give_up_journal (s, err);
    return leave_alone (s, opts, err);
  }
  if (r == 0 && !check_sound (layer_now (top)))
    r = err_set (err, EINVAL, "%s: damage remains that repair=%s does not mend, so nothing was "
                 "written into it.  The findings name the level that mends each; without "
                 "inplace=true it is served as far as it can be read", top->path,
                 level_name (s->repair));
  if (r == 0)
    r = open_behind_if (s, opts, true, err);
  return r < 0 ? r : inplace_commit (s, progress, err);
}

/* --- the data file */

/* Guest writes go to the data file, so it needs an overlay of its own wherever
 * the image has one: FILE.data beside FILE.  One that is there holds guest data
 * and is laid also where nothing more will be written.
 */
static int
lay_data_overlay (struct stack *s, struct err *err)
{
  if (!s->overlay || !s->data.source)
    return 0;
  if (asprintf (&s->data_overlay, "%s.data", s->overlay) < 0) {
    s->data_overlay = NULL;
    return err_set (err, ENOMEM, "out of memory");
  }
  if (s->why_read_only && access (s->data_overlay, F_OK) < 0)
    return 0;
  return layer_lay_file (&s->data, s->data_overlay, s->top.before->header.size, s->cache_size,
                         &s->data_overlay_created, err);
}

/* --- what is lost */

/* Healing lists what it takes away; this adds what was gone before it began. */
static int
complete_lost (struct stack *s, struct progress *progress, struct err *err)
{
  struct layer *top = &s->top;
  const struct header *before = &top->before->header;
  /* A place without a length never was a name, unless the repair found one. */
  bool names_backing = layer_now (top)->header.backing_off
                       || (before->backing_off && before->backing_len);
  struct err why = { 0 };
  int r = 0;

  if (s->why_no_guest)
    return 0;
  /* Nothing to mend is not nothing lost. */
  if (s->repair >= REPAIR_ALL && top->result.rounds_all == 0) {
    r = lost_collect (&top->lost, top->healed, top->before, err);
    lost_finish (&top->lost);
    if (r < 0)
      return r;
  }
  if (s->overlay_reused && !s->inplace.wanted && !heal_all_needed (layer_now (top)))
    r = lost_view_recall (top, progress, &why);
  /* No reason to refuse a healed disk, unless it is to fail where it lost something. */
  if (r < 0 && (s->lost_error || r == -ECANCELED))
    return err_set (err, -r, "finding out what was lost: %s", why.msg);
  if (r < 0)
    log_debug ("%s: what was lost is not known: %s", top->path, why.msg);
  err_clear (&why);
  r = 0;
  if (names_backing && !s->backing)
    r = lost_view_backing (top, s->data.healed, err);
  return r;
}

/* --- serving */

static void
raise_to_writer (struct stack *s, struct layer *l)
{
  struct err why = { 0 };

  if (!s->why_read_only && l->source && l->healed == l->source
      && bdev_make_writable (l->source, &why) < 0)
    read_only_because (s, "it cannot be opened for writing: %s", why.msg);
}

/* Put a watch on the active disk, below what is lost already. */
static int
watch_guest (struct stack *s, struct bdev **view, struct err *err)
{
  struct bdev *image = *view;
  int r = watch_new (image, image->far, view, err);

  if (r < 0)
    return r;
  bdev_unref (image);
  bdev_unref (s->guest_watch);
  s->guest_watch = bdev_ref (*view);
  return 0;
}

/* What was read ahead is kept in the cache once it is read, and lost if this process is killed
 * before: then less of it.
 */
#define CACHED_WINDOW (UINT64_C (16) << 20)

static int
read_ahead (const struct stack *s, struct bdev **view, struct err *err)
{
  struct bdev *under = *view;
  int r = readahead_new (under, s->cached ? CACHED_WINDOW : READAHEAD_WINDOW, view, err);

  if (r == 0)
    bdev_unref (under);
  return r;
}

static int
open_view (struct stack *s, const struct snapshot *snapshot, bool read_only,
           struct bdev **ret, struct err *err)
{
  struct image_options iopts = {
    .cache_size = s->cache_size, .read_only = read_only, .backing = s->backing,
    .data_file = s->data.healed, .snapshot = snapshot,
    .careful = !s->top.before || !check_sound (s->top.before),
  };

  int r = image_open (s->top.healed, &iopts, ret, err);

  if (r == 0 && !snapshot)
    r = watch_guest (s, ret, err);
  if (r == 0 && (*ret)->far)
    r = read_ahead (s, ret, err);
  if (r == 0 && s->lost_error)
    r = lost_view_guard (ret, &s->top.lost, snapshot, err);
  if (r < 0) {
    bdev_unref (*ret);
    *ret = NULL;
  }
  return r;
}

static int
open_guest (struct stack *s, const struct stack_options *opts, struct err *err)
{
  int r;

  if (opts->source.force_share)
    read_only_because (s, "force-share=true: another program may be writing to it");
  if (opts->snapshot)
    read_only_because (s, "a snapshot is never written to");
  if (s->why_no_guest) {
    read_only_because (s, "%s", s->why_no_guest);
    return 0;
  }
  if (opts->snapshot)
    return stack_open_snapshot (s, opts->snapshot, &s->guest, err);
  r = lay_data_overlay (s, err);
  if (r < 0)
    return r;
  raise_to_writer (s, &s->data);
  raise_to_writer (s, &s->top);
  r = open_view (s, NULL, s->why_read_only != NULL, &s->guest, err);
  if (r < 0)
    return r;
  s->writable = s->guest->writable;
  if (!s->writable)
    read_only_because (s, "the image is read-only");
  return 0;
}

static int
open_unchecked (struct stack *s, const struct stack_options *opts, struct err *err)
{
  struct image_options iopts = { .cache_size = s->cache_size, .read_only = true };
  struct bdev *view = NULL;
  bool backed = false;
  int r = image_open (s->top.healed, &iopts, &view, err);

  read_only_because (s, "check=false: an image that was not checked is not written to");
  if (r == 0) {
    backed = image_header (view)->backing_off;
    r = watch_guest (s, &view, err);
  }
  s->guest = view;
  if (r == 0 && backed && opts->backing.follow != FOLLOW_NONE)
    r = err_set (err, ENOTSUP, "%s has a backing file, which check=false does not look for; leave "
                 "out check=false, or add backing=none to read zeros in its place", s->top.path);
  return r;
}

static int
build (struct stack *s, const struct stack_options *opts, struct err *err)
{
  bool created;
  int r = layer_open (&s->top, opts->file, false, &opts->source, err);

  if (r == 0 && opts->cache)
    r = layer_keep (&s->top, opts->cache, &s->cache_created, err);
  s->cached = opts->cache != NULL;
  s->top.keep_orphans = opts->inplace && !opts->discard_orphans;
  if (r == 0)
    r = inplace_begin (s, opts->progress, err);
  if (r < 0)
    return r;
  if (opts->check == STACK_CHECK_NO)
    return open_unchecked (s, opts, err);
  if (s->overlay && access (s->overlay, F_OK) == 0) {
    r = lay_overlay (s, &created, err);
    if (r < 0)
      return r;
    s->overlay_reused = true;
  }
  r = layer_check (&s->top, opts->check == STACK_CHECK_DEEP, opts->progress, err);
  if (r == 0)
    r = judge (s, err);
  if (r == 0)
    r = open_behind_if (s, opts, false, err);
  if (r == 0)
    r = (s->inplace.wanted ? heal_in_place : heal_as_told) (s, opts, err);
  if (r == 0 && !s->inplace.wanted)
    r = open_behind_if (s, opts, true, err);
  if (r == 0)
    r = complete_lost (s, opts->progress, err);
  if (r == 0)
    r = open_guest (s, opts, err);
  return r;
}

/* --- snapshots */

const struct snapshot_vec *
stack_snapshots (const struct stack *s)
{
  static const struct snapshot_vec none = VEC_INIT;

  return s->top.before ? &layer_now (&s->top)->snapshots : &none;
}

int
stack_open_snapshot (struct stack *s, const char *name, struct bdev **ret, struct err *err)
{
  const struct snapshot_vec *v = stack_snapshots (s);
  const struct snapshot *found = NULL;

  for (size_t i = 0; i < v->len && !found; ++i)
    if (strcmp (v->ptr[i].name, name) == 0)
      found = &v->ptr[i];
  for (size_t i = 0; i < v->len && !found; ++i)
    if (strcmp (v->ptr[i].id, name) == 0)
      found = &v->ptr[i];
  if (!found)
    return err_set (err, ENOENT, "%s has no snapshot with the name or ID \"%s\"; "
                    "`qemu-img snapshot -l' lists %zu", s->top.path, name, v->len);
  if (s->why_no_guest)
    return err_set (err, ENOTSUP, "%s", s->why_no_guest);
  return open_view (s, found, true, ret, err);
}

/* --- life */

static int
stack_new (const struct stack_options *opts, struct stack **ret, struct err *err)
{
  struct stack *s = calloc (1, sizeof *s);

  if (s) {
    s->overlay = opts->overlay ? strdup (opts->overlay) : NULL;
    s->repair = opts->repair;
    s->cache_size = opts->cache_size;
    s->live = opts->source.force_share;
    s->lost_error = opts->lost_error;
    s->inplace.wanted = opts->inplace;
  }
  if (!s || (opts->overlay && !s->overlay)) {
    free (s);
    return err_set (err, ENOMEM, "out of memory");
  }
  pthread_mutex_init (&s->orphans_lock, NULL);
  *ret = s;
  return 0;
}

/* A start that was refused leaves nothing behind. */
static void
undo (struct stack *s, const struct stack_options *opts)
{
  bdev_unref (s->guest);
  bdev_unref (s->guest_watch);
  s->guest = s->guest_watch = NULL;
  s->writable = false;
  if (s->inplace.wanted)
    inplace_undo (s);
  else if (s->overlay_created)
    unlink (s->overlay);
  if (s->data_overlay_created)
    unlink (s->data_overlay);
  if (s->cache_created)
    unlink (opts->cache);
}

int
stack_open (const struct stack_options *opts, struct stack **ret, struct err *err)
{
  struct stack *s = NULL;
  int r = stack_new (opts, &s, err);

  *ret = NULL;
  if (r < 0)
    return r;
  r = build (s, opts, err);
  if (r < 0) {
    undo (s, opts);
    if (!s->top.before) {
      stack_close (s, NULL);
      return r;
    }
  }
  *ret = s;
  return r;
}

int
stack_close (struct stack *s, struct err *err)
{
  int r = 0;

  if (!s)
    return 0;
  if (s->guest && s->writable)
    r = bdev_flush (s->guest, err);
  bdev_unref (s->guest);
  bdev_unref (s->guest_watch);
  bdev_unref (s->backing);
  for (size_t i = 0; i < s->chain.len; ++i)
    layer_reset (&s->chain.ptr[i]);
  vec_reset (&s->chain);
  layer_reset (&s->data);
  layer_reset (&s->top);
  inplace_reset (&s->inplace);
  free (s->overlay);
  free (s->data_overlay);
  free (s->why_read_only);
  free (s->why_no_guest);
  orphans_free (s->orphans);
  pthread_mutex_destroy (&s->orphans_lock);
  free (s);
  return r;
}
