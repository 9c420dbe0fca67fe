/* See report.h.  Pieces about findings come from check/report.c; this file adds
 * what the stack knows: what was healed, and how the guest disk is served.
 *
 * Counts of qemu-img's describe the image after repair, with what was fixed
 * beside them, as `qemu-img check -r' prints it.
 */
#include <errno.h>
#include <inttypes.h>

#include "check/report.h"
#include "report.h"

#define RUNS_SHOWN 3

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
  report_json_findings (fp, l->before, "    ");
  fprintf (fp, "]");
  if (l->after) {
    fprintf (fp, ",\n  \"findings-after\": [");
    report_json_findings (fp, l->after, "    ");
    fprintf (fp, "]");
  }
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
           ",\n    \"blocks-replaced\": %" PRIu64 ",\n    \"leaks-kept\": %" PRIu64
           ",\n    \"dirty-bit-cleared\": %s,\n    \"corrupt-bit-cleared\": %s",
           h->refcounts_raised, h->refcounts_lowered, h->copied_fixed, h->blocks_replaced,
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
  if (l->before)
    json_check (fp, l);
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

/* " 3 things done;", or nothing for none. */
static void
text_count (FILE *fp, uint64_t n, const char *thing, const char *done)
{
  if (n)
    fprintf (fp, " %" PRIu64 " %s%s %s;", n, thing, n == 1 ? "" : "s", done);
}

static void
text_healed (FILE *fp, const struct layer *l)
{
  const struct heal_result *h = &l->result;

  fprintf (fp, "mended:");
  if (h->rebuilt)
    fprintf (fp, " refcounts rebuilt (table at 0x%" PRIx64 ", %" PRIu64 " block%s);",
             h->rt_host_off, h->blocks_written, h->blocks_written == 1 ? "" : "s");
  if (h->refcount_bits)
    fprintf (fp, " refcounts widened to %u bits;", h->refcount_bits);
  text_count (fp, h->blocks_replaced, "refcount block", "replaced");
  text_count (fp, h->refcounts_raised, "refcount", "raised");
  text_count (fp, h->refcounts_lowered, "leaked cluster", "freed");
  text_count (fp, h->copied_fixed, "COPIED flag", "set right");
  if (h->dirty_cleared)
    fprintf (fp, " dirty bit cleared;");
  if (h->corrupt_cleared)
    fprintf (fp, " corrupt bit cleared;");
  text_count (fp, h->leaks_kept, "leaked cluster", "kept, since not everything could be followed");
  fprintf (fp, "\n");
}

static void
text_after (FILE *fp, const struct layer *l)
{
  if (!l->after)
    return;
  text_healed (fp, l);
  if (check_sound (l->after))
    fprintf (fp, "checked again: sound\n");
  else {
    fprintf (fp, "checked again, this remains:\n");
    report_text (fp, l->after, RUNS_SHOWN);
  }
}

/* Sound files behind the image are worth no line. */
static void
text_chain (FILE *fp, const struct stack *s)
{
  for (size_t i = 0; i < s->chain.len; ++i) {
    const struct layer *l = &s->chain.ptr[i];

    if (!l->before || !findings_any (&l->before->findings, SEV_LEAK))
      continue;
    fprintf (fp, "checked the backing file %s:\n", l->path);
    report_text (fp, l->before, RUNS_SHOWN);
    text_after (fp, l);
  }
}

static void
text_committed (FILE *fp, const struct inplace *ip)
{
  if (ip->note)
    fprintf (fp, "note: %s\n", ip->note);
  if (!ip->committed)
    return;
  fprintf (fp, "%s: %" PRIu64 " bytes written, %" PRIu64 " zeroed; the journal %s was removed\n",
           ip->resumed ? "a commit that had been cut off was finished" : "committed to the image",
           ip->result.bytes_written + ip->data_result.bytes_written,
           ip->result.bytes_zeroed + ip->data_result.bytes_zeroed, ip->journal);
}

static void
text_verdict (FILE *fp, const struct stack *s)
{
  if (!s->guest)
    fprintf (fp, "the guest disk is not served%s%s\n", s->why_no_guest ? ": " : "",
             s->why_no_guest ? s->why_no_guest : "");
  else if (s->writable)
    fprintf (fp, "serving read-write, %s%s%s\n",
             s->overlay ? "writes go to the overlay " : "in place",
             s->overlay ? s->overlay : "",
             s->inplace.committed ? "; the repair was written to the image" : "");
  else
    fprintf (fp, "serving READ-ONLY: %s\n", s->why_read_only ? s->why_read_only : "");
}

void
report_write_text (FILE *fp, const struct stack *s)
{
  if (s->top.before) {
    fprintf (fp, "checked %s%s%s%s:\n", s->top.path, s->overlay_reused ? " as changed by " : "",
             !s->overlay_reused ? "" : s->overlay ? s->overlay : s->inplace.journal,
             s->live ? " (in use elsewhere: findings may be transient)" : "");
    report_text (fp, s->top.before, RUNS_SHOWN);
  }
  text_after (fp, &s->top);
  text_chain (fp, s);
  text_committed (fp, &s->inplace);
  text_verdict (fp, s);
}
