/* The file that keeps what was read: every byte is read from the source once, whatever happens, and
 * is right whenever it is read.
 */
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "unit/unit.h"

#include "base/log.h"
#include "base/num.h"
#include "dev/file.h"
#include "heal/cache-file.h"
#include "heal/fingerprint.h"
#include "heal/overlay.h"
#include "recorder.h"

#define UNIT UINT64_C (65536)
#define SIZE (UINT64_C (8) << 20)

struct bench {
  char *folder, *source, *cache;        /* paths */
  uint8_t *bytes;                       /* of the source */
  uint64_t size;
  struct bdev *far, *d;                 /* the recorder; the cache */
};

static void
write_source (const struct bench *b)
{
  int fd = open (b->source, O_CREAT | O_WRONLY | O_TRUNC, 0600);

  assert_int_equal (write (fd, b->bytes, b->size), b->size);
  close (fd);
}

/* The cache is not open yet.  A quarter of the bytes are zeros, from the middle on. */
static struct bench
new_bench (uint64_t size)
{
  struct bench b = { .folder = make_folder (), .size = size, .bytes = malloc (size + 1) };
  uint64_t seed = size;

  for (uint64_t i = 0; i < size; i += 8) {
    uint64_t x = i >= size / 2 && i < size / 4 * 3 ? 0 : test_random (&seed) | 1;

    memcpy (b.bytes + i, &x, MIN (8, size - i));
  }
  if (asprintf (&b.source, "%s/source", b.folder) < 0
      || asprintf (&b.cache, "%s/cache", b.folder) < 0)
    abort ();
  write_source (&b);
  return b;
}

static int
try_open (struct bench *b, struct err *err)
{
  struct bdev *file = NULL;
  bool created;
  int r;

  assert_ok (file_open (b->source, 0, &file, err), err);
  assert_ok (recorder_new (file, true, &b->far, err), err);
  bdev_unref (file);
  r = cache_file_open (b->cache, b->far, b->source, &b->d, &created, err);
  if (r < 0) {
    bdev_unref (b->far);
    b->far = b->d = NULL;
  }
  return r;
}

/* Those of the fingerprint are not counted. */
static void
open_cache (struct bench *b)
{
  struct err err = { 0 };

  assert_ok (try_open (b, &err), &err);
  assert_true (b->d->far);
  assert_int_equal (bdev_size (b->d), b->size);
  recorder_forget (b->far);
}

static void
close_cache (struct bench *b)
{
  bdev_unref (b->d);
  bdev_unref (b->far);
  b->d = b->far = NULL;
}

static void
free_bench (struct bench *b)
{
  close_cache (b);
  remove_folder (b->folder);
  free (b->source);
  free (b->cache);
  free (b->bytes);
}

static bool
is_right (const struct bench *b, uint64_t off, uint64_t len)
{
  uint8_t *buf = malloc (len + 1);
  bool right = bdev_pread (b->d, buf, len, off, NULL) == 0
               && memcmp (buf, b->bytes + off, len) == 0;

  free (buf);
  return right;
}

/* Stock QEMU's opinion of the file, which is not open. */
static void
qemu_agrees (const struct bench *b)
{
  require_program ("qemu-img");
  assert_int_equal (run ("qemu-img check -f qcow2 %s", b->cache), 0);
  if (b->size)
    assert_int_equal (run ("qemu-img compare -f raw -F qcow2 %s %s", b->source, b->cache), 0);
}

/* --- ways of reading */

struct comparing {
  const struct bench *b;
  const struct bdev_range *ranges;
  atomic_uint right, failed;
};

static int
compare (void *opaque, size_t i, const void *buf, int r, const struct err *why)
{
  struct comparing *c = opaque;
  const struct bdev_range *range = &c->ranges[i];
  uint64_t size = c->b->size, inside = range->off < size ? MIN (range->len, size - range->off) : 0;
  const uint8_t *p = buf;

  if (r < 0) {
    c->failed++;
    return 0;
  }
  for (uint64_t k = inside; k < range->len; ++k)
    if (p[k] != 0)
      return 0;
  c->right += memcmp (buf, c->b->bytes + (inside ? range->off : 0), inside) == 0;
  return 0;
}

