# Far sides, for tests.  Source it after lib.sh:  . "$tests_dir/far.sh"
#
#     plugin -- $proxy_uri --> nbd-proxy.py -- $far_sock --> qemu-nbd or nbdkit
#
# A test may start one line (proxy_start), and as many servers as it wants.  Messages of
# theirs are in far.log and proxy.log, what passed is in line.log.  Whatever was started is
# ended by lib.sh.
#
# shellcheck shell=bash

far_sock=$tmp/far.sock
proxy_sock=$tmp/line.sock
proxy_uri="nbd+unix:///?socket=$proxy_sock"
proxy_control=$tmp/control.sock
proxy_program=$tests_dir/nbd-proxy.py

require qemu-nbd

# Until the plugin has what these tests are about.
require_uri ()
{
  "${nbdkit_env[@]}" nbdkit "$PLUGIN" --dump-plugin 2>/dev/null |
    holds -E '^qcow2repair_parameters=(.*,)?uri(,|$)' || skip_all "no uri="
}

# far_pid FILE: remember who is there, to be ended.  nbdkit's parent may be gone before its child has
# written the file.
far_pid ()
{
  local n=0

  while [ ! -s "$1" ] && [ $((n += 1)) -le 1000 ]; do sleep 0.01; done
  far_server_pid=$(cat "$1") && started_pids+=("$far_server_pid")
}

# far_qemu IMAGE [--writable] [qemu-nbd options]: stock QEMU serves the file's bytes at
# far_sock.  It is read-only unless told, and stays when clients hang up in the midst of
# requests, which nbdkit 1.32 does not.
far_qemu ()
{
  local img=$1 args=(-r)
  shift

  [ "${1:-}" != --writable ] || { args=(); shift; }
  rm -f "$far_sock" far.pid
  # --fork returns once it listens.
  qemu-nbd --fork --pid-file="$tmp/far.pid" -t -f raw -e 16 -k "$far_sock" "${args[@]}" "$@" "$img" \
    2>>far.log 6>&- 7>&- || { cat far.log; return 1; }
  far_pid far.pid
}

# far_nbdkit ARG...: nbdkit serves at far_sock.
far_nbdkit ()
{
  rm -f "$far_sock" far.pid
  # It goes into the background once it listens.
  nbdkit -U "$far_sock" -P "$tmp/far.pid" "$@" 2>>far.log 6>&- 7>&- || { cat far.log; return 1; }
  far_pid far.pid
}

# End the far server that was started last, and wait until it has gone.  qemu-nbd 7.2 does not always
# heed SIGTERM; what it was given is in the kernel's hands anyway.
far_stop ()
{
  local n=0

  kill -"${1:-TERM}" "$far_server_pid"
  while kill -0 "$far_server_pid" 2>/dev/null &&
        ! grep -q '^State:.*Z' "/proc/$far_server_pid/status"; do
    [ $((n += 1)) -ne 200 ] || kill -KILL "$far_server_pid"
    sleep 0.01
  done 2>/dev/null
}

# proxy_start [OPTIONS]: the line to far_sock.
proxy_start ()
{
  local pid=

  rm -f line.fifo.* proxy.ready
  mkfifo line.fifo.in line.fifo.out proxy.ready
  # Opened for both, so that nobody waits for the other.
  exec 6<>line.fifo.in 7<>line.fifo.out 8<>proxy.ready
  { python3 "$proxy_program" --listen "$proxy_sock" --control "$proxy_control" --far "$far_sock" \
      --log line.log --fifo line.fifo --ready proxy.ready "$@" >proxy.log 2>&1 </dev/null 6>&- 7>&- 8>&-
    echo ended >&8; } 2>/dev/null &     # bash tells there that it was killed
  read -r -t 30 pid <&8
  exec 8<&-
  case $pid in ended|'') cat proxy.log; return 1 ;; esac
  started_pids+=("$pid")
}

