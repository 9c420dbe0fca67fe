#!/bin/bash
# docs/remote.md: the overlay over a far image, and what is done with the disk then:
# copied, imported, described to libvirt, read by stock QEMU, kept in a cache, and
# waited for when the line breaks.
. "$(dirname "$0")/../lib.sh"
. "$tests_dir/remote.sh"

make_image images/vm.qcow2 64M
io images/vm.qcow2 'write -P 5 1M 3M' 'write -P 6 60M 1M'
guest_raw images/vm.qcow2 want.raw
patch images/vm.qcow2 rt-zero
cp images/vm.qcow2 web/
before=$(sha256 web/vm.qcow2)
web_start
nbd_start
far="nbd+unix:///?socket=$PWD/far.sock"

keep="Keep the repair: an overlay"
page "$keep" 1
matches "the disk is served" out.log 'export-size: 67108864'
is "the overlay names the far image" "$(qemu-img info -U --output=json fix.qcow2 | jq -r '."backing-filename"')" "$far"

import="Copy it, or import it into KubeVirt, OpenStack and the like"
page "$import" 1
ok "the copy is right" cmp disk.raw want.raw
ok "the qcow2 copy, too" qemu-img compare new.qcow2 want.raw
ok "and the healed image" eval 'img_check_clean healed.qcow2 && qemu-img compare healed.qcow2 want.raw'
page "$import" 2
ok "the volume is right" cmp data/disk.img want.raw

ok "a guest's write to where nothing was" run_here write \
  'qemu-io -f raw -c "write -P 9 20M 1M" -c flush "$disk" | grep "^wrote"'
cp want.raw new.raw
qemu-io -f raw -c 'write -P 9 20M 1M' new.raw >/dev/null

# libvirt: the element is in order, and QEMU can use what it says.
sed -n '/^```xml/,/^```$/p' "$remote_page" | sed '/^```/d' | sed "s,/run/rescue/,$PWD/," >disk.xml
{ echo "<domain type='qemu'><name>rescue</name><memory unit='MiB'>256</memory><os><type>hvm</type></os><devices>"
  cat disk.xml; echo "</devices></domain>"; } >domain.xml
opened_as_in_xml ()
{
  local socket

  socket=$(python3 -c 'import sys, xml.etree.ElementTree as e
d = e.parse (sys.argv[1]).find (".//disk")
assert d.get ("type") == "network" and d.find ("driver").get ("type") == "raw"
assert d.find ("source").get ("protocol") == "nbd"
print (d.find ("source/host").get ("socket"))' domain.xml) &&
    qemu-img compare --image-opts driver=raw,file.driver=raw,file.file.driver=file,file.file.filename=new.raw \
      "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path=$socket"
}
ok "libvirt's XML leads to the disk" opened_as_in_xml
if command -v virt-xml-validate >/dev/null && command -v xmllint >/dev/null; then
  ok "it is valid" virt-xml-validate domain.xml domain
else
  skip "virt-xml-validate, or its xmllint, is not installed"
fi
if command -v virsh >/dev/null; then
  ok "libvirt takes it" virsh -q -c test:///default define domain.xml
else
  skip "virsh is not installed"
fi

# The sockets go, as the page says; the overlay is used again, under another URI.
kill "$(cat disk.pid)"; gone disk.pid; rm disk.sock
ok "stock QEMU: without this plugin" run_here stock "$(page_block "Use it without this plugin" 1)"
matches "stock QEMU: the chain leads to the far image" out.log '^image: nbd\+unix:.*far.sock'
ok "stock QEMU: reads the guest's write, too" cmp disk.raw new.raw
page "Use it without this plugin" 2
is "stock QEMU: found elsewhere" "$(qemu-img info --output=json fix.qcow2 | jq -r '."backing-filename"')" \
  "nbd://127.0.0.1:$nbd_port/vm.qcow2"
ok "used again from elsewhere" run_here again \
  'nbdkit -U - qcow2repair uri=nbd://host/vm.qcow2 overlay=fix.qcow2 --run "nbdcopy \$uri disk.raw"'
ok "with all that is in it" cmp disk.raw new.raw

page "Never read anything twice" 1
ok "the copy by way of the cache" cmp disk.raw new.raw
# Every byte of a file that has been copied is in it, now that nobody answers for the rest.
ok "QEMU reads the far image out of it" eval \
  'qemu-img convert -f qcow2 -O raw vm.cache image.qcow2 && cmp image.qcow2 web/vm.qcow2'

# Broken after some reading, and only there again some time later.
cat >break.sh <<EOF
qemu-io -r -f raw -c 'read 1M 64k' "\$1" >/dev/null
kill -KILL \$(cat far.pid)
rm far.sock
nbdcopy "\$1" disk.raw & copy=\$!
until grep -q 'trying to connect' "$tmp/err.log"; do sleep 0.02; done
nbdkit -U far.sock -P far.pid curl http://127.0.0.1:$web_port/vm.qcow2
wait \$copy
EOF
rm disk.raw
ok "the line breaks, and the copy waits" run_here waits \
  "$(page_block "When the line breaks" 1 | sed 's/nbdcopy "$uri" disk.raw/bash break.sh "$uri"/')"
ok "and gets the right bytes" cmp disk.raw want.raw
matches "which it says" err.log 'connected again'

nbdkit -U disk.sock -P disk.pid qcow2repair uri="$far" overlay=fix.qcow2 2>/dev/null
remember_servers
page "$keep" 2
ok "both have gone" not ls far.sock disk.sock
is "the far image is as it was" "$(sha256 web/vm.qcow2)" "$before"

done_testing
