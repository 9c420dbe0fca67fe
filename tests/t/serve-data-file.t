#!/bin/bash
# External data files are opened only as the operator allows; guest data goes there
# and nowhere else, at its guest offset, and healing needs none of it.
. "$(dirname "$0")/../lib.sh"
require_nbd_ops

size=$((9 * 1024 * 1024 + 5 * 512))

data_image ()   # [qemu-img options]
{
  rm -f a.qcow2 d.data
  make_image a.qcow2 $size -o "data_file=d.data$1" && age_image a.qcow2 9216 "$SEED" 40 &&
    guest_raw a.qcow2 disk.raw
}

refused ()      # NAME REGEX ARG...
{
  local name=$1 regex=$2
  shift 2

  SERVE_TIMEOUT=30 ok "$name: refused" not serve "$@"
  matches "$name: the message" err.log "$regex"
}

with_overlays ()        # what QEMU sees through both
{
  printf 'json:{"driver":"qcow2","data-file":{"driver":"qcow2","file":{"driver":"file","filename":"o.qcow2.data"}},'
  printf '"file":{"driver":"qcow2","file":{"driver":"file","filename":"o.qcow2"}}}'
}

# --- the policies

data_image ''
refused "by default" 'external file, "d\.data".*data-file=follow' a.qcow2
refused "data-file=refuse" 'external file, "d\.data".*data-file=follow' a.qcow2 data-file=refuse
refused "data-file=none" 'name the file' a.qcow2 data-file=none
refused "the image as its own data file" 'same file' a.qcow2 data-file=a.qcow2
ok "follow" eval 'serve a.qcow2 data-file=follow --run "$copy_out" && cmp out.raw disk.raw'
mv d.data other.data
refused "one that is not there" 'd\.data.*No such file' a.qcow2 data-file=follow
ok "FILE" eval 'serve a.qcow2 data-file=other.data --run "$copy_out" && cmp out.raw disk.raw'
mv other.data d.data
mkdir sub links
( cd sub && make_image a.qcow2 1M -o data_file=x.data && io a.qcow2 'write -P 5 0 1M' )
# qemu-img wrote the name as it was given: relative to the image.
ln -s ../sub/a.qcow2 links/a.qcow2
ok "the name is relative to where a link leads" \
  serve links/a.qcow2 data-file=follow --run 'qemu-io -r -f raw -c "read -P 5 0 1M" "$uri"'
mkfifo fifo
make_image f.qcow2 1M -o data_file=y.data
python3 - f.qcow2 <<'END'
import sys
b = open(sys.argv[1], "rb").read()
open(sys.argv[1], "r+b").write(b.replace(b"y.data", b"./fifo", 1))
END
refused "a FIFO" '\./fifo' f.qcow2 data-file=follow

# --- used

for kind in '' ,data_file_raw=on ,cluster_size=512 ,extended_l2=on,data_file_raw=on ,lazy_refcounts=on ,refcount_bits=1; do
  name="data file$kind"
  data_image "$kind"
  clusters=$(stat -c %s a.qcow2)
  cp disk.raw model.raw
  ok "$name: read" eval 'serve a.qcow2 data-file=follow report=report.json --run "$copy_out" && cmp out.raw disk.raw'
  is "$name: nothing found" "$(jq -c .findings report.json)" '[]'
  ok "$name: written" serve a.qcow2 data-file=follow --run "'$BUILD/tests/nbd-ops' model \"\$uri\" model.raw $SEED 600 3"
  ok "$name: no errors, no leaks" img_check_clean -f qcow2 a.qcow2
  ok "$name: QEMU reads what was written" qemu-img compare -f qcow2 -F raw a.qcow2 model.raw
  ok "$name: no guest data in the image" test "$(stat -c %s a.qcow2)" -le $((clusters + (1 << 20)))
  case $kind in
    *raw*) ok "$name: it is the guest disk" cmp -n $size d.data model.raw ;;
    *) is "$name: offsets are guest offsets" "$(qemu-img map --output=json a.qcow2 |
         jq '[.[] | select(has ("offset") and .offset != .start)] | length')" 0 ;;
  esac

  # Damaged: the image is healed; both files stay as they are.
  patch a.qcow2 rt-random "$SEED"
  before=$(cat a.qcow2 d.data | sha256sum)
  cp model.raw want.raw
  rm -f o.qcow2 o.qcow2.data
  ok "$name, damaged: read" eval 'serve a.qcow2 data-file=follow --run "$copy_out" && cmp out.raw want.raw'
  ok "$name, damaged: written through overlays" serve a.qcow2 data-file=follow overlay=o.qcow2 \
    --run "'$BUILD/tests/nbd-ops' model \"\$uri\" model.raw $((SEED + 1)) 400 3"
  is "$name, damaged: both files are as they were" "$(cat a.qcow2 d.data | sha256sum)" "$before"
  ok "$name, damaged: no errors, no leaks" eval 'img_check_clean "$(with_overlays)" &&
    img_check_clean -f qcow2 o.qcow2 && img_check_clean -f qcow2 o.qcow2.data'
  ok "$name, damaged: QEMU reads what was written" eval 'qemu-img convert -O raw "$(with_overlays)" n.raw && cmp n.raw model.raw'
  ok "$name, damaged: both overlays are used again" \
    eval 'serve a.qcow2 data-file=follow overlay=o.qcow2 --run "$copy_out" && cmp out.raw model.raw'