static bool
many_are_right (const struct bench *b, uint64_t *seed)
{
  struct bdev_range ranges[100];
  struct comparing c = { .b = b, .ranges = ranges };

  for (unsigned i = 0; i < 100; ++i) {
    ranges[i].off = i % 3 ? ranges[i - 1].off + ranges[i - 1].len
                          : test_random (seed) % (b->size + UNIT);
    ranges[i].len = test_random (seed) % (i % 10 ? 5000 : 200000);
  }
  return bdev_read_many (b->d, ranges, 100, compare, &c, NULL) == 0 && c.right == 100;
}

static bool
some_are_right (const struct bench *b, uint64_t *seed)
{
  uint64_t off = test_random (seed) % b->size, len = test_random (seed) % 300000;

  len = MIN (len, b->size - off);
  if (test_random (seed) % 4 == 0)
    bdev_cache (b->d, off, len, NULL);
  return is_right (b, off, len);
}

static void
read_all (const struct bench *b, uint64_t step)
{
  for (uint64_t off = 0; off < b->size; off += step)
    assert_true (is_right (b, off, MIN (step, b->size - off)));
}

/* --- once only */

/* Nothing was announced that had been asked for already. */
static void
assert_hints_came_first (const struct bench *b)
{
  struct recorded_vec v = recorder_take (b->far);

  for (size_t i = 0; i < v.len; ++i)
    for (size_t k = 0; v.ptr[i].op == REC_CACHE && k < i; ++k)
      assert_false (v.ptr[k].op == REC_READ && ranges_overlap (v.ptr[k].off, v.ptr[k].len,
                                                               v.ptr[i].off, v.ptr[i].len));
  vec_reset (&v);
}

static void
from_front_to_back (void **state)
{
  static const uint64_t steps[] = { 512, 4096, UNIT, 3 * UNIT + 1, SIZE };

  for (unsigned i = 0; i < 5; ++i) {
    struct bench b = new_bench (SIZE);

    open_cache (&b);
    read_all (&b, steps[i]);
    assert_false (recorder_read_twice (b.far));
    assert_int_equal (recorder_bytes (b.far, REC_READ), SIZE);
    recorder_forget (b.far);
    read_all (&b, 100000);
    close_cache (&b);
    qemu_agrees (&b);
    open_cache (&b);
    read_all (&b, 100000);
    assert_int_equal (recorder_count (b.far, REC_READ), 0);
    assert_int_equal (recorder_count (b.far, REC_CACHE), 0);
    free_bench (&b);
  }
}

static void
here_and_there (void **state)
{
  struct bench b = new_bench (SIZE);
  uint64_t seed = 1;

  open_cache (&b);
  for (unsigned i = 0; i < 40; ++i)
    assert_true (some_are_right (&b, &seed));
  assert_false (recorder_read_twice (b.far));
  for (unsigned i = 0; i < 5; ++i)
    assert_true (many_are_right (&b, &seed));
  assert_false (recorder_read_twice (b.far));
  read_all (&b, UNIT);
  assert_false (recorder_read_twice (b.far));
  assert_hints_came_first (&b);
  close_cache (&b);
  qemu_agrees (&b);
  free_bench (&b);
}

struct reader {
  const struct bench *b;
  uint64_t seed;
  unsigned wrong;
  pthread_t thread;
};

static void *
read_in_thread (void *opaque)
{
  struct reader *r = opaque;

  for (unsigned i = 0; i < 60; ++i)
    r->wrong += i % 12 == 5 ? !many_are_right (r->b, &r->seed) : !some_are_right (r->b, &r->seed);
  return NULL;
}

static void
read_in_threads (const struct bench *b)
{
  struct reader readers[8];

  for (unsigned i = 0; i < 8; ++i) {
    readers[i] = (struct reader) { .b = b, .seed = i };
    pthread_create (&readers[i].thread, NULL, read_in_thread, &readers[i]);
  }
  for (unsigned i = 0; i < 8; ++i) {
    pthread_join (readers[i].thread, NULL);
    assert_int_equal (readers[i].wrong, 0);
  }
}

static void
threads (void **state)
{
  for (unsigned round = 0; round < 3; ++round) {
    struct bench b = new_bench (SIZE + round * 12345);

    open_cache (&b);
    read_in_threads (&b);
    assert_false (recorder_read_twice (b.far));
    assert_hints_came_first (&b);
    close_cache (&b);
    qemu_agrees (&b);
    open_cache (&b);
    read_in_threads (&b);
    free_bench (&b);
  }
}

