/* Compressed clusters: reading them, and a cache of what they decompress to.
 *
 * What is copied or read here and there is touched once, and a cache only costs
 * it time and memory.  So a cluster that is asked for as a whole is decompressed right into
 * the caller's buffer, and where a small piece of it is asked for, decompression stops behind
 * that if it can.  But a shard remembers whom it met lately: who is met again is
 * decompressed whole, whatever part of it is asked for, and kept.
 *
 * The last few are kept in shards, by their descriptor, each a small hash table
 * and a list with the least recently used last.  Threads that want the same
 * cluster at once wait for the first of them to decompress it; different
 * clusters are decompressed in parallel, since no lock is held meanwhile.
 *
 * LIMIT: a small read does not see that a stream is broken behind what it wants; the next one
 * in that cluster does.  Not so in an image that was damaged (img->careful).
 *
 * Nothing stale can be found: streams are never written here, so the bytes of a
 * descriptor change only when its host clusters were freed and used again.
 * commit.c calls compressed_forget for clusters that are about to be freed,
 * when the removal of the references is durable and a grace period has passed:
 * then nobody can still be reading such a descriptor, or find it in the mapping.
 *
 * Streams that share a host cluster each hold a reference to every host cluster
 * they touch, from their first byte to the end of their last sector.
 *
 * Deliberately not here: writing compressed clusters.  A guest write makes a
 * normal cluster of one (write.c).
 *
 * Invariants: none of its own; nothing here changes the disk.
 */
#include <errno.h>
#include <string.h>

#include "base/idle.h"
#include "fmt/inflate.h"
#include "img/image-int.h"

#define MAX_SHARDS 8

/* A read of no more is small: also one by one from end to end, little is done twice. */
#define SMALL_READ (UINT64_C (32) << 10)        /* bytes; and an eighth of the cluster */

#define SCRATCH_BYTES (UINT64_C (4) << 20)      /* of all idle buffers */

enum state { LOADING, READY, FAILED };

/* One decompressed cluster.  Everything but data is protected by the shard's
 * lock; data is written by the thread that loads it, and constant once READY.
 */
struct plain {
  uint64_t host_off, host_len;  /* of the stream: the key */
  struct plain *chain;          /* in the same bucket */
  struct plain *newer, *older;  /* in the order of use */
  unsigned refs;                /* threads that look at it */
  bool linked;                  /* in the table and the list; else freed with the last ref */
  enum state state;
  uint8_t data[];
};

struct shard {
  pthread_mutex_t lock;
  pthread_cond_t loaded;
  /* protected by lock */
  struct plain **buckets;
  struct plain *newest, *oldest;
  size_t nr;
  struct plain *spare;          /* memory of one that was unlinked */
  uint64_t *seen;               /* by hash: host_off of the stream that was read last */
};

struct compressed {
  /* constant after open */
  unsigned nr_shards;
  size_t max_per_shard, nr_buckets;     /* nr_buckets: a power of two */
  size_t nr_seen;                       /* likewise */
  unsigned max_scratch;
  struct shard shards[MAX_SHARDS];
  struct idle scratch;          /* buffers of scratch_bytes */
};

/* A stream, which is two clusters' worth of sectors at most, and what comes out. */
static size_t
scratch_bytes (const struct image *img)
{
  return img->g.cluster_size * 3;
}

int
compressed_init (struct image *img, size_t cache_bytes, struct err *err)
{
  struct compressed *c = calloc (1, sizeof *c);
  size_t max = MAX (cache_bytes / (img->g.cluster_size + sizeof (struct plain)), 4);

  if (c == NULL)
    return err_set (err, ENOMEM, "out of memory");
  img->compressed = c;
  c->nr_shards = max >= 64 ? MAX_SHARDS : 1;
  c->max_per_shard = max / c->nr_shards;
  for (c->nr_buckets = 4; c->nr_buckets < c->max_per_shard; c->nr_buckets *= 2)
    ;
  c->nr_seen = c->nr_buckets * 4;
  c->max_scratch = MIN (SCRATCH_BYTES / scratch_bytes (img), MAX_IDLE);
  pthread_mutex_init (&c->scratch.lock, NULL);
  for (unsigned i = 0; i < c->nr_shards; ++i) {
    pthread_mutex_init (&c->shards[i].lock, NULL);
    pthread_cond_init (&c->shards[i].loaded, NULL);
    c->shards[i].buckets = calloc (c->nr_buckets, sizeof c->shards[i].buckets[0]);
    c->shards[i].seen = calloc (c->nr_seen, sizeof c->shards[i].seen[0]);
    if (!c->shards[i].buckets || !c->shards[i].seen)
      return err_set (err, ENOMEM, "out of memory");
  }
  return 0;
}

