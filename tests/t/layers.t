# The layers hold: nobody includes what he may not, the core prints nothing,
# each header compiles alone; and the check of that finds what breaks it.
. "$(dirname "$0")/../lib.sh"
require make

make_here=(make -C "$top_dir" --no-print-directory BUILD="$BUILD")
ok "the layers hold" "${make_here[@]}" check-layers
ok "each header compiles alone" "${make_here[@]}" check-headers

layers=('base:base' 'dev:dev base' 'check:check dev base' 'stack:stack check dev base')

# breach NAME REGEX FILE LINE: a small tree with that line in that file is found out.
breach ()
{
  rm -rf tree
  mkdir -p tree/core/{base,dev,check} tree/plugin
  echo 'int err;' >tree/core/base/err.h
  echo '#include "base/err.h"' | tee tree/core/dev/bdev.h tree/core/check/check-int.h >tree/core/stack.h
  echo '#include "stack.h"' >tree/plugin/plugin.c
  "$tests_dir/check-layers.sh" tree "${layers[@]}" >out.log 2>&1 || { fail "$1: the tree before"; return; }
  mkdir -p "tree/$(dirname "$3")"
  echo "$4" >>"tree/$3"
  if "$tests_dir/check-layers.sh" tree "${layers[@]}" >out.log 2>&1; then
    fail "$1"
  else
    matches "$1" out.log "$2"
  fi
}

breach "base includes dev" 'core/base/a.c:1: layer base may not' core/base/a.c '#include "dev/bdev.h"'
breach "dev includes check" 'layer dev may not' core/dev/a.c '#include "check/check-int.h"'
breach "the stack includes another layer's inside" 'private' core/stack.c '#include "check/check-int.h"'
breach "a header that is not there" 'may not include' core/dev/a.h '#  include "base/none.h"'
breach "the plugin includes core's inside" 'private' plugin/a.c '#include "check/check-int.h"'
breach "the plugin includes what is not core's" "is not core's" plugin/a.c '#include "../tests/fault.h"'
breach "the core prints" 'core must not: core/dev/a.c:1' core/dev/a.c '  fprintf (stderr, "no");'
breach "the core exits" 'core must not' core/check/a.c '  exit (1);'
breach "the core knows nbdkit" 'core must not' core/a.c '#include <nbdkit-plugin.h>'
breach "a folder that is no layer" 'is in no layer' core/new/a.c 'int x;'

done_testing
