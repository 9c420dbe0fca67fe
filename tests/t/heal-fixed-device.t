#!/bin/bash
# A device that cannot grow is healed with the room inside it, down to the old
# refcount structures' own; if even that is too little, the error says how many
# clusters are missing and nothing is written.
. "$(dirname "$0")/../lib.sh"

truncate -s 1M probe
loop_device probe || skip_all "no loop devices: $(head -n 1 losetup.log)"

device ()       # FILE: its bytes as a device, whose name does not matter
{
  loop_device "$1" || { fail "loop device"; done_testing; }
}

# Room inside: guest clusters were discarded, the device ends where the image does.
make_image room.qcow2 32M -o cluster_size=4k
qemu-io -f qcow2 -c 'write -P 1 0 32M' -d unmap -c 'discard 5M 1M' room.qcow2 >/dev/null
truncate -s %4096 room.qcow2
guest_raw room.qcow2 room.raw
patch room.qcow2 rt-zero
device room.qcow2
heals_ok "room inside" "$loop" room.raw
is "room inside: as long as the device" "$(stat -c %s healed.bin)" "$(stat -c %s room.qcow2)"

# None but the old structures' clusters.  QEMU fails here.
make_image none.qcow2 32M -o cluster_size=4k,preallocation=full
qemu-io -f qcow2 -c 'write -P 2 0 32M' none.qcow2 >/dev/null
truncate -s "$(qemu-img check --output=json none.qcow2 | jq '."image-end-offset"')" none.qcow2
guest_raw none.qcow2 none.raw
old=$(patch none.qcow2 structure)
is "every cluster is used" "$(patch none.qcow2 free | wc -l)" "$old"
patch none.qcow2 rt-zero
device none.qcow2
heals_ok "no room" "$loop" none.raw
ok "no room: no more clusters than before" test "$(patch healed.bin structure)" -le "$old"

# Really too little: every cluster is used and there never was a structure.
patch dense.qcow2 dense 12 4 5000
patch dense.qcow2 guest dense.raw
device dense.qcow2
before=$(sha256 "$loop")
ok "too little: refused" not serve "$loop" overlay=o.qcow2 report=report.json
is "too little: the device is as it was" "$(sha256 "$loop")" "$before"
ok "too little: no overlay is left behind" test ! -e o.qcow2
matches "too little: the message says how many clusters are missing" err.log '[0-9]+ (more )?clusters?'
missing=$(grep -E -i 'missing|more|short|lack' err.log | grep -E -o '[0-9]+ (more )?(free )?clusters?' |
            head -n 1 | cut -d ' ' -f 1)
diag "missing: ${missing:-?}; fewest that a structure takes: $(patch dense.qcow2 lower-bound)"
is "too little: that number is the least there is" "$missing" "$(patch dense.qcow2 lower-bound)"

# With one less than that it still fails, with exactly that it works.
if [ -n "$missing" ]; then
  loop_detach "$loop"
  cp dense.qcow2 almost.qcow2
  truncate -s $(((5000 + missing - 1) * 4096)) almost.qcow2
  device almost.qcow2
  rm -f o.qcow2
  ok "one cluster too little: refused" not serve "$loop" overlay=o.qcow2
  matches "one cluster too little: the message says so" err.log '\b1 (more )?(free )?cluster'
  cp dense.qcow2 enough.qcow2
  truncate -s $(((5000 + missing) * 4096)) enough.qcow2
  device enough.qcow2
  heals_ok "just enough" "$loop" dense.raw
fi

done_testing
