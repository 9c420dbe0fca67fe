#!/bin/bash
# Eight connections at once see one disk, in place and through an overlay.
. "$(dirname "$0")/../lib.sh"
require_nbd_ops

make_image a.qcow2 64M
ok "multi-conn is offered" serve a.qcow2 --run 'nbdinfo --can multi-conn "$uri"'

make_image b.qcow2 64M
age_image b.qcow2 65536 "$SEED" 100
guest_raw b.qcow2 b.raw
ok "nbdcopy onto it, 8 connections" serve a.qcow2 \
  --run 'nbdcopy --connections=8 --threads=8 --requests=16 --request-size=65536 b.raw "$uri"'
ok "no errors, no leaks" img_check_clean -f qcow2 a.qcow2
ok "is the same" eval 'guest_raw a.qcow2 n.raw && cmp n.raw b.raw'
ok "nbdcopy from it, 8 connections" serve a.qcow2 \
  --run 'rm -f out.raw; nbdcopy --connections=8 --threads=8 --requests=16 "$uri" out.raw'
ok "is the same again" cmp out.raw b.raw

parallel ()     # NAME ARG...
{
  local name=$1
  shift

  rm -f state
  ok "$name: 8 threads write, zero, trim and flush" serve "$@" \
    --run "'$BUILD/tests/nbd-ops' load \"\$uri\" state $SEED 8000 8 && '$BUILD/tests/nbd-ops' verify \"\$uri\" state"
}

for options in cluster_size=512 cluster_size=64k cluster_size=2M; do
  make_image a.qcow2 64M -o $options
  parallel "$options" a.qcow2
  ok "$options: no errors, no leaks" img_check_clean -f qcow2 a.qcow2
  ok "$options: once more, all is there" serve a.qcow2 --run "'$BUILD/tests/nbd-ops' verify \"\$uri\" state"
done

make_image d.qcow2 64M
patch d.qcow2 rt-zero
parallel "overlay" d.qcow2 overlay=o.qcow2
ok "overlay: no errors, no leaks" nested_qemu_img_check o.qcow2
ok "overlay: once more, all is there" serve d.qcow2 overlay=o.qcow2 \
  --run "'$BUILD/tests/nbd-ops' verify \"\$uri\" state"

has_fio ()
{
  command -v fio >/dev/null && fio --enghelp 2>/dev/null | holds -w nbd
}

if has_fio; then
  make_image a.qcow2 64M -o cluster_size=16k
  fio='fio --name=t --ioengine=nbd --uri="$uri" --rw=randwrite --bsrange=512-32k --bs_unaligned=1
       --size=12M --iodepth=16 --numjobs=4 --offset_increment=12M --verify=crc32c --do_verify=1
       --randseed='$SEED' --output=fio.log'
  ok "fio: written and verified" serve a.qcow2 --run "${fio//$'\n'/ }"
  ok "fio: no errors, no leaks" img_check_clean -f qcow2 a.qcow2
else
  skip "fio with its nbd engine is not installed"
fi

# Clients with many large requests in flight take memory only while they are there.
rss_below ()    # MIB: soon, when nbdkit has seen that they have gone
{
  local n=0 kib

  while kib=$(awk '/VmRSS/ { print $2 }' "/proc/$server_pid/status"); [ "$kib" -ge $(($1 * 1024)) ]; do
    [ $((n += 1)) -le 600 ] || { echo "$kib KiB"; return 1; }
    sleep 0.1
  done
}
if [ -n "$sanitized" ]; then
  skip "the sanitizer has an allocator of its own"
else
  make_image a.qcow2 256M -o cluster_size=4k
  head -c 256M /dev/urandom >large.raw
  copy="nbdcopy --connections=16 --threads=16 --requests=16 --request-size=4194304"
  server_start s a.qcow2
  for n in 1 2; do
    ok "large requests: written" $copy large.raw "$server_uri"
    ok "large requests: read" $copy "$server_uri" null:
  done
  ok "large requests: their memory is given back" rss_below 56
  server_stop
  if has_fio; then
    server_start s a.qcow2
    ok "fio: many requests" fio --name=t --ioengine=nbd --uri="$server_uri" --rw=randread --bs=256k --iodepth=16 \
      --numjobs=32 --size=256M --io_size=64M
    ok "many requests: their memory is given back" rss_below 56
    server_stop
  else
    skip "fio with its nbd engine is not installed"
  fi
fi

done_testing
