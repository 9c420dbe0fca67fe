#!/bin/bash
# Zeros, fast zeros and trims do what they promise, and give clusters back.
. "$(dirname "$0")/../lib.sh"

io_nbd ()       # COMMAND...: for --run
{
  local c s="qemu-io -f raw -d unmap"
  for c; do s="$s -c '$c'"; done
  echo "$s \"\$uri\""
}

# Host clusters of the disk, as QEMU counts them.
allocated ()
{
  qemu-img check --output=json -f qcow2 a.qcow2 | jq '."allocated-clusters" // 0'
}

make_image a.qcow2 16M
io a.qcow2 'write -P 1 0 8M'
ok "zero: whole clusters and parts" serve a.qcow2 --run "$(io_nbd 'write -z 1M 1M' 'write -z 3000k 100k' 'write -z -u 5M 1M')"
ok "zero: reads as zeros, the rest as before" io a.qcow2 'read -P 1 0 1M' 'read -P 0 1M 1M' 'read -P 1 2M 952k' \
  'read -P 0 3000k 100k' 'read -P 1 3100k 2020k' 'read -P 0 5M 1M' 'read -P 1 6M 2M'
ok "zero: no errors, no leaks" img_check_clean -f qcow2 a.qcow2

make_image a.qcow2 16M
io a.qcow2 'write -P 1 0 8M'
ok "trim" serve a.qcow2 --run "$(io_nbd 'discard 1M 1M' 'discard 3000k 100k')"
ok "trim: clusters come back" test "$(allocated)" -le $((128 - 16))
ok "trim: the rest is as before" io a.qcow2 'read -P 1 0 1M' 'read -P 1 2M 952k' 'read -P 1 3136k 5056k'
ok "trim: no errors, no leaks" img_check_clean -f qcow2 a.qcow2
ok "trim: an unallocated disk stays so" serve a.qcow2 --run "$(io_nbd 'discard 8M 8M' 'write -z -u 8M 8M')"
ok "trim: nothing was allocated for it" test "$(allocated)" -le $((128 - 16))

# Clusters given back are used again: the file does not grow for ever.
make_image a.qcow2 64M
size=
for i in 1 2 3 4 5; do
  serve a.qcow2 --run "$(io_nbd 'write -P 7 0 16M' 'discard 0 16M')" >/dev/null || fail "round $i"
  now=$(($(stat -c %s a.qcow2) / 65536))
  [ -n "$size" ] || size=$now
done
ok "given back and used again: $size clusters, then $now" test "$now" -le $((size + 8))

# Version 2 has no zero flag: zeros must be zeros all the same.
make_image a.qcow2 8M -o compat=0.10
io a.qcow2 'write -P 1 0 8M'
ok "version 2: zero and trim" serve a.qcow2 --run "$(io_nbd 'write -z 1M 1M' 'discard 3M 1M' 'write -z -u 5000k 10k')"
ok "version 2: reads as zeros, the rest as before" io a.qcow2 'read -P 1 0 1M' 'read -P 0 1M 1M' 'read -P 1 2M 1M' \
  'read -P 1 4M 904k' 'read -P 0 5000k 10k' 'read -P 1 5010k 2000k'
ok "version 2: no errors, no leaks" img_check_clean -f qcow2 a.qcow2

# A snapshot keeps what is zeroed and trimmed.
make_image a.qcow2 8M -o cluster_size=4k
io a.qcow2 'write -P 1 0 8M'
qemu-img snapshot -c kept a.qcow2
ok "snapshot: zero and trim" serve a.qcow2 --run "$(io_nbd 'write -z 1M 1M' 'discard 3M 1M' 'write -z 5000001 1000')"
qemu-img convert -l snapshot.name=kept -O raw a.qcow2 kept.raw
ok "snapshot: still has it" qemu-io -r -f raw -c 'read -P 1 0 8M' kept.raw
ok "snapshot: no errors, no leaks" img_check_clean -f qcow2 a.qcow2

# A copy onto the served disk: clients zero fast first, then write.
make_image a.qcow2 16M
make_image b.qcow2 16M
age_image b.qcow2 16384 "$SEED" 40
guest_raw b.qcow2 b.raw
ok "nbdcopy onto it" serve a.qcow2 --run 'nbdcopy b.raw "$uri"'
ok "is the same" eval 'guest_raw a.qcow2 n.raw && cmp n.raw b.raw'
io a.qcow2 'write -P 9 0 16M'
ok "nbdcopy --destination-is-zero not given: overwrites all" serve a.qcow2 --run 'nbdcopy b.raw "$uri"'
ok "is the same again" eval 'guest_raw a.qcow2 n.raw && cmp n.raw b.raw'
io a.qcow2 'write -P 9 0 16M'
ok "qemu-img convert onto it" serve a.qcow2 --run 'qemu-img convert -n -f raw -O raw b.raw "$uri"'
ok "is the same once more" eval 'guest_raw a.qcow2 n.raw && cmp n.raw b.raw'
ok "no errors, no leaks" img_check_clean -f qcow2 a.qcow2

done_testing
