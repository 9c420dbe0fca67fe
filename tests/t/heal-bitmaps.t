#!/bin/bash
# A damaged bitmap, for which QEMU would not open the image, goes; the others stay.
. "$(dirname "$0")/../lib.sh"

make_image sound.qcow2 8M
io sound.qcow2 'write -P 1 0 1M'
for b in alpha beta gamma; do qemu-img bitmap --add sound.qcow2 $b; done
io sound.qcow2 'write -P 2 512k 1M'
guest_raw sound.qcow2 sound.raw
places ()      # IMAGE: where the bitmaps' directory entries, tables and first data are
{
  python3 - "$1" <<'P'
import struct, sys
b = open(sys.argv[1], "rb").read()
off = struct.unpack_from(">I", b, 100)[0]
while struct.unpack_from(">I", b, off)[0] != 0x23852875:
    off += 8 + (struct.unpack_from(">I", b, off + 4)[0] + 7) // 8 * 8
off += 8
print("ext=%d" % off)
entry = struct.unpack_from(">Q", b, off + 16)[0]
for i in range(struct.unpack_from(">I", b, off)[0]):
    table, = struct.unpack_from(">Q", b, entry)
    print("entry_%d=%d table_%d=%d data_%d=%d" % (i, entry, i, table, i, *struct.unpack_from(">Q", b, table)))
    name, extra = struct.unpack_from(">HI", b, entry + 18)
    entry = (entry + 24 + name + extra + 7) // 8 * 8
P
}
eval "$(places sound.qcow2)"

# keeps NAME "BITMAPS" CODE COMMAND...
keeps ()
{
  local name=$1 left=$2 code=$3 before
  shift 3

  cp sound.qcow2 d.qcow2
  patch d.qcow2 "$@"
  ok "$name: QEMU does not open it, or finds errors" not img_check_clean -f qcow2 d.qcow2
  rm -f d.overlay report.json
  before=$(sha256 d.qcow2)
  ok "$name: heals and serves" serve d.qcow2 repair=all overlay=d.overlay \
    report=report.json --run "$copy_out" || return
  ok "$name: guest bytes are right" cmp out.raw sound.raw
  healed_file d.overlay healed.qcow2
  ok "$name: QEMU finds it clean" img_check_clean -f qcow2 healed.qcow2
  is "$name: what is left" "$(qemu-img info -f qcow2 --output=json healed.qcow2 |
    jq -r '[."format-specific".data.bitmaps[]?.name] | join(" ")')" "$left"
  ok "$name: there can be new ones" eval 'qemu-img bitmap --add healed.qcow2 new && img_check_clean -f qcow2 healed.qcow2'
  ok "$name: the report names $code" report_has "$code"
  is "$name: the source is as it was" "$(sha256 d.qcow2)" "$before"
}

keeps "the first" "beta gamma" X02  write "$entry_0" 0000010000000000
keeps "the middle" "alpha gamma" X02  write "$entry_1" 0000000000000003
keeps "the last" "alpha beta" X02  write "$entry_2" 0000010000000000
keeps "the directory is nowhere" "" X01  write $((ext + 16)) 0000010000000000
keeps "the directory does not add up" "" X01  write $((ext + 8)) 0000000000000028
# A bitmap's table and the guest's mapping name one cluster.  The guest's entry is believed if it is
# in line with the next one, and then nothing of the disk is lost.
ok "the bitmap has data" [ "$data_0" -gt 0 ]
keeps "a bitmap on the guest's data" "beta gamma" X02 \
  write "$table_0" "$(printf %016x $(($(patch sound.qcow2 host 5) * 65536)))"
is "a bitmap on the guest's data: nothing is lost" "$(jq -r '.lost["active-bytes"] // 0' report.json)" 0

cp sound.qcow2 d.qcow2
patch d.qcow2 l2 5 $((data_0 | 1 << 63))
name="the guest's entry on a bitmap"
rm -f d.overlay report.json
ok "$name: heals and serves" serve d.qcow2 repair=all overlay=d.overlay report=report.json --run "$copy_out"
ok "$name: the report names T14" report_has T14
is "$name: its range is lost" "$(jq -c '[.lost.ranges[] | ."guest-offset", ."guest-length"]' report.json)" "[327680,65536]"
truncate -s 8M zeros
ok "$name: the rest is right" eval 'cmp -n 327680 out.raw sound.raw && cmp -i 393216 out.raw sound.raw'
ok "$name: the range is zeros" cmp -n 65536 -i 327680 out.raw zeros
healed_file d.overlay healed.qcow2
ok "$name: QEMU finds it clean" img_check_clean -f qcow2 healed.qcow2
is "$name: the bitmaps stay" "$(qemu-img info -f qcow2 --output=json healed.qcow2 |
  jq -r '[."format-specific".data.bitmaps[]?.name] | join(" ")')" "alpha beta gamma"

# Nothing is in line with the guest's entry, but the bitmap is lost for another entry.
make_image sound.qcow2 8M -o cluster_size=512
io sound.qcow2 'write -P 3 1M 512'
qemu-img bitmap --add -g 512 sound.qcow2 alpha
io sound.qcow2 'write -P 4 6M 512'
guest_raw sound.qcow2 sound.raw
eval "$(places sound.qcow2)"
keeps "a lost bitmap on the guest's data" "" X02 \
  write "$table_0" "0000000000000003$(printf %016x $(($(patch sound.qcow2 host 2048) * 512)))"
is "a lost bitmap on the guest's data: nothing is lost" "$(jq -r '.lost["active-bytes"] // 0' report.json)" 0

done_testing
