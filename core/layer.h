/* One file of what the guest sees: the image itself, or a file behind it.
 *
 * A layer is opened, checked, healed and made into a device, in that order; the
 * caller (stack.c for the image, chain.c for what lies behind it) decides about
 * each step.  It owns what it names.
 */
#ifndef QR_LAYER_H
#define QR_LAYER_H

#include "check/check.h"
#include "dev/nbd.h"
#include "dev/watch.h"
#include "heal/heal.h"
#include "heal/lost.h"

/* How the sources are opened that an image consists of. */
struct source_options {
  bool force_share;             /* files are not locked */
  unsigned timeout, reconnect;  /* seconds, of far ones: see dev/nbd.h */
};

struct layer {
  char *path;                   /* as opened; or the URI of an NBD export */
  bool raw;                     /* the file is the disk, nothing to check */
  bool keep_orphans;            /* repaired in place: what may be lost data is not freed */
  struct bdev *source;          /* the file, opened read-only and locked; or the export */
  struct bdev *watch;           /* under source: knows what could not be read (dev/watch.h) */
  struct bdev *healed;          /* its bytes as an overlay changes them, or source again */
  bool journal;                 /* the overlay is a journal that only we make (overlay.h: direct) */
  struct bdev *overlay;         /* the overlay's own file; NULL: none, or in memory */
  struct check *before;         /* NULL: not checked */
  struct check *after;          /* NULL: nothing was healed */
  struct heal_result result;
  struct orphan_stats source_orphans;   /* of an overlay used again: those of the source */
  struct lost lost;             /* guest ranges that nothing can bring back */
};

/* Open path, a file or the URI of an NBD export, read-only.  from_image: an image named it, not
 * the operator, so that it may not make us read other files (keys, say).
 */
int layer_open (struct layer *l, const char *path, bool from_image,
                const struct source_options *opts, struct err *err);
void layer_reset (struct layer *l);

/* Keep what is read from the source in the file at path: see heal/cache-file.h. */
int layer_keep (struct layer *l, const char *path, bool *created, struct err *err);

/* Check l->healed into l->before.  -ENOTCONN if the source could not be reached meanwhile: what
 * was found then is not believed, here and in layer_heal.
 */
int layer_check (struct layer *l, bool deep, struct progress *progress, struct err *err);

/* The options that every check of l's bytes is made with. */
struct check_options layer_check_options (const struct layer *l, struct progress *progress);

/* What the last check says. */
static inline const struct check *
layer_now (const struct layer *l)
{
  return l->after ? l->after : l->before;
}

/* The orphans there are: an overlay that is used again has freed those of its source, but
 * the source keeps them.  l->before must be there.
 */
static inline const struct orphan_stats *
layer_orphans (const struct layer *l)
{
  const struct orphan_stats *o = &l->source_orphans;

  return o->clusters + o->tables > 0 ? o : &l->before->orphans;
}

/* Lay an overlay over the source: a file that is there or is made, or RAM.
 * guest_size: bytes of guest data that may have to find room in l, at the most; in RAM it is
 * the disk's, so the layer must have been checked.
 */
int layer_lay_file (struct layer *l, const char *overlay_path, uint64_t guest_size,
                    size_t cache_size, bool *created, struct err *err);
int layer_lay_memory (struct layer *l, struct err *err);

/* Take the overlay away, and what healing it came to. */
void layer_lift (struct layer *l);

/* Heal l->healed and check it again, into l->after. */
int layer_heal (struct layer *l, enum repair_level level, struct progress *progress,
                struct err *err);

/* The string in a header extension (backing format, data file name), or NULL if
 * there is none or it can't be one.  The caller frees.
 */
char *layer_string_ext (struct layer *l, uint32_t type);

/* The file, or the URI of the NBD export, that a name in l's header means: relative ones from l's
 * folder on.  -ENOTSUP if it is another kind of name ("json:..."), or relative to an export.
 */
int layer_resolve (const struct layer *l, const char *name, char **path, struct err *err);

#endif /* QR_LAYER_H */
