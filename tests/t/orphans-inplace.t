#!/bin/bash
# A repair in place frees no orphans, and what the guest writes afterwards does not lie on
# them; discard-orphans=true frees them.  An overlay that frees them is not written
# into the image either.
. "$(dirname "$0")/../lib.sh"

fetch ()        # FILE: the regions of lost tables
{
  echo "nbdcopy \"nbd+unix:///lost+found?socket=\$unixsocket\" $1 &&
        nbdcopy \"nbd+unix:///lost+found.json?socket=\$unixsocket\" $1.json &&
        truncate -s \$(jq '[.regions[] | select(.kind == \"table\") | .length] | add' $1.json) $1"
}

make_fs_image a.qcow2 32M -o cluster_size=4k
mapped=$(patch a.qcow2 l1 0)
patch a.qcow2 l1 0 0
patch a.qcow2 refcount "$(patch a.qcow2 used | tail -n 1)" 0
cp a.qcow2 damaged.qcow2
ok "lost+found of the damaged image" serve a.qcow2 --run "$(fetch before)"
is "it has the table" "$(jq -c '[.tables, (.regions[0]."table-host-offset" | tostring)]' before.json)" \
  "[1,\"$((mapped & 0x00fffffffffffe00))\"]"

ok "in place: serves, and is filled with writes" serve a.qcow2 inplace=true report=r.json --run "
  nbdinfo --can write \"\$uri\" && qemu-io -f raw -c 'write -P 7 0 32M' \"\$uri\" >/dev/null && $(fetch meanwhile)"
ok "in place: the report says so" eval 'REPORT=r.json; report_has O01 R01'
ok "in place: no errors" img_check_leaks_at_most -f qcow2 a.qcow2
ok "in place: QEMU reads what was written" io a.qcow2 'read -P 7 0 32M'
ok "in place: the lost table is still there while it is written to" cmp before meanwhile
ok "in place: a second start changes nothing" eval '
  s=$(sha256 a.qcow2); serve a.qcow2 inplace=true && [ "$(sha256 a.qcow2)" = "$s" ]'
ok "not in place: it is not written to" serve a.qcow2 --run "nbdinfo --is read-only \"\$uri\" && $(fetch after)"
ok "and the lost table is there as it was" cmp before after

ok "discard-orphans: repairs" serve a.qcow2 inplace=true discard-orphans=true
ok "discard-orphans: no errors, no leaks" img_check_clean -f qcow2 a.qcow2
ok "discard-orphans: QEMU reads the same" io a.qcow2 'read -P 7 0 32M'

# An overlay made before.
cp damaged.qcow2 b.qcow2
ok "an overlay" serve b.qcow2 overlay=o.qcow2 --run 'qemu-io -f raw -c "write -P 7 0 8M" "$uri" >/dev/null'
before=$(sha256 b.qcow2)
ok "is not written into the image" not serve b.qcow2 overlay=o.qcow2 inplace=true
matches "the message says why, and what to do" err.log 'look like lost data.*discard-orphans=true'
is "the image is as it was" "$(sha256 b.qcow2)" "$before"
ok "the overlay is still good" serve b.qcow2 overlay=o.qcow2 --run 'nbdinfo --can write "$uri"'
ok "is written with discard-orphans=true" serve b.qcow2 overlay=o.qcow2 inplace=true discard-orphans=true
ok "no errors, no leaks" img_check_clean -f qcow2 b.qcow2

done_testing
