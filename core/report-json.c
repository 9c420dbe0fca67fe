/* The report for programs: see report.h, and docs/report.md for every member.
 * Pieces about findings come from check/report.c; this file adds what the stack
 * knows: what was healed, what is lost, and how the guest disk is served.
 *
 * Counts of qemu-img's describe the image after repair, with what was fixed
 * beside them, as `qemu-img check -r' prints it.
 */
#include <errno.h>
#include <inttypes.h>

#include "check/report.h"
#include "check/words.h"
#include "report.h"

static const char *const level_names[] = { "off", "refcounts", "all", "salvage" };

static uint64_t
corruptions (const struct check *c)
{
  return c->findings.per_severity[SEV_CORRUPT] + c->findings.per_severity[SEV_FATAL];
}

static uint64_t
leaks (const struct check *c)
{
  return c->findings.per_severity[SEV_LEAK];
}

static void
number_if_not_zero (FILE *fp, const char *name, uint64_t v)
{
  if (v)
    fprintf (fp, ",\n  \"%s\": %" PRIu64, name, v);
}

static uint64_t
fixed (uint64_t before, uint64_t after)
{
  return before > after ? before - after : 0;
}

static void
json_findings (FILE *fp, const struct layer *l)
{
  const struct check *now = layer_now (l);

  fprintf (fp, ",\n  \"virtual-size\": %" PRIu64 ",\n  \"cluster-size\": %" PRIu64,
           now->header.size, now->geom.cluster_size);
  fprintf (fp, ",\n  \"sound\": %s", check_sound (now) ? "true" : "false");
  fprintf (fp, ",\n  \"complete\": %s", now->incomplete ? "false" : "true");
  fprintf (fp, ",\n  \"findings\": [");
  report_json_findings (fp, l->before, l->after, "    ");
  fprintf (fp, "]");
  if (l->after) {
    fprintf (fp, ",\n  \"findings-after\": [");
    report_json_findings (fp, l->after, l->after, "    ");
    fprintf (fp, "]");
  }
  fprintf (fp, ",\n  \"conflicts\": {\n    \"total\": %" PRIu64 ",\n    \"listed\": [",
           l->before->nr_conflicts);
  report_json_conflicts (fp, l->before, "      ");
  fprintf (fp, "]\n  }");
}

/* What the check saw; the index of the export lost+found has each. */
static void
json_orphans (FILE *fp, const struct orphan_stats *o)
{
  fprintf (fp, ",\n  \"orphans\": { \"clusters\": %" PRIu64 ", \"tables\": %" PRIu64
           ", \"sampled\": %s }", o->clusters, o->tables, o->sampled ? "true" : "false");
}

static void
json_why (FILE *fp, int why)
{
  fputs (", \"why\": ", fp);
  if (why < NR_FINDINGS)
    fprintf (fp, "\"%s\", \"why-text\": \"%s\" }", finding_kinds[why].code,
             finding_kinds[why].title);
  else
    fputs ("\"backing-file-missing\", \"why-text\": \"it would come from a backing file that is "
           "not there\" }", fp);
}

/* Whose: absent for the active disk. */
static void
json_snapshot (FILE *fp, const char *id, const char *name)
{
  fputs ("\"snapshot-id\": ", fp);
  report_json_string (fp, id ? id : "");
  fputs (", \"snapshot-name\": ", fp);
  report_json_string (fp, name ? name : "");
}

static void
json_lost (FILE *fp, const struct lost *lost)
{
  uint64_t bytes = 0;

  for (size_t i = 0; i < lost->ranges.len; ++i)
    bytes += lost->ranges.ptr[i].guest_len;
  fprintf (fp, ",\n  \"lost\": {\n    \"bytes\": %" PRIu64 ",\n    \"active-bytes\": %" PRIu64
           ",\n    \"ranges\": [", bytes, lost->active_bytes);
  for (size_t i = 0; i < lost->ranges.len; ++i) {
    const struct lost_range *r = &lost->ranges.ptr[i];

    fprintf (fp, "%s\n      { \"guest-offset\": %" PRIu64 ", \"guest-length\": %" PRIu64,
             i ? "," : "", r->guest_off, r->guest_len);
    if (r->snapshot_id) {
      fputs (", ", fp);
      json_snapshot (fp, r->snapshot_id, r->snapshot_name);
    }
    json_why (fp, r->why);
  }
  fputs ("],\n    \"snapshots\": [", fp);
  for (size_t i = 0; i < lost->snapshots.len; ++i) {
    const struct lost_snapshot *n = &lost->snapshots.ptr[i];

    fprintf (fp, "%s\n      { ", i ? "," : "");
    json_snapshot (fp, n->id, n->name);
    json_why (fp, n->why);
  }
  fputs ("]\n  }", fp);
}

/* qemu-img's fields, then ours. */
static void
json_check (FILE *fp, const struct layer *l)
{
  const struct check *now = layer_now (l);

  fprintf (fp, ",\n  \"image-end-offset\": %" PRIu64, now->stats.image_end_off);
  number_if_not_zero (fp, "corruptions", corruptions (now));
  number_if_not_zero (fp, "leaks", leaks (now));
  if (l->after) {
    number_if_not_zero (fp, "corruptions-fixed", fixed (corruptions (l->before),
                                                        corruptions (now)));
    number_if_not_zero (fp, "leaks-fixed", fixed (leaks (l->before), leaks (now)));
  }
  number_if_not_zero (fp, "total-clusters", now->stats.total_clusters);
  number_if_not_zero (fp, "allocated-clusters", now->stats.allocated_clusters);
  number_if_not_zero (fp, "fragmented-clusters", now->stats.fragmented_clusters);
  number_if_not_zero (fp, "compressed-clusters", now->stats.compressed_clusters);
  json_findings (fp, l);
}

