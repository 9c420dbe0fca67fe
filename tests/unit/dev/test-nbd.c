/* The NBD device against servers that are not ours: nbdkit and qemu-nbd. */
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "unit/unit.h"

#include "base/num.h"
#include "dev/nbd.h"

#define SIZE (UINT64_C (8) << 20)

static uint8_t disk[SIZE];

struct far {
  char *folder, *uri;
  pid_t server;
};

static void
wait_for_file (const char *path)
{
  for (int i = 0; i < 1000 && access (path, F_OK) < 0; ++i)
    usleep (10000);
  assert_int_equal (access (path, F_OK), 0);
}

/* It ends with this program, however that ends. */
static void
run_server (struct far *f, const char *command)
{
  char cmd[600];

  snprintf (cmd, sizeof cmd, "d='%s'; rm -f $d/sock; exec %s", f->folder, command);
  f->server = fork ();
  if (f->server == 0) {
    prctl (PR_SET_PDEATHSIG, SIGKILL);
    execl ("/bin/sh", "sh", "-c", cmd, NULL);
    _exit (127);
  }
}

/* A file with random bytes and a hole in its second quarter, served; args as for a shell, with $d
 * for the folder (the disk is $d/disk, the socket is to be $d/sock).
 */
static struct far
start_far (const char *command)
{
  struct far f = { .folder = make_folder () };
  uint64_t seed = 7;
  char path[300];
  int fd;

  for (size_t i = 0; i < SIZE; ++i)
    disk[i] = i / (SIZE / 4) == 1 ? 0 : test_random (&seed);
  snprintf (path, sizeof path, "%s/disk", f.folder);
  fd = open (path, O_CREAT | O_RDWR, 0600);
  assert_int_equal (pwrite (fd, disk, SIZE / 4, 0), SIZE / 4);
  assert_int_equal (pwrite (fd, disk + SIZE / 2, SIZE / 2, SIZE / 2), SIZE / 2);
  close (fd);
  assert_true (asprintf (&f.uri, "nbd+unix:///?socket=%s/sock", f.folder) > 0);
  run_server (&f, command);
  snprintf (path, sizeof path, "%s/sock", f.folder);
  wait_for_file (path);
  return f;
}

static void
stop_far (struct far *f)
{
  kill (f->server, SIGKILL);
  waitpid (f->server, NULL, 0);
  remove_folder (f->folder);
  free (f->uri);
}

static struct bdev *
open_far (const struct far *f)
{
  struct nbd_options opts = { .local_files = true, .reconnect = 20 };
  struct err err = { 0 };
  struct bdev *d = NULL;
  int r = -1;

  /* A socket may be there a moment before it is listened on. */
  for (int i = 0; i < 200 && r < 0; ++i) {
    err_clear (&err);
    r = nbd_open (f->uri, &opts, &d, &err);
    if (r < 0)
      usleep (10000);
  }
  assert_ok (r, &err);
  return d;
}

#define QEMU_NBD "qemu-nbd -t -e 16 -f raw -k $d/sock $d/disk"
#define NBDKIT   "nbdkit -f -U $d/sock file $d/disk"

static void
check_bytes (struct bdev *d)
{
  uint8_t *buf = malloc (SIZE);
  uint64_t seed = 1;
  struct err err = { 0 };

  assert_int_equal (bdev_size (d), SIZE);
  assert_ok (bdev_pread (d, buf, SIZE, 0, &err), &err);
  assert_memory_equal (buf, disk, SIZE);
  for (int i = 0; i < 200; ++i) {
    uint64_t off = test_random (&seed) % SIZE, len = test_random (&seed) % 70000;

    len = MIN (len, SIZE - off);
    if (i % 3 == 0)
      bdev_cache (d, off / 2, MIN (len * 5, SIZE - off / 2), NULL);
    assert_ok (bdev_pread (d, buf, len, off, &err), &err);
    assert_memory_equal (buf, disk + off, len);
  }
  free (buf);
}

struct seen {
  const struct bdev_range *ranges;
  unsigned *times;
};

static int
see (void *opaque, size_t i, const void *buf, int r, const struct err *why)
{
  struct seen *s = opaque;
  const struct bdev_range *range = &s->ranges[i];
  uint64_t inside = range->off < SIZE ? MIN (range->len, SIZE - range->off) : 0;

  assert_int_equal (r, 0);
  assert_memory_equal (buf, disk + (inside ? range->off : 0), inside);
  for (uint64_t j = inside; j < range->len; ++j)
    assert_int_equal (((const uint8_t *) buf)[j], 0);
  s->times[i]++;
  return 0;
}

