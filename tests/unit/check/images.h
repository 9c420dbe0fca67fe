/* Real images for the tests of the check: made by qemu-img, held in RAM,
 * damaged by patching bytes.
 */
#ifndef QR_TESTS_IMAGES_H
#define QR_TESTS_IMAGES_H

#include "unit/unit.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/endian.h"
#include "base/num.h"
#include "check/check.h"
#include "check/report.h"
#include "dev/mem.h"
#include "fmt/entry.h"
#include "fmt/refbits.h"

/* Copy a file into a new device. */
static inline __attribute__ ((unused)) struct bdev *
load_image (const char *path)
{
  static uint8_t buf[65536], zero[65536];
  struct err err = { 0 };
  struct bdev *d;
  int fd = open (path, O_RDONLY);
  off_t end = lseek (fd, 0, SEEK_END), off = 0;
  ssize_t n;

  assert_true (fd >= 0);
  assert_ok (mem_new (path, end, true, &d, &err), &err);
  while ((off = lseek (fd, off, SEEK_DATA)) >= 0 && off < end) {
    off = ROUND_DOWN (off, sizeof buf);
    n = pread (fd, buf, sizeof buf, off);
    assert_true (n > 0);
    if (memcmp (buf, zero, n) != 0)
      assert_ok (bdev_pwrite (d, buf, n, off, 0, &err), &err);
    off += n;
  }
  close (fd);
  return d;
}

