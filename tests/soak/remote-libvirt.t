#!/bin/bash
# docs/remote.md: libvirt runs a virtual machine whose disk is described as on the page.
. "$(dirname "$0")/../lib.sh"
. "$tests_dir/remote.sh"
require virt-qemu-run setpriv

far_fs_disk || { fail "image"; done_testing; }
vm_parts sums || { fail "initramfs"; done_testing; }
web_start
page "Keep the repair: an overlay" 1

# Whoever runs it must be let in; libvirt wants root's QEMU to be another user's.
mkdir run
cp "$vm_kernel" run/vmlinuz
cp initramfs run/
as=()
if [ "$(id -u)" = 0 ]; then
  as=(setpriv --reuid 65534 --regid 65534 --clear-groups)
  chmod 711 "$tmp"
  chown 65534:65534 run disk.sock
fi

{ cat <<EOF
<domain type='qemu'>
  <name>rescue</name>
  <memory unit='MiB'>256</memory>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>$tmp/run/vmlinuz</kernel>
    <initrd>$tmp/run/initramfs</initrd>
    <cmdline>console=ttyS0 quiet panic=-1 phase=write</cmdline>
  </os>
  <features><acpi/></features>
  <on_poweroff>destroy</on_poweroff>
  <devices>
    <emulator>$(command -v qemu-system-x86_64)</emulator>
    <serial type='file'><source path='$tmp/run/console'/></serial>
EOF
  sed -n '/^```xml/,/^```$/p' "$remote_page" | sed '/^```/d' | sed "s,/run/rescue/,$tmp/,"
  echo "</devices></domain>"; } >domain.xml
chmod 644 domain.xml

# Until the guest has unmounted: not everywhere does libvirt see it switch off.
run_until_unmounted ()
{
  local n

  timeout -k 5 300 "${as[@]}" env -u XDG_STATE_HOME HOME="$tmp/run" XDG_RUNTIME_DIR="$tmp/run" \
    virt-qemu-run --root="$tmp/run/root" "$tmp/domain.xml" >run.log 2>&1 </dev/null &
  for ((n = 0; n < 1500; n++)); do
    grep 'VM: unmounted' run/console >/dev/null 2>&1 && break
    kill -0 $! 2>/dev/null || break
    sleep 0.2
  done
  kill $! 2>/dev/null
  wait $! 2>/dev/null
  cat run.log
  grep 'VM: unmounted' run/console
}

ok "libvirt runs it" run_until_unmounted
matches "it mounts the disk" run/console 'VM: mounted'
matches "known files are right" run/console 'VM: known files are right'
matches "it writes" run/console 'VM: wrote'
remote_stops
ok "no errors, no leaks in the healed image" run_here check "nbdkit -U far.sock -P far.pid curl https://host/vm.qcow2
  qemu-img check '$(nested fix.qcow2 | sed 's/^/json:/')'"
remote_stops

done_testing
