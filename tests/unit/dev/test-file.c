/* Files and block devices.  Some system calls are replaced here, so that they
 * are interrupted, come up short, fail or do not exist on demand; otherwise the
 * judge is the C library's own view of the same file.
 */
#include <fcntl.h>
#include <pthread.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/num.h"
#include "file-test.h"

/* --- system calls */

static atomic_bool nasty;               /* short and interrupted reads and writes */
static atomic_uint nasty_count;
static atomic_int sync_error;           /* what the next fdatasync fails with; once */
static atomic_uint syncs;
static atomic_bool no_fallocate;

static bool
interrupt (size_t *len)
{
  unsigned n = atomic_fetch_add (&nasty_count, 1);

  if (!atomic_load (&nasty))
    return false;
  if (*len > 1)
    *len = *len / 2 + n % 2;
  return n % 3 == 0;
}

ssize_t
pread (int fd, void *buf, size_t len, off_t off)
{
  if (interrupt (&len)) {
    errno = EINTR;
    return -1;
  }
  return syscall (SYS_pread64, fd, buf, len, off);
}

ssize_t
pwrite (int fd, const void *buf, size_t len, off_t off)
{
  if (interrupt (&len)) {
    errno = EINTR;
    return -1;
  }
  return syscall (SYS_pwrite64, fd, buf, len, off);
}

int
fdatasync (int fd)
{
  int e = atomic_exchange (&sync_error, 0);

  atomic_fetch_add (&syncs, 1);
  if (e) {
    errno = e;
    return -1;
  }
  return syscall (SYS_fdatasync, fd);
}

int
fallocate (int fd, int mode, off_t off, off_t len)
{
  if (atomic_load (&no_fallocate)) {
    errno = EOPNOTSUPP;
    return -1;
  }
  return syscall (SYS_fallocate, fd, mode, off, len);
}

/* --- a folder for each test, removed in any case */

static char loop_device[64];

static int
teardown (void **state)
{
  if (loop_device[0])
    run ("losetup -d %s", loop_device);
  loop_device[0] = '\0';
  atomic_store (&nasty, false);
  atomic_store (&sync_error, 0);
  atomic_store (&no_fallocate, false);
  remove_folder (folder);
  return 0;
}

static void
read_behind_its_back (uint64_t off, void *buf, size_t len)
{
  int fd = open (path, O_RDONLY);

  assert_true (fd >= 0);
  assert_int_equal (syscall (SYS_pread64, fd, buf, len, off), len);
  close (fd);
}

static uint64_t
blocks_used (void)
{
  struct stat st;

  assert_int_equal (stat (path, &st), 0);
  return (uint64_t) st.st_blocks * 512;
}

static void
reads_and_writes (void **state)
{
  struct bdev *d = create (1000000);
  uint8_t *a = malloc (300000), *b = malloc (300000);
  struct err err = { 0 };
  struct stat st;

  for (unsigned i = 0; i < 300000; ++i)
    a[i] = i >> 5 ^ i;
  for (unsigned round = 0; round < 2; ++round) {
    atomic_store (&nasty, round == 1);
    assert_ok (bdev_pwrite (d, a, 300000, 123457 * (round + 1), 0, &err), &err);
    memset (b, 0xee, 300000);
    assert_ok (bdev_pread (d, b, 300000, 123457 * (round + 1), &err), &err);
    assert_memory_equal (a, b, 300000);
    read_behind_its_back (123457 * (round + 1), b, 300000);
    assert_memory_equal (a, b, 300000);
  }
  assert_int_equal (stat (path, &st), 0);
  assert_int_equal (st.st_size, 1000000);
  assert_int_equal (st.st_mode & 07777 & ~0644, 0);
  /* A file that was cut short by somebody else: an error, and no endless loop. */
  assert_int_equal (truncate (path, 1000), 0);
  assert_int_equal (bdev_pread (d, b, 100, 950, &err), -EIO);
  assert_non_null (strstr (err.msg, path));
  bdev_unref (d);
  free (a);
  free (b);
}

