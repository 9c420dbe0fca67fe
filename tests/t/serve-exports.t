#!/bin/bash
# What is served beside the guest disk: snapshots, the healed image file itself and
# the report, all listed with a description, all read-only.
. "$(dirname "$0")/../lib.sh"

uri_of ()       # EXPORT: as nbdkit's --run sees it
{
  echo "nbd+unix:///$1?socket=\$unixsocket"
}

make_image d.qcow2 8M
age_image d.qcow2 8192 "$SEED" 40
qemu-img snapshot -c first d.qcow2
age_image d.qcow2 8192 "$((SEED + 1))" 20
qemu-img snapshot -c 'näme / with "all" & sorts' d.qcow2
age_image d.qcow2 8192 "$((SEED + 2))" 20
guest_raw d.qcow2 d.raw
cp d.qcow2 sound.qcow2
patch d.qcow2 rt-zero
before=$(sha256 d.qcow2)

for img in sound d; do
  ok "$img: listed" serve $img.qcow2 --run 'nbdinfo --list --json "$uri" >list.json; nbdinfo --list "$uri"'
  is "$img: the names" "$(jq -r '.exports[]."export-name"' list.json)" "
snapshot/first
snapshot/näme / with \"all\" & sorts
healed.qcow2
report.json"
  is "$img: each has a description" \
    "$(jq '[.exports[] | select((.description // "") | length > 10)] | length' list.json)" 5
  is "$img: all but the guest disk are read-only" \
    "$(jq -c '[.exports[] | select(."export-name" != "") | .is_read_only] | unique' list.json)" '[true]'
done

# --- the healed file

ok "healed.qcow2 is fetched" serve d.qcow2 --run "nbdcopy \"$(uri_of healed.qcow2)\" h.qcow2"
ok "healed.qcow2: no errors, no leaks" img_check_clean -f qcow2 h.qcow2
ok "healed.qcow2: QEMU reads the guest's bytes" eval 'guest_raw h.qcow2 h.raw && cmp h.raw d.raw'
ok "healed.qcow2: snapshots too" eval '
  qemu-img convert -l first sound.qcow2 -O raw s1 && qemu-img convert -l first h.qcow2 -O raw s2 && cmp s1 s2'
ok "healed.qcow2: can be written to by QEMU" eval "io h.qcow2 'write -P 9 0 8M' && img_check_clean -f qcow2 h.qcow2"
ok "a sound image is fetched as it is" \
  serve sound.qcow2 --run "nbdcopy \"$(uri_of healed.qcow2)\" h2.qcow2"
ok "a sound image: byte for byte" cmp h2.qcow2 sound.qcow2
ok "with an overlay, what the guest wrote is in it" serve d.qcow2 overlay=o.qcow2 --run "
  qemu-io -f raw -c 'write -P 7 1M 3M' \"\$uri\" >/dev/null && nbdcopy \"$(uri_of healed.qcow2)\" h3.qcow2 &&
  nbdcopy \"\$uri\" want.raw"
ok "with an overlay: no errors, no leaks" img_check_clean -f qcow2 h3.qcow2
ok "with an overlay: QEMU reads the same" eval 'guest_raw h3.qcow2 h3.raw && cmp h3.raw want.raw'
ok "cannot be written to" serve d.qcow2 overlay=o.qcow2 \
  --run "! qemu-io -f raw -c 'write 0 64k' \"$(uri_of healed.qcow2)\""

# --- the report

ok "report.json is fetched" serve d.qcow2 report=r.json --run "nbdcopy \"$(uri_of report.json)\" got.json"
ok "report.json is JSON" jq -e . got.json
ok "report.json lists what was found" eval 'REPORT=got.json; report_has R11 || report_has R16 || report_has R21'
is "report.json says what report= says" "$(jq -S -c . got.json)" "$(jq -S -c . r.json)"

# --- names

ok "a name that is not there is refused" serve d.qcow2 --run "! nbdinfo \"$(uri_of nowhere)\""
matches "a name that is not there: named" err.log 'no export "nowhere"'
ok "a snapshot that is not there is refused" serve d.qcow2 --run "! nbdinfo \"$(uri_of snapshot/none)\""
matches "a snapshot that is not there: named" err.log 'snapshot.*"none"'
escape=$(printf '\033')
ok "control characters of a client: refused" serve d.qcow2 --run "! nbdinfo \"$(uri_of evil%1b%5b2Jname)\""
matches "control characters of a client: named without them" err.log '^nbdkit.*no export "evil.\[2Jname"'
ok "control characters of a client: not printed" eval '! grep "^nbdkit" err.log | holds "$escape"'
# A snapshot's name comes from the image: an escape sequence in it stays out of our messages.
cp sound.qcow2 e.qcow2
python3 - e.qcow2 <<'END'
import sys
b = open(sys.argv[1], "r+b").read()
open(sys.argv[1], "r+b").write(b.replace(b"first", b"f\033[1m", 1))
END
ok "control characters of an image are not printed" eval '
  serve e.qcow2 report=r.json --run "nbdinfo --list \"\$uri\"" && jq -e . r.json && not grep -q "$escape" err.log'

# --- while one is fetched, the others go on

ok "all at once" serve d.qcow2 overlay=o.qcow2 --run "
  for i in 1 2 3; do
    nbdcopy \"\$uri\" g\$i.raw & nbdcopy \"$(uri_of snapshot/first)\" s\$i.raw & nbdcopy \"$(uri_of healed.qcow2)\" h\$i.qcow2 &
  done; wait"
for i in 1 2 3; do
  ok "all at once: the bytes, $i" eval 'cmp g$i.raw want.raw && cmp s$i.raw s1 && cmp h$i.qcow2 h3.qcow2'
done
is "the image is as it was" "$(sha256 d.qcow2)" "$before"

done_testing
