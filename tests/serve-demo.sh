#!/bin/bash
# The demonstration behind `make serve': heal an image into an overlay, serve the
# guest disk on a private Unix socket until Ctrl-C, and say what to try.
#
#   IMAGE       the image; default: a small one is made here and damaged
#   OVERLAY     where repairs and guest writes go; default: in BUILD/serve
#   SERVE_ARGS  more arguments for nbdkit, quoted as for the shell; with --run in
#               it, that command runs in place of the wait for Ctrl-C
#   PLUGIN, BUILD  from the Makefile
set -eu
PATH=$PATH:/usr/sbin:/sbin

top=$(cd "$(dirname "$0")/.." && pwd)
BUILD=${BUILD:-$top/build}
PLUGIN=${PLUGIN:-$BUILD/nbdkit-qcow2repair-plugin.so}
mkdir -p "$BUILD/serve"
dir=$(cd "$BUILD/serve" && pwd)

# The unsigned big-endian number of LENGTH bytes at OFFSET of FILE.
number ()
{
  od -An -v --endian=big -t "u$3" -j "$2" -N "$3" "$1" | tr -d ' '
}

# A small image with an ext4 file system in it, damaged the way that a host
# crash may leave it: no refcount table, and flags that contradict it.
make_damaged ()
{
  local img=$1 tree=$dir/tree rt l2 i at

  rm -rf "$tree" "$img" "$img.raw"
  mkdir -p "$tree/docs"
  echo 'If you can read this, the disk was served from a damaged image.' >"$tree/hello.txt"
  cp "$top/README.md" "$top"/docs/*.md "$tree/docs/"
  seq 1 100000 >"$tree/numbers.txt"
  truncate -s 64M "$img.raw"
  mke2fs -q -F -t ext4 -L demo -d "$tree" "$img.raw"
  qemu-img convert -f raw -O qcow2 "$img.raw" "$img"
  rm -rf "$tree" "$img.raw"

  rt=$(number "$img" 48 8)
  dd if=/dev/zero of="$img" bs=64k seek=$((rt / 65536)) count=1 conv=notrunc status=none
  l2=$(($(number "$img" "$(number "$img" 40 8)" 8) & 0x00fffffffffffe00))
  for i in 0 1 2 3; do
    at=$((l2 + 8 * i))
    # The highest byte of an entry is 0x80 where the COPIED flag is all there is.
    [[ $(number "$img" $at 1) != 128 ]] || printf '\0' | dd of="$img" bs=1 seek=$at conv=notrunc status=none
  done
}

if [[ -n ${IMAGE:-} ]]; then
  image=$IMAGE
  # One name for each image, so that the writes of last time are found again.
  name=$(basename "$image")-$(realpath -- "$image" | cksum | cut -d ' ' -f 1)
  overlay=${OVERLAY:-$dir/$name.overlay.qcow2}
else
  image=$dir/demo.qcow2
  overlay=${OVERLAY:-$dir/demo.overlay.qcow2}
  exec 9>"$dir/lock"
  flock -n 9 || { echo "make serve is running already, with $image" >&2; exit 1; }
  rm -f "$dir/demo.overlay.qcow2"
  make_damaged "$image"
  echo "Made a small image and damaged it: $image"
fi

eval "set -- ${SERVE_ARGS:-}"
for arg; do
  case $arg in
    --run|--run=*) exec nbdkit -U - "$PLUGIN" file="$image" overlay="$overlay" "$@" ;;
  esac
done

run=$(mktemp -d "${TMPDIR:-/tmp}/qcow2repair-serve.XXXXXX")
nbdkit_pid=
end ()
{
  [[ -z $nbdkit_pid ]] || kill "$nbdkit_pid" 2>/dev/null || true
}
trap 'rm -rf "$run"' EXIT
trap end INT TERM HUP

# nbdkit writes its process id into the pipe once it listens; if it ends before
# that, the other line comes.
mkfifo "$run/ready"
exec 8<>"$run/ready"
nbdkit -f -U "$run/socket" -P "$run/ready" "$PLUGIN" file="$image" overlay="$overlay" "$@" 8<&- &
nbdkit_pid=$!
{ tail --pid=$nbdkit_pid -f /dev/null; echo ended; } >"$run/ready" 8<&- 9<&- &
read -r line <&8
if [[ $line == ended ]]; then
  wait "$nbdkit_pid" || exit
fi

uri="nbd+unix:///?socket=$run/socket"
cat <<END

The guest disk is at:   $uri
Try, in another terminal:
  qemu-img info '$uri'
  nbdcopy '$uri' disk.raw
  qemu-system-x86_64 -m 1G -drive file='$uri',format=raw,if=virtio
Once this has ended:
  qemu-img map '$overlay'      what differs from the image
  qemu-img commit '$overlay'   write it into the image
The image itself is not changed: $image
Ctrl-C ends this.
END
# The first wait ends with the signal, the second with nbdkit.
wait "$nbdkit_pid" || wait "$nbdkit_pid" || true