static void
sizes (void **state)
{
  struct bdev *d = create (100), *again;
  uint8_t b[50];

  assert_true (d->can_grow && d->writable);
  assert_int_equal (bdev_pwrite (d, "0123456789", 10, 90, 0, NULL), 0);
  assert_int_equal (bdev_resize (d, 95, NULL), 0);
  assert_int_equal (bdev_pread (d, b, 6, 90, NULL), -EINVAL);
  assert_int_equal (bdev_resize (d, 200, NULL), 0);
  assert_int_equal (bdev_pread (d, b, 50, 90, NULL), 0);
  assert_memory_equal (b, "01234\0\0\0", 8);
  /* More than the file system takes: the size stays. */
  assert_true (bdev_resize (d, UINT64_MAX, NULL) < 0);
  assert_int_equal (bdev_size (d), 200);
  if (bdev_resize (d, INT64_MAX, NULL) == 0)            /* tmpfs takes all */
    assert_int_equal (bdev_resize (d, 200, NULL), 0);
  assert_int_equal (bdev_size (d), 200);
  bdev_unref (d);
  assert_int_equal (file_create (path, &again, NULL), -EEXIST);
  assert_int_equal (file_open (path, 0, &again, NULL), 0);
  assert_int_equal (bdev_size (again), 200);
  assert_false (again->writable);
  assert_int_equal (bdev_pwrite (again, "x", 1, 0, 0, NULL), -EROFS);
  bdev_unref (again);
}

/* Whatever the file system can do of itself, the bytes are the same. */
static void
zeros_and_holes (void **state)
{
  enum { SIZE = 4 << 20 };
  static const unsigned flags[] = { 0, BDEV_MAY_TRIM, BDEV_FAST, BDEV_FAST | BDEV_MAY_TRIM };
  uint8_t *buf = malloc (SIZE), *model = malloc (SIZE);

  for (unsigned without = 0; without < 2; ++without)
    for (unsigned i = 0; i < 4; ++i) {
      struct bdev *d = create (SIZE);
      int r;

      memset (model, 0x77, SIZE);
      assert_int_equal (bdev_pwrite (d, model, SIZE, 0, BDEV_FUA, NULL), 0);
      atomic_store (&no_fallocate, without);
      r = bdev_zero (d, 12345, 3000001, flags[i], NULL);
      if (r == -ENOTSUP) {      /* this file system cannot: only FAST may say so */
        assert_true (flags[i] & BDEV_FAST);
        assert_int_equal (bdev_zero (d, 0, 1 << 20, flags[i], NULL), -ENOTSUP);
      }
      else {
        assert_int_equal (r, 0);
        assert_false (without && (flags[i] & BDEV_FAST));
        memset (model + 12345, 0, 3000001);
      }
      /* Trimming never fails for want of support, and spares the neighbours. */
      assert_int_equal (bdev_trim (d, 3500001, 400000, 0, NULL), 0);
      read_behind_its_back (0, buf, SIZE);
      assert_memory_equal (buf, model, 3500001);
      assert_memory_equal (buf + 3900001, model + 3900001, SIZE - 3900001);
      assert_int_equal (bdev_size (d), SIZE);
      bdev_unref (d);
      unlink (path);
    }
  free (buf);
  free (model);
}

static void
punching_frees_space (void **state)
{
  struct bdev *d = create (8 << 20);
  uint8_t *buf = malloc (8 << 20);
  uint64_t before;

  memset (buf, 1, 8 << 20);
  assert_int_equal (bdev_pwrite (d, buf, 8 << 20, 0, BDEV_FUA, NULL), 0);
  free (buf);
  before = blocks_used ();
  if (bdev_zero (d, 0, 4 << 20, BDEV_FAST | BDEV_MAY_TRIM, NULL) == -ENOTSUP) {
    bdev_unref (d);
    print_message ("SKIP: holes cannot be punched on this file system\n");
    skip ();
  }
  assert_true (blocks_used () <= before - (3 << 20));
  assert_int_equal (bdev_trim (d, 4 << 20, 4 << 20, BDEV_FUA, NULL), 0);
  assert_true (blocks_used () <= before - (7 << 20));
  /* Without leave to trim, the space stays. */
  before = blocks_used ();
  assert_int_equal (bdev_zero (d, 0, 1 << 20, 0, NULL), 0);
  assert_true (blocks_used () >= before);
  bdev_unref (d);
}

struct seen {
  uint64_t next, data;
  unsigned nr;
  unsigned stop_after;
};

