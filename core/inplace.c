/* See inplace.h.
 *
 * The way of a repair into the image, and what each start does that finds it cut
 * off there:
 *
 *   1 source locked as a writer           nothing was changed; begin anew
 *   2 journal made, healed, checked       likewise (a journal of ours is removed)
 *   3 journal marked "committing"         copy, 5, 6
 *   4 copied into the source              copy, 5, 6
 *   5 journal marked "done"               6
 *   6 journal removed                     nothing
 *
 * each durable before the next (I1).  An overlay that the operator named is a
 * journal like any other, but no later start need be told its name.  So before 3 a
 * link to it is laid where the journal would be otherwise, and goes after 5.
 *
 * An image with an external data file may have two journals, FILE and FILE.data.
 * They are marked in the order FILE.data, FILE and are both copied before either
 * is done; FILE is removed last, since it leads to the other, and so does the link.
 *
 * A start without inplace=true changes nothing, so it cannot serve what lies
 * between 3 and 5: it is refused.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "dev/file.h"
#include "inplace-path.h"
#include "stack.h"

/* --- looking */

enum found {
  FOUND_NOTHING,
  FOUND_PART,                   /* its making was cut off */
  FOUND_PLAIN,
  FOUND_COMMITTING,
  FOUND_DONE,
};

/* No lock: the source's own keeps everybody else away from its journal. */
static int
look (const char *path, enum found *found, struct err *err)
{
  static const enum found of_state[] = {
    [OVERLAY_PLAIN] = FOUND_PLAIN, [OVERLAY_COMMITTING] = FOUND_COMMITTING,
    [OVERLAY_DONE] = FOUND_DONE,
    [OVERLAY_CACHE] = FOUND_PLAIN,      /* none of ours: whoever lays it is told */
  };
  struct fingerprint f;
  struct bdev *file;
  struct err why = { 0 };
  uint64_t host_off;
  int r;

  *found = FOUND_NOTHING;
  if (access (path, F_OK) < 0 && errno == ENOENT)
    return 0;
  r = file_open (path, FILE_NO_LOCK, &file, err);
  if (r < 0)
    return r;
  r = fingerprint_read (file, &f, &host_off, &why);
  bdev_unref (file);
  if (r == -ENODATA) {
    *found = FOUND_PART;
    return 0;
  }
  if (r == 0)
    *found = of_state[f.state];
  return r < 0 ? err_set (err, -r, "%s", why.msg) : 0;
}

/* Whoever may make files beside the image, but not write to it, could lay a journal there
 * and have its bytes written into the image.  One of ours belongs to whoever started us,
 * to root or to the image's owner, and nobody else can write to it.
 */
static int
refuse_strangers (struct stack *s, const char *path, struct err *err)
{
  struct stat st, image;

  if (lstat (path, &st) < 0)
    return 0;
  if (stat (s->top.path, &image) < 0)
    image.st_uid = 0;
  if ((st.st_uid == geteuid () || st.st_uid == 0 || st.st_uid == image.st_uid)
      && (S_ISLNK (st.st_mode) || !(st.st_mode & S_IWOTH)))
    return 0;
  return err_set (err, EPERM, "%s lies where the journal of %s would, but belongs to user %u or can be "
                  "written to by anybody, so it is not trusted.  If it is no journal of yours, remove "
                  "it; if it is, give it to the owner of the image", path, s->top.path,
                  (unsigned) st.st_uid);
}

/* The journal of s's image in its own place, or where a link there leads. */
static int
find_journal (struct stack *s, char **path, char **link, struct err *err)
{
  char target[4096];
  ssize_t n;
  int r = inplace_default_path (s->top.path, path, err);

  if (r == 0)
    r = refuse_strangers (s, *path, err);
  if (r < 0)
    return r;
  n = readlink (*path, target, sizeof target - 1);
  if (n < 0)
    return 0;
  target[n] = '\0';
  *link = *path;
  *path = strdup (target);
  return *path ? refuse_strangers (s, *path, err) : err_set (err, ENOMEM, "out of memory");
}

