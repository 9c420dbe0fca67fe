#!/bin/bash
# Random guest operations over NBD have the same effect as on plain bytes, in
# place and through an overlay over a damaged image, whatever the image's kind.
. "$(dirname "$0")/../lib.sh"
require_nbd_ops

ops=1500
[ -z "$SOAK" ] || ops=40000

n=0
model ()        # NAME SIZE qemu-img options...
{
  local name=$1 size=$2 seed
  shift 2
  n=$((n + 1)) seed=$((SEED + n))

  rm -f a.qcow2 o.qcow2
  make_image a.qcow2 "$size" "$@"
  age_image a.qcow2 8192 $seed 40
  guest_raw a.qcow2 model.raw
  cp model.raw model2.raw
  cp a.qcow2 d.qcow2
  patch d.qcow2 rt-random $seed
  ok "$name: in place" serve a.qcow2 --run "'$BUILD/tests/nbd-ops' model \"\$uri\" model.raw $seed $ops 3"
  ok "$name: in place, no errors, no leaks" img_check_clean -f qcow2 a.qcow2
  ok "$name: in place, QEMU reads the same" qemu-img compare -f qcow2 -F raw a.qcow2 model.raw
  ok "$name: overlay" serve d.qcow2 overlay=o.qcow2 \
    --run "'$BUILD/tests/nbd-ops' model \"\$uri\" model2.raw $seed $ops 3"
  ok "$name: overlay, no errors, no leaks" nested_qemu_img_check o.qcow2
  ok "$name: overlay, QEMU reads the same" eval 'nested_convert o.qcow2 n.raw && cmp n.raw model2.raw'
}

model "64 KiB clusters" 32M
model "512-byte clusters" 9M -o cluster_size=512
model "4 KiB clusters, 1-bit refcounts" 20M -o cluster_size=4k,refcount_bits=1
model "2 MiB clusters" 40M -o cluster_size=2M
model "version 2" 20M -o compat=0.10
model "lazy refcounts, 64-bit" 20M -o lazy_refcounts=on,refcount_bits=64,cluster_size=1k
model "odd size" 20973568 -o cluster_size=8k

done_testing
