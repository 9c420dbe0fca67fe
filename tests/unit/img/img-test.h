/* What the tests of core/img share: images made by qemu-img or by us, a model
 * of the disk in plain RAM, and random requests to both.
 *
 * The judges are qemu-img check, compare and convert.
 */
#ifndef QR_TESTS_IMG_TEST_H
#define QR_TESTS_IMG_TEST_H

#include <fcntl.h>
#include <unistd.h>

#include "unit/unit.h"

#include "base/endian.h"
#include "base/num.h"
#include "dev/mem.h"
#include "fault.h"
#include "img/image.h"

#define UNUSED __attribute__ ((unused))

enum { CHECK_CLEAN = 0, CHECK_ERRORS = 2, CHECK_LEAKS = 3 };

/* Bytes of a device -> a sparse file. */
static inline UNUSED void
save (struct bdev *d, const char *path)
{
  static uint8_t buf[65536], zeros[65536];
  int fd = open (path, O_RDWR | O_CREAT | O_TRUNC, 0644);
  struct err err = { 0 };

  assert_true (fd >= 0);
  assert_int_equal (ftruncate (fd, bdev_size (d)), 0);
  for (uint64_t off = 0; off < bdev_size (d); off += sizeof buf) {
    size_t n = MIN (sizeof buf, bdev_size (d) - off);

    assert_ok (bdev_pread (d, buf, n, off, &err), &err);
    if (memcmp (buf, zeros, n) != 0)
      assert_int_equal (pwrite (fd, buf, n, off), n);
  }
  close (fd);
}

/* A file -> RAM. */
static inline UNUSED struct bdev *
load (const char *path, bool can_grow)
{
  static uint8_t buf[65536], zeros[65536];
  int fd = open (path, O_RDONLY);
  struct err err = { 0 };
  struct bdev *d = NULL;
  off_t size = lseek (fd, 0, SEEK_END);
  ssize_t n;

  assert_true (fd >= 0);
  assert_ok (mem_new (path, size, can_grow, &d, &err), &err);
  for (off_t off = 0; (n = pread (fd, buf, sizeof buf, off)) > 0; off += n)
    if (memcmp (buf, zeros, n) != 0)
      assert_ok (bdev_pwrite (d, buf, n, off, 0, &err), &err);
  close (fd);
  return d;
}

static inline UNUSED int
qemu_check (const char *path)
{
  return run ("qemu-img check -f qcow2 '%s'", path);
}

/* An image of ours in RAM. */
static inline UNUSED struct bdev *
new_image (uint32_t version, unsigned cluster_bits, unsigned refcount_order, uint64_t size,
           const char *backing_name)
{
  struct image_params p = {
    .version = version, .cluster_bits = cluster_bits, .refcount_order = refcount_order,
    .size = size, .backing_name = backing_name, .backing_format = backing_name ? "raw" : NULL,
  };
  struct err err = { 0 };
  struct bdev *d = NULL;

  assert_ok (mem_new ("ram.qcow2", 0, true, &d, &err), &err);
  assert_ok (image_create (d, &p, &err), &err);
  return d;
}

static inline UNUSED struct bdev *
open_view (struct bdev *file, struct bdev *backing, size_t cache_size)
{
  struct image_options opts = { .backing = backing, .cache_size = cache_size };
  struct err err = { 0 };
  struct bdev *view = NULL;

  assert_ok (image_open (file, &opts, &view, &err), &err);
  return view;
}

/* The disk as it should be. */
struct model {
  uint64_t size, cluster_size;
  uint64_t trim_size;           /* what trim works in: clusters or subclusters */
  bool trim_may_keep;           /* of less than a cluster: it may be one that is compressed */
  bool trim_zeros;              /* false: trim leaves everything alone (v2 with backing) */
  uint8_t *bytes;
  uint64_t rng;
};