static int
refuse_half_written (struct stack *s, const char *journal, struct err *err)
{
  return err_set (err, EINVAL, "%s: a repair was being written into it when that was cut off, so it "
                  "is part old, part new; all of the repair is in the journal %s.  Finish it: start "
                  "again with inplace=true", s->top.path, journal);
}

static int
refuse_lost_journal (struct stack *s, const char *journal, const char *link, struct err *err)
{
  return err_set (err, EINVAL, "%s: a repair was being written into it from the overlay %s (says the "
                  "link %s), which is not there: bring it back (is its file system mounted?).  Only "
                  "if the image was replaced since by a good one, remove the link", s->top.path,
                  journal, link);
}

static void __attribute__ ((format (printf, 2, 3)))
take_note (struct inplace *ip, const char *fmt, ...)
{
  va_list args;

  va_start (args, fmt);
  if (vasprintf (&ip->note, fmt, args) < 0)
    ip->note = NULL;
  va_end (args);
}

/* Without inplace=true. */
static int
only_look (struct stack *s, const char *journal, const char *link, struct err *err)
{
  struct err why = { 0 };
  enum found found;
  int r = look (journal, &found, &why);

  if (r == -EINVAL)
    return 0;                   /* none of ours, or damaged so that it is of no use */
  if (r < 0)
    return err_set (err, -r, "%s: it cannot be told whether a repair was being written into it: %s",
                    s->top.path, why.msg);
  if (found == FOUND_COMMITTING)
    return refuse_half_written (s, journal, err);
  if (found == FOUND_NOTHING && link)
    return refuse_lost_journal (s, journal, link, err);
  if ((found == FOUND_PLAIN || found == FOUND_PART) && !link)
    take_note (&s->inplace, "the journal %s is of a repair that was cut off before it changed the "
               "image; it is not used, and the next start with inplace=true removes it", journal);
  return 0;
}

/* --- resuming */

/* The error of a step after which the journal is needed. */
static int
keep_journal (struct stack *s, int r, const struct err *why, struct err *err)
{
  return err_set (err, -r, "%s: %s.  The image is now part old, part new; the whole repair is in "
                  "the journal %s, which stays.  Once the cause is mended, start again with "
                  "inplace=true to finish it", s->top.path, why->code ? why->msg : strerror (-r),
                  s->inplace.journal);
}

static int
copy (struct layer *l, bool again, struct progress *progress, struct journal_result *res,
      struct err *err)
{
  return journal_copy (l->overlay, l->healed, l->source, again, progress, res, err);
}

/* The source is what the journal makes of it: look at it alone from now on. */
static void
lift_overlay (struct layer *l)
{
  bdev_unref (l->healed);
  l->healed = bdev_ref (l->source);
}

/* Lay the journal at path, which is committing, over l. */
static int
accept_journal (struct layer *l, const char *path, struct err *err)
{
  struct bdev *healed;
  int r = file_open (path, FILE_WRITE, &l->overlay, err);

  if (r == 0)
    r = journal_accept (l->overlay, l->source, &healed, err);
  if (r < 0)
    return r;
  bdev_unref (l->healed);
  l->healed = healed;
  return 0;
}

/* Takes over path. */
static int
resume (struct stack *s, char *path, struct progress *progress, struct err *err)
{
  struct inplace *ip = &s->inplace;
  struct err why = { 0 };
  int r;

  ip->journal = path;
  ip->resumed = ip->marked = true;
  if (s->overlay && strcmp (s->overlay, path) != 0)
    return err_set (err, EINVAL, "%s: the journal %s is still being written into it, so no other "
                    "overlay fits it.  Leave out overlay= to finish that first", s->top.path, path);
  free (s->overlay);
  s->overlay = NULL;
  r = accept_journal (&s->top, path, err);
  if (r < 0)
    return r;
  r = copy (&s->top, true, progress, &ip->result, &why);
  lift_overlay (&s->top);
  return r < 0 ? keep_journal (s, r, &why, err) : 0;
}

/* A journal that is not needed any more, or never was. */
static int
remove_stale (struct stack *s, const char *journal, const char *link, enum found found,
              struct err *err)
{
  int r = 0;

