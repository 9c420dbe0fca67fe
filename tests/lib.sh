# What the tests share.  Source it first:  . "$(dirname "$0")/../lib.sh"
#
# Every test runs in a new temporary folder that is removed at its end, with
# what it started.  Output is TAP; finish with `done_testing', so that a test
# that dies half-way has failed.
#
# From the environment:
#   BUILD    where make put things (default: build at the top)
#   PLUGIN   the plugin (default: in BUILD)
#   SEED     for everything random (default: fixed, so that runs can be compared)
#   SOAK=1   longer variants
#   KEEP=1   keep the temporary folder and print its name
#
# shellcheck shell=bash

set -u -o pipefail
export LC_ALL=C TZ=UTC
unset -v LD_PRELOAD

tests_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top_dir=$(dirname "$tests_dir")
BUILD=${BUILD:-$top_dir/build}
case $BUILD in /*) ;; *) BUILD=$PWD/$BUILD ;; esac
PLUGIN=${PLUGIN:-$BUILD/nbdkit-qcow2repair-plugin.so}
case $PLUGIN in /*) ;; *) PLUGIN=$PWD/$PLUGIN ;; esac
SEED=${SEED:-20221}
SOAK=${SOAK:-}

tmp=$(mktemp -d "${TMPDIR:-/tmp}/qcow2repair-test.XXXXXX") || exit 1
cd "$tmp" || exit 1

# A folder without a disk behind it, where there is one, in $ram: for what must not wait for that.
in_ram ()
{
  ram=$(mktemp -d /dev/shm/qcow2repair-test.XXXXXX 2>/dev/null) || ram=$tmp
}

tests_run=0
tests_failed=0
started_pids=()
loop_devices=()
bash_pid=$BASHPID

cleanup ()
{
  local p d

  [ "$BASHPID" = "$bash_pid" ] || return 0
  for p in "${started_pids[@]}"; do
    kill -KILL "$p" 2>/dev/null
  done
  for d in "${loop_devices[@]}"; do
    losetup -d "$d" 2>/dev/null
  done
  cd /
  if [ -n "${KEEP:-}" ]; then
    echo "# kept: $tmp"
  else
    rm -rf "$tmp" ${ram:+"$ram"}
  fi
}
trap cleanup EXIT
trap 'exit 1' INT TERM HUP

# holds GREP-ARGUMENT...: do the lines that are piped in hold one?  It reads all of them: what `grep -q'
# leaves behind dies of SIGPIPE when the machine is slow, and the pipeline fails.
holds ()
{
  grep "$@" | cat >/dev/null
}

# --- TAP

# Lines of a file as comments, at most 40.
diag_file ()
{
  [ ! -s "$1" ] || head -c 8000 "$1" | head -n 40 | tr -c '[:print:]\t\n' '?' | sed 's/^/#   /'
}

diag ()
{
  echo "# $*"
}

pass ()
{
  tests_run=$((tests_run + 1))
  echo "ok $tests_run - $1"
}

fail ()
{
  tests_run=$((tests_run + 1))
  tests_failed=$((tests_failed + 1))
  echo "not ok $tests_run - $1"
}

# ok NAME COMMAND...: passes if the command succeeds.  Its output is shown only if not.
# It runs in this shell, so functions may set variables.
ok ()
{
  local name=$1 r
  shift

  "$@" >"$tmp/.out" 2>&1 </dev/null
  r=$?
  if [ $r -eq 0 ]; then
    pass "$name"
  else
    fail "$name"
    diag "exit $r: $*"
    diag_file "$tmp/.out"
  fi
  return $r
}

# is NAME GOT WANTED
is ()
{
  if [ "$2" = "$3" ]; then
    pass "$1"
  else
    fail "$1"
    diag "got: $2"
    diag "wanted: $3"
    return 1
  fi
}

# matches NAME FILE REGEX: some line of the file does (extended, any case).
matches ()
{
  if grep -E -i -q -e "$3" "$2"; then
    pass "$1"
  else
    fail "$1"
    diag "no line of $2 matches: $3"
    diag_file "$2"
    return 1
  fi
}

not ()
{
  ! "$@"
}

skip ()
{
  tests_run=$((tests_run + 1))
  echo "ok $tests_run - # SKIP $1"
}

skip_all ()
{
  echo "1..0 # SKIP $1"
  exit 0
}

done_testing ()
{
  if [ -e "$tmp/.patch-failed" ]; then
    fail "every recipe works"
    diag_file "$tmp/.patch-failed"
  fi
  echo "1..$tests_run"
  exit $((tests_failed > 0))
}

# Programs without which the whole test makes no sense.
require ()
{
  local p

  for p; do
    command -v "$p" >/dev/null || skip_all "$p is not installed"
  done
}

# --- the plugin

if ! [ -e "$PLUGIN" ]; then
  echo "Bail out! $PLUGIN does not exist: run make"
  exit 1
fi
require nbdkit nbdcopy nbdinfo qemu-img qemu-io python3 jq

nbdkit_env=()
sanitized=
if grep -q __asan_init "$PLUGIN"; then
  # The library must come first in nbdkit, which was built without it.  With it glibc
  # 2.36 loses count of a lock in strerror, and GnuTLS's libraries, which free their
  # locales on the way out, wait for it for ever: so nothing is freed.
  sanitized=1
  echo 'void freelocale (void *l) { }' >freelocale.c
  ${CC:-cc} -w -fno-builtin -shared -fPIC -o freelocale.so freelocale.c || exit 1
  nbdkit_env=(env "LD_PRELOAD=$(${CC:-cc} -print-file-name=libasan.so) $tmp/freelocale.so"
              "ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:allocator_may_return_null=1"
              "UBSAN_OPTIONS=halt_on_error=1:abort_on_error=1:print_stacktrace=1")
fi

# plugin_by_name: from here on `nbdkit qcow2repair' works, as it does where the plugin is
# installed: a stand-in, first in PATH.  What --run runs is not preloaded into.
plugin_by_name ()
{
  local real

  [ ! -e bin/nbdkit ] || return 0
  real=$(command -v nbdkit)
  mkdir -p bin
  cat >bin/nbdkit <<EOF
#!/bin/bash
args=() ours= run=
for a; do
  [ "\$run" != 1 ] || a="unset LD_PRELOAD; \$a"
  run=
  case \$a in
    qcow2repair) ours=1; a=$PLUGIN ;;
    --run) run=1 ;;
  esac
  args+=("\$a")
done
[ -n "\$ours" ] || exec $real "\${args[@]}"
exec ${nbdkit_env[*]@Q} $real "\${args[@]}"
EOF
  chmod +x bin/nbdkit
  PATH=$PWD/bin:$PATH
}

# serve IMAGE|KEY=VALUE... [--run COMMAND]: a captive server, for as long as the
# command runs, or, without one, no longer than it takes to start.  Its messages
# are in err.log.  Fails as the start or the command does; 124: took too long.
serve ()
{
  local args=() run=true

  while [ $# -gt 0 ]; do
    case $1 in
      --run) run=$2; shift 2 ;;
      *) args+=("$1"); shift ;;
    esac
  done
  timeout -k 5 "${SERVE_TIMEOUT:-120}" "${nbdkit_env[@]}" \
    nbdkit -U - "$PLUGIN" "${args[@]}" \
    --run "unset LD_PRELOAD; $run" >out.log 2>err.log
  local r=$?
  [ ! -s out.log ] || cat out.log
  [ $r -eq 0 ] || cat err.log >&2
  [ -z "$sanitized" ] || not grep -E 'AddressSanitizer|runtime error:' err.log >&2 || return 99
  return $r
}

# server_start NAME ARG...: a server in the background, on the socket NAME.sock.
# Its process is in server_pid, its messages in NAME.log.  Fails if it does not start.
server_start ()
{
  local name=$1 line=
  shift

  rm -f "$name.sock" "$name.ready"
  mkfifo "$name.ready"
  exec 8<>"$name.ready"
  # nbdkit writes its process id there once it listens; or else it ended.
  { "${nbdkit_env[@]}" nbdkit -f -U "$PWD/$name.sock" -P "$PWD/$name.ready" "$PLUGIN" "$@" \
      >"$name.log" 2>&1 </dev/null 8<&-
    echo "$?" >"$name.exit"
    echo ended >&8; } &
  server_job=$!
  read -r -t 120 line <&8
  exec 8<&-
  case $line in
    ended|'') wait "$server_job" 2>/dev/null; cat "$name.log" >&2; return 1 ;;
  esac
  server_pid=$line
  started_pids+=("$server_pid")
  server_uri="nbd+unix:///?socket=$PWD/$name.sock"
}

# server_stop [SIGNAL]: end it and wait until it has gone.
server_stop ()
{
  kill -"${1:-TERM}" "$server_pid" 2>/dev/null
  wait "$server_job" 2>/dev/null
  return 0
}

# create_encrypted FORMAT SECRET IMAGE SIZE: luks or aes.  On a busy machine QEMU now and then cannot
# measure how long it takes to derive a key, and makes none; that is tried again.
create_encrypted ()
{
  local n=0 iter=

  [ "$1" = aes ] || iter=,encrypt.iter-time=10
  until qemu-img create -q -f qcow2 --object "secret,id=s,data=$2" \
      -o "encrypt.format=$1,encrypt.key-secret=s$iter" "$3" "$4" 2>create.log; do
    grep -q 'CPU usage' create.log && [ $((n += 1)) -le 100 ] || return 1
  done
}

# qemu_serves IMAGE OPTIONS...: stock QEMU has it open until qemu_stops.
qemu_serves ()
{
  rm -f q.sock
  # --fork returns once it listens.
  qemu-nbd --fork --pid-file="$tmp/q.pid" -t -k "$tmp/q.sock" -f qcow2 "$@" 2>q.log || { cat q.log; return 1; }
  qemu_pid=$(cat q.pid)
  started_pids+=("$qemu_pid")
}

# Its parent is init, which may take its time to notice: a zombie has gone, too.  A SIGTERM that comes
# just before qemu-nbd 7.2 serves is forgotten.
qemu_stops ()
{
  local n=0

  while kill -0 "$qemu_pid" && ! grep -q '^State:.*Z' "/proc/$qemu_pid/status"; do
    [ $((n++ % 100)) -ne 0 ] || kill "$qemu_pid"
    sleep 0.01
  done 2>/dev/null
}

# --- damage

# A recipe that does not work is a test that does not either: see done_testing.
patch ()
{
  python3 "$tests_dir/mkimage/qcow2patch.py" "$@" || { echo "$*" >>"$tmp/.patch-failed"; return 1; }
}

sha256 ()
{
  sha256sum <"$1" | cut -d ' ' -f 1
}

# --- independent opinions

# The guest disk that stock QEMU sees through an overlay.
nested ()
{
  printf '{"driver":"qcow2","file":{"driver":"qcow2","file":{"driver":"file","filename":"%s"}}}' "$1"
}

# No errors and no leaks, says QEMU, in the image and nothing printed about any.
img_check_clean ()
{
  qemu-img check "$@" >check.log 2>&1
  local r=$?
  if [ $r -ne 0 ] || ! grep -q 'No errors were found' check.log ||
     grep -E -q 'ERROR|Leaked|leaked|corrupt' check.log; then
    head -n 20 check.log
    return 1
  fi
}

# No errors, says QEMU; leaks are allowed.
img_check_leaks_at_most ()
{
  qemu-img check "$@" >check.log 2>&1
  local r=$?
  case $r in
    0|3) ! grep -E -q '^ERROR|corrupt' check.log && return 0 ;;
  esac
  head -n 20 check.log
  return 1
}

# The healed image, looked at through its overlay, and the overlay itself.
nested_qemu_img_check ()
{
  img_check_clean "json:$(nested "$1")" && img_check_clean -f qcow2 "$1"
}

nested_convert ()
{
  qemu-img convert -O raw "json:$(nested "$1")" "$2"
}

# The bytes of the healed image file, as QEMU reads them from the overlay.
healed_file ()
{
  qemu-img convert -f qcow2 -O raw "$1" "$2"
}

# Does the overlay hold nothing of its own?
overlay_is_empty ()
{
  local n

  n=$(qemu-img map -f qcow2 --output=json "$1" | jq '[.[] | select(.depth == 0 and .present)] | length') &&
    [ "$n" = 0 ] || { qemu-img map -f qcow2 "$1"; return 1; }
}

guest_raw ()
{
  qemu-img convert -U -f qcow2 -O raw "$1" "$2"
}

copy_out='rm -f out.raw; nbdcopy "$uri" out.raw'

# report_has CODE...: the last report (report.json) lists these findings.
report_has ()
{
  local code

  for code; do
    jq -e --arg c "$code" '[.findings[] | select(.code == $c)] | length > 0' \
      "${REPORT:-report.json}" >/dev/null || { jq -c .findings "${REPORT:-report.json}"; return 1; }
  done
}

report_lacks ()
{
  local code

  for code; do
    not report_has "$code" >/dev/null || { jq -c .findings "${REPORT:-report.json}"; return 1; }
  done
}

# heals_ok NAME IMAGE EXPECTED_RAW [CODE...]: the whole promise of a healing,
# into IMAGE.overlay.  The expected bytes must not come from our reader.  The
# report is left in report.json, the healed file's bytes in healed.bin.
heals_ok ()
{
  local name=$1 img=$2 want=$3 before ov=$2.overlay
  shift 3

  [ -b "$img" ] && ov=$(basename "$img").overlay
  rm -f "$ov" report.json
  before=$(sha256 "$img")
  ok "$name: heals and serves" \
    serve "$img" overlay="$ov" report=report.json --run "$copy_out" || return 1
  is "$name: the source is as it was" "$(sha256 "$img")" "$before"
  ok "$name: guest bytes are right" cmp out.raw "$want"
  ok "$name: QEMU finds no errors and no leaks in the healed image" nested_qemu_img_check "$ov"
  ok "$name: QEMU reads the same guest bytes" eval "nested_convert '$ov' n.raw && cmp n.raw '$want'"
  [ $# -eq 0 ] || ok "$name: the report names $*" report_has "$@"
  healed_file "$ov" healed.bin
}

# What damaged d.qcow2 may lose: for each disk, `-' or a snapshot, the offsets and lengths
# that the damage explains.  Its bytes before are in sound.DISK.raw.
declare -A may=()
disks=(-)

# forget_disk DISK: only what the report lists as lost is zeros, and no more is listed than may be.
# The result is in want.DISK.raw.
forget_disk ()
{
  # shellcheck disable=SC2086
  cp "sound.$1.raw" "want.$1.raw" &&
    python3 "$tests_dir/forget.py" report.json "$1" "want.$1.raw" ${may[$1]:-}
}

# disk_is_right DISK: in the healed image, as this program and as QEMU read it.
disk_is_right ()
{
  local l=()
  [ "$1" = - ] || l=(-l "snapshot.name=$1")
  cmp "out.$1.raw" "want.$1.raw" &&
    qemu-img convert -O raw "${l[@]}" "json:$(nested d.overlay)" n.raw && cmp n.raw "want.$1.raw"
}

# heals_losing NAME CODES ARG...: the whole promise of level all for d.qcow2; CODES in one word.
heals_losing ()
{
  local name=$1 codes=$2 before disk run=$copy_out
  shift 2

  rm -f d.overlay report.json out.*raw
  for disk in "${disks[@]}"; do
    [ "$disk" = - ] && run+='; mv out.raw out.-.raw' ||
      run+="; nbdcopy \"nbd+unix:///snapshot%2F$disk?socket=\$unixsocket\" out.$disk.raw"
  done
  before=$(sha256 d.qcow2)
  ok "$name: heals and serves" \
    serve d.qcow2 repair=all overlay=d.overlay report=report.json "$@" --run "$run" || return 1
  is "$name: the source is as it was" "$(sha256 d.qcow2)" "$before"
  for disk in "${disks[@]}"; do
    ok "$name: lost is what was damaged ($disk)" forget_disk "$disk"
    ok "$name: all else is right ($disk)" disk_is_right "$disk"
  done
  ok "$name: QEMU finds it clean" nested_qemu_img_check d.overlay
  # shellcheck disable=SC2086
  ok "$name: the report names $codes" report_has $codes
}

# --- making images

# make_fs_image IMAGE SIZE [qemu-img create options]: an ext4 file system with
# known files (sums in IMAGE.sums), its raw bytes in IMAGE.raw.
make_fs_image ()
{
  local img=$1 size=$2
  shift 2

  require mke2fs
  mkdir -p tree/dir
  patch tree/a bytes "$SEED" 3000000
  patch tree/dir/b bytes "$((SEED + 1))" 1500000
  seq 200000 >tree/numbers
  echo hello >tree/dir/hello
  ( cd tree && sha256sum a dir/b numbers dir/hello ) >"$img.sums"
  rm -f "$img.raw"
  truncate -s "$size" "$img.raw"
  mke2fs -q -F -t ext4 -d tree -E lazy_itable_init=0,lazy_journal_init=0 "$img.raw" || return 1
  rm -rf tree
  qemu-img convert -f raw -O qcow2 "$@" "$img.raw" "$img"
}

# age_image IMAGE SIZE_IN_KIB SEED OPS: seeded writes, zeros and discards, the
# way a disk looks after a while.
age_image ()
{
  age_commands "$2" "$3" "$4" | qemu-io -f qcow2 -d unmap "$1" >/dev/null
}

# Seeded here, since a shell in a pipe has a RANDOM of its own.
age_commands ()
{
  local kib=$1 ops=$3 i off len
  RANDOM=$2

  for ((i = 0; i < ops; i++)); do
    off=$(((RANDOM * 32768 + RANDOM) % kib))
    len=$((1 + RANDOM % (RANDOM % 4 ? 64 : 512)))
    [ $((off + len)) -le "$kib" ] || len=$((kib - off))
    case $((RANDOM % 10)) in
      0) echo "discard ${off}k ${len}k" ;;
      1) echo "write -z ${off}k ${len}k" ;;
      2) echo "write -z -u ${off}k ${len}k" ;;
      *) echo "write -P $((1 + RANDOM % 255)) ${off}k ${len}k" ;;
    esac
  done
}

make_image ()
{
  local img=$1 size=$2
  shift 2

  qemu-img create -q -f qcow2 "$@" "$img" "$size"
}

io ()
{
  local img=$1 args=() c
  shift

  for c; do
    args+=(-c "$c")
  done
  qemu-io -f qcow2 -d unmap "${args[@]}" "$img" >io.log 2>&1 && ! grep -q -i failed io.log ||
    { cat io.log; return 1; }
}

# loop_device FILE: a block device of the file's size, in the variable loop.
# Fails where the machine does not allow it.
loop_device ()
{
  loop=$(losetup -f --show "$1" 2>losetup.log) && loop_devices+=("$loop") && [ -b "$loop" ]
}

loop_detach ()
{
  losetup -d "$1"
}

# The program that makes guest load.
nbd_ops ()
{
  "$BUILD/tests/nbd-ops" "$@"
}

# build_helper NAME LIBRARY...: from tests/NAME.c, if make has not done it.
build_helper ()
{
  local name=$1 flags=
  shift

  [ -x "$BUILD/tests/$name" ] && [ "$BUILD/tests/$name" -nt "$tests_dir/$name.c" ] && return
  mkdir -p "$BUILD/tests"
  [ $# -eq 0 ] || flags=$(pkg-config --cflags --libs "$@")
  # shellcheck disable=SC2086
  ${CC:-cc} -std=gnu11 -O2 -g -D_GNU_SOURCE -o "$tmp/$name" "$tests_dir/$name.c" $flags -pthread 2>cc.log ||
    skip_all "tests/$name.c cannot be built: $(head -n 1 cc.log)"
  mv "$tmp/$name" "$BUILD/tests/$name"
}

require_nbd_ops ()
{
  build_helper nbd-ops libnbd
}

require_peak ()
{
  build_helper peak
}

# --- being killed

# A library that ends the server at its Nth change to a file; see tests/killat.c.
require_killat ()
{
  [ -z "$sanitized" ] || skip_all "preloading does not go together with a sanitizer"
  ${CC:-cc} -O1 -D_GNU_SOURCE -shared -fPIC -o "$tmp/killat.so" "$tests_dir/killat.c" -ldl 2>cc.log ||
    skip_all "tests/killat.c cannot be built: $(head -n 1 cc.log)"
}

# killed_at N ARG...: a captive server that is killed at its Nth change to a file.
# Fails if it ended before that.
killed_at ()
{
  local n=$1
  shift

  rm -f killed
  { LD_PRELOAD=$tmp/killat.so KILL_AT=$n KILL_MARK=$tmp/killed timeout -k 5 60 \
      nbdkit -U - "$PLUGIN" "$@" --run 'unset LD_PRELOAD KILL_AT; true' >killed.log 2>&1; } 2>/dev/null
  [ -e killed ]
}

# fails_from N ERRNO ARG...: likewise, but its changes fail from the Nth on.  The exit
# code of the server is in failed_exit, its messages in err.log.
fails_from ()
{
  local n=$1 errno=$2
  shift 2

  rm -f killed
  LD_PRELOAD=$tmp/killat.so KILL_AT=$n KILL_ERRNO=$errno KILL_MARK=$tmp/killed timeout -k 5 60 \
    nbdkit -U - "$PLUGIN" "$@" --run 'unset LD_PRELOAD KILL_AT; true' >out.log 2>err.log
  failed_exit=$?
  [ -e killed ]
}

# served_rightly: without inplace=true, the image is refused or it is all old or all new.
served_rightly ()
{
  if serve "$image" "${options[@]}" --run 'nbdcopy "$uri" out.raw' >/dev/null 2>&1; then
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
    serve "$image" "${options[@]}" inplace=true --run 'nbdcopy "$uri" out.raw' || return 1
  else
    serve "$image" "${options[@]}" "$@" --run 'nbdcopy "$uri" out.raw' || return 1
  fi
  cmp out.raw want.raw && img_check_clean -f qcow2 "$image_file" && guest_raw "$image_file" n.raw && cmp n.raw want.raw || return 1
  left=$(ls -A . state/qcow2repair 2>/dev/null | grep -E 'journal|overlay')
  [ -z "$left" ] || { echo "left behind: $left"; return 1; }
}

# What the sweep works on: its image (for a far one: uri=URI), parameters for every start, and 1 for a kill at
# each change, 2 for every second.  old.raw and want.raw are the guest's bytes before
# and after.
image=a.qcow2
options=()
sweep_step=1

# sweep NAME RESTORE ARG...: RESTORE puts the files back as they were.
sweep ()
{
  local name=$1 restore=$2 n=$((1 - sweep_step)) bad=0 image_file=${image#uri=}
  shift 2

  while n=$((n + sweep_step)); $restore; killed_at $n "$image" "${options[@]}" "$@"; do
    recovers "$@" >why 2>&1 || { bad=$((bad + 1)); diag "$name: killed at change $n:"; diag_file why; }
  done
  is "$name: killed at $(((n - 1) / sweep_step)) changes, all well afterwards" "$bad" 0
  ok "$name: there were enough of them to mean something" test $n -gt 9
}
