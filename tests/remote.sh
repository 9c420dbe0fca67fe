# What the tests of docs/remote.md share.  Source it after lib.sh.
#
# The page's commands are run as they stand there, but for the names of hosts, folders and
# keys: see here_names.  Folders: images (of the far machine), web (what the web server has).
#
# shellcheck shell=bash

remote_page=$top_dir/docs/remote.md
remote_state=$tmp/state

require busybox
plugin_by_name
export XDG_STATE_HOME=$remote_state
mkdir -p images web data

# page_blocks SECTION: its blocks of commands, each ended by a line "--".
page_blocks ()
{
  awk -v wanted="$1" '
    function end_block() { if (n) print "--"; n = 0 }
    /^```/ { fence = !fence }
    /^#/ && !fence { end_block(); here = ($0 ~ "^#+ " && substr ($0, index ($0, " ") + 1) == wanted); next }
    here && !fence && /^    / { print substr ($0, 5); n++; next }
    { end_block() }
    END { end_block() }' "$remote_page"
}

# page_sections: those that have blocks of commands.
page_sections ()
{
  awk '/^```/ { fence = !fence } /^#/ && !fence { name = substr ($0, index ($0, " ") + 1); told = 0 }
       /^    / && !fence && !told && name { print name; told = 1 }' "$remote_page"
}

# page_block SECTION N
page_block ()
{
  page_blocks "$1" | awk -v n="$2" '/^--$/ { ++at; next } at == n - 1'
}

free_port ()
{
  python3 -c 'import socket; s = socket.socket (); s.bind (("127.0.0.1", 0)); print (s.getsockname ()[1])'
}
web_port=$(free_port) nbd_port=$(free_port) tls_port=$(free_port) qemu_port=$(free_port) ssh_port=$(free_port)

# Standard input, with the names that things have here.
without_ssh=                    # 1: a file, in its place
page_names=                     # more for sed
here_names ()
{
  local ssh="ssh host=127.0.0.1 port=$ssh_port user=$(id -un) identity=$tmp/ssh/user known-hosts=$tmp/ssh/known path"

  [ -z "$without_ssh" ] || ssh="file file"

  sed -E -e "s|https://host/|http://127.0.0.1:$web_port/|g" \
    -e "s|nbds://rescue@host/|nbds://rescue@127.0.0.1:$tls_port/|g" \
    -e "s|nbd://host/|nbd://127.0.0.1:$nbd_port/|g" \
    -e "s|hostname=host |hostname=127.0.0.1 port=$tls_port |" \
    -e "s|ssh host=host( user=root identity=[^ ]*)? path|$ssh|" \
    -e "s|^(nbdkit .*)-p 10809 --tls|\\1-i 127.0.0.1 -p $tls_port -P $tmp/tls.pid --tls|" \
    -e "s|^(nbdkit .*)-p 10809|\\1-i 127.0.0.1 -p $nbd_port -P $tmp/nbd.pid|" \
    -e "s|^(qemu-nbd .*)-p 10809|\\1--fork --pid-file=$tmp/qnbd.pid -b 127.0.0.1 -p $qemu_port|" \
    -e "s|/etc/keys\\.psk|$tmp/keys.psk|g" \
    -e "s|=/images|=$tmp/images|g" -e "s| /images/| $tmp/images/|g" -e "s| /data/| $tmp/data/|g" \
    -e "$page_names"
}

# What earlier blocks have set.
page_variables ()
{
  grep -E '^    (look|copy|far|disk)=' "$remote_page" | sed 's/^    //'
}

# Servers in the background that a block has started.
remember_servers ()
{
  local f

  for f in far.pid disk.pid nbd.pid tls.pid qnbd.pid; do
    [ ! -s "$f" ] || started_pids+=("$(cat "$f")")
  done
}

# run_here NAME COMMANDS: their output in out.log and err.log.
run_here ()
{
  { page_variables; echo "set -e"; printf '%s\n' "$2" | here_names; } >block.sh
  timeout -k 5 "${SERVE_TIMEOUT:-120}" bash block.sh >out.log 2>err.log </dev/null
  local r=$?
  remember_servers
  [ $r -eq 0 ] || { cat err.log out.log; return $r; }
}

# page SECTION N: that block of the page works.
page ()
{
  local block

  block=$(page_block "$1" "$2")
  [ -n "$block" ] || { fail "$1 has a block $2"; return 1; }
  ok "$1: ${block%%$'\n'*}" run_here "$1" "$block"
}

