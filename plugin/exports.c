/* Exports: what a client may connect to, and what it is told about it.
 *
 *   ""               the guest disk
 *   snapshot/NAME    the disk as an internal snapshot remembers it; by ID too
 *   healed.qcow2     the image file itself, as the repair changes it
 *   report.json      what was found and mended
 *   lost+found       what nothing references any more; lost+found.json is its index
 *
 * All but the first are read-only.  The handle of a connection owns the device
 * behind it; the guest disk is one device for all, so that a flush on one
 * connection covers the writes of the others.
 *
 * Export names come from the network and snapshot names from the image: both
 * are printed only in part and without control characters.
 */
#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "dev/mem.h"
#include "lost-found.h"
#include "plugin/plugin.h"
#include "report.h"

#define SNAPSHOT_PREFIX "snapshot/"
#define HEALED_NAME     "healed.qcow2"
#define REPORT_NAME     "report.json"
#define ORPHANS_NAME    "lost+found"
#define INDEX_NAME      "lost+found.json"

static const char orphans_description[] =
  "clusters that nothing references any more, read-only";
static const char index_description[] = "what is where in lost+found, as JSON";

/* The handles that are open.  On the way out nbdkit does not call close for
 * connections that are still there, and without that the image would never be
 * closed: see exports_close_all.  Protected by open_lock.
 */
static struct export *open_exports;
static pthread_mutex_t open_lock = PTHREAD_MUTEX_INITIALIZER;

static void
remember (struct export *e)
{
  LOCK_SCOPE (&open_lock);
  e->next = open_exports;
  open_exports = e;
}

/* Was it the last? */
static bool
forget (struct export *e)
{
  LOCK_SCOPE (&open_lock);
  for (struct export **p = &open_exports; *p; p = &(*p)->next) {
    if (*p == e) {
      *p = e->next;
      break;
    }
  }
  return open_exports == NULL;
}

/* A copy of untrusted text that is safe to print. */
static void
printable (const char *s, char *buf, size_t len)
{
  size_t i;

  for (i = 0; s[i] && i < len - 1; ++i)
    buf[i] = isprint ((unsigned char) s[i]) ? s[i] : '?';
  buf[i] = '\0';
  if (s[i])
    memcpy (buf + len - 4, "...", 4);
}

static const char *
describe_guest (void)
{
  if (config.stack.snapshot)
    return "guest disk of a snapshot of a qcow2 image, read-only";
  if (served->top.before == NULL)
    return "guest disk of an unchecked qcow2 image, read-only";
  if (served->top.after)
    return served->writable ? "guest disk of a healed qcow2 image"
                            : "guest disk of a healed qcow2 image, read-only";
  return served->writable ? "guest disk of a qcow2 image"
                          : "guest disk of a qcow2 image, read-only";
}

/* --- devices behind the names; each gives the caller a reference */

static int
open_guest (struct bdev **ret, struct err *err)
{
  if (!served->guest)
    return err_set (err, ENOTSUP, "%s", served->why_no_guest ? served->why_no_guest
                                                             : "the guest disk is not served");
  *ret = bdev_ref (served->guest);
  return 0;
}

/* What the guest wrote so far is in the file after the flush; what it writes
 * while the file is read makes a copy that a check has to look at.
 */
static int
open_healed (struct bdev **ret, struct err *err)
{
  int r = served->writable ? bdev_flush (served->guest, err) : 0;

  if (r == 0)
    *ret = bdev_ref (served->top.healed);
  return r;
}

static int
write_report (FILE *fp, struct err *err)
{
  return report_write_json (fp, served, NULL);
}

static int
write_index (FILE *fp, struct err *err)
{
  return lost_found_write_json (served, fp, SIZE_MAX, err);
}

/* A device with what the function writes. */
static int
open_text (const char *name, int (*write) (FILE *, struct err *), struct bdev **ret,
           struct err *err)
{
  char *text = NULL;
  size_t len = 0;
  FILE *fp = open_memstream (&text, &len);
  int r = fp ? write (fp, err) : -ENOMEM;

  if (fp && fclose (fp) == EOF && r == 0)
    r = -ENOMEM;
  if (r == 0)
    r = mem_new (name, len, false, ret, err);
  if (r == 0) {
    r = bdev_pwrite (*ret, text, len, 0, 0, err);
    if (r < 0)
      bdev_unref (*ret);
  }
  free (text);
  if (r < 0 && err->code == 0)
    err_set (err, -r, "cannot make %s: %s", name, strerror (-r));
  return r;
}

