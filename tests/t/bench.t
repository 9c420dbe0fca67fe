# The benchmarks run: on a few rows, much too small to mean anything, the JSON has what
# docs/BENCHMARKING.md promises, the figures are sane, and nothing is left behind, also
# not when it is interrupted.  How fast anything is, is not asked here.
. "$(dirname "$0")/../lib.sh"
require fio qemu-nbd
fio --enghelp | holds -w nbd || skip_all "fio has no nbd engine"
[ -z "$sanitized" ] || skip_all "nothing of this is measured under a sanitizer"
for p in peak bench/synthetic; do
  [ -x "$BUILD/tests/$p" ] || skip_all "$BUILD/tests/$p is missing: make check builds it"
done

mkdir work
export PLUGIN BUILD
bench=(env TMPDIR="$PWD/work" python3 "$tests_dir/bench/bench.py" --tiny)

ok "it runs" "${bench[@]}" --json b.json
cp .out bench.out
is "it leaves nothing in its folder" "$(ls -A work)" ""

# Of every line, or of those that were measured.
every () { jq -e "[.rows[] | $1] | all" b.json; }
measured () { every "select(.not_measured == null) | $1"; }

ok "the JSON says how it was measured" \
  jq -e '.scale == "tiny" and .runs > 0 and .machine.cpus > 0 and (.machine.versions | length) == 4' b.json
ok "each line has its members" every \
  'has("row") and has("work") and has("metric") and has("unit") and has("ours") and has("peer_label")
   and has("peer") and has("ratio") and has("target") and has("verdict") and has("not_measured")'
for who in ours peer; do
  ok "$who: figures above nothing, within their range" measured \
    ".$who | .median > 0 and .min > 0 and .min <= .median and .median <= .max and (.runs | length) > 0"
  ok "$who: memory and CPU time" measured ".$who | .peak_mib > 0.5 and .cpu_s_per_gib >= 0"
done
ok "the ratio says how many times better ours is" measured \
  '(if .unit == "s" or .unit == "MiB" then .peer.median / .ours.median
    else .ours.median / .peer.median end) as $r | .ratio / $r | . > 0.999 and . < 1.001'
ok "the verdict follows from it" measured \
  '.verdict == (if .target == null then null elif .ratio >= .target then "reached" else "below target" end)'
for unit in s /s MiB/s MiB; do
  ok "something is measured in $unit" jq -e --arg u "$unit" \
    '[.rows[] | select(.unit == $u and .not_measured == null)] | length > 0' b.json
done
is "the table has a line for each" "$(grep -c '^| ' bench.out)" "$(($(jq '.rows | length' b.json) + 1))"

has_uri=$(nbdkit "$PLUGIN" --dump-plugin | grep -c '^qcow2repair_parameters=.*\buri\b')
is "rows over NBD are measured where there is uri=" \
  "$(jq '[.rows[] | select(.row == "check-nbd-5ms" and .not_measured == null)] | length' b.json)" "$has_uri"

ok "no two rows have one name" \
  eval 'python3 "$tests_dir/bench/bench.py" --list | cut -d " " -f 1 | sort | uniq -d | not grep .'
ok "a pattern that means nothing is an error" not "${bench[@]}" 'no-such-*'

# --- interrupted, once a server is there
ours_running () { grep -l -a -F "$PWD/work" /proc/[0-9]*/cmdline 2>/dev/null; }

interrupted ()          # SIGNAL
{
  local pid

  "${bench[@]}" --runs 1000 randread-1 >int.log 2>&1 &
  pid=$!
  started_pids+=("$pid")
  until compgen -G 'work/*/qemu-nbd.sock' >/dev/null || ! kill -0 "$pid" 2>/dev/null; do sleep 0.05; done
  kill -"$1" "$pid"
  wait "$pid"
  is "SIG$1: it ends with the signal's number" "$?" "$((128 + $(kill -l "$1")))"
  is "SIG$1: its folder is gone" "$(ls -A work)" ""
  is "SIG$1: so are the servers" "$(ours_running)" ""
}
interrupted INT
interrupted TERM

done_testing