  if (found == FOUND_NOTHING && link)
    return refuse_lost_journal (s, journal, link, err);
  if (found == FOUND_DONE && link) {
    CLEANUP_FREE char *data = NULL;
    enum found data_found;

    if (asprintf (&data, "%s.data", journal) < 0) {
      data = NULL;
      return err_set (err, ENOMEM, "out of memory");
    }
    /* What is none of ours is none of ours. */
    if (look (data, &data_found, NULL) == 0 && data_found == FOUND_DONE)
      r = file_remove (data, err);
  }
  if (r == 0 && link)
    r = file_remove (link, err);
  /* A plain overlay that a link leads to is the operator's. */
  if (r == 0 && found != FOUND_NOTHING && (found == FOUND_DONE || !link))
    r = file_remove (journal, err);
  return r;
}

/* overlay=FILE may be a journal, too: the link to it is gone, or was never there. */
static int
begin_named (struct stack *s, struct progress *progress, struct err *err)
{
  enum found found = FOUND_NOTHING;
  struct err why = { 0 };
  char *path;

  if (!s->overlay || look (s->overlay, &found, &why) < 0)
    return 0;                   /* whoever lays it will say what is wrong */
  if (found == FOUND_DONE)
    return file_remove (s->overlay, err);
  if (found != FOUND_COMMITTING)
    return 0;
  path = strdup (s->overlay);
  return path ? resume (s, path, progress, err) : err_set (err, ENOMEM, "out of memory");
}

int
inplace_begin (struct stack *s, struct progress *progress, struct err *err)
{
  CLEANUP_FREE char *path = NULL, *link = NULL;
  enum found found;
  int r = find_journal (s, &path, &link, err);

  if (r < 0 || !s->inplace.wanted)
    return r < 0 ? r : only_look (s, path, link, err);
  s->inplace.named = s->overlay != NULL;
  r = bdev_make_writable (s->top.source, err);
  if (r < 0) {
    err_prefix (err, "inplace=true");
    return r;
  }
  r = look (path, &found, err);
  if (r < 0)
    return r;
  if (found == FOUND_COMMITTING) {
    s->inplace.link = link;
    link = NULL;
    r = resume (s, path, progress, err);
    path = NULL;
    return r;
  }
  r = remove_stale (s, path, link, found, err);
  return r < 0 ? r : begin_named (s, progress, err);
}

int
inplace_journal_path (struct stack *s, char **ret, struct err *err)
{
  int r = inplace_default_path (s->top.path, ret, err);

  return r < 0 ? r : inplace_make_folder (*ret, err);
}

/* --- committing */

/* The journal of the data file, if the overlay that is applied has one. */
static int
prepare_data (struct stack *s, struct err *err)
{
  struct inplace *ip = &s->inplace;
  enum found found = FOUND_NOTHING;
  bool created;
  int r;

  if (!s->data.source)
    return 0;
  if (asprintf (&ip->data_journal, "%s.data", ip->journal) < 0) {
    ip->data_journal = NULL;
    return err_set (err, ENOMEM, "out of memory");
  }
  r = look (ip->data_journal, &found, err);
  if (r < 0 || found == FOUND_NOTHING || found == FOUND_DONE)
    return r;
  r = bdev_make_writable (s->data.source, err);
  if (r < 0)
    return r;
  if (found == FOUND_COMMITTING)
    return accept_journal (&s->data, ip->data_journal, err);
  r = layer_lay_file (&s->data, ip->data_journal, 0, s->cache_size, &created, err);
  if (r == 0)
    r = journal_fits (s->data.healed, s->data.source, err);
  return r < 0 ? r : journal_mark (s->data.overlay, s->data.healed, s->data.source,
                                   OVERLAY_COMMITTING, err);
}

/* So that a start which is not told of the overlay still knows. */
static int
lay_link (struct stack *s, struct err *err)
{
  struct inplace *ip = &s->inplace;
  char *path;
  int r = inplace_journal_path (s, &path, err);

  if (r < 0)
    return r;
  if (symlink (ip->journal, path) < 0) {
    r = err_set (err, errno, "cannot create the link %s to the journal, without which a start after "
                 "a crash would not know of it: %s", path, strerror (errno));
    free (path);
    return r;
  }
  ip->link = path;
  return file_sync_folder (path, err);
}

