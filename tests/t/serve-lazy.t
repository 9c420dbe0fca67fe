#!/bin/bash
# Lazy refcounts: refcounts may lag behind only while the dirty bit says so, the bit
# goes at a clean end, and who finds it set heals before anything else.
. "$(dirname "$0")/../lib.sh"
require_nbd_ops

dirty ()        # IMAGE: 1 or 0
{
  echo $(($(patch "$1" get incompatible_features) & 1))
}

make_image a.qcow2 32M -o lazy_refcounts=on
age_image a.qcow2 16384 "$SEED" 40
is "QEMU leaves it clean" "$(dirty a.qcow2)" 0
before=$(sha256 a.qcow2)
ok "read only: the image is as it was" eval 'serve a.qcow2 --run "$copy_out" && [ "$(sha256 a.qcow2)" = "$before" ]'

ok "server starts" server_start s a.qcow2
is "started: not dirty yet" "$(dirty a.qcow2)" 0
ok "a write that allocates, flushed" qemu-io -f raw -c 'write -P 1 20M 3M' -c flush "$server_uri"
is "written: dirty" "$(dirty a.qcow2)" 1
server_stop
is "clean end: not dirty" "$(dirty a.qcow2)" 0
ok "clean end: no errors, no leaks" img_check_clean -f qcow2 a.qcow2

guest_raw a.qcow2 m.raw
ok "random operations" serve a.qcow2 --run "'$BUILD/tests/nbd-ops' model \"\$uri\" m.raw $SEED 1500 3"
ok "random operations: no errors, no leaks" img_check_clean -f qcow2 a.qcow2
ok "random operations: QEMU reads the same" qemu-img compare -f qcow2 -F raw a.qcow2 m.raw
is "random operations: not dirty" "$(dirty a.qcow2)" 0

# --- cut off

kills=4
[ -z "$SOAK" ] || kills=60
for ((i = 1; i <= kills; i++)); do
  rm -f k.qcow2 state o.qcow2
  make_image k.qcow2 32M -o lazy_refcounts=on,cluster_size=4k
  ok "kill $i: server starts" server_start k k.qcow2 || break
  ok "kill $i: load" nbd_ops load "$server_uri" state $((SEED + i)) 200000 4 "$server_pid" $((150 * i * i))
  wait "$server_job" 2>/dev/null
  if [ "$(dirty k.qcow2)" = 0 ]; then
    ok "kill $i: not dirty, so leaks at most" img_check_leaks_at_most -f qcow2 k.qcow2
  else
    pass "kill $i: dirty"
  fi
  cp k.qcow2 q.qcow2
  before=$(sha256 k.qcow2)
  ok "kill $i: healed, served, all that was flushed is there" \
    serve k.qcow2 overlay=o.qcow2 report=report.json --run "'$BUILD/tests/nbd-ops' verify \"\$uri\" state"
  ok "kill $i: no leaks are taken for lost data" report_lacks O01 O02
  is "kill $i: writable" "$(jq -r .served report.json)" read-write
  is "kill $i: the image is as it was" "$(sha256 k.qcow2)" "$before"
  ok "kill $i: no errors, no leaks" nested_qemu_img_check o.qcow2
  ok "kill $i: QEMU heals it to the same bytes" eval '
    { qemu-img check -q -f qcow2 -r all q.qcow2 || :; } && guest_raw q.qcow2 q.raw && nested_convert o.qcow2 n.raw && cmp q.raw n.raw'
done

# --- cut off in QEMU

make_image a.qcow2 32M -o lazy_refcounts=on
age_image a.qcow2 16384 "$SEED" 40
( qemu-io -f qcow2 -c 'write -P 9 17M 5M' -c flush -c abort a.qcow2; : ) >/dev/null 2>&1
is "QEMU aborted: dirty" "$(dirty a.qcow2)" 1
guest_raw a.qcow2 want.raw
heals_ok "QEMU aborted" a.qcow2 want.raw H01
ok "QEMU aborted: without an overlay, read-only" \
  serve a.qcow2 --run 'nbdinfo --is read-only "$uri"'
matches "QEMU aborted: says how to get a writable one" err.log 'overlay='

# Through an overlay the bit is the healed image's, not the source's.
make_image a.qcow2 32M -o lazy_refcounts=on
age_image a.qcow2 16384 "$SEED" 40
patch a.qcow2 rt-zero
before=$(sha256 a.qcow2)
rm -f o.qcow2
ok "overlay: server starts" server_start o a.qcow2 overlay=o.qcow2
ok "overlay: written" qemu-io -f raw -c 'write -P 1 20M 3M' -c flush "$server_uri"
server_stop KILL
wait "$server_job" 2>/dev/null
ok "overlay, killed: starts again" serve a.qcow2 overlay=o.qcow2 \
  --run 'qemu-io -f raw -c "read -P 1 20M 3M" "$uri" >io.log && ! grep failed io.log && ! nbdinfo --is read-only "$uri"'
ok "overlay, killed: no errors, no leaks" nested_qemu_img_check o.qcow2
is "overlay, killed: the image is as it was" "$(sha256 a.qcow2)" "$before"

done_testing
