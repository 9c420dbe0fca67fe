/* Parameters: key=value -> struct config.
 *
 * One table, params, holds every key there is; the messages, --dump-plugin and
 * the test of the man page are made from it.  A second table holds what the
 * command line contract names but this version cannot do yet, so that somebody
 * who follows newer documentation is told so, and not that he misspelt it.
 *
 * config_set only looks at one value at a time and keeps the string (nbdkit
 * owns it and it lives as long as the plugin).  Whatever needs two parameters
 * or the file system waits for config_complete, which --dump-plugin skips.
 *
 * Nothing is opened here.  Files are looked at (stat) only to refuse two names
 * of one file: an overlay that is the image itself would break I1.
 */
#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include "base/cleanup.h"
#include "base/num.h"
#include "plugin/config.h"
#include "plugin/names.h"

struct config config = {
  .stack = { .repair = REPAIR_REFCOUNTS, .check = STACK_CHECK_YES,
             .source = { .timeout = NBD_DEFAULT_TIMEOUT, .reconnect = NBD_DEFAULT_RECONNECT } },
};

enum {
  P_FILE, P_REPAIR, P_OVERLAY, P_INPLACE, P_DISCARD_ORPHANS, P_SNAPSHOT, P_BACKING, P_DATA_FILE,
  P_REPORT, P_CHECK, P_CACHE_SIZE, P_FORCE_SHARE, P_LOST, P_URI, P_CACHE, P_TIMEOUT, P_RECONNECT,
  NR_PARAMS
};

static int parse_repair (const char *value);
static int parse_inplace (const char *value);
static int parse_discard_orphans (const char *value);
static int parse_snapshot (const char *value);
static int parse_backing (const char *value);
static int parse_data_file (const char *value);
static int parse_check (const char *value);
static int parse_cache_size (const char *value);
static int parse_force_share (const char *value);
static int parse_lost (const char *value);
static int parse_uri (const char *value);
static int parse_timeout (const char *value);
static int parse_reconnect (const char *value);

static struct param {
  const char *key;
  int (*parse) (const char *value);     /* NULL: a path, for config_complete */
  const char *value;                    /* as given, NULL = not given */
} params[NR_PARAMS] = {
  [P_FILE]        = { "file" },
  [P_REPAIR]      = { "repair", parse_repair },
  [P_OVERLAY]     = { "overlay" },
  [P_INPLACE]     = { "inplace", parse_inplace },
  [P_DISCARD_ORPHANS] = { "discard-orphans", parse_discard_orphans },
  [P_SNAPSHOT]    = { "snapshot", parse_snapshot },
  [P_BACKING]     = { "backing", parse_backing },
  [P_DATA_FILE]   = { "data-file", parse_data_file },
  [P_REPORT]      = { "report" },
  [P_CHECK]       = { "check", parse_check },
  [P_CACHE_SIZE]  = { "cache-size", parse_cache_size },
  [P_FORCE_SHARE] = { "force-share", parse_force_share },
  [P_LOST]        = { "lost", parse_lost },
  [P_URI]         = { "uri", parse_uri },
  [P_CACHE]       = { "cache" },
  [P_TIMEOUT]     = { "timeout", parse_timeout },
  [P_RECONNECT]   = { "reconnect", parse_reconnect },
};

/* Known, but not in this version: key and what to do instead. */
static const struct later {
  const char *key, *instead;
} later[] = {
  { "cluster-size", "images whose header is lost cannot be opened yet" },
  { "virtual-size", "images whose header is lost cannot be opened yet" },
};

const char config_help[] =
  "[file=]IMAGE               the qcow2 image, a file or block device; or:\n"
  "uri=NBD-URI                the qcow2 image is what an NBD server exports\n"
  "overlay=FILE               write repairs and the guest's changes to FILE, never to\n"
  "                           IMAGE; made if missing, used again if there\n"
  "inplace=true|false         write repairs into IMAGE itself, by way of a journal, and an\n"
  "                           overlay that is there, too\n"
  "discard-orphans=true|false let inplace=true free what may be lost data (default false)\n"
  "repair=off|refcounts|all   what may be mended (default refcounts)\n"
  "snapshot=NAME-OR-ID        serve this internal snapshot as the guest disk, read-only\n"
  "backing=refuse|follow|none|[raw:|qcow2:]FILE\n"
  "                           may the backing file that IMAGE names be opened?\n"
  "data-file=refuse|follow|FILE\n"
  "                           likewise its external data file\n"
  "check=true|false|deep      check before serving (default true); false: read-only;\n"
  "                           deep: decompress all that is compressed, too\n"
  "report=FILE                write what was found and mended to FILE, as JSON\n"
  "cache-size=SIZE            memory for L2 tables and refcount blocks (default 16M)\n"
  "force-share=true|false     open IMAGE although another program uses it; read-only\n"
  "lost=zero|error            how lost ranges of the guest disk read (default zero)\n"
  "cache=FILE                 keep what is read from the image in FILE, and never read it twice\n"
  "timeout=SECONDS            a far server that is silent for so long is lost (default 30)\n"
  "reconnect=SECONDS          how long a lost one is looked for before reads fail (default 60)";