/* And back. */
static inline __attribute__ ((unused)) void
save_image (struct bdev *d, const char *path)
{
  static uint8_t buf[65536], zero[65536];
  int fd = open (path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
  uint64_t size = bdev_size (d);
  struct err err = { 0 };

  assert_true (fd >= 0);
  assert_int_equal (ftruncate (fd, size), 0);
  for (uint64_t off = 0; off < size; off += sizeof buf) {
    size_t n = MIN (size - off, sizeof buf);

    assert_ok (bdev_pread (d, buf, n, off, &err), &err);
    if (memcmp (buf, zero, n) != 0)
      assert_int_equal (pwrite (fd, buf, n, off), n);
  }
  close (fd);
}

/* An image of 8 MiB (or opts that say otherwise), after some shell commands in
 * which $f is its path.
 */
static inline __attribute__ ((unused)) struct bdev *
make_image (const char *opts, const char *size, const char *commands)
{
  char *folder = make_folder (), path[4096];
  struct bdev *d;

  snprintf (path, sizeof path, "%s/disk.qcow2", folder);
  /* On a busy machine qemu-img sometimes cannot time its key derivation. */
  if (run ("set -e; f=%s; cd %s; for i in $(seq 100); do "
           "qemu-img create -q -f qcow2 -o %s \"$f\" %s && break; done; %s", path, folder,
           opts, size, commands[0] ? commands : ":") != 0)
    fail_msg ("qemu-img cannot make %s %s: %s", opts, size, commands);
  d = load_image (path);
  remove_folder (folder);
  return d;
}

/* --- bytes */

static inline __attribute__ ((unused)) uint64_t
get64 (struct bdev *d, uint64_t off)
{
  uint8_t b[8];
  struct err err = { 0 };

  assert_ok (bdev_pread (d, b, 8, off, &err), &err);
  return load_be64 (b);
}

static inline __attribute__ ((unused)) uint32_t
get32 (struct bdev *d, uint64_t off)
{
  uint8_t b[4];
  struct err err = { 0 };

  assert_ok (bdev_pread (d, b, 4, off, &err), &err);
  return load_be32 (b);
}

static inline __attribute__ ((unused)) void
put64 (struct bdev *d, uint64_t off, uint64_t v)
{
  uint8_t b[8];
  struct err err = { 0 };

  store_be64 (b, v);
  assert_ok (bdev_pwrite (d, b, 8, off, 0, &err), &err);
}

static inline __attribute__ ((unused)) void
put32 (struct bdev *d, uint64_t off, uint32_t v)
{
  uint8_t b[4];
  struct err err = { 0 };

  store_be32 (b, v);
  assert_ok (bdev_pwrite (d, b, 4, off, 0, &err), &err);
}

static inline __attribute__ ((unused)) void
put_bytes (struct bdev *d, uint64_t off, const void *p, size_t n)
{
  struct err err = { 0 };

  assert_ok (bdev_pwrite (d, p, n, off, 0, &err), &err);
}

static inline __attribute__ ((unused)) void
zero_bytes (struct bdev *d, uint64_t off, uint64_t n)
{
  struct err err = { 0 };

  assert_ok (bdev_zero (d, off, n, 0, &err), &err);
}

/* --- places, found as the specification says, for sound images only */

static inline __attribute__ ((unused)) uint64_t
cluster_size_of (struct bdev *d)
{
  return UINT64_C (1) << get32 (d, HEADER_OFF_CLUSTER_BITS);
}

static inline __attribute__ ((unused)) uint64_t
l1_place (struct bdev *d, uint64_t i)
{
  return get64 (d, HEADER_OFF_L1_TABLE) + i * 8;
}

/* Entry j of the L2 table that L1 entry i names. */
static inline __attribute__ ((unused)) uint64_t
l2_place (struct bdev *d, uint64_t i, uint64_t j)
{
  bool extended = get32 (d, HEADER_OFF_VERSION) == 3 && (get64 (d, HEADER_OFF_INCOMPATIBLE) & 16);

  return (get64 (d, l1_place (d, i)) & L1E_OFF_MASK) + j * (extended ? 16 : 8);
}

static inline __attribute__ ((unused)) uint64_t
rt_place (struct bdev *d, uint64_t i)
{
  return get64 (d, HEADER_OFF_RT) + i * 8;
}

static inline __attribute__ ((unused)) unsigned
refcount_order_of (struct bdev *d)
{
  return get32 (d, HEADER_OFF_VERSION) == 2 ? 4 : get32 (d, HEADER_OFF_REFCOUNT_ORDER);
}

/* Set the stored refcount of a cluster; its block must exist. */
static inline __attribute__ ((unused)) void
put_refcount (struct bdev *d, uint64_t ci, uint64_t v)
{
  unsigned order = refcount_order_of (d);
  uint64_t entries = cluster_size_of (d) * 8 >> order;
  uint64_t block = get64 (d, rt_place (d, ci / entries));
  uint64_t bit = ci % entries << order, off = block + bit / 64 * 8;
  uint8_t b[8];
  struct err err = { 0 };

  assert_true (block != 0);
  assert_ok (bdev_pread (d, b, 8, off, &err), &err);
  refbits_set (b, order, (ci % entries) - (bit / 64 * 64 >> order), v);
  assert_ok (bdev_pwrite (d, b, 8, off, 0, &err), &err);
}

/* --- checks */

static inline __attribute__ ((unused)) struct check *
check_image (struct bdev *d)
{
  struct check *c = NULL;
  struct err err = { 0 };

  assert_ok (check_run (d, NULL, &c, &err), &err);
  return c;
}

/* What was found, as text, for messages. */
static inline __attribute__ ((unused)) char *
findings_text (const struct check *c)
{
  char *text = NULL;
  size_t len;
  FILE *fp = open_memstream (&text, &len);

  report_text (fp, c, 20);
  fclose (fp);
  return text;
}

/* "R01:3 T13:1" must be all that is found, items counted; "" = nothing. */
#define assert_findings(c, want) assert_findings_at (c, want, __FILE__, __LINE__)
static inline __attribute__ ((unused)) void
assert_findings_at (const struct check *c, const char *want, const char *file, int line)
{
  char got[1024] = "";
  size_t n = 0;

  for (int id = 0; id < NR_FINDINGS; ++id)
    if (c->findings.totals[id])
      n += snprintf (got + n, sizeof got - n, "%s%s:%llu", n ? " " : "", finding_kinds[id].code,
                     (unsigned long long) c->findings.totals[id]);
  if (strcmp (got, want) != 0) {
    print_error ("found: %s\nexpected: %s\n%s", got, want, findings_text (c));
    _fail (file, line);
  }
}

/* The first run of that kind; there must be one. */
static inline __attribute__ ((unused)) const struct finding *
first_run (const struct check *c, enum finding_id id)
{
  for (size_t i = 0; i < c->findings.runs.len; ++i)
    if (c->findings.runs.ptr[i].id == id)
      return &c->findings.runs.ptr[i];
  fail_msg ("there is no %s", finding_kinds[id].code);
  return NULL;
}

#endif /* QR_TESTS_IMAGES_H */
