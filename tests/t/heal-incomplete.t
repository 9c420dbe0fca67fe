#!/bin/bash
# Where not everything could be followed, healing reuses no cluster that may be
# all that is left of a lost table, and changes no byte of the guest's.
. "$(dirname "$0")/../lib.sh"

info ()
{
  patch "$1" info | sed -n "s/^$2=//p"
}

# An L2 table is lost, and one refcount block: its new place must be free by
# the refcounts, too.
make_image lost.qcow2 16M -o cluster_size=512
io lost.qcow2 'write -P 1 0 400k'
table=$(($(patch lost.qcow2 l1 0) & 0xfffffffffffe00))
patch lost.qcow2 l1 0 0x10000000000 + rt-entry 2 0
ok "a lost block beside a lost L2 table: served" serve lost.qcow2 overlay=o report=r.json
is "the block is replaced" "$(jq '.healed["blocks-replaced"]' r.json)" 1
healed_file o healed.bin
ok "the lost L2 table is still there" cmp -i "$table" -n 512 lost.qcow2 healed.bin

# The refcounts that nothing explains any more stay: they may be the lost table's.
is "leaks are kept" "$(jq '.leaks >= 64' r.json)" true
cp lost.qcow2 kept.qcow2
patch kept.qcow2 refcount 3 0           # and one that is too low is raised
rm -f o
ok "values beside a lost L2 table: served" serve kept.qcow2 overlay=o report=r.json
is "no refcount was lowered" "$(jq '.healed["refcounts-lowered"]' r.json)" 0

# The same, and the whole refcount table is lost: what is built anew goes past the
# end, since any hole may be what is left of the table.
patch lost.qcow2 set refcount_table_offset=0
rm -f o
ok "no refcount table beside a lost L2 table: served" serve lost.qcow2 overlay=o report=r.json
is "it is built anew" "$(jq '.healed.rebuilt != null' r.json)" true
healed_file o healed.bin
ok "and overwrites nothing" cmp -i 512 -n $(($(stat -c %s lost.qcow2) - 512)) lost.qcow2 healed.bin

# A guest cluster that an L1 entry names as an L2 table, full of what could be
# entries with wrong COPIED flags.
make_image both.qcow2 64M -o cluster_size=4k
python3 -c 'import sys; sys.stdout.buffer.write(bytes.fromhex("8000000000005000") * 512)' >pattern
io both.qcow2 'write -s pattern 0 4k' 'write -P 2 4M 64k'
host=$(patch both.qcow2 host 0)
patch both.qcow2 l1 5 $((host * 4096))
rm -f o
ok "guest data taken for an L2 table: served" serve both.qcow2 overlay=o --run "$copy_out"
ok "its bytes are the guest's" cmp -n 4096 out.raw pattern

# Refcounts past the end of the file, wider refcounts needed, no hole inside:
# the new structure must be put just there.
python3 - <<'P'
import struct
CS, N = 512, 2100
tables = (N + 63) // 64
l1 = (tables * 8 + 8 + CS - 1) // CS
table0, data0 = 1 + l1, 1 + l1 + tables
rt = data0 + N
end = rt + 2
b = bytearray(end * CS)
struct.pack_into(">4sIQIIQIIQQIIQQQQII", b, 0, b"QFI\xfb", 3, 0, 0, 9, (tables + 1) * 64 * CS, 0,
                 tables + 1, CS, rt * CS, 1, 0, 0, 0, 0, 0, 0, 104)
for i in range(tables):
    struct.pack_into(">Q", b, CS + 8 * i, 1 << 63 | (table0 + i) * CS)
struct.pack_into(">Q", b, CS + 8 * tables, 1 << 60 | 0x100)     # what can't be followed
for i in range(N):
    struct.pack_into(">Q", b, table0 * CS + 8 * i, 1 << 63 | (data0 + i) * CS)
for i in range(2):                                              # two references, and one bit
    struct.pack_into(">Q", b, table0 * CS + 8 * i, data0 * CS)
struct.pack_into(">Q", b, rt * CS, (rt + 1) * CS)
for ci in range(end + 20):
    b[(rt + 1) * CS + ci // 8] |= 1 << ci % 8
open("dense.qcow2", "wb").write(b)
P
rm -f o
ok "refcounts past the end: served" serve dense.qcow2 overlay=o report=r.json
is "the refcounts are wider" "$(jq '.healed.rebuilt["refcount-bits"]' r.json)" 2
is "no refcount is too low then" \
  "$(jq '[."findings-after"[] | select(.code == "R01" or .code == "R04")] | length' r.json)" 0

# An extension that nobody knows makes every check incomplete.  Refcounts past the
# end of the file keep nothing all the same, so that the guest finds room.
make_image ext.qcow2 16M
io ext.qcow2 'write -P 1 0 1M'
patch ext.qcow2 add-ext 0x12345678 68656c6c6f + rb-random 0 7
rm -f o
ok "an unknown extension and a garbled block: the guest writes" serve ext.qcow2 overlay=o report=r.json \
  --run 'qemu-io -f raw -c "write -P 2 4M 8M" -c "read -P 2 4M 8M" -c "read -P 1 0 1M" "$uri"'
is "refcounts inside the file are kept" "$(jq '.healed["leaks-kept"] > 0' r.json)" true
ok "QEMU finds no errors" img_check_leaks_at_most "json:$(nested o)"
# Orphans that are kept since an unknown feature may own them are no damage that remains.
make_image feature.qcow2 16M -o cluster_size=4k
io feature.qcow2 'write -P 1 0 4M'
patch feature.qcow2 l1 0 0x8000000000000200 + set autoclear_features=0x100
rm -f o
ok "a lost L2 table beside an unknown feature: served" serve feature.qcow2 repair=all overlay=o report=r.json
is "and may be written to" "$(jq -r .served r.json)" read-write
is "its clusters are kept" "$(jq '.healed["leaks-kept"] > 500' r.json)" true
ok "QEMU finds leaks at most" img_check_leaks_at_most "json:$(nested o)"
ok "the next start knows that nobody owns them" serve feature.qcow2 repair=all overlay=o report=r.json
ok "QEMU finds it clean" nested_qemu_img_check o

done_testing
