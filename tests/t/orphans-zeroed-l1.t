#!/bin/bash
# The L1 table was zeroed: `qemu-img check -r all' frees all that is left.  Here it is a
# finding, the image is not written to, and lost+found has each table's data in the disk's
# order, from which the file system can be put together again.
. "$(dirname "$0")/../lib.sh"
require debugfs

fetch ()        # EXPORT FILE
{
  echo "nbdcopy \"nbd+unix:///$1?socket=\$unixsocket\" $2"
}


make_fs_image d.qcow2 48M -o cluster_size=4k
qemu-img map -f qcow2 --output=json d.qcow2 >map.json
coverage=$((4096 / 8 * 4096))
tables=$(jq --argjson c $coverage '[.[] | select(.data) | range(.start / $c | floor; (.start + .length - 1) / $c + 1 | floor)]
  | map(floor) | unique | length' map.json)
l1=$(patch d.qcow2 get l1_table_offset)
patch d.qcow2 write "$l1" "$(printf '%0*d' $((8 * $(patch d.qcow2 get l1_size) * 2)) 0)"
before=$(sha256 d.qcow2)

for level in off refcounts all; do
  ok "$level: serves, read-only" serve d.qcow2 repair=$level report=r.json \
    --run 'nbdinfo --list "$uri" >list && nbdinfo --is read-only "$uri"'
  ok "$level: the report says what it is" eval 'REPORT=r.json; report_has O01 && report_has R02'
  matches "$level: the message names lost+found" err.log 'O01.*tables'
  matches "$level: lost+found is listed" list 'lost.found'
done
is "nothing was written" "$(sha256 d.qcow2)" "$before"

ok "lost+found is fetched" serve d.qcow2 --run "$(fetch lost+found lf) && $(fetch lost+found.json lf.json)"
ok "each table's region is a part of the disk, byte for byte" \
  eval "python3 '$tests_dir/lost-found.py' lf.json lf d.qcow2 map.json d.qcow2.raw $coverage >windows"
is "no table is missing" "$(tail -n 1 windows)" "without a region:"
is "one region a table" "$(jq .tables lf.json)" "$tables"
is "nothing was left out" "$(jq -c '[.sampled, .truncated]' lf.json)" '[false,false]'

# By the index, and knowing which table is which.
cat >again.py <<'END'
import json, sys
idx, windows = json.load(open(sys.argv[1])), open(sys.argv[3]).read().split("\n")
data = open(sys.argv[2], "rb").read()
out = bytearray(48 << 20)
for window, r in zip(windows, [r for r in idx["regions"] if r["kind"] == "table"]):
    for p in r["extents"]:
        at = int(window) * int(sys.argv[4]) + p["window-offset"]
        out[at:at + p["length"]] = data[p["offset"]:p["offset"] + p["length"]]
open("again.raw", "wb").write(out)
END
ok "the disk is put together again" python3 again.py lf.json lf windows $coverage
ok "it is the disk that was lost" cmp again.raw d.qcow2.raw
ok "its files are right" eval '
  debugfs -R "rdump / ." again.raw 2>/dev/null && sha256sum -c --quiet d.qcow2.sums'

# In the overlay they are free, the source keeps them.
ok "an overlay is made" serve d.qcow2 overlay=o.qcow2 report=r.json --run '
  nbdinfo --can write "$uri" && qemu-io -f raw -c "write -P 9 0 40M" "$uri" >/dev/null'
ok "the healed image is clean" nested_qemu_img_check o.qcow2
ok "lost+found is the same behind a used overlay" eval '
  serve d.qcow2 overlay=o.qcow2 --run "$(fetch lost+found lf2)" && cmp lf lf2'
ok "the export is listed behind a used overlay, too" serve d.qcow2 overlay=o.qcow2 report=r.json \
  --run 'nbdinfo --list "$uri" | grep -q lost+found.json'
matches "the operator is told again" err.log 'orphans: .* the image keeps them'
ok "the report counts them" jq -e '.orphans.clusters > 0 and .orphans.tables > 0' r.json
is "the source is as it was" "$(sha256 d.qcow2)" "$before"

done_testing
