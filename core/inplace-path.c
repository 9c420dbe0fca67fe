/* Where the journal of an image lies: in a place that follows from the image
 * alone, so that every start looks there.
 *
 *   regular file   IMAGE.qcow2repair-journal, beside it
 *   NBD export     in the state folder, under a name made from the URI
 *   block device   in the state folder ($XDG_STATE_HOME, else ~/.local/state, else
 *                  /var/lib), qcow2repair/NAME.qcow2repair-journal
 *
 * NAME is the device's first name under /dev/disk/by-id, which outlives a
 * restart of the machine, or else the kernel's.  LIMIT: without a name under by-id
 * (loop devices), a device that bears another name after a restart is not
 * recognised; nor is any by a user whose state folder is another, nor an export by another URI
 * (the sockets of `nbdkit -U -' have another name each time).  overlay=FILE then names the journal.
 */
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <zlib.h>

#include "base/cleanup.h"
#include "dev/nbd.h"
#include "inplace-path.h"
#include "inplace.h"

#define BY_ID  "/dev/disk/by-id"

static int
out_of_memory (struct err *err)
{
  return err_set (err, ENOMEM, "out of memory");
}

/* The least of the names that lead to the device, so that it is always the same one. */
static char *
name_by_id (dev_t rdev)
{
  DIR *dir = opendir (BY_ID);
  char *best = NULL;
  struct dirent *e;

  while (dir && (e = readdir (dir))) {
    CLEANUP_FREE char *path = NULL;
    struct stat st;

    if (e->d_name[0] == '.' || asprintf (&path, "%s/%s", BY_ID, e->d_name) < 0) {
      path = NULL;
      continue;
    }
    if (stat (path, &st) < 0 || !S_ISBLK (st.st_mode) || st.st_rdev != rdev
        || (best && strcmp (best, e->d_name) <= 0))
      continue;
    free (best);
    best = strdup (e->d_name);
  }
  if (dir)
    closedir (dir);
  return best;
}

static int
state_folder (char **ret, struct err *err)
{
  const char *xdg = getenv ("XDG_STATE_HOME"), *home = getenv ("HOME");
  int r;

  if (xdg && xdg[0] == '/')
    r = asprintf (ret, "%s/qcow2repair", xdg);
  else if (home && home[0] == '/' && home[1])
    r = asprintf (ret, "%s/.local/state/qcow2repair", home);
  else
    r = asprintf (ret, "/var/lib/qcow2repair");
  return r < 0 ? out_of_memory (err) : 0;
}

/* The readable part of a URI, and a checksum of all of it. */
static char *
name_of_uri (const char *uri)
{
  char readable[100];
  size_t n = 0;
  char *name;

  for (const char *p = uri; *p && n < sizeof readable - 1; ++p) {
    bool plain = isalnum ((unsigned char) *p) || *p == '.' || *p == '_';

    if (plain || (n > 0 && readable[n - 1] != '-'))
      readable[n++] = plain ? *p : '-';
  }
  readable[n] = '\0';
  if (asprintf (&name, "%s-%08lx", readable, crc32 (0, (const void *) uri, strlen (uri))) < 0)
    return NULL;
  return name;
}

static int
path_of_export (const char *uri, char **ret, struct err *err)
{
  CLEANUP_FREE char *name = name_of_uri (uri), *folder = NULL;
  int r = name ? state_folder (&folder, err) : out_of_memory (err);

  if (r < 0)
    return r;
  if (asprintf (ret, "%s/%s%s", folder, name, INPLACE_SUFFIX) < 0) {
    *ret = NULL;
    return out_of_memory (err);
  }
  return 0;
}

static int
path_of_file (const char *image, char **ret, struct err *err)
{
  CLEANUP_FREE char *real = realpath (image, NULL), *name = NULL, *folder = NULL;
  struct stat st;
  int r;

  *ret = NULL;
  if (!real || stat (real, &st) < 0)
    return err_set (err, errno, "%s: %s", image, strerror (errno));
  if (!S_ISBLK (st.st_mode))
    r = asprintf (ret, "%s%s", real, INPLACE_SUFFIX);
  else {
    name = name_by_id (st.st_rdev);
    if (!name)
      name = strdup (strrchr (real, '/') + 1);
    r = state_folder (&folder, err);
    if (r < 0)
      return r;
    r = name ? asprintf (ret, "%s/%s%s", folder, name, INPLACE_SUFFIX) : -1;
  }
  if (r < 0) {
    *ret = NULL;
    return out_of_memory (err);
  }
  return 0;
}

int
inplace_default_path (const char *image, char **ret, struct err *err)
{
  if (nbd_is_uri (image))
    return path_of_export (image, ret, err);
  return path_of_file (image, ret, err);
}

int
inplace_make_folder (const char *path, struct err *err)
{
  CLEANUP_FREE char *copy = strdup (path);

  if (!copy)
    return out_of_memory (err);
  for (char *p = strchr (copy + 1, '/'); p; p = strchr (p + 1, '/')) {
    *p = '\0';
    if (mkdir (copy, 0700) < 0 && errno != EEXIST && errno != EROFS && errno != EACCES)
      return err_set (err, errno, "cannot create the folder %s for the journal: %s", copy,
                      strerror (errno));
    *p = '/';
  }
  return 0;
}