# proxy COMMAND...: its answer is in proxy_answer, without the `ok'; fails if it is an error.
proxy ()
{
  proxy_answer=
  echo "$*" >&6
  read -r -t 60 proxy_answer <&7
  case $proxy_answer in
    ok*) proxy_answer=${proxy_answer#ok}; proxy_answer=${proxy_answer# } ;;
    *) echo "proxy: ${proxy_answer:-no answer to $*}"; return 1 ;;
  esac
}

# For a command that another program runs.
proxy_command="python3 '$proxy_program' --send '$proxy_control'"

# proxy_number KEY: one of its numbers, on the output.
proxy_number ()
{
  proxy stats || return 1
  [[ " $proxy_answer " =~ " $1="([0-9]+)" " ]] && echo "${BASH_REMATCH[1]}"
}

# Ranges that the clients asked for more than once, from the log: there should be none.  Reads of
# 4096 bytes do not count: they are how a disk is known again.
read_twice ()
{
  proxy sync || return 1
  awk '$1 == "read" && $4 != 4096 { print $3, $4 }' line.log | sort -n |
    awk 'NR > 1 && $1 < end { print "read again:", $1, $2 } $1 + $2 > end { end = $1 + $2 }'
}

# reads_keep_to MIN MAX: no read is shorter or longer, none is unaligned to MIN.
reads_keep_to ()
{
  proxy sync || return 1
  awk -v min="$1" -v max="$2" \
    '$1 == "read" && ($3 % min || $4 % min || $4 < min || $4 > max) { print; bad = 1 } END { exit bad }' line.log
}

# nbd_do URI-OR-SOCKET COMMAND...: see tests/nbdwire.py
nbd_do ()
{
  python3 -B "$tests_dir/nbdwire.py" -t "${NBD_TIMEOUT:-60}" "$@"
}

# right_or_eio URI COMMAND...: each answer is `ok' or EIO; no bytes are wrong, nobody hangs up.
right_or_eio ()
{
  nbd_do "$@" >answers || { cat answers; return 1; }
  not grep -E -v '^(ok|error EIO)' answers
}

# answers WANTED URI COMMAND...: what nbd_do prints, lines joined by commas.
answers ()
{
  local wanted=$1 got
  shift

  got=$(nbd_do "$@" | paste -s -d , -)
  [ "$got" = "$wanted" ] || { echo "got: $got"; echo "wanted: $wanted"; return 1; }
}

# within SECONDS COMMAND...: it succeeds, and in time: more than it takes on a busy machine, less than
# it would take with the default of timeout= (30) or reconnect= (60).
within ()
{
  local limit=$1 begin=$SECONDS
  shift

  "$@" || return 1
  [ $((SECONDS - begin)) -le "$limit" ] || { echo "took $((SECONDS - begin)) seconds, not $limit"; return 1; }
}

# named_after LINES FILE: a line after the first so many names the far side.
named_after ()
{
  tail -n "+$(($1 + 1))" "$2" | holds -F "$proxy_sock" || { tail -n 20 "$2"; return 1; }
}

lines_of ()
{
  wc -l <"$1"
}

# make_far_image IMAGE [qemu-img options]: 64 MiB with bytes of their own everywhere but in
# two holes; IMAGE.raw has the guest's bytes.  The file's size is a multiple of 64 KiB.
make_far_image ()
{
  local img=$1
  shift

  patch head.bytes bytes "$SEED" 25000000
  patch tail.bytes bytes "$((SEED + 1))" 10000000
  rm -f "$img.raw"
  truncate -s 64M "$img.raw"
  dd if=head.bytes of="$img.raw" conv=notrunc bs=1M status=none
  dd if=tail.bytes of="$img.raw" conv=notrunc bs=1M seek=44 status=none
  rm -f head.bytes tail.bytes
  qemu-img convert -f raw -O qcow2 "$@" "$img.raw" "$img" && truncate -s %64K "$img"
}