/* The one place where a parameter is refused.  Always -1. */
static int __attribute__ ((format (printf, 1, 2)))
refuse (const char *fmt, ...)
{
  va_list args;

  va_start (args, fmt);
  nbdkit_verror (fmt, args);
  va_end (args);
  return -1;
}

void
config_print_keys (char *buf, size_t len, const char *separator)
{
  size_t n = 0;

  buf[0] = '\0';
  for (size_t i = 0; i < NR_PARAMS && n < len; ++i)
    n += snprintf (buf + n, len - n, "%s%s", i ? separator : "", params[i].key);
}

static int
refuse_unknown_key (const char *key)
{
  const char *keys[NR_PARAMS + 1];
  const char *near;
  char known[256];

  for (size_t i = 0; i < sizeof later / sizeof later[0]; ++i) {
    if (strcmp (key, later[i].key) == 0)
      return refuse ("%s= is not supported by this version: %s", key, later[i].instead);
  }
  for (size_t i = 0; i < NR_PARAMS; ++i)
    keys[i] = params[i].key;
  keys[NR_PARAMS] = NULL;
  near = name_nearest (key, keys);
  config_print_keys (known, sizeof known, ", ");
  if (near)
    return refuse ("unknown parameter '%s'; did you mean %s=?  Known: %s", key, near, known);
  return refuse ("unknown parameter '%s'; known: %s", key, known);
}

static int
refuse_value (int param, const char *value, const char *const *known, const char *list)
{
  const char *near = name_nearest (value, known);

  if (near)
    return refuse ("%s=%s: did you mean %s?  Known: %s", params[param].key, value, near, list);
  return refuse ("%s=%s is not known; known: %s", params[param].key, value, list);
}

static int
parse_repair (const char *value)
{
  static const char *const levels[] = { "off", "refcounts", "all", NULL };

  for (int i = 0; levels[i]; ++i) {
    if (strcmp (value, levels[i]) == 0) {
      config.stack.repair = (enum repair_level) (REPAIR_OFF + i);
      return 0;
    }
  }
  if (strcmp (value, "salvage") == 0)
    return refuse ("repair=salvage is not supported by this version; it has off, refcounts and all");
  return refuse_value (P_REPAIR, value, levels, "off, refcounts, all");
}

static int
parse_bool (int param, const char *value, bool *ret)
{
  int b = nbdkit_parse_bool (value);

  if (b == -1)
    return refuse ("%s=%s is not known; known: true, false", params[param].key, value);
  *ret = b;
  return 0;
}

static int
parse_inplace (const char *value)
{
  return parse_bool (P_INPLACE, value, &config.stack.inplace);
}

static int
parse_discard_orphans (const char *value)
{
  return parse_bool (P_DISCARD_ORPHANS, value, &config.stack.discard_orphans);
}

static int
parse_snapshot (const char *value)
{
  config.stack.snapshot = value;
  return 0;
}

/* A word, or a file; "./follow" is a file of that name. */
static int
parse_follow (const char *value, struct follow_policy *policy)
{
  if (strcmp (value, "refuse") == 0)
    policy->follow = FOLLOW_REFUSE;
  else if (strcmp (value, "follow") == 0)
    policy->follow = FOLLOW_NAMES;
  else {
    policy->follow = FOLLOW_FILE;
    policy->path = value;
  }
  return 0;
}

