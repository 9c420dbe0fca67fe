#!/bin/bash
# Persistent bitmaps that record (auto) stay true while the guest writes through us;
# whatever cannot be kept so is visibly inconsistent, and QEMU accepts what is left.
. "$(dirname "$0")/../lib.sh"
require qemu-nbd
require_nbd_ops

matrix="$tests_dir/mkimage/matrix.py"

# dirty_map BITMAP IMAGE: what QEMU says, in map.json.  Fails if it has no such bitmap.
dirty_map ()
{
  rm -f q.sock
  qemu-nbd -t -r -k "$PWD/q.sock" --fork --pid-file=q.pid -f qcow2 -B "$1" "$2" || return
  started_pids+=("$(cat q.pid)")
  nbdinfo --map="qemu:dirty-bitmap:$1" --json "nbd+unix:///?socket=$PWD/q.sock" >map.json
  local r=$? pid
  pid=$(cat q.pid)
  kill "$pid"
  while kill -0 "$pid" 2>/dev/null; do :; done
  return $r
}

flags ()        # IMAGE BITMAP: as qemu-img info lists them
{
  qemu-img info --output=json "$1" |
    jq -r --arg n "$2" '."format-specific".data.bitmaps[]? | select(.name == $n) | .flags | sort | join(",")'
}

true_after ()   # NAME BITMAP IMAGE BEFORE.raw AFTER.raw
{
  ok "$1: QEMU takes the bitmap" dirty_map "$2" "$3" &&
    ok "$1: what has changed is dirty" python3 "$matrix" dirty map.json "$4" "$5"
}

make_image base.qcow2 16M
age_image base.qcow2 16384 "$SEED" 40
qemu-img bitmap --add -g 64k base.qcow2 auto
qemu-img bitmap --add --disable base.qcow2 off
guest_raw base.qcow2 before.raw

# --- clean ends

cp base.qcow2 a.qcow2
ok "read only" serve a.qcow2 --run "$copy_out"
is "read only: still there" "$(flags a.qcow2 auto)" auto
cp before.raw after.raw
ok "written" serve a.qcow2 --run "'$BUILD/tests/nbd-ops' model \"\$uri\" after.raw $SEED 60"
ok "written: no errors, no leaks" img_check_clean -f qcow2 a.qcow2
is "written: recording, and not in use" "$(flags a.qcow2 auto)" auto
true_after "written" auto a.qcow2 before.raw after.raw
ok "written: not all of it is dirty" jq -e '[.[] | select(.type == 0)] | length > 0' map.json
is "written: the one that does not record is still there" "$(flags a.qcow2 off)" ""
ok "written: and has recorded nothing" eval 'dirty_map off a.qcow2 && jq -e "all(.type == 0)" map.json'

cp base.qcow2 a.qcow2
ok "one byte" serve a.qcow2 --run 'qemu-io -f raw -c "write -P 99 5000000 1" "$uri"'
ok "one byte: QEMU takes the bitmap" dirty_map auto a.qcow2
is "one byte: one bit" "$(jq -c '[.[] | select(.type == 1) | [.offset, .length]]' map.json)" \
  "[[$((5000000 / 65536 * 65536)),65536]]"
ok "zeros and trims are changes too" serve a.qcow2 --run '
  qemu-io -f raw -d unmap -c "write -z 0 64k" -c "write -z -u 1M 64k" -c "discard 2M 64k" "$uri"'
ok "zeros and trims: QEMU takes the bitmap" dirty_map auto a.qcow2
is "zeros and trims: their bits, and the one from before" \
  "$(jq -c '[.[] | select(.type == 1) | .offset]' map.json)" "[0,1048576,2097152,$((5000000 / 65536 * 65536))]"
ok "no errors, no leaks" img_check_clean -f qcow2 a.qcow2

# QEMU goes on from there, and we from what it leaves.
io a.qcow2 'write -P 1 9M 64k'
ok "in turns" serve a.qcow2 --run 'qemu-io -f raw -c "write -P 1 10M 64k" "$uri"'
ok "in turns: QEMU takes the bitmap" dirty_map auto a.qcow2
ok "in turns: both are in it" jq -e \
  '[.[] | select(.type == 1) | .offset] | contains([9437184]) and contains([10485760])' map.json
