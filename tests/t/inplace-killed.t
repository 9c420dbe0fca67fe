#!/bin/bash
# inplace=true is killed at every single change that it makes to a file.  Until
# it is started again no wrong byte is served; then the repair is in the image
# and nothing is left beside it.
. "$(dirname "$0")/../lib.sh"
require_killat

make_image base.qcow2 2M -o cluster_size=4k
age_image base.qcow2 2048 "$SEED" 20
guest_raw base.qcow2 base.raw
patch base.qcow2 rt-zero
cp base.raw want.raw
cp base.raw old.raw
fresh () { rm -f a.qcow2*; cp base.qcow2 a.qcow2; }
sweep "a repair" fresh inplace=true

# The start that finishes it is killed as well.
first=0
while fresh; first=$((first + 1)); killed_at $first a.qcow2 inplace=true && serve a.qcow2 >/dev/null 2>&1; do :; done
half () { fresh; killed_at "$first" a.qcow2 inplace=true; }
sweep "finishing it" half inplace=true

# The repair has to make the file longer.
if [ -n "$SOAK" ]; then
  patch dense.qcow2 dense 12 4 300
  truncate -s $((300 * 4096 - 1000)) dense.qcow2
  patch dense.qcow2 guest want.raw
  cp want.raw old.raw
  grows () { rm -f a.qcow2*; cp dense.qcow2 a.qcow2; }
  sweep "a repair that grows the file" grows inplace=true
fi

# An overlay with the guest's writes in it is applied; the start that goes on need
# not be told of it.
cp base.raw old.raw
laid () { rm -f a.qcow2* my.overlay; cp -p base.qcow2 a.qcow2; cp my my.overlay; }
fresh
touch -d 2024-01-01T00:00:00Z base.qcow2
cp -p base.qcow2 a.qcow2
serve a.qcow2 overlay=my.overlay \
  --run 'qemu-io -f raw -c "write -P 9 0 300k" -c "write -z 512k 512k" -c "write -P 3 1M 4k" "$uri"' >/dev/null
cp my.overlay my
serve a.qcow2 overlay=my.overlay --run 'nbdcopy "$uri" want.raw'
sweep "an overlay" laid inplace=true overlay=my.overlay

# With an external data file there are two overlays, and two files to write to.
rm -f a.qcow2* ./*.overlay*
options=(data-file=follow)
[ -n "$SOAK" ] || sweep_step=2
make_image a.qcow2 2M -o cluster_size=4k,data_file=d.data
qemu-io -f qcow2 -c 'write -P 1 0 300k' -c 'write -P 2 1M 200k' a.qcow2 >/dev/null
patch a.qcow2 rt-zero
touch -d 2024-01-01T00:00:00Z a.qcow2 d.data
serve a.qcow2 data-file=follow --run 'nbdcopy "$uri" old.raw'
mkdir keep
serve a.qcow2 data-file=follow overlay=my.overlay \
  --run 'qemu-io -f raw -c "write -P 9 100k 300k" -c "write -z 1M 64k" -c "write -P 3 1900k 4k" "$uri"' >/dev/null
serve a.qcow2 data-file=follow overlay=my.overlay --run 'nbdcopy "$uri" want.raw'
ok "data file: there are two overlays" test -e my.overlay.data
cp -p a.qcow2 d.data my.overlay my.overlay.data keep/
both () { rm -f a.qcow2* ./*.overlay*; cp -p keep/* .; }
sweep "an overlay and one of the data file" both inplace=true overlay=my.overlay

done_testing
