/* The plugin's face towards nbdkit: the table of callbacks and its life cycle.
 *
 * All work is elsewhere: config.c reads the parameters, start.c opens, checks
 * and heals the image (before nbdkit forks, so that errors are seen and no
 * thread is lost in the fork), exports.c answers what clients negotiate, io.c
 * carries the requests, quit.c notices the end, limit.c survives limits, memory.c
 * keeps no more than is needed.
 *
 * On the way out nbdkit waits for running requests, closes the connections and
 * then calls cleanup: there the image is flushed and closed (dirty bit cleared,
 * locks released).  It calls cleanup only if it got as far as serving, hence the
 * second chance in unload.  Killed without either, the order of writes in
 * core/img has seen to it that at worst clusters are leaked.
 */
#include <stdio.h>

#include "base/log.h"
#include "plugin/config.h"
#include "plugin/plugin.h"

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL

static void
debug_hook (const char *msg)
{
  nbdkit_debug ("%s", msg);
}

/* nbdkit has one way to tell the operator something, wherever stderr leads by then. */
static void
notice_hook (const char *msg)
{
  nbdkit_error ("%s", msg);
}

static void
plugin_load (void)
{
  memory_set_up ();
  log_set_debug_hook (debug_hook);
  log_set_notice_hook (notice_hook);
}

static void
plugin_unload (void)
{
  quit_unwatch ();
  stop ();
  limit_unwatch ();
  config_reset ();
  log_set_debug_hook (NULL);
  log_set_notice_hook (NULL);
}

static int
after_fork (void)
{
  limit_watch ();
  return quit_watch ();
}

/* For scripts that must know what this build can do. */
static void
plugin_dump (void)
{
  char keys[256];

  config_print_keys (keys, sizeof keys, ",");
  printf ("qcow2repair_version=%s\n", PACKAGE_VERSION);
  printf ("qcow2repair_parameters=%s\n", keys);
  printf ("qcow2repair_repair=off,refcounts,all\n");
  printf ("qcow2repair_check=true,false,deep\n");
  printf ("qcow2repair_sources=file,block-device,nbd\n");
  printf ("qcow2repair_exports=disk,snapshot/*,healed.qcow2,report.json,lost+found,lost+found.json\n");
}

/* Without these, nbdkit would ask the callbacks' mere existence. */
static int
yes (void *handle)
{
  return 1;
}

static int
no (void *handle)
{
  return 0;
}

static int
can_fua (void *handle)
{
  return NBDKIT_FUA_NATIVE;
}

static int
can_cache (void *handle)
{
  return NBDKIT_CACHE_NATIVE;
}

static struct nbdkit_plugin plugin = {
  .name               = "qcow2repair",
  .longname           = "qcow2repair",
  .version            = PACKAGE_VERSION,
  .description        = "Check a damaged qcow2 image, heal it into an overlay and serve it.",
  .load               = plugin_load,
  .unload             = plugin_unload,
  .dump_plugin        = plugin_dump,
  .config             = config_set,
  .config_complete    = config_complete,
  .config_help        = config_help,
  .magic_config_key   = "file",
  .get_ready          = start,
  .after_fork         = after_fork,
  .cleanup            = stop,

  .list_exports       = exports_list,
  .default_export     = exports_default,
  .open               = exports_open,
  .close              = exports_close,
  .export_description = exports_description,
  .get_size           = exports_get_size,
  .block_size         = exports_block_size,
  .can_write          = exports_can_write,
  .can_flush          = yes,
  .can_trim           = yes,
  .can_zero           = yes,
  .can_fast_zero      = yes,
  .can_fua            = can_fua,
  .can_multi_conn     = yes,    /* one cache for all connections: a flush covers them all */
  .can_extents        = yes,
  .can_cache          = can_cache,
  .is_rotational      = no,

  .pread              = io_pread,
  .pwrite             = io_pwrite,
  .zero               = io_zero,
  .trim               = io_trim,
  .flush              = io_flush,
  .extents            = io_extents,
  .cache              = io_cache,
};

struct nbdkit_plugin *plugin_init (void);       /* its prototype: the macro has none */

NBDKIT_REGISTER_PLUGIN (plugin)
