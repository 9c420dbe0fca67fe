#!/bin/bash
# Backing files are opened only as the operator allows, read-only, each checked and
# healed in memory; what shows through them is what stock QEMU shows.
. "$(dirname "$0")/../lib.sh"
require qemu-nbd
require_nbd_ops

base ()         # FILE KIB: something that is nowhere zero
{
  rm -f "$1"
  make_image "$1" "$2k" && io "$1" "write -P 0xba 0 $2k" && age_image "$1" "$2" "$SEED" 20
}

over ()         # IMAGE BASE FORMAT [SIZE]
{
  rm -f "$1"
  qemu-img create -q -f qcow2 -b "$2" -F "$3" "$1" ${4:+"$4"}
}

same_as_qemu () # IMAGE ARG...
{
  guest_raw "$1" want.raw && serve "$@" --run "$copy_out" && cmp out.raw want.raw
}

refused ()      # NAME REGEX ARG...
{
  local name=$1 regex=$2
  shift 2

  SERVE_TIMEOUT=30 ok "$name: refused" not serve "$@"
  matches "$name: the message" err.log "$regex"
}

base b.qcow2 4096
qemu-img convert -O raw b.qcow2 b.raw
over a.qcow2 b.qcow2 qcow2
io a.qcow2 'write -P 1 64k 100k' 'write -z 300k 70k' 'discard 1M 64k'

# --- the policies

refused "by default" 'backing file, "b\.qcow2".*backing=follow' a.qcow2
refused "backing=refuse" 'backing file, "b\.qcow2".*backing=follow' a.qcow2 backing=refuse
ok "follow: QEMU reads the same" same_as_qemu a.qcow2 backing=follow
ok "follow: writable" serve a.qcow2 backing=follow --run '! nbdinfo --is read-only "$uri"'
qemu-img convert -O raw 'json:{"driver":"qcow2","backing":null,"file":{"driver":"file","filename":"a.qcow2"}}' none.raw
ok "none: zeros in its place" eval 'serve a.qcow2 backing=none --run "$copy_out" && cmp out.raw none.raw'
mv b.qcow2 other.qcow2
refused "a base that is not there" 'a\.qcow2.*b\.qcow2.*No such file' a.qcow2 backing=follow
ok "none: the base need not be there" serve a.qcow2 backing=none
ok "FILE: another one" eval 'serve a.qcow2 backing=other.qcow2 --run "$copy_out" && cmp out.raw want.raw'
ok "raw:FILE: of another format" eval 'serve a.qcow2 backing=raw:b.raw --run "$copy_out" && cmp out.raw want.raw'
ok "qcow2:FILE" eval 'serve a.qcow2 backing=qcow2:other.qcow2 --run "$copy_out" && cmp out.raw want.raw'
refused "FILE that is not there" 'nowhere' a.qcow2 backing=nowhere
mv other.qcow2 b.qcow2

# Whoever opens this waits for ever.
mkfifo fifo
qemu-img create -q -f qcow2 -u -b fifo -F raw f.qcow2 1M
refused "a FIFO, not opened" '"fifo"' f.qcow2
refused "a FIFO, followed" 'fifo' f.qcow2 backing=follow

# --- formats

over r.qcow2 b.raw raw
ok "raw base" same_as_qemu r.qcow2 backing=follow
# What is in a raw disk must not be taken for an image, whatever it looks like.
cp b.qcow2 trap.raw
over t.qcow2 trap.raw raw
ok "a raw base that looks like an image stays raw" same_as_qemu t.qcow2 backing=follow
patch t.qcow2 write "$(patch t.qcow2 get header_length)" 11223344
refused "no format: not probed" 'guess.*backing=(qcow2|raw):' t.qcow2 backing=follow
refused "no format, FILE: not probed" 'guess.*backing=(qcow2|raw):' t.qcow2 backing=trap.raw
ok "no format, raw:FILE" eval 'serve t.qcow2 backing=raw:trap.raw --run "$copy_out" && cmp out.raw want.raw'
# As QEMU sees the whole of b, cut or filled to the size of t.
truncate -s "$(patch t.qcow2 get size)" b.raw
ok "no format, qcow2:FILE" eval 'serve t.qcow2 backing=qcow2:trap.raw --run "$copy_out" && cmp out.raw b.raw'
qemu-img create -q -f qcow2 -u -b x.vmdk -F vmdk f.qcow2 1M
refused "another format" 'vmdk' f.qcow2 backing=follow
qemu-img create -q -f qcow2 -u -b nbd://localhost/x -F raw f.qcow2 1M
refused "a protocol" 'nbd://localhost/x' f.qcow2 backing=follow
qemu-img create -q -f qcow2 -u -b 'json:{"driver":"file","filename":"b.raw"}' -F raw f.qcow2 1M
refused "a json: name is not interpreted" 'json:' f.qcow2 backing=follow

