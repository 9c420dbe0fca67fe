/* Guest load over NBD whose effects are known, for the tests.
 *
 *   nbd-ops model URI FILE SEED OPS [CONNECTIONS]
 *
 * Random reads, writes, zeros, trims, flushes and block status, one after
 * another over several connections in turn, each also done to FILE (raw bytes
 * of the same length).  Whatever is read must be what FILE says.  At the end
 * the whole disk is compared.
 *
 *   nbd-ops load URI STATE SEED OPS THREADS [PID AFTER [SIGNAL]]
 *
 * Writes, zeros, trims and flushes from THREADS threads at once, one connection
 * each.  STATE remembers for each 4 KiB block what may be read from it: no
 * version older than the last one that a flush or FUA made durable.  After
 * AFTER completed operations, process PID is killed with SIGKILL or the signal of
 * that number, and requests that fail from then on are expected.  The disk must have read as zeros when
 * STATE was new.
 *
 *   nbd-ops verify URI STATE
 *
 * Reads the whole disk and compares it with STATE.
 *
 * Blocks of the first half of the disk belong to the threads in turn, so that
 * they meet in the same clusters; of the second half, runs of 64 blocks do, so
 * that whole clusters are freed and allocated.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <libnbd.h>

#define BLOCK 4096u
#define RUN 64u                 /* blocks in a run of the second half */
#define MAX_THREADS 64

static void __attribute__ ((noreturn, format (printf, 1, 2)))
die (const char *fmt, ...)
{
  va_list args;

  va_start (args, fmt);
  fputs ("nbd-ops: ", stderr);
  vfprintf (stderr, fmt, args);
  fputc ('\n', stderr);
  va_end (args);
  exit (1);
}

static uint64_t
next_random (uint64_t *state)
{
  uint64_t z = (*state += UINT64_C (0x9e3779b97f4a7c15));

  z = (z ^ (z >> 30)) * UINT64_C (0xbf58476d1ce4e5b9);
  z = (z ^ (z >> 27)) * UINT64_C (0x94d049bb133111eb);
  return z ^ (z >> 31);
}

static struct nbd_handle *
connect_to (const char *uri)
{
  struct nbd_handle *nbd = nbd_create ();

  if (nbd == NULL || nbd_add_meta_context (nbd, LIBNBD_CONTEXT_BASE_ALLOCATION) == -1 ||
      nbd_connect_uri (nbd, uri) == -1)
    die ("%s: %s", uri, nbd_get_error ());
  return nbd;
}

