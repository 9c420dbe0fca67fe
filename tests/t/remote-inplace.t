#!/bin/bash
# docs/remote.md: a repair is written into the far image, over SSH; a guest that has added
# more than there is room for is told so before anything is written.
. "$(dirname "$0")/../lib.sh"
. "$tests_dir/remote.sh"

ssh_start || { diag "no SSH ($why): the far image is a file's export"; without_ssh=1; }
export HOME=$tmp
unset XDG_STATE_HOME
section="Write the repair into the far image"

make_image images/vm.qcow2 64M
io images/vm.qcow2 'write -P 5 1M 3M'
guest_raw images/vm.qcow2 want.raw
patch images/vm.qcow2 rt-zero
truncate -s +100 images/vm.qcow2        # no whole sectors, as after a crash
cp images/vm.qcow2 damaged.qcow2
size=$(stat -c %s damaged.qcow2)

page "$section" 1
matches "it says so" err.log 'committed to the image'
ok "QEMU finds it sound" img_check_clean images/vm.qcow2
ok "the disk is right" qemu-img compare images/vm.qcow2 want.raw
is "it is as long as it was" "$(stat -c %s images/vm.qcow2)" "$size"
is "nothing is left in the state folder" "$(ls .local/state/qcow2repair)" ""

# By way of an overlay that is there.
cp damaged.qcow2 images/vm.qcow2
ok "an overlay is made first" run_here overlay 'nbdkit -U - qcow2repair uri="$far" overlay=fix.qcow2 --run true'
ok "the far image is as it was" cmp images/vm.qcow2 damaged.qcow2
cp fix.qcow2 kept.qcow2
page "$section" 2
ok "QEMU finds it sound again" img_check_clean images/vm.qcow2
ok "the overlay has gone" not ls fix.qcow2
cp damaged.qcow2 images/vm.qcow2
cp kept.qcow2 fix.qcow2
ok "qemu-img commit does the same" run_here commit 'qemu-img commit fix.qcow2'
ok "QEMU finds it sound once more" img_check_clean images/vm.qcow2

# What a guest adds finds room in the overlay, though not in the far image.
cp damaged.qcow2 images/vm.qcow2
cp kept.qcow2 fix.qcow2
ok "a guest writes more" run_here write \
  'nbdkit -U - qcow2repair uri="$far" overlay=fix.qcow2 --run "qemu-io -f raw -c \"write -P 9 20M 4M\" \$uri"'
ok "that is refused in place" not run_here inplace "$(page_block "$section" 2)"
matches "and why" err.log 'cannot grow'
ok "nothing was written" cmp images/vm.qcow2 damaged.qcow2
ok "nothing has begun" not ls .local/state/qcow2repair/*journal
ok "the healed image can be fetched" run_here fetch \
  'nbdkit -U - qcow2repair uri="$far" overlay=fix.qcow2 --run "nbdcopy \"nbd+unix:///healed.qcow2?socket=\$unixsocket\" h.qcow2"'
ok "it is sound" img_check_clean h.qcow2
ok "with what the guest wrote" eval 'qemu-io -r -f qcow2 -c "read -P 9 20M 4M" h.qcow2 | grep "^read"'

# A server that is read-only.
remote_stops
ok "a far image that is read-only" not run_here readonly \
  'nbdkit -r -U far.sock -P far.pid file images/vm.qcow2; nbdkit -U - qcow2repair uri="$far" inplace=true --run true'
matches "is refused" err.log 'the export is read-only'
remote_stops

done_testing