ok "QEMU removes and adds" eval 'qemu-img bitmap --remove a.qcow2 auto && qemu-img bitmap --remove a.qcow2 off &&
  qemu-img bitmap --add a.qcow2 auto && img_check_clean -f qcow2 a.qcow2'

# --- shapes

for shape in cluster_size=512,,512 cluster_size=4k,,1M cluster_size=2M,,64k refcount_bits=1,,64k \
             extended_l2=on,,8k lazy_refcounts=on,,64k; do
  options=${shape%%,,*} granularity=${shape##*,,}
  rm -f a.qcow2
  make_image a.qcow2 9M -o "$options"
  age_image a.qcow2 9216 "$SEED" 20
  qemu-img bitmap --add -g "$granularity" a.qcow2 b1
  qemu-img bitmap --add -g "$granularity" a.qcow2 b2
  guest_raw a.qcow2 first.raw
  io a.qcow2 'write -P 1 3M 100k' 'write -P 2 0 1k'
  guest_raw a.qcow2 after.raw
  ok "$shape: written" serve a.qcow2 --run "'$BUILD/tests/nbd-ops' model \"\$uri\" after.raw $SEED 40"
  ok "$shape: no errors, no leaks" img_check_clean -f qcow2 a.qcow2
  true_after "$shape" b1 a.qcow2 first.raw after.raw
  true_after "$shape, the other" b2 a.qcow2 first.raw after.raw
done

# --- cut off

cp base.qcow2 a.qcow2
ok "killed: starts" server_start s a.qcow2
ok "killed: written" qemu-io -f raw -c 'write -P 99 5M 1M' -c flush "$server_uri"
server_stop KILL
matches "killed: in use, so nobody trusts it" <(flags a.qcow2 auto) in-use
ok "killed: QEMU does not serve it" not dirty_map auto a.qcow2
ok "killed: no errors" img_check_leaks_at_most -f qcow2 a.qcow2
ok "killed: we serve the disk" serve a.qcow2 --run 'qemu-io -f raw -c "read -P 99 5M 1M" -c "write -P 98 6M 64k" "$uri"'
matches "killed, written again: still in use" <(flags a.qcow2 auto) in-use
ok "killed: QEMU can remove it" eval 'qemu-img bitmap --remove a.qcow2 auto && img_check_leaks_at_most -f qcow2 a.qcow2'

# --- damaged: counted and healed

cp base.qcow2 d.qcow2
io d.qcow2 'write -P 1 3M 3M'
guest_raw d.qcow2 want.raw
patch d.qcow2 rt-random "$SEED"
heals_ok "damaged" d.qcow2 want.raw
ok "damaged: QEMU takes the healed bitmap" dirty_map auto healed.bin
is "damaged: what QEMU had recorded is there" \
  "$(jq -c '[.[] | select(.type == 1) | [.offset, .length]]' map.json)" "[[3145728,3145728]]"
cp want.raw after.raw
ok "damaged: written through the overlay" \
  serve d.qcow2 overlay=d.qcow2.overlay --run "'$BUILD/tests/nbd-ops' model \"\$uri\" after.raw $SEED 60"
ok "damaged, written: no errors, no leaks" nested_qemu_img_check d.qcow2.overlay
healed_file d.qcow2.overlay healed.bin
true_after "damaged, written" auto healed.bin before.raw after.raw

# Out of date, as a program that knows no bitmaps leaves them: only said, never used.
cp base.qcow2 a.qcow2
patch a.qcow2 set autoclear_features=0
ok "out of date: served" serve a.qcow2 --run 'qemu-io -f raw -c "write -P 99 5M 1M" "$uri"'
is "out of date: not made valid again" "$(($(patch a.qcow2 get autoclear_features) & 1))" 0
ok "out of date: QEMU does not serve it" not dirty_map auto a.qcow2

done_testing
