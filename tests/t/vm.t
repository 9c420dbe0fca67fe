#!/bin/bash
# A VM boots from a damaged image: over NBD, healed into an overlay, it mounts the
# disk, reads, writes and switches off; at the next start what it wrote is there.
PATH=$PATH:/usr/sbin:/sbin
. "$(dirname "$0")/../lib.sh"
require qemu-system-x86_64 busybox e2fsck mke2fs apt-get dpkg-deb
busybox cpio --help >/dev/null 2>&1 || skip_all "this busybox has no cpio"
[ "$(uname -m)" = x86_64 ] || skip_all "the kernel package is for amd64"

kernel=${QR_VM_CACHE:-$BUILD/vm-cache}
timeout 300 "$tests_dir/vm/get-kernel.sh" "$kernel" >kernel.log 2>&1 ||
  skip_all "no kernel: $(tail -n 1 kernel.log)"

make_fs_image d.qcow2 96M || { fail "image"; done_testing; }
grep -v numbers d.qcow2.sums >sums
"$tests_dir/vm/mkinitramfs.sh" initramfs "$kernel/modules" sums || { fail "initramfs"; done_testing; }

# Nothing that is not asked for.
machine=(qemu-system-x86_64 -m 256 -nodefaults -no-user-config -no-reboot -display none
         -kernel "$kernel/vmlinuz" -initrd initramfs)

# A machine may have /dev/kvm and not be able to use it: the kernel has to come up
# with it, and at once, or it is emulated.
kvm_works ()
{
  local line works=1

  [ -w /dev/kvm ] || return
  mkfifo probe.fifo
  exec 6<>probe.fifo
  "${machine[@]}" -accel kvm -serial stdio -append 'console=ttyS0 quiet panic=-1 phase=probe' \
    </dev/null >&6 2>&1 &
  while read -r -t 20 line <&6; do
    case $line in
      *'VM: up'*) works=0; break ;;
      *'internal error'*|*Assertion*|*failed*) break ;;
    esac
  done
  kill -KILL $! 2>/dev/null
  wait $! 2>/dev/null
  exec 6<&-
  return $works
}

accel=tcg
kvm_works && accel=kvm
diag "accelerator: $accel"

# vm NAME PHASE: one boot; its console in NAME.console.
vm ()
{
  timeout -k 5 300 "${machine[@]}" -accel $accel \
    -serial "file:$1.console" -append "console=ttyS0 quiet panic=-1 phase=$2" \
    -blockdev driver=nbd,node-name=d,server.type=unix,server.path="$tmp/s.sock",discard=unmap \
    -device virtio-blk-pci,drive=d >qemu.log 2>&1 || { cat qemu.log "$1.console"; return 1; }
}

patch d.qcow2 copied clear l2 all + rt-zero
before=$(sha256 d.qcow2)

ok "a damaged image is served" server_start s d.qcow2 overlay=o.qcow2
ok "the VM boots and ends" vm first write
matches "it mounts the disk" first.console 'VM: mounted'
matches "known files are right" first.console 'VM: known files are right'
matches "it writes" first.console 'VM: wrote'
matches "and unmounts" first.console 'VM: unmounted'
ok "its kernel saw no errors" not grep 'VM: kernel saw errors' first.console
server_stop
is "the server ended well" "$(cat s.exit)" 0
is "the image is as it was" "$(sha256 d.qcow2)" "$before"
ok "no errors, no leaks in the healed image" nested_qemu_img_check o.qcow2

ok "the overlay is used again" server_start s d.qcow2 overlay=o.qcow2
ok "the VM boots and ends again" vm second read
matches "known files are right again" second.console 'VM: known files are right'
matches "it finds what it wrote" second.console 'VM: found what was written'
ok "its kernel saw no errors again" not grep 'VM: kernel saw errors' second.console
server_stop

is "the image is as it was to the end" "$(sha256 d.qcow2)" "$before"
ok "no errors, no leaks at the end" nested_qemu_img_check o.qcow2
ok "its disk, copied out" serve d.qcow2 overlay=o.qcow2 --run "$copy_out"
ok "passes e2fsck" e2fsck -fn out.raw
ok "QEMU reads the same" eval 'nested_convert o.qcow2 n.raw && cmp n.raw out.raw'

done_testing
