#!/bin/bash
# After one pass the new refcount structure takes the least possible number of
# clusters, over cluster sizes, refcount widths and aged images.
. "$(dirname "$0")/../lib.sh"

minimal ()      # CLUSTER_SIZE WIDTH SIZE_IN_KIB SEED
{
  local name="cluster size $1, $2-bit, seed $4" want fixed

  rm -f d.qcow2 o.qcow2
  make_image d.qcow2 "$3K" -o "cluster_size=$1,refcount_bits=$2"
  age_image d.qcow2 "$3" "$4" 150
  guest_raw d.qcow2 d.raw
  patch d.qcow2 rt-zero
  want=$(patch d.qcow2 lower-bound)
  ok "$name: heals and serves" serve d.qcow2 overlay=o.qcow2 --run "$copy_out" || return
  ok "$name: guest bytes are right" cmp out.raw d.raw
  ok "$name: no errors, no leaks" nested_qemu_img_check o.qcow2
  healed_file o.qcow2 healed.bin
  is "$name: fewest clusters" "$(patch healed.bin structure)" "$want"
}

seeds=$SEED
[ -z "$SOAK" ] || seeds=$(seq "$SEED" $((SEED + 40)))
for seed in $seeds; do
  for width in 1 2 4 8 16 32 64; do
    minimal 512 $width 4096 $((seed + width))
  done
  for width in 1 16 64; do
    minimal 4096 $width 16384 $((seed + width))
    minimal 65536 $width 65536 $((seed + width))
  done
  minimal 1024 64 12288 "$seed"
  minimal 2097152 1 262144 "$seed"
  minimal 2097152 64 262144 "$seed"
done

done_testing
