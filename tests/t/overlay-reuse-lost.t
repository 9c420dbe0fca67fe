#!/bin/bash
# An overlay that is used again: nothing in the healed bytes tells what was lost, and yet the
# report of the next start lists it, but for what was written since.
. "$(dirname "$0")/../lib.sh"

ranges ()       # of the report
{
  jq -c '[.lost.ranges[] | [."guest-offset", ."guest-length"]]' report.json
}

for options in cluster_size=64k cluster_size=64k,compat=0.10; do
  rm -f o.qcow2
  make_image d.qcow2 8M -o $options
  io d.qcow2 'write -P 1 0 8M'
  guest_raw d.qcow2 want.raw
  patch d.qcow2 l2 20 0x7ffffff0000 + l2 21 0x7ffffff0000 + l2 50 0x7ffffff0000
  for c in 20 21 50; do dd if=/dev/zero of=want.raw bs=64k seek=$c count=1 conv=notrunc status=none; done
  before=$(sha256 d.qcow2)

  ok "$options: first start" serve d.qcow2 repair=all overlay=o.qcow2 report=report.json
  is "$options: lists" "$(ranges)" '[[1310720,131072],[3276800,65536]]'
  cp o.qcow2 o2.qcow2
  ok "$options: second start" serve d.qcow2 repair=all overlay=o.qcow2 report=report.json \
    --run "$copy_out; cmp out.raw want.raw"
  is "$options: lists the same" "$(ranges)" '[[1310720,131072],[3276800,65536]]'
  ok "$options: and changed nothing" cmp o.qcow2 o2.qcow2
  ok "$options: and fails there when told so" not serve d.qcow2 overlay=o.qcow2 lost=error --run "$copy_out"
  ok "$options: the guest writes" serve d.qcow2 repair=all overlay=o.qcow2 \
    --run 'qemu-io -f raw -c "write -P 7 1310720 64k" "$uri"'
  ok "$options: third start" serve d.qcow2 repair=all overlay=o.qcow2 report=report.json
  is "$options: what was written is not lost" "$(ranges)" '[[1376256,65536],[3276800,65536]]'
  dd if=/dev/zero bs=64k count=1 status=none | tr '\0' '\7' |
    dd of=want.raw bs=64k seek=20 conv=notrunc status=none
  ok "$options: clean, QEMU says" nested_qemu_img_check o.qcow2
  ok "$options: QEMU reads what it should" eval 'nested_convert o.qcow2 n.raw && cmp n.raw want.raw'
  is "$options: the original is as it was" "$(sha256 d.qcow2)" "$before"
done

done_testing
