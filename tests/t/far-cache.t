#!/bin/bash
# cache=FILE: what was read from the far side is in the file, and is not read from there again,
# neither later nor by a start after this one was killed; repairs are never in it.
. "$(dirname "$0")/../lib.sh"
. "$tests_dir/far.sh"
require_uri

make_far_image a.qcow2
far_qemu a.qcow2 || exit 1
proxy_start || exit 1
# Each start looks at the first and the last MiB, and at 256 places between them; and each connection
# makes sure that it leads to the same disk.
again=$((5 * 1048576))

# bytes_twice LOG...: bytes that are in more than one read, each counted as often as it is too much.
bytes_twice ()
{
  cat "$@" | awk '$1 == "read" { print $3, $4 }' | sort -n | awk '
    { from = $1 > end ? $1 : end; to = $1 + $2
      twice += to > from ? $2 - (to - from) : $2
      if (to > end) end = to }
    END { print twice + 0 }'
}

bytes_read ()
{
  awk '$1 == "read" { n += $4 } END { print n + 0 }' "$@"
}

take_log ()  # NAME
{
  proxy sync && cp line.log "$1" && proxy reset
}

at_most ()  # NAME NUMBER LIMIT
{
  diag "$1: $2 bytes, at most $3"
  ok "$1" test "$2" -le "$3"
}

# --- uninterrupted

ok "a copy" serve uri="$proxy_uri" cache=c.qcow2 --run "$copy_out; cmp out.raw a.qcow2.raw"
take_log one.log
at_most "nothing is read twice, but for what each start looks at" "$(bytes_twice one.log)" $again
ok "the file is sound, says QEMU" img_check_clean -f qcow2 c.qcow2
ok "and has the source's bytes" qemu-img compare -f raw -F qcow2 a.qcow2 c.qcow2
ok "again" serve uri="$proxy_uri" cache=c.qcow2 --run "$copy_out; cmp out.raw a.qcow2.raw"
take_log two.log
at_most "only the fingerprint is read" "$(bytes_read two.log)" $again

# --- killed half-way

# How long a disk takes to flush is not what this is about.
in_ram
rate=8000000
proxy rate $rate
ok "a slow line: starts" server_start s uri="$proxy_uri" cache="$ram/k.qcow2" || exit 1
nbdcopy "$server_uri" null: 2>/dev/null &
copier=$!
ok "half of it is read" proxy await sent-bytes 24000000
server_stop KILL
wait $copier
take_log one.log
proxy rate 0
ok "started again, a copy" serve uri="$proxy_uri" cache="$ram/k.qcow2" --run "$copy_out; cmp out.raw a.qcow2.raw"
take_log two.log
# Delivered were 24 MB, of which a second's worth may not have been on the disk, and some may have been
# read ahead; the rest is not read again.
at_most "what had come until a second before is not read again" "$(bytes_read two.log)" \
  $(($(stat -c %s a.qcow2) + 2 * again - 24000000 + rate * 3 / 2))
ok "the file has no errors, says QEMU" img_check_leaks_at_most -f qcow2 "$ram/k.qcow2"
ok "and has the source's bytes" qemu-img compare -f raw -F qcow2 a.qcow2 "$ram/k.qcow2"

# --- gone for good

ok "all is kept: starts" server_start s uri="$proxy_uri" cache=c.qcow2 reconnect=1 || exit 1
proxy refuse on; proxy drop
ok "the far side is gone: a copy" within 25 nbdcopy "$server_uri" out.raw
ok "it is right" cmp out.raw a.qcow2.raw
server_stop
is "ends well" "$(cat s.exit)" 0
ok "a start needs the far side" not serve uri="$proxy_uri" cache=c.qcow2 reconnect=1 --run true
proxy refuse off
ok "the file was left as it was" img_check_clean -f qcow2 c.qcow2

# --- sectors that cannot be read, and are read later

# Not where the start looks.
step=$(($(stat -c %s a.qcow2) / 257))
for ((cluster = 100; ; cluster++)); do
  host=$(($(patch a.qcow2 host $cluster) * 65536)) guest=$((cluster * 65536))
  [ $(((host + 0x1200) % step)) -le 8192 ] || break
done
proxy error $((host + 0x1200)) 512
ok "a bad sector: starts" server_start s uri="$proxy_uri" cache=e.qcow2 || exit 1
ok "it costs no more than itself" answers "error EIO,ok,ok" "$server_uri" "read $((guest + 0x1200)) 512" \
  "read $((guest + 0x1000)) 512 a.qcow2.raw" "read $((guest + 0x1400)) 512 a.qcow2.raw"
server_stop
proxy error off
ok "it was not kept" serve uri="$proxy_uri" cache=e.qcow2 --run "$copy_out; cmp out.raw a.qcow2.raw"

# --- repairs

far_stop
cp a.qcow2 d.qcow2
patch d.qcow2 refcount 5 0
before=$(sha256 d.qcow2)
far_qemu d.qcow2
ok "damaged, in memory: healed" serve uri="$proxy_uri" cache=d.cache report=report.json \
  --run "$copy_out; cmp out.raw a.qcow2.raw; nbdinfo --is read-only \"\$uri\""
ok "it was damaged" report_has R01
ok "the cache has the damaged bytes" qemu-img compare -f raw -F qcow2 d.qcow2 d.cache
ok "damaged, with an overlay: healed, and written to" serve uri="$proxy_uri" cache=d.cache overlay=d.overlay \
  --run 'qemu-io -f raw -c "write -P 7 1M 1M" "$uri"'
ok "what was written is in the overlay" serve uri="$proxy_uri" cache=d.cache overlay=d.overlay \
  --run 'qemu-io -f raw -c "read -P 7 1M 1M" "$uri" | grep -v fail'
ok "and not in the cache" qemu-img compare -f raw -F qcow2 d.qcow2 d.cache
ok "QEMU finds both sound" eval 'img_check_clean -f qcow2 d.cache && nested_qemu_img_check d.overlay'
is "the image is as it was" "$(sha256 d.qcow2)" "$before"

# --- near

ok "a local image" serve a.qcow2 cache=l.cache --run "$copy_out; cmp out.raw a.qcow2.raw"
ok "has a cache as well" qemu-img compare -f raw -F qcow2 a.qcow2 l.cache
ok "which is used" serve a.qcow2 cache=l.cache --run "$copy_out; cmp out.raw a.qcow2.raw"

# --- refused

sums=$(sha256sum c.qcow2 d.overlay d.cache a.qcow2)
refuses ()  # WORD ARG...
{
  local word=$1
  shift

  ok "refused: $*" not serve "$@" --run true 2>/dev/null
  matches "and told why" err.log "$word"
}
refuses 'another image|other contents' uri="$proxy_uri" cache=c.qcow2
refuses 'no cache' uri="$proxy_uri" cache=d.overlay
refuses 'no overlay' uri="$proxy_uri" overlay=d.cache
refuses 'same file' uri="$proxy_uri" cache=x overlay=x
refuses 'same file' a.qcow2 cache=a.qcow2
refuses 'inplace' uri="$proxy_uri" cache=x inplace=true
is "no file was changed" "$(sha256sum c.qcow2 d.overlay d.cache a.qcow2)" "$sums"
ok "none was made" test ! -e x
# What was made for an image that is refused would refuse the right one at the next start.
truncate -s 100K junk
refuses 'qcow2' junk cache=y
ok "nor is one left of an image that is none" test ! -e y

done_testing
