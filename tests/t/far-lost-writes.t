#!/bin/bash
# A far server that crashes takes with it what was not flushed: then no flush says that all
# is well, and what had been flushed is there.
. "$(dirname "$0")/../lib.sh"
. "$tests_dir/far.sh"
require_uri

export XDG_STATE_HOME=$tmp/state
make_image base.qcow2 16M
io base.qcow2 'write -P 1 0 4M'
truncate -s 16M base.qcow2      # room: an export does not grow
cp base.qcow2 a.qcow2
far_qemu a.qcow2 --writable || exit 1
proxy_start || exit 1

begin ()        # NAME: a new image, served in place
{
  far_stop
  cp base.qcow2 a.qcow2
  far_qemu a.qcow2 --writable || return 1
  proxy reset; proxy lose-writes on
  server_start s uri="$proxy_uri" inplace=true reconnect=5 ||
    { fail "$1: starts"; return 1; }
}

# The guest's third answer is that of the flush after the crash: if it says that all is well,
# the second write must be there, since whoever gave it had it written again.
judge ()        # NAME
{
  local name=$1

  server_stop
  is "$name: ends" "$(grep -c -v '^[01]$' s.exit)" 0
  far_stop
  ok "$name: no errors, says QEMU" img_check_leaks_at_most -f qcow2 a.qcow2
  ok "$name: what was flushed is there" io a.qcow2 "read -P 7 $kept 64k"
  if [ "$(sed -n 4p answers)" = ok ]; then
    ok "$name: the flush said so, and it is there" io a.qcow2 "read -P 9 $lost 64k"
  else
    pass "$name: the flush failed"
  fi
  far_qemu a.qcow2 --writable
}

# Where it was written before, and where clusters are allocated.
for places in "1M 2M overwritten" "8M 9M allocated" "1M 9M both"; do
  read -r kept lost what <<<"$places"
  k=$((${kept%M} << 20)) l=$((${lost%M} << 20))

  begin "$what" || continue
  nbd_do "$server_uri" "write $k 65536 7" "flush" "write $l 65536 9" \
    "sh $proxy_command lose-writes now >/dev/null" "flush" >answers
  is "$what: written, flushed, written" "$(head -n 3 answers | paste -s -d ,)" "ok,ok,ok"
  ok "$what: the server had crashed" proxy await crashes 1
  judge "$what"

  begin "$what, at the flush" || continue
  nbd_do "$server_uri" "write $k 65536 7" "flush" "write $l 65536 9" \
    "sh $proxy_command lose-writes flush >/dev/null" "flush" >answers
  ok "$what, at the flush: the server had crashed" proxy await crashes 1
  judge "$what, at the flush"
done

# Nothing was lost: a flush after a new connection may, and at last must, succeed.
begin "nothing lost"
ok "nothing lost: flushed, dropped, flushed" answers "ok,ok,ok" "$server_uri" "write 1048576 65536 7" "flush" \
  "sh $proxy_command drop >/dev/null" "flush"
ok "nothing lost: and on it goes" answers "ok,ok" "$server_uri" "write 2097152 65536 9" "flush"
kept=1M lost=2M
printf 'ok\nok\nok\nok\n' >answers
judge "nothing lost"

done_testing
