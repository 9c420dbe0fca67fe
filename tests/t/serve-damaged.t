#!/bin/bash
# A damaged image without an overlay is healed in memory and served read-only, and
# the message says how to get a writable one.  repair=off serves it as it is.
. "$(dirname "$0")/../lib.sh"

make_image d.qcow2 32M
age_image d.qcow2 32768 "$SEED" 80
guest_raw d.qcow2 d.raw
patch d.qcow2 rt-zero
before=$(sha256 d.qcow2)

ok "in memory: served" serve d.qcow2 report=report.json --run "$copy_out"
ok "in memory: guest bytes are right" cmp out.raw d.raw
is "in memory: read-only" "$(jq -r .served report.json)" read-only
matches "in memory: says how to get a writable one" err.log 'overlay='
ok "in memory: NBD says read-only too" serve d.qcow2 --run 'nbdinfo --is read-only "$uri"'
ok "in memory: a write fails" serve d.qcow2 --run '! qemu-io -f raw -c "write 0 64k" "$uri"'
is "in memory: the image is as it was" "$(sha256 d.qcow2)" "$before"

ok "repair=off: served" serve d.qcow2 repair=off report=report.json --run "$copy_out"
ok "repair=off: guest bytes are right" cmp out.raw d.raw
is "repair=off: read-only" "$(jq -r .served report.json)" read-only
ok "repair=off: nothing was healed" jq -e '.healed == null' report.json
is "repair=off: the image is as it was" "$(sha256 d.qcow2)" "$before"
ok "repair=off: the findings are told" jq -e '.corruptions > 0' report.json

ok "check=false: served" serve d.qcow2 check=false --run "$copy_out"
ok "check=false: guest bytes are right" cmp out.raw d.raw
ok "check=false: read-only" serve d.qcow2 check=false --run 'nbdinfo --is read-only "$uri"'
is "check=false: the image is as it was" "$(sha256 d.qcow2)" "$before"

# Damage that this level does not mend: what can be read is served, the rest is an error.
make_image d.qcow2 8M
io d.qcow2 'write -P 1 0 8M'
guest_raw d.qcow2 d.raw
patch d.qcow2 l2 10 0x8000000000001200
before=$(sha256 d.qcow2)
ok "a bad mapping entry: served read-only" \
  serve d.qcow2 overlay=o.qcow2 report=report.json --run 'nbdinfo --is read-only "$uri"'
ok "a bad mapping entry: reported" report_has T12
ok "a bad mapping entry: the rest can be read" \
  serve d.qcow2 --run 'qemu-io -r -f raw -c "read -P 1 0 640k" -c "read -P 1 704k 7488k" "$uri"'
ok "a bad mapping entry: its own range cannot" \
  serve d.qcow2 --run '! qemu-io -r -f raw -c "read 640k 64k" "$uri"'
ok "a bad mapping entry: block status goes on past it" \
  serve d.qcow2 --run 'nbdinfo --map --totals "$uri" >map'
is "a bad mapping entry: told as data, to be found when it is read" "$(awk '{ print $1, $3 }' map)" "8388608 0"
is "a bad mapping entry: the image is as it was" "$(sha256 d.qcow2)" "$before"

# Clusters that the damaged entry may have used are not freed.
make_image d.qcow2 8M
io d.qcow2 'write -P 1 0 8M'
patch d.qcow2 l1 0 0x8000000040000000
rm -f o.qcow2
ok "a lost L2 table: served" serve d.qcow2 overlay=o.qcow2 report=report.json
ok "a lost L2 table: block status goes on" serve d.qcow2 --run 'nbdinfo --map "$uri"'
healed_file o.qcow2 healed.bin
ok "a lost L2 table: its data clusters keep their refcounts" test "$(patch healed.bin refcount 10)" = 1

done_testing
