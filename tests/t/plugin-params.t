# Parameters: what makes no sense is refused before anything is touched, with a
# message that says what to do; what makes sense works, wherever the files lie.
. "$(dirname "$0")/../lib.sh"

# nbdkit with a preloaded sanitizer may hang at exit, in a library of its own.
[ -z "$sanitized" ] || SERVE_TIMEOUT=10

make_image a.qcow2 4M
io a.qcow2 'write -P 1 0 1M'
cp a.qcow2 b.qcow2
sum=$(sha256 a.qcow2)

# refused NAME REGEX ARG...: does not start, and says why.
refused ()
{
  local name=$1 regex=$2
  shift 2

  if serve "$@" >/dev/null 2>&1; then
    fail "$name: refused"
  else
    matches "$name" err.log "$regex"
  fi
}

dump=$("${nbdkit_env[@]}" nbdkit "$PLUGIN" --dump-plugin)
keys=$(sed -n 's/^qcow2repair_parameters=//p' <<<"$dump" | tr , ' ')
is "--dump-plugin lists the parameters" "$keys" \
  "file repair overlay inplace discard-orphans snapshot backing data-file report check cache-size force-share lost uri cache timeout reconnect"
ok "--dump-plugin tells the levels" eval 'grep -qx "qcow2repair_repair=off,refcounts,all" <<<"$dump"'

refused "no image" 'which image'
refused "unknown parameter" "unknown parameter 'colour'; known: file, repair, overlay" a.qcow2 colour=red
refused "misspelt: overly" 'did you mean overlay=' a.qcow2 overly=o
refused "misspelt: fiel" 'did you mean file=' fiel=a.qcow2
refused "misspelt: cache_size" 'did you mean cache-size=' a.qcow2 cache_size=1M
refused "misspelt: Force-Share" 'did you mean force-share=' a.qcow2 Force-Share=1
for key in cluster-size virtual-size; do
  refused "not there yet: $key" "$key= is not supported by this version: " a.qcow2 $key=x
done
refused "not there yet: salvage" 'off, refcounts and all' a.qcow2 repair=salvage
refused "unknown level" 'known: off, refcounts, all' a.qcow2 repair=everything
refused "misspelt level" 'did you mean refcounts' a.qcow2 repair=refcount
refused "check=perhaps" 'check=perhaps is not known' a.qcow2 check=perhaps
refused "force-share=perhaps" 'force-share=perhaps is not known' a.qcow2 force-share=perhaps
refused "lost=eror" 'did you mean error' a.qcow2 lost=eror
refused "lost=error without a check" "check=false and lost=error exclude" a.qcow2 check=false lost=error
for size in 0 -1 x 99999999999999999999 16E; do
  refused "cache-size=$size" 'cache-size=' a.qcow2 cache-size=$size
done

refused "uri=a file" 'not the URI of an NBD export' uri=a.qcow2
refused "uri=a web address" "nbdkit -U - curl URL" uri=http://host/a.qcow2
refused "uri without a host's answer" 'cannot connect to nbd' "uri=nbd+unix:///?socket=$PWD/nothing"
refused "file=a URI" 'say uri=nbd://host' file=nbd://host/a
refused "file and uri" 'exclude each other' a.qcow2 uri=nbd://host/a
refused "timeout=0" 'no time at all' a.qcow2 timeout=0
for value in -1 x 86401; do
  refused "timeout=$value" 'timeout' a.qcow2 timeout=$value
  refused "reconnect=$value" 'reconnect' a.qcow2 reconnect=$value
done
refused "inplace and cache" 'inplace=true and cache= exclude' a.qcow2 inplace=true cache=c
refused "the cache is the image" 'are the same file' a.qcow2 cache=a.qcow2
refused "the cache is the overlay" 'are the same file' a.qcow2 cache=c overlay=c

for key in $keys; do
  args=(a.qcow2)
  [ $key != file ] && [ $key != uri ] || args=()
  refused "$key without a value" "$key= has no value" "${args[@]}" $key=
done
nbd=nbd+unix:///?socket=/nonexistent
refused "uri=x" 'uri=x is not the URI of an NBD export' uri=x
refused "uri=https" 'let nbdkit fetch it' uri=https://example.com/a.qcow2
refused "a URI as file=" 'say uri=' file=$nbd
refused "a file and a URI" 'file=.* and uri=.* exclude' a.qcow2 uri=$nbd
refused "nobody there" 'cannot connect to nbd' uri=$nbd
refused "timeout=0" 'timeout=0' uri=$nbd timeout=0
refused "timeout=x" 'timeout' uri=$nbd timeout=x
refused "reconnect: two days" 'more than a day' uri=$nbd reconnect=172800
refused "cache= and inplace=" 'inplace=true and cache= exclude' a.qcow2 cache=c inplace=true
refused "cache= is the image" 'are the same file' a.qcow2 cache=a.qcow2
refused "cache= is the overlay" 'are the same file' a.qcow2 cache=o overlay=o
refused "two images" 'file= is given twice' a.qcow2 b.qcow2
refused "repair twice" 'repair= is given twice' a.qcow2 repair=all repair=all
refused "overlay twice" 'overlay= is given twice' a.qcow2 overlay=o overlay=p

refused "force-share and overlay" 'force-share=true and overlay= exclude' a.qcow2 force-share=1 overlay=o
refused "inplace=perhaps" 'inplace=perhaps is not known' a.qcow2 inplace=perhaps
for other in force-share=true check=false snapshot=x; do
  refused "inplace and $other" "inplace=true and ${other%%=x}.* exclude" a.qcow2 inplace=true $other