done
cp a.qcow2 a0.qcow2
cp d.data d0.data
ok "committed, it is an image again" eval 'qemu-img commit -q -f qcow2 o.qcow2 && qemu-img commit -q -f qcow2 o.qcow2.data &&
  img_check_clean -f qcow2 a.qcow2 && qemu-img compare -f qcow2 -F raw a.qcow2 model.raw'

data_image ''
patch a.qcow2 copied clear l2 all
cp disk.raw model.raw
rm -f o.qcow2*
ok "COPIED flags: mended, written" serve a.qcow2 data-file=follow overlay=o.qcow2 \
  --run "'$BUILD/tests/nbd-ops' model \"\$uri\" model.raw $SEED 300 3"
ok "COPIED flags: no errors, no leaks" img_check_clean "$(with_overlays)"

# --- a data file that is shorter than the disk, or grows a lot

rm -f a.qcow2 d.data o.qcow2*
make_image a.qcow2 2G -o data_file=d.data
ok "a data file of no length yet" serve a.qcow2 data-file=follow --run '
  qemu-io -f raw -c "write -P 1 1900M 1M" -c "read -P 1 1900M 1M" -c "read -P 0 0 1M" "$uri" >io.log && ! grep failed io.log'
ok "a data file of no length yet: QEMU reads it" io a.qcow2 'read -P 1 1900M 1M' 'read -P 0 100M 1M'
truncate -s 0 d.data
ok "cut short: zeros, no crash" serve a.qcow2 data-file=follow --run 'qemu-io -r -f raw -c "read 1900M 1M" "$uri"; true'
rm -f a.qcow2 d.data
make_image a.qcow2 2G -o data_file=d.data
ok "an overlay has room for all of the disk" serve a.qcow2 data-file=follow overlay=o.qcow2 --run '
  qemu-io -f raw -c "write -P 1 1900M 1M" -c "read -P 1 1900M 1M" "$uri" >io.log && ! grep failed io.log'
ok "an overlay has room for all of the disk: QEMU reads it" \
  qemu-io -r -c 'read -P 1 1900M 1M' "$(with_overlays)"

rm -f o.qcow2*
truncate -s 0 d.data
ok "an overlay over a data file cut short has room for all of the disk" \
  serve a.qcow2 data-file=follow overlay=o.qcow2 --run '
  qemu-io -f raw -c "write -P 1 1900M 1M" -c "read -P 1 1900M 1M" "$uri" >io.log && ! grep failed io.log'

# --- locks

data_image ''
server_start s a.qcow2 data-file=follow || fail "server does not start"
ok "while we serve, nobody writes to the data file" not qemu-io -f raw -c 'write 0 64k' d.data
server_stop
ok "afterwards somebody may" qemu-io -f raw -c 'write 0 64k' d.data

done_testing
