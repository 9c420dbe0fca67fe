#!/bin/bash
# An overlay keeps repairs and guest writes, and is used again at the next start.
. "$(dirname "$0")/../lib.sh"
require_nbd_ops

make_image d.qcow2 48M
age_image d.qcow2 49152 "$SEED" 100
guest_raw d.qcow2 model.raw
patch d.qcow2 rt-zero
before=$(sha256 d.qcow2)

for round in 1 2 3; do
  ok "start $round: serves, and the guest writes" serve d.qcow2 overlay=o.qcow2 report=report.json \
    --run "'$BUILD/tests/nbd-ops' model \"\$uri\" model.raw $((SEED + round)) 400 2"
  is "start $round: served read-write" "$(jq -r .served report.json)" read-write
  ok "start $round: QEMU reads what was written" eval 'nested_convert o.qcow2 n.raw && cmp n.raw model.raw'
  ok "start $round: no errors, no leaks" nested_qemu_img_check o.qcow2
  is "start $round: the source is as it was" "$(sha256 d.qcow2)" "$before"
  [ "$round" = 1 ] || is "start $round: nothing was left to mend" "$(jq '.findings | length' report.json)" 0
done

# From another folder, and by a relative name: still the same image.
mkdir sub
ok "named from another folder" eval 'cd sub && serve ../d.qcow2 overlay=../o.qcow2 --run "$copy_out" && cmp out.raw ../model.raw'

# A sound image's writes go there too.
make_image s.qcow2 8M
io s.qcow2 'write -P 1 0 1M'
before=$(sha256 s.qcow2)
ok "sound image: writes" serve s.qcow2 overlay=so.qcow2 --run 'qemu-io -f raw -c "write -P 2 0 64k" "$uri"'
is "sound image: is as it was" "$(sha256 s.qcow2)" "$before"
ok "sound image: the write is there at the next start" \
  serve s.qcow2 overlay=so.qcow2 --run 'qemu-io -r -f raw -c "read -P 2 0 64k" -c "read -P 1 64k 960k" "$uri"'
ok "sound image: no errors, no leaks" nested_qemu_img_check so.qcow2

# Stock QEMU writes through it as well, where clusters are allocated, and we go on
# from there.  (It cannot make the overlay longer.)
ok "QEMU writes through the overlay" eval 'qemu-io -c "write -P 3 512k 256k" "json:$(nested so.qcow2)"'
ok "and what it wrote is served" \
  serve s.qcow2 overlay=so.qcow2 --run 'qemu-io -r -f raw -c "read -P 3 512k 256k" -c "read -P 2 0 64k" "$uri"'

done_testing
