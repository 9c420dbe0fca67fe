#!/bin/bash
# Evidence and mere leaks are told apart: what a lost entry leaves, at every level; what
# QEMU leaves when it is killed is not taken for it.
. "$(dirname "$0")/../lib.sh"

fetch ()        # EXPORT FILE
{
  echo "nbdcopy \"nbd+unix:///$1?socket=\$unixsocket\" $2"
}

# shows NAME IMAGE: fetch lost+found as lf, and its index is true
shows ()
{
  ok "$1: lost+found" serve "$2" --run "$(fetch lost+found lf) && $(fetch lost+found.json lf.json)"
  ok "$1: the index is true" python3 "$tests_dir/lost-found.py" lf.json lf "$2"
}

make_image base.qcow2 16M -o cluster_size=4k
io base.qcow2 'write -P 1 0 1M' 'write -P 2 2M 512k' 'write -P 3 2560k 4k' 'write -P 4 4M 1M'

# An L1 entry outside the file.
cp base.qcow2 a.qcow2
patch a.qcow2 l1 1 0x8000010000000000
before=$(sha256 a.qcow2)
for level in off refcounts all; do
  ok "entry outside, $level: serves, read-only" serve a.qcow2 repair=$level report=r.json \
    --run 'nbdinfo --is read-only "$uri"'
  ok "entry outside, $level: both findings" eval 'REPORT=r.json; report_has T03 O01 O02'
done
shows "entry outside" a.qcow2
is "entry outside: one table" "$(jq .tables lf.json)" 1
python3 - >want <<'END'
import sys
sys.stdout.buffer.write(b"\2" * (512 << 10) + b"\3" * 4096)
END
ok "entry outside: its region is the lost part of the disk" cmp -n $((516 << 10)) lf want
is "entry outside: the source is as it was" "$(sha256 a.qcow2)" "$before"

# An L2 table overwritten with noise: its data are leaks beside the errors.
cp base.qcow2 b.qcow2
table=$(($(patch b.qcow2 l1 0) & 0x00fffffffffffe00))
patch b.qcow2 write "$table" "$(python3 -c "import random; print(random.Random($SEED).randbytes(4096).hex())")"
ok "noise: a finding" eval 'serve b.qcow2 report=r.json && REPORT=r.json && report_has O02'
shows "noise" b.qcow2
ok "noise: the data are there" python3 -c 'import sys; sys.exit(open("lf", "rb").read().count(b"\1" * 4096) < 256)'

# Some leaks of plain data: nothing more, and served in place.
cp base.qcow2 c.qcow2
patch c.qcow2 l2 0x200 0 + l2 0x201 0 + l2 0x450 0
ok "leaks: writable" serve c.qcow2 report=r.json --run 'nbdinfo --can write "$uri"'
ok "leaks: no more than that" eval 'REPORT=r.json; report_has R02 && report_lacks O01 O02'
shows "leaks" c.qcow2

# QEMU, killed while it makes tables, copies them and frees clusters.
for round in 1 2 3 4 5 6 7 8; do
  rm -f d.qcow2
  make_image d.qcow2 64M -o cluster_size=4k
  io d.qcow2 'write -P 1 0 8M'
  qemu-img snapshot -c s d.qcow2
  age_commands 65536 $((SEED + round)) 150 >cmds
  [ $((round % 2)) = 0 ] || sed -i '20~20a flush' cmds
  { cat cmds; echo abort; } | { qemu-io -t writeback -f qcow2 d.qcow2 >/dev/null; } 2>/dev/null
  ok "killed, $round: writable" serve d.qcow2 report=r.json --run 'nbdinfo --can write "$uri"'
  ok "killed, $round: no evidence" eval 'REPORT=r.json; report_lacks O01 O02'
done

# The tables of an image that grew lie about still; they are those of refcount blocks, and once the
# last of them is lost nothing says that they are free.
for options in cluster_size=512 cluster_size=512,refcount_bits=32 cluster_size=4k,refcount_bits=64; do
  rm -f e.qcow2
  make_image e.qcow2 64M -o "$options"
  for ((i = 0; i < 64; i += 8)); do io e.qcow2 "write -P $((i + 1)) ${i}M 8M"; done
  patch e.qcow2 rt-zero
  ok "$options, refcount table lost: healed" serve e.qcow2 report=r.json --run true
  ok "$options, refcount table lost: no evidence" eval 'REPORT=r.json; report_has R16 && report_lacks O01 O02'
done

done_testing
