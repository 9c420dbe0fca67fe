#!/bin/bash
# An L1 entry that leads nowhere loses its own guest range and no other: it reads as zeros,
# also where a backing file has older bytes, and in a snapshot that was larger than the disk is.
. "$(dirname "$0")/../lib.sh"

copied=$((1 << 63))
outside=$((copied | 1 << 40))

# zeroed RAW OFFSET LENGTH: what is left of a disk that has lost that range.
zeroed ()
{
  dd if=/dev/zero of="$1" bs=512 seek=$(($2 / 512)) count=$(($3 / 512)) conv=notrunc status=none
}

# loses_entry NAME I ARG...: entry I of d.qcow2 leads outside; sound.raw is its disk.
loses_entry ()
{
  local name=$1 i=$2 before len
  shift 2

  len=$(($(patch d.qcow2 get cluster_bits) * 2 - 3))
  len=$((1 << len))
  cp sound.raw want.raw
  zeroed want.raw $((i * len)) $len
  patch d.qcow2 l1 "$i" "$outside"
  before=$(sha256 d.qcow2)
  rm -f d.overlay
  ok "$name: heals and serves" \
    serve d.qcow2 repair=all overlay=d.overlay report=report.json "$@" --run "$copy_out" || return
  ok "$name: that range is lost and no other" cmp out.raw want.raw
  ok "$name: QEMU finds it clean" nested_qemu_img_check d.overlay
  ok "$name: the report names T03" report_has T03
  is "$name: the source is as it was" "$(sha256 d.qcow2)" "$before"
}

patch base.raw bytes 5 $((4 << 20))

# cluster size, version, size of the disk: at least three tables
for geometry in '512 2 256K' '512 3 256K' '4096 2 4M' '4096 3 4M'; do
  read -r cs compat size <<<"$geometry"
  opts=cluster_size=$cs,compat=$([ "$compat" = 2 ] && echo 0.10 || echo 1.1)
  bytes=$(numfmt --from=iec "$size")
  third=$((bytes / 4 * 2))

  qemu-img create -q -f qcow2 -o "$opts" d.qcow2 "$size"
  qemu-io -f qcow2 -c "write -q -P 1 0 8k" -c "write -q -P 2 $third 8k" d.qcow2 >/dev/null
  guest_raw d.qcow2 sound.raw
  loses_entry "clusters of $cs, version $compat" $((third / (cs * cs / 8)))

  head -c "$bytes" base.raw >b.raw
  qemu-img create -q -f qcow2 -o "$opts" -b b.raw -F raw d.qcow2 "$size"
  qemu-io -f qcow2 -c "write -q -P 1 0 8k" -c "write -q -P 2 $third 8k" d.qcow2 >/dev/null
  guest_raw d.qcow2 sound.raw
  loses_entry "clusters of $cs, version $compat, a backing file" $((third / (cs * cs / 8))) \
    backing=follow
done

# In RAM there is room for as many zeros as the lost range is long.
truncate -s 1G big.raw
qemu-io -f raw -c 'write -q -P 187 0 64k' big.raw >/dev/null
qemu-img create -q -f qcow2 -o compat=0.10 -b big.raw -F raw d.qcow2 1G
patch d.qcow2 l1 0 "$outside"
ok "in RAM, version 2, a long lost range: served" \
  serve d.qcow2 repair=all backing=follow --run 'qemu-io -r -f raw -c "read -P 0 0 1M" "$uri" >io.log'
ok "in RAM, version 2, a long lost range: reads as zeros" not grep -q failed io.log

# A snapshot of 4 MiB, and a disk that says 2 MiB: the snapshot's own size counts.
qemu-img create -q -f qcow2 -o cluster_size=4096 -b base.raw -F raw d.qcow2 4M
qemu-io -f qcow2 -c 'write -q -P 1 0 8k' -c 'write -q -P 2 2M 8k' d.qcow2 >/dev/null
qemu-img snapshot -c one d.qcow2
qemu-img convert -f qcow2 -l snapshot.name=one -O raw d.qcow2 want.raw
zeroed want.raw $((2 << 20)) $((2 << 20))
patch d.qcow2 set size=$((2 << 20))
table=$(patch d.qcow2 get snapshots_offset)
l1=$((0x$(dd if=d.qcow2 bs=1 skip="$table" count=8 status=none | od -An -tx1 | tr -d " \n")))
patch d.qcow2 write $((l1 + 8)) "$(printf %016x "$outside")"
rm -f d.overlay
ok "a larger snapshot: heals and serves" \
  serve d.qcow2 repair=all overlay=d.overlay snapshot=one backing=follow --run "$copy_out"
ok "a larger snapshot: its end reads as zeros" cmp out.raw want.raw
ok "a larger snapshot: QEMU finds it clean" nested_qemu_img_check d.overlay

done_testing
