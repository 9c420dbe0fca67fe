#!/bin/bash
# Used clusters whose refcount says "free" are never handed out, neither to new
# refcount structures nor to the guest.
. "$(dirname "$0")/../lib.sh"
require_nbd_ops

make_image base.qcow2 24M -o cluster_size=4k
io base.qcow2 'write -P 9 0 20M'        # three refcount blocks' worth
age_image base.qcow2 24576 "$SEED" 120
guest_raw base.qcow2 base.raw

never_handed_out ()     # NAME PATCH COMMAND...
{
  local name=$1
  shift

  cp base.qcow2 d.qcow2
  patch d.qcow2 "$@"
  heals_ok "$name" d.qcow2 base.raw || return
  cp base.raw model.raw
  ok "$name: guest writes, healed and served again" \
    serve d.qcow2 overlay=d.qcow2.overlay --run "'$BUILD/tests/nbd-ops' model \"\$uri\" model.raw $SEED 600"
  ok "$name: QEMU finds no errors and no leaks afterwards" nested_qemu_img_check d.qcow2.overlay
  ok "$name: QEMU reads what the guest wrote" eval 'nested_convert d.qcow2.overlay n.raw && cmp n.raw model.raw'
}

clusters=$(patch base.qcow2 get clusters)
l1=$(($(patch base.qcow2 get l1_table_offset) / 4096))
l2=$((($(patch base.qcow2 l1 0) & 0x00fffffffffffe00) / 4096))
rt=$(($(patch base.qcow2 get refcount_table_offset) / 4096))

never_handed_out "the header's cluster"   refcount 0 0
never_handed_out "the L1 table's"         refcount "$l1" 0
never_handed_out "an L2 table's"          refcount "$l2" 0
never_handed_out "the refcount table's"   refcount "$rt" 0
never_handed_out "every cluster's"        refcounts 0 "$((clusters < 2048 ? clusters : 2048))" 0
# The range that a new block must cover is full of used clusters.
never_handed_out "a lost block's whole range" rt-entry 1 0
never_handed_out "first and second range" rt-entry 0 0 + rb-zero 1

done_testing