done
refused "discard-orphans without inplace" 'discard-orphans=true.*inplace=true' a.qcow2 discard-orphans=true
refused "an overlay with a journal's name" 'those of journals' a.qcow2 overlay=x.qcow2repair-journal
refused "check=false and overlay" 'check=false and overlay= exclude' a.qcow2 check=false overlay=o
refused "check=false and a repair" 'check=false and repair=all exclude' a.qcow2 check=false repair=all
refused "check=false and a snapshot" 'check=false and snapshot= exclude' a.qcow2 check=false snapshot=s
refused "data-file=none" 'no guest data at all' a.qcow2 data-file=none
refused "missing backing file" 'backing=nothing: No such file' a.qcow2 backing=nothing
refused "missing raw backing file" 'backing=(raw:)?nothing: No such file' a.qcow2 backing=raw:nothing
refused "backing file is the overlay" 'are the same file' a.qcow2 backing=b.qcow2 overlay=b.qcow2
refused "data file is the image" 'are the same file' a.qcow2 data-file=a.qcow2
refused "a snapshot that is not there" 'no snapshot with the name or ID' a.qcow2 snapshot=none
ok "check=deep" serve a.qcow2 check=deep
ok "check=false and repair=off agree" serve a.qcow2 check=false repair=off

ln a.qcow2 hard
ln -s a.qcow2 soft
mkdir dir
ln -s "$PWD" dir/up
refused "overlay is the image" 'are the same file' a.qcow2 overlay=a.qcow2
refused "overlay is a hard link to the image" 'are the same file' a.qcow2 overlay=hard
refused "overlay is a link to the image" 'are the same file' a.qcow2 overlay=soft
refused "overlay is the image by another way" 'are the same file' a.qcow2 overlay=dir/up/a.qcow2
refused "report is the image" 'are the same file' a.qcow2 report=./a.qcow2
refused "report is the overlay" 'are the same file' a.qcow2 overlay=new report=dir/up/new
refused "missing image" 'file=nothing: No such file' nothing
refused "missing folder of the overlay" 'directory no/: No such file' a.qcow2 overlay=no/o
refused "missing folder of the report" 'directory no/: No such file' a.qcow2 report=no/r
refused "overlay is a folder" 'is a directory' a.qcow2 overlay=dir
refused "overlay is a folder that is not there" 'is a directory' a.qcow2 overlay=none/
refused "report=-" '/dev/stderr' a.qcow2 report=-
ok "nothing was made" test ! -e o -a ! -e p -a ! -e new -a ! -e r
is "the image is as it was" "$(sha256 a.qcow2)" "$sum"

refused "not an image" 'qcow2' "$PLUGIN" report=r.json
is "the report of a refused start: a check error" "$(jq '."check-errors"' r.json)" 1
ok "the report of a refused start has the message" jq -e '.error | test("qcow2")' r.json

ok "a bare image" serve a.qcow2 report=r.json --run "$copy_out"
guest_raw a.qcow2 want.raw
ok "its bytes" cmp out.raw want.raw
is "the report says how it is served" "$(jq -r .served r.json)" read-write
is "the report has the image's absolute path" "$(jq -r .filename r.json)" "$PWD/a.qcow2"
ok "an image and an overlay with relative names elsewhere" \
  eval '(cd dir && serve ../a.qcow2 overlay=o.qcow2 report=r.json)'
ok "the overlay is where its name says" test -s dir/o.qcow2 -a -s dir/r.json
is "QEMU finds the image from the overlay" \
  "$(qemu-img info --output=json dir/o.qcow2 | jq -r '."full-backing-filename"')" "$PWD/a.qcow2"
ok "no temporary files are left" test "$(ls dir | sort | tr '\n' ' ')" = 'err.log o.qcow2 out.log r.json up '

echo old >kept.json
ln -s kept.json link.json
ok "a report through a link" serve a.qcow2 report=link.json
ok "the link is still one" test -L link.json
ok "and the report is behind it" jq -e .format kept.json
mkfifo pipe
refused "a report into a pipe that nobody reads" 'report .*pipe cannot be written' a.qcow2 report=pipe
in_ram
serve a.qcow2 report="$ram/shm.json"
ok "a report into memory's folder under /dev" jq -e .format "$ram/shm.json"
serve a.qcow2 report="$ram/shm.json"
is "which is written anew, not appended to" "$(jq -s length "$ram/shm.json")" 1
serve a.qcow2 report=/dev/stderr
ok "a report to stderr" eval "sed -n '/^{/,/^}/p' err.log | jq -e .format"

ok "check=false is read-only" serve a.qcow2 check=false --run 'nbdinfo --is read-only "$uri"'
ok "force-share=true is read-only" serve a.qcow2 force-share=true --run 'nbdinfo --is read-only "$uri"'
ok "a sound image is writable" serve a.qcow2 --run '! nbdinfo --is read-only "$uri"'
ok "cache-size=1M" serve a.qcow2 cache-size=1M --run "$copy_out"
ok "its bytes" cmp out.raw want.raw

ok "--help fits a screen" eval \
  'n=$("${nbdkit_env[@]}" nbdkit "$PLUGIN" --help | sed -n "/^\[file=\]/,\$p" | wc -l); test "$n" -ge 7 -a "$n" -le 24'

done_testing
