#!/bin/bash
# The README's two commands on a Debian 12 that was made from nothing a minute
# ago: a C compiler and make, and no more.
#
#   tests/clean-room.sh [MIRROR]
#
# MIRROR: where debootstrap gets Debian; default: where this system gets it.
# ROOM=DIR keeps and uses again the system in DIR.  Needs root and debootstrap.
set -eu
PATH=$PATH:/usr/sbin:/sbin
top=$(cd "$(dirname "$0")/.." && pwd)

[[ $(id -u) -eq 0 ]] || { echo "clean-room.sh: needs root" >&2; exit 1; }
"$top/tests/deps.sh" --install soak

mirror=${1:-$(sed -n -e 's/^URIs: *\(http[^ ]*\).*/\1/p' -e 's/^deb \(\[[^]]*\] \)\{0,1\}\(http[^ ]*\) .*/\2/p' \
                /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null | head -n 1)}
[[ -n $mirror ]] || { echo "clean-room.sh: no mirror found; name one" >&2; exit 1; }

if [[ -n ${ROOM:-} ]]; then
  mkdir -p "$ROOM"
  room=$(cd "$ROOM" && pwd)
else
  room=$(mktemp -d /var/tmp/qcow2repair-clean-room.XXXXXX)
  chmod 755 "$room"             # its root folder: others than root must get in
  trap 'rm -rf --one-file-system "$room"' EXIT
fi
if [[ ! -e $room/etc/debian_version ]]; then
  debootstrap --variant=minbase --include=gcc,libc6-dev,make bookworm "$room" "$mirror"
fi

# Names and proxies as here, or packages cannot be fetched.
cp /etc/resolv.conf /etc/hosts "$room/etc/"
apt-config dump | grep -E '^Acquire::(http|https)::' >"$room/etc/apt/apt.conf.d/90clean-room" || true

rm -rf "$room/root/qcow2repair"
mkdir -p "$room/root/qcow2repair"
(cd "$top" && git ls-files -z --cached --others --exclude-standard | tar -c --null -T - ) |
  tar -x -C "$room/root/qcow2repair" --no-same-owner

# Mounts and processes of its own: all are gone when the last command ends.
in_room ()
{
  echo "== $*"
  unshare --mount --pid --fork --kill-child bash -c '
    set -eu
    mount --make-rprivate /
    mount -t proc proc "$1/proc"
    mount --rbind /dev "$1/dev"
    mount -t tmpfs tmpfs "$1/tmp"
    room=$1; shift
    exec chroot "$room" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb \
      ${http_proxy:+http_proxy="$http_proxy"} ${https_proxy:+https_proxy="$https_proxy"} \
      bash -c "cd /root/qcow2repair && exec \"\$@\"" bash "$@"' bash "$room" "$@" </dev/null
}

for missing in nbdkit pkg-config python3 qemu-img; do
  [[ -n ${ROOM:-} ]] || ! in_room which $missing || { echo "$missing is there: not a clean room" >&2; exit 1; }
done
in_room make serve SERVE_ARGS="--run 'nbdinfo --no-content \"\$\$uri\"'"
in_room make check
in_room make install
in_room nbdkit qcow2repair --dump-plugin
in_room make uninstall clean
echo "clean room: both commands work"
