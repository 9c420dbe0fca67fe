#!/bin/bash
# The overlay is an ordinary qcow2 file: QEMU shows what it changes, and commits
# it onto the image, which is then clean and has the right bytes.  The export
# healed.qcow2 has the same bytes, and so has the image after inplace=true.
. "$(dirname "$0")/../lib.sh"
require_nbd_ops

final=
committed ()    # NAME [ARG...]: d.qcow2 damaged, d.raw the bytes that the guest must see
{
  local name=$1
  shift

  rm -f o.qcow2
  cp d.raw model.raw
  ok "$name: healed and written to" serve d.qcow2 overlay=o.qcow2 "$@" \
    --run "'$BUILD/tests/nbd-ops' model \"\$uri\" model.raw $SEED 500"
  qemu-img info --output=json o.qcow2 >info.json
  is "$name: the overlay's backing file" "$(realpath "$(jq -r '."full-backing-filename"' info.json)")" "$tmp/d.qcow2"
  is "$name: its format is raw" "$(jq -r '."backing-filename-format"' info.json)" raw
  ok "$name: qemu-img map shows what changed" eval \
    'qemu-img map --output=json o.qcow2 | jq -e "[.[] | select(.depth == 0)] | length > 0"'
  # Commit onto a copy of the source.
  cp d.qcow2 copy.qcow2
  cp o.qcow2 oc.qcow2
  qemu-img rebase -u -f qcow2 -F raw -b "$tmp/copy.qcow2" oc.qcow2
  ok "$name: qemu-img commit" qemu-img commit -q -f qcow2 oc.qcow2
  ok "$name: the committed image is clean" img_check_clean -f qcow2 copy.qcow2
  ok "$name: and has the right bytes" eval 'guest_raw copy.qcow2 n.raw && cmp n.raw model.raw'
  healed_file o.qcow2 healed.bin
  ok "$name: and is the healed file, to the byte" cmp healed.bin copy.qcow2
  ok "$name: healed.qcow2 is fetched" serve d.qcow2 overlay=o.qcow2 "$@" \
    --run 'nbdcopy "nbd+unix:///healed.qcow2?socket=$unixsocket" fetched.qcow2'
  ok "$name: and is that file, too" cmp healed.bin fetched.qcow2
  ok "$name: inplace=true applies the overlay" serve d.qcow2 overlay=o.qcow2 inplace=true "$@" $final
  ok "$name: and makes the same of the image" eval 'cmp healed.bin d.qcow2 && [ ! -e o.qcow2 ]'
}

make_image d.qcow2 32M
age_image d.qcow2 32768 "$SEED" 80
guest_raw d.qcow2 d.raw
patch d.qcow2 rt-zero
committed "table lost"

# The file has to grow: its length is right after the commit too.
patch d.qcow2 dense 12 4 3000
truncate -s $((3000 * 4096 - 1000)) d.qcow2
patch d.qcow2 guest d.raw
committed "grown"

make_image d.qcow2 16M -o cluster_size=512
age_image d.qcow2 16384 "$SEED" 50
qemu-img snapshot -c kept d.qcow2
guest_raw d.qcow2 d.raw
patch d.qcow2 rt-random 3
committed "512-byte clusters, a snapshot"
ok "the snapshot is still there" eval 'qemu-img convert -l snapshot.name=kept -O raw copy.qcow2 k.raw && cmp k.raw d.raw'

# Level all: guest clusters and a whole table of them are lost.
make_image d.qcow2 8M -o cluster_size=4k
qemu-io -f qcow2 -c 'write -P 1 0 5M' d.qcow2 >/dev/null
guest_raw d.qcow2 d.raw
patch d.qcow2 l2 3 0x8000400000000000 + l2 9 0x8000000000001234 + l1 1 0x8000400000000000
dd if=/dev/zero of=d.raw bs=4096 seek=3 count=1 conv=notrunc status=none
dd if=/dev/zero of=d.raw bs=4096 seek=9 count=1 conv=notrunc status=none
dd if=/dev/zero of=d.raw bs=1M seek=2 count=2 conv=notrunc status=none
final=discard-orphans=true      # the lost table's
committed "entries that cannot be right" repair=all

done_testing
