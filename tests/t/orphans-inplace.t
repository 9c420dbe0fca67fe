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

# Level all mends the entry that lost them; what it named stays, in as many rounds as it takes.
make_image c.qcow2 16M -o cluster_size=4k
io c.qcow2 'write -P 1 0 1M' 'write -P 2 2M 512k' 'write -P 4 4M 1M'
patch c.qcow2 l1 1 0x8000010000000000
patch c.qcow2 l2 5 0x8000010000000000
ok "level all: lost+found before" serve c.qcow2 --run "$(fetch before)"
ok "level all: mended in place, and filled" serve c.qcow2 inplace=true repair=all report=r.json --run "
  nbdinfo --can write \"\$uri\" && qemu-io -f raw -c 'write -P 7 0 16M' \"\$uri\" >/dev/null"
ok "level all: the report says so" eval 'REPORT=r.json; report_has T03 T13 O01 O02'
ok "level all: no errors" img_check_leaks_at_most -f qcow2 c.qcow2
ok "level all: QEMU reads what was written" io c.qcow2 'read -P 7 0 16M'
ok "level all: the lost table is as it was" serve c.qcow2 --run "$(fetch after) && cmp before after"
ok "level all: so is the lost cluster" eval '
  serve c.qcow2 --run "nbdcopy \"nbd+unix:///lost+found?socket=\$unixsocket\" lf" &&
  python3 -c "import sys; sys.exit(open(\"lf\", \"rb\").read().count(b\"\\1\" * 4096) != 1)"'
ok "level all: started again, it stays so" eval '
  s=$(sha256 c.qcow2); serve c.qcow2 inplace=true repair=all && [ "$(sha256 c.qcow2)" = "$s" ]'

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
