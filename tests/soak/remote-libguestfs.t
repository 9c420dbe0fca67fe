#!/bin/bash
# docs/remote.md: libguestfs looks into the healed far image.
. "$(dirname "$0")/../lib.sh"
. "$tests_dir/remote.sh"
require guestfish

far_fs_disk || { fail "image"; done_testing; }
web_start
# One on which KVM is there but does not work stops it.
export LIBGUESTFS_BACKEND=direct LIBGUESTFS_BACKEND_SETTINGS=force_tcg
LIBGUESTFS_CACHEDIR=$tmp timeout 600 guestfish -N disk exit >first.log 2>&1 ||
  skip_all "libguestfs does not start here: $(tail -n 1 first.log)"
export LIBGUESTFS_CACHEDIR=$tmp SERVE_TIMEOUT=600

page "Keep the repair: an overlay" 1
# Here the whole disk is the file system, and its folder is another.
page_names='s|/dev/sda1|/dev/sda|; s|copy-out /home|copy-out /dir|'
page "libguestfs" 1
matches "the file system is found" out.log '/dev/sda: ext4'
ok "files are right" eval 'grep "dir/" sums | sha256sum -c'
remote_stops

done_testing
