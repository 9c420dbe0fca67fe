#!/bin/bash
# inplace=true is killed at every single change that it makes to a file.  Until
# it is started again no wrong byte is served; then the repair is in the image
# and nothing is left beside it.
. "$(dirname "$0")/../lib.sh"
require_killat

# served_rightly: without inplace=true, the image is refused or it is all old or all new.
served_rightly ()
{
  if serve a.qcow2 --run 'nbdcopy "$uri" out.raw' >/dev/null 2>&1; then
    cmp -s out.raw want.raw || cmp -s out.raw old.raw || { echo "wrong bytes were served"; return 1; }
  else
    grep -q 'journal.*inplace=true' err.log || { echo "refused, but not told what to do"; cat err.log; return 1; }
    half_written=1
  fi
}

# recovers ARG...: what must be so after a kill.
recovers ()
{
  local half_written=

  served_rightly || return 1
  # What was begun is finished, whether or not the start is told of the overlay.
  if [ -n "$half_written" ]; then
    serve a.qcow2 inplace=true --run 'nbdcopy "$uri" out.raw' || return 1
  else
    serve a.qcow2 "$@" --run 'nbdcopy "$uri" out.raw' || return 1
  fi
  cmp out.raw want.raw && img_check_clean -f qcow2 a.qcow2 && guest_raw a.qcow2 n.raw && cmp n.raw want.raw || return 1
  left=$(ls -A | grep -E 'journal|overlay')
  [ -z "$left" ] || { echo "left behind: $left"; return 1; }
}

# sweep NAME RESTORE ARG...: RESTORE puts the files back as they were.
sweep ()
{
  local name=$1 restore=$2 n=0 bad=0
  shift 2

  while n=$((n + 1)); $restore; killed_at $n a.qcow2 "$@"; do
    recovers "$@" >why 2>&1 || { bad=$((bad + 1)); diag "$name: killed at change $n:"; diag_file why; }
  done
  is "$name: killed at each of $((n - 1)) changes, all well afterwards" "$bad" 0
  ok "$name: there were enough of them to mean something" test $n -gt 9
}

make_image base.qcow2 2M -o cluster_size=4k
age_image base.qcow2 2048 "$SEED" 20
guest_raw base.qcow2 base.raw
patch base.qcow2 rt-zero
cp base.raw want.raw
cp base.raw old.raw
fresh () { rm -f a.qcow2*; cp base.qcow2 a.qcow2; }
sweep "a repair" fresh inplace=true

# The start that finishes it is killed as well.
first=0
while fresh; first=$((first + 1)); killed_at $first a.qcow2 inplace=true && serve a.qcow2 >/dev/null 2>&1; do :; done
half () { fresh; killed_at $((first + 1)) a.qcow2 inplace=true; }
sweep "finishing it" half inplace=true

# The repair has to make the file longer.
if [ -n "$SOAK" ]; then
  patch dense.qcow2 dense 12 4 300
  truncate -s $((300 * 4096 - 1000)) dense.qcow2
  patch dense.qcow2 guest want.raw
  cp want.raw old.raw
  grows () { rm -f a.qcow2*; cp dense.qcow2 a.qcow2; }
  sweep "a repair that grows the file" grows inplace=true
fi

# An overlay with the guest's writes in it is applied; the start that goes on need
# not be told of it.
cp base.raw old.raw
laid () { rm -f a.qcow2* my.overlay; cp -p base.qcow2 a.qcow2; cp my my.overlay; }
fresh
touch -d 2024-01-01T00:00:00Z base.qcow2
cp -p base.qcow2 a.qcow2
serve a.qcow2 overlay=my.overlay \
  --run 'qemu-io -f raw -c "write -P 9 0 300k" -c "write -z 512k 512k" -c "write -P 3 1M 4k" "$uri"' >/dev/null
cp my.overlay my
serve a.qcow2 overlay=my.overlay --run 'nbdcopy "$uri" want.raw'
sweep "an overlay" laid inplace=true overlay=my.overlay

done_testing
