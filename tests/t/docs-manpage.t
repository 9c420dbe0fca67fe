# The documents say what the program does: parameters, findings, version,
# the targets that the README names; and the man page is where install puts it.
. "$(dirname "$0")/../lib.sh"
require podchecker pod2man make

pod=$top_dir/nbdkit-qcow2repair.pod
man=$BUILD/man.pod              # with the findings filled in
dump=$("${nbdkit_env[@]}" nbdkit "$PLUGIN" --dump-plugin)
make_here=(make -C "$top_dir" --no-print-directory BUILD="$BUILD")

ok "the POD is well-formed" podchecker -warnings -warnings "$man"
is "its sections, in order" "$(sed -n 's/^=head1 //p' "$pod" | tr '\n' ';')" \
  "NAME;SYNOPSIS;DESCRIPTION;PARAMETERS;EXPORTS;EXAMPLES;FINDINGS;LIMITATIONS;DEBUG FLAGS;FILES;VERSION;SEE ALSO;AUTHORS;COPYRIGHT;"

section ()
{
  sed -n "/^=head1 $1\$/,/^=head1 /p" "$man"
}

is "PARAMETERS are the parser's" \
  "$(section PARAMETERS | sed -n 's/^=item .*B<\([a-z-]*\)=.*/\1/p' | sort -u)" \
  "$(sed -n 's/^qcow2repair_parameters=//p' <<<"$dump" | tr , '\n' | sort)"
is "the SYNOPSIS names them all" \
  "$(section SYNOPSIS | grep -o '[a-z][a-z-]*=' | tr -d = | sort -u)" \
  "$(sed -n 's/^qcow2repair_parameters=//p' <<<"$dump" | tr , '\n' | sort)"
is "the levels are the parser's" \
  "$(section PARAMETERS | sed -n 's/^=item B<repair=\([a-z]*\)>$/\1/p' | sort)" \
  "$(sed -n 's/^qcow2repair_repair=//p' <<<"$dump" | tr , '\n' | sort)"
is "the kinds of check are the parser's" \
  "$(section PARAMETERS | sed -n 's/^=item B<check=\([a-z]*\)>$/\1/p' | sort)" \
  "$(sed -n 's/^qcow2repair_check=//p' <<<"$dump" | tr , '\n' | sort)"
is "EXPORTS are the plugin's" \
  "$(section EXPORTS | sed -n 's/^=item F<\(.*\)>$/\1/p' | sed 's/NAME/*/' | sort)" \
  "$(sed -n 's/^qcow2repair_exports=//p' <<<"$dump" | tr , '\n' | grep -v '^disk$' | sort)"
is "--help names them all" \
  "$("${nbdkit_env[@]}" nbdkit "$PLUGIN" --help | sed -n '/^\[file=\]/,$p' | sed -n 's/^\[\{0,1\}\([a-z-]*\)=.*/\1/p' | sort)" \
  "$(sed -n 's/^qcow2repair_parameters=//p' <<<"$dump" | tr , '\n' | sort)"

codes=$(sed -n 's/^FINDING (\([A-Z][0-9]*\),.*/\1/p' "$top_dir/core/check/findings.def")
is "FINDINGS are the table's" "$(section FINDINGS | sed -n 's/^=item B<\([A-Z][0-9]*\)>.*/\1/p')" "$codes"
is "and each code is there once" "$(sort <<<"$codes" | uniq -d)" ""
ok "docs/FINDINGS.md is current (make docs)" \
  eval '"$BUILD/tests/gen-findings" md | cmp - "$top_dir/docs/FINDINGS.md"'

version=$(sed -n 's/^qcow2repair_version=//p' <<<"$dump")
ok "the manual is of this version" grep -q "manual of qcow2repair $version\\." "$pod"
ok "the built page is of this version" grep -q "^\\.TH .*qcow2repair-$version" "$BUILD/nbdkit-qcow2repair-plugin.1"

for target in $(grep -ho 'make [a-z][a-z-]*' "$top_dir/README.md" "$top_dir"/docs/*.md | sort -u | cut -d ' ' -f 2); do
  case $target in by|it|sure) continue ;; esac
  ok "the documents' make $target exists" eval "grep -q '^$target:' '$top_dir/Makefile'"
done
for link in $(grep -o '](\([^)]*\))' "$top_dir/README.md" | tr -d ']()' | grep -v '^http'); do
  ok "the README's link $link leads somewhere" test -e "$top_dir/$link"
done

ok "installs into DESTDIR" "${make_here[@]}" install DESTDIR="$PWD/root" PREFIX=/usr
ok "nbdkit finds the plugin by its name there" eval \
  'cmp "$PLUGIN" "root$(pkg-config --variable=plugindir nbdkit)/nbdkit-qcow2repair-plugin.so"'
if command -v man >/dev/null; then
  ok "man finds the page by its name there" eval \
    'man -M "$PWD/root/usr/share/man" nbdkit-qcow2repair-plugin | holds "heal it into"'
else
  ok "the page is there" test -s root/usr/share/man/man1/nbdkit-qcow2repair-plugin.1
fi
ok "uninstalls" "${make_here[@]}" uninstall DESTDIR="$PWD/root" PREFIX=/usr
is "nothing is left" "$(find root ! -type d)" ""

done_testing
