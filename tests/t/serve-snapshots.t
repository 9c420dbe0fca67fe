#!/bin/bash
# Internal snapshots are exported read-only, by name and by ID, at their own size,
# without the machine's state; no guest write ever changes what they read.
. "$(dirname "$0")/../lib.sh"
require_nbd_ops

uri_of ()       # SNAPSHOT
{
  echo "nbd+unix:///snapshot%2F$1?socket=\$unixsocket"
}

# QEMU shows a snapshot at the size of the active disk, so it goes back to it in a copy.
go_back ()      # IMAGE SNAPSHOT RAW
{
  cp "$1" back.qcow2 && qemu-img snapshot -a "$2" back.qcow2 && guest_raw back.qcow2 "$3"
}

remember ()     # IMAGE NAME...: what QEMU reads from each, in NAME.want
{
  local img=$1 s
  shift

  for s; do
    go_back "$img" "$s" "$s.want" || return
  done
}

as_remembered ()        # IMAGE NAME...: says QEMU
{
  local img=$1 s
  shift

  for s; do
    go_back "$img" "$s" now.raw && cmp now.raw "$s.want" || return
  done
}

# Disks of 8, 12 and 5 MiB.
make_image a.qcow2 8M -o cluster_size=16k
age_image a.qcow2 8192 "$SEED" 40
qemu-img snapshot -c eight a.qcow2
qemu-img resize -q a.qcow2 12M
age_image a.qcow2 12288 "$((SEED + 1))" 40
qemu-img snapshot -c twelve a.qcow2
qemu-img resize -q --shrink a.qcow2 5M
age_image a.qcow2 5120 "$((SEED + 2))" 40
remember a.qcow2 eight twelve
guest_raw a.qcow2 disk.raw

# --- what is served

run=
for s in eight twelve; do
  run+="nbdcopy \"$(uri_of $s)\" $s.raw && cmp $s.raw $s.want && "
done
ok "exports by name: QEMU's bytes" serve a.qcow2 --run "$run true"
ok "exports by ID" serve a.qcow2 --run "nbdcopy \"$(uri_of 2)\" got.raw && cmp got.raw twelve.want"
is "their sizes are their own" "$(serve a.qcow2 --run "nbdinfo --size \"$(uri_of eight)\"; nbdinfo --size \"$(uri_of twelve)\"; nbdinfo --size \"\$uri\"")" \
  "$(printf '%s\n' $((8 << 20)) $((12 << 20)) $((5 << 20)))"
ok "listed, with their sizes" serve a.qcow2 --run "nbdinfo --list --json \"\$uri\" >list.json"
is "listed: names" "$(jq -r '.exports[]."export-name"' list.json | grep ^snap | tr '\n' ' ')" \
  "snapshot/eight snapshot/twelve "
is "listed: sizes" "$(jq -c '[.exports[] | select(."export-name" | startswith ("snap")) | ."export-size"]' list.json)" \
  "[$((8 << 20)),$((12 << 20))]"
ok "cannot be written to" serve a.qcow2 --run "! qemu-io -f raw -c 'write 0 64k' \"$(uri_of eight)\""
ok "extents agree with the bytes" serve a.qcow2 --run "nbdinfo --map --json \"$(uri_of eight)\" >map.json"
ok "extents: zeros are zeros" python3 -c '
import json
b = open("eight.want", "rb").read()
m = json.load(open("map.json"))
assert sum(e["length"] for e in m) == len(b)
assert any(e["type"] & 2 for e in m) and any(e["type"] == 0 for e in m)
assert all(not any(b[e["offset"]:e["offset"] + e["length"]]) for e in m if e["type"] & 2)'
ok "snapshot=NAME is the default export" eval \
  'serve a.qcow2 snapshot=twelve --run "$copy_out" && cmp out.raw twelve.want'
ok "snapshot=ID" eval 'serve a.qcow2 snapshot=1 --run "$copy_out" && cmp out.raw eight.want'
ok "snapshot=: read-only" serve a.qcow2 snapshot=eight --run 'nbdinfo --is read-only "$uri"'
ok "snapshot= that is not there: refused" not serve a.qcow2 snapshot=nine
matches "snapshot= that is not there: the message" err.log '"nine"'

# --- the guest writes

cp disk.raw model.raw
ok "written, and the snapshots read meanwhile" serve a.qcow2 --run "
  '$BUILD/tests/nbd-ops' model \"\$uri\" model.raw $SEED 1500 3 & w=\$!
  for i in 1 2 3 4; do
    for s in eight twelve; do
      nbdcopy \"nbd+unix:///snapshot%2F\$s?socket=\$unixsocket\" m.raw && cmp m.raw \$s.want || exit 1
    done
  done
  wait \$w"
ok "written: QEMU reads what the guest wrote" qemu-img compare -f qcow2 -F raw a.qcow2 model.raw
ok "written: the snapshots are as they were, says QEMU" as_remembered a.qcow2 eight twelve
ok "written: no errors, no leaks" img_check_clean -f qcow2 a.qcow2
cp a.qcow2 b.qcow2
ok "QEMU goes back to one" eval 'qemu-img snapshot -a eight b.qcow2 && img_check_clean -f qcow2 b.qcow2'
ok "QEMU deletes them" eval 'qemu-img snapshot -d eight b.qcow2 && qemu-img snapshot -d twelve b.qcow2 &&
  img_check_clean -f qcow2 b.qcow2'

# --- damaged

