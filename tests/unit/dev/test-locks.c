/* Image locks: between our own devices, and against real qemu-io and qemu-nbd
 * processes both ways.
 */
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "file-test.h"

static void stop_qemu_io (void);
static void stop_qemu_nbd (void);

static int
teardown (void **state)
{
  stop_qemu_io ();
  stop_qemu_nbd ();
  remove_folder (folder);
  return 0;
}

static int
try_open (unsigned flags)
{
  struct bdev *d;
  int r = file_open (path, flags, &d, NULL);

  if (r == 0)
    bdev_unref (d);
  return r;
}

static struct bdev *
must_open (unsigned flags)
{
  struct err err = { 0 };
  struct bdev *d = NULL;

  assert_ok (file_open (path, flags, &d, &err), &err);
  return d;
}

static void
among_ourselves (void **state)
{
  struct err err = { 0 };
  struct bdev *a, *b;

  assert_int_equal (run ("truncate -s 1M '%s'", path), 0);
  assert_int_equal (try_open (FILE_WRITE | FILE_NO_LOCK), -EINVAL);
  /* Readers share. */
  a = must_open (0);
  b = must_open (0);
  assert_int_equal (file_open (path, FILE_WRITE, &(struct bdev *) { NULL }, &err), -EAGAIN);
  assert_int_equal (err.code, EAGAIN);
  /* It says which file, what may be the matter, and what to do. */
  assert_non_null (strstr (err.msg, path));
  assert_non_null (strstr (err.msg, "virtual machine"));
  assert_non_null (strstr (err.msg, "force-share=true"));
  bdev_unref (b);
  assert_int_equal (try_open (FILE_WRITE), -EAGAIN);
  bdev_unref (a);
  /* A writer is alone, but for those who do not lock. */
  a = must_open (FILE_WRITE);
  assert_int_equal (try_open (0), -EAGAIN);
  assert_int_equal (try_open (FILE_WRITE), -EAGAIN);
  assert_int_equal (try_open (FILE_NO_LOCK), 0);
  assert_int_equal (try_open (0), -EAGAIN);     /* their closing freed nothing */
  bdev_unref (a);
  assert_int_equal (try_open (FILE_WRITE), 0);
  /* One that does not lock is in nobody's way. */
  a = must_open (FILE_NO_LOCK);
  assert_int_equal (try_open (FILE_WRITE), 0);
  assert_int_equal (bdev_make_writable (a, NULL), -EINVAL);
  bdev_unref (a);
}

static void
reader_becomes_writer (void **state)
{
  struct err err = { 0 };
  struct bdev *a, *b;
  char buf[3];

  assert_int_equal (run ("truncate -s 1M '%s'", path), 0);
  a = must_open (0);
  b = must_open (0);
  /* Refused while another reads; and then as before, in nobody's way. */
  assert_int_equal (bdev_make_writable (a, NULL), -EAGAIN);
  assert_false (a->writable);
  assert_int_equal (bdev_pwrite (a, "abc", 3, 0, 0, NULL), -EROFS);
  assert_int_equal (try_open (0), 0);
  bdev_unref (b);
  /* By the inode, not by the name. */
  assert_int_equal (run ("mv '%s' '%s.old' && truncate -s 1M '%s'", path, path, path), 0);
  assert_ok (bdev_make_writable (a, &err), &err);
  assert_true (a->writable);
  assert_ok (bdev_pwrite (a, "abc", 3, 5, BDEV_FUA, &err), &err);
  assert_ok (bdev_resize (a, 2 << 20, &err), &err);
  assert_ok (bdev_pread (a, buf, 3, 5, &err), &err);
  assert_memory_equal (buf, "abc", 3);
  assert_int_equal (run ("test $(stat -c %%s '%s.old') = 2097152", path), 0);
  assert_int_equal (run ("mv '%s.old' '%s'", path, path), 0);
  assert_int_equal (try_open (0), -EAGAIN);
  assert_int_equal (try_open (FILE_WRITE), -EAGAIN);
  bdev_unref (a);
  assert_int_equal (try_open (FILE_WRITE), 0);
}

static void
not_writable_stays_a_reader (void **state)
{
  struct bdev *a, *b;
  bool root = geteuid () == 0;
  int r;

  assert_int_equal (run ("truncate -s 1M '%s' && chmod 444 '%s' && chmod 755 '%s'",
                         path, path, folder), 0);
  if (root) {                   /* nothing is forbidden to root */
    assert_int_equal (seteuid (65534), 0);
    prctl (PR_SET_DUMPABLE, 1); /* else /proc/self is root's */
  }
  a = must_open (0);
  r = bdev_make_writable (a, NULL);
  b = must_open (0);            /* the writer's locks are gone again */
  if (root)
    assert_int_equal (seteuid (0), 0);
  assert_int_equal (r, -EACCES);
  assert_false (a->writable);
  bdev_unref (b);
  bdev_unref (a);
}

/* --- against QEMU */

static pid_t io_pid;
static FILE *io_in, *io_out;

/* A qemu-io that has the image open until it is stopped. */
static void
start_qemu_io (const char *readonly)
{
  int in[2], out[2];
  char line[256];

  assert_int_equal (pipe2 (in, 0) | pipe2 (out, 0), 0);
  io_pid = fork ();
  assert_true (io_pid >= 0);
  if (io_pid == 0) {
    dup2 (in[0], 0);
    dup2 (out[1], 1);
    dup2 (out[1], 2);
    close (in[1]);
    close (out[0]);
    if (readonly)
      execlp ("qemu-io", "qemu-io", "-f", "qcow2", readonly, path, NULL);
    else
      execlp ("qemu-io", "qemu-io", "-f", "qcow2", path, NULL);
    _exit (127);
  }
  close (in[0]);
  close (out[1]);
  io_in = fdopen (in[1], "w");
  io_out = fdopen (out[0], "r");
  fputs ("read 0 512\n", io_in);
  fflush (io_in);
  do                            /* until it has it open: it answers */
    assert_non_null (fgets (line, sizeof line, io_out));
  while (!strstr (line, "read 512/512"));
}

