#!/bin/bash
# A sound image of any kind keeps every byte: its overlay stays empty.
. "$(dirname "$0")/../lib.sh"

# QEMU reads whole sectors, so that what it says of the healed file may be longer.
same_file ()
{
  truncate -s "$(stat -c %s "$1")" healed.bin && cmp healed.bin "$1"
}

sound_ok ()     # NAME
{
  local before

  before=$(sha256 s.qcow2)
  guest_raw s.qcow2 s.raw
  rm -f o.qcow2
  ok "$1: served through an overlay" serve s.qcow2 overlay=o.qcow2 report=report.json --run "$copy_out"
  ok "$1: guest bytes are right" cmp out.raw s.raw
  ok "$1: the overlay holds nothing" overlay_is_empty o.qcow2
  ok "$1: served once more" serve s.qcow2 overlay=o.qcow2 --run "$copy_out"
  ok "$1: the overlay still holds nothing" overlay_is_empty o.qcow2
  healed_file o.qcow2 healed.bin
  ok "$1: the healed file is the image, to the byte" same_file s.qcow2
  is "$1: the image is as it was" "$(sha256 s.qcow2)" "$before"
}

kind ()         # NAME SIZE_IN_KIB qemu-img options...
{
  local name=$1 kib=$2
  shift 2

  rm -f s.qcow2
  make_image s.qcow2 "${kib}K" "$@" && age_image s.qcow2 "$kib" "$SEED" 60 || fail "$name: image"
  sound_ok "$name"
}

kind "version 2"            8192 -o compat=0.10
kind "version 3"            8192
kind "odd size"             5001
kind "512-byte clusters"    4096 -o cluster_size=512
kind "4 KiB, 1-bit"         8192 -o cluster_size=4k,refcount_bits=1
kind "2 MiB clusters"      65536 -o cluster_size=2M
kind "64-bit refcounts"     8192 -o refcount_bits=64,cluster_size=1k
kind "lazy refcounts"       8192 -o lazy_refcounts=on
kind "metadata preallocated" 65536 -o preallocation=metadata

make_image s.qcow2 8M -o cluster_size=4k
age_image s.qcow2 8192 "$SEED" 40
qemu-img snapshot -c one s.qcow2
age_image s.qcow2 8192 "$((SEED + 1))" 20
qemu-img snapshot -c two s.qcow2
io s.qcow2 'write -P 3 0 300k'
qemu-img bitmap --add s.qcow2 changed
sound_ok "snapshots and a dirty bitmap"

make_image s.qcow2 1M
sound_ok "empty disk"

make_image s.qcow2 0
ok "a disk of no bytes is served" serve s.qcow2 --run 'test "$(nbdinfo --size "$uri")" = 0'

done_testing
