#!/bin/bash
# 1 TiB of preallocated metadata: served within 64 MiB of memory, and a lost
# refcount table healed within fewer than 20 lines of talk.  (The time is measured
# by `make bench', row start.)
. "$(dirname "$0")/../lib.sh"
require_peak

qemu-img create -q -f qcow2 -o preallocation=metadata a.qcow2 1T

started ()      # NAME MIB ARG...
{
  local name=$1 mib=$2 ms rss
  shift 2

  ok "$name: served" "$BUILD/tests/peak" peak.out "${nbdkit_env[@]}" nbdkit -U - "$PLUGIN" "$@" --run true
  cp .out err.log
  read -r ms rss _ <peak.out
  diag "$name: $ms ms, $rss KiB, $(wc -l <err.log) lines"
  [ -n "$sanitized" ] || ok "$name: at most $mib MiB" test "$rss" -le $((mib << 10))
  ok "$name: fewer than 20 lines" test "$(wc -l <err.log)" -lt 20
}

started "sound" 64 a.qcow2
before=$(patch a.qcow2 structure)
patch a.qcow2 rt-zero
# In memory, that holds the new refcount blocks too: 32 MiB.
started "refcount table zeroed, in memory" 128 a.qcow2
started "refcount table zeroed, overlay" 64 a.qcow2 overlay=o.qcow2
ok "no errors, no leaks" img_check_clean "json:$(nested o.qcow2)"
diag "the structure had $before clusters; the overlay takes $(du -k o.qcow2 | cut -f 1) KiB"

done_testing
