#!/bin/bash
# inplace=true: whatever state its last run left an image in, it is made sound, in
# the image itself, and served read-write; or it is refused and nothing was changed.
. "$(dirname "$0")/../lib.sh"
require_killat

journal=a.qcow2.qcow2repair-journal

nothing_left ()
{
  left=$(ls -A | grep -E 'journal|overlay')
  [ -z "$left" ] || { echo "left behind: $left"; return 1; }
}

# in_place NAME WANT ARG...: a.qcow2 is healed, written to and clean.
in_place ()
{
  local name=$1 want=$2
  shift 2

  ok "$name: served" serve a.qcow2 inplace=true report=report.json "$@" \
    --run 'nbdcopy "$uri" out.raw && qemu-io -f raw -c "write -P 5 0 64k" "$uri"'
  ok "$name: guest bytes" cmp out.raw "$want"
  is "$name: read-write" "$(jq -r .served report.json)" read-write
  ok "$name: nothing is left beside it" nothing_left
  ok "$name: QEMU finds it clean" img_check_clean -f qcow2 a.qcow2
  ok "$name: the guest's write is in it" io a.qcow2 'read -P 5 0 64k'
}

# refused NAME REGEX ARG...: not served, a.qcow2 not changed.
refused ()
{
  local name=$1 regex=$2 before
  shift 2

  before=$(sha256 a.qcow2)
  SERVE_TIMEOUT=20 ok "$name: refused" not serve a.qcow2 "$@"
  matches "$name: says why" err.log "$regex"
  is "$name: the image is as it was" "$(sha256 a.qcow2)" "$before"
}

make_image base.qcow2 8M -o cluster_size=16k
age_image base.qcow2 8192 "$SEED" 40
guest_raw base.qcow2 base.raw

cp base.qcow2 a.qcow2
in_place "sound" base.raw
is "sound: nothing was committed" "$(jq -r .committed report.json)" null
cp base.qcow2 a.qcow2
in_place "sound, an overlay is named" base.raw overlay=my.overlay

cp base.qcow2 a.qcow2
patch a.qcow2 rt-zero
in_place "table lost" base.raw
ok "table lost: what was written is told" jq -e '.committed | ."bytes-written" > 0 and (.resumed | not)' report.json
matches "table lost: in words" err.log 'in place; the repair was written to the image'
cp base.qcow2 a.qcow2
patch a.qcow2 all-refcounts 0
in_place "an overlay is named" base.raw overlay=my.overlay

# A writer with lazy refcounts that was killed.
make_image a.qcow2 8M -o lazy_refcounts=on
{ qemu-io -f qcow2 -c 'write -P 1 0 1M' -c 'write -P 2 5M 2M' -c abort a.qcow2 >/dev/null; } 2>/dev/null
is "dirty: QEMU left the bit" "$(patch a.qcow2 get incompatible_features)" 1
serve a.qcow2 --run 'nbdcopy "$uri" lazy.raw'
in_place "dirty" lazy.raw

# Level all: what cannot be right is lost, and zeros in the image from then on.
make_image a.qcow2 8M -o cluster_size=4k
qemu-io -f qcow2 -c 'write -P 1 0 5M' a.qcow2 >/dev/null
patch a.qcow2 l2 20 0x8000400000000000 + l2 21 0x8000000000001234
refused "level refcounts" 'damage remains.*nothing was written' inplace=true
ok "level refcounts: nothing is left" nothing_left
qemu-img create -q -f raw lost.raw 8M
head -c 5M /dev/zero | tr '\0' '\1' | dd of=lost.raw conv=notrunc status=none
dd if=/dev/zero of=lost.raw bs=4096 seek=20 count=2 conv=notrunc status=none
in_place "level all" lost.raw repair=all discard-orphans=true
ok "level all: what was lost is told" jq -e '.lost.ranges | length > 0' report.json

# What cannot be made sound is not touched.
cp base.qcow2 a.qcow2
patch a.qcow2 rt-zero
refused "repair=off" 'damage remains.*nothing was written' inplace=true repair=off
ok "repair=off: nothing is left" nothing_left
ok "QEMU has it open for writing" qemu_serves base.qcow2
before=$(sha256 base.qcow2)
SERVE_TIMEOUT=20 ok "in use: refused" not serve base.qcow2 inplace=true
qemu_stops
ok "QEMU has it open for reading" qemu_serves base.qcow2 -r
SERVE_TIMEOUT=20 ok "read elsewhere: refused" not serve base.qcow2 inplace=true
matches "read elsewhere: says why" err.log 'in use'
qemu_stops
is "in use: as it was" "$(sha256 base.qcow2)" "$before"
ok "in use: nothing is left" nothing_left

# Cut off in the midst of the copy: half_way ARG... leaves a.qcow2 so.
half_way ()
{
  local n=0

  while n=$((n + 1)); rm -f a.qcow2* my.overlay; cp base.qcow2 a.qcow2; patch a.qcow2 rt-zero
    killed_at $n a.qcow2 inplace=true "$@"; do
    serve a.qcow2 >/dev/null 2>&1 || return 0
  done
  return 1
}
ok "cut off: the journal is there" eval 'half_way && test -e $journal'
for arg in repair=refcounts check=false force-share=true overlay=other.overlay; do
  refused "cut off, $arg" 'inplace=true' $arg
