#!/bin/bash
# Whatever the image holds, the server refuses it with a message or serves it:
# it never crashes, hangs, takes 512 MiB or changes the image, and what it calls
# sound is sound to QEMU.
. "$(dirname "$0")/../lib.sh"
require_peak

images=100
[ -z "$SOAK" ] || images=20000
limit=(-v 4096)
[ -z "$sanitized" ] || limit=()

# What a client does to a disk of unknown size that may be unreadable in places.
cat >client <<'END'
size=$(nbdinfo --size "$1") || exit 0
echo $size >size
if [ "$size" -le $((64 << 20)) ]; then
  rm -f guest.raw
  # One request after another: nbdkit 1.32 has an assertion that a client trips who
  # goes at the first error, with others under way.
  nbdcopy --synchronous "$1" guest.raw.part 2>/dev/null && mv guest.raw.part guest.raw
fi
qemu-io -r -f raw -c "read 0 512" -c "read 1M 1M" -c "read $((size / 2 / 512 * 512)) 512" "$1" >/dev/null 2>&1
qemu-io -f raw -c "write -P 3 100k 4k" -c "write -z 1M 64k" -c "discard 2M 1M" -c flush "$1" >/dev/null 2>&1
nbdinfo --map "$1" 2>/dev/null | head -n 3 >/dev/null
exit 0
END

# judge IMAGE: 0, or 1 and what is wrong.
judge ()
{
  local img=$1 r rss ms

  rm -f o.qcow2 guest.raw guest.raw.part size report.json
  cp "$img" before.bin
  timeout -k 1 20 "$BUILD/tests/peak" "${limit[@]}" peak.out "${nbdkit_env[@]}" nbdkit -U - "$PLUGIN" "$img" \
    overlay=o.qcow2 report=report.json --run 'unset LD_PRELOAD; bash client "$uri"' >out.log 2>err.log
  r=$?
  cmp -s "$img" before.bin || { echo "the image was changed"; return 1; }
  [ $r -ne 124 ] || { echo "took more than 20 s"; return 1; }
  [ $r -lt 128 ] || { echo "ended with $r"; tail -n 5 err.log; return 1; }
  ! grep -E 'Sanitizer|runtime error:|Assertion|terminated abnormally|killed by' err.log || return 1
  read -r ms rss _ <peak.out
  if [ -z "$sanitized" ] && [ "$rss" -gt $((512 << 10)) ]; then
    echo "took $rss KiB"
    return 1
  fi
  if [ $r -ne 0 ]; then
    refused=$((refused + 1))
    [ -s err.log ] || { echo "refused without a message"; return 1; }
    [ ! -e o.qcow2 ] || { echo "refused, but there is an overlay"; return 1; }
    return 0
  fi
  served=$((served + 1))
  # A disk that cannot be read at all, or without the key, is none.
  ! jq -e '.served == "no"' report.json >/dev/null || return 0
  [ -e size ] || { echo "no client could connect"; cat err.log; return 1; }
  # No opinion of its own where QEMU cannot read it either.
  if [ -e guest.raw ] && timeout 20 qemu-img convert -f qcow2 -O raw "$img" theirs.raw 2>/dev/null; then
    compared=$((compared + 1))
    # QEMU makes whole sectors of an odd size, less the last bytes.
    cmp -n $(($(cat size) / 512 * 512)) guest.raw theirs.raw || { echo "other guest bytes than QEMU's"; return 1; }
  fi
  if jq -e '.served == "read-write"' report.json >/dev/null; then
    written=$((written + 1))
    timeout 20 qemu-img check "json:$(nested o.qcow2)" >check.log 2>&1
    r=$?
    # A cluster that two entries shared, without a snapshot, and the guest wrote to one:
    # the other may not know that it is alone now, which costs it a copy.
    if [ $r -eq 2 ] && ! { report_has T15 >/dev/null && ! grep ERROR check.log | holds -v 'OFLAG_COPIED.*refcount=1'; }; then
      echo "called sound, and QEMU finds errors:"
      head -n 3 check.log
      return 1
    fi
    # A dirty bitmap is out of date after the guest wrote: its clusters are leaks then.
    [ $r -ne 3 ] || grep -q 'bitmaps are now considered inconsistent' check.log ||
      jq -e '.complete == false or .leaks > 0' report.json >/dev/null ||
      { echo "called sound, and QEMU finds leaks:"; head -n 3 check.log; return 1; }
  fi
}

refused=0 served=0 compared=0 written=0

make_image base1 6M -o cluster_size=4k
age_image base1 6144 "$SEED" 40
qemu-img snapshot -c one base1
age_image base1 6144 $((SEED + 1)) 15
qemu-img snapshot -c two base1
make_image base2 3M -o cluster_size=512
age_image base2 3072 "$SEED" 30
make_image base3 16M
age_image base3 16384 "$SEED" 20
qemu-img bitmap --add base3 b
make_image base4 8M -o compat=0.10,cluster_size=8k
age_image base4 8192 "$SEED" 20
make_image base5 8M -o cluster_size=4k,refcount_bits=1,lazy_refcounts=on
age_image base5 8192 "$SEED" 20
qemu-img convert -c -O qcow2 -o cluster_size=4k base5 base6

# What is known to upset QEMU or other programs.
case_of ()      # NAME BASE PATCH COMMAND...
{
  local name=$1
  cp "$2" m.qcow2
  shift 2
  patch m.qcow2 "$@"
  ok "$name" judge m.qcow2
}

