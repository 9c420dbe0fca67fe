#!/bin/bash
# What was written with FUA, or before a flush, is there although the server
# was killed right after it.
. "$(dirname "$0")/../lib.sh"

# qemu-io's abort ends the client before it would flush by itself.
client ()
{
  { qemu-io -t writeback -f raw "$@" -c abort "$server_uri" >client.log; } 2>/dev/null || true
}

survives ()     # NAME IMAGE SERVER_ARGS -- CLIENT_ARGS
{
  local name=$1 img=$2 args=()
  shift 2

  while [ "$1" != -- ]; do args+=("$1"); shift; done
  shift
  ok "$name: starts" server_start s "$img" "${args[@]}" || return
  client "$@"
  server_stop KILL
}

make_image a.qcow2 64M
survives "FUA" a.qcow2 -- -c 'write -f -P 7 0 64k' -c 'write -f -P 8 40M 100k' -c 'write -f -z 41M 100k'
ok "FUA: is there" io a.qcow2 'read -P 7 0 64k' 'read -P 8 40M 100k'
ok "FUA: no errors" img_check_leaks_at_most -f qcow2 a.qcow2

make_image a.qcow2 64M
survives "flush" a.qcow2 -- -c 'write -P 7 0 64k' -c 'write -P 8 40M 100k' -c flush -c 'write -P 9 0 64k'
ok "flush: is there" io a.qcow2 'read -P 8 40M 100k'
ok "flush: the write after it is there or not, as a whole" \
  eval "io a.qcow2 'read -P 7 0 64k' || io a.qcow2 'read -P 9 0 64k'"
ok "flush: no errors" img_check_leaks_at_most -f qcow2 a.qcow2

# Through an overlay, over a damaged image.
make_image d.qcow2 64M
io d.qcow2 'write -P 1 0 8M'
patch d.qcow2 rt-zero
before=$(sha256 d.qcow2)
survives "overlay" d.qcow2 overlay=o.qcow2 -- -c 'write -f -P 7 0 64k' -c 'write -P 8 40M 100k' -c flush
ok "overlay: is there at the next start" serve d.qcow2 overlay=o.qcow2 \
  --run 'qemu-io -r -f raw -c "read -P 7 0 64k" -c "read -P 8 40M 100k" -c "read -P 1 64k 8128k" "$uri"'
ok "overlay: no errors in the healed image" img_check_leaks_at_most "json:$(nested o.qcow2)"
is "overlay: the source is as it was" "$(sha256 d.qcow2)" "$before"

# The dirty bit of an image with lazy refcounts never says "clean" too early.
make_image a.qcow2 64M -o lazy_refcounts=on
survives "lazy refcounts" a.qcow2 -- -c 'write -f -P 7 0 1M'
ok "lazy refcounts: is there" serve a.qcow2 overlay=lo.qcow2 --run 'qemu-io -r -f raw -c "read -P 7 0 1M" "$uri"'
dirty=$(($(patch a.qcow2 get incompatible_features) & 1))
[ "$dirty" = 1 ] || ok "lazy refcounts: no errors, since it says clean" img_check_leaks_at_most -f qcow2 a.qcow2

done_testing
