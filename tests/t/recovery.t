# Of each kind of damage that docs/recovery.md shows, one: what the page says that
# becomes of it still does, and none fails.  All of them, and QEMU beside: make recovery.
PATH=$PATH:/usr/sbin:/sbin
. "$(dirname "$0")/../lib.sh"
require mke2fs e2fsck mkfs.xfs xfs_repair mkntfs ntfscp ntfsfix

cases=(l1-outside l1-into-l2 l1-zero l2-far l2-into-rb l2-random l2-shared two-on-one compressed-overwritten
       subclusters cut-odd cut-half l1-size-small ext-length crosvm-format backing-missing snap-offset snap-entry
       bitmap-table rt-zero refcount-low everything xfs/l1-outside ntfs/l2-into-l2)
[ -z "$SOAK" ] || mapfile -t cases < <(sed -n 's/^| `\([^`]*\)`.*/\1/p' "$top_dir/docs/recovery.md")
# nbdkit is started in there, perhaps with a sanitizer.
exec "${nbdkit_env[@]}" env PLUGIN="$PLUGIN" TMPDIR="$tmp" \
  python3 "$tests_dir/recovery.py" compare "$top_dir/docs/recovery.md" "${cases[@]}"
