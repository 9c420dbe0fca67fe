# Every command that the documents show works, on an image that is damaged (nbdkit
# finds the plugin by path, virtual machines are played by nbdinfo); and the README's
# example of level all prints what the README says.
. "$(dirname "$0")/../lib.sh"

pod=$top_dir/nbdkit-qcow2repair.pod

# --- stand-ins, first in PATH
. "$tests_dir/remote.sh"
cat >bin/qemu-system-x86_64 <<'EOF'
#!/bin/bash
unset LD_PRELOAD
all=$*
case $all in
  *file=nbd*) uri=${all#*file=}; exec nbdinfo "${uri%%,format*}" ;;
  *-blockdev*) exec qemu-img check "json:$2" ;;
esac
exit 1
EOF
chmod +x bin/*

# damaged mapping|refcounts
damaged ()
{
  rm -f img.* fix.qcow2 disk.raw r.json report.json healed.qcow2
  qemu-img create -q -f qcow2 img.qcow2 1G
  qemu-io -f qcow2 -c 'write -P 1 0 4M' -c 'write -P 2 600M 4M' img.qcow2 >/dev/null
  case $1 in
    mapping)   patch img.qcow2 l2 3 0x8000000000030000 ;;
    refcounts) patch img.qcow2 rt-zero ;;
  esac
}

# commands FILE INDENT: blocks of shell commands, each ended by a line "--".
commands ()
{
  awk -v indent="$2" '
    function end_block() { if (n) print "--"; n = 0 }
    $0 !~ "^" indent "[^ ]" && !(n && $0 ~ "^" indent) { end_block(); next }
    { line = substr ($0, length (indent) + 1)
      if (n || line ~ /^(nbdkit (-U|qcow2repair)|nbdcopy|jq|qemu-img|qemu-system)/) { print line; n++ } }
    END { end_block() }' "$1"
}

# run_block NAME BLOCK
run_block ()
{
  local block=$2

  case $block in
    *https://host*)
      cp img.qcow2 web/; cp img.qcow2 images/
      block=$(here_names <<<"$block") ;;
    *nbd://host*)
      server_start host file=img.qcow2
      block=${block//nbd:\/\/host\/healed.qcow2/"'nbd+unix:///healed.qcow2?socket=$PWD/host.sock'"} ;;
    *report.json*)
      serve img.qcow2 report=report.json ;;
    *"img.overlay.qcow2"*|*-blockdev*)
      # Most go on where the one before them ended.
      [ -e img.overlay.qcow2 ] || case $block in
        nbdkit*) ;;
        *) serve img.qcow2 repair=all overlay=img.overlay.qcow2 ;;
      esac ;;
  esac
  block=${block//--run \'...\'/--run true}
  block=${block//rm img/rm -f img}      # one of two ways to end it
  case $block in
    'nbdkit qcow2repair file=img.qcow2') block='nbdkit -U - qcow2repair file=img.qcow2 --run true' ;;
  esac
  printf '%s\n' "set -e" "$block" >block.sh
  ok "$1" bash block.sh
  [ -z "${server_pid:-}" ] || server_stop
  server_pid=
}

run_all ()
{
  local name=$1 block= line n=0

  while IFS= read -r line; do
    if [ "$line" != -- ]; then
      block+=${block:+$'\n'}$line
      continue
    fi
    case $block in
      *repair=all*|*report.json*) damaged mapping ;;
      *) damaged refcounts ;;
    esac
    run_block "$name: ${block%%$'\n'*}" "$block"
    block=; n=$((n + 1))
  done < <(commands "$2" "$3")
  ok "$name: has such commands" test "$n" -ge "$4"
}

web_start
ssh_start || without_ssh=1
sed -n '/^=head1 EXAMPLES/,/^=head1 FINDINGS/p' "$pod" >examples
run_all "the manual" examples " " 9
run_all "the README" "$top_dir/README.md" "    " 4
run_all "report.md" "$top_dir/docs/report.md" "    " 2

# --- docs/remote.md: each block of commands is run by a test of its own

# is_run SECTION N: some test says so, maybe with a variable for the name.
is_run ()
{
  local tests=("$tests_dir"/t/remote-*.t "$tests_dir"/soak/remote-*.t "$tests_dir/remote.sh") word

  grep -h -F -e "page \"$1\" $2" -e "page_block \"$1\" $2" "${tests[@]}" && return
  word=$(grep -h -F -e "=\"$1\"" "${tests[@]}" | sed 's/=.*//' | head -n 1)
  [ -n "$word" ] && grep -F -e "page \"\$$word\" $2" -e "page_block \"\$$word\" $2" \
    $(grep -l -F -e "$word=\"$1\"" "${tests[@]}")
}

run_by_nobody ()
{
  local section n i

  while IFS= read -r section; do
    [ "$section" != "S3, VMware and others" ] || continue       # as it says there
    n=$(page_blocks "$section" | grep -c -x -e --)
    for ((i = 1; i <= n; i++)); do
      is_run "$section" "$i" >/dev/null || echo "$section, block $i"
    done
  done < <(page_sections)
}
ok "remote.md: has such commands" test "$(page_sections | wc -l)" -ge 14
is "remote.md: each is run" "$(run_by_nobody)" ""

# --- the README's output
damaged mapping
sed -n 's/^    \(\(mended:\|checked again\|LOST\|claimed twice\|    64\|orphans:\).*\)/\1/p' "$top_dir/README.md" >shown
bash -c "$(grep -F 'repair=all overlay=img.overlay.qcow2 --run' "$top_dir/README.md")" >printed 2>&1
ok "the README shows six lines" test "$(wc -l <shown)" = 6
is "and they are what is printed" "$(grep -F -x -f shown printed)" "$(cat shown)"

done_testing
