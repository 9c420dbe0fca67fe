/* Where the journal of an image lies. */
#ifndef QR_INPLACE_PATH_H
#define QR_INPLACE_PATH_H

#include "base/err.h"

/* The place that follows from the image alone; the caller frees.  Nothing is made. */
int inplace_default_path (const char *image, char **ret, struct err *err);

/* Make the folders that path lies in, as far as they are missing. */
int inplace_make_folder (const char *path, struct err *err);

#endif /* QR_INPLACE_PATH_H */
