#!/bin/bash
# Refcounts too high or too low, wrong COPIED flags, leaks, the dirty and the
# corrupt bit are mended in one pass.
. "$(dirname "$0")/../lib.sh"

make_image base.qcow2 32M -o cluster_size=16k
age_image base.qcow2 32768 "$SEED" 100
guest_raw base.qcow2 base.raw
clusters=$(patch base.qcow2 get clusters)

values ()       # NAME CODES PATCH COMMAND...
{
  local name=$1 codes=$2
  shift 2

  cp base.qcow2 d.qcow2
  patch d.qcow2 "$@"
  # shellcheck disable=SC2086
  heals_ok "$name" d.qcow2 base.raw $codes
}

values "all too high"             R02 all-refcounts 5
values "all at their highest"     R02 all-refcounts 0xffff
values "all too low"              R01 refcounts 0 "$clusters" 0
values "COPIED flags missing"     "T21 T22" copied clear l1 all + copied clear l2 all
values "one COPIED flag wrong"    T22 copied flip l2 "$(qemu-img map --output=json base.qcow2 |
                                        jq '[.[] | select(.data)][0].start / 16384')"
values "corrupt bit"              H02 set incompatible_features=2
values "dirty bit"                H01 set incompatible_features=1
values "both bits"                "H01 H02" set incompatible_features=3
values "leaks beside an error"    "R01 R02" refcounts 0 3 0 + leak 4

is "the dirty and corrupt bits are gone" \
  "$(patch d.qcow2 set incompatible_features=3; rm -f d.qcow2.overlay
     serve d.qcow2 overlay=d.qcow2.overlay >/dev/null; healed_file d.qcow2.overlay healed.bin
     patch healed.bin get incompatible_features)" 0

# Snapshots: refcounts above one, and COPIED flags that claim otherwise.
cp base.qcow2 s.qcow2
qemu-img snapshot -c before s.qcow2
io s.qcow2 'write -P 77 1M 2M'
guest_raw s.qcow2 s.raw
cp s.qcow2 d.qcow2
patch d.qcow2 copied set l1 all + copied set l2 all
heals_ok "COPIED flags claim shared clusters" d.qcow2 s.raw T22
cp s.qcow2 d.qcow2
patch d.qcow2 all-refcounts 1
heals_ok "shared clusters counted once" d.qcow2 s.raw R01

# The deletion of a snapshot was cut off before the refcounts were lowered: QEMU finds
# leaks and nothing else, and no finding may be more than that.
cp base.qcow2 d.qcow2
qemu-img snapshot -c gone d.qcow2
patch d.qcow2 set nb_snapshots=0 + set snapshots_offset=0
heals_ok "refcounts of a snapshot that is gone" d.qcow2 base.raw R02
is "QEMU finds leaks only" "$(qemu-img check --output=json d.qcow2 | jq -c '[.corruptions, .leaks > 0]')" \
  '[null,true]'
is "leaks that the COPIED flags agree with are leaks only" \
  "$(jq -c '[.findings[].severity] | unique' report.json)" '["leak"]'
rm -f d.qcow2.overlay
ok "a write to such an image" serve d.qcow2 repair=off \
  --run 'qemu-io -f raw -c "write -P 9 0 1M" "$uri"'
is "leaves leaks only" "$(qemu-img check --output=json d.qcow2 | jq -c '[.corruptions, .leaks > 0]')" \
  '[null,true]'

# A writer that was killed, with lazy refcounts.
make_image d.qcow2 32M -o lazy_refcounts=on
{ qemu-io -f qcow2 -c 'write -P 1 0 1M' -c 'write -P 2 9M 3M' -c abort d.qcow2 >/dev/null; } 2>/dev/null
is "QEMU left the dirty bit" "$(patch d.qcow2 get incompatible_features)" 1
cp d.qcow2 copy.qcow2
qemu-img check -q -r all copy.qcow2 >/dev/null 2>&1
guest_raw copy.qcow2 lazy.raw
heals_ok "a killed writer with lazy refcounts" d.qcow2 lazy.raw H01

done_testing
