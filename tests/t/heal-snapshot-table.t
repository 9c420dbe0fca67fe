#!/bin/bash
# Of a damaged snapshot table what cannot be right goes, and every other snapshot keeps
# its name and its bytes.
. "$(dirname "$0")/../lib.sh"

make_entry_places ()    # entry_0=, entry_1=...: offsets in the file
{
  python3 - "$1" <<'P'
import struct, sys
b = open(sys.argv[1], "rb").read()
n, off = struct.unpack_from(">IQ", b, 60)
for i in range(n):
    print("entry_%d=%d" % (i, off))
    ids, name = struct.unpack_from(">HH", b, off + 12)
    off = (off + 40 + struct.unpack_from(">I", b, off + 36)[0] + ids + name + 7) // 8 * 8
P
}

# keeps NAME "SNAPSHOTS" CODE COMMAND...
keeps ()
{
  local name=$1 left=$2 code=$3 before s
  shift 3

  cp sound.qcow2 d.qcow2
  patch d.qcow2 "$@"
  rm -f d.overlay report.json
  before=$(sha256 d.qcow2)
  ok "$name: heals and serves" serve d.qcow2 repair=all overlay=d.overlay \
    report=report.json --run "$copy_out" || return
  ok "$name: guest bytes are right" cmp out.raw sound.raw
  healed_file d.overlay healed.qcow2
  ok "$name: QEMU finds it clean" img_check_clean -f qcow2 healed.qcow2
  is "$name: what is left" \
    "$(qemu-img info -f qcow2 --output=json healed.qcow2 | jq -r '[.snapshots[]?.name] | join(" ")')" "$left"
  for s in $left; do
    ok "$name: snapshot $s" eval "qemu-img convert -f qcow2 -l snapshot.name=$s -O raw healed.qcow2 n.raw && cmp n.raw $s.raw"
  done
  ok "$name: the report names $code" report_has "$code"
  is "$name: the source is as it was" "$(sha256 d.qcow2)" "$before"
}

for options in cluster_size=4k compat=0.10; do
  rm -f sound.qcow2
  make_image sound.qcow2 8M -o $options
  for s in one two three; do
    age_image sound.qcow2 8192 "$((SEED + ${#s}))" 15
    guest_raw sound.qcow2 $s.raw
    qemu-img snapshot -c $s sound.qcow2
  done
  age_image sound.qcow2 8192 "$SEED" 15
  guest_raw sound.qcow2 sound.raw
  eval "$(make_entry_places sound.qcow2)"

  keeps "$options, the L1 table of one is nowhere" "one three" S03  write $entry_1 0000010000000000
  keeps "$options, the first" "two three" S03  write $entry_0 0000000000000007
  keeps "$options, an entry that is none" "one three" S02  write $((entry_1 + 36)) ffffff00
  keeps "$options, an absurd number of them" "one two three" S05  set nb_snapshots=0x80000003
  keeps "$options, the table is nowhere" "" S01  set snapshots_offset=0x10000000000
done
done_testing
