#!/bin/bash
# A disk that is full, or fails: a repair that cannot be made whole has changed
# nothing and leaves nothing behind; one that cannot be copied leaves its journal,
# says so, and is finished by the next start.
. "$(dirname "$0")/../lib.sh"
require_killat

make_image base.qcow2 2M -o cluster_size=4k
age_image base.qcow2 2048 "$SEED" 20
guest_raw base.qcow2 want.raw
patch base.qcow2 rt-zero
sum=$(sha256 base.qcow2)

nothing_left ()
{
  local left
  left=$(ls -A | grep journal)
  [ -z "$left" ] || { echo "left behind: $left"; return 1; }
}

# What must be so after a start that failed: *phase tells how far it had come.
failed_well ()
{
  [ "$failed_exit" -ne 0 ] || { echo "served, though nothing can be written"; return 1; }
  if [ -e a.qcow2.qcow2repair-journal ]; then
    phase=copying
    grep -q 'journal.*a.qcow2.qcow2repair-journal' err.log || { echo "the journal is not named"; cat err.log; return 1; }
  elif [ "$(sha256 a.qcow2)" != "$sum" ]; then
    phase=ending        # only that the journal is gone was not made durable
    img_check_clean -f qcow2 a.qcow2 || return 1
  else
    phase=building
  fi
  [ $phase = copying ] || nothing_left || return 1
  serve a.qcow2 inplace=true --run 'nbdcopy "$uri" out.raw' &&
    cmp out.raw want.raw && img_check_clean -f qcow2 a.qcow2 && [ ! -e a.qcow2.qcow2repair-journal ]
}

for errno in 28 5; do   # ENOSPC, EIO
  n=0 bad=0 building=0 copying=0 ending=0
  while n=$((n + 1)); rm -f a.qcow2*; cp base.qcow2 a.qcow2; fails_from $n $errno a.qcow2 inplace=true; do
    # Once the repair is in the image, what fails is the guest's business.
    if [ "$failed_exit" -eq 0 ] && [ ! -e a.qcow2.qcow2repair-journal ] && img_check_clean -f qcow2 a.qcow2 >/dev/null; then
      continue
    fi
    failed_well >why 2>&1 || { bad=$((bad + 1)); diag "error $errno from change $n on:"; diag_file why; }
    eval "$phase=\$(($phase + 1))"
    [ -n "$SOAK" ] || n=$((n + errno / 28))     # every second one of these will do
  done
  is "error $errno at any change: all well" "$bad" 0
  diag "while building: $building, while copying: $copying"
  ok "error $errno: both were met" test "$building" -gt 5 -a "$copying" -gt 1
done

done_testing