static void
stop_qemu_io (void)
{
  if (io_pid <= 0)
    return;
  fclose (io_in);               /* end of input: it quits */
  while (fgetc (io_out) != EOF)
    ;
  fclose (io_out);
  waitpid (io_pid, NULL, 0);
  io_pid = 0;
}

static pid_t nbd_pid;

static void
start_qemu_nbd (void)
{
  char pid_path[4200];
  FILE *f;
  long pid;

  /* With --fork it returns once it serves. */
  assert_int_equal (run ("qemu-nbd --fork -t -f qcow2 -k '%s/sock' --pid-file='%s/pid' '%s'",
                         folder, folder, path), 0);
  snprintf (pid_path, sizeof pid_path, "%s/pid", folder);
  f = fopen (pid_path, "r");
  assert_non_null (f);
  assert_int_equal (fscanf (f, "%ld", &pid), 1);
  fclose (f);
  nbd_pid = pid;
}

static void
stop_qemu_nbd (void)
{
  struct pollfd p = { .events = POLLIN };

  if (nbd_pid <= 0)
    return;
  /* It is not our child, so that there is nothing to wait for but this. */
  p.fd = syscall (SYS_pidfd_open, nbd_pid, 0);
  assert_true (p.fd >= 0);
  do                            /* it forgets a signal that comes just before it serves */
    kill (nbd_pid, SIGTERM);
  while (poll (&p, 1, 1000) == 0);
  nbd_pid = 0;
  close (p.fd);
}

static void
make_image (void)
{
  assert_int_equal (run ("qemu-img create -f qcow2 '%s' 16M", path), 0);
}

static int
qemu_io (const char *opts, const char *cmd)
{
  return run ("qemu-io %s -f qcow2 -c '%s' '%s'", opts, cmd, path);
}

static void
qemu_refuses_ours (void **state)
{
  struct bdev *d;

  require_program ("qemu-io");
  require_program ("qemu-img");
  make_image ();
  d = must_open (0);
  assert_int_equal (qemu_io ("-r", "read 0 512"), 0);           /* readers share */
  assert_int_equal (qemu_io ("", "write 0 512"), 1);
  assert_int_equal (run ("qemu-img check '%s'", path), 0);
  assert_int_equal (run ("qemu-img check -r all '%s'", path), 1);
  bdev_unref (d);
  assert_int_equal (qemu_io ("", "write 0 512"), 0);
  d = must_open (FILE_WRITE);
  assert_int_equal (qemu_io ("-r", "read 0 512"), 1);
  assert_int_equal (qemu_io ("", "write 0 512"), 1);
  assert_int_equal (run ("qemu-img check '%s'", path), 1);
  assert_int_equal (run ("qemu-img info -U '%s'", path), 0);
  bdev_unref (d);
  d = must_open (0);
  assert_int_equal (bdev_make_writable (d, NULL), 0);
  assert_int_equal (qemu_io ("-r", "read 0 512"), 1);
  bdev_unref (d);
  /* Without locks we are invisible. */
  d = must_open (FILE_NO_LOCK);
  assert_int_equal (qemu_io ("", "write 0 512"), 0);
  bdev_unref (d);
}

static void
we_refuse_qemu_io (void **state)
{
  struct bdev *d;

  require_program ("qemu-io");
  require_program ("qemu-img");
  make_image ();
  start_qemu_io (NULL);
  assert_int_equal (try_open (0), -EAGAIN);
  assert_int_equal (try_open (FILE_WRITE), -EAGAIN);
  assert_int_equal (try_open (FILE_NO_LOCK), 0);
  stop_qemu_io ();
  assert_int_equal (try_open (FILE_WRITE), 0);

  start_qemu_io ("-r");
  assert_int_equal (try_open (FILE_WRITE), -EAGAIN);
  d = must_open (0);
  assert_int_equal (bdev_make_writable (d, NULL), -EAGAIN);
  assert_int_equal (qemu_io ("-r", "read 0 512"), 0);   /* still only a reader */
  stop_qemu_io ();
  assert_int_equal (bdev_make_writable (d, NULL), 0);
  bdev_unref (d);
}

static void
we_refuse_qemu_nbd (void **state)
{
  require_program ("qemu-nbd");
  require_program ("qemu-img");
  make_image ();
  start_qemu_nbd ();
  assert_int_equal (try_open (0), -EAGAIN);
  assert_int_equal (try_open (FILE_WRITE), -EAGAIN);
  assert_int_equal (try_open (FILE_NO_LOCK), 0);
  stop_qemu_nbd ();
  assert_int_equal (try_open (FILE_WRITE), 0);
}

int
main (void)
{
#define TEST(f) cmocka_unit_test_setup_teardown (f, setup, teardown)
  const struct CMUnitTest tests[] = {
    TEST (among_ourselves),
    TEST (reader_becomes_writer),
    TEST (not_writable_stays_a_reader),
    TEST (qemu_refuses_ours),
    TEST (we_refuse_qemu_io),
    TEST (we_refuse_qemu_nbd),
  };

  signal (SIGPIPE, SIG_IGN);
  alarm (400);                  /* what waits for ever is a failure, too */
  return cmocka_run_group_tests (tests, NULL, NULL);
}
