#!/bin/bash
# A limit of file sizes (ulimit -f) is "no space left on device" for the guest who wants more, in
# place, through an overlay and in a data file.  The server stays, and all else goes on.
. "$(dirname "$0")/../lib.sh"

limited ()      # KIB NAME ARG...: a server that may not make files longer
{
  local kib=$1 before result
  shift
  before=$(ulimit -S -f)
  ulimit -S -f "$kib"
  server_start "$@"
  result=$?
  ulimit -S -f "$before"
  return $result
}

client ()       # QEMU-IO-ARGUMENT...: into client.log
{
  qemu-io -t writeback -f raw "$@" "$server_uri" >client.log 2>&1 || true
}

goes_on ()      # NAME JUDGE SERVER-ARGUMENT...
{
  local name=$1 judge=$2
  shift 2

  ok "$name: starts" limited 4096 s "$@" || return
  client -c 'write -P 1 0 64k' -c 'write -P 2 1M 8M'
  ok "$name: no space left" grep -q 'No space left on device' client.log
  client -c 'read -P 1 0 64k' -c 'write -P 3 32k 16k' -c flush -c 'read -P 3 32k 16k' -c 'read -P 1 48k 16k'
  ok "$name: the server goes on" eval '! grep -qiE "fail|error|reset" client.log'
  server_stop TERM
  is "$name: ends well" "$(cat s.exit)" 0
  ok "$name: no errors" $judge
  ok "$name: what was written is there" serve "$@" --run \
    'qemu-io -r -f raw -c "read -P 1 0 32k" -c "read -P 3 32k 16k" "$uri" >io.log 2>&1 && ! grep -i failed io.log'
}

in_place () { img_check_clean -f qcow2 a.qcow2; }
healed ()   { nested_qemu_img_check o.qcow2; }

for options in cluster_size=64k cluster_size=512 extended_l2=on; do
  make_image a.qcow2 64M -o $options
  goes_on "in place, $options" in_place a.qcow2
done

make_image d.qcow2 64M
patch d.qcow2 rt-zero
goes_on "overlay" healed d.qcow2 overlay=o.qcow2

make_image a.qcow2 64M -o data_file=a.data
truncate -s 0 a.data
goes_on "data file" in_place a.qcow2 data-file=follow
truncate -s 64M a.data
goes_on "data file that is longer than the limit" in_place a.qcow2 data-file=follow

done_testing
