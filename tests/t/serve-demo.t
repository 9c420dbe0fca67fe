# `make serve' makes a damaged image, heals it into an overlay and serves it;
# with IMAGE it takes that one and leaves it as it is.
. "$(dirname "$0")/../lib.sh"
require make mke2fs e2fsck
[ -z "$sanitized" ] || skip_all "it starts nbdkit without the sanitizers' libraries"

# In a place of its own: another make serve may be running in BUILD.
mkdir build
ln -s "$PLUGIN" build/nbdkit-qcow2repair-plugin.so
demo ()
{
  (cd "$top_dir" && BUILD=$tmp/build SERVE_ARGS="--run 'cd \"$tmp\"; $1'" "$tests_dir/serve-demo.sh")
}

ok "it serves" eval 'demo "nbdcopy \"\$uri\" out.raw" >demo.log 2>&1'
matches "it says what was wrong" demo.log 'R1[0-9]'
matches "and what was mended" demo.log 'mended'
ok "the image is damaged still" not qemu-img check build/serve/demo.qcow2
ok "QEMU finds the healed one clean" nested_qemu_img_check build/serve/demo.overlay.qcow2
ok "the file system inside is whole" e2fsck -fn out.raw
ok "and holds the files" eval 'debugfs -R "cat hello.txt" out.raw | holds "damaged image"'

cp build/serve/demo.qcow2 mine.qcow2
sum=$(sha256 mine.qcow2)
export IMAGE=$PWD/mine.qcow2
ok "an image of one's own" demo 'qemu-io -f raw -c "write -P 7 1M 64k" "$uri"'
is "it is as it was" "$(sha256 mine.qcow2)" "$sum"
ok "writes are there the next time" demo 'qemu-io -f raw -c "read -P 7 1M 64k" "$uri"'
unset IMAGE

# The target itself; everything is built, so it only has to get the arguments across.
export SERVE_ARGS='--run "nbdinfo --size \"\$uri\""'
if [ "$(dirname "$PLUGIN")" = "$BUILD" ]; then
  ok "make serve" eval 'make -C "$top_dir" BUILD="$BUILD" serve >make.log 2>&1'
  matches "with the command's output" make.log '^67108864$'
else
  skip "make serve: the plugin under test is not in BUILD"
fi

done_testing
