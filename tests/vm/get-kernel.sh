#!/bin/bash
# Debian's kernel for virtual machines, unpacked into a folder: DIR/vmlinuz and
# DIR/modules/*.ko, those that a virtio disk needs.  Nothing is installed.
#
#   get-kernel.sh DIR
set -eu -o pipefail

dir=$1
[ ! -e "$dir/vmlinuz" ] || exit 0
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
tmp=$(mktemp -d "$dir/tmp.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
chmod 755 .

arch=$(dpkg --print-architecture)
find_package ()
{
  apt-cache depends "linux-image-cloud-$arch" 2>/dev/null | sed -n 's/^ *Depends: *\(linux-image-[0-9].*\)/\1/p' | head -n 1
}
package=$(find_package)
if [ -z "$package" ]; then
  apt-get -q update </dev/null >/dev/null
  package=$(find_package)
fi
[ -n "$package" ] || { echo "apt knows no linux-image-cloud-$arch" >&2; exit 1; }
apt-get -q download "$package" </dev/null >/dev/null 2>apt.log ||
  { apt-get -q update </dev/null >/dev/null && apt-get -q download "$package" </dev/null >/dev/null; } ||
  { cat apt.log >&2; exit 1; }

dpkg-deb -x ./*.deb tree
mkdir modules
find tree/lib/modules -name 'virtio*.ko*' -o -name 'ext4.ko*' -o -name 'jbd2.ko*' -o -name 'mbcache.ko*' \
  -o -name 'crc16.ko*' -o -name 'crc32c*.ko*' -o -name 'libcrc32c.ko*' | while read -r f; do
  cp "$f" modules/
done
rm -rf "$dir/modules"
mv modules "$dir/modules"
mv tree/boot/vmlinuz-* "$dir/vmlinuz"    # last: it says that all is there