guest_raw a.qcow2 want.raw
cp a.qcow2 d.qcow2
patch d.qcow2 rt-random "$SEED"
ok "damaged: snapshots are served" serve d.qcow2 --run "$run true"
heals_ok "damaged" d.qcow2 want.raw
ok "damaged: the healed image's snapshots" as_remembered healed.bin eight twelve
cp want.raw model.raw
ok "damaged: written through the overlay" \
  serve d.qcow2 overlay=d.qcow2.overlay --run "'$BUILD/tests/nbd-ops' model \"\$uri\" model.raw $SEED 500 3 && $run true"
ok "damaged, written: no errors, no leaks" nested_qemu_img_check d.qcow2.overlay

# --- version 2, and tables that others wrote

make_image o.qcow2 8M -o compat=0.10
age_image o.qcow2 8192 "$SEED" 40
qemu-img snapshot -c old o.qcow2
age_image o.qcow2 8192 "$((SEED + 1))" 40
remember o.qcow2 old
guest_raw o.qcow2 model.raw
entry=$(patch o.qcow2 get snapshots_offset)
# What fills the extra data decides: none, as the first versions wrote, or more than we know.
rewrite_entry ()        # IMAGE EXTRA_BYTES
{
  python3 - "$1" "$entry" "$2" <<'END'
import struct, sys
at, want = int(sys.argv[2]), int(sys.argv[3])
with open(sys.argv[1], "r+b") as f:
    f.seek(at)
    e = f.read(4096)
    extra, id_len, name_len = struct.unpack(">I", e[36:40])[0], *struct.unpack(">HH", e[12:16])
    names = e[40 + extra:40 + extra + id_len + name_len]
    data = (e[40:40 + extra] + b"\xee" * want)[:want]
    new = e[:36] + struct.pack(">I", want) + data + names
    f.seek(at)
    f.write(new + bytes(max(0, 40 + extra + id_len + name_len + 8 - len(new))))
END
}
for extra in 0 8 100; do
  cp o.qcow2 e.qcow2
  rewrite_entry e.qcow2 $extra
  cp model.raw m.raw
  ok "version 2, $extra bytes of extra data: read" serve e.qcow2 report=report.json --run "
    nbdcopy \"$(uri_of old)\" got.raw && cmp got.raw old.want"
  is "version 2, $extra bytes: nothing is wrong with it" "$(jq -c '[.corruptions // 0, .leaks // 0]' report.json)" '[0,0]'
  ok "version 2, $extra bytes: written" serve e.qcow2 --run "'$BUILD/tests/nbd-ops' model \"\$uri\" m.raw $SEED 500"
  ok "version 2, $extra bytes: no errors, no leaks" img_check_clean -f qcow2 e.qcow2
  ok "version 2, $extra bytes: QEMU reads both" eval 'as_remembered e.qcow2 old && qemu-img compare -f qcow2 -F raw e.qcow2 m.raw'
done

# A name that is another's ID: the name counts.
make_image n.qcow2 1M
io n.qcow2 'write -P 1 0 1M'
qemu-img snapshot -c 2 n.qcow2
io n.qcow2 'write -P 2 0 1M'
qemu-img snapshot -c other n.qcow2
ok "a name goes before an ID" serve n.qcow2 --run "qemu-io -r -f raw -c 'read -P 1 0 1M' \"$(uri_of 2)\""

# --- the state of a machine

if command -v qemu-system-x86_64 >/dev/null; then
  make_image v.qcow2 8M
  age_image v.qcow2 8192 "$SEED" 40
  guest_raw v.qcow2 vm.want
  printf 'savevm vm\nquit\n' |
    timeout 60 qemu-system-x86_64 -S -nodefaults -display none -accel tcg -m 8 -monitor stdio \
      -drive file=v.qcow2,format=qcow2,if=virtio >vm.log 2>&1
  age_image v.qcow2 8192 "$((SEED + 1))" 40
  state=$(qemu-img info --output=json v.qcow2 | jq '.snapshots[0]."vm-state-size"')
  if [ "${state:-0}" -gt 0 ]; then
    ok "machine state: counted" eval 'serve v.qcow2 report=report.json &&
      jq -e "[.corruptions // 0, .leaks // 0] == [0, 0]" report.json'
    ok "machine state: is not served" serve v.qcow2 --run "
      [ \"\$(nbdinfo --size \"$(uri_of vm)\")\" = $((8 << 20)) ] && nbdcopy \"$(uri_of vm)\" vm.raw && cmp vm.raw vm.want"
    guest_raw v.qcow2 model.raw
    ok "machine state: the guest writes" serve v.qcow2 --run "'$BUILD/tests/nbd-ops' model \"\$uri\" model.raw $SEED 500"
    ok "machine state: no errors, no leaks" img_check_clean -f qcow2 v.qcow2
    guest_raw v.qcow2 want.raw
    patch v.qcow2 rt-zero
    heals_ok "machine state, damaged" v.qcow2 want.raw
    healed_file v.qcow2.overlay h.qcow2
    printf 'info status\nquit\n' |
      timeout 60 qemu-system-x86_64 -S -nodefaults -display none -accel tcg -m 8 -monitor stdio \
        -drive file=h.qcow2,format=qcow2,if=virtio -loadvm vm >vm.log 2>&1
    is "machine state, healed: QEMU loads it" "$? $(grep -c 'VM status' vm.log)" "0 1" || diag_file vm.log
  else
    skip "savevm did not work here: $(tail -n 1 vm.log)"
  fi
else
  skip "no qemu-system-x86_64"
fi

done_testing