static void
all_sizes (void **state)
{
  static const uint64_t sizes[] = { 0, 1, 511, 512, 513, UNIT - 1, UNIT, UNIT + 1, UNIT + 512,
                                    3 * UNIT + 100, 64 * UNIT - 512, 64 * UNIT, 64 * UNIT + 1 };

  for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; ++i) {
    struct bench b = new_bench (sizes[i]);
    uint64_t seed = i;

    open_cache (&b);
    if (i % 2 && b.size)
      assert_true (many_are_right (&b, &seed));
    read_all (&b, UNIT / 2 + 1);
    assert_true (is_right (&b, b.size, 0));
    assert_int_equal (bdev_pread (b.d, &seed, 1, b.size, NULL), -EINVAL);
    assert_false (recorder_read_twice (b.far));
    close_cache (&b);
    qemu_agrees (&b);
    open_cache (&b);
    read_all (&b, UNIT);
    assert_int_equal (recorder_count (b.far, REC_READ), 0);
    free_bench (&b);
  }
}

static void
zeros_take_no_space (void **state)
{
  struct bench b = new_bench (SIZE);
  struct stat st;

  memset (b.bytes, 0, SIZE - 1);
  write_source (&b);
  open_cache (&b);
  read_all (&b, 1 << 20);
  close_cache (&b);
  assert_int_equal (stat (b.cache, &st), 0);
  assert_true (st.st_size <= 6 * 65536);
  qemu_agrees (&b);
  open_cache (&b);
  read_all (&b, 1 << 20);
  assert_int_equal (recorder_count (b.far, REC_READ), 0);
  free_bench (&b);
}

/* --- killed */

/* Reads in a child that is killed right after them; what the child kept is there or not. */
static void
read_and_be_killed (struct bench *b, unsigned nr, uint64_t seed, uint64_t whole)
{
  int status;
  pid_t pid = fork ();

  if (pid == 0) {
    open_cache (b);
    for (uint64_t off = 0; off < whole; off += 1 << 20)
      if (!is_right (b, off, MIN (1 << 20, b->size - off)))
        _exit (1);
    for (unsigned i = 0; i < nr; ++i)
      if (!some_are_right (b, &seed))
        _exit (1);
    kill (getpid (), SIGKILL);
  }
  assert_int_equal (waitpid (pid, &status, 0), pid);
  assert_true (WIFSIGNALED (status));
}

static void
killed (void **state)
{
  struct bench b = new_bench (SIZE);

  for (unsigned i = 0; i < 12; ++i) {
    read_and_be_killed (&b, i * 3, i, 0);
    assert_in_range (run ("qemu-img check -f qcow2 %s; s=$?; exit $((s == 3 ? 0 : s))", b.cache), 0, 0);
    open_cache (&b);
    if (i == 5)
      read_in_threads (&b);
    if (i == 11)
      read_all (&b, UNIT);
    assert_false (recorder_read_twice (b.far));
    close_cache (&b);
  }
  free_bench (&b);
}

/* What was flushed by the way is not read again: of 72 MiB all but 64 at least, however slow it is. */
static void
killed_late (void **state)
{
  struct bench b = new_bench (UINT64_C (80) << 20);

  read_and_be_killed (&b, 0, 0, UINT64_C (72) << 20);
  open_cache (&b);
  read_all (&b, 1 << 20);
  assert_true (recorder_bytes (b.far, REC_READ) <= UINT64_C (73) << 20);
  free_bench (&b);
}

/* --- errors */

static void
bad_sectors (void **state)
{
  struct bench b = new_bench (SIZE);
  struct bdev_range ranges[128];
  struct comparing c = { .b = &b, .ranges = ranges };
  uint8_t buf[512];

  open_cache (&b);
  recorder_fail (b.far, 20 * 512, 512, EIO);
  recorder_fail (b.far, 100 * UNIT + 512, 512, EIO);
  recorder_fail (b.far, 110 * UNIT, 512, ENOTCONN);
  for (unsigned i = 0; i < 128; ++i)
    ranges[i] = (struct bdev_range) { 100 * UNIT + i * 512, 512 };
  assert_int_equal (bdev_read_many (b.d, ranges, 128, compare, &c, NULL), 0);
  assert_int_equal (c.right, 127);
  assert_int_equal (c.failed, 1);
  for (unsigned i = 0; i < 300; ++i)
    if (i == 20)
      assert_int_equal (bdev_pread (b.d, buf, 512, i * 512, NULL), -EIO);
    else
      assert_true (is_right (&b, i * 512, 512));
  assert_int_equal (bdev_pread (b.d, buf, 512, 110 * UNIT, NULL), -ENOTCONN);
  assert_true (is_right (&b, 110 * UNIT + 512, 4 * UNIT));
  assert_int_equal (bdev_pread (b.d, buf, 2, 20 * 512 - 1, NULL), -EIO);
  recorder_heal (b.far);
  read_all (&b, 10000);                         /* no error was kept */
  recorder_forget (b.far);
  read_all (&b, 10000);
  assert_int_equal (recorder_count (b.far, REC_READ), 0);
  close_cache (&b);
  qemu_agrees (&b);
  free_bench (&b);
}

