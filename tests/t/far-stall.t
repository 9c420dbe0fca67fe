#!/bin/bash
# A far side that answers nothing for timeout= seconds is a broken one: the guest gets the
# right bytes from a new connection, or EIO, and never waits for ever.
. "$(dirname "$0")/../lib.sh"
. "$tests_dir/far.sh"
require_uri

make_far_image a.qcow2
far_qemu a.qcow2 || exit 1
proxy_start || exit 1

ok "starts" server_start s uri="$proxy_uri" timeout=2 reconnect=2 || exit 1
lines=$(lines_of s.log)
proxy stall on
ok "stalled: EIO" within 25 answers "error EIO" "$server_uri" "read 10000000 65536"
ok "stalled: a message names it" named_after "$lines" s.log
proxy stall off
ok "no longer stalled: right" within 25 answers "ok" "$server_uri" "read 10000000 65536 a.qcow2.raw"

# Connections are made, and reads are never answered.
proxy stall-reads on
ok "reads stall: EIO" within 30 answers "error EIO" "$server_uri" "read 2000000 65536"
proxy stall-reads off
ok "reads no longer stall: right" within 25 answers "ok" "$server_uri" "read 2000000 65536 a.qcow2.raw"
server_stop
is "ends well" "$(cat s.exit)" 0

# A new connection is good: the guest only waits.
ok "starts" server_start s uri="$proxy_uri" timeout=2 reconnect=20 || exit 1
proxy reset; proxy stall on
nbd_do "$server_uri" "read 10000000 3000000 a.qcow2.raw" >late &
ok "stalled once: it tries anew" proxy await connections 1
proxy drop; proxy stall off
wait $!
is "stalled once: right" "$(cat late)" ok

# Shorter than timeout=: nothing is broken.
proxy reset; proxy stall-reads on
nbd_do "$server_uri" "read 50000000 65536 a.qcow2.raw" >late &
proxy await read 1
proxy stall-reads off
wait $!
is "a pause: right" "$(cat late)" ok
is "a pause: no new connection" "$(proxy_number connections)" 0

server_stop
is "ends well, again" "$(cat s.exit)" 0

# The check.
proxy stall on
ok "stalled at the start: refused" within 25 not serve uri="$proxy_uri" timeout=2 reconnect=2 --run true
ok "a message names it" named_after 0 err.log
proxy stall off; proxy stall-reads on
ok "reads stalled at the start: refused" within 30 not serve uri="$proxy_uri" timeout=2 reconnect=2 --run true
ok "a message names it, again" named_after 0 err.log

# Nobody who ends it has to wait for a server that says nothing.
proxy stall-reads off
ok "ended while it waits: starts" server_start s uri="$proxy_uri" timeout=60 reconnect=600
proxy stall on
{ nbd_do "$server_uri" "read 5000000 65536" >/dev/null 2>&1 & } 2>/dev/null
waiting=$!
proxy await inflight 1
ok "ended while it waits: at once" within 25 server_stop
kill $waiting 2>/dev/null
wait $waiting 2>/dev/null

done_testing