# --- shapes

for kib in 1500 9000; do
  base s.qcow2 $kib
  over a2.qcow2 s.qcow2 qcow2 4M
  io a2.qcow2 'write -P 3 1k 3k' 'write -P 4 1400k 200k' 'write -P 5 3M 1k'
  ok "base of $kib KiB under 4 MiB" same_as_qemu a2.qcow2 backing=follow
  cp want.raw model.raw
  ok "base of $kib KiB under 4 MiB: written" \
    serve a2.qcow2 backing=follow --run "'$BUILD/tests/nbd-ops' model \"\$uri\" model.raw $SEED 500"
  ok "base of $kib KiB under 4 MiB: QEMU reads the same" eval 'guest_raw a2.qcow2 out.raw && cmp out.raw model.raw'
  ok "base of $kib KiB under 4 MiB: no errors, no leaks" img_check_clean -f qcow2 a2.qcow2
done

# A base that is shorter than what is under it cuts it off: zeros, not the lowest's data.
over m.qcow2 b.qcow2 qcow2 1M
over h.qcow2 m.qcow2 qcow2 3M
ok "a short one in the middle" same_as_qemu h.qcow2 backing=follow

cp b.qcow2 c0.qcow2
for ((i = 1; i <= 65; i++)); do
  qemu-img create -q -f qcow2 -u -b c$((i - 1)).qcow2 -F qcow2 c$i.qcow2 4M
  [ $i -gt 10 ] || io c$i.qcow2 "write -P $i $((i * 100))k 150k"
done
ok "10 deep" same_as_qemu c10.qcow2 backing=follow
cp want.raw model.raw
ok "10 deep: written" serve c10.qcow2 backing=follow \
  --run "'$BUILD/tests/nbd-ops' model \"\$uri\" model.raw $SEED 300"
ok "10 deep: QEMU reads the same" eval 'guest_raw c10.qcow2 out.raw && cmp out.raw model.raw'
ok "64 deep" same_as_qemu c64.qcow2 backing=follow
refused "65 deep" '64' c65.qcow2 backing=follow

# --- loops

cp a.qcow2 l1.qcow2
cp a.qcow2 l2.qcow2
qemu-img rebase -u -b l2.qcow2 -F qcow2 -f qcow2 l1.qcow2
qemu-img rebase -u -b l1.qcow2 -F qcow2 -f qcow2 l2.qcow2
refused "a loop" 'loop' l1.qcow2 backing=follow
make_image self.qcow2 1M
qemu-img rebase -u -b self.qcow2 -F qcow2 -f qcow2 self.qcow2
refused "its own base" 'loop' self.qcow2 backing=follow
ln -s l1.qcow2 link.qcow2
qemu-img create -q -f qcow2 -u -b link.qcow2 -F qcow2 l1.qcow2 1M
refused "a loop by way of a link" 'loop' l1.qcow2 backing=follow

# --- names

mkdir -p deep/er links
cp b.qcow2 deep/b.qcow2
( cd deep && over er/a.qcow2 ../b.qcow2 qcow2 && over er/top.qcow2 a.qcow2 qcow2 )
io deep/er/top.qcow2 'write -P 7 0 10k'
ln -s ../deep/er/top.qcow2 links/top.qcow2
rm -f want.raw
qemu-img convert -O raw deep/er/top.qcow2 want.raw
ok "names are relative to the image that names them" \
  eval 'serve deep/er/top.qcow2 backing=follow --run "$copy_out" && cmp out.raw want.raw'
ok "and to where a link leads" \
  eval 'serve links/top.qcow2 backing=follow --run "$copy_out" && cmp out.raw want.raw'