static int
parse_backing (const char *value)
{
  struct follow_policy *policy = &config.stack.backing;

  if (strcmp (value, "none") == 0) {
    policy->follow = FOLLOW_NONE;
    return 0;
  }
  if (strncmp (value, "raw:", 4) == 0)
    policy->format = "raw";
  else if (strncmp (value, "qcow2:", 6) == 0)
    policy->format = "qcow2";
  return parse_follow (policy->format ? strchr (value, ':') + 1 : value, policy);
}

static int
parse_data_file (const char *value)
{
  if (strcmp (value, "none") == 0)
    return refuse ("data-file=none: without its data file the image has no guest data at all; "
                   "name the file");
  return parse_follow (value, &config.stack.data_file);
}

static int
parse_check (const char *value)
{
  int b;

  if (strcmp (value, "deep") == 0) {
    config.stack.check = STACK_CHECK_DEEP;
    return 0;
  }
  b = nbdkit_parse_bool (value);
  if (b == -1)
    return refuse ("check=%s is not known; known: true, false, deep", value);
  config.stack.check = b ? STACK_CHECK_YES : STACK_CHECK_NO;
  return 0;
}

static int
parse_cache_size (const char *value)
{
  int64_t size = nbdkit_parse_size (value);

  if (size == -1)
    return refuse ("cache-size=%s is not a size; give bytes, or a number with K, M or G", value);
  if (size == 0)
    return refuse ("cache-size=0 leaves no room for any table; leave it out for the default");
  if ((uint64_t) size > SIZE_MAX / 2)
    return refuse ("cache-size=%s is more than this machine can address", value);
  config.stack.cache_size = size;
  return 0;
}

static int
parse_force_share (const char *value)
{
  return parse_bool (P_FORCE_SHARE, value, &config.stack.source.force_share);
}

static int
parse_lost (const char *value)
{
  static const char *const words[] = { "zero", "error", NULL };

  if (strcmp (value, "zero") != 0 && strcmp (value, "error") != 0)
    return refuse_value (P_LOST, value, words, "zero, error");
  config.stack.lost_error = value[0] == 'e';
  return 0;
}

static int
parse_uri (const char *value)
{
  if (nbd_is_uri (value))
    return 0;
  return refuse ("uri=%s is not the URI of an NBD export: those begin with nbd://, nbds://, nbd+unix:// or "
                 "nbd+vsock://.  For other protocols let nbdkit fetch it: nbdkit -U - curl URL --run "
                 "'nbdkit -f qcow2repair uri=\"$uri\"'", value);
}

static int
parse_seconds (int param, const char *value, unsigned *ret)
{
  if (nbdkit_parse_unsigned (params[param].key, value, ret) == -1)
    return -1;
  if (*ret > 86400)
    return refuse ("%s=%s is more than a day; give seconds", params[param].key, value);
  return 0;
}

static int
parse_timeout (const char *value)
{
  unsigned *timeout = &config.stack.source.timeout;

  if (parse_seconds (P_TIMEOUT, value, timeout) == -1)
    return -1;
  return *timeout ? 0 : refuse ("timeout=0 would give the server no time at all to answer; give seconds");
}

static int
parse_reconnect (const char *value)
{
  return parse_seconds (P_RECONNECT, value, &config.stack.source.reconnect);
}

int
config_set (const char *key, const char *value)
{
  struct param *p = NULL;

  for (size_t i = 0; i < NR_PARAMS; ++i) {
    if (strcmp (key, params[i].key) == 0)
      p = &params[i];
  }
  if (p == NULL)
    return refuse_unknown_key (key);
  if (p->value)
    return refuse ("%s= is given twice (%s and %s); give it once", key, p->value, value);
  if (value[0] == '\0')
    return refuse ("%s= has no value; give one or leave it out", key);
  p->value = value;
  return p->parse ? p->parse (value) : 0;
}

/* Do both names lead to one file, by whatever links?  For two names that do
 * not exist yet: in one directory under one name.  Of URIs only what they look like is known.
 */
static bool
same_file (const char *a, const char *b)
{
  struct stat sa, sb;
  bool have_a = stat (a, &sa) == 0, have_b = stat (b, &sb) == 0;

  if (have_a && have_b) {
    if (S_ISBLK (sa.st_mode) && S_ISBLK (sb.st_mode))
      return sa.st_rdev == sb.st_rdev;
    return sa.st_dev == sb.st_dev && sa.st_ino == sb.st_ino;
  }
  return !have_a && !have_b && strcmp (a, b) == 0;
}

