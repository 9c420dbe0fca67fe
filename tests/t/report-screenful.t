# However much is wrong, the messages fit on a screen of 24 lines: the worst first,
# what is lost in bytes of the guest disk, who lies on whom, and the verdict last.
# What does not fit is counted, and is whole in the report.
. "$(dirname "$0")/../lib.sh"

# lines FILE: what a terminal of 100 columns shows of it
lines ()
{
  fold -w 100 "$1" | wc -l
}

snapshots ()    # three, each with a little of its own
{
  local s

  for s in one two $'three\033[2J'; do
    qemu-img snapshot -c "$s" a.qcow2 && io a.qcow2 "write -P 5 15M 64k" || return
  done
}

patch disk.raw bytes "$SEED" 16777216
qemu-img convert -f raw -O qcow2 -o cluster_size=4k disk.raw a.qcow2
ok "snapshots are made" snapshots
python3 "$tests_dir/mkimage/damage.py" a.qcow2 everything || fail "damaged"

ok "everything is wrong: served" serve a.qcow2 repair=all overlay=o.qcow2 report=report.json
ok "there are ten kinds of damage or more" eval '[ "$(jq "[.findings[].code] | unique | length" report.json)" -ge 10 ]'
ok "the messages fit on a screen" test "$(lines err.log)" -le 24
is "no control characters" "$(tr -d '[:print:]\n' <err.log | wc -c)" 0
matches "the worst first" err.log '^(H|T)[0-9][0-9] '
matches "what is lost, in bytes of the guest disk" err.log '^LOST of the guest disk: [0-9.]+ [KMG]iB: .* at '
matches "of the snapshots, too" err.log '^LOST .*snapshot'
matches "who lies on whom" err.log '4 KiB at host 0x[0-9a-f]+: the (L1 table|refcount block|L2 table)[^,]*, not guest data at'
matches "what did not fit is counted" err.log '^\.\.\. and [0-9]+ more kinds'
matches "the verdict is last" <(tail -n 1 err.log) '^serving '
is "the bytes are those of the report" \
  "$(sed -n 's/^LOST of the guest disk: \([0-9]*\)\.*[0-9]* MiB:.*/\1/p' err.log)" \
  "$(jq '.lost."active-bytes" / 1048576 | floor' report.json)"
is "both owners are in the report" \
  "$(jq -c '.conflicts | ([.listed[] | .winner.kind, .loser.kind] | length) == 2 * ([.total, 10000] | min)' report.json)" true

# A chain of damaged files: the same screen.
qemu-img convert -f raw -O qcow2 -o cluster_size=4k disk.raw base.qcow2
for n in 1 2 3 4; do
  cp base.qcow2 b$n.qcow2
  [ $n = 1 ] || qemu-img rebase -u -f qcow2 -b b$((n - 1)).qcow2 -F qcow2 b$n.qcow2
  patch b$n.qcow2 copied flip l2 all + rb-zero 0
done
ok "a chain of damaged files: served" serve b4.qcow2 repair=all backing=follow
ok "a chain of damaged files: fits on a screen" test "$(lines err.log)" -le 24

done_testing