static void
check_many (struct bdev *d)
{
  struct bdev_range ranges[2000];
  unsigned times[2000] = { 0 };
  struct seen s = { ranges, times };
  uint64_t seed = 3;
  struct err err = { 0 };

  for (size_t i = 0; i < 2000; ++i) {
    uint64_t follow = i ? ranges[i - 1].off + ranges[i - 1].len : 0;

    ranges[i].off = i % 4 ? follow : test_random (&seed) % (SIZE + 100000);
    ranges[i].len = i % 7 == 0 ? 0 : test_random (&seed) % 20000;
  }
  ranges[5].len = 3 << 20;
  ranges[6].off = UINT64_MAX - 10000;
  assert_ok (bdev_read_many (d, ranges, 2000, see, &s, &err), &err);
  for (size_t i = 0; i < 2000; ++i)
    assert_int_equal (times[i], 1);
}

static int
add_holes (void *opaque, uint64_t off, uint64_t len, unsigned kind)
{
  uint64_t *sums = opaque;      /* end, zeros */

  assert_int_equal (off, sums[0]);
  sums[0] += len;
  sums[1] += kind & BDEV_ZERO ? len : 0;
  return 0;
}

static void
check_extents (struct bdev *d, uint64_t zeros)
{
  uint64_t sums[2] = { 0, 0 };
  struct err err = { 0 };

  assert_ok (bdev_extents (d, 0, SIZE, add_holes, sums, &err), &err);
  assert_int_equal (sums[0], SIZE);
  assert_int_equal (sums[1], zeros);
}

static void
read_all_ways (const char *command, uint64_t zeros)
{
  struct far f = start_far (command);
  struct bdev *d = open_far (&f);

  assert_true (d->far);
  assert_false (d->writable);
  check_bytes (d);
  check_many (d);
  check_extents (d, zeros);
  nbd_rest ();                  /* and it goes on afterwards */
  check_many (d);
  check_bytes (d);
  bdev_unref (d);
  stop_far (&f);
}

static void
test_reading (void **state)
{
  require_program ("nbdkit");
  require_program ("qemu-nbd");
  read_all_ways (NBDKIT, SIZE / 4);
  read_all_ways (QEMU_NBD, SIZE / 4);
  read_all_ways ("qemu-nbd -t -f raw -k $d/sock $d/disk", SIZE / 4);    /* one client at a time */
  read_all_ways ("nbdkit -f -U $d/sock --filter=noextents file $d/disk", 0);
}

static void
test_block_sizes (void **state)
{
  require_program ("nbdkit");
  read_all_ways ("nbdkit -f -U $d/sock --filter=blocksize-policy file $d/disk blocksize-minimum=4096 "
                 "blocksize-preferred=4096 blocksize-maximum=64K blocksize-error-policy=error", SIZE / 4);
  read_all_ways ("nbdkit -f -U $d/sock --filter=blocksize-policy file $d/disk blocksize-minimum=64K "
                 "blocksize-preferred=64K blocksize-maximum=64K blocksize-error-policy=error", SIZE / 4);
}

static void
write_all_ways (const char *command)
{
  struct far f = start_far (command);
  struct bdev *d = open_far (&f);
  uint8_t *buf = malloc (SIZE), byte = 0;
  uint64_t seed = 9;
  struct err err = { 0 };
  char path[300];
  int fd;

  assert_int_equal (bdev_pwrite (d, buf, 1, 0, 0, NULL), -EROFS);
  assert_ok (bdev_make_writable (d, &err), &err);
  for (int i = 0; i < 300; ++i) {
    uint64_t off = test_random (&seed) % SIZE, len = test_random (&seed) % 100000;
    unsigned flags = i % 5 == 0 ? BDEV_FUA : 0;

    len = MIN (len, SIZE - off);
    bdev_cache (d, off, len, NULL);     /* must not be believed after the write */
    if (i % 4 == 3) {
      memset (disk + off, 0, len);
      assert_ok (bdev_zero (d, off, len, flags | (i % 8 == 3 ? BDEV_MAY_TRIM : 0), &err), &err);
    }
    else {
      memset (disk + off, ++byte, len);
      assert_ok (bdev_pwrite (d, disk + off, len, off, flags, &err), &err);
    }
    assert_ok (bdev_pread (d, buf, len, off, &err), &err);
    assert_memory_equal (buf, disk + off, len);
  }
  assert_ok (bdev_trim (d, 1, 10, 0, &err), &err);
  assert_ok (bdev_pread (d, disk + 1, 10, 1, &err), &err);
  assert_ok (bdev_flush (d, &err), &err);
  check_bytes (d);
  check_many (d);
  assert_int_equal (bdev_resize (d, SIZE + 1, NULL), -ENOSPC);
  bdev_unref (d);
  snprintf (path, sizeof path, "%s/disk", f.folder);
  fd = open (path, O_RDONLY);
  assert_int_equal (pread (fd, buf, SIZE, 0), SIZE);
  assert_memory_equal (buf, disk, SIZE);
  close (fd);
  free (buf);
  stop_far (&f);
}

