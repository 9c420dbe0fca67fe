#!/bin/bash
# The backing file is gone: check, heal and serve all the same with backing=none, and the
# ranges that would come from it are listed, for the disk and for its snapshots.
. "$(dirname "$0")/../lib.sh"

ranges ()       # DISK: of the report; '' is the active one
{
  jq -c --arg s "$1" '[.lost.ranges[] | select((."snapshot-name" // "") == $s)
    | [."guest-offset", ."guest-length"]]' report.json
}

for options in cluster_size=64k cluster_size=64k,compat=0.10 cluster_size=64k,extended_l2=on; do
  make_image back.qcow2 2M
  io back.qcow2 'write -P 7 0 2M'
  make_image d.qcow2 4M -o $options -b back.qcow2 -F qcow2
  io d.qcow2 'write -P 1 64k 64k' 'write -P 2 1M 1M'
  qemu-img snapshot -c s d.qcow2
  io d.qcow2 'write -P 3 0 64k' 'write -P 4 3M 1M'
  rm back.qcow2
  # What is left, by QEMU: as if nothing were behind it.
  cp d.qcow2 alone.qcow2
  qemu-img rebase -u -b '' alone.qcow2
  guest_raw alone.qcow2 want.raw
  patch d.qcow2 all-refcounts 1 + rt-zero
  rm -f o.qcow2
  before=$(sha256 d.qcow2)

  ok "$options: needs to be told" not serve d.qcow2 repair=all overlay=o.qcow2
  ok "$options: heals without it" serve d.qcow2 repair=all overlay=o.qcow2 backing=none \
    report=report.json --run "$copy_out; cmp out.raw want.raw"
  is "$options: lists what it held" "$(ranges '')" '[[131072,917504],[2097152,1048576]]'
  is "$options: in the snapshot, too" "$(ranges s)" '[[0,65536],[131072,917504],[2097152,2097152]]'
  is "$options: says why" "$(jq -r '[.lost.ranges[].why] | unique | join(",")' report.json)" \
    "backing-file-missing"
  ok "$options: lost=error fails there alone" serve d.qcow2 overlay=o.qcow2 backing=none lost=error --run \
    'qemu-io -f raw -r -c "read -P 3 0 64k" -c "read -P 1 64k 64k" -c "read -P 2 1M 1M" -c "read -P 4 3M 1M" "$uri" &&
     ! qemu-io -f raw -r -c "read 128k 512" "$uri" && ! qemu-io -f raw -r -c "read 3145216 1k" "$uri"'
  is "$options: the original is as it was" "$(sha256 d.qcow2)" "$before"
  healed_file o.qcow2 healed.qcow2
  qemu-img rebase -u -b '' -f qcow2 healed.qcow2
  ok "$options: QEMU finds the healed image clean" img_check_clean -f qcow2 healed.qcow2
  ok "$options: and reads the same" eval 'guest_raw healed.qcow2 n.raw && cmp n.raw want.raw'
done

done_testing