static int
open_named (const char *name, struct export *e, struct err *err)
{
  char shown[64];

  if (name[0] == '\0') {
    e->writable = served->writable;
    e->description = describe_guest ();
    return open_guest (&e->d, err);
  }
  if (strcmp (name, HEALED_NAME) == 0) {
    e->description = "the qcow2 image file itself, as healed, read-only";
    return open_healed (&e->d, err);
  }
  if (strcmp (name, REPORT_NAME) == 0) {
    e->description = "what was found and mended, as JSON";
    return open_text (REPORT_NAME, write_report, &e->d, err);
  }
  if (strcmp (name, ORPHANS_NAME) == 0) {
    e->description = orphans_description;
    return lost_found_open (served, &e->d, err);
  }
  if (strcmp (name, INDEX_NAME) == 0) {
    e->description = index_description;
    return open_text (INDEX_NAME, write_index, &e->d, err);
  }
  if (strncmp (name, SNAPSHOT_PREFIX, strlen (SNAPSHOT_PREFIX)) == 0) {
    e->description = "the disk as an internal snapshot remembers it, read-only";
    return stack_open_snapshot (served, name + strlen (SNAPSHOT_PREFIX), &e->d, err);
  }
  printable (name, shown, sizeof shown);
  return err_set (err, ENOENT, "there is no export \"%s\"; `nbdinfo --list' shows those there are",
                  shown);
}

void *
exports_open (int readonly)
{
  const char *name = nbdkit_export_name ();
  struct export *e;
  struct err err = { 0 };
  int r;

  if (name == NULL)
    return NULL;                /* nbdkit_error was called */
  e = calloc (1, sizeof *e);
  if (e == NULL) {
    nbdkit_error ("out of memory");
    return NULL;
  }
  r = open_named (name, e, &err);
  if (r < 0) {
    nbdkit_error ("%s", err.code ? err.msg : strerror (-r));
    free (e);
    return NULL;
  }
  remember (e);
  return e;
}

void
exports_close (void *handle)
{
  struct export *e = handle;
  bool idle = forget (e);

  bdev_unref (e->d);
  free (e);
  if (idle)
    memory_give_back ();
}

/* The handles themselves stay: nbdkit may still call close for some. */
void
exports_close_all (void)
{
  LOCK_SCOPE (&open_lock);

  for (struct export *e = open_exports; e; e = e->next) {
    bdev_unref (e->d);
    e->d = NULL;
  }
}

const char *
exports_default (int readonly, int is_tls)
{
  return "";
}

/* Names that NBD can carry: a client could not ask for others. */
static bool
can_export (const struct snapshot *s)
{
  return s->name[0] && strlen (s->name) <= 4096 - strlen (SNAPSHOT_PREFIX) - 1;
}

static int
list_snapshot (struct nbdkit_exports *exports, const struct snapshot *s)
{
  const char *name = can_export (s) ? s->name : s->id;
  CLEANUP_FREE char *export_name = NULL;
  char description[128];

  snprintf (description, sizeof description,
            "internal snapshot %.32s, %" PRIu64 " bytes, read-only", s->id,
            s->size ? s->size : served->top.before->header.size);
  printable (description, description, sizeof description);
  if (asprintf (&export_name, SNAPSHOT_PREFIX "%s", name) < 0) {
    export_name = NULL;
    nbdkit_error ("out of memory");
    return -1;
  }
  return nbdkit_add_export (exports, export_name, description);
}

/* More than anybody reads; the others can still be asked for. */
#define MAX_LISTED 1000

int
exports_list (int readonly, int is_tls, struct nbdkit_exports *exports)
{
  const struct snapshot_vec *v = stack_snapshots (served);

  if (served->guest && nbdkit_add_export (exports, "", describe_guest ()) == -1)
    return -1;
  for (size_t i = 0; !served->why_no_guest && i < v->len && i < MAX_LISTED; ++i)
    if (list_snapshot (exports, &v->ptr[i]) == -1)
      return -1;
  if (nbdkit_add_export (exports, HEALED_NAME,
                         "the qcow2 image file itself, as healed, read-only") == -1)
    return -1;
  if (nbdkit_add_export (exports, REPORT_NAME, "what was found and mended, as JSON") == -1)
    return -1;
  if (!lost_found_any (served))
    return 0;
  if (nbdkit_add_export (exports, ORPHANS_NAME, orphans_description) == -1)
    return -1;
  return nbdkit_add_export (exports, INDEX_NAME, index_description);
}

const char *
exports_description (void *handle)
{
  const struct export *e = handle;

  return e->description;
}

int64_t
exports_get_size (void *handle)
{
  const struct export *e = handle;
  uint64_t size = bdev_size (e->d);

  if (size > INT64_MAX) {
    nbdkit_error ("the export has %" PRIu64 " bytes, more than NBD can serve", size);
    return -1;
  }
  return size;
}

int
exports_can_write (void *handle)
{
  const struct export *e = handle;

  return e->writable;
}

/* Any byte range works.  Preferred is what costs no copy on write: a cluster,
 * within the limits that nbdkit sets to all three.
 */
int
exports_block_size (void *handle, uint32_t *minimum, uint32_t *preferred, uint32_t *maximum)
{
  uint64_t cluster_size = served->top.before ? served->top.before->geom.cluster_size : 65536;

  *minimum = 1;
  *preferred = MIN (MAX (cluster_size, UINT64_C (4096)), UINT64_C (2) << 20);
  *maximum = 32 << 20;
  return 0;
}
