#!/bin/bash
# Who may not read the image may not read the overlay, which holds the guest's data.
. "$(dirname "$0")/../lib.sh"

umask 022
make_image d.qcow2 8M
chmod 600 d.qcow2
ok "a private image: served" serve d.qcow2 overlay=private
is "its overlay is private" "$(stat -c %a private)" 600
chmod 444 d.qcow2
ok "a read-only image: served" serve d.qcow2 overlay=readonly --run \
  'qemu-io -f raw -c "write 0 64k" "$uri"'
is "its overlay can be written to, by its owner" "$(stat -c %a readonly)" 644
done_testing
