#!/bin/bash
# A running VM's image is refused, and QEMU refuses ours; force-share reads anyway.
. "$(dirname "$0")/../lib.sh"
require qemu-nbd

make_image a.qcow2 16M
io a.qcow2 'write -P 1 0 1M'
make_image d.qcow2 16M
io d.qcow2 'write -P 2 0 1M'
patch d.qcow2 rt-zero

ok "QEMU has it open for writing" qemu_serves a.qcow2
ok "in use: refused" not serve a.qcow2
matches "in use: says so" err.log 'in use|lock|another (program|process)|used by'
ok "in use: refused with an overlay" not serve a.qcow2 overlay=ao.qcow2
ok "in use: no overlay was made" test ! -e ao.qcow2
ok "force-share: reads" serve a.qcow2 force-share=true --run 'qemu-io -r -f raw -c "read -P 1 0 1M" "$uri"'
ok "force-share: read-only" serve a.qcow2 force-share=true --run 'nbdinfo --is read-only "$uri"'
ok "force-share: QEMU goes on" qemu-io -f raw -c 'write -P 3 2M 64k' "nbd+unix:///?socket=$tmp/q.sock"
qemu_stops
ok "free again: served" serve a.qcow2

ok "we have a sound image open" server_start s a.qcow2
ok "ours: qemu-img check is refused" not qemu-img check a.qcow2
ok "ours: qemu-img info is refused" not qemu-img info a.qcow2
ok "ours: qemu-io is refused" not qemu-io -f qcow2 -c 'write 0 64k' a.qcow2
ok "ours: qemu-nbd is refused" not qemu_serves a.qcow2
ok "ours: a second of us is refused" not serve a.qcow2
ok "ours: with -U it can be looked at" qemu-img info -U a.qcow2
server_stop
ok "ours: free again" img_check_clean -f qcow2 a.qcow2

ok "we have a damaged image open, with an overlay" server_start s d.qcow2 overlay=o.qcow2
ok "source: no one may write to it" not qemu-io -f raw -c 'write 0 64k' d.qcow2
ok "source: others may read it" qemu-img convert -f qcow2 -O raw d.qcow2 n.raw
ok "overlay: qemu-img is refused" not qemu-img check -f qcow2 o.qcow2
ok "overlay: a second of us is refused" not serve d.qcow2 overlay=o.qcow2
matches "overlay: says so" err.log 'in use|lock|another (program|process)|used by'
server_stop
ok "overlay: free again" nested_qemu_img_check o.qcow2

ok "we have a damaged image open, in memory" server_start s d.qcow2
ok "in memory: a second of us may read, too" serve d.qcow2
ok "in memory: no one may write to it" not qemu-io -f raw -c 'write 0 64k' d.qcow2
server_stop KILL
ok "killed: nothing stays locked" qemu-io -f raw -c 'read 0 64k' d.qcow2

ok "QEMU reads it only" qemu_serves -r a.qcow2
ok "read elsewhere: served with an overlay" serve a.qcow2 overlay=ao.qcow2
qemu_stops

done_testing
