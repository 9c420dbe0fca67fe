#!/bin/bash
# A block device with no free cluster, which cannot grow: repaired in place, killed
# on the way, its journal in the state folder.
. "$(dirname "$0")/../lib.sh"
require_killat

export XDG_STATE_HOME=$tmp/state
make_image none.qcow2 4M -o cluster_size=4k,preallocation=full
qemu-io -f qcow2 -c 'write -P 2 0 3M' none.qcow2 >/dev/null
truncate -s "$(qemu-img check --output=json none.qcow2 | jq '."image-end-offset"')" none.qcow2
guest_raw none.qcow2 want.raw
cp want.raw old.raw
is "every cluster is used" "$(patch none.qcow2 free | wc -l)" "$(patch none.qcow2 structure)"
patch none.qcow2 rt-zero

cp none.qcow2 disk
loop_device disk || skip_all "no loop devices: $(head -n 1 losetup.log)"
image=$loop
restore () { rm -rf state; dd if=none.qcow2 of="$loop" bs=1M conv=notrunc status=none; }

size=$(blockdev --getsize64 "$loop")
ok "repaired in place" serve "$loop" inplace=true report=report.json --run 'nbdcopy "$uri" out.raw'
ok "guest bytes" cmp out.raw want.raw
ok "QEMU finds it clean" img_check_clean -f qcow2 "$loop"
is "its size" "$(blockdev --getsize64 "$loop")" "$size"
is "the journal was in the state folder" "$(jq -r '.committed.journal | sub ("/[^/]*$"; "")' report.json)" "$tmp/state/qcow2repair"
is "and is gone" "$(ls state/qcow2repair)" ""

[ -n "$SOAK" ] || sweep_step=2
sweep "a device" restore inplace=true
restore
laid () { restore; cp my my.overlay; }
serve "$loop" overlay=my.overlay --run 'qemu-io -f raw -c "write -P 9 0 300k" -c "write -z 1M 512k" "$uri"' >/dev/null
cp my.overlay my
serve "$loop" overlay=my.overlay --run 'nbdcopy "$uri" want.raw'
sweep "an overlay over a device" laid inplace=true overlay=my.overlay

done_testing
