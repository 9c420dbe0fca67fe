#!/bin/bash
# The line that the far tests break is good until told, and each fault is what it says,
# as stock clients see it.
. "$(dirname "$0")/../lib.sh"
. "$tests_dir/far.sh"

make_far_image a.qcow2
mv a.qcow2.raw a.raw
far_qemu a.raw || exit 1
ok "starts" proxy_start --tcp || exit 1
size=$(stat -c %s a.raw)

counted ()      # KEY LEAST
{
  [ "$(proxy_number "$1")" -ge "$2" ]
}

ok "nbdcopy: the same bytes" eval "nbdcopy '$proxy_uri' o.raw && cmp o.raw a.raw"
ok "they were counted" counted sent-bytes 35000000
ok "in flight at once" counted peak 9
ok "none was read twice" test -z "$(read_twice)"
ok "qemu-img: the same bytes" qemu-img compare -f raw -F raw a.raw "$proxy_uri"
proxy port
ok "TCP, too" eval "nbdcopy nbd://127.0.0.1:$proxy_answer o.raw && cmp o.raw a.raw"
ok "reset" proxy reset
is "all is answered" "$(proxy_number inflight) $(proxy_number read)" "0 0"
ok "not understood" not proxy nonsense whatever

copy_fails ()
{
  local before
  before=$(proxy_number "$1")

  ! timeout 20 nbdcopy "$proxy_uri" null: || return 1
  counted "$1" $((before + 1))
}

# What a client is told about the export.
proxy size 1048576
is "size" "$(nbdinfo --size "$proxy_uri")" 1048576
proxy size off
proxy blocksize 4096 65536 131072
is "block sizes" "$(nbdinfo --json "$proxy_uri" | jq -c '.exports[0] | [.block_size_minimum, .block_size_preferred, .block_size_maximum]')" \
  '[4096,65536,131072]'
ok "kept" answers "ok,error EINVAL,error EINVAL" "$proxy_sock" "read 4096 8192 a.raw" "read 512 4096" "read 0 131073"
is "two were not" "$(proxy_number violations)" 2
proxy blocksize off
ok "multi-conn" nbdinfo --can multi-conn "$proxy_uri"
proxy multi-conn off
ok "no multi-conn" not nbdinfo --can multi-conn "$proxy_uri"
proxy multi-conn on; proxy extents off
ok "no extents" not nbdinfo --map "$proxy_uri"
ok "simple replies: the same bytes" eval "nbdcopy '$proxy_uri' o.raw && cmp o.raw a.raw"
proxy extents on

# The line.
proxy drop-after 20 requests
ok "drop-after N requests" copy_fails drops
proxy drop-after 20 requests mid
ok "in their midst" copy_fails drops
proxy drop-after 5000000 bytes
ok "drop-after N bytes" copy_fails drops
ok "once" nbdcopy "$proxy_uri" null:
proxy refuse on
ok "refuse on" not nbdinfo --size "$proxy_uri"
proxy refuse close
ok "refuse close" not nbdinfo --size "$proxy_uri"
is "turned away" "$(proxy_number turned-away)" 1
proxy refuse off
ok "refuse off" nbdinfo --size "$proxy_uri"
proxy stall on
ok "stall" not timeout 1 nbdinfo --size "$proxy_uri"
proxy stall off; proxy stall-reads on
ok "stall-reads: nothing else" nbdinfo --size "$proxy_uri"
nbd_do "$proxy_sock" "read 0 65536 a.raw" >late &
proxy reset; proxy await read 1; proxy stall-reads off
wait $!
is "they come when released" "$(cat late)" ok

for kind in magic handle length chunk; do
  proxy nonsense $kind
  ok "nonsense: $kind" copy_fails nonsense
done
# Neither libnbd 1.14 nor QEMU 7.2 notices this one: their buffers keep what was in them.
proxy nonsense short
ok "nonsense: short" not eval "nbdcopy '$proxy_uri' o.raw && cmp o.raw a.raw"
for kind in zero past context; do
  proxy status bad $kind; proxy reset
  timeout 2 nbdinfo --map "$proxy_uri" >map 2>&1      # some of them drive it in circles
  ok "block status: $kind" counted bad-status 1
done
proxy status off

# A disk with bad sectors.
proxy error 1000 10 EIO; proxy error 1048576 1 ENOMEM
ok "errors where they are" answers "ok,error EIO,error EIO,ok,error ENOMEM" "$proxy_sock" \
  "read 0 1000 a.raw" "read 999 2" "read 0 65536" "read 1010 512 a.raw" "read 1000000 100000"
proxy error off
ok "and no longer" nbdcopy "$proxy_uri" null:

# Latency and bandwidth.
proxy reset; proxy delay 100
begin=$(date +%s%N)
ok "delay: a copy" nbdcopy --connections=1 "$proxy_uri" null:
ms=$((($(date +%s%N) - begin) / 1000000)); reads=$(proxy_number read)
diag "$reads reads in $ms ms"
ok "delay: not less than it takes" test "$ms" -ge 300
ok "delay: nor one after the other" test "$ms" -lt $((reads * 100 / 2))
proxy delay 0; proxy rate 50000000
begin=$(date +%s%N)
nbdcopy "$proxy_uri" null:
ms=$((($(date +%s%N) - begin) / 1000000))
ok "rate: 35 MB at 50 MB/s ($ms ms)" test "$ms" -ge 700
ok "rate: nor much less ($ms ms)" test "$ms" -lt 20000
proxy rate 0

# Who is there.
proxy reset; proxy max-conns 1
ok "max-conns: the first is served" answers "ok" "$proxy_sock" \
  "sh ! timeout 1 nbdinfo --size '$proxy_uri' >/dev/null 2>&1" "read 0 512 a.raw"
ok "the next when it has gone" nbdinfo --size "$proxy_uri"
is "never two" "$(proxy_number peak-open)" 1
proxy max-conns off
cp a.raw b.raw
printf x | dd of=b.raw conv=notrunc status=none
far_sock=$tmp/other.sock
far_qemu b.raw --writable || exit 1
proxy backend "$far_sock"
ok "another server" answers "ok" "$proxy_sock" "read 0 512 b.raw"
proxy readonly on
ok "read-only" answers "error EPERM,ok" "$proxy_sock" "write 0 512 1" "read 0 512 b.raw"
proxy readonly off

# A server that crashes.
proxy lose-writes on
ok "writes and flushes" answers "ok,ok,ok,ok,ok,ok" "$proxy_sock" \
  "write 65536 1000 1" "write 131072 512 1" "flush" "write 65000 1000 2" "write 131072 512 2" "write 0x300000 65536 3"
ok "what was written can be read" qemu-io -r -f raw -c "read -P 2 65000 1000" "$proxy_uri"
proxy lose-writes now
cp a.raw want.raw; printf x | dd of=want.raw conv=notrunc status=none
qemu-io -f raw -c "write -P 1 65536 1000" -c "write -P 1 131072 512" want.raw >/dev/null
ok "has what was flushed, and no more" cmp b.raw want.raw
proxy lose-writes flush
ok "crash at the flush" not nbd_do "$proxy_sock" "write 0 512 7" "flush"
proxy await crashes 2
ok "has what was flushed, and no more, again" cmp b.raw want.raw
proxy lose-writes off
ok "writable" nbdcopy a.raw "$proxy_uri"
ok "all of it" cmp a.raw b.raw
is "$(nbdinfo --size "$proxy_uri")" "$size" "$size"

done_testing
