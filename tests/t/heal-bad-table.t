#!/bin/bash
# A refcount table that is zeroed, random, misplaced or absurd is replaced.
. "$(dirname "$0")/../lib.sh"

make_image base.qcow2 32M
age_image base.qcow2 32768 "$SEED" 80
guest_raw base.qcow2 base.raw
size=$(stat -c %s base.qcow2)
rt=$(patch base.qcow2 get refcount_table_offset)
l1=$(patch base.qcow2 get l1_table_offset)

bad_table ()    # NAME PATCH COMMAND...
{
  local name=$1
  shift

  cp base.qcow2 d.qcow2
  patch d.qcow2 "$@"
  heals_ok "$name" d.qcow2 base.raw
  ok "$name: something was found" eval 'jq -e ".findings | length > 0" report.json'
}

at ()           # OFFSET [CLUSTERS]
{
  echo "set refcount_table_offset=$1 refcount_table_clusters=${2:-1}"
}

bad_table "zeroed" rt-zero
bad_table "random" rt-random 7
bad_table "misaligned by a sector"       $(at $((rt + 512)))
bad_table "misaligned by a byte"         $(at $((rt + 1)))
bad_table "at the end of the file"       $(at $(((size + 65535) / 65536 * 65536)))
bad_table "far outside the file"         $(at 0x0010000000000000)
bad_table "at the last cluster of signed arithmetic"   $(at 0x7fffffffffff0000)
bad_table "at the last cluster of unsigned arithmetic" $(at 0xffffffffffff0000)
bad_table "wrapping around"              $(at 0xffffffffffff0000 2)
bad_table "as long as can be"            $(at "$rt" 0xffffffff)
bad_table "longer than the file"         $(at "$rt" 128)
bad_table "of no length"                 $(at "$rt" 0)
bad_table "on the header"                $(at 0 1)
bad_table "on the L1 table"              $(at "$l1")
bad_table "on guest data"                $(at $((size / 65536 * 65536 - 65536)))

done_testing
