#!/bin/bash
# A far export with no free cluster, which cannot grow: repaired in place, killed at each change
# to its journal and to the export; and an overlay of the guest's, written into it.
. "$(dirname "$0")/../lib.sh"
. "$tests_dir/far.sh"
require_uri
require_killat

export XDG_STATE_HOME=$tmp/state
make_image none.qcow2 4M -o cluster_size=4k,preallocation=full
qemu-io -f qcow2 -c 'write -P 2 0 3M' none.qcow2 >/dev/null
truncate -s "$(qemu-img check --output=json none.qcow2 | jq '."image-end-offset"')" none.qcow2
guest_raw none.qcow2 want.raw
cp want.raw old.raw
is "every cluster is used" "$(patch none.qcow2 free | wc -l)" "$(patch none.qcow2 structure)"
patch none.qcow2 rt-zero

cp none.qcow2 a.qcow2
far_qemu a.qcow2 --writable || exit 1
uri=nbd+unix:///?socket=$far_sock
image=uri=$uri
restore () { rm -rf state; dd if=none.qcow2 of=a.qcow2 bs=1M conv=notrunc status=none; }

size=$(stat -c %s a.qcow2)
ok "repaired in place" serve "$image" inplace=true report=report.json --run 'nbdcopy "$uri" out.raw'
ok "guest bytes" cmp out.raw want.raw
ok "QEMU finds it clean" img_check_clean -f qcow2 "$uri"
is "its size" "$(stat -c %s a.qcow2)" "$size"
is "the journal was in the state folder" "$(jq -r '.committed.journal | sub ("/[^/]*$"; "")' report.json)" "$tmp/state/qcow2repair"
is "and is gone" "$(ls state/qcow2repair)" ""

[ -n "$SOAK" ] || sweep_step=2
sweep "an export" restore inplace=true

# The overlay that takes the guest's writes names the export, as QEMU understands it.
restore
serve "$image" overlay=my.overlay --run 'qemu-io -f raw -c "write -P 9 0 300k" -c "write -z 1M 512k" "$uri"' >/dev/null
is "the overlay's backing file is the URI" "$(qemu-img info --output=json my.overlay | jq -r '."full-backing-filename"')" "$uri"
is "nobody else may read it" "$(stat -c %a my.overlay)" 600
cp my.overlay my
laid () { restore; cp my my.overlay; }
serve "$image" overlay=my.overlay --run 'nbdcopy "$uri" want.raw'
[ -n "$SOAK" ] || sweep_step=3
sweep "an overlay over an export" laid inplace=true overlay=my.overlay

# QEMU itself applies it, too.
laid
ok "qemu-img commit" qemu-img commit -q my.overlay
ok "QEMU finds that clean" img_check_clean -f qcow2 "$uri"
ok "and the guest's bytes in it" eval 'guest_raw "$uri" n.raw; cmp n.raw want.raw'

# A read-only export is refused, and nothing is left of the attempt.
far_stop
restore
far_qemu a.qcow2 || exit 1
ok "a read-only export is refused" not serve "$image" inplace=true --run true
ok "and it says why" grep -q 'read-only' err.log
is "and left no journal" "$(ls -A state/qcow2repair 2>/dev/null)" ""

done_testing