/* A shared writable mapping of a file; created with length len if it is new. */
static void *
map_file (const char *path, size_t len, bool *created)
{
  int fd = open (path, O_RDWR | O_CREAT, 0644);
  struct stat st;
  void *p;

  if (fd == -1 || fstat (fd, &st) == -1)
    die ("%s: %s", path, strerror (errno));
  *created = st.st_size == 0;
  if (*created && ftruncate (fd, len) == -1)
    die ("%s: %s", path, strerror (errno));
  if (!*created && (size_t) st.st_size != len)
    die ("%s has %jd bytes, the disk needs %zu", path, (intmax_t) st.st_size, len);
  p = mmap (NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (p == MAP_FAILED)
    die ("%s: %s", path, strerror (errno));
  close (fd);
  return p;
}

static bool
all_zero (const uint8_t *p, size_t len)
{
  return len == 0 || (p[0] == 0 && memcmp (p, p + 1, len - 1) == 0);
}

/* --- model */

#define MAX_LEN (300u * 1024)

struct model {
  const char *uri;
  struct nbd_handle *conn[MAX_THREADS];
  unsigned nr_conn;
  uint8_t *bytes;
  uint64_t size;
  uint64_t rnd;
  uint8_t buf[MAX_LEN];
  char what[128];               /* the operation under way, for messages */
};

static void
model_compare (struct model *m, const uint8_t *got, uint64_t off, uint64_t len)
{
  if (memcmp (got, m->bytes + off, len) == 0)
    return;
  for (uint64_t i = 0; i < len; ++i) {
    if (got[i] != m->bytes[off + i])
      die ("%s: byte %" PRIu64 " is 0x%02x, must be 0x%02x", m->what, off + i, got[i],
           m->bytes[off + i]);
  }
}

static void
choose_range (struct model *m, uint64_t *off, uint64_t *len)
{
  static const uint64_t aligns[] = { 1, 512, 4096, 65536 };
  uint64_t align = aligns[next_random (&m->rnd) % 4];
  uint64_t max = next_random (&m->rnd) % 4 ? 20000 : MAX_LEN;

  *off = next_random (&m->rnd) % m->size / align * align;
  *len = (1 + next_random (&m->rnd) % max + align - 1) / align * align;
  if (*len > MAX_LEN)
    *len = MAX_LEN;
  if (*len > m->size - *off)
    *len = m->size - *off;
}

static void
model_read (struct model *m, struct nbd_handle *nbd, uint64_t off, uint64_t len)
{
  if (nbd_pread (nbd, m->buf, len, off, 0) == -1)
    die ("%s: %s", m->what, nbd_get_error ());
  model_compare (m, m->buf, off, len);
}

static void
model_write (struct model *m, struct nbd_handle *nbd, uint64_t off, uint64_t len)
{
  uint32_t flags = next_random (&m->rnd) % 8 == 0 ? LIBNBD_CMD_FLAG_FUA : 0;
  uint64_t pattern = next_random (&m->rnd);

  if (next_random (&m->rnd) % 8 == 0)
    pattern = 0;
  for (uint64_t i = 0; i < len; ++i)
    m->buf[i] = pattern ? (pattern >> (i % 8 * 8)) + i / 8 : 0;
  if (nbd_pwrite (nbd, m->buf, len, off, flags) == -1)
    die ("%s: %s", m->what, nbd_get_error ());
  memcpy (m->bytes + off, m->buf, len);
}

/* Each byte of the range may be the old one or zero; whichever is read stays. */
static void
adopt_zeros (struct model *m, struct nbd_handle *nbd, uint64_t off, uint64_t len)
{
  if (nbd_pread (nbd, m->buf, len, off, 0) == -1)
    die ("%s: %s", m->what, nbd_get_error ());
  for (uint64_t i = 0; i < len; ++i) {
    if (m->buf[i] == 0)
      m->bytes[off + i] = 0;
  }
  model_compare (m, m->buf, off, len);
}

static void
model_zero (struct model *m, struct nbd_handle *nbd, uint64_t off, uint64_t len)
{
  uint64_t r = next_random (&m->rnd);
  uint32_t flags = (r & 1 ? LIBNBD_CMD_FLAG_NO_HOLE : 0) | (r & 2 ? LIBNBD_CMD_FLAG_FUA : 0) |
                   ((r & 12) == 12 ? LIBNBD_CMD_FLAG_FAST_ZERO : 0);

  if (nbd_zero (nbd, len, off, flags) == -1) {
    if (!(flags & LIBNBD_CMD_FLAG_FAST_ZERO) || nbd_get_errno () != ENOTSUP)
      die ("%s: %s", m->what, nbd_get_error ());
    adopt_zeros (m, nbd, off, len);     /* refused half-way, perhaps */
    return;
  }
  memset (m->bytes + off, 0, len);
}

static void
model_trim (struct model *m, struct nbd_handle *nbd, uint64_t off, uint64_t len)
{
  if (nbd_trim (nbd, len, off, 0) == -1)
    die ("%s: %s", m->what, nbd_get_error ());
  adopt_zeros (m, nbd, off, len);
}

struct extents_seen {
  struct model *m;
  uint64_t off, end;
};

static int
check_extents (void *opaque, const char *context, uint64_t off, uint32_t *entries, size_t nr,
               int *error)
{
  struct extents_seen *seen = opaque;

  seen->off = off;
  for (size_t i = 0; i + 1 < nr; i += 2) {
    uint64_t len = entries[i];

    if (len == 0)
      die ("%s: an extent of no length", seen->m->what);
    if (len > seen->m->size - off)
      len = seen->m->size - off;
    if (entries[i + 1] & LIBNBD_STATE_ZERO && !all_zero (seen->m->bytes + off, len))
      die ("%s: extent %" PRIu64 "+%" PRIu64 " is said to be zero, and is not", seen->m->what,
           off, len);
    off += len;
  }
  seen->end = off;
  return 0;
}

static void
model_extents (struct model *m, struct nbd_handle *nbd, uint64_t off, uint64_t len)
{
  struct extents_seen seen = { .m = m };

  if (nbd_block_status (nbd, len, off,
                        (nbd_extent_callback) { .callback = check_extents, .user_data = &seen },
                        0) == -1)
    die ("%s: %s", m->what, nbd_get_error ());
  if (seen.end <= off)
    die ("%s: no extents", m->what);
}

static void
model_op (struct model *m, uint64_t nr)
{
  static const struct {
    const char *name;
    unsigned weight;
    void (*run) (struct model *, struct nbd_handle *, uint64_t, uint64_t);
  } kinds[] = {
    { "write", 45, model_write }, { "read", 20, model_read }, { "zero", 13, model_zero },
    { "trim", 10, model_trim }, { "extents", 6, model_extents },
  };
  struct nbd_handle **conn = &m->conn[next_random (&m->rnd) % m->nr_conn];
  unsigned pick = next_random (&m->rnd) % 100, k = 0;
  uint64_t off, len;

  choose_range (m, &off, &len);
  while (k < sizeof kinds / sizeof kinds[0] && pick >= kinds[k].weight)
    pick -= kinds[k++].weight;
  if (k < sizeof kinds / sizeof kinds[0]) {
    snprintf (m->what, sizeof m->what, "operation %" PRIu64 ", %s %" PRIu64 "+%" PRIu64, nr,
              kinds[k].name, off, len);
    kinds[k].run (m, *conn, off, len);
    return;
  }
  snprintf (m->what, sizeof m->what, "operation %" PRIu64 ", flush or cache", nr);
  if (pick < 4 ? nbd_flush (*conn, 0) == -1 : pick < 5 && nbd_cache (*conn, len, off, 0) == -1)
    die ("%s: %s", m->what, nbd_get_error ());
  if (pick == 5) {              /* a client that comes back */
    nbd_shutdown (*conn, 0);
    nbd_close (*conn);
    *conn = connect_to (m->uri);
  }
}

static int
run_model (int argc, char **argv)
{
  struct model *m = calloc (1, sizeof *m);
  bool created;
  uint64_t ops;

  if (m == NULL || argc < 4)
    die ("model URI FILE SEED OPS [CONNECTIONS]");
  m->uri = argv[0];
  m->rnd = strtoull (argv[2], NULL, 0);
  ops = strtoull (argv[3], NULL, 0);
  m->nr_conn = argc > 4 ? atoi (argv[4]) : 1;
  if (m->nr_conn < 1 || m->nr_conn > MAX_THREADS)
    die ("1 to %d connections", MAX_THREADS);
  for (unsigned i = 0; i < m->nr_conn; ++i)
    m->conn[i] = connect_to (m->uri);
  m->size = nbd_get_size (m->conn[0]);
  m->bytes = map_file (argv[1], m->size, &created);
  for (uint64_t i = 0; i < ops; ++i)
    model_op (m, i);
  snprintf (m->what, sizeof m->what, "at the end");
  for (uint64_t off = 0; off < m->size; off += MAX_LEN)
    model_read (m, m->conn[0], off, m->size - off < MAX_LEN ? m->size - off : MAX_LEN);
  for (unsigned i = 0; i < m->nr_conn; ++i) {
    nbd_shutdown (m->conn[i], 0);
    nbd_close (m->conn[i]);
  }
  return 0;
}

/* --- load and verify */

/* Versions count up from 1 in each block; 0 is what a new disk holds. */
struct block_state {
  uint32_t submitted;           /* highest version that was sent */
  uint32_t solid;               /* last completed write or zero; a trim decides nothing */
  uint32_t floor;               /* what was solid at the last flush: nothing older may be read */
  uint32_t last_zero;           /* last write of zeros, or trim */
};

static struct {
  const char *uri;
  struct block_state *blocks;
  uint64_t nr_blocks;
  unsigned nr_threads;
  uint64_t ops_each, seed;
  pid_t victim;                 /* 0: nobody */
  uint64_t kill_after;
  int signal;
  _Atomic uint64_t completed;
  atomic_bool killed;
} load;

static void
fill_block (uint8_t *p, uint32_t block, uint32_t version)
{
  for (unsigned i = 0; i < BLOCK; i += 8) {
    memcpy (p + i, &block, 4);
    memcpy (p + i + 4, &version, 4);
  }
}

/* Some blocks of this thread. */
static void
choose_blocks (unsigned thread, uint64_t *rnd, uint64_t *first, uint64_t *nr)
{
  uint64_t half = load.nr_blocks / 2 / RUN * RUN;
  uint64_t turns = half / load.nr_threads;
  uint64_t runs = (load.nr_blocks - half) / RUN / load.nr_threads;

  if (next_random (rnd) & 1) {
    *first = next_random (rnd) % turns * load.nr_threads + thread;
    *nr = 1;
  }
  else {
    uint64_t skip = next_random (rnd) & 1 ? 0 : next_random (rnd) % RUN;

    *first = half + (next_random (rnd) % runs * load.nr_threads + thread) * RUN + skip;
    *nr = next_random (rnd) & 1 ? RUN - skip : 1 + next_random (rnd) % (RUN - skip);
  }
}

static bool
mine (uint64_t block, unsigned thread)
{
  uint64_t half = load.nr_blocks / 2 / RUN * RUN;

  return (block < half ? block : (block - half) / RUN) % load.nr_threads == thread;
}

/* A request failed: fine if the server was killed. */
static bool
expected_failure (void)
{
  if (!load.killed)
    die ("%s", nbd_get_error ());
  return false;
}

static bool
load_flush (struct nbd_handle *nbd, unsigned thread, uint32_t *solid)
{
  for (uint64_t b = 0; b < load.nr_blocks; ++b)
    solid[b] = load.blocks[b].solid;
  if (nbd_flush (nbd, 0) == -1)
    return expected_failure ();
  for (uint64_t b = 0; b < load.nr_blocks; ++b) {
    if (mine (b, thread))
      load.blocks[b].floor = solid[b];
  }
  return true;
}

static bool
load_change (struct nbd_handle *nbd, uint8_t *buf, uint64_t first, uint64_t nr, uint64_t r)
{
  enum { WRITE, ZERO, TRIM } kind = r % 10 < 7 ? WRITE : r % 10 < 9 ? ZERO : TRIM;
  uint32_t fua = r / 16 % 16 == 0 ? LIBNBD_CMD_FLAG_FUA : 0;
  uint64_t off = first * BLOCK, len = nr * BLOCK;
  int e;

  for (uint64_t b = first; b < first + nr; ++b) {
    struct block_state *s = &load.blocks[b];

    ++s->submitted;
    if (kind == WRITE)
      fill_block (buf + (b - first) * BLOCK, b, s->submitted);
    else
      s->last_zero = s->submitted;
  }
  if (kind == WRITE)
    e = nbd_pwrite (nbd, buf, len, off, fua);
  else if (kind == ZERO)
    e = nbd_zero (nbd, len, off, fua | (r & 1024 ? LIBNBD_CMD_FLAG_NO_HOLE : 0));
  else
    e = nbd_trim (nbd, len, off, 0);
  if (e == -1)
    return expected_failure ();
  for (uint64_t b = first; b < first + nr && kind != TRIM; ++b) {
    load.blocks[b].solid = load.blocks[b].submitted;
    if (fua)
      load.blocks[b].floor = load.blocks[b].submitted;
  }
  return true;
}

static void *
load_thread (void *arg)
{
  unsigned thread = (uintptr_t) arg;
  uint64_t rnd = load.seed * 1000 + thread;
  struct nbd_handle *nbd = connect_to (load.uri);
  uint8_t *buf = malloc (RUN * BLOCK);
  uint32_t *solid = calloc (load.nr_blocks, sizeof *solid);
  bool go_on = buf && solid;

  for (uint64_t i = 0; go_on && i < load.ops_each && !load.killed; ++i) {
    uint64_t first, nr, r = next_random (&rnd);

    choose_blocks (thread, &rnd, &first, &nr);
    go_on = r % 64 == 0 ? load_flush (nbd, thread, solid)
                        : load_change (nbd, buf, first, nr, r >> 8);
    if (++load.completed == load.kill_after && load.victim) {
      load.killed = true;
      if (kill (load.victim, load.signal) == -1)
        die ("kill %d: %s", (int) load.victim, strerror (errno));
    }
  }
  if (!load.killed)
    nbd_shutdown (nbd, 0);
  nbd_close (nbd);
  free (buf);
  free (solid);
  return NULL;
}

static void
open_state (const char *path)
{
  struct nbd_handle *nbd = connect_to (load.uri);
  bool created;

  load.nr_blocks = nbd_get_size (nbd) / BLOCK;
  load.blocks = map_file (path, load.nr_blocks * sizeof load.blocks[0], &created);
  nbd_close (nbd);
}

static int
run_load (int argc, char **argv)
{
  pthread_t threads[MAX_THREADS];

  if (argc != 5 && argc != 7 && argc != 8)
    die ("load URI STATE SEED OPS THREADS [PID AFTER [SIGNAL]]");
  load.uri = argv[0];
  load.seed = strtoull (argv[2], NULL, 0);
  load.nr_threads = atoi (argv[4]);
  if (load.nr_threads < 1 || load.nr_threads > MAX_THREADS)
    die ("1 to %d threads", MAX_THREADS);
  load.ops_each = strtoull (argv[3], NULL, 0) / load.nr_threads;
  load.signal = argc == 8 ? atoi (argv[7]) : SIGKILL;
  if (argc >= 7) {
    load.victim = atoi (argv[5]);
    load.kill_after = strtoull (argv[6], NULL, 0);
  }
  open_state (argv[1]);
  if (load.nr_blocks < 4 * RUN * load.nr_threads)
    die ("the disk is too small for %u threads", load.nr_threads);
  /* What a killed server had not completed is no promise. */
  for (uint64_t b = 0; b < load.nr_blocks; ++b)
    load.blocks[b].solid = load.blocks[b].floor;
  for (unsigned i = 0; i < load.nr_threads; ++i) {
    if (pthread_create (&threads[i], NULL, load_thread, (void *) (uintptr_t) i) != 0)
      die ("cannot start a thread");
  }
  for (unsigned i = 0; i < load.nr_threads; ++i)
    pthread_join (threads[i], NULL);
  if (load.victim && !load.killed)
    die ("only %" PRIu64 " operations: nobody was killed", (uint64_t) load.completed);
  /* Whoever was not killed ends with everything durable. */
  if (!load.killed) {
    struct nbd_handle *nbd = connect_to (load.uri);

    if (nbd_flush (nbd, 0) == -1)
      die ("%s", nbd_get_error ());
    for (uint64_t b = 0; b < load.nr_blocks; ++b)
      load.blocks[b].floor = load.blocks[b].solid;
    nbd_close (nbd);
  }
  return 0;
}

/* 0, or what is wrong with a sector of block b. */
static const char *
judge_sector (const uint8_t *p, uint64_t b)
{
  const struct block_state *s = &load.blocks[b];
  uint32_t block, version;

  if (all_zero (p, 512))
    return s->floor == 0 || s->last_zero >= s->floor ? NULL : "zeros, though data was flushed";
  memcpy (&block, p, 4);
  memcpy (&version, p + 4, 4);
  if (memcmp (p, p + 8, 512 - 8) != 0)
    return "torn inside a sector";
  if (block != b)
    return "another block's data";
  if (version < s->floor)
    return "older than what was flushed";
  if (version > s->submitted)
    return "newer than what was written";
  return NULL;
}

static int
run_verify (int argc, char **argv)
{
  static uint8_t buf[RUN * BLOCK];
  struct nbd_handle *nbd;
  uint64_t wrong = 0, durable = 0;

  if (argc != 2)
    die ("verify URI STATE");
  load.uri = argv[0];
  open_state (argv[1]);
  nbd = connect_to (load.uri);
  for (uint64_t b = 0; b < load.nr_blocks; ++b) {
    if (b % RUN == 0) {
      uint64_t nr = load.nr_blocks - b < RUN ? load.nr_blocks - b : RUN;

      if (nbd_pread (nbd, buf, nr * BLOCK, b * BLOCK, 0) == -1)
        die ("%s", nbd_get_error ());
    }
    durable += load.blocks[b].floor != 0;
    for (unsigned i = 0; i < BLOCK; i += 512) {
      const char *why = judge_sector (buf + b % RUN * BLOCK + i, b);

      if (why && wrong++ < 10)
        fprintf (stderr, "nbd-ops: byte %" PRIu64 ": %s (flushed %u, sent %u)\n", b * BLOCK + i,
                 why, load.blocks[b].floor, load.blocks[b].submitted);
    }
  }
  nbd_close (nbd);
  printf ("%" PRIu64 " blocks, %" PRIu64 " of them with flushed data, %" PRIu64
          " wrong sectors\n", load.nr_blocks, durable, wrong);
  return wrong != 0;
}

int
main (int argc, char **argv)
{
  static const struct {
    const char *name;
    int (*run) (int, char **);
  } commands[] = { { "model", run_model }, { "load", run_load }, { "verify", run_verify } };

  for (size_t i = 0; argc > 1 && i < sizeof commands / sizeof commands[0]; ++i) {
    if (strcmp (argv[1], commands[i].name) == 0)
      return commands[i].run (argc - 2, argv + 2);
  }
  die ("model, load or verify");
}
