/* Guest clusters that share a host cluster, with no snapshot to explain it (T15), get
 * one each, so that they cannot change each other's bytes: once, when refcounts
 * are right and the COPIED flags of all of them are clear.
 *
 * A write to such a cluster copies it, so splitting is rewriting what each but
 * the first holds, through the guest's view (core/img), which keeps its own order on
 * disk.  The one that stays behind is then the only user of its cluster and wants its
 * COPIED flag back: hence another check, and heal_run.  Stopped anywhere, there are
 * leaks and missing flags, which only cost a copy, and the next start goes on (I6).
 *
 * No backing file is needed, and none is opened: only what is allocated here is
 * rewritten.  With extended L2 entries one allocated subcluster is, and the copy
 * takes the others.
 *
 * Deliberately left shared: clusters of encrypted images, whose bytes mean something
 * else at another place; what finds no room (the guest's first write copies it, or fails as
 * on any full device); images in which damage remains.
 */
#include <errno.h>
#include <stdlib.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "fmt/entry.h"
#include "heal/heal-int.h"
#include "img/image.h"

/* The image's view, and what is being split in it. */
struct split {
  struct bdev *view;
  const struct geom *g;
  uint8_t *buf;                 /* one cluster */
};

/* What is there of a guest cluster. */
struct content {
  uint64_t data_off, data_len;  /* the first data; guest bytes, data_len 0: none */
  bool zero_alloc;              /* some of it is allocated, and reads as zeros */
};

static int
note_extent (void *opaque, uint64_t off, uint64_t len, unsigned kind)
{
  struct content *c = opaque;

  if (kind == 0) {
    c->data_off = off;
    c->data_len = len;
    return 1;
  }
  if (!(kind & BDEV_HOLE))
    c->zero_alloc = true;
  return 0;
}

/* Without subclusters, a cluster of zeros needs no host cluster at all. */
static int
split_cluster (struct split *s, uint64_t guest_off, struct err *err)
{
  uint64_t len = MIN (s->g->cluster_size, bdev_size (s->view) - guest_off);
  struct content c = { 0 };
  int r = bdev_extents (s->view, guest_off, len, note_extent, &c, err);

  if (r < 0)
    return r;
  if (c.data_len == 0)
    return c.zero_alloc && !s->g->extended_l2
           ? bdev_zero (s->view, guest_off, len, BDEV_MAY_TRIM, err) : 0;
  /* All of it where that is one unit; else one allocated subcluster. */
  if (s->g->extended_l2)
    c.data_len = MIN (c.data_len, s->g->cluster_size >> SUBCLUSTER_BITS);
  r = bdev_pread (s->view, s->buf, c.data_len, c.data_off, err);
  return r < 0 ? r : bdev_pwrite (s->view, s->buf, c.data_len, c.data_off, 0, err);
}

struct splitting {
  const struct split *s;
  const struct finding *f;
};

static bool
range_of_cluster (void *opaque, uint64_t i, struct bdev_range *range)
{
  const struct splitting *sp = opaque;
  uint64_t cs = sp->s->g->cluster_size;

  *range = (struct bdev_range) { sp->f->guest_off + i * cs, cs };
  return true;
}

static int
split_run (struct split *s, const struct finding *f, struct progress *progress, struct err *err)
{
  uint64_t cs = s->g->cluster_size;
  struct splitting sp = { s, f };
  struct ahead ahead;
  int r = 0;

  ahead_init (&ahead, s->view, f->count, range_of_cluster, &sp);
  for (uint64_t i = 0; r == 0 && i < f->count; ++i) {
    uint64_t guest_off = f->guest_off + i * cs;

    if (guest_off >= bdev_size (s->view))
      break;                    /* behind the end of the disk nobody writes */
    progress_update (progress, "splitting shared clusters", i, f->count);
    ahead_at (&ahead, i);
    r = progress_cancelled (progress) ? err_set (err, ECANCELED, "cancelled")
                                      : split_cluster (s, guest_off, err);
  }
  return r;
}

/* Everything that c tells of.  Having no room is no error. */
static int
split_all (struct bdev *d, const struct check *c, struct progress *progress, struct err *err)
{
  CLEANUP_FREE uint8_t *buf = malloc (c->geom.cluster_size);
  struct split s = { .g = &c->geom, .buf = buf };
  struct image_options iopts = { .backing = NULL };
  struct err why = { 0 };
  int r, flushed;

  if (!buf)
    return err_set (err, ENOMEM, "out of memory");
  r = image_open (d, &iopts, &s.view, err);
  if (r < 0)
    return r;
  for (size_t i = 0; r == 0 && i < c->findings.runs.len; ++i)
    if (c->findings.runs.ptr[i].id == FINDING_CLUSTER_SHARED)
      r = split_run (&s, &c->findings.runs.ptr[i], progress, &why);
  flushed = bdev_flush (s.view, r == 0 ? &why : NULL);
  bdev_unref (s.view);
  if (r == 0)
    r = flushed;
  return r == 0 || r == -ENOSPC ? 0 : err_set (err, -r, "splitting shared clusters: %s", why.msg);
}

/* Is the image as whole as writing to it demands? */
static bool
may_split (const struct bdev *d, const struct check *c)
{
  return d->writable && check_sound (c) && c->header.crypt_method == CRYPT_NONE
         && !c->geom.data_file;
}

static uint64_t
nr_shared (const struct check *c)
{
  return c->findings.totals[FINDING_CLUSTER_SHARED];
}

static int
check_again (struct bdev *d, struct check **c, const struct check_options *copts,
             struct err *err)
{
  struct check *next = NULL;
  int r = check_run (d, copts, &next, err);

  if (r == 0) {
    check_free (*c);
    *c = next;
  }
  return r;
}

/* The flags of those that stayed where they were; what ran out of room leaked. */
static int
tidy (struct bdev *d, struct check **c, const struct check_options *copts,
      struct heal_result *res, struct err *err)
{
  int r = check_again (d, c, copts, err);

  if (r < 0 || !heal_needed (*c, REPAIR_REFCOUNTS))
    return r;
  r = heal_run (d, *c, REPAIR_REFCOUNTS, copts ? copts->progress : NULL, res, err);
  if (r == 0)
    r = check_again (d, c, copts, err);
  return r < 0 ? r : heal_finish (d, *c, res, err);
}

int
heal_split (struct bdev *d, struct check **c, const struct check_options *copts,
            struct heal_result *res, struct err *err)
{
  uint64_t shared = nr_shared (*c), before;
  int r = 0;

  /* A check lists no more than so many of them, so this takes rounds. */
  do {
    before = nr_shared (*c);
    if (before == 0 || !may_split (d, *c))
      break;
    r = split_all (d, *c, copts ? copts->progress : NULL, err);
    if (r == 0)
      r = tidy (d, c, copts, res, err);
  } while (r == 0 && nr_shared (*c) < before);
  res->clusters_unsplit = nr_shared (*c);
  if (shared > res->clusters_unsplit)
    res->clusters_split += shared - res->clusters_unsplit;
  return r;
}
