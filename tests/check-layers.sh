#!/bin/bash
# Who may include whom, and who may print:
#
#   check-layers.sh TOP 'base:base' 'dev:dev base' ...
#
# Each argument is a layer of core/ and the layers that its files may include;
# the layer "stack" is what lies in core/ itself.  The plugin may include itself
# and core's public headers, and is alone in including nbdkit's.  Prints one line
# for each breach; exit 1 if there was one.
set -u
cd "$1" || exit 2
shift
bad=0

breach ()
{
  echo "$1" >&2
  bad=1
}

# "file:line:path" of each #include "path" in the files given.
includes ()
{
  [[ $# -eq 0 ]] || sed -s -n -e '/^ *# *include *"/{s/^[^"]*"\([^"]*\)".*/\1/;F;=;p}' -- "$@" |
    paste -d: - - -
}

layers=" "
for arg; do layers+="${arg%%:*} "; done
shopt -s nullglob

for arg; do
  layer=${arg%%:*} allowed=" ${arg#*:} "
  if [[ $layer == stack ]]; then files=(core/*.[ch]); else files=(core/"$layer"/*.[ch]); fi
  while IFS=: read -r file line path; do
    [[ -n $file ]] || continue
    if [[ $path == */* ]]; then
      [[ $allowed == *" ${path%%/*} "* && -e core/$path ]] ||
        breach "$file:$line: layer $layer may not include \"$path\" (allowed:$allowed)"
      # Another layer's inside is its own.
      [[ $path != *-int.h || ${path%%/*} == "$layer" ]] ||
        breach "$file:$line: \"$path\" is private to its layer"
    else
      [[ -e ${file%/*}/$path ]] ||
        breach "$file:$line: \"$path\" is not in ${file%/*}"
    fi
  done < <(includes "${files[@]}")
done

# A directory of core that no layer speaks for would be checked by nobody.
for d in core/*/; do
  d=${d%/}
  [[ $layers == *" ${d#core/} "* ]] || breach "$d is in no layer: add it to LAYERS in the Makefile"
done

while IFS=: read -r file line path; do
  [[ -n $file ]] || continue
  case $path in
    *-int.h) breach "$file:$line: \"$path\" is private to its layer" ;;
    plugin/*) [[ -e $path ]] || breach "$file:$line: \"$path\" does not exist" ;;
    *) [[ -e core/$path ]] || breach "$file:$line: \"$path\" is not core's" ;;
  esac
done < <(includes plugin/*.[ch])

core=(core/*.[ch] core/*/*.[ch])
if [[ ${#core[@]} -gt 0 ]]; then
  # Core never prints, exits or aborts; it knows nothing of nbdkit.
  while IFS= read -r hit; do
    [[ -z $hit ]] || breach "core must not: $hit"
  done < <(grep -nE -e '(^|[^_[:alnum:]])(printf|vprintf|puts|putchar|perror|exit|_exit|abort|nbdkit_[a-z_]+) *\(' \
                    -e '(^|[^_[:alnum:]])(stderr|stdout|stdin)([^_[:alnum:]]|$)' \
                    -e '# *include *<nbdkit' -- "${core[@]}" /dev/null | grep -vE '^[^:]*:[0-9]+: *(\*|/\*|//)')
fi
exit $bad
