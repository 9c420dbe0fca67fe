#!/bin/bash
# What a far server says about the size of requests is kept, and makes no difference.
. "$(dirname "$0")/../lib.sh"
. "$tests_dir/far.sh"
require_uri

export XDG_STATE_HOME=$tmp/state
# Clusters of 512 bytes: tables lie and end at odd places.
make_far_image a.qcow2 -o cluster_size=512
make_far_image b.qcow2
patch b.qcow2 rt-zero
far_qemu a.qcow2 || exit 1
right=$far_sock
proxy_start || exit 1
far_sock=$tmp/b.sock
far_qemu b.qcow2 || exit 1

local_report () # IMAGE
{
  serve "$1" overlay=local.overlay report=local.json --run true || return 1
  rm -f local.overlay
}

same_findings ()        # LOCAL-REPORT
{
  [ "$(jq -c '[.findings, .sound, .complete, .healed]' report.json)" = \
    "$(jq -c '[.findings, .sound, .complete, .healed]' "$1")" ] || ! jq -c .findings report.json "$1"
}

copies ()       # NAME IMAGE
{
  proxy reset
  ok "$1: a copy" serve uri="$proxy_uri" report=report.json --run "$copy_out" || return
  ok "$1: right" cmp out.raw "$2.raw"
  ok "$1: the same findings" same_findings "${2%%.*}.json"
  is "$1: no violation" "$(proxy_number violations)" 0
}

ok "local" eval 'local_report a.qcow2 && mv local.json a.json && local_report b.qcow2 && mv local.json b.json'
for sizes in "512 4096 32768" "4096 4096 4096" "4096 65536 1048576" "65536 65536 33554432"; do
  proxy blocksize $sizes
  proxy backend "$right"
  copies "sound, $sizes" a.qcow2
  ok "$sizes: reads of odd places" serve uri="$proxy_uri" --run \
    "python3 -B '$tests_dir/nbdwire.py' \"\$unixsocket\" 'read 1 1 a.qcow2.raw' 'read 511 2 a.qcow2.raw' 'read 1000001 70001 a.qcow2.raw'"
  is "$sizes: no violation" "$(proxy_number violations)" 0
  read -r min _ max <<<"$sizes"
  ok "$sizes: no request breaks them" reads_keep_to "$min" "$max"
  proxy backend "$tmp/b.sock"
  copies "damaged, $sizes" b.qcow2
done

# Healed and written to in place, though each write is smaller than a block.
far_sock=$tmp/w.sock
for sizes in "4096 4096 65536" "512 4096 1048576"; do
  cp a.qcow2 w.qcow2
  patch w.qcow2 rt-zero
  truncate -s +4M w.qcow2       # room: an export does not grow
  far_qemu w.qcow2 --writable || exit 1
  proxy backend "$far_sock"; proxy blocksize $sizes; proxy reset
  ok "in place, $sizes: written" serve uri="$proxy_uri" inplace=true --run \
    'qemu-io -f raw -c "write -P 5 1000 3000" -c "write -P 6 30M 100k" -c flush "$uri"'
  is "in place, $sizes: no violation" "$(proxy_number violations)" 0
  far_stop
  # The old structure is taken for lost tables, and stays.
  ok "in place, $sizes: no errors, says QEMU" img_check_leaks_at_most -f qcow2 w.qcow2
  cp a.qcow2.raw want.raw
  qemu-io -f raw -c "write -P 5 1000 3000" -c "write -P 6 30M 100k" want.raw >/dev/null
  ok "in place, $sizes: right" eval 'guest_raw w.qcow2 n.raw && cmp n.raw want.raw'
done

done_testing
