#!/bin/bash
# Compressed clusters are read, overwritten without harm to their neighbours in the
# same host cluster, counted right, and a deep check names the broken ones.
. "$(dirname "$0")/../lib.sh"
require_nbd_ops

python3 "$tests_dir/mkimage/matrix.py" bytes "$SEED" $((7 * 1024 * 1024 + 5 * 512)) disk.raw

for kind in zlib,4k zstd,4k zlib,64k zstd,64k zlib,2M zstd,512; do
  rm -f a.qcow2
  qemu-img convert -c -f raw -O qcow2 -o "compression_type=${kind%,*},cluster_size=${kind#*,}" disk.raw a.qcow2
  cp a.qcow2 d.qcow2
  cp disk.raw model.raw
  ok "$kind: read" eval 'serve a.qcow2 check=deep --run "$copy_out" && cmp out.raw disk.raw'
  ok "$kind: counted right, nothing found" eval 'not grep -E "^[A-Z][0-9]{2} " err.log'
  ok "$kind: read a second time, by four at once" serve a.qcow2 --run '
    for i in 1 2 3 4; do { nbdcopy "$uri" - | cmp - disk.raw || echo bad >bad; } & done; wait; [ ! -e bad ]'
  ok "$kind: written" serve a.qcow2 --run "'$BUILD/tests/nbd-ops' model \"\$uri\" model.raw $SEED 400 3"
  ok "$kind: no errors, no leaks" img_check_clean -f qcow2 a.qcow2
  ok "$kind: QEMU reads what was written" qemu-img compare -f qcow2 -F raw a.qcow2 model.raw
  patch d.qcow2 rt-random "$SEED"
  heals_ok "$kind: damaged" d.qcow2 disk.raw
done

# Several in one host cluster: one byte changed, the neighbours kept.
qemu-img convert -c -f raw -O qcow2 disk.raw a.qcow2
for ((i = 0; i < 100; i += 3)); do echo "write -P 77 $((i * 65536 + 1000)) 1"; done >script
ok "one byte in each third cluster" serve a.qcow2 --run 'qemu-io -f raw "$uri" <script >/dev/null'
cp disk.raw want.raw
qemu-io -f raw want.raw <script >/dev/null
ok "one byte in each third cluster: QEMU reads the rest as it was" qemu-img compare -f qcow2 -F raw a.qcow2 want.raw
ok "one byte in each third cluster: no errors, no leaks" img_check_clean -f qcow2 a.qcow2
ok "all trimmed" serve a.qcow2 --run 'qemu-io -f raw -d unmap -c "discard 0 7M" "$uri" >/dev/null'
ok "all trimmed: no errors, no leaks" img_check_clean -f qcow2 a.qcow2

# --- deep

qemu-img convert -c -f raw -O qcow2 disk.raw a.qcow2
entry=$(patch a.qcow2 l2 20)
# The offset is in the low 54 bits, for clusters of 64 KiB.
host=$((entry & ((1 << 54) - 1)))
patch a.qcow2 write $((host + 3)) "$(printf 'ff%.0s' {1..60})"
before=$(sha256 a.qcow2)
ok "broken stream: QEMU's check sees nothing" img_check_clean -f qcow2 a.qcow2
ok "broken stream: QEMU cannot read it" not qemu-io -r -f qcow2 -c "read $((20 * 65536)) 64k" a.qcow2
ok "broken stream: an ordinary check does not read it" eval 'serve a.qcow2 report=r.json && REPORT=r.json report_lacks C01'
ok "broken stream: a deep one finds it" eval 'serve a.qcow2 check=deep report=r.json && REPORT=r.json report_has C01'
is "broken stream: once, and where in the guest disk" \
  "$(jq -c '[.findings[] | select(.code == "C01")] | map([.count, ."guest-offset"])' r.json)" "[[1,$((20 * 65536))]]" ||
  jq -c '.findings' r.json
ok "broken stream: the rest is served" serve a.qcow2 check=deep --run "
  qemu-io -r -f raw -c 'read 0 1280k' -c 'read 1344k 5M' \"\$uri\" && ! qemu-io -r -f raw -c 'read 1280k 64k' \"\$uri\""
is "broken stream: changed in nothing" "$(sha256 a.qcow2)" "$before"

