#!/bin/bash
# Header fields and extensions that cannot be right are mended, the L1 table moves if it
# must, and neither guest bytes nor the original change.
. "$(dirname "$0")/../lib.sh"

qemu-img create -q -f raw base.raw 8M
qemu-io -f raw -c 'write -q -P 9 3M 1M' base.raw
qemu-img create -q -f qcow2 -o cluster_size=64k -b base.raw -F raw backed.qcow2
qemu-io -f qcow2 -c 'write -q -P 1 0 1M' -c 'write -q -P 2 7M 1M' backed.qcow2
qemu-img bitmap --add backed.qcow2 kept
guest_raw backed.qcow2 backed.raw
make_image small.qcow2 8M -o cluster_size=512
io small.qcow2 'write -P 1 0 1M' 'write -P 2 7M 1M'
guest_raw small.qcow2 small.raw

# mends NAME IMAGE CODE COMMAND...: all bytes are there after that damage; QEMU takes the result.
mends ()
{
  local name=$1 img=$2 code=$3 before backing=
  shift 3

  cp "$img.qcow2" d.qcow2
  patch d.qcow2 "$@"
  rm -f d.overlay report.json
  before=$(sha256 d.qcow2)
  # What a damaged header says of it is not gone by; the mended one must agree.
  [ "$img" = small ] || backing=backing=raw:base.raw
  # shellcheck disable=SC2086
  ok "$name: heals and serves" \
    serve d.qcow2 repair=all $backing overlay=d.overlay report=report.json --run "$copy_out" || return
  ok "$name: guest bytes are right" cmp out.raw "${want:-$img.raw}"
  healed_file d.overlay healed.qcow2
  ok "$name: QEMU finds it clean" img_check_clean -f qcow2 healed.qcow2
  ok "$name: QEMU reads the same" eval "guest_raw healed.qcow2 n.raw && cmp n.raw '${want:-$img.raw}'"
  ok "$name: the report names $code" report_has "$code"
  is "$name: the source is as it was" "$(sha256 d.qcow2)" "$before"
}

# Where the data of extension $2 lie in image $1.
ext_off ()
{
  python3 - "$1" "$2" <<'P'
import struct, sys
b = open(sys.argv[1], "rb").read(65536)
off = struct.unpack_from(">I", b, 100)[0]
while True:
    t, n = struct.unpack_from(">II", b, off)
    if t in (0, int(sys.argv[2], 16)):
        break
    off += 8 + (n + 7) // 8 * 8
print(off + 8)
P
}

mends "header length" backed H10  set header_length=7
mends "length of the format" backed H03  write $(($(ext_off backed.qcow2 e2792aca) - 4)) 7fffffff
mends "length of the feature names" backed H03  write $(($(ext_off backed.qcow2 6803f857) - 4)) 7fffffff
mends "length of the bitmaps" backed H03  write $(($(ext_off backed.qcow2 23852875) - 4)) 7fffffff
ok "the bitmap is still there" eval 'qemu-img info -f qcow2 healed.qcow2 | holds kept'
mends "place of the backing file's name" backed H04  set backing_file_offset=0x7fffff00
ok "it is known again" eval 'qemu-img info -f qcow2 healed.qcow2 | holds "backing file: base.raw"'
mends "l1_size too small" small H06  set l1_size=3
mends "l1_size too large" small H07  set l1_size=0x7fffffff
cp small.raw larger.raw
truncate -s 32M larger.raw
want=larger.raw mends "a disk too large for its L1 table" small H06  set size=$((32 << 20))

cp small.qcow2 d.qcow2
patch d.qcow2 set size=$((1 << 40))
rm -f d.overlay
ok "a disk too large for any L1 table is refused" not serve d.qcow2 repair=all overlay=d.overlay --run true
ok "and no level is said to help" eval 'holds "no level" <err.log'

# The place of a backing file's name without a length: there is none, and nothing of it is lost.
mends "a place of a name without a length" small H04 set backing_file_offset=0x80
is "nothing is lost by that" "$(jq -r '.lost["active-bytes"] // 0' report.json)" 0
is "and it may be written to" "$(jq -r .served report.json)" read-write
mends "the name's length is lost" backed H04 set backing_file_size=0

done_testing