static void
json_healed (FILE *fp, const struct layer *l)
{
  const struct heal_result *h = &l->result;

  fprintf (fp, ",\n  \"healed\": {\n    \"refcounts-raised\": %" PRIu64
           ",\n    \"refcounts-lowered\": %" PRIu64 ",\n    \"copied-flags\": %" PRIu64
           ",\n    \"structures\": %" PRIu64 ",\n    \"entries-cleared\": %" PRIu64
           ",\n    \"entries-corrected\": %" PRIu64 ",\n    \"clusters-split\": %" PRIu64
           ",\n    \"clusters-left-shared\": %" PRIu64
           ",\n    \"blocks-replaced\": %" PRIu64 ",\n    \"leaks-kept\": %" PRIu64
           ",\n    \"dirty-bit-cleared\": %s,\n    \"corrupt-bit-cleared\": %s",
           h->refcounts_raised, h->refcounts_lowered, h->copied_fixed, h->structures,
           h->entries_cleared, h->entries_corrected, h->clusters_split, h->clusters_unsplit,
           h->blocks_replaced,
           h->leaks_kept, h->dirty_cleared ? "true" : "false",
           h->corrupt_cleared ? "true" : "false");
  if (h->rebuilt)
    fprintf (fp, ",\n    \"rebuilt\": { \"refcount-table-offset\": %" PRIu64
             ", \"refcount-table-clusters\": %" PRIu64 ", \"refcount-blocks\": %" PRIu64
             ", \"rounds\": %u, \"refcount-bits\": %u }",
             h->rt_host_off, h->rt_clusters, h->blocks_written, h->rounds,
             h->refcount_bits ? h->refcount_bits : l->before->geom.refcount_bits);
  fprintf (fp, "\n  }");
}

/* The members that describe one file. */
static void
json_layer (FILE *fp, const struct layer *l)
{
  fprintf (fp, ",\n  \"filename\": ");
  report_json_string (fp, l->path);
  fprintf (fp, ",\n  \"format\": \"%s\"", l->raw ? "raw" : "qcow2");
  if (l->before) {
    json_check (fp, l);
    json_lost (fp, &l->lost);
    json_orphans (fp, layer_orphans (l));
  }
  if (l->after)
    json_healed (fp, l);
}

static void
json_chain (FILE *fp, const struct stack *s)
{
  if (s->chain.len == 0)
    return;
  fprintf (fp, ",\n  \"backing-chain\": [");
  for (size_t i = 0; i < s->chain.len; ++i) {
    const struct layer *l = &s->chain.ptr[i];

    fprintf (fp, "%s\n  {\n  \"check-errors\": %d", i ? "," : "", l->raw || l->before ? 0 : 1);
    json_layer (fp, l);
    fprintf (fp, "\n  }");
  }
  fprintf (fp, "\n  ]");
}

static void
json_string_if (FILE *fp, const char *name, const char *s)
{
  if (!s)
    return;
  fprintf (fp, ",\n  \"%s\": ", name);
  report_json_string (fp, s);
}

/* What was written into the image, and by way of what. */
static void
json_committed (FILE *fp, const struct inplace *ip)
{
  json_string_if (fp, "note", ip->note);
  if (!ip->committed)
    return;
  fprintf (fp, ",\n  \"committed\": {\n    \"bytes-written\": %" PRIu64
           ",\n    \"bytes-zeroed\": %" PRIu64 ",\n    \"size-before\": %" PRIu64
           ",\n    \"size-after\": %" PRIu64 ",\n    \"resumed\": %s,\n    \"journal\": ",
           ip->result.bytes_written + ip->data_result.bytes_written,
           ip->result.bytes_zeroed + ip->data_result.bytes_zeroed, ip->result.old_size,
           ip->result.new_size, ip->resumed ? "true" : "false");
  report_json_string (fp, ip->journal);
  fprintf (fp, "\n  }");
}

static void
json_stack (FILE *fp, const struct stack *s)
{
  json_layer (fp, &s->top);
  fprintf (fp, ",\n  \"repair\": \"%s\"", level_names[s->repair]);
  json_string_if (fp, "overlay", s->overlay);
  json_string_if (fp, "data-file", s->data.path);
  json_string_if (fp, "data-overlay", s->data_overlay);
  json_committed (fp, &s->inplace);
  json_chain (fp, s);
  report_read_errors_json (fp, s);
  fprintf (fp, ",\n  \"live\": %s", s->live ? "true" : "false");
  fprintf (fp, ",\n  \"served\": \"%s\"",
           !s->guest ? "no" : s->writable ? "read-write" : "read-only");
  json_string_if (fp, "read-only-because", s->why_read_only);
}

int
report_write_json (FILE *fp, const struct stack *s, const struct err *failure)
{
  /* A check that could not be made is qemu-img's one check error. */
  fprintf (fp, "{\n  \"check-errors\": %d", s && s->top.before ? 0 : 1);
  if (s)
    json_stack (fp, s);
  if (failure && failure->code) {
    fprintf (fp, ",\n  \"error\": ");
    report_json_string (fp, failure->msg);
  }
  fprintf (fp, "\n}\n");
  return fflush (fp) == 0 && !ferror (fp) ? 0 : -EIO;
}
