#!/bin/bash
# An image without any refcount table (offset and length zero) is healed.
. "$(dirname "$0")/../lib.sh"

no_table ()     # NAME SIZE_IN_KIB qemu-img options...
{
  local name=$1 kib=$2
  shift 2

  rm -f d.qcow2
  make_image d.qcow2 "${kib}K" "$@"
  age_image d.qcow2 "$kib" "$SEED" 80
  guest_raw d.qcow2 d.raw
  patch d.qcow2 set refcount_table_offset=0 refcount_table_clusters=0
  heals_ok "$name" d.qcow2 d.raw R11
}

no_table "version 3" 32768
no_table "version 2" 32768 -o compat=0.10
no_table "512-byte clusters" 8192 -o cluster_size=512
no_table "2 MiB clusters" 131072 -o cluster_size=2M

# A file that never had one, written by nobody but this test.
patch d.qcow2 dense 12 4 3000
patch d.qcow2 guest d.raw
heals_ok "never had one" d.qcow2 d.raw R11

make_image d.qcow2 1M
guest_raw d.qcow2 d.raw
patch d.qcow2 set refcount_table_offset=0 refcount_table_clusters=0
heals_ok "empty disk" d.qcow2 d.raw R11

done_testing
