#!/bin/bash
# 512-byte clusters and so many of them in use that the table has to be placed
# a third time.
. "$(dirname "$0")/../lib.sh"

# 64-bit refcounts: a block covers 64 clusters, a table cluster 4096.  Without a
# free cluster all that is new lies behind what is there, n clusters, and makes the
# file (n + t) * 64 / 63 clusters long if the table has t.  With t = 63 that is
# 262,144: the table must have 64 clusters for it.  With 64 it is one more: 65.
clusters=257985
patch d.qcow2 dense 9 6 $clusters
patch d.qcow2 guest d.raw
want=$(patch d.qcow2 lower-bound)
heals_ok "third round" d.qcow2 d.raw R11
is "the structure takes the fewest clusters" "$(patch healed.bin structure)" "$want"
first=$(((clusters + 4095) / 4096))
ok "the table is two clusters longer than the image alone needs" \
  test "$(patch healed.bin get refcount_table_clusters)" -ge $((first + 2))
rounds=$(jq '[.. | objects | .rounds? // empty] | max' report.json)
ok "the report says that it took three rounds or more" test "$rounds" -ge 3

done_testing
