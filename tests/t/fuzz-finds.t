#!/bin/bash
# What the fuzzer once found is right now: each input in tests/fuzz/finds, and some random ones, keep
# every promise that tests/fuzz/fuzz-image.c lists.  The images that it damages are sound, says QEMU.
. "$(dirname "$0")/../lib.sh"

replay=$BUILD/tests/fuzz/replay
finds=$tests_dir/fuzz/finds
make -s -C "$tests_dir/.." BUILD="$BUILD" "$replay" >make.log 2>&1 || skip_all "it cannot be built: $(tail -n 1 make.log)"

# Without its data file, QEMU opens the last one for nothing.
truncate -s 96K data
for ((i = 0; ; i++)); do
  "$replay" --base "$i" base.qcow2 || break
  ok "base image $i is sound" img_check_clean -f qcow2 base.qcow2
done
ok "there are some" test "$i" -gt 5

for f in "$finds"/*.input; do
  name=$(basename "$f" .input)
  ok "$name: every promise is kept" timeout 60 "$replay" "$f"
  ok "$name: it says what it was" test -s "${f%.input}.txt"
  # QEMU's word about what is said to be sound.
  if "$replay" --healed "$f" healed.qcow2 2>/dev/null && [ -e healed.qcow2 ]; then
    ok "$name: QEMU finds no error" img_check_leaks_at_most -f qcow2 healed.qcow2
  fi
  rm -f healed.qcow2
done

n=300
[ -z "$SOAK" ] || n=30000
ok "$n random inputs" timeout 3000 "$replay" --random "$n" "$SEED"
done_testing
