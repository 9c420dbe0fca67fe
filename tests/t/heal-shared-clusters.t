#!/bin/bash
# Guest clusters that share a host cluster keep their bytes, and at level all, in an
# overlay, each gets a host cluster of its own.
. "$(dirname "$0")/../lib.sh"

# copied RAW CLUSTER_SIZE FROM TO N: what the guest sees after `share FROM TO N'.
copied ()
{
  dd if="$1" of="$1" bs="$2" skip="$3" seek="$4" count="$5" conv=notrunc status=none
}

# No two guest clusters of the healed image's active disk on one host cluster.
nothing_shared ()
{
  local n
  n=$(patch healed.bin l2-all | sed 's/^0x.0*//' | grep -v '^1*$' | sort | uniq -d | wc -l)
  [ "$n" = 0 ] || { echo "$n host clusters twice"; return 1; }
}

# splits NAME OPTION...: d.qcow2, whose guest reads as want.raw.
splits ()
{
  local name=$1 before
  shift
  rm -f o.qcow2 out.raw
  before=$(sha256 d.qcow2)
  ok "$name: heals and serves" serve d.qcow2 overlay=o.qcow2 repair=all report=report.json "$@" \
    --run "$copy_out"
  is "$name: the source is as it was" "$(sha256 d.qcow2)" "$before"
  ok "$name: guest bytes are right" cmp out.raw want.raw
  ok "$name: QEMU finds the healed image clean" nested_qemu_img_check o.qcow2
  healed_file o.qcow2 healed.bin
  ok "$name: nothing is shared any more" nothing_shared
  ok "$name: the next start finds it so" serve d.qcow2 overlay=o.qcow2 repair=all \
    report=report.json "$@" --run "$copy_out; cmp out.raw want.raw"
  ok "$name: and nothing to note" report_lacks T15 T22 R01 R04
}

for options in cluster_size=64k cluster_size=4k,compat=0.10 cluster_size=512 \
               cluster_size=4k,refcount_bits=1 cluster_size=256k,lazy_refcounts=on; do
  cs=$(sed 's/.*cluster_size=//; s/,.*//; s/k/*1024/; s/M/*1048576/' <<<"$options"); cs=$((cs))
  make_image d.qcow2 $((cs * 50 + 512)) -o "$options"
  io d.qcow2 "write -P 1 0 $((cs * 51 - cs + 512))" "write -P 2 $((cs * 2)) $cs" \
    "write -P 3 $((cs * 3)) $cs" "write -P 9 $((cs * 40)) $cs"
  guest_raw d.qcow2 want.raw
  # Two neighbours twice more, and the last cluster, which the end of the disk cuts.
  patch d.qcow2 share 2 10 2 + share 2 20 2 + share 40 50 1
  copied want.raw $cs 2 10 2
  copied want.raw $cs 2 20 2
  dd if=want.raw of=want.raw bs=512 skip=$((cs * 40 / 512)) seek=$((cs * 50 / 512)) count=1 \
    conv=notrunc status=none
  splits "$options"
done

# Subclusters that are not there stay so, also while the backing file is not.
make_image back.qcow2 4M
io back.qcow2 'write -P 7 0 4M'
for back in none back.qcow2; do
  make_image d.qcow2 4M -o extended_l2=on,cluster_size=64k -b back.qcow2 -F qcow2
  io d.qcow2 'write -P 1 64k 64k' 'write -P 2 204k 6k' 'write -z 220k 10k'
  guest_raw d.qcow2 want.raw
  patch d.qcow2 share 1 8 1 + share 3 9 2
  copied want.raw 64k 1 8 1
  copied want.raw 64k 3 9 1
  [ $back != none ] || mv back.qcow2 away.qcow2
  if [ $back = none ]; then
    ok "extended L2, backing file gone: heals" serve d.qcow2 overlay=o2.qcow2 repair=all backing=none
    mv away.qcow2 back.qcow2
    ok "extended L2: with it again, the guest reads what it did" \
      eval 'nested_convert o2.qcow2 n.raw && cmp n.raw want.raw'
    ok "extended L2: clean" nested_qemu_img_check o2.qcow2
  else
    splits "extended L2" backing=follow
  fi
done

# A snapshot's tables stay as they are.
make_image d.qcow2 4M
io d.qcow2 'write -P 1 0 2M' 'write -P 2 64k 64k'
guest_raw d.qcow2 snap.raw
qemu-img snapshot -c s d.qcow2
io d.qcow2 'write -P 3 256k 64k'        # and so a table of its own
guest_raw d.qcow2 want.raw
patch d.qcow2 share 1 30 1
copied want.raw 64k 1 30 1
splits "with a snapshot"

# Without an overlay it stays as it is, in place.
make_image d.qcow2 4M
io d.qcow2 'write -P 1 0 256k'
patch d.qcow2 share 1 3 1 + copied clear l2 1 + copied clear l2 3 + \
  refcount "$(patch d.qcow2 host 1)" 2
qemu-img check -q -r leaks d.qcow2 >/dev/null 2>&1
before=$(sha256 d.qcow2)
ok "no overlay: served" serve d.qcow2 repair=all report=report.json --run 'true'
ok "no overlay: noted" report_has T15
is "no overlay: as it was" "$(sha256 d.qcow2)" "$before"

done_testing