/* Step 3.  A failure here has changed nothing in the source. */
static int
mark (struct stack *s, struct err *err)
{
  struct inplace *ip = &s->inplace;
  struct layer *l = &s->top;
  int r;

  r = bdev_flush (l->healed, err);
  if (r == 0)
    r = file_sync_folder (ip->journal, err);
  if (r == 0 && ip->named)
    r = lay_link (s, err);
  if (r == 0)
    r = journal_mark (l->overlay, l->healed, l->source, OVERLAY_COMMITTING, err);
  if (r < 0)
    return r;
  ip->marked = true;
  s->overlay_created = false;   /* no failure removes it from here on */
  return 0;
}

/* The source, as it is now, must be what was found sound in the journal. */
static int
check_source (struct stack *s, struct progress *progress, struct err *err)
{
  struct layer *l = &s->top;
  struct check_options copts = layer_check_options (l, progress);
  struct check *now;
  int r = check_run (l->source, &copts, &now, err);

  if (r < 0)
    return r;
  if (!check_sound (now))
    r = err_set (err, EIO, "what was written reads back damaged");
  if (r < 0) {
    check_free (now);
    return r;
  }
  check_free (l->after ? l->after : l->before);
  *(l->after ? &l->after : &l->before) = now;
  return 0;
}

/* Step 4. */
static int
write_source (struct stack *s, struct progress *progress, struct err *err)
{
  struct inplace *ip = &s->inplace;
  int r = 0;

  if (s->data.overlay) {
    r = copy (&s->data, ip->resumed, progress, &ip->data_result, err);
    lift_overlay (&s->data);
  }
  if (r < 0 || ip->resumed)
    return r;
  r = copy (&s->top, false, progress, &ip->result, err);
  lift_overlay (&s->top);
  return r < 0 ? r : check_source (s, progress, err);
}

static int
mark_done (struct layer *l, struct err *err)
{
  return l->overlay ? journal_mark (l->overlay, l->healed, l->source, OVERLAY_DONE, err) : 0;
}

/* Steps 5 and 6. */
static int
finish (struct stack *s, struct err *err)
{
  struct inplace *ip = &s->inplace;
  int r = mark_done (&s->data, err);

  if (r == 0)
    r = mark_done (&s->top, err);
  if (r == 0 && ip->data_journal)
    r = file_remove (ip->data_journal, err);
  if (r == 0 && ip->link)
    r = file_remove (ip->link, err);
  if (r == 0)
    r = file_remove (ip->journal, err);
  bdev_unref (s->top.overlay);
  bdev_unref (s->data.overlay);
  s->top.overlay = s->data.overlay = NULL;
  return r;
}

int
inplace_commit (struct stack *s, struct progress *progress, struct err *err)
{
  struct inplace *ip = &s->inplace;
  struct err why = { 0 };
  int r;

  if (!ip->resumed) {
    ip->journal = s->overlay;
    s->overlay = NULL;
  }
  r = journal_fits (s->top.healed, s->top.source, err);
  if (r == 0)
    r = prepare_data (s, err);
  if (r == 0 && !ip->resumed)
    r = mark (s, err);
  if (r < 0)
    return r;
  r = write_source (s, progress, &why);
  if (r < 0)
    return keep_journal (s, r, &why, err);
  r = finish (s, err);
  if (r < 0)
    err_prefix (err, "%s: the repair is written into it, but its journal cannot be put away", s->top.path);
  ip->committed = r == 0;
  return r;
}

/* --- life */

void
inplace_undo (struct stack *s)
{
  struct inplace *ip = &s->inplace;

  if (ip->marked)
    return;
  if (ip->link)
    file_remove (ip->link, NULL);
  if (s->overlay_created)
    file_remove (ip->journal ? ip->journal : s->overlay, NULL);
}

void
inplace_reset (struct inplace *ip)
{
  free (ip->journal);
  free (ip->link);
  free (ip->data_journal);
  free (ip->note);
}
