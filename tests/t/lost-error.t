#!/bin/bash
# lost=error: reads that touch a lost range fail, others do not; what the guest writes there
# comes back; copying tools stop, and by default read zeros.
. "$(dirname "$0")/../lib.sh"

# reads OFF LEN / fails OFF LEN: with qemu-io, over NBD
try='f() { qemu-io -f raw -r -c "read -P $3 $1 $2" "$uri"; }; g() { ! qemu-io -f raw -r -c "read $1 $2" "$uri"; }'

make_image sound.qcow2 8M
io sound.qcow2 'write -P 1 0 8M'
qemu-img snapshot -c snap sound.qcow2
io sound.qcow2 'write -P 2 1M 1M'
guest_raw sound.qcow2 sound.raw
cp sound.qcow2 d.qcow2
patch d.qcow2 l2 20 0x7ffffff0000 + l2 21 0x7ffffff0000 + l2 50 0x7ffffff0000   # outside the file
before=$(sha256 d.qcow2)
cp sound.raw want.raw
for c in 20 21 50; do dd if=/dev/zero of=want.raw bs=64k seek=$c count=1 conv=notrunc status=none; done

ok "lost=zero: copies, with zeros" serve d.qcow2 repair=all overlay=z.qcow2 report=report.json \
  --run "$copy_out; cmp out.raw want.raw"
is "the report lists it" "$(jq -c '[.lost.ranges[] | select(."snapshot-name" == null) | [."guest-offset", ."guest-length"]]' report.json)" \
  '[[1310720,131072],[3276800,65536]]'
ok "QEMU finds the healed image clean" nested_qemu_img_check z.qcow2
ok "QEMU reads the same" eval 'nested_convert z.qcow2 n.raw && cmp n.raw want.raw'

for o in "" overlay=e.qcow2; do
  ok "lost=error ${o:-in memory}: fails there, and only there" serve d.qcow2 repair=all lost=error $o --run "$try
    g 1310720 512 && g 1376256 65536 && g 0 8M && g 1310208 1024 &&
    f 1245184 65536 2 && f 1441792 65536 2 && f 3276288 512 1 && f 3342336 512 1"
  matches "says which range" err.log '0x140000 to 0x15ffff of the disk are lost'
  ok "a copy fails" not serve d.qcow2 repair=all lost=error $o --run "$copy_out"
  ok "the lost range is told as data" serve d.qcow2 repair=all lost=error $o --run \
    'nbdinfo --map --json "$uri" | jq -e "all(.[]; .type == 0)"'
done
ok "in the active disk alone: the snapshot has it" serve d.qcow2 repair=all lost=error snapshot=snap \
  --run "$copy_out"
ok "what is written is there again, to the byte" serve d.qcow2 repair=all lost=error overlay=e.qcow2 --run \
  'qemu-io -f raw -c "write -P 9 1312k 1k" -c "write -z 3200k 64k" -c "read -P 9 1312k 1k" -c "read -P 0 3200k 64k" "$uri" &&
   ! qemu-io -f raw -c "read 1311k 1k" "$uri" && ! qemu-io -f raw -c "read 1313k 1k" "$uri"'
ok "a sound image is none the worse" serve sound.qcow2 lost=error --run "$copy_out; cmp out.raw sound.raw"
is "the original is as it was" "$(sha256 d.qcow2)" "$before"

# A damaged file behind a sound one.
make_image top.qcow2 8M -b d.qcow2 -F qcow2
io top.qcow2 'write -P 5 1310720 64k'
ok "behind the image: zeros" serve top.qcow2 repair=all backing=follow --run "$copy_out"
ok "behind the image: fails, but not where it is covered" \
  serve top.qcow2 repair=all backing=follow lost=error --run "$try
    f 1310720 65536 5 && g 1376256 512 && g 3276800 65536 && f 1441792 65536 2"
is "the one behind is as it was" "$(sha256 d.qcow2)" "$before"

done_testing