static int
see (void *opaque, uint64_t off, uint64_t len, unsigned kind)
{
  struct seen *s = opaque;

  assert_true (off == s->next && len > 0);
  s->next += len;
  s->data += kind & BDEV_ZERO ? 0 : len;
  return ++s->nr == s->stop_after;
}

static void
sparse_extents (void **state)
{
  struct bdev *d = create (UINT64_C (1) << 34);
  struct seen s = { .next = 7 };
  uint64_t end = bdev_size (d);
  uint8_t b[65536] = "x";

  assert_int_equal (bdev_pwrite (d, b, sizeof b, UINT64_C (1) << 30, 0, NULL), 0);
  assert_int_equal (bdev_pwrite (d, b, sizeof b, UINT64_C (1) << 33, 0, NULL), 0);
  assert_int_equal (bdev_extents (d, 7, end - 7, see, &s, NULL), 0);
  assert_true (s.next == end);
  if (s.nr == 1) {
    bdev_unref (d);
    print_message ("SKIP: this file system does not tell holes\n");
    skip ();
  }
  assert_int_equal (s.nr, 5);
  assert_in_range (s.data, 2 * sizeof b, 2 << 20);
  /* Early stop; a query inside data; a query inside a hole. */
  s = (struct seen) { .stop_after = 2 };
  assert_int_equal (bdev_extents (d, 0, end, see, &s, NULL), 0);
  assert_int_equal (s.nr, 2);
  s = (struct seen) { .next = (UINT64_C (1) << 30) + 5 };
  assert_int_equal (bdev_extents (d, s.next, 100, see, &s, NULL), 0);
  assert_true (s.nr == 1 && s.data == 100);
  s = (struct seen) { .next = end - 100 };
  assert_int_equal (bdev_extents (d, end - 100, 100, see, &s, NULL), 0);
  assert_true (s.nr == 1 && s.data == 0);
  bdev_unref (d);
}

static void
a_failed_flush_stays_failed (void **state)
{
  struct bdev *d = create (4096);
  struct err err = { 0 };
  unsigned before;

  assert_int_equal (bdev_flush (d, NULL), 0);
  atomic_store (&sync_error, EINTR);
  before = atomic_load (&syncs);
  assert_int_equal (bdev_flush (d, NULL), 0);           /* again, not an error */
  assert_int_equal (atomic_load (&syncs), before + 2);
  assert_int_equal (bdev_pwrite (d, "x", 1, 0, 0, NULL), 0);
  atomic_store (&sync_error, EIO);
  assert_int_equal (bdev_flush (d, &err), -EIO);
  assert_int_equal (err.code, EIO);
  /* The kernel would say all is well by now. */
  assert_int_equal (bdev_flush (d, NULL), -EIO);
  assert_int_equal (bdev_pwrite (d, "x", 1, 0, BDEV_FUA, NULL), -EIO);
  assert_int_equal (bdev_pwrite (d, "x", 1, 0, 0, NULL), 0);
  bdev_unref (d);
}

static void *
flush_often (void *opaque)
{
  for (unsigned i = 0; i < 200; ++i)
    if (bdev_flush (opaque, NULL) < 0)
      return opaque;
  return NULL;
}

/* Of many that flush at the same time, each gets a sync that began after it came. */
static void
flushes_are_shared (void **state)
{
  struct bdev *d = create (4096);
  pthread_t t[4];
  unsigned before = atomic_load (&syncs), n;

  for (unsigned i = 0; i < 4; ++i)
    assert_int_equal (pthread_create (&t[i], NULL, flush_often, d), 0);
  for (unsigned i = 0; i < 4; ++i) {
    void *bad;

    pthread_join (t[i], &bad);
    assert_null (bad);
  }
  n = atomic_load (&syncs) - before;
  assert_in_range (n, 200, 800);
  assert_int_equal (bdev_flush (d, NULL), 0);           /* alone: never skipped */
  assert_int_equal (atomic_load (&syncs) - before, n + 1);
  bdev_unref (d);
}

