#!/bin/bash
# Sectors that the far side cannot read cost the guest what lies in them or behind them,
# nothing else, and are in the report.
. "$(dirname "$0")/../lib.sh"
. "$tests_dir/far.sh"
require_uri

make_far_image a.qcow2
before=$(sha256 a.qcow2)
far_qemu a.qcow2 || exit 1
proxy_start || exit 1

# covers FILE SPACE OFFSET: an object in the report has a range with this byte.
covers ()
{
  jq -e --arg s "$2" --argjson o "$3" \
    '[.. | objects | select(.[$s + "-offset"] != null)
         | select(.[$s + "-offset"] <= $o and $o < .[$s + "-offset"] + (.[$s + "-length"] // 1))] | length > 0' \
    "$1" >/dev/null || { jq -c '[.findings, .lost, .["read-errors"]]' "$1"; return 1; }
}

# fails_exactly NAME RUNS STEP: `OFF LEN,OFF LEN': what the guest cannot read in steps of that
# size; the rest is right.
fails_exactly ()
{
  nbd_do "$server_uri" "scan 1048576 a.qcow2.raw $3" >scan
  is "$1: what fails, and no more" "$(sed -n 's/^failed //p' scan | paste -s -d ,)" "$2"
  ok "$1: the rest is right" grep -q '^ok .*wrong=0' scan
}

report_says ()  # NAME SPACE OFFSET
{
  ok "$1: export report.json" nbdcopy "nbd+unix:///report.json?socket=$PWD/s.sock" export.json
  ok "$1: it is told there" covers export.json "$2" "$3"
  server_stop
  is "$1: ends well" "$(cat s.exit)" 0
  ok "$1: and in the file" covers report.json "$2" "$3"
  ok "$1: and in the messages" named_after 0 s.log
}

# In guest data: two sectors of one cluster, one at the end of another.
host=$(($(patch a.qcow2 host 100) * 65536))
last=$(($(patch a.qcow2 host 710) * 65536))
proxy error $((host + 0x1200)) 1024; proxy error $((last + 65535)) 1
ok "guest data: starts" server_start s uri="$proxy_uri" report=report.json
fails_exactly "guest data" "6558208 1024,46595584 512" 512
ok "guest data: reads beside it, in one request" answers "ok,error EIO,ok" "$server_uri" \
  "read 6553600 4608 a.qcow2.raw" "read 6553600 65536" "read 6559232 60928 a.qcow2.raw"
report_says "guest data" guest 6558208
proxy error off

# In the L2 table: each sector has the entries of 4 MiB.
l2=$(($(patch a.qcow2 l1 0) & 0x00fffffffffffe00))
proxy error $((l2 + 1024)) 1
ok "L2 table: starts" server_start s uri="$proxy_uri" report=report.json
fails_exactly "L2 table" "8388608 4194304" 1048576
report_says "L2 table" guest 8388608
# It was a cable: the next start finds all of it.
proxy error off
ok "no longer: all is right" serve uri="$proxy_uri" report=report.json --run "$copy_out; cmp out.raw a.qcow2.raw"
ok "no longer: and sound" jq -e .sound report.json

# A sector that is bad for a while costs its entries for a while.
proxy error $((l2 + 1024)) 1
ok "for a while: starts" server_start s uri="$proxy_uri"
ok "for a while: what it maps cannot be read" answers "error EIO,ok" "$server_uri" "read 8388608 4096" "read 33554432 4096 a.qcow2.raw"
proxy error off
read_again () { until nbd_do "$server_uri" "read 8388608 4096 a.qcow2.raw" | holds '^ok'; do sleep 0.2; done; }
export -f read_again nbd_do holds; export server_uri tests_dir
ok "for a while: then it can" timeout 30 bash -c read_again
server_stop

# In what only the check reads: nothing is lost.
proxy error "$(patch a.qcow2 get refcount_table_offset)" 512
ok "refcount table: all is right" serve uri="$proxy_uri" report=report.json --run "$copy_out; cmp out.raw a.qcow2.raw"
ok "refcount table: it is told" report_has R17
proxy error off
# In what an overlay knows its source by: it is made all the same, and used again.
proxy error $((host + 0x1200)) 512; proxy error 700000 512; proxy error $(($(stat -c %s a.qcow2) - 5000)) 512
for i in 1 2; do
  ok "overlay, start $i: all else is right" serve uri="$proxy_uri" overlay=o.qcow2 --run 'nbdinfo --size "$uri"'
done
proxy error off
ok "overlay, once all can be read: likewise" serve uri="$proxy_uri" overlay=o.qcow2 --run "$copy_out; cmp out.raw a.qcow2.raw"
# The header: refused, and said why.
proxy error 0 512
ok "header: refused" within 25 not serve uri="$proxy_uri" --run true
ok "header: a message names it" named_after 0 err.log
is "the image is as it was" "$(sha256 a.qcow2)" "$before"

done_testing