static void
test_writing (void **state)
{
  require_program ("nbdkit");
  require_program ("qemu-nbd");
  write_all_ways (NBDKIT);
  write_all_ways (QEMU_NBD);
  write_all_ways ("nbdkit -f -U $d/sock --filter=nozero --filter=fua file $d/disk fuamode=emulate");
  write_all_ways ("nbdkit -f -U $d/sock --filter=blocksize-policy file $d/disk blocksize-minimum=4096 "
                  "blocksize-preferred=4096 blocksize-maximum=64K blocksize-error-policy=error");
}

static void
test_read_only (void **state)
{
  struct far f;
  struct bdev *d;

  require_program ("qemu-nbd");
  f = start_far ("qemu-nbd -r -t -f raw -k $d/sock $d/disk");
  d = open_far (&f);
  assert_int_equal (bdev_make_writable (d, NULL), -EROFS);
  assert_false (d->writable);
  bdev_unref (d);
  stop_far (&f);
}

/* The child of a fork goes on where the parent was. */
static void
test_fork (void **state)
{
  struct far f;
  struct bdev *d;
  int status;
  pid_t pid;

  require_program ("qemu-nbd");
  f = start_far (QEMU_NBD);
  d = open_far (&f);
  check_many (d);
  nbd_rest ();
  pid = fork ();
  if (pid == 0) {
    check_many (d);
    check_bytes (d);
    _exit (0);
  }
  assert_int_equal (waitpid (pid, &status, 0), pid);
  assert_int_equal (status, 0);
  bdev_unref (d);
  stop_far (&f);
}

/* The server goes away for a moment between requests. */
static void
test_restart (void **state)
{
  struct far f;
  struct bdev *d;

  require_program ("qemu-nbd");
  f = start_far (QEMU_NBD);
  d = open_far (&f);
  check_many (d);
  kill (f.server, SIGKILL);
  waitpid (f.server, NULL, 0);
  run_server (&f, QEMU_NBD);
  check_many (d);
  check_bytes (d);
  bdev_unref (d);
  stop_far (&f);
}

static void
test_nobody_there (void **state)
{
  struct nbd_options opts = { .local_files = true };
  struct err err = { 0 };
  struct bdev *d;

  assert_int_not_equal (nbd_open ("nbd+unix:///?socket=/nonexistent/sock", &opts, &d, &err), 0);
  assert_non_null (strstr (err.msg, "/nonexistent/sock"));
  err_clear (&err);
  assert_int_not_equal (nbd_open ("nbd:nonsense", &opts, &d, &err), 0);
}

static void
test_uris (void **state)
{
  assert_true (nbd_is_uri ("nbd://localhost/x"));
  assert_true (nbd_is_uri ("nbds://localhost"));
  assert_true (nbd_is_uri ("nbd+unix:///?socket=/tmp/x"));
  assert_true (nbd_is_uri ("nbds+vsock://2/"));
  assert_false (nbd_is_uri ("nbd"));
  assert_false (nbd_is_uri ("nbd:localhost:10809"));
  assert_false (nbd_is_uri ("file:nbd://"));
  assert_false (nbd_is_uri ("/tmp/nbd://x"));
  assert_false (nbd_is_uri ("https://x"));
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (test_uris),
    cmocka_unit_test (test_nobody_there),
    cmocka_unit_test (test_reading),
    cmocka_unit_test (test_block_sizes),
    cmocka_unit_test (test_writing),
    cmocka_unit_test (test_read_only),
    cmocka_unit_test (test_fork),
    cmocka_unit_test (test_restart),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
