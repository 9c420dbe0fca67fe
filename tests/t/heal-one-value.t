#!/bin/bash
# One wrong value in a sound refcount block is set, and nothing else changes.
. "$(dirname "$0")/../lib.sh"

only_bytes_changed ()   # COUNT: between the source and the healed file
{
  local n

  truncate -s "$(wc -c <"$1")" healed.bin
  n=$(cmp -l "$1" healed.bin | wc -l)
  [ "$n" -eq "$2" ] || { echo "$n bytes differ"; cmp -l "$1" healed.bin | head; return 1; }
}

make_image base.qcow2 64M
age_image base.qcow2 65536 "$SEED" 100
guest_raw base.qcow2 base.raw
data=$(patch base.qcow2 host "$(qemu-img map --output=json base.qcow2 |
         jq '[.[] | select(.data)][0].start / 65536')")

one_value ()            # NAME CLUSTER VALUE CODE
{
  cp base.qcow2 d.qcow2
  patch d.qcow2 refcount "$2" "$3"
  heals_ok "$1" d.qcow2 base.raw "$4"
  ok "$1: only that value was changed" only_bytes_changed d.qcow2 1
}

one_value "a data cluster with refcount 0" "$data" 0 R01
one_value "a data cluster with refcount 2" "$data" 2 R02
one_value "the header with refcount 0" 0 0 R01
one_value "a refcount block with refcount 0" "$(($(patch base.qcow2 rt-entry 0) / 65536))" 0 R01

# The same on a device that is full to the last cluster: it needs no space.
rm -f full.qcow2
make_image full.qcow2 32M -o preallocation=full
qemu-io -f qcow2 -c 'write -P 5 0 32M' full.qcow2 >/dev/null
guest_raw full.qcow2 full.raw
patch full.qcow2 refcount 9 0
if loop_device full.qcow2; then
  heals_ok "full device" "$loop" full.raw R01
  ok "full device: only that value was changed" only_bytes_changed "$loop" 1
else
  skip "no loop devices: $(head -n 1 losetup.log)"
fi

done_testing