qemu-img rebase -u -b "file:../b.qcow2" -F qcow2 -f qcow2 deep/er/a.qcow2
ok "file: is a plain file" \
  eval 'serve deep/er/top.qcow2 backing=follow --run "$copy_out" && cmp out.raw want.raw'

# --- damage

for where in a b; do
  base b.qcow2 4096
  over a.qcow2 b.qcow2 qcow2
  over top.qcow2 a.qcow2 qcow2
  io a.qcow2 'write -P 1 64k 100k'
  io top.qcow2 'write -P 2 1M 100k'
  guest_raw top.qcow2 want.raw
  patch $where.qcow2 rt-zero
  before=$(sha256 $where.qcow2)
  cp want.raw model.raw
  ok "damage in $where: served, writable" serve top.qcow2 backing=follow report=report.json \
    --run "'$BUILD/tests/nbd-ops' model \"\$uri\" model.raw $SEED 300"
  is "damage in $where: left as it was" "$(sha256 $where.qcow2)" "$before"
  matches "damage in $where: told" err.log "$where\.qcow2"
  ok "damage in $where: in the report" grep -q "$where\.qcow2" report.json
  ok "damage in $where: no errors, no leaks on top" img_check_clean -f qcow2 top.qcow2
  ok "damage in $where: what the guest wrote is there" \
    eval 'guest_raw top.qcow2 out.raw && cmp out.raw model.raw'
done
patch b.qcow2 set l1_table_offset=0x123456789000
refused "a base whose mapping is lost" 'b\.qcow2' top.qcow2 backing=follow

# --- trim

for compat in 1.1 0.10; do
  base b.qcow2 4096
  rm -f a.qcow2
  qemu-img create -q -f qcow2 -o compat=$compat -b b.qcow2 -F qcow2 a.qcow2
  io a.qcow2 'write -P 1 0 1M'
  # 0 to 1M: written on top; 2M: the base's only.  What a trim leaves is what was there, or zeros.
  ok "compat=$compat: trim shows zeros or what was there, never what lies below" \
    serve a.qcow2 backing=follow --run '
      qemu-io -f raw -d unmap -c "discard 0 512k" -c "discard 2M 512k" "$uri" && nbdcopy "$uri" after.raw'
  ok "compat=$compat: where it was written" python3 -c '
p = open("after.raw", "rb").read()[:512 * 1024]
assert all(p[i:i + 65536] in (bytes(65536), b"\1" * 65536) for i in range(0, len(p), 65536))'
  # Once more: what was read once is not another time something else.
  ok "compat=$compat: QEMU reads the same" eval 'guest_raw a.qcow2 out.raw && cmp out.raw after.raw'
  ok "compat=$compat: zeros are zeros" \
    serve a.qcow2 backing=follow --run 'qemu-io -f raw -c "write -z -u 2M 512k" -c "read -P 0 2M 512k" "$uri" >io.log && ! grep failed io.log'
  ok "compat=$compat: no errors, no leaks" img_check_clean -f qcow2 a.qcow2
done
base b.qcow2 4096
over a.qcow2 b.qcow2 qcow2
ok "a trim really trims" serve a.qcow2 backing=follow --run '
  qemu-io -f raw -d unmap -c "write -P 1 0 1M" -c "discard 0 1M" -c "read -P 0 0 1M" "$uri" >io.log && ! grep -i -E "failed|error" io.log'

# --- locks: others may read it, nobody may write to it

qemu-nbd -t -k "$PWD/q.sock" --fork --pid-file=q.pid -f qcow2 b.qcow2
qemu_pid=$(cat q.pid)
started_pids+=("$qemu_pid")
refused "a base that QEMU writes to" 'b\.qcow2.*(in use|lock)' a.qcow2 backing=follow
kill "$qemu_pid"
while kill -0 "$qemu_pid" 2>/dev/null; do :; done
server_start s a.qcow2 backing=follow || fail "server does not start"
ok "while we serve, QEMU reads the base" qemu-io -r -f qcow2 -c 'read 0 64k' b.qcow2
ok "while we serve, QEMU does not write to it" not io b.qcow2 'write 0 64k'
over a3.qcow2 b.qcow2 qcow2
ok "while we serve, QEMU uses it for another image" io a3.qcow2 'write -P 1 0 64k' 'read 1M 64k'
server_stop
ok "afterwards QEMU writes to it" io b.qcow2 'write 0 64k'

done_testing
