#!/bin/bash
# A far side that comes back with another size is another image: EIO, never a byte of it,
# and a message with both sizes; when the old one is back, it is used again.
. "$(dirname "$0")/../lib.sh"
. "$tests_dir/far.sh"
require_uri

make_far_image a.qcow2
# Another image, with other bytes in the same places, and larger.
SEED=$((SEED + 7)) make_far_image b.qcow2
truncate -s +1M b.qcow2
far_qemu a.qcow2 || exit 1
right=$far_sock
far_sock=$tmp/other.sock
far_qemu b.qcow2 || exit 1
far_sock=$right
proxy_start || exit 1
a_size=$(stat -c %s a.qcow2)
b_size=$(stat -c %s b.qcow2)

# size_in FILE BYTES: as a number of bytes, or in the unit that people would choose.
size_in ()
{
  grep -E -q "(^|[^0-9])($2|$(($2 / 1024)) KiB|$(printf '0x%x' "$2"))([^0-9a-f]|\$)" "$1"
}

# other NAME SIZE COMMAND...: the line is told that, and then that all is as before.
other ()
{
  local name=$1 size=$2 at=3000000 lines
  shift 2

  ok "$name: starts" server_start s uri="$proxy_uri" reconnect=1 || return
  ok "$name: reads" answers "ok" "$server_uri" "read 0 65536 a.qcow2.raw"
  lines=$(lines_of s.log)
  proxy "$@"; proxy drop
  ok "$name: EIO" within 25 answers "error EIO" "$server_uri" "read $at 65536"
  ok "$name: no byte of another" right_or_eio "$server_uri" "read $((at + 1000000)) 65536 a.qcow2.raw" "read 100 65536 a.qcow2.raw"
  tail -n "+$((lines + 1))" s.log >new.log
  ok "$name: a message names the size that was" size_in new.log "$a_size"
  ok "$name: and the one that is" size_in new.log "$size"
  proxy size off; proxy backend "$right"; proxy drop
  ok "$name: the old one is back: all of it" within 25 answers "ok right=67108864 failed=0 wrong=0" \
    "$server_uri" "scan 1048576 a.qcow2.raw"
  server_stop
  is "$name: ends well" "$(cat s.exit)" 0
}

for size in $((a_size / 2 / 65536 * 65536)) $((a_size + 65536)); do
  other "size $size" $size size $size
done
other "another image" "$b_size" backend "$tmp/other.sock"

done_testing
