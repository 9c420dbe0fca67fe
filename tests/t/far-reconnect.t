#!/bin/bash
# A line that breaks, before, between or in the midst of replies, is made again: the guest
# reads the right bytes, and a message says so.
. "$(dirname "$0")/../lib.sh"
. "$tests_dir/far.sh"
require_uri

make_far_image a.qcow2 -o cluster_size=4k
far_qemu a.qcow2 || exit 1
proxy_start || exit 1

ok "unbroken: the start" serve uri="$proxy_uri" --run true
checked=$(proxy_number read)
diag "the check makes $checked reads"

# The check: broken at each of its first reads, and some of the later ones, but not the last,
# which it may do without: how many it makes is a matter of how they are joined.
for ((n = 0; n == 0 || n < checked * 3 / 4 && n < 40; n = n < 2 ? n + 1 : n * 2 + 1)); do
  for how in "" mid; do
    proxy reset; proxy drop-after $n requests $how
    ok "the check: after $n reads${how:+, in the midst of one}" serve uri="$proxy_uri" report=report.json --run true
    is "it was broken" "$(proxy_number drops)" 1
    ok "a message says so" named_after 0 err.log
    is "the image is as sound as ever" "$(jq -c '[.sound, .complete]' report.json)" '[true,true]'
  done
done

# A copy, broken again and again.
for how in "requests every" "requests mid every" "bytes every"; do
  n=10
  [ "$how" != "bytes every" ] || n=2500000
  ok "serving, $how $n: starts" server_start s uri="$proxy_uri" || continue
  lines=$(lines_of s.log)
  proxy reset; proxy drop-after $n $how
  ok "serving, $how $n: a copy" timeout 60 nbdcopy "$server_uri" out.raw
  ok "serving, $how $n: right" cmp out.raw a.qcow2.raw
  ok "serving, $how $n: it was broken" test "$(proxy_number drops)" -gt 1
  ok "serving, $how $n: messages say so" named_after "$lines" s.log
  ok "serving, $how $n: but not one for each request" \
    test $(($(lines_of s.log) - lines)) -le $((10 + 8 * $(proxy_number drops)))
  proxy drop-after off
  server_stop
  is "serving, $how $n: ends well" "$(cat s.exit)" 0
done

# Nobody was reading.
ok "idle: starts" server_start s uri="$proxy_uri"
proxy drop
ok "idle: read afterwards" answers "ok" "$server_uri" "read 20000000 100000 a.qcow2.raw"
# The far server itself is another one.
far_stop KILL
far_qemu a.qcow2
ok "the server was started anew: all is right" answers "ok right=67108864 failed=0 wrong=0" \
  "$server_uri" "scan 1048576 a.qcow2.raw"
ok "the messages tell why it was lost" not grep -E 'lost \((unknown error|nbd_aio_get_fd)' s.log
server_stop

done_testing
