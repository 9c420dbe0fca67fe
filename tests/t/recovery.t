# Of each kind of damage that docs/recovery.md shows, one: what the page says that
# becomes of it still does.  All of them, and QEMU beside: make recovery.
. "$(dirname "$0")/../lib.sh"
require mke2fs e2fsck

cases=(l1-outside l1-into-l2 l1-zero l2-far l2-into-rb l2-random l2-shared two-on-one compressed-overwritten
       subclusters cut-half l1-size-large ext-length snap-entry bitmap-table rt-zero refcount-low everything)
[ -z "$SOAK" ] || mapfile -t cases < <(python3 "$tests_dir/mkimage/damage.py" list | cut -d ' ' -f 1)
# nbdkit is started in there, perhaps with a sanitizer.
exec "${nbdkit_env[@]}" env PLUGIN="$PLUGIN" TMPDIR="$tmp" \
  python3 "$tests_dir/recovery.py" compare "$top_dir/docs/recovery.md" "${cases[@]}"
