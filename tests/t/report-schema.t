# The report is what docs/report.schema.json says, whatever the image; the schema
# says no when a member is missing, misspelt or of another type; members that
# qemu-img has are qemu-img's.
. "$(dirname "$0")/../lib.sh"

schema=$top_dir/docs/report.schema.json

valid ()
{
  python3 "$tests_dir/validate.py" "$schema" "$@"
}

# reported NAME [ARG...]: a valid report of a.qcow2; the start may be refused.
reported ()
{
  local name=$1
  shift

  rm -f r.json o.qcow2 o.qcow2.data
  serve a.qcow2 repair=$level report=r.json "$@" >serve.log 2>&1
  ok "$name" valid r.json
}

level=all

fresh ()
{
  qemu-img convert -f raw -O qcow2 "$@" disk.raw a.qcow2
}

# --- sound, leaking, lost refcounts; the mapping
patch disk.raw bytes "$SEED" 3000000
truncate -s 8M disk.raw
fresh; reported "sound"
is "sound: nothing is lost" "$(jq -c '[.sound, .findings, .lost.bytes, .conflicts.total]' r.json)" '[true,[],0,0]'
truncate -s +1M a.qcow2; patch a.qcow2 leak 3; reported "leaking" overlay=o.qcow2
is "leaking: mended" "$(jq -c '[.findings[] | [.code, .mended]] | unique' r.json)" '[["R02",true]]'
level=off; reported "leaking, nothing mended"; level=all
is "leaking, nothing mended: says so" "$(jq -c '[.findings[] | [.code, .mended]] | unique' r.json)" '[["R02",false]]'
fresh; patch a.qcow2 rt-zero; reported "refcounts lost" overlay=o.qcow2
is "refcounts lost: all mended" "$(jq -c '[.findings[].mended] | unique' r.json)" '[true]'
fresh
for entry in 0x80000000000500fe 0x80ffffffffff0000 0x8000000000030000 0x8000000000000200; do
  fresh; patch a.qcow2 l2 3 $entry; reported "an L2 entry $entry"
  ok "an L2 entry $entry: found" eval 'jq -e "[.findings[] | select (.severity == \"corruption\")] | length > 0" r.json'
done
fresh; patch a.qcow2 l1 0 0x8000000000000000; reported "an L1 entry in the header"
fresh; patch a.qcow2 set l1_table_offset=0x123456; reported "the L1 table outside"
fresh; truncate -s 1M a.qcow2; reported "cut short"

# --- snapshots, bitmaps, compression, chain, data file, encryption
fresh; qemu-img snapshot -c one a.qcow2; io a.qcow2 "write 0 200k"; qemu-img snapshot -c $'\033[2Jtwo' a.qcow2
patch a.qcow2 rb-zero 0; reported "snapshots" overlay=o.qcow2
patch a.qcow2 set nb_snapshots=9; reported "snapshots that are not there"
fresh; qemu-img bitmap --add a.qcow2 b; io a.qcow2 "write 0 200k"; reported "a bitmap"
fresh -c; patch a.qcow2 all-refcounts 0; reported "compressed" check=deep overlay=o.qcow2
fresh; mv a.qcow2 base.qcow2; patch base.qcow2 rt-zero
qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 a.qcow2
reported "a damaged backing file" backing=follow
is "a damaged backing file: in the chain" "$(jq -c '[."backing-chain"[] | [.format, .findings[0].mended]]' r.json)" '[["qcow2",true]]'
reported "a backing file that is refused"
fresh -o data_file=a.data; patch a.qcow2 rt-zero; reported "a data file" data-file=follow overlay=o.qcow2
create_encrypted luks k a.qcow2 1M
patch a.qcow2 rt-zero; reported "encrypted" overlay=o.qcow2

fresh; patch a.qcow2 rt-zero; reported "in place" inplace=true
is "in place: committed" "$(jq -c '[.committed.resumed, .served]' r.json)" '[false,"read-write"]'

# --- refused, hostile
echo "no image" >a.qcow2; reported "not an image"
for seed in $(seq "$SEED" $((SEED + 11))); do
  fresh; qemu-img snapshot -c s a.qcow2; patch a.qcow2 mutate "$seed" >/dev/null; reported "hostile, seed $seed" overlay=o.qcow2
done

# --- the schema can say no
fresh; patch a.qcow2 rt-zero; reported "to be spoilt"
for spoil in 'del(.served)' '.typo = 1' '.findings[0].severity = "bad"' 'del(.findings[0].mended)' \
             '.lost.ranges = [{"guest-offset": 0}]' '.conflicts.listed = [{}]' '.healed."dirty-bit-cleared" = 1'; do
  jq "$spoil" r.json >spoilt.json
  ok "the schema refuses $spoil" not valid spoilt.json
done

# --- qemu-img's members
for damage in "leak 5" "refcounts 3 9 0" "add-ext 0x12345678 00"; do
  fresh
  [ "$damage" != "leak 5" ] || truncate -s +1M a.qcow2
  # shellcheck disable=SC2086
  patch a.qcow2 $damage
  serve a.qcow2 repair=off report=r.json 2>/dev/null
  qemu-img check -f qcow2 --output=json a.qcow2 >q.json 2>/dev/null
  # One damaged refcount is a wrong COPIED flag to QEMU, too: its number may be larger.
  members='{"check-errors", format, "image-end-offset", corrupt: (.corruptions > 0), leaks, "total-clusters", "allocated-clusters", "fragmented-clusters", "compressed-clusters"}'
  is "$damage: what qemu-img counts" "$(jq -c "$members" r.json)" "$(jq -c "$members" q.json)"
done

done_testing
