#!/bin/bash
# A far server that serves one client at a time, and says otherwise or nothing, is used with
# one connection; where it says that there must be no more, there are no more.
. "$(dirname "$0")/../lib.sh"
. "$tests_dir/far.sh"
require_uri

make_far_image a.qcow2
far_qemu a.qcow2 || exit 1
proxy_start || exit 1

# Further ones are accepted and never answered, though multi-conn is offered.
proxy max-conns 1
ok "never answered: a copy, in time" within 25 serve uri="$proxy_uri" --run "$copy_out; cmp out.raw a.qcow2.raw"
is "never answered: one was open" "$(proxy_number peak-open)" 1
ok "never answered: starts" server_start s uri="$proxy_uri"
ok "never answered: dropped and made again" eval 'proxy drop && answers ok "$server_uri" "read 20000000 100000 a.qcow2.raw"'
ok "never answered: many readers" within 25 nbdcopy --connections=4 "$server_uri" null:
ok "never answered: ends" within 25 server_stop
is "never answered: ends well" "$(cat s.exit)" 0
proxy max-conns 2
ok "two are answered: a copy, in time" within 25 serve uri="$proxy_uri" --run "$copy_out; cmp out.raw a.qcow2.raw"
proxy max-conns off

# It is not offered.
proxy multi-conn off; proxy reset
ok "not offered: a copy" serve uri="$proxy_uri" --run "$copy_out; cmp out.raw a.qcow2.raw"
is "not offered: one was open" "$(proxy_number peak-open)" 1
proxy drop-after 20 requests
ok "not offered: a copy over a line that breaks" serve uri="$proxy_uri" --run "$copy_out; cmp out.raw a.qcow2.raw"
proxy multi-conn on

# It is offered, and used.
proxy reset
ok "offered: a copy" serve uri="$proxy_uri" --run "$copy_out; cmp out.raw a.qcow2.raw"
diag "connections: $(proxy_number peak-open), requests at once: $(proxy_number peak)"
ok "offered: many requests are in flight" test "$(proxy_number peak)" -ge 8

# QEMU's own way.
far_stop
far_qemu a.qcow2 -e 1 || exit 1
ok "qemu-nbd -e 1: a copy" within 25 serve uri="nbd+unix:///?socket=$far_sock" --run "$copy_out; cmp out.raw a.qcow2.raw"

done_testing
