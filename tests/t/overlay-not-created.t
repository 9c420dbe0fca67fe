#!/bin/bash
# When the start is refused, no overlay is left behind.
. "$(dirname "$0")/../lib.sh"
require qemu-nbd

no_overlay ()   # NAME ARG...
{
  local name=$1
  shift

  rm -rf o && mkdir o
  SERVE_TIMEOUT=20 ok "$name: refused" not serve "$@" overlay=o/o.qcow2
  is "$name: nothing was created" "$(ls -A o)" ""
}

echo "no image" >text
truncate -s 1M zeros
: >empty
mkdir folder
no_overlay "a text file" text
no_overlay "zeros" zeros
no_overlay "an empty file" empty
no_overlay "a folder" folder
no_overlay "nothing" missing.qcow2

make_image base.qcow2 8M
io base.qcow2 'write -P 1 0 1M'
qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 backed.qcow2
no_overlay "a backing file" backed.qcow2
make_image data.qcow2 8M -o data_file=data.raw
no_overlay "an external data file" data.qcow2
cp base.qcow2 lost.qcow2
patch lost.qcow2 set l1_table_offset=0x10000000000
no_overlay "the L1 table is lost" lost.qcow2
cp base.qcow2 future.qcow2
patch future.qcow2 set incompatible_features=0x8000000000000000
no_overlay "an unknown incompatible feature" future.qcow2
no_overlay "force-share with an overlay" base.qcow2 force-share=true
no_overlay "unknown parameter" base.qcow2 repiar=off

ok "QEMU has it open for writing" qemu_serves base.qcow2
no_overlay "an image in use" base.qcow2
qemu_stops

SERVE_TIMEOUT=20 ok "a folder that is not there: refused" not serve base.qcow2 overlay=nowhere/o.qcow2
done_testing
