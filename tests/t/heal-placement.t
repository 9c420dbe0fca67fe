#!/bin/bash
# A new refcount table lies in the earliest hole that fits, and the file does
# not grow while there is room inside.
. "$(dirname "$0")/../lib.sh"

placed ()       # NAME CLUSTER_SIZE TABLE_CLUSTERS
{
  local hole before

  before=$(stat -c %s d.qcow2)
  guest_raw d.qcow2 d.raw
  patch d.qcow2 rt-zero
  hole=$(patch d.qcow2 hole "$3")
  heals_ok "$1" d.qcow2 d.raw
  is "$1: size of the table" "$(patch healed.bin get refcount_table_clusters)" "$3"
  is "$1: the table is in the earliest hole" \
    "$(($(patch healed.bin get refcount_table_offset) / $2))" "$hole"
  is "$1: the file did not grow" "$(stat -c %s healed.bin)" "$before"
}

make_image d.qcow2 32M
age_image d.qcow2 32768 "$SEED" 80
placed "one cluster, where it was" 65536 1

# Guest clusters that were discarded leave holes before the old table.
make_image d.qcow2 16M -o cluster_size=4k
io d.qcow2 'write -P 1 0 8M'
patch d.qcow2 rt-zero
qemu-img check -q -r all -f qcow2 d.qcow2 >/dev/null 2>&1    # QEMU's new table lies at the end
io d.qcow2 'discard 1M 64k' 'discard 3M 1M'
placed "one cluster, holes inside" 4096 1

# 512-byte clusters, more than 8 MiB: the table takes two clusters.  The first hole is of one.
make_image d.qcow2 14M -o cluster_size=512
io d.qcow2 'write -P 1 0 12M'
io d.qcow2 'discard 1M 512' 'discard 4M 100k'
placed "two clusters" 512 2

# No room at all: the file grows, by no more than the structure takes.
patch d.qcow2 dense 12 4 2000
patch d.qcow2 guest d.raw
heals_ok "no room" d.qcow2 d.raw R11
is "no room: grows by what the structure takes" \
  "$(($(stat -c %s healed.bin) / 4096))" "$((2000 + $(patch healed.bin structure)))"

done_testing
