#!/bin/bash
# How long it takes until an image with 1 TiB of preallocated metadata is served,
# beside what QEMU needs to check it: the table in docs/BENCHMARKING.md.
#
#   BUILD=build tests/bench-start.sh [ROUNDS]
#
# Medians of ROUNDS (5) runs, each program in turn; largest resident set of any.
PATH=$PATH:/usr/sbin:/sbin
. "$(dirname "$0")/lib.sh"
require_peak
rounds=${1:-5}

qemu-img create -q -f qcow2 -o preallocation=metadata sound.qcow2 1T
cp --sparse=always sound.qcow2 lost.qcow2
patch lost.qcow2 rt-zero

# timed NAME COMMAND...: one run, added to NAME.runs.
timed ()
{
  local name=$1
  shift

  "$BUILD/tests/peak" peak.out "$@" >"$name.out" 2>"$name.err" || { echo "$name failed"; cat "$name.err"; exit 1; }
  cat peak.out >>"$name.runs"
}

# A first run that does not count brings the tables into the page cache.
qemu-img check sound.qcow2 >/dev/null
serve lost.qcow2 --run true

for ((i = 0; i < rounds; i++)); do
  rm -f o.qcow2
  timed sound-qemu qemu-img check sound.qcow2
  timed sound-ours nbdkit -U - "$PLUGIN" sound.qcow2 --run true
  timed lost-ours nbdkit -U - "$PLUGIN" lost.qcow2 overlay=o.qcow2 --run true
done
ok=$(img_check_clean "json:$(nested o.qcow2)" && echo clean)

median () { cut -d ' ' -f 1 "$1.runs" | sort -n | sed -n "$(((rounds + 1) / 2))p"; }
least ()  { cut -d ' ' -f 1 "$1.runs" | sort -n | head -n 1; }
most ()   { cut -d ' ' -f 1 "$1.runs" | sort -n | tail -n 1; }
memory () { cut -d ' ' -f 2 "$1.runs" | sort -n | tail -n 1; }

row ()          # LABEL NAME
{
  awk -v label="$1" -v med="$(median "$2")" -v lo="$(least "$2")" -v hi="$(most "$2")" \
    -v kib="$(memory "$2")" -v lines="$(wc -l <"$2.err")" -v base="$(median sound-qemu)" \
    'BEGIN { printf "| %s | %.2f s | %.2f to %.2f s | %.2f | %.0f MiB | %d |\n", label, med / 1000,
             lo / 1000, hi / 1000, med / base, kib / 1024, lines }'
}

echo "| 1 TiB, metadata preallocated, 64 KiB clusters | median of $rounds | range | of qemu-img check | memory | lines on stderr |"
echo "|---|---|---|---|---|---|"
row "\`qemu-img check\`, sound" sound-qemu
row "ours, sound, until served" sound-ours
row "ours, refcount table zeroed, healed into an overlay, until served" lost-ours
echo
echo "The healed image, says QEMU: ${ok:-NOT CLEAN}.  Overlay: $(du -k o.qcow2 | cut -f 1) KiB."
echo "$(qemu-img --version | head -n 1); $(nproc) CPUs; Linux $(uname -r)"
