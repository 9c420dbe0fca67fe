/* What lies behind an image: its chain of backing files, and external data files.
 *
 * Images are untrusted, so no file that one names is opened unless the operator
 * allows it.  Every layer is checked; damaged ones are healed in RAM; all are
 * opened read-only.
 */
#ifndef QR_CHAIN_H
#define QR_CHAIN_H

#include "base/vec.h"
#include "layer.h"

enum follow {
  FOLLOW_REFUSE,                /* say what is missing and which option allows it */
  FOLLOW_NAMES,                 /* open what the images name */
  FOLLOW_NONE,                  /* do without: it reads as zeros */
  FOLLOW_FILE,                  /* open this file instead of the one that the image names */
};

struct follow_policy {
  enum follow follow;
  const char *path;             /* FOLLOW_FILE; or the URI of an NBD export */
  const char *format;           /* "raw" or "qcow2" for path; NULL = as the image says */
};

struct chain_options {
  struct follow_policy backing;
  struct follow_policy data_file;       /* FOLLOW_NAMES: for every layer; FILE: for the top */
  enum repair_level repair;
  struct source_options source;
  bool lost_error;              /* what a layer has lost fails with EIO */
  struct progress *progress;
};

/* More than anybody stacks; a chain this deep is a loop in disguise. */
#define MAX_CHAIN 64

DEFINE_VEC (layer_vec, struct layer);

/* Open everything behind top (checked, perhaps healed) and return it as one
 * read-only device, NULL if there is nothing behind it or FOLLOW_NONE.  layers
 * gets what was opened, nearest first, also on failure; the caller resets them.
 */
int chain_open (struct layer *top, const struct chain_options *opts,
                struct layer_vec *layers, struct bdev **backing, struct err *err);

/* The external data file of l, read-only, as a layer of its own (raw).  Only if
 * l needs one (geom.data_file).  top: the operator's FILE is meant for it.
 */
int chain_data_file (struct layer *l, bool top, const struct chain_options *opts,
                     struct layer *data, struct err *err);

#endif /* QR_CHAIN_H */
