#!/bin/bash
# Killed at any moment of healing, the source is as it was and the next start
# finishes the job.
. "$(dirname "$0")/../lib.sh"

make_image d.qcow2 48M -o cluster_size=4k
age_image d.qcow2 49152 "$SEED" 100
guest_raw d.qcow2 d.raw
patch d.qcow2 rt-zero + copied flip l2 all
before=$(sha256 d.qcow2)

# The kernel kills the server (SIGXFSZ) when it writes past a file size limit:
# no moment of the overlay's growth is left out, without watching the clock.
killed=0
for kib in 16 64 128 192 256 320 384 448 512 640 768 1024; do
  rm -rf o.qcow2*
  ( ulimit -c 0 -f $kib; serve d.qcow2 overlay=o.qcow2 >/dev/null 2>&1 )
  r=$?
  [ $r -eq 0 ] && break
  killed=$((killed + 1))
  is "killed at $kib KiB: the source is as it was" "$(sha256 d.qcow2)" "$before"
  ok "killed at $kib KiB: the next start serves" serve d.qcow2 overlay=o.qcow2 --run "$copy_out"
  ok "killed at $kib KiB: guest bytes are right" cmp out.raw d.raw
  ok "killed at $kib KiB: no errors, no leaks in the healed image" \
    img_check_clean "json:$(nested o.qcow2)"
  ok "killed at $kib KiB: no errors in the overlay" img_check_leaks_at_most -f qcow2 o.qcow2
done
diag "killed $killed times"
ok "some limits did kill it" test $killed -ge 3
is "nothing is left lying about" "$(ls -d o.qcow2*)" o.qcow2

done_testing