done
rm -f other.overlay
cp a.qcow2 half.qcow2
patch a.qcow2 write 300000 5a5a
refused "changed since" 'changed since' inplace=true
cp base.qcow2 a.qcow2
truncate -s +64k a.qcow2
refused "longer since" 'changed since' inplace=true
cp half.qcow2 a.qcow2
in_place "cut off" base.raw
ok "cut off: said so" jq -e .committed.resumed report.json

ok "cut off, an overlay is named" half_way overlay=my.overlay
mv my.overlay elsewhere
refused "its overlay is gone, not told" 'elsewhere|my.overlay.*not there'
refused "its overlay is gone" 'my.overlay.*not there' inplace=true
mv elsewhere my.overlay
refused "its overlay is used as one" 'inplace=true' overlay=my.overlay
in_place "told nothing of its overlay" base.raw

# What is no journal.
cp base.qcow2 a.qcow2
patch a.qcow2 rt-zero
echo "letters to my mother" >$journal
refused "a file of that name" 'no overlay of this program' inplace=true
is "a file of that name: is left alone" "$(cat $journal)" "letters to my mother"
rm $journal

# Orphans are evidence.
cp base.qcow2 a.qcow2
orphans=$(patch a.qcow2 used | wc -l)
patch a.qcow2 l1 0 0
ok "orphans: served in place" serve a.qcow2 inplace=true report=report.json
leaks=$(qemu-img check --output=json a.qcow2 2>/dev/null | jq .leaks)
ok "orphans: kept ($leaks of $orphans clusters)" test "$leaks" -gt 100
ok "orphans: freed when told so" serve a.qcow2 inplace=true discard-orphans=true
ok "orphans: then it is clean" img_check_clean -f qcow2 a.qcow2

# So are leaks left alone, but for refcounts by which QEMU calls entries wrong that say they are the only ones.
make_image used.qcow2 8M
io used.qcow2 'write -P 3 0 1M'
guest_raw used.qcow2 used.raw
cp used.qcow2 a.qcow2
truncate -s +256k a.qcow2
patch a.qcow2 leak 4
before=$(sha256 a.qcow2)
ok "leaks: served" serve a.qcow2 inplace=true
is "leaks: left alone" "$(sha256 a.qcow2)" "$before"
table=$((($(patch used.qcow2 l1 0) & ~(1 << 63)) / 65536))
for damage in "all-refcounts 5" "refcount $(patch used.qcow2 host 3) 2" "refcount $table 2"; do
  cp used.qcow2 a.qcow2
  # shellcheck disable=SC2086
  patch a.qcow2 $damage
  is "${damage%% *} too high: QEMU finds corruptions" \
    "$(qemu-img check --output=json a.qcow2 2>/dev/null | jq '.corruptions > 0')" true
  in_place "${damage%% *} too high" used.raw
done
patch a.qcow2 refcount "$(patch a.qcow2 host 3)" 2
before=$(sha256 a.qcow2)
ok "too high, repair=off: served" serve a.qcow2 inplace=true repair=off report=report.json
is "too high, repair=off: nothing was committed" "$(jq -r .committed report.json)" null
is "too high, repair=off: left alone" "$(sha256 a.qcow2)" "$before"
# One that fails on its way is taken away again.
cp used.qcow2 half.qcow2
patch half.qcow2 all-refcounts 5
before=$(sha256 half.qcow2)
n=0 as_it_is=0 copying=0 wrong=0
while n=$((n + 1)); cp half.qcow2 a.qcow2; fails_from $n 28 a.qcow2 inplace=true; do    # ENOSPC
  if grep -q 'leaks only' err.log; then
    as_it_is=$((as_it_is + 1))
    [ "$failed_exit:$(sha256 a.qcow2)" = "0:$before" ] && nothing_left
  elif [ -e $journal ]; then    # it had begun to write
    copying=$((copying + 1))
    grep -q "$journal" err.log
  else                          # the journal may have been marked: nothing but the whole repair is served
    { [ "$failed_exit:$(sha256 a.qcow2)" = "1:$before" ] || img_check_clean -f qcow2 a.qcow2; } && nothing_left
  fi || { wrong=$((wrong + 1)); diag "change $n, exit $failed_exit"; diag_file err.log; }
  rm -f $journal
done
rm -f $journal
ok "too high, no room for the journal: served as it is, $as_it_is times" test $as_it_is -gt 3
ok "too high, no room to write it: refused, $copying times" test $copying -gt 0
is "too high, no room: nothing else" "$wrong" 0
ok "too high, no room for an overlay that was named" fails_from 1 28 half.qcow2 inplace=true overlay=my.overlay
is "too high, no room for an overlay that was named: refused" "$failed_exit:$(ls my.overlay 2>/dev/null)" "1:"

# Somebody who may only make files beside the image must not get bytes into it.
if [ "$(id -u)" = 0 ]; then
  make_image a.qcow2 16M
  patch a.qcow2 rt-zero
  cp a.qcow2 stranger
  chown 12345 stranger
  ln -s "$PWD/stranger" $journal
  refused "a journal of another user's" 'user 12345' inplace=true
  rm -f $journal
  ln -s "$PWD/nowhere" $journal
  chown -h 12345 $journal
  refused "a link of another user's" 'user 12345' inplace=true
  refused "a link of another user's, only looked at" 'user 12345'
  rm -f $journal stranger
fi

done_testing
