#!/bin/bash
# Refcount blocks that are zeroed, random, missing or misplaced are mended or replaced.
. "$(dirname "$0")/../lib.sh"

# 4 KiB clusters: a block covers 8 MiB, so this image has several.
make_image base.qcow2 48M -o cluster_size=4k
qemu-io -f qcow2 -c 'write -P 9 0 30M' base.qcow2 >/dev/null
age_image base.qcow2 49152 "$SEED" 80
guest_raw base.qcow2 base.raw
entry () { echo $(($(patch base.qcow2 rt-entry "$1"))); }
l2=$(($(patch base.qcow2 l1 0) & 0x00fffffffffffe00))
data=$(($(patch base.qcow2 host 100) * 4096))

bad_block ()    # NAME PATCH COMMAND...
{
  local name=$1
  shift

  cp base.qcow2 d.qcow2
  patch d.qcow2 "$@"
  heals_ok "$name" d.qcow2 base.raw
  ok "$name: something was found" eval 'jq -e ".findings | length > 0" report.json'
}

bad_block "first block zeroed"          rb-zero 0
bad_block "another block zeroed"        rb-zero 2
bad_block "first block random"          rb-random 0 5
bad_block "another block random"        rb-random 1 6
bad_block "missing"                     rt-entry 1 0
bad_block "named twice"                 rt-entry 1 "$(entry 0)"
bad_block "named twice, the other way"  rt-entry 0 "$(entry 1)"
bad_block "misaligned"                  rt-entry 1 $(($(entry 1) + 512))
bad_block "reserved bits"               rt-entry 1 $(($(entry 1) | 8))
bad_block "outside the file"            rt-entry 1 0x4000000000
bad_block "at the end of arithmetic"    rt-entry 1 0xfffffffffffff000
bad_block "on an L2 table"              rt-entry 1 "$l2"
bad_block "on the header"               rt-entry 1 4096 + rt-entry 2 "$(patch base.qcow2 get refcount_table_offset)"
bad_block "on guest data"               rt-entry 1 "$data"
bad_block "all entries lost but one"    rt-entry 0 0 + rt-entry 1 0 + rt-entry 2 0x123
bad_block "beyond what is used"         rt-entry 500 "$(entry 0)"

done_testing
