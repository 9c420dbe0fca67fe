#!/bin/bash
# Files behind an image may be far: named by the image (backing=follow) or by the operator, raw or
# qcow2, damaged or not; and so may an image whose backing file is here.
. "$(dirname "$0")/../lib.sh"
. "$tests_dir/far.sh"
require_uri

make_image base.qcow2 16M
io base.qcow2 'write -P 1 0 8M' 'write -P 2 12M 1M'
qemu-img convert -O raw base.qcow2 base.raw
far_qemu base.qcow2 || exit 1
uri=nbd+unix:///?socket=$far_sock
served () { serve "$@" --run 'nbdcopy "$uri" out.raw' && cmp out.raw want.raw; }
over () { qemu-img create -q -f qcow2 -b "$uri" -F "$1" top.qcow2 16M && io top.qcow2 'write -P 7 1M 1M' 'write -z 12M 64k'; }
want () { qemu-img convert -O raw top.qcow2 want.raw; }

over qcow2; want
ok "not opened unasked" not served top.qcow2
ok "and it says what allows it" grep -q 'backing=follow' err.log
ok "backing=follow" served top.qcow2 backing=follow
ok "backing=URI" served top.qcow2 backing="$uri"
ok "backing=qcow2:URI" served top.qcow2 backing="qcow2:$uri"

# As the disk that it is: raw.
far_stop
far_qemu base.raw || exit 1
over raw; want
ok "raw, backing=follow" served top.qcow2 backing=follow
ok "raw, backing=raw:URI" served top.qcow2 backing="raw:$uri"
ok "holes come through" serve top.qcow2 backing=follow --run 'nbdinfo --map --totals "$uri" >map'
ok "and are some" grep -q 'hole' map

# A damaged one is healed in memory.
far_stop
cp base.qcow2 bad.qcow2
patch bad.qcow2 rt-zero
before=$(sha256 bad.qcow2)
far_qemu bad.qcow2 || exit 1
over qcow2 2>/dev/null
qemu-img create -q -u -f qcow2 -b "$uri" -F qcow2 top.qcow2 16M
cp base.raw want.raw
ok "damaged, healed in memory" served top.qcow2 backing=follow report=report.json
is "and reported" "$(jq -r '."backing-chain"[0].filename' report.json)" "$uri"
is "it is as it was" "$(sha256 bad.qcow2)" "$before"

# The image itself is far, what is behind it here; and its names mean nothing there.
far_stop
qemu-img create -q -f qcow2 -b "$PWD/base.qcow2" -F qcow2 top.qcow2
cp top.qcow2 rel.qcow2
qemu-img rebase -u -b base.qcow2 -F qcow2 rel.qcow2
far_qemu top.qcow2 || exit 1
cp base.raw want.raw
ok "far over here" served uri="$uri" backing=follow
far_stop
far_qemu rel.qcow2 || exit 1
ok "a relative name is refused" not served uri="$uri" backing=follow
ok "and it says why" grep -q 'NBD export lies in none' err.log
ok "backing=FILE helps" served uri="$uri" backing=base.qcow2
far_stop

# An image that is its own backing file.
qemu-img create -q -u -f qcow2 -b "$uri" -F qcow2 loop.qcow2 16M
far_qemu loop.qcow2 || exit 1
ok "a loop is refused" not served uri="$uri" backing=follow
ok "as what it is" grep -q 'loop' err.log

# Other protocols are not spoken, and not by way of a name in an image.
far_stop
for name in https://example.com/x ssh://example.com/x 'json:{"driver":"nbd"}' nbd:localhost:1; do
  qemu-img create -q -u -f qcow2 -b "$name" -F raw other.qcow2 16M
  ok "$name is refused" not served other.qcow2 backing=follow
  ok "$name: and it says what could be" grep -q 'URI of an NBD export' err.log
done
# Nor may a name in an image make us read keys of this machine.
qemu-img create -q -u -f qcow2 -b "nbds+unix://me@/?socket=$far_sock&tls-psk-file=/etc/passwd" -F raw other.qcow2 16M
ok "an image may not name local files" not served other.qcow2 backing=follow
ok "libnbd says so" grep -qi 'not permitted\|local file' err.log

done_testing