rt=$(patch base1 get refcount_table_offset)
l1=$(patch base1 get l1_table_offset)
data=$(($(qemu-img map --output=json base1 | jq '[.[] | select(.data)][0].offset')))
hdr=$(patch base1 get header_length)

case_of "refcount table entry misaligned"    base1 rt-entry 0 $((rt + 4096 + 1536))
case_of "refcount table entry reserved bits" base1 rt-entry 0 $(($(patch base1 rt-entry 0) | 0x1ff))
case_of "refcount table misaligned"          base1 set refcount_table_offset=$((rt + 1))
case_of "refcount table absurdly long"       base1 set refcount_table_clusters=0x7fffffff
case_of "header length 0"                    base1 set header_length=0
case_of "header length absurd"               base1 set header_length=0xfffffff8
case_of "header length odd"                  base1 set header_length=107
case_of "extension absurdly long"            base1 write "$hdr" 6803f857fffffff0
case_of "extension wraps around"             base1 write "$hdr" 12345678ffffffff
case_of "extension without end"              base1 write "$hdr" 1234567800000000 + write $((hdr + 8)) 12345678000f0000
case_of "L1 table too small"                 base1 set l1_size=1
case_of "L1 table of no entries"             base1 set l1_size=0
case_of "L1 table too large"                 base1 set l1_size=5000
case_of "L1 table absurdly large"            base1 set l1_size=0xffffffff
case_of "L1 table as large as allowed"       base1 set l1_size=0x400000
case_of "L1 table outside"                   base1 set l1_table_offset=0x7ffffffffffff000
case_of "L1 table on the header"             base1 set l1_table_offset=0
case_of "L1 table on the refcount table"     base1 set l1_table_offset="$rt"
case_of "L1 entry into a data cluster"       base1 l1 0 $((data | 1 << 63))
case_of "L1 entry at the L1 table"           base1 l1 0 $((l1 | 1 << 63))
case_of "L1 entry at the header"             base1 l1 0 0x8000000000000001
case_of "all L1 entries name one L2 table"   base1 l1 1 "$(patch base1 l1 0)" + l1 2 "$(patch base1 l1 0)"
case_of "L2 entry at its own table"          base1 l2 5 "$(patch base1 l1 0)"
case_of "L2 entry at the refcount table"     base1 l2 5 $((rt | 1 << 63))
case_of "snapshot table beyond the end"      base1 set snapshots_offset=0x10000000000
case_of "snapshot table misaligned"          base1 set snapshots_offset=$((data + 512))
case_of "snapshot table on data"             base1 set snapshots_offset=$data
case_of "too many snapshots"                 base1 set nb_snapshots=0xffffffff
case_of "many snapshots"                     base1 set nb_snapshots=65536
case_of "snapshots where there are none"     base2 set nb_snapshots=3 snapshots_offset=0
case_of "disk of no bytes"                   base1 set size=0
case_of "disk of all bytes"                  base1 set size=0xffffffffffffffff
case_of "disk of 2^63 bytes"                 base1 set size=0x8000000000000000
case_of "disk of 2^63 - 512 bytes"           base1 set size=0x7ffffffffffffe00
case_of "disk of 2^60 bytes"                 base3 set size=0x1000000000000000
case_of "odd size"                           base1 set size=1234567
case_of "unknown compatible feature"         base1 set compatible_features=0x8000000000000000
case_of "unknown autoclear feature"          base1 set autoclear_features=0x8000000000000000
case_of "backing name past the header"       base1 set backing_file_offset=0x100000 backing_file_size=100
case_of "backing name absurdly long"         base1 set backing_file_offset=112 backing_file_size=0xffffffff
case_of "compressed, all at one place"       base6 l2 0 0x7fffffffffffffff + l2 1 0x7fffffffffffffff
case_of "compressed where nothing is"        base1 l2 3 0x4000000000000000
case_of "version 2 with version 3's bits"    base4 l2 3 1 + set incompatible_features=0xffffffffffffffff

# An L1 table of 65,536 entries that all name one L2 table.
make_image m.qcow2 128G -o cluster_size=4k
io m.qcow2 'write 0 2M'
e=$(patch m.qcow2 l1 0)
python3 - "$(patch m.qcow2 get l1_table_offset)" "$e" <<'END'
import struct, sys
with open("m.qcow2", "r+b") as f:
    f.seek(int(sys.argv[1]))
    f.write(struct.pack(">Q", int(sys.argv[2], 0)) * 65536)
END
cp m.qcow2 many
ok "65,536 L1 entries name one L2 table" judge m.qcow2
patch many rt-zero
ok "65,536 L1 entries name one L2 table, no refcounts" judge many

group=0 bad=0
for ((i = 1; i <= images; i++)); do
  cp base$((1 + i % 6)) m.qcow2
  patch m.qcow2 mutate $((SEED + i)) >what
  if ! judge m.qcow2 >why 2>&1; then
    bad=$((bad + 1))
    diag "seed $((SEED + i)) on base$((1 + i % 6)): $(head -n 3 why | tr '\n' ' ')"
    diag_file what
    cp m.qcow2 "bad.$i"
  fi
  if [ $((i % 25)) -eq 0 ]; then
    is "mutated images $((i - 24)) to $i" "$bad" 0
    bad=0
  fi
done
diag "$refused refused, $served served, $compared compared with QEMU's bytes, $written checked by QEMU"
ok "some were refused, some served, some compared, some written to" \
  test $refused -gt 5 -a $served -gt 5 -a $compared -gt 5 -a $written -gt 5

done_testing