# gone PIDFILE...: wait until they have ended.
gone ()
{
  local f pid

  for f; do
    pid=$(cat "$f" 2>/dev/null) || continue
    while kill -0 "$pid" 2>/dev/null && ! grep -q '^State:.*Z' "/proc/$pid/status"; do sleep 0.02; done 2>/dev/null
    rm -f "$f"
  done
}

# remote_stops: far.sock and disk.sock, however the block before has left them.
remote_stops ()
{
  local f

  for f in disk.pid far.pid; do
    [ ! -s $f ] || { kill "$(cat $f)" 2>/dev/null; gone $f; }
  done
  rm -f far.sock disk.sock
}

# --- servers

# in_background COMMAND...: until the test ends, of which bash says nothing.
in_background ()
{
  "$@" >server.log 2>&1 </dev/null &
  started_pids+=($!)
  disown
}

waits_for_port ()
{
  local n

  for ((n = 0; n < 200; n++)); do
    { : >"/dev/tcp/127.0.0.1/$1"; } 2>/dev/null && return
    sleep 0.02
  done
  return 1
}

# The web server answers ranges.
web_start ()
{
  nbdkit curl --dump-plugin >/dev/null 2>&1 || skip_all "nbdkit has no curl plugin"
  busybox --list | grep -x httpd >/dev/null || skip_all "this busybox has no httpd"
  in_background busybox httpd -f -p "127.0.0.1:$web_port" -h "$tmp/web"
  waits_for_port "$web_port" || { fail "the web server starts"; done_testing; }
}

nbd_start ()
{
  page "An NBD server" 1
}

# An sshd of the user's own, for this one key.  Fails, with the reason in $why.
ssh_start ()
{
  local sshd

  PATH=$PATH:/usr/sbin
  sshd=$(command -v sshd) && command -v ssh-keygen >/dev/null || { why="no sshd is installed"; return 1; }
  nbdkit ssh --dump-plugin >/dev/null 2>&1 || { why="nbdkit has no ssh plugin"; return 1; }
  mkdir -p -m 700 ssh
  ssh-keygen -q -t ed25519 -N '' -f ssh/host && ssh-keygen -q -t ed25519 -N '' -f ssh/user || return 1
  cp ssh/user.pub ssh/authorized
  echo "[127.0.0.1]:$ssh_port $(cat ssh/host.pub)" >ssh/known
  printf '%s\n' "ListenAddress 127.0.0.1:$ssh_port" "HostKey $tmp/ssh/host" "PidFile none" "UsePAM no" \
    "AuthorizedKeysFile $tmp/ssh/authorized" "StrictModes no" "PasswordAuthentication no" \
    "Subsystem sftp internal-sftp" >ssh/config
  [ "$(id -u)" != 0 ] || mkdir -p /run/sshd     # where it shuts itself in
  in_background "$sshd" -D -E "$tmp/ssh/log" -f "$tmp/ssh/config"
  waits_for_port "$ssh_port" || { why="sshd does not start: $(tail -n 1 ssh/log)"; return 1; }
  # An account may be locked, or shut out by the machine's own rules.
  nbdkit -U - ssh host=127.0.0.1 port="$ssh_port" user="$(id -un)" identity="$tmp/ssh/user" \
    known-hosts="$tmp/ssh/known" path="$tmp/ssh/known" --run 'nbdinfo --size "$uri"' >ssh/first 2>&1 ||
    { why="sshd lets nobody in: $(tail -n 1 ssh/log)"; return 1; }
}

# vm_parts SUMS: a kernel and an initramfs for a virtual machine that looks at the disk's known
# files (see vm/init), as vm_kernel and initramfs.
vm_parts ()
{
  local cache=${QR_VM_CACHE:-$BUILD/vm-cache}

  PATH=$PATH:/usr/sbin:/sbin
  require qemu-system-x86_64 mke2fs apt-get dpkg-deb
  busybox --list | grep -x cpio >/dev/null || skip_all "this busybox has no cpio"
  [ "$(uname -m)" = x86_64 ] || skip_all "the kernel package is for amd64"
  timeout 300 "$tests_dir/vm/get-kernel.sh" "$cache" >kernel.log 2>&1 || skip_all "no kernel: $(tail -n 1 kernel.log)"
  vm_kernel=$cache/vmlinuz
  "$tests_dir/vm/mkinitramfs.sh" initramfs "$cache/modules" "$1"
}

# far_fs_disk: the far image web/vm.qcow2 holds a file system (sums in sums), and is damaged.
far_fs_disk ()
{
  PATH=$PATH:/usr/sbin:/sbin
  make_fs_image vm.qcow2 96M || return 1
  grep -v numbers vm.qcow2.sums >sums
  patch vm.qcow2 copied clear l2 all + rt-zero
  mv vm.qcow2 web/
}
