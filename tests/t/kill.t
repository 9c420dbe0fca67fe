#!/bin/bash
# SIGTERM leaves a clean image; SIGKILL at any moment leaves one free of errors,
# with all that had been flushed.
. "$(dirname "$0")/../lib.sh"
require_nbd_ops

RANDOM=$SEED
rounds=6
[ -z "$SOAK" ] || rounds=100

# SIGTERM, with the client's last writes not flushed.
for options in cluster_size=64k lazy_refcounts=on; do
  make_image a.qcow2 64M -o $options
  ok "SIGTERM, $options: starts" server_start s a.qcow2
  ok "SIGTERM, $options: load" nbd_ops load "$server_uri" state.$options "$SEED" 4000 8
  { qemu-io -t writeback -f raw -c 'write -P 7 0 64k' -c abort "$server_uri" >/dev/null; } 2>/dev/null
  server_stop TERM
  is "SIGTERM, $options: ends well" "$(cat s.exit)" 0
  ok "SIGTERM, $options: no errors, no leaks" img_check_clean -f qcow2 a.qcow2
  is "SIGTERM, $options: not dirty" "$(patch a.qcow2 get incompatible_features)" 0
  ok "SIGTERM, $options: the unflushed write is there" io a.qcow2 'read -P 7 0 64k'

  # In the midst of requests, with clients that are still connected.
  rm -f state
  make_image a.qcow2 64M -o $options
  ok "SIGTERM, $options, under load: starts" server_start s a.qcow2
  ok "SIGTERM, $options, under load: ended after 2000 operations" \
    nbd_ops load "$server_uri" state "$SEED" 100000 8 "$server_pid" 2000 15
  wait "$server_job"
  is "SIGTERM, $options, under load: not dirty" "$(patch a.qcow2 get incompatible_features)" 0
  ok "SIGTERM, $options, under load: no errors, no leaks" img_check_clean -f qcow2 a.qcow2
  ok "SIGTERM, $options, under load: what was flushed is there" \
    serve a.qcow2 --run "'$BUILD/tests/nbd-ops' verify \"\$uri\" state"
done

kill_rounds ()  # NAME CHECKED_BY ARG...
{
  local name=$1 judge=$2 i after
  shift 2

  rm -f state
  for ((i = 1; i <= rounds; i++)); do
    after=$((50 + RANDOM % 3000))
    ok "$name, round $i: starts" server_start s "$@" || break
    ok "$name, round $i: killed after $after operations" \
      nbd_ops load "$server_uri" state $((SEED + i)) 100000 8 "$server_pid" $after
    server_stop KILL
    ok "$name, round $i: QEMU finds no errors" $judge
    ok "$name, round $i: what was flushed is there" \
      serve "$@" --run "'$BUILD/tests/nbd-ops' verify \"\$uri\" state"
    ok "$name, round $i: its leaks are not taken for lost data" not grep '^O' err.log
  done
}

in_place () { img_check_leaks_at_most -f qcow2 a.qcow2; }
healed ()   { img_check_leaks_at_most "json:$(nested o.qcow2)" && img_check_leaks_at_most -f qcow2 o.qcow2; }

make_image a.qcow2 64M
kill_rounds "in place" in_place a.qcow2
make_image a.qcow2 64M -o cluster_size=512
kill_rounds "512-byte clusters" in_place a.qcow2

make_image d.qcow2 64M -o cluster_size=4k
patch d.qcow2 rt-zero
before=$(sha256 d.qcow2)
kill_rounds "overlay" healed d.qcow2 overlay=o.qcow2
is "overlay: the source is as it was" "$(sha256 d.qcow2)" "$before"

# Meanwhile the file is longer than its clusters, by an eighth at most: not when it is
# closed, and being killed again and again adds nothing.
end_of () { qemu-img check --output=json $1 | sed -n 's/.*"image-end-offset": \([0-9]*\).*/\1/p'; }
length () { stat -c %s $1; }
writes ()  # NAME SIGNAL COMMAND...
{
  local name=$1 signal=$2
  shift 2
  ok "length, $name: starts" server_start s "${server[@]}"
  ok "length, $name: writes" qemu-io -t writeback -f raw "$@" -c flush "$server_uri"
  server_stop $signal
}

patch d.qcow2 rt-zero
for kind in "in place" overlay; do
  make_image a.qcow2 64M
  server=(a.qcow2) file=a.qcow2 judge=in_place
  [ "$kind" = "in place" ] || server=(d.qcow2 overlay=n.qcow2) file=n.qcow2 judge="img_check_leaks_at_most -f qcow2 n.qcow2"
  writes "$kind, killed" KILL -c 'write -P 5 0 20000k' -c 'write -P 6 40M 10M'
  ok "length, $kind, killed: QEMU finds no errors" $judge
  end=$(end_of $file) killed=$(length $file)
  ok "length, $kind, killed: $killed bytes, $end used" \
    [ "$killed" -gt "$end" -a "$killed" -le $((end + end / 8 + 65536)) ]
  for again in 2 3; do
    writes "$kind, killed $again times" KILL -c 'write -P 7 64k 4k'
    is "length, $kind, killed $again times" "$(length $file)" "$killed"
  done
  writes "$kind, ended" TERM -c 'write -P 8 30M 64k'
  is "length, $kind, ended" "$(length $file)" "$killed"
  ok "length, $kind, ended: QEMU finds no errors" $judge
  ok "length, $kind, ended: the bytes are there" serve "${server[@]}" --run \
    'qemu-io -r -f raw -c "read -P 5 0 64k" -c "read -P 7 64k 4k" -c "read -P 5 68k 19932k" -c "read -P 6 40M 10M" \
      -c "read -P 8 30M 64k" "$uri" >io.log 2>&1 && ! grep -i failed io.log'
done

make_image a.qcow2 64M
server=(a.qcow2)
writes "closed" TERM -c 'write -P 5 0 20000k' -c 'write -P 6 40M 10M'
is "length, closed: it ends with its last cluster" "$(length a.qcow2)" "$(end_of a.qcow2)"

done_testing
