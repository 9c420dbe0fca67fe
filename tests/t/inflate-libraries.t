#!/bin/bash
# Whichever library decompresses deflate, and zlib alone: the same bytes and the same errors.
. "$(dirname "$0")/../lib.sh"
require make

units=(fmt/test-inflate img/test-compressed check/test-deep)

# built NAME PACKAGE VARIABLE...: the tests of a build that has, of them, PACKAGE only.
built ()
{
  local name=$1 package=$2
  local make_it=(make -C "$top_dir" --no-print-directory -s "BUILD=$tmp/$name" "${@:3}")
  local u

  if [ "$package" != zlib ] && ! pkg-config --exists "$package"; then
    skip "$name: $package is not there"
    return
  fi
  ok "$name: builds" "${make_it[@]}" WERROR=-Werror "${units[@]/#/$tmp/$name/tests/unit/}"
  for u in "${units[@]}"; do
    ok "$name: $u" "$tmp/$name/tests/unit/$u"
  done
}

# The best of what is there is what all other tests run with.
built libdeflate libdeflate ISAL=no
built zlib zlib ISAL=no LIBDEFLATE=no
done_testing