static char noticed[1000];

static void
notice (const char *msg)
{
  snprintf (noticed, sizeof noticed, "%s", msg);
}

static void
limit_files (rlim_t bytes)
{
  struct rlimit rl;

  signal (SIGXFSZ, SIG_IGN);
  getrlimit (RLIMIT_FSIZE, &rl);
  rl.rlim_cur = bytes;
  assert_int_equal (setrlimit (RLIMIT_FSIZE, &rl), 0);
}

/* The file can grow no more: all is read as ever, and what was kept before is still used. */
static void
no_space (void **state)
{
  for (rlim_t limit = 6 * UNIT; limit < SIZE / 2; limit += 13 * UNIT + 4096) {
    struct bench b = new_bench (SIZE);
    uint64_t again;

    noticed[0] = 0;
    log_set_notice_hook (notice);
    open_cache (&b);
    limit_files (limit);
    read_all (&b, 4 * UNIT);
    recorder_forget (b.far);
    read_all (&b, 4 * UNIT);
    again = recorder_bytes (b.far, REC_READ);
    assert_in_range (again, 1, SIZE - limit + 16 * UNIT);
    assert_non_null (strstr (noticed, "not kept"));
    read_in_threads (&b);
    close_cache (&b);
    limit_files (RLIM_INFINITY);
    log_set_notice_hook (NULL);
    assert_in_range (run ("qemu-img check -f qcow2 %s; s=$?; exit $((s == 3 ? 0 : s))", b.cache), 0, 0);
    open_cache (&b);
    read_all (&b, UNIT);
    assert_false (recorder_read_twice (b.far));
    free_bench (&b);
  }
}

/* What was kept can be read no more: it is read where it came from. */
static void
file_lost (void **state)
{
  struct bench b = new_bench (SIZE);

  open_cache (&b);
  read_all (&b, UNIT);
  recorder_forget (b.far);
  assert_int_equal (truncate (b.cache, 20 * UNIT), 0);
  read_all (&b, UNIT);
  assert_in_range (recorder_bytes (b.far, REC_READ), SIZE / 2, SIZE);
  free_bench (&b);
}

/* --- refusals */

static void
refused (struct bench *b, const char *word)
{
  struct err err = { 0 };

  assert_int_equal (try_open (b, &err), -EINVAL);
  if (!strstr (err.msg, word))
    fail_msg ("%s: not in: %s", word, err.msg);
}

static void
other_sources (void **state)
{
  struct bench b = new_bench (SIZE), larger = new_bench (SIZE + 512);
  struct stat st;

  open_cache (&b);
  read_all (&b, UNIT);
  close_cache (&b);
  run ("cp %s %s", b.cache, larger.cache);
  refused (&larger, "another cache");
  b.bytes[5]++;                                 /* changed, and its time with it */
  write_source (&b);
  refused (&b, "this cache was made for an image with other contents");
  b.bytes[5]--;
  write_source (&b);
  refused (&b, "after this cache was made");
  assert_int_equal (stat (b.cache, &st), 0);    /* it was left alone */
  assert_true (st.st_size > (off_t) SIZE / 2);
  free_bench (&b);
  free_bench (&larger);
}

/* Change every byte that the fingerprint is not made of, and keep the time. */
static void
change_unseen (struct bench *b)
{
  struct fingerprint f;
  struct bdev *file, *d;
  struct recorded_vec v;
  struct err err = { 0 };
  struct stat st;
  uint8_t *seen = calloc (b->size, 1);

  assert_int_equal (stat (b->source, &st), 0);
  assert_ok (file_open (b->source, 0, &file, &err), &err);
  assert_ok (recorder_new (file, true, &d, &err), &err);
  assert_ok (fingerprint_of_source (d, &f, &err), &err);
  v = recorder_take (d);
  for (size_t i = 0; i < v.len; ++i)
    if (v.ptr[i].op == REC_READ)
      memset (seen + v.ptr[i].off, 1, v.ptr[i].len);
  for (uint64_t i = 0; i < b->size; ++i)
    b->bytes[i] ^= !seen[i];
  write_source (b);
  assert_int_equal (utimensat (AT_FDCWD, b->source, (struct timespec[2]) { st.st_atim, st.st_mtim }, 0), 0);
  vec_reset (&v);
  free (seen);
  bdev_unref (d);
  bdev_unref (file);
}