void
compressed_free (struct image *img)
{
  struct compressed *c = img->compressed;
  void *scratch;

  while (c && (scratch = idle_take (&c->scratch)) != NULL)
    free (scratch);
  for (unsigned i = 0; c && i < c->nr_shards; ++i) {
    struct shard *sh = &c->shards[i];

    for (struct plain *p = sh->newest, *next; p; p = next) {
      next = p->older;
      free (p);
    }
    /* Absent after an open that failed; the locks are there all the same. */
    free (sh->buckets);
    free (sh->seen);
    free (sh->spare);
  }
  free (c);
}

/* --- a shard; its lock is held */

static uint64_t
hash (uint64_t host_off)
{
  return (host_off ^ host_off >> 23) * UINT64_C (0x9e3779b97f4a7c15) >> 32;
}

static struct plain **
bucket_locked (const struct compressed *c, struct shard *sh, uint64_t host_off)
{
  return &sh->buckets[hash (host_off) / MAX_SHARDS & (c->nr_buckets - 1)];
}

static void
push_newest_locked (struct shard *sh, struct plain *p)
{
  p->newer = NULL;
  p->older = sh->newest;
  if (sh->newest)
    sh->newest->newer = p;
  else
    sh->oldest = p;
  sh->newest = p;
}

static void
unlist_locked (struct shard *sh, struct plain *p)
{
  *(p->newer ? &p->newer->older : &sh->newest) = p->older;
  *(p->older ? &p->older->newer : &sh->oldest) = p->newer;
}

static void
link_locked (const struct compressed *c, struct shard *sh, struct plain *p)
{
  struct plain **bucket = bucket_locked (c, sh, p->host_off);

  p->chain = *bucket;
  *bucket = p;
  push_newest_locked (sh, p);
  p->linked = true;
  sh->nr++;
}

/* The next to be linked most likely wants as much memory. */
static void
dispose_locked (struct shard *sh, struct plain *p)
{
  if (sh->spare)
    free (p);
  else
    sh->spare = p;
}

static void
unlink_locked (const struct compressed *c, struct shard *sh, struct plain *p)
{
  struct plain **at = bucket_locked (c, sh, p->host_off);

  while (*at != p)
    at = &(*at)->chain;
  *at = p->chain;
  unlist_locked (sh, p);
  p->linked = false;
  sh->nr--;
  if (p->refs == 0)
    dispose_locked (sh, p);
}

static void
unref_locked (struct shard *sh, struct plain *p)
{
  if (--p->refs == 0 && !p->linked)
    dispose_locked (sh, p);
}

static struct plain *
find_locked (const struct compressed *c, struct shard *sh, uint64_t host_off, uint64_t host_len)
{
  struct plain *p = *bucket_locked (c, sh, host_off);

  while (p && (p->host_off != host_off || p->host_len != host_len))
    p = p->chain;
  return p;
}

/* Was this stream read lately? */
static bool
seen_locked (const struct compressed *c, struct shard *sh, uint64_t host_off)
{
  uint64_t *seen = &sh->seen[hash (host_off) / MAX_SHARDS & (c->nr_seen - 1)];
  bool again = *seen == host_off;

  *seen = host_off;
  return again;
}

/* --- reading */

/* Its bytes from in_cluster on, into buf.  No locks held. */
static int
decompress (struct image *img, uint64_t host_off, uint64_t host_len, uint8_t *buf,
            uint64_t in_cluster, uint64_t len, struct err *err)
{
  struct compressed *c = img->compressed;
  uint8_t type = img->header.compression_type;
  uint8_t *in = idle_take (&c->scratch), *out = buf;
  uint64_t end = in_cluster + len;
  int r;

  assert (host_len <= img->g.cluster_size * 2);
  if (in == NULL)
    in = malloc (scratch_bytes (img));
  if (in == NULL)
    return err_set (err, ENOMEM, "out of memory");
  if (in_cluster > 0)
    out = in + img->g.cluster_size * 2;
  r = bdev_pread_padded (img->file, in, host_len, host_off, err);
  if (r == 0 && end == img->g.cluster_size)
    r = inflate_cluster (type, in, host_len, out, end, err);
  else if (r == 0)
    r = inflate_part (type, in, host_len, out, end, err);
  if (r == 0 && in_cluster > 0)
    memcpy (buf, out + in_cluster, len);
  if (!idle_give (&c->scratch, in, c->max_scratch))
    free (in);
  return r;
}

/* Can a read do without the cache as well as with it? */
static bool
reads_once (const struct image *img, uint64_t in_cluster, uint64_t len)
{
  uint64_t cluster_size = img->g.cluster_size;

  if (len == cluster_size)
    return true;
  return !img->careful && len <= MIN (SMALL_READ, cluster_size / 8) &&
         inflate_part_pays (img->header.compression_type, in_cluster + len, cluster_size);
}

/* An entry for the cache, with no longer used memory if there is some. */
static struct plain *
new_plain_locked (struct image *img, struct shard *sh)
{
  struct plain *p;

  while (sh->nr >= img->compressed->max_per_shard)
    unlink_locked (img->compressed, sh, sh->oldest);
  p = sh->spare;
  sh->spare = NULL;
  return p ? p : malloc (sizeof *p + img->g.cluster_size);
}

