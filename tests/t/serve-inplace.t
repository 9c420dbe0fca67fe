#!/bin/bash
# A sound image is served read-write, in place; so is one that only has leaks,
# which are reported and left alone.
. "$(dirname "$0")/../lib.sh"
require_nbd_ops

for options in compat=0.10 cluster_size=512 cluster_size=64k cluster_size=2M \
               cluster_size=4k,refcount_bits=1 refcount_bits=64,lazy_refcounts=on; do
  make_image a.qcow2 24M -o $options
  age_image a.qcow2 24576 "$SEED" 50
  guest_raw a.qcow2 model.raw
  ok "$options: the guest works on it" serve a.qcow2 report=report.json \
    --run "'$BUILD/tests/nbd-ops' model \"\$uri\" model.raw $SEED 800 2"
  is "$options: served read-write" "$(jq -r .served report.json)" read-write
  ok "$options: no errors, no leaks" img_check_clean -f qcow2 a.qcow2
  ok "$options: QEMU reads what was written" eval 'guest_raw a.qcow2 n.raw && cmp n.raw model.raw'
done

# A snapshot's clusters are copied before they are written to.
make_image a.qcow2 16M -o cluster_size=4k
age_image a.qcow2 16384 "$SEED" 60
qemu-img snapshot -c kept a.qcow2
guest_raw a.qcow2 kept.raw
cp kept.raw model.raw
ok "snapshot: the guest works on it" serve a.qcow2 --run "'$BUILD/tests/nbd-ops' model \"\$uri\" model.raw $SEED 800"
ok "snapshot: no errors, no leaks" img_check_clean -f qcow2 a.qcow2
ok "snapshot: the disk" eval 'guest_raw a.qcow2 n.raw && cmp n.raw model.raw'
ok "snapshot: is as it was" eval 'qemu-img convert -l snapshot.name=kept -O raw a.qcow2 n.raw && cmp n.raw kept.raw'

# Leaks: what a killed writer leaves.
make_image a.qcow2 16M
io a.qcow2 'write -P 1 0 8M' 'discard 1M 1M'
patch a.qcow2 leak 5
guest_raw a.qcow2 model.raw
ok "leaks: the guest works on it" serve a.qcow2 report=report.json \
  --run "'$BUILD/tests/nbd-ops' model \"\$uri\" model.raw $SEED 200"
is "leaks: served read-write" "$(jq -r .served report.json)" read-write
ok "leaks: reported" report_has R02
is "leaks: as many as there are" "$(jq .leaks report.json)" 5
is "leaks: left alone, none added" "$(qemu-img check --output=json a.qcow2 2>/dev/null | jq .leaks)" 5
ok "leaks: QEMU reads what was written" eval 'guest_raw a.qcow2 n.raw && cmp n.raw model.raw'

# A dirty bitmap survives being read and being written to; serve-bitmaps.t looks inside.
make_image a.qcow2 8M
qemu-img bitmap --add a.qcow2 b
ok "dirty bitmap: only read" serve a.qcow2 --run 'nbdcopy "$uri" null:'
is "dirty bitmap: still valid" "$(patch a.qcow2 get autoclear_features)" 1
ok "dirty bitmap: written to" serve a.qcow2 --run 'qemu-io -f raw -c "write 0 64k" "$uri"'
is "dirty bitmap: kept" "$(patch a.qcow2 get autoclear_features)" 1
ok "dirty bitmap: QEMU does not find it in use" eval \
  'qemu-img info a.qcow2 >info && grep -q "name: b" info && ! grep -q in-use info'

# Without permission to write, it is served all the same.
make_image a.qcow2 8M
ok "nbdkit -r: read-only, unchanged" eval 'before=$(sha256 a.qcow2) &&
  serve -r a.qcow2 --run "nbdinfo --is read-only \"\$uri\" && nbdcopy \"\$uri\" null:" && [ $before = $(sha256 a.qcow2) ]'

done_testing
