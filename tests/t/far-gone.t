#!/bin/bash
# A far side that is gone for longer than reconnect= gives EIO and no hang; when it is back,
# it is used again.
. "$(dirname "$0")/../lib.sh"
. "$tests_dir/far.sh"
require_uri

make_far_image a.qcow2
far_qemu a.qcow2 || exit 1
proxy_start || exit 1

ok "starts" server_start s uri="$proxy_uri" reconnect=1 || exit 1
ok "reads" answers "ok" "$server_uri" "read 0 65536 a.qcow2.raw"
at=4000000
for how in on close; do
  lines=$(lines_of s.log)
  proxy refuse $how; proxy drop
  ok "refuse $how: EIO, within seconds" within 25 answers "error EIO" "$server_uri" "read $at 65536"
  ok "refuse $how: the next one, too" within 25 answers "error EIO" "$server_uri" "read $((at + 2000000)) 65536"
  ok "refuse $how: a message names it" named_after "$lines" s.log
  proxy refuse off
  ok "refuse $how: back again" within 25 answers "ok,ok" "$server_uri" \
    "read $at 65536 a.qcow2.raw" "read $((at + 2000000)) 65536 a.qcow2.raw"
  at=$((at + 8000000))
done
server_stop
is "ends well" "$(cat s.exit)" 0

# Back before the time is up: nobody notices.
ok "starts" server_start s uri="$proxy_uri" reconnect=30 || exit 1
proxy reset; proxy refuse close; proxy drop
nbd_do "$server_uri" "read 10000000 3000000 a.qcow2.raw" >late &
proxy await turned-away 2
proxy refuse off
wait $!
is "gone for a moment: right" "$(cat late)" ok

# Whoever ends the server does not wait for the far side.
proxy refuse on; proxy drop
nbd_do "$server_uri" "read 50000000 65536" >late 2>&1 &
ok "ends while the far side is gone" within 25 server_stop
wait $!

# It was never there.
proxy refuse on
ok "not there at the start: refused, within seconds" within 25 not serve uri="$proxy_uri" reconnect=1 --run true
ok "a message names it" named_after 0 err.log
is "not killed" "$(grep -c -i 'signal\|abort\|assert' err.log)" 0

done_testing
