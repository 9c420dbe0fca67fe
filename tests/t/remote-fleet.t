#!/bin/bash
# docs/remote.md: many images at once, what comes of each, and what the exit status says.
. "$(dirname "$0")/../lib.sh"
. "$tests_dir/remote.sh"

section="Many images at once"
web_start
for name in sound refcounts mapping; do
  make_image web/$name.qcow2 8M
  io web/$name.qcow2 'write -P 5 1M 3M'
done
patch web/refcounts.qcow2 rt-zero
patch web/mapping.qcow2 l2 20 0x8000000000030000
head -c 30 web/sound.qcow2 >web/cut.qcow2
for name in sound refcounts mapping cut missing; do
  echo "http://127.0.0.1:$web_port/$name.qcow2"
done >images.list
rmdir images; mv images.list images

table ()
{
  run_here table "$(page_block "$section" 3)" && sed 's/^reports.//' out.log
}

# All are looked at, though some cannot be served.
all_at_once ()
{
  run_here all "$(page_block "$section" 1)"
  [ $? = 123 ] && [ "$(ls reports/*.json | wc -l)" = 5 ]
}
ok "all at once, with xargs" all_at_once
table >got
is "three need somebody" "$(cut -f 1 got)" "$(printf '%s\n' cut.qcow2.json mapping.qcow2.json missing.qcow2.json)"
matches "one is served as far as it can be read" got '^mapping.*read-only.*2 left'
matches "one was cut short" got '^cut.*no.*was cut short'
matches "one is not there" got '^missing.*no.*cannot connect'
matches "and its log says why" reports/missing.qcow2.log '404'

if command -v parallel >/dev/null && parallel --version 2>/dev/null | grep GNU >/dev/null; then
  rm -r reports
  run_here all "$(sed 's/^xargs.*//' <<<"$(page_block "$section" 1)"
                  page_block "$section" 2)"
  is "parallel says how many failed" "$?" 2
  table >again
  ok "and finds the same" eval 'cut -f 1,2 got | cmp - <(cut -f 1,2 again)'
else
  skip "GNU parallel is not installed"
fi

# The exit status.
status ()
{
  run_here status "$1" >/dev/null
  echo $?
}
for name in sound refcounts mapping; do
  is "$name: served, so the command's status" \
    "$(status "nbdkit -U - curl https://host/$name.qcow2 --run \"\$look\"")" 0
  is "$name: whatever it is" \
    "$(status "nbdkit -U - curl https://host/$name.qcow2 --run 'nbdkit -U - qcow2repair uri=\"\$uri\" --run \"exit 7\"'")" 7
done
for name in cut missing; do
  is "$name: not served" "$(status "nbdkit -U - curl https://host/$name.qcow2 --run \"\$look\"")" 1
done
cp web/refcounts.qcow2 web/vm.qcow2
page "$section" 4
matches "a script learns what was wrong" out.log '^something was wrong'
cp web/sound.qcow2 web/vm.qcow2
ok "or that nothing was" eval 'run_here sound "$(page_block "$section" 4)" && ! grep something out.log'

# How fast: the commands, on something small, near by.
page_names='s/ 1T$/ 4G/; s/=20ms/=1ms/'
page "How fast is it?" 1
matches "it is sound" out.log '^No errors were found'

done_testing
