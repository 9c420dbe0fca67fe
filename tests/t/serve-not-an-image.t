#!/bin/bash
# What is no qcow2 image is refused at once and with a clear message.
. "$(dirname "$0")/../lib.sh"

refused ()      # NAME FILE REGEX
{
  SERVE_TIMEOUT=10 serve "$2" >/dev/null 2>&1
  local r=$?
  ok "$1: refused, and not for lack of time" test $r -ne 0 -a $r -ne 124 -a $r -lt 128
  matches "$1: says why" err.log "$3"
  ok "$1: in a line or two" test "$(wc -l <err.log)" -le 5
}

mkfifo fifo
refused "FIFO" fifo 'fifo|pipe|regular file'
mkdir folder
refused "folder" folder 'directory|folder|regular file'
: >empty
refused "empty file" empty 'empty|too short|not a qcow2|no qcow2'
refused "nothing" missing.qcow2 'no such file'
refused "character device" /dev/zero 'regular file|character device|block device'
python3 -c 'import socket; socket.socket (socket.AF_UNIX).bind ("socket")' 2>/dev/null &&
  refused "socket" socket 'socket|regular file|no such device'
echo "Dear diary" >text
refused "text" text 'not a qcow2|no qcow2|magic'
truncate -s 10M zeros
refused "zeros" zeros 'not a qcow2|no qcow2|magic'
make_image a.qcow2 8M
for n in 1 3 4 8 40 71 72 100; do
  head -c $n a.qcow2 >short
  refused "header cut after $n bytes" short '.'
done
head -c 65536 a.qcow2 >first
SERVE_TIMEOUT=10 serve first >/dev/null 2>&1
ok "cut after the first cluster: no crash, no hang" test $? -ne 124 -a $? -lt 128
cp a.qcow2 magic
patch magic set magic=0
refused "magic lost" magic 'not a qcow2|no qcow2|magic'
patch magic set magic=0x514649fb cluster_bits=8
refused "clusters too small" magic 'cluster'
patch magic set cluster_bits=22
refused "clusters too large" magic 'cluster'
patch magic set cluster_bits=0xffffffff
refused "clusters absurd" magic 'cluster'
patch magic set cluster_bits=16 refcount_order=7
refused "refcounts too wide" magic 'refcount'
patch magic set refcount_order=0xffffffff
refused "refcounts absurd" magic 'refcount'
ln -s loop loop
refused "a link to itself" loop 'symbolic|links|loop'

if [ "$(id -u)" != 0 ]; then
  make_image secret.qcow2 1M
  chmod 0 secret.qcow2
  refused "no permission" secret.qcow2 'permission'
fi

done_testing