# The same in a snapshot only.
qemu-img convert -c -f raw -O qcow2 disk.raw a.qcow2
qemu-img snapshot -c s a.qcow2
io a.qcow2 'write -P 1 1M 1M'
patch a.qcow2 write $((host + 3)) "$(printf 'ff%.0s' {1..60})"
ok "broken in a snapshot: found" eval 'serve a.qcow2 check=deep report=r.json && REPORT=r.json report_has C01'
matches "broken in a snapshot: says so" err.log 'snapshot 0 "s", guest .0x140000'

# Bits too many in a count of sectors, so that it reaches past the end of the file, or into metadata (an L1
# table of a snapshot): the stream is whole, QEMU reads it, and so every repair keeps it.  The number is that
# of the bits that the offset has.
for kind in zlib,4k,58,T13 zstd,4k,58,T13 zlib,64k,54,T13 zstd,64k,54,T13 zstd,2M,49,T13 zlib,4k,58,T14 zstd,64k,54,T14; do
  IFS=, read -r type cs bits code <<<"$kind"
  name="$type, $cs, too many sectors, $code"
  rm -f d.qcow2 o.qcow2 b.overlay
  qemu-img convert -c -f raw -O qcow2 -o "compression_type=$type,cluster_size=$cs" disk.raw d.qcow2
  [ $code != T14 ] || qemu-img snapshot -c s d.qcow2
  last=$(($(stat -c %s disk.raw) >> $(patch d.qcow2 get cluster_bits)))
  # The last compressed one in the disk is the last in the file.
  until entry=$(patch d.qcow2 l2 $last); [ $((entry >> 62 & 1)) -eq 1 ]; do last=$((last - 1)); done
  patch d.qcow2 l2 $last $((entry | ((1 << 62) - (1 << bits))))
  cp d.qcow2 inplace.qcow2
  cp d.qcow2 broken.qcow2
  ok "$name: QEMU reads it" qemu-img compare -f qcow2 -F raw d.qcow2 disk.raw
  ok "$name: read without repair" eval 'serve d.qcow2 repair=off report=r.json --run "$copy_out" && cmp out.raw disk.raw'
  ok "$name: found" eval 'REPORT=r.json report_has $code'
  ok "$name: healed" eval 'serve d.qcow2 repair=all overlay=o.qcow2 report=r.json --run "$copy_out" && cmp out.raw disk.raw'
  is "$name: nothing was lost" "$(jq -c '[.lost.ranges, .healed."entries-cleared"]' r.json)" '[[],0]'
  ok "$name: QEMU finds no errors and no leaks in the healed image" nested_qemu_img_check o.qcow2
  ok "$name: QEMU reads what it read before" eval 'nested_convert o.qcow2 n.raw && cmp n.raw disk.raw'
  ok "$name: mended in place" serve inplace.qcow2 repair=all inplace=true
  ok "$name: in place: no errors, no leaks" img_check_clean -f qcow2 inplace.qcow2
  ok "$name: in place: QEMU reads what it read before" qemu-img compare -f qcow2 -F raw inplace.qcow2 disk.raw
  # What does not decompress is lost, as ever.
  patch broken.qcow2 write $((entry & ((1 << bits) - 1))) "$(printf 'ff%.0s' {1..40})"
  ok "$name, broken: heals" serve broken.qcow2 repair=all overlay=b.overlay report=r.json
  is "$name, broken: it is told as lost" "$(jq -c '[.lost.ranges[]."guest-offset"] | unique' r.json)" \
    "[$((last << $(patch broken.qcow2 get cluster_bits)))]"
done

# Descriptors that promise more than there is: never more than a cluster out.
qemu-img convert -c -f raw -O qcow2 disk.raw a.qcow2
patch a.qcow2 l2 20 $((entry | (255 << 54)))
ok "a descriptor of too many sectors: no harm" serve a.qcow2 check=deep --run 'qemu-io -r -f raw -c "read 0 7M" "$uri"; true'
patch a.qcow2 l2 20 "$(printf '0x%x' $(((1 << 62) | (1 << 40) | 17)))"
ok "a descriptor outside the file: found" eval 'serve a.qcow2 report=r.json && REPORT=r.json report_has T13'
ok "a descriptor outside the file: an I/O error" serve a.qcow2 --run '! qemu-io -r -f raw -c "read 1280k 64k" "$uri"'

done_testing
