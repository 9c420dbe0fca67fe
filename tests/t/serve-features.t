#!/bin/bash
# Each feature of the format is served, read and write, and left right for QEMU;
# what cannot be served (a key is missing, the feature is unknown) is named, and what
# is not understood is kept.
. "$(dirname "$0")/../lib.sh"
require_nbd_ops

follow=(backing=follow data-file=follow)

counted_right ()        # NAME
{
  # Its refcounts are right: whoever cannot count it would call them wrong.
  is "$1: no errors were seen" "$(jq '.corruptions // 0' report.json)" 0
  is "$1: no leaks were seen" "$(jq '.leaks // 0' report.json)" 0
}

# Read right, and written to right.
served ()       # NAME
{
  guest_raw f.qcow2 f.raw
  rm -f report.json
  ok "$1: served" serve f.qcow2 report=report.json "${follow[@]}" --run "$copy_out"
  counted_right "$1"
  ok "$1: guest bytes are right" cmp out.raw f.raw
  ok "$1: the guest works on it" serve f.qcow2 "${follow[@]}" \
    --run "'$BUILD/tests/nbd-ops' model \"\$uri\" f.raw $SEED 300"
  ok "$1: no errors, no leaks" img_check_clean -f qcow2 f.qcow2
  ok "$1: QEMU reads what was written" eval 'guest_raw f.qcow2 n.raw && cmp n.raw f.raw'
}

refused ()      # NAME REGEX [ARG...]
{
  local name=$1 regex=$2 before
  shift 2

  before=$(sha256 f.qcow2)
  SERVE_TIMEOUT=20 ok "$name: refused" not serve f.qcow2 "$@"
  matches "$name: named" err.log "$regex"
  is "$name: the image is as it was" "$(sha256 f.qcow2)" "$before"
}

make_image base.qcow2 8M
age_image base.qcow2 8192 "$SEED" 30

qemu-img convert -c -O qcow2 base.qcow2 f.qcow2
served "compressed clusters"
qemu-img convert -c -O qcow2 -o compression_type=zstd base.qcow2 f.qcow2
served "compressed clusters, zstd"
qemu-img convert -c -O qcow2 -o cluster_size=4k base.qcow2 f.qcow2
qemu-img snapshot -c s f.qcow2
io f.qcow2 'write -P 1 0 8M'
served "compressed clusters in a snapshot only"
make_image f.qcow2 8M -o extended_l2=on
age_image f.qcow2 8192 "$SEED" 30
served "extended L2 entries"
make_image f.qcow2 8M -o lazy_refcounts=on
age_image f.qcow2 8192 "$SEED" 30
served "lazy refcounts"
rm -f f.qcow2
qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 f.qcow2
io f.qcow2 'write -P 1 0 1M'
refused "backing file, by default" 'base\.qcow2.*backing=' report=report.json
counted_right "backing file, by default"
served "backing file"
rm -f f.qcow2
make_image f.qcow2 8M -o data_file=f.data
io f.qcow2 'write -P 1 0 1M'
refused "external data file, by default" 'f\.data.*data-file=' report=report.json
counted_right "external data file, by default"
served "external data file"
make_image f.qcow2 8M -o data_file=f2.data,data_file_raw=on
age_image f.qcow2 8192 "$SEED" 30
served "raw external data file"
ok "raw external data file: is the guest disk" cmp f2.data f.raw
# Files that an image names are not opened.
rm -f f.qcow2
qemu-img create -q -f qcow2 -u -b /nowhere/base.qcow2 -F qcow2 f.qcow2 8M
refused "backing file that is not there" '/nowhere/base\.qcow2'

make_image f.qcow2 8M -o compat=0.10
age_image f.qcow2 8192 "$SEED" 30
qemu-img snapshot -c s f.qcow2
served "version 2"
is "version 2: stays it" "$(patch f.qcow2 get version)" 2
# Readers of its time do not know bit 0.
is "version 2: no zero flag" "$(patch f.qcow2 l2-all | grep -c '[13579bdf]$')" 0

# Larger than the tables need, smaller than the device it lies on.
make_image f.qcow2 8M
age_image f.qcow2 8192 "$SEED" 30
truncate -s +10M f.qcow2
served "room behind the image"
qemu-img convert -q -f qcow2 -O qcow2 -o cluster_size=512,refcount_bits=64 base.qcow2 f.qcow2
served "a refcount table of many clusters"

# --- encryption: everything but the guest's bytes

