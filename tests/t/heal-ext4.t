#!/bin/bash
# The file system inside a damaged image passes e2fsck, and its files are right.
PATH=$PATH:/usr/sbin:/sbin
. "$(dirname "$0")/../lib.sh"
require mke2fs e2fsck debugfs

for options in cluster_size=64k cluster_size=4k compat=0.10 cluster_size=2M; do
  make_fs_image base.qcow2 64M -o $options || fail "image"
  for damage in rt-zero "rb-random 0 1" "set refcount_table_offset=0 refcount_table_clusters=0" "copied flip l2 all"; do
    name="$options, ${damage%% *}"
    cp base.qcow2 d.qcow2
    # shellcheck disable=SC2086
    patch d.qcow2 $damage
    heals_ok "$name" d.qcow2 base.qcow2.raw
    ok "$name: e2fsck" e2fsck -fn out.raw
    ok "$name: files" eval 'rm -rf got && mkdir -p got/dir && for f in a dir/b numbers dir/hello; do
      debugfs -R "dump /$f got/$f" out.raw || return 1; done && (cd got && sha256sum -c ../base.qcow2.sums)'
  done
done

done_testing
