#!/bin/bash
# docs/remote.md: wherever the damaged image is, the page's command finds out what is wrong
# with it, and gets the disk.
. "$(dirname "$0")/../lib.sh"
. "$tests_dir/remote.sh"
require xz gzip tar

# The far machine's images.
make_image images/base.qcow2 4M
io images/base.qcow2 'write -P 7 0 4M'
make_image images/vm.qcow2 8M
io images/vm.qcow2 'write -P 5 1M 3M'
guest_raw images/vm.qcow2 want.raw
qemu-img create -q -f qcow2 -u -b /elsewhere/base.qcow2 -F qcow2 images/top.qcow2 4M
patch images/vm.qcow2 rt-zero
patch images/base.qcow2 rt-zero
cp images/top.qcow2 top.qcow2
cp images/vm.qcow2 web/
xz -k --block-size=1MiB images/vm.qcow2 && gzip -k images/vm.qcow2 && mv images/vm.qcow2.* web/
tar -cf web/vm.tar -C images base.qcow2 vm.qcow2
before=$(cat images/* | sha256sum)

web_start
nbd_start
is "each file is an export" "$(nbdinfo --list "nbd://127.0.0.1:$nbd_port" | grep -c '^export=')" 3
ok "qemu-nbd's is the same" eval 'nbdcopy nbd://127.0.0.1:$qemu_port/vm.qcow2 q.bin && cmp q.bin images/vm.qcow2'
if command -v psktool >/dev/null; then
  page "TLS" 1
  page "TLS" 2
  matches "QEMU reads the image through it" out.log '^virtual size: 8 MiB'
else
  skip "psktool is not installed"
fi
have_ssh=1
ssh_start || { have_ssh=; skip "$why"; }

found_it ()
{
  grep -q '^R16 ' err.log && grep -q '^checked again: sound' err.log || { cat err.log; return 1; }
}

# Each row of the table.
rows=0
while IFS='|' read -r _ where command _; do
  where=$(xargs <<<"$where")
  command=$(sed 's/^ *`\{0,1\}//; s/`\{0,1\} *$//' <<<"$command")
  rows=$((rows + 1))
  case $command in
    *nbds:*) [ -s keys.psk ] || { skip "psktool is not installed"; continue; } ;;
    *ssh*) [ -n "$have_ssh" ] || { skip "$why"; continue; } ;;
    '[the same'*) continue ;;
  esac
  ok "where: $where" run_here where "$command"
  ok "where: $where: says what is wrong" found_it
done < <(grep -E '^\| .* \| (`nbdkit|\[the same)' "$remote_page")
is "the table has these rows" "$rows" 9

page "Where is it?" 1
page "Where is it?" 2
ok "the disk is right" cmp disk.raw want.raw
page "A web server" 1
ok "A web server: says what is wrong" found_it
if [ -n "$have_ssh" ]; then
  page "SSH" 1
  ok "SSH: says what is wrong" found_it
else
  skip "$why"
fi
page "Backing files" 1
ok "Backing files: says what is wrong" found_it

# The two ways to get the nesting wrong, and what they say.
ok "a web address is no NBD URI" not run_here wrong 'nbdkit -U - qcow2repair uri=https://host/vm.qcow2 --run true'
matches "and that is said" err.log 'nbdkit -U - curl URL --run'
ok "nothing there" not run_here wrong 'nbdkit -U - curl https://host/nothing --run "$look"'
matches "and that is said, too" err.log '404'

is "the far images are as they were" "$(cat images/* | sha256sum)" "$before"

done_testing
