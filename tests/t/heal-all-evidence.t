#!/bin/bash
# Where two structures claim one cluster, the evidence decides: the one that holds what it
# should stays, the pointer that led into it is lost, and nothing else changes.
. "$(dirname "$0")/../lib.sh"

make_image sound.qcow2 8M -o cluster_size=4096
patch noise bytes 7 65536
# A table for each 2 MiB, all of them in use; the noise is no table.
io sound.qcow2 'write -s noise 0 64k' 'write -P 2 2M 64k' 'write -P 3 4M 64k' 'write -P 4 6M 64k'
guest_raw sound.qcow2 sound.raw
field () { patch sound.qcow2 get "$1"; }
rt=$(field refcount_table_offset)
block=$(patch sound.qcow2 rt-entry 0)
l1=$(field l1_table_offset)
copied=$((1 << 63))

# loses NAME OFFSET LENGTH CODE COMMAND...: after that damage only that guest range is zeros.
loses ()
{
  local name=$1 off=$2 len=$3 code=$4 before
  shift 4

  cp sound.qcow2 d.qcow2
  patch d.qcow2 "$@"
  cp sound.raw want.raw
  dd if=/dev/zero of=want.raw bs=4096 seek=$((off / 4096)) count=$((len / 4096)) conv=notrunc status=none
  rm -f d.overlay report.json
  before=$(sha256 d.qcow2)
  ok "$name: heals and serves" \
    serve d.qcow2 repair=all overlay=d.overlay report=report.json --run "$copy_out" || return
  ok "$name: that range is lost and no other" cmp out.raw want.raw
  ok "$name: QEMU finds it clean" nested_qemu_img_check d.overlay
  ok "$name: the report names $code" report_has "$code"
  is "$name: the source is as it was" "$(sha256 d.qcow2)" "$before"
}

data=$(($(patch sound.qcow2 host 7) * 4096))

loses "an L1 entry into guest data" $((4 << 20)) $((2 << 20)) T08  l1 2 $((copied | data))
loses "an L1 entry into a refcount block" $((6 << 20)) $((2 << 20)) T08  l1 3 $((copied | block))
loses "an L1 entry into the L1 table" $((2 << 20)) $((2 << 20)) T04  l1 1 $((copied | l1))
loses "two L1 entries, the later in order" 0 $((2 << 20)) T05  l1 0 "$(patch sound.qcow2 l1 2)"
loses "two L1 entries, the earlier in order" $((6 << 20)) $((2 << 20)) T05  l1 3 "$(patch sound.qcow2 l1 1)"
loses "an L2 entry into a refcount block" $((0x3000)) 4096 T14  l2 3 $((copied | block))
loses "an L2 entry into the refcount table" $((0x3000)) 4096 T14  l2 3 $((copied | rt))
loses "an L2 entry into an L2 table" $((0x3000)) 4096 T14  l2 3 "$(patch sound.qcow2 l1 1)"
loses "a refcount table entry into guest data" 0 0 R16  rt-entry 0 "$data"
done_testing