/* Make an entry, which others find and wait for, and fill it.  Called and left
 * with the lock held; *ret has a reference of the caller's.
 */
static int
add_plain_locked (struct image *img, struct shard *sh, uint64_t host_off, uint64_t host_len,
                  struct plain **ret, struct err *err)
{
  const struct compressed *c = img->compressed;
  struct plain *p = new_plain_locked (img, sh);
  int r;

  if (p == NULL)
    return err_set (err, ENOMEM, "out of memory");
  p->host_off = host_off;
  p->host_len = host_len;
  p->refs = 1;
  p->state = LOADING;
  link_locked (c, sh, p);
  pthread_mutex_unlock (&sh->lock);
  r = decompress (img, host_off, host_len, p->data, 0, img->g.cluster_size, err);
  pthread_mutex_lock (&sh->lock);
  p->state = r < 0 ? FAILED : READY;
  pthread_cond_broadcast (&sh->loaded);
  if (r < 0) {
    if (p->linked)
      unlink_locked (c, sh, p);
    unref_locked (sh, p);
    return r;
  }
  *ret = p;
  return 0;
}

/* Somebody else has it, or is loading it: NULL if that failed. */
static struct plain *
share_plain_locked (struct shard *sh, struct plain *p)
{
  p->refs++;
  unlist_locked (sh, p);
  push_newest_locked (sh, p);
  while (p->state == LOADING)
    pthread_cond_wait (&sh->loaded, &sh->lock);
  if (p->state == READY)
    return p;
  unref_locked (sh, p);
  return NULL;
}

/* By way of the cache.  Called with the lock held and left without. */
static int
read_kept_unlock (struct image *img, struct shard *sh, struct plain *p, uint64_t host_off,
                  uint64_t host_len, uint8_t *buf, uint64_t in_cluster, uint64_t len,
                  struct err *err)
{
  int r = 0;

  if (p == NULL)
    r = add_plain_locked (img, sh, host_off, host_len, &p, err);
  pthread_mutex_unlock (&sh->lock);
  if (r < 0)
    return r;
  memcpy (buf, p->data + in_cluster, len);
  pthread_mutex_lock (&sh->lock);
  unref_locked (sh, p);
  pthread_mutex_unlock (&sh->lock);
  return 0;
}

int
compressed_read (struct image *img, uint64_t host_off, uint64_t host_len, void *buf, uint64_t len,
                 uint64_t guest_off, struct err *err)
{
  const struct compressed *c = img->compressed;
  struct shard *sh = &img->compressed->shards[hash (host_off) % c->nr_shards];
  uint64_t in_cluster = guest_off & (img->g.cluster_size - 1);
  struct plain *p = NULL, *found;
  struct err why = { 0 };
  bool again;
  int r;

  assert (in_cluster + len <= img->g.cluster_size);
  pthread_mutex_lock (&sh->lock);
  while (p == NULL && (found = find_locked (c, sh, host_off, host_len)) != NULL)
    p = share_plain_locked (sh, found);
  again = seen_locked (c, sh, host_off);
  if (p == NULL && !again && reads_once (img, in_cluster, len)) {
    pthread_mutex_unlock (&sh->lock);
    r = decompress (img, host_off, host_len, buf, in_cluster, len, &why);
  }
  else
    r = read_kept_unlock (img, sh, p, host_off, host_len, buf, in_cluster, len, &why);
  return r == 0 ? 0 :
    err_set (err, -r, "%s: the compressed cluster at guest offset 0x%llx (host offset 0x%llx): %s",
             img->view.name, ULL (guest_off - in_cluster), ULL (host_off), why.msg);
}

/* --- forgetting */

/* Is one of the clusters that the stream touches in the sorted list? */
static bool
touches (const struct image *img, const struct plain *p, const struct u64_vec *frees)
{
  uint64_t first = p->host_off >> img->g.cluster_bits;
  uint64_t last = (p->host_off + p->host_len - 1) >> img->g.cluster_bits;
  size_t lo = 0, hi = frees->len;

  while (lo < hi) {
    size_t mid = lo + (hi - lo) / 2;

    if (frees->ptr[mid] >> 1 < first)
      lo = mid + 1;
    else
      hi = mid;
  }
  return lo < frees->len && frees->ptr[lo] >> 1 <= last;
}

void
compressed_forget (struct image *img, const struct u64_vec *frees)
{
  struct compressed *c = img->compressed;

  for (unsigned i = 0; i < c->nr_shards; ++i) {
    struct shard *sh = &c->shards[i];
    LOCK_SCOPE (&sh->lock);

    for (struct plain *p = sh->newest, *next; p; p = next) {
      next = p->older;
      if (touches (img, p, frees))
        unlink_locked (c, sh, p);
    }
  }
}