/* The absolute path of a file that must exist, with links followed, so that the
 * overlay records where the image really lies.
 */
static int
resolve_path (int param, const char *value, const char **ret)
{
  *ret = realpath (value, NULL);
  if (*ret == NULL)
    return refuse ("%s=%s: %s", params[param].key, value, strerror (errno));
  return 0;
}

static int
resolve_existing (int param, const char **ret)
{
  return resolve_path (param, params[param].value, ret);
}

/* The image: a file or an export. */
static int
resolve_image (void)
{
  const char *file = params[P_FILE].value, *uri = params[P_URI].value;

  if (file && uri)
    return refuse ("file=%s and uri=%s exclude each other: one image is served; leave out one of them",
                   file, uri);
  if (file && nbd_is_uri (file))
    return refuse ("file=%s is the URI of an NBD export; say uri=%s", file, file);
  if (!file && !uri)
    return refuse ("which image?  Name it: nbdkit qcow2repair file=IMAGE, or uri=NBD-URI");
  if (file)
    return resolve_existing (P_FILE, &config.stack.file);
  config.stack.file = strdup (uri);
  return config.stack.file ? 0 : refuse ("uri=%s: %s", uri, strerror (ENOMEM));
}

/* owned keeps the string for config_reset. */
static int
resolve_follow (int param, struct follow_policy *policy, const char **owned)
{
  if (policy->follow != FOLLOW_FILE || nbd_is_uri (policy->path))
    return 0;
  if (resolve_path (param, policy->path, owned) == -1)
    return -1;
  policy->path = *owned;
  return 0;
}

/* The same for a file that may have to be made: its directory must be there. */
static int
resolve_new (int param, const char **ret)
{
  const char *key = params[param].key, *value = params[param].value;
  const char *slash = strrchr (value, '/');
  const char *name = slash ? slash + 1 : value;
  CLEANUP_FREE char *dir = NULL, *real_dir = NULL;
  bool exists;
  struct stat st;
  char *path;

  exists = stat (value, &st) == 0;
  if (exists ? S_ISDIR (st.st_mode) : name[0] == '\0')
    return refuse ("%s=%s is a directory; name a file", key, value);
  if (exists)
    return resolve_existing (param, ret);
  dir = slash ? strndup (value, slash - value + 1) : strdup (".");
  real_dir = dir ? realpath (dir, NULL) : NULL;
  if (real_dir == NULL)
    return refuse ("%s=%s: its directory %s: %s", key, value, dir ? dir : "", strerror (errno));
  if (asprintf (&path, "%s/%s", strcmp (real_dir, "/") == 0 ? "" : real_dir, name) == -1)
    return refuse ("%s=%s: %s", key, value, strerror (ENOMEM));
  *ret = path;
  if (access (real_dir, W_OK) == -1)
    return refuse ("%s=%s cannot be created: %s: %s", key, value, real_dir, strerror (errno));
  return 0;
}

/* Devices are named as they are: the links under /dev/stderr lead to things that
 * have no path.
 */
static int
resolve_report (void)
{
  const char *value = params[P_REPORT].value;

  if (strcmp (value, "-") == 0)
    return refuse ("report=-: stdout is not for reports; use report=/dev/stderr or a file");
  if (strncmp (value, "/dev/", 5) == 0) {
    config.report = strdup (value);
    return config.report ? 0 : refuse ("report=%s: %s", value, strerror (ENOMEM));
  }
  return resolve_new (P_REPORT, (const char **) &config.report);
}

static int
refuse_same (int a, const char *path_a, int b, const char *path_b)
{
  if (path_a && path_b && same_file (path_a, path_b))
    return refuse ("%s=%s and %s=%s are the same file; give %s= a name of its own",
                   params[a].key, params[a].value, params[b].key, params[b].value, params[b].key);
  return 0;
}

static bool
has_suffix (const char *s, const char *suffix)
{
  size_t n = strlen (s), m = strlen (suffix);

  return n >= m && strcmp (s + n - m, suffix) == 0;
}

