#!/bin/bash
# The extents that a client is told are those that QEMU knows.
. "$(dirname "$0")/../lib.sh"

# [[start, length]...] of the ranges that do not read as zeros, neighbours joined.
data_ranges='reduce (.[] | select(.zero | not)) as $e ([];
  if length > 0 and .[-1][0] + .[-1][1] == $e.start then .[-1][1] += $e.length
  else . + [[$e.start, $e.length]] end)'

same_extents () # NAME SERVE ARGS...
{
  local name=$1 theirs ours
  shift

  theirs=$(qemu-img map -U -f qcow2 --output=json "$1" | jq -c "$data_ranges")
  ok "$name: served" serve "$@" --run 'qemu-img map -f raw --output=json "$uri" >map.json'
  ours=$(jq -c "$data_ranges" map.json)
  is "$name: data where QEMU sees data" "$ours" "$theirs"
}

for options in cluster_size=512 cluster_size=4k cluster_size=64k cluster_size=2M compat=0.10; do
  make_image a.qcow2 24M -o $options
  age_image a.qcow2 24576 "$SEED" 60
  same_extents "$options" a.qcow2
done
patch a.qcow2 rt-zero
same_extents "damaged, in memory" a.qcow2
rm -f o.qcow2
same_extents "damaged, overlay" a.qcow2 overlay=o.qcow2

make_image a.qcow2 1T
io a.qcow2 'write -P 1 0 64k' 'write -P 1 512G 1M' 'write -P 1 1048575M 1M'
same_extents "1 TiB, sparse" a.qcow2
ok "holes are told as holes" jq -e '[.[] | select(.start == 65536)][0] | (.data | not) and .zero' map.json

# Reserved clusters that read as zeros are no holes, and no data either.
make_image a.qcow2 8M
io a.qcow2 'write -P 1 0 1M' 'write -z 256k 256k'
same_extents "zeros in allocated clusters" a.qcow2

done_testing