static inline UNUSED void
model_init (struct model *m, uint64_t size, unsigned cluster_bits, uint64_t seed)
{
  memset (m, 0, sizeof *m);
  m->size = size;
  m->cluster_size = m->trim_size = UINT64_C (1) << cluster_bits;
  m->trim_zeros = true;
  m->trim_may_keep = false;
  m->bytes = calloc (1, size + 1);
  m->rng = seed;
}

static inline UNUSED uint64_t
below (struct model *m, uint64_t n)
{
  return test_random (&m->rng) % n;
}

/* A place and a length that are aligned to nothing, a sector or a cluster. */
static inline UNUSED void
random_range (struct model *m, uint64_t *off, uint64_t *len)
{
  static const unsigned aligns[] = { 1, 512, 4096, 0 };
  uint64_t align = aligns[below (m, 4)], max = MIN (m->cluster_size * 5, 3 << 20);

  if (align == 0)
    align = m->cluster_size;
  *off = below (m, m->size);
  *len = 1 + below (m, below (m, 2) ? MIN (max, 5000) : max);
  *off = *off / align * align;
  *len = DIV_ROUND_UP (*len, align) * align;
  /* Often up to the very end. */
  if (*len > m->size - *off)
    *len = m->size - *off;
}

static inline UNUSED void
check_read (struct bdev *view, struct model *m, uint64_t off, uint64_t len)
{
  uint8_t *buf = malloc (len);
  struct err err = { 0 };

  assert_ok (bdev_pread (view, buf, len, off, &err), &err);
  if (memcmp (buf, m->bytes + off, len) != 0)
    for (uint64_t i = 0; i < len; ++i)
      if (buf[i] != m->bytes[off + i])
        fail_msg ("byte %llu is 0x%02x, not 0x%02x", (unsigned long long) (off + i), buf[i],
                  m->bytes[off + i]);
  free (buf);
}

static inline UNUSED void
check_all (struct bdev *view, struct model *m)
{
  for (uint64_t off = 0; off < m->size; off += 1 << 20)
    check_read (view, m, off, MIN (1 << 20, m->size - off));
}

struct extents_seen {
  struct model *m;
  uint64_t next;
  unsigned last_kind;
};

static inline int
see_extent (void *opaque, uint64_t off, uint64_t len, unsigned kind)
{
  struct extents_seen *seen = opaque;

  assert_int_equal (off, seen->next);
  assert_true (len > 0);
  assert_int_not_equal (kind, seen->last_kind); /* joined */
  seen->next = off + len;
  seen->last_kind = kind;
  if (kind & BDEV_ZERO)
    for (uint64_t i = off; i < off + len; ++i)
      if (seen->m->bytes[i] != 0)
        fail_msg ("byte %llu is told to be zero", (unsigned long long) i);
  return 0;
}

static inline UNUSED void
check_extents (struct bdev *view, struct model *m, uint64_t off, uint64_t len)
{
  struct extents_seen seen = { .m = m, .next = off, .last_kind = 99 };
  struct err err = { 0 };

  assert_ok (bdev_extents (view, off, len, see_extent, &seen, &err), &err);
  assert_int_equal (seen.next, off + len);
}

static inline UNUSED void
do_write (struct bdev *view, struct model *m, uint64_t off, uint64_t len, unsigned flags)
{
  uint8_t *buf = malloc (len);
  struct err err = { 0 };
  uint64_t x = test_random (&m->rng);

  for (uint64_t i = 0; i < len; ++i)
    buf[i] = (x = x * 6364136223846793005u + 1442695040888963407u) >> 56;
  assert_ok (bdev_pwrite (view, buf, len, off, flags, &err), &err);
  memcpy (m->bytes + off, buf, len);
  free (buf);
}

static inline UNUSED void
do_zero (struct bdev *view, struct model *m, uint64_t off, uint64_t len, unsigned flags)
{
  struct err err = { 0 };
  int r = bdev_zero (view, off, len, flags, &err);

  if (r == -ENOTSUP && (flags & BDEV_FAST))
    return;
  assert_ok (r, &err);
  memset (m->bytes + off, 0, len);
}

