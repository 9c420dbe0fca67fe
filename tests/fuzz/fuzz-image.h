/* What the fuzzer and the replay share. */
#ifndef QR_TESTS_FUZZ_IMAGE_H
#define QR_TESTS_FUZZ_IMAGE_H

#include <stddef.h>
#include <stdint.h>

#include "dev/bdev.h"

/* The damaged image of an input of at least 2 bytes, read-only. */
struct bdev *fuzz_damaged (const uint8_t *data, size_t size);

/* Do it all with one input of at least 2 bytes; abort if a promise is broken.  judge, if not NULL,
 * is given the bytes of the image in the end, if it is said to be sound.
 */
void fuzz_image (const uint8_t *data, size_t size, void (*judge) (struct bdev *healed));

#endif /* QR_TESTS_FUZZ_IMAGE_H */
