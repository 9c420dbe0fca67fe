#!/bin/bash
# A check of a far image keeps many reads in flight, on several connections where the server
# allows that, joins what touches, and does not read the holes that the server tells of.
. "$(dirname "$0")/../lib.sh"
. "$tests_dir/far.sh"
require_uri

# 512 L2 tables, each by itself between the clusters that it maps.
make_image a.qcow2 16G -o preallocation=metadata,cluster_size=16k
tables=$(($(patch a.qcow2 get l1_size)))
far_qemu a.qcow2 || exit 1
proxy_start || exit 1
proxy delay 20

checked ()      # NAME: by way of the proxy, and found sound
{
  proxy reset
  ok "$1: sound" serve uri="$proxy_uri" report=report.json --run true
  is "$1: says the report" "$(jq .sound report.json)" true
}

between ()      # NAME KEY LEAST MOST
{
  local n
  n=$(proxy_number "$2")
  diag "$1: $2=$n"
  ok "$1: $2 is $3 to $4" test "$n" -ge "$3" -a "$n" -le "$4"
}

checked "many"
between "many" peak 64 512
between "many" connections 2 8
between "many" read "$((tables / 16))" "$((tables * 2))"
# The first MiB is asked for at once, before it is known which tables lie there; and each new
# connection looks at the first bytes, to see whether it is the same disk.
is "many: nothing else is read twice" "$(read_twice | awk '$3 >= 2^20')" ""

proxy multi-conn off
checked "one connection"
between "one connection" connections 1 1
between "one connection" peak 32 80
proxy multi-conn on

# Refcount blocks touch each other: they come in few reads.
bytes=$(proxy_number read-bytes)

# The L2 tables become holes, as after a discard by a host: they are as good as empty, and cost
# nothing but the question.
far_stop
python3 - a.qcow2 >l1s <<'EOF'
import struct, sys
f = open(sys.argv[1], "rb")
h = f.read(104)
n, off = struct.unpack(">IQ", h[36:48])
f.seek(off)
for e in struct.unpack(">%dQ" % n, f.read(8 * n)):
    print(e & 0x00fffffffffffe00)
EOF
while read -r off; do fallocate -p -o "$off" -l 16384 a.qcow2 || skip_all "no holes on this file system"; done <l1s
far_qemu a.qcow2 || exit 1
proxy reset
ok "holes: starts" serve uri="$proxy_uri" repair=off --run true
with=$(proxy_number read-bytes)
proxy extents off
proxy reset
ok "holes: and without block status" serve uri="$proxy_uri" repair=off --run true
without=$(proxy_number read-bytes)
diag "read: $bytes bytes with tables, $with with holes, $without where none are told of"
ok "holes: the tables were not read" test $((without - with)) -ge $((tables * 16384))

done_testing