/* Its fingerprint is the same, and so is its time, but it was written to. */
static void
written_unseen (void **state)
{
  struct bench b = new_bench (SIZE);

  open_cache (&b);
  read_all (&b, UNIT);
  close_cache (&b);
  change_unseen (&b);
  refused (&b, "is not what is there now");
  free_bench (&b);
}

static void
other_files (void **state)
{
  struct bench b = new_bench (SIZE);
  struct overlay_options oopts = { .source_path = b.source, .max_size = SIZE };
  struct bdev *file = NULL, *healed = NULL;
  struct err err = { 0 };
  bool created;

  assert_int_equal (run ("echo text >%s", b.cache), 0);
  refused (&b, "");
  assert_int_equal (run ("grep -q text %s", b.cache), 0);
  run ("rm %s && qemu-img create -f qcow2 %s 8M", b.cache, b.cache);
  refused (&b, "no overlay of this program");
  unlink (b.cache);
  /* An overlay is no cache. */
  assert_ok (file_open (b.source, 0, &file, &err), &err);
  assert_ok (overlay_open (b.cache, file, &oopts, &healed, &created, &err), &err);
  bdev_unref (healed);
  refused (&b, "overlay=");
  unlink (b.cache);
  /* And a cache is no overlay. */
  open_cache (&b);
  close_cache (&b);
  assert_int_equal (overlay_open (b.cache, file, &oopts, &healed, &created, &err), -EINVAL);
  assert_non_null (strstr (err.msg, "cache="));
  assert_int_equal (run ("test -s %s", b.cache), 0);
  bdev_unref (file);
  free_bench (&b);
}

static void
in_use (void **state)
{
  struct bench b = new_bench (SIZE), other = b;
  struct err err = { 0 };

  open_cache (&b);
  assert_true (try_open (&other, &err) < 0);
  assert_true (is_right (&b, 0, SIZE));
  free_bench (&b);
}

static int
count_zeros (void *opaque, uint64_t off, uint64_t len, unsigned kind)
{
  *(uint64_t *) opaque += kind & BDEV_ZERO ? len : 0;
  return 0;
}

static void
read_only (void **state)
{
  struct bench b = new_bench (SIZE);
  struct bdev_identity id;
  uint64_t zeros = 0;

  assert_int_equal (truncate (b.source, SIZE / 2), 0);
  assert_int_equal (truncate (b.source, SIZE), 0);
  memset (b.bytes + SIZE / 2, 0, SIZE / 2);
  open_cache (&b);
  assert_int_equal (bdev_pwrite (b.d, "x", 1, 0, 0, NULL), -EROFS);
  assert_int_equal (bdev_make_writable (b.d, NULL), -EROFS);
  assert_int_equal (bdev_pwrite (b.d, "x", 1, 0, 0, NULL), -EROFS);
  assert_int_equal (bdev_identity (b.d, &id, NULL), 0);
  assert_true (id.has_mtime);
  assert_int_equal (bdev_extents (b.d, 0, SIZE, count_zeros, &zeros, NULL), 0);
  assert_int_equal (zeros, SIZE / 2);
  read_all (&b, UNIT);
  free_bench (&b);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (from_front_to_back),
    cmocka_unit_test (here_and_there),
    cmocka_unit_test (threads),
    cmocka_unit_test (all_sizes),
    cmocka_unit_test (zeros_take_no_space),
    cmocka_unit_test (killed),
    cmocka_unit_test (killed_late),
    cmocka_unit_test (bad_sectors),
    cmocka_unit_test (no_space),
    cmocka_unit_test (file_lost),
    cmocka_unit_test (other_sources),
    cmocka_unit_test (written_unseen),
    cmocka_unit_test (other_files),
    cmocka_unit_test (in_use),
    cmocka_unit_test (read_only),
  };

  alarm (400);                 /* whoever waits for ever has failed */
  return cmocka_run_group_tests (tests, NULL, NULL);
}
