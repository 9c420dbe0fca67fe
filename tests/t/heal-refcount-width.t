#!/bin/bash
# Refcounts of any width, up to the last value, are mended; where there are more
# references than the width can hold, the refcounts become wider.
. "$(dirname "$0")/../lib.sh"

for bits in 1 2 4 8 16 32 64; do
  make_image d.qcow2 8M -o cluster_size=4k,refcount_bits=$bits
  age_image d.qcow2 8192 "$SEED" 60
  guest_raw d.qcow2 d.raw
  max=$(python3 -c "print ((1 << $bits) - 1)")
  patch d.qcow2 all-refcounts "$max" + refcount 0 0
  heals_ok "$bits bits" d.qcow2 d.raw R01
done

make_image d.qcow2 8M -o cluster_size=4k,refcount_bits=64
io d.qcow2 'write -P 4 0 1M'
guest_raw d.qcow2 d.raw
patch d.qcow2 refcounts 0 20 0x8000000000000000 + refcount 3 0
heals_ok "beyond signed arithmetic" d.qcow2 d.raw R01 R02

# More references than the width can hold: guest clusters 0..3 share one host
# cluster.  Only wider refcounts can say so.
for bits in 1 2; do
  make_image d.qcow2 1M -o cluster_size=4k,refcount_bits=$bits
  io d.qcow2 'write -P 4 0 1M'
  e=$(patch d.qcow2 l2 0)
  patch d.qcow2 l2 1 "$e" + l2 2 "$e" + l2 3 "$e"
  guest_raw d.qcow2 d.raw
  heals_ok "$bits bits, 4 references" d.qcow2 d.raw R04
  ok "$bits bits, 4 references: wider afterwards" \
    test "$((1 << $(patch healed.bin get refcount_order)))" -gt "$bits"
  ok "$bits bits, 4 references: the guest writes to one of them" \
    serve d.qcow2 overlay=d.qcow2.overlay --run 'qemu-io -f raw -c "write -P 9 4k 4k" "$uri"'
  ok "$bits bits, 4 references: and to no other" eval 'nested_convert d.qcow2.overlay n.raw &&
    [ "$(cmp -l d.raw n.raw | wc -l)" = 4096 ]'
  ok "$bits bits, 4 references: no errors, no leaks" nested_qemu_img_check d.qcow2.overlay
done

# What the width can just hold is no damage once it is counted.
make_image d.qcow2 1M -o cluster_size=4k,refcount_bits=2
io d.qcow2 'write -P 4 0 1M'
e=$(patch d.qcow2 l2 0)
patch d.qcow2 l2 1 "$e" + l2 2 "$e"
guest_raw d.qcow2 d.raw
heals_ok "2 bits, 3 references" d.qcow2 d.raw R01
ok "2 bits, 3 references: not too many" report_lacks R04

done_testing