static void
other_types_are_refused_at_once (void **state)
{
  struct sockaddr_un sa = { .sun_family = AF_UNIX };
  struct err err = { 0 };
  struct bdev *d;
  int s;

  alarm (300);                  /* rather than hang */
  assert_int_equal (mkfifo (path, 0600), 0);
  assert_int_equal (file_open (path, 0, &d, &err), -EINVAL);
  assert_non_null (strstr (err.msg, "FIFO"));
  assert_int_equal (file_open (path, FILE_WRITE, &d, NULL), -EINVAL);
  assert_int_equal (file_open (path, FILE_NO_LOCK, &d, NULL), -EINVAL);
  assert_int_equal (file_open (folder, 0, &d, NULL), -EISDIR);
  assert_int_equal (file_open ("/dev/null", FILE_WRITE, &d, NULL), -EINVAL);
  snprintf (sa.sun_path, sizeof sa.sun_path, "%s/s", folder);
  s = socket (AF_UNIX, SOCK_STREAM, 0);
  assert_int_equal (bind (s, (struct sockaddr *) &sa, sizeof sa), 0);
  assert_int_equal (file_open (sa.sun_path, 0, &d, NULL), -EINVAL);
  close (s);
  err_clear (&err);
  assert_int_equal (file_open ("/nonexistent/x", 0, &d, &err), -ENOENT);
  assert_non_null (strstr (err.msg, "/nonexistent/x"));
  assert_int_equal (file_create ("/nonexistent/x", &d, NULL), -ENOENT);
  alarm (0);
}

static void
identity (void **state)
{
  struct bdev *d = create (4096);
  struct bdev_identity a, b;
  struct timespec times[2] = { { .tv_nsec = UTIME_OMIT }, { 12345, 678 } };

  assert_int_equal (bdev_identity (d, &a, NULL), 0);
  assert_true (a.has_mtime);
  assert_int_equal (utimensat (AT_FDCWD, path, times, 0), 0);
  assert_int_equal (bdev_identity (d, &b, NULL), 0);
  assert_true (b.mtime.tv_sec == 12345 && b.mtime.tv_nsec == 678);
  assert_false (a.mtime.tv_sec == b.mtime.tv_sec);
  bdev_unref (d);
}

static void
no_descriptor_survives_exec (void **state)
{
  struct bdev *d = create (4096);

  /* The shell is started by exec: what it still has open leads to the file. */
  assert_int_equal (run ("ls -l /proc/self/fd | grep -F '%s'", path), 1);
  bdev_unref (d);
}

/* --- block devices */

static bool
have_loop_device (uint64_t size)
{
  char cmd[4200];
  FILE *f;

  loop_device[0] = '\0';
  if (truncate (path, size) < 0) {
    int fd = open (path, O_WRONLY | O_CREAT, 0600);

    assert_int_equal (ftruncate (fd, size), 0);
    close (fd);
  }
  snprintf (cmd, sizeof cmd, "losetup -f --show '%s' 2>/dev/null", path);
  f = popen (cmd, "r");
  if (fscanf (f, "%63s", loop_device) != 1)
    loop_device[0] = '\0';
  pclose (f);
  if (loop_device[0] && access (loop_device, R_OK | W_OK) == 0)
    return true;
  print_message ("SKIP: no loop devices here (losetup was refused)\n");
  return false;
}

static int
count_data (void *opaque, uint64_t off, uint64_t len, unsigned kind)
{
  assert_int_equal (kind, 0);
  *(uint64_t *) opaque += len;
  return 0;
}