for format in luks aes; do
  secret=(--object secret,id=s,data=abc)
  opts="driver=qcow2,encrypt.format=$format,encrypt.key-secret=s,file.filename"
  rm -f f.qcow2 o.qcow2 h.qcow2
  create_encrypted $format abc f.qcow2 8M || { skip "$format: this qemu-img does not create it"; continue; }
  qemu-io "${secret[@]}" --image-opts "$opts=f.qcow2" -c 'write -P 5 0 1M' -c 'write -P 6 3M 2M' >/dev/null
  qemu-img snapshot "${secret[@]}" --image-opts "$opts=f.qcow2" -c s 2>/dev/null
  qemu-io "${secret[@]}" --image-opts "$opts=f.qcow2" -c 'write -P 7 3M 1M' >/dev/null
  qemu-img convert "${secret[@]}" --image-opts -O raw "$opts=f.qcow2" f.raw
  ok "$format, sound: the server starts" serve f.qcow2 report=report.json
  counted_right "$format, sound"
  before=$(sha256 f.qcow2)
  ok "$format: the guest disk is not served" serve f.qcow2 --run '! nbdinfo "$uri"'
  matches "$format: the message" err.log 'error:.*encrypted.*no key'
  ok "$format: nor a snapshot" serve f.qcow2 --run '! nbdinfo "nbd+unix:///snapshot/s?socket=$unixsocket"'
  is "$format: the image is as it was" "$(sha256 f.qcow2)" "$before"

  patch f.qcow2 rt-zero
  before=$(sha256 f.qcow2)
  ok "$format, damaged: the healed image is served" \
    serve f.qcow2 --run 'nbdcopy "nbd+unix:///healed.qcow2?socket=$unixsocket" h.qcow2'
  ok "$format, damaged: QEMU finds no errors, no leaks" img_check_clean "${secret[@]}" --image-opts "$opts=h.qcow2"
  ok "$format, damaged: QEMU decrypts it" eval \
    'qemu-img convert "${secret[@]}" --image-opts -O raw "$opts=h.qcow2" h.raw && cmp h.raw f.raw'
  ok "$format, damaged: healed into an overlay" serve f.qcow2 overlay=o.qcow2
  ok "$format, damaged: the overlay, applied, is right" eval 'healed_file o.qcow2 h2.qcow2 && cmp h2.qcow2 h.qcow2 ||
    img_check_clean "${secret[@]}" --image-opts "$opts=h2.qcow2"'
  is "$format, damaged: the image is as it was" "$(sha256 f.qcow2)" "$before"
done

# --- what is not known

make_image f.qcow2 1M
patch f.qcow2 set incompatible_features=0x40
refused "an unknown feature" '\b6\b|0x40'
# Its name, if the image tells: type 0, bit 6.  The table is the first extension.
name_feature ()  # NAME IN HEX
{
  patch f.qcow2 write "$(($(patch f.qcow2 get header_length) + 8))" "0006${1}00"
}
name_feature "$(printf 'frobnication' | od -An -tx1 | tr -d ' \n')"
refused "an unknown feature with a name" 'frobnication'
name_feature "$(printf 'frob\033[2Jbing' | od -An -tx1 | tr -d ' \n')"
refused "a name with control characters" 'frob.*bing'
ok "a name with control characters: not printed" not grep -q "$(printf '\033')" err.log

make_image f.qcow2 1M
patch f.qcow2 set version=4
refused "version 4" 'version 4'
make_image f.qcow2 1M
patch f.qcow2 set version=1
refused "version 1" 'version 1'

make_image f.qcow2 8M
age_image f.qcow2 8192 "$SEED" 30
patch f.qcow2 set autoclear_features=0x20 compatible_features=0x80 + add-ext 0x12345678 68656c6c6f
before=$(sha256 f.qcow2)
ok "unknown autoclear bit: read" serve f.qcow2 --run "$copy_out"
is "unknown autoclear bit: reading changes nothing" "$(sha256 f.qcow2)" "$before"
ok "unknown autoclear bit: starts" server_start s f.qcow2
ok "unknown autoclear bit: written" qemu-io -f raw -c 'write -P 3 1M 64k' -c flush "$server_uri"
is "unknown autoclear bit: gone with the first write" "$(patch f.qcow2 get autoclear_features)" 0
server_stop KILL
is "unknown compatible bit: kept" "$(patch f.qcow2 get compatible_features)" $((0x80))
is "unknown extension: kept" "$(patch f.qcow2 ext 0x12345678)" 68656c6c6f
patch f.qcow2 rt-zero
rm -f o.qcow2
ok "unknown extension: healed" serve f.qcow2 overlay=o.qcow2
healed_file o.qcow2 h.qcow2
is "unknown extension: kept when healed" "$(patch h.qcow2 ext 0x12345678)" 68656c6c6f

done_testing
