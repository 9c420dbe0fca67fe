#!/bin/bash
# A file that ends inside a refcount block or inside an L2 table is healed and served, at every level;
# where it cannot grow, too.
. "$(dirname "$0")/../lib.sh"

# Put what lies at host offset $2 of image $1 at its end, make the 8 bytes at offset $3 lead there, with
# the flags $4, and cut the file off 16 bytes behind the begin of it.
move_and_cut ()
{
  python3 - "$1" "$2" "$3" "$4" <<'P'
import sys
name, off, entry, flags = sys.argv[1], *(int(a, 0) for a in sys.argv[2:])
with open(name, "r+b") as f:
    size = (len(f.read()) + 65535) // 65536 * 65536
    f.seek(off)
    table = f.read(65536)
    f.seek(size)
    f.write(table)
    f.seek(entry)
    f.write((size | flags).to_bytes(8, "big"))
    f.truncate(size + 16)
P
}

make_image block.qcow2 64M
io block.qcow2 'write -P 7 0 20M'
guest_raw block.qcow2 block.raw
rt=$(patch block.qcow2 get refcount_table_offset)
move_and_cut block.qcow2 "$(patch block.qcow2 rt-entry 0)" "$rt" 0

make_image table.qcow2 64M
io table.qcow2 'write -P 7 0 64k'
guest_raw table.qcow2 table.raw
l1=$(patch table.qcow2 get l1_table_offset)
patch table.qcow2 copied flip l2 all
move_and_cut table.qcow2 $(($(patch table.qcow2 l1 0) & 0x00fffffffffffe00)) "$l1" 0

for level in refcounts all; do
  ok "cut off in a refcount block: $level heals" serve block.qcow2 repair=$level overlay=o.qcow2 --run "$copy_out"
  ok "$level: guest bytes are right" cmp out.raw block.raw
  ok "$level: QEMU finds it clean" nested_qemu_img_check o.qcow2
  rm -f o.qcow2
  ok "cut off in an L2 table: $level serves" serve table.qcow2 repair=$level overlay=o.qcow2 --run "$copy_out"
  ok "$level: what is there is right" cmp out.raw table.raw
  rm -f o.qcow2
done
done_testing
