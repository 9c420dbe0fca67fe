#!/bin/bash
# docs/remote.md: a virtual machine boots from the healed far image, mounts it, writes, and what
# it wrote is in the overlay.
. "$(dirname "$0")/../lib.sh"
. "$tests_dir/remote.sh"

far_fs_disk || { fail "image"; done_testing; }
vm_parts sums || { fail "initramfs"; done_testing; }
before=$(sha256 web/vm.qcow2)
web_start

# The page's QEMU, with a kernel of ours, and without what is not asked for.
cat >bin/qemu-system-x86_64 <<EOF
#!/bin/bash
exec $(command -v qemu-system-x86_64) -accel tcg -nodefaults -no-user-config -no-reboot -display none \\
  -serial "file:$tmp/console" -kernel "$vm_kernel" -initrd "$tmp/initramfs" \\
  -append 'console=ttyS0 quiet panic=-1 phase=write' "\$@"
EOF
chmod +x bin/qemu-system-x86_64

page "Keep the repair: an overlay" 1
page "Boot it" 1
matches "it mounts the disk" console 'VM: mounted'
matches "known files are right" console 'VM: known files are right'
matches "it writes" console 'VM: wrote'
ok "its kernel saw no errors" not grep 'VM: kernel saw errors' console
ok "its disk, copied out" run_here copy 'nbdcopy "$disk" out.raw'
ok "passes e2fsck" e2fsck -fn out.raw
kill "$(cat disk.pid)"; gone disk.pid
ok "no errors, no leaks in the healed image" nested_qemu_img_check fix.qcow2
is "the far image is as it was" "$(sha256 web/vm.qcow2)" "$before"
remote_stops

done_testing
