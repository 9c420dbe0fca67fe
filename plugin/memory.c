/* What clients with large requests leave behind: see plugin.h.
 *
 * Each of nbdkit's threads has a buffer for the largest request it had, and there are sixteen
 * a connection.  They are freed with the connection, but glibc learns from the first one to keep
 * blocks of that size: for good, where one of our small, lasting blocks lies behind them.  So it
 * is not to learn: large blocks are the kernel's as soon as they are free, and the others are
 * given back when nobody is connected.
 *
 * But not what a copy with requests of 256 KiB leaves: to get its buffers from the kernel again,
 * page by page, took the next one 4 % of its time.
 */
#include <stdlib.h>
#ifdef __GLIBC__
#include <malloc.h>
#if __GLIBC_PREREQ (2, 33)
#define HAVE_GLIBC
#endif
#endif

#include "plugin/plugin.h"

#define LARGE_BLOCK (1 << 20)   /* bytes */
#define WORTHWHILE  (32u << 20) /* bytes */

void
memory_set_up (void)
{
#ifdef HAVE_GLIBC
  mallopt (M_MMAP_THRESHOLD, LARGE_BLOCK);
  mallopt (M_TRIM_THRESHOLD, LARGE_BLOCK);
#endif
}

void
memory_give_back (void)
{
#ifdef HAVE_GLIBC
  if (mallinfo2 ().fordblks >= WORTHWHILE)
    malloc_trim (0);
#endif
}
