#!/bin/bash
# An initramfs of busybox, modules and vm/init.
#
#   mkinitramfs.sh OUT MODULES_DIR SUMS
set -eu -o pipefail

out=$1 modules=$2 sums=$3
here=$(cd "$(dirname "$0")" && pwd)
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT

mkdir -p "$tree"/{bin,dev,proc,sys,mnt,modules}
cp "$(command -v busybox)" "$tree/bin/busybox"
cp "$modules"/* "$tree/modules/"
cp "$sums" "$tree/sums"
cp "$here/init" "$tree/init"
chmod 755 "$tree/init" "$tree/bin/busybox"
(cd "$tree" && find . | busybox cpio -o -H newc 2>/dev/null) | gzip -1 >"$out"
