#!/bin/bash
# A start that is refused neither removes nor changes an overlay that is not its own.
. "$(dirname "$0")/../lib.sh"

make_image d.qcow2 8M
io d.qcow2 'write -P 1 0 1M'

# The name is free when it is looked at, and taken when the overlay is made.
ln -s nowhere link.qcow2
ok "a link that leads nowhere: refused" not serve d.qcow2 overlay=link.qcow2
ok "the link is still there" test -L link.qcow2

# One that is damaged itself is no ground to stand on.
ok "an overlay is made" serve d.qcow2 overlay=bad.qcow2
patch bad.qcow2 set refcount_table_offset=0
before=$(sha256 bad.qcow2)
ok "a damaged overlay: refused" not serve d.qcow2 overlay=bad.qcow2
matches "and it is said why" err.log 'the overlay itself is damaged'
is "and left as it was" "$(sha256 bad.qcow2)" "$before"

# Several at the same time: one serves, and it keeps its overlay.
race ()   # ROUND
{
  local i pids=() alive=0

  for i in 1 2 3; do
    rm -f "pid$i"
    "${nbdkit_env[@]}" nbdkit -f -U "$PWD/s$1$i" -P "$PWD/pid$i" "$PLUGIN" d.qcow2 overlay=o.qcow2 \
      >"log$i" 2>&1 </dev/null &
    pids[i]=$!
    started_pids+=($!)
  done
  # Each of them ends or serves.
  for i in 1 2 3; do
    while kill -0 "${pids[i]}" 2>/dev/null && [ ! -s "pid$i" ]; do read -r -t 0.02 <>blocker; done
    [ ! -s "pid$i" ] || alive=$((alive + 1))
  done
  [ $alive -le 1 ] && { [ $alive -eq 0 ] || [ -e o.qcow2 ]; }
  local r=$?
  kill -TERM "${pids[@]}" 2>/dev/null
  wait "${pids[@]}" 2>/dev/null
  rm -f o.qcow2
  return $r
}
mkfifo blocker
races ()
{
  local i

  for i in 1 2 3 4 5 6 7 8; do
    race $i || return 1
  done
}
ok "three starts at once: no more than one serves, and has its overlay" races
done_testing