/* After a trim of whole subclusters: those of clusters that it covers are zeros,
 * the others are, or are as before.
 */
static inline UNUSED void
see_trimmed (struct bdev *view, struct model *m, uint64_t first, uint64_t end)
{
  uint8_t *buf = malloc (m->trim_size);
  uint64_t n;

  for (uint64_t off = first; off < end; off += n) {
    uint64_t cluster = ROUND_DOWN (off, m->cluster_size);

    n = MIN (m->trim_size, end - off);
    assert_int_equal (bdev_pread (view, buf, n, off, NULL), 0);
    if ((cluster >= first && MIN (cluster + m->cluster_size, m->size) <= end) ||
        memcmp (buf, m->bytes + off, n) != 0)
      memset (m->bytes + off, 0, n);
    assert_memory_equal (buf, m->bytes + off, n);
  }
  free (buf);
}

static inline UNUSED void
do_trim (struct bdev *view, struct model *m, uint64_t off, uint64_t len, unsigned flags)
{
  uint64_t first = ROUND_UP (off, m->trim_size), end = off + len;
  struct err err = { 0 };

  assert_ok (bdev_trim (view, off, len, flags, &err), &err);
  if (end < m->size)
    end = ROUND_DOWN (end, m->trim_size);
  if (m->trim_may_keep)
    see_trimmed (view, m, first, end);
  else if (m->trim_zeros && first < end)
    memset (m->bytes + first, 0, end - first);
}

static inline UNUSED void
do_random (struct bdev *view, struct model *m)
{
  struct err err = { 0 };
  uint64_t off, len;
  unsigned fua = below (m, 10) == 0 ? BDEV_FUA : 0;

  random_range (m, &off, &len);
  if (len == 0)
    return;
  switch (below (m, 20)) {
  default: do_write (view, m, off, len, fua); break;
  case 0: case 1: case 2:
    do_zero (view, m, off, len, fua | (below (m, 2) ? BDEV_MAY_TRIM : 0) |
             (below (m, 4) ? 0 : BDEV_FAST));
    break;
  case 3: case 4: do_trim (view, m, off, len, fua); break;
  case 5: case 6: case 7: case 8: check_read (view, m, off, len); break;
  case 9: assert_ok (bdev_flush (view, &err), &err); break;
  case 10: check_extents (view, m, off, len); break;
  case 11: assert_ok (bdev_cache (view, off, len, &err), &err); break;
  }
}

/* The model's bytes as a raw file.  QEMU counts disks in sectors. */
static inline UNUSED void
save_model (const struct model *m, const char *path)
{
  int fd = open (path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
  uint64_t size = ROUND_DOWN (m->size, 512);

  assert_true (fd >= 0);
  for (uint64_t off = 0; off < size; ) {
    ssize_t n = pwrite (fd, m->bytes + off, size - off, off);

    assert_true (n > 0);
    off += n;
  }
  close (fd);
}

/* What QEMU thinks of the image: expected status of check, and the bytes. */
static inline UNUSED void
judge (const char *dir, struct bdev *file, const struct model *m, int expected)
{
  char path[512], raw[512];
  int r;

  snprintf (path, sizeof path, "%s/judged.qcow2", dir);
  snprintf (raw, sizeof raw, "%s/judged.raw", dir);
  save (file, path);
  save_model (m, raw);
  r = qemu_check (path);
  if (r != expected)
    fail_msg ("qemu-img check says %d, not %d", r, expected);
  r = run ("qemu-img compare -f qcow2 -F raw '%s' '%s'", path, raw);
  if (r != 0)
    fail_msg ("qemu-img compare says %d", r);
}

#endif /* QR_TESTS_IMG_TEST_H */