/* Values that exclude each other. */
static int
refuse_contradictions (void)
{
  const struct stack_options *o = &config.stack;
  bool wants_overlay = params[P_OVERLAY].value;
  bool wants_repair = params[P_REPAIR].value && o->repair != REPAIR_OFF;

  if (o->source.force_share && wants_overlay)
    return refuse ("force-share=true and overlay= exclude each other: an image that another program "
                   "may be changing cannot be repaired; stop that program and leave out force-share, "
                   "or leave out overlay to read the image as it is");
  if (o->check == STACK_CHECK_NO && wants_overlay)
    return refuse ("check=false and overlay= exclude each other: nothing may be written over an image "
                   "that was not checked; leave out one of them");
  if (o->check == STACK_CHECK_NO && o->snapshot)
    return refuse ("check=false and snapshot= exclude each other: the check is what reads the "
                   "snapshot table; leave out one of them");
  if (o->inplace && (o->source.force_share || o->check == STACK_CHECK_NO || o->snapshot))
    return refuse ("inplace=true and %s exclude each other: an image is written to only if nobody "
                   "else may be writing, it was checked, and its active disk is what is served; "
                   "leave out one of them", o->source.force_share ? "force-share=true"
                   : o->check == STACK_CHECK_NO ? "check=false" : "snapshot=");
  if (o->inplace && params[P_CACHE].value)
    return refuse ("inplace=true and cache= exclude each other: what is kept of the image must not "
                   "change; leave out one of them");
  if (o->discard_orphans && !o->inplace)
    return refuse ("discard-orphans=true is about the image itself, which only inplace=true writes to; "
                   "add that, or leave it out");
  if (wants_overlay && has_suffix (params[P_OVERLAY].value, INPLACE_SUFFIX))
    return refuse ("overlay=%s: names that end so are those of journals (see inplace=); choose "
                   "another", params[P_OVERLAY].value);
  if (o->check == STACK_CHECK_NO && o->lost_error)
    return refuse ("check=false and lost=error exclude each other: the check is what finds lost ranges; "
                   "leave out one of them");
  if (o->check == STACK_CHECK_NO && wants_repair)
    return refuse ("check=false and repair=%s exclude each other: what was not checked cannot be "
                   "mended; leave out one of them", params[P_REPAIR].value);
  return 0;
}

int
config_complete (void)
{
  struct stack_options *o = &config.stack;

  if (refuse_contradictions () == -1 || resolve_image () == -1)
    return -1;
  if (resolve_follow (P_BACKING, &o->backing, &config.backing) == -1 ||
      resolve_follow (P_DATA_FILE, &o->data_file, &config.data_file) == -1)
    return -1;
  if (params[P_OVERLAY].value && resolve_new (P_OVERLAY, &o->overlay) == -1)
    return -1;
  if (params[P_CACHE].value && resolve_new (P_CACHE, &o->cache) == -1)
    return -1;
  if (params[P_REPORT].value && resolve_report () == -1)
    return -1;
  if (refuse_same (P_FILE, o->file, P_OVERLAY, o->overlay) == -1 ||
      refuse_same (P_FILE, o->file, P_REPORT, config.report) == -1 ||
      refuse_same (P_FILE, o->file, P_CACHE, o->cache) == -1 ||
      refuse_same (P_OVERLAY, o->overlay, P_CACHE, o->cache) == -1 ||
      refuse_same (P_CACHE, o->cache, P_REPORT, config.report) == -1 ||
      refuse_same (P_BACKING, o->backing.path, P_CACHE, o->cache) == -1 ||
      refuse_same (P_DATA_FILE, o->data_file.path, P_CACHE, o->cache) == -1 ||
      refuse_same (P_OVERLAY, o->overlay, P_REPORT, config.report) == -1 ||
      refuse_same (P_BACKING, o->backing.path, P_OVERLAY, o->overlay) == -1 ||
      refuse_same (P_BACKING, o->backing.path, P_REPORT, config.report) == -1 ||
      refuse_same (P_DATA_FILE, o->data_file.path, P_OVERLAY, o->overlay) == -1 ||
      refuse_same (P_DATA_FILE, o->data_file.path, P_REPORT, config.report) == -1 ||
      refuse_same (P_FILE, o->file, P_DATA_FILE, o->data_file.path) == -1)
    return -1;
  return 0;
}

void
config_reset (void)
{
  free ((char *) config.stack.file);
  free ((char *) config.stack.overlay);
  free ((char *) config.stack.cache);
  free ((char *) config.backing);
  free ((char *) config.data_file);
  free (config.report);
  memset (&config, 0, sizeof config);
  for (size_t i = 0; i < NR_PARAMS; ++i)
    params[i].value = NULL;
}