static void
block_device (void **state)
{
  enum { SIZE = 4 << 20 };
  static const unsigned flags[] = { 0, BDEV_MAY_TRIM, BDEV_FAST | BDEV_MAY_TRIM };
  uint8_t *model = malloc (SIZE), *buf = malloc (SIZE);
  struct bdev_identity id;
  struct err err = { 0 };
  uint64_t data = 0;
  struct bdev *d;

  if (!have_loop_device (SIZE)) {
    free (model);
    free (buf);
    skip ();
  }
  assert_ok (file_open (loop_device, FILE_WRITE, &d, &err), &err);
  assert_int_equal (bdev_size (d), SIZE);
  assert_false (d->can_grow);
  assert_int_equal (bdev_resize (d, SIZE + 512, NULL), -ENOSPC);
  assert_int_equal (bdev_resize (d, SIZE - 512, NULL), -ENOTSUP);
  assert_int_equal (bdev_identity (d, &id, NULL), 0);
  assert_false (id.has_mtime);
  memset (model, 0x5a, SIZE);
  assert_ok (bdev_pwrite (d, model, SIZE, 0, 0, &err), &err);
  for (unsigned i = 0; i < 3; ++i) {
    /* Neither end on a sector; one inside a sector; one across a boundary. */
    static const struct { uint64_t off, len; } where[] = {
      { 1001, 1000003 }, { 2000100, 7 }, { 2097152 - 3, 6 }, { 3000000, 512 },
    };

    for (unsigned j = 0; j < 4; ++j) {
      uint64_t off = where[j].off + i * 30000;
      int r = bdev_zero (d, off, where[j].len, flags[i], &err);

      if (r == -ENOTSUP && (flags[i] & BDEV_FAST)) {
        err_clear (&err);
        continue;
      }
      assert_ok (r, &err);
      memset (model + off, 0, where[j].len);
    }
  }
  assert_ok (bdev_trim (d, 3500001, 100000, 0, &err), &err);
  assert_int_equal (bdev_extents (d, 0, SIZE, count_data, &data, NULL), 0);
  assert_int_equal (data, SIZE);
  assert_ok (bdev_flush (d, &err), &err);
  assert_ok (bdev_pread (d, buf, SIZE, 0, &err), &err);
  assert_memory_equal (buf, model, 3500001);
  assert_memory_equal (buf + 3600001, model + 3600001, SIZE - 3600001);
  bdev_unref (d);
  read_behind_its_back (0, buf, SIZE);          /* the file under the loop device */
  assert_memory_equal (buf, model, 3500001);
  assert_memory_equal (buf + 3600001, model + 3600001, SIZE - 3600001);
  free (model);
  free (buf);
}

static void
block_device_locks_and_make_writable (void **state)
{
  struct bdev *d, *other;
  struct err err = { 0 };

  if (!have_loop_device (1 << 20))
    skip ();
  assert_ok (file_open (loop_device, 0, &d, &err), &err);
  assert_int_equal (file_open (loop_device, FILE_WRITE, &other, NULL), -EAGAIN);
  assert_ok (bdev_make_writable (d, &err), &err);
  assert_ok (bdev_pwrite (d, "x", 1, 77, BDEV_FUA, &err), &err);
  assert_int_equal (file_open (loop_device, 0, &other, NULL), -EAGAIN);
  bdev_unref (d);
}

/* Born without a name, so that nothing stays of one that was never given any. */
static void
unnamed_until_published (void **state)
{
  struct err err = { 0 };
  struct bdev *d;
  struct stat st;
  char like[4200];
  int r;

  unlink (path);
  snprintf (like, sizeof like, "%s/like", folder);
  close (open (like, O_CREAT | O_WRONLY, 0600));
  r = file_create_unnamed (path, &d, &err);
  if (r == -ENOTSUP)
    skip ();
  assert_ok (r, &err);
  assert_int_equal (run ("test \"$(ls -A %s)\" = like", folder), 0);
  assert_ok (file_copy_mode (d, like, &err), &err);
  assert_ok (bdev_resize (d, 3, &err), &err);
  assert_ok (bdev_pwrite (d, "abc", 3, 0, 0, &err), &err);
  assert_ok (file_publish (d, path, &err), &err);
  assert_int_equal (file_publish (d, path, NULL), -EEXIST);
  bdev_unref (d);
  assert_int_equal (stat (path, &st), 0);
  assert_int_equal (st.st_size, 3);
  assert_int_equal (st.st_mode & 077, 0);
  assert_ok (file_remove (path, &err), &err);
  assert_int_equal (access (path, F_OK), -1);
  assert_ok (file_remove (path, &err), &err);
  assert_int_equal (file_remove (folder, NULL) < 0, 1);
}

int
main (void)
{
#define TEST(f) cmocka_unit_test_setup_teardown (f, setup, teardown)
  const struct CMUnitTest tests[] = {
    TEST (reads_and_writes),
    TEST (sizes),
    TEST (zeros_and_holes),
    TEST (punching_frees_space),
    TEST (sparse_extents),
    TEST (a_failed_flush_stays_failed),
    TEST (flushes_are_shared),
    TEST (other_types_are_refused_at_once),
    TEST (identity),
    TEST (no_descriptor_survives_exec),
    TEST (unnamed_until_published),
    TEST (block_device),
    TEST (block_device_locks_and_make_writable),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
