#!/bin/bash
# An overlay is refused over another image than its own, and over one that
# changed since; and whatever is no overlay is never written to.
. "$(dirname "$0")/../lib.sh"

make_image base.qcow2 32M
age_image base.qcow2 32768 "$SEED" 60
patch base.qcow2 rt-zero
touch -d 2024-01-01T00:00:00Z base.qcow2

fresh ()
{
  rm -f d.qcow2 o.qcow2
  cp -p base.qcow2 d.qcow2
  serve d.qcow2 overlay=o.qcow2 >/dev/null || fail "overlay for $1"
}

refused ()      # NAME IMAGE REGEX
{
  local before_o before_d

  before_o=$(sha256 o.qcow2) before_d=$(sha256 "$2")
  SERVE_TIMEOUT=20 ok "$1: refused" not serve "$2" overlay=o.qcow2
  matches "$1: says why" err.log "$3"
  is "$1: the overlay is as it was" "$(sha256 o.qcow2)" "$before_o"
  is "$1: the image is as it was" "$(sha256 "$2")" "$before_d"
}

fresh "use"
ok "unchanged: served" serve d.qcow2 overlay=o.qcow2

make_image other.qcow2 32M
io other.qcow2 'write -P 1 0 1M'
refused "another image" other.qcow2 'another|other|different|not (made )?for'

fresh size
truncate -s +65536 d.qcow2
touch -r base.qcow2 d.qcow2
refused "longer" d.qcow2 'changed|another|other|different|size|length'

fresh "one byte"
patch d.qcow2 write 300000 5a
touch -r base.qcow2 d.qcow2
refused "one byte changed, time put back" d.qcow2 'changed|another|other|different'

fresh "last byte"
patch d.qcow2 write $(($(stat -c %s d.qcow2) - 1)) 5a
touch -r base.qcow2 d.qcow2
refused "last byte changed, time put back" d.qcow2 'changed|another|other|different'

fresh "far byte"
patch d.qcow2 write $(($(stat -c %s d.qcow2) / 2 + 12345)) 5a
refused "one byte in the middle changed" d.qcow2 'changed|another|other|different'

fresh "time"
touch -d 2024-01-01T00:00:01Z d.qcow2
refused "time changed" d.qcow2 'changed|modified|written'

# Not an overlay of ours.
fresh "foreign"
qemu-img create -q -f qcow2 -b "$tmp/d.qcow2" -F raw o.qcow2 64M
refused "QEMU's own overlay" d.qcow2 'overlay'
make_image o.qcow2 32M
refused "an image" d.qcow2 'overlay'
echo "letters to my mother" >o.qcow2
refused "a text file" d.qcow2 'overlay|qcow2'
: >o.qcow2
refused "an empty file" d.qcow2 'overlay|qcow2|empty'

# Damaged overlays are refused or repaired by nobody: they are not trusted.
fresh "cut short"
truncate -s 70000 o.qcow2
SERVE_TIMEOUT=20 ok "an overlay cut short: refused" not serve d.qcow2 overlay=o.qcow2
ok "an overlay cut short: with a message" test -s err.log

done_testing
