#!/bin/bash
# Three internal snapshots that share clusters are all still right after healing,
# and after the guest has written to the healed disk.
. "$(dirname "$0")/../lib.sh"
require_nbd_ops

snapshot_raw ()         # SNAPSHOT, of the healed image
{
  qemu-img convert -l "snapshot.name=$1" -O raw "json:$(nested d.qcow2.overlay)" "n.$1.raw"
}

for options in cluster_size=4k cluster_size=64k,refcount_bits=8 compat=0.10; do
  make_image base.qcow2 16M -o $options
  age_image base.qcow2 16384 "$SEED" 60
  for s in one two three; do
    qemu-img snapshot -c $s base.qcow2
    guest_raw base.qcow2 $s.raw
    age_image base.qcow2 16384 "$((SEED + ${#s}))" 15
  done
  guest_raw base.qcow2 base.raw

  for damage in "rt-zero" "all-refcounts 1" "set refcount_table_offset=0 refcount_table_clusters=0"; do
    name="$options, ${damage%% *}"
    cp base.qcow2 d.qcow2
    # shellcheck disable=SC2086
    patch d.qcow2 $damage
    heals_ok "$name" d.qcow2 base.raw
    for s in one two three; do
      ok "$name: snapshot $s" eval "snapshot_raw $s && cmp n.$s.raw $s.raw"
    done
    cp base.raw model.raw
    ok "$name: guest writes" serve d.qcow2 overlay=d.qcow2.overlay \
      --run "'$BUILD/tests/nbd-ops' model \"\$uri\" model.raw $SEED 300"
    ok "$name: what it wrote" eval 'nested_convert d.qcow2.overlay n.raw && cmp n.raw model.raw'
    ok "$name: no errors and no leaks after writing" nested_qemu_img_check d.qcow2.overlay
    for s in one two three; do
      ok "$name: snapshot $s after guest writes" eval "snapshot_raw $s && cmp n.$s.raw $s.raw"
    done
  done
done

# Compressed clusters never have the COPIED flag, not even in a table that only a snapshot has.
yes | head -c 1M >some.raw
for options in cluster_size=64k cluster_size=64k,extended_l2=on; do
  qemu-img convert -q -c -O qcow2 -o $options some.raw d.qcow2
  table=$(($(patch d.qcow2 l1 0) & ~(1 << 63)))
  entry=$(patch d.qcow2 l2 3)
  step=8
  [ $options = cluster_size=64k ] || step=16
  qemu-img snapshot -c before d.qcow2
  io d.qcow2 'write -P 9 0 1M'
  guest_raw d.qcow2 base.raw
  patch d.qcow2 write $((table + 3 * step)) "$(printf %x $((entry | 1 << 63)))"
  is "$options, a compressed cluster of a snapshot: QEMU finds one corruption" \
    "$(qemu-img check --output=json d.qcow2 2>/dev/null | jq .corruptions)" 1
  heals_ok "$options, a compressed cluster of a snapshot" d.qcow2 base.raw T22
  ok "$options, a compressed cluster of a snapshot: its bytes" \
    eval 'snapshot_raw before && cmp n.before.raw some.raw'
done

done_testing
