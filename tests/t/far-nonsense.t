#!/bin/bash
# A far server that answers nonsense gets no wrong byte through, and ends nobody.
. "$(dirname "$0")/../lib.sh"
. "$tests_dir/far.sh"
require_uri

make_far_image a.qcow2
far_qemu a.qcow2 || exit 1
proxy_start || exit 1

# corrupted_reads KIND: reads whose replies are that, one and many, in places of their own.
corrupted_reads ()
{
  local kind=$1 lines

  ok "$mode, $kind: starts" server_start s uri="$proxy_uri" timeout=2 reconnect=1 || return
  lines=$(lines_of s.log)
  proxy reset; proxy nonsense "$kind"
  ok "$mode, $kind, once: right, or EIO" right_or_eio "$server_uri" "read 1000000 65536 a.qcow2.raw"
  proxy nonsense "$kind" 1000000
  ok "$mode, $kind, always: right, or EIO" within 25 right_or_eio "$server_uri" "read 12000000 1 a.qcow2.raw"
  proxy nonsense off
  ok "$mode, $kind: they were made" test "$(proxy_number nonsense)" -ge 2
  ok "$mode, $kind: a message names it" named_after "$lines" s.log
  ok "$mode, $kind: right, afterwards" answers "ok right=67108864 failed=0 wrong=0" \
    "$server_uri" "scan 4194304 a.qcow2.raw"
  server_stop
  is "$mode, $kind: ends well" "$(cat s.exit)" 0
}

# corrupted_check KIND: the first read of the check, the first two, and more than are tried again.
corrupted_check ()
{
  local n bad=0

  for n in 1 2 6; do
    proxy nonsense "$1" $n
    serve uri="$proxy_uri" timeout=2 reconnect=1 report=report.json --run 'nbdcopy "$uri" out.raw' >/dev/null 2>&1
    case $? in
      0) cmp out.raw a.qcow2.raw && jq -e .sound report.json >/dev/null || bad=$((bad + 1)) ;;
      1) named_after 0 err.log || bad=$((bad + 1)) ;;
      *) diag "$n: ended with $?"; diag_file err.log; bad=$((bad + 1)) ;;
    esac
    proxy nonsense off
  done
  is "$mode, $1, from the start: right, or refused" "$bad" 0
}

for mode in structured simple; do
  kinds="magic handle short length chunk"
  [ $mode = structured ] || { kinds="magic handle short"; proxy extents off; }
  for kind in $kinds; do
    corrupted_reads $kind
    [ $mode = simple ] || corrupted_check $kind
  done
  proxy extents on
done

# Block status is a hint: without it, all is read.  It is asked for where there are many tables.
make_far_image b.qcow2 -o cluster_size=4k
far_sock=$tmp/b.sock
far_qemu b.qcow2 && proxy backend "$far_sock"
for kind in zero past context; do
  proxy reset; proxy status bad $kind
  ok "block status, $kind: right" within 30 serve uri="$proxy_uri" report=report.json --run "$copy_out; cmp out.raw b.qcow2.raw"
  ok "block status, $kind: and sound" jq -e .sound report.json
  ok "block status, $kind: it was asked for" test "$(proxy_number bad-status)" -gt 0
  proxy status off
done

done_testing
