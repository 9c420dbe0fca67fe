# What clients are told about the guest disk: its size, flags and block sizes;
# names that are not there are refused.  (The other exports: serve-exports.t)
. "$(dirname "$0")/../lib.sh"

# info FILTER: from nbdinfo --json of a server with the arguments after it.
info ()
{
  local filter=$1
  shift

  serve "$@" --run 'nbdinfo --json --no-content "$uri"' >info.json && jq -r ".exports[0] | $filter" info.json
}

make_image a.qcow2 100M -o cluster_size=64k
is "the export has no name" "$(info '."export-name"' a.qcow2)" ""
is "its size" "$(jq -r '.exports[0]."export-size"' info.json)" $((100 << 20))
for key in can_{df,fua,multi_conn,trim,zero,fast_zero,flush,cache}; do
  is "$key" "$(jq -r ".exports[0].$key" info.json)" true
done
is "not rotational" "$(jq -r '.exports[0].is_rotational' info.json)" false
is "not read-only" "$(jq -r '.exports[0].is_read_only' info.json)" false
is "any byte can be addressed" "$(jq -r '.exports[0].block_size_minimum' info.json)" 1
is "a cluster is preferred" "$(jq -r '.exports[0].block_size_preferred' info.json)" 65536
is "the largest request" "$(jq -r '.exports[0].block_size_maximum' info.json)" $((32 << 20))
ok "extents are told" jq -e '.exports[0].contexts | index("base:allocation")' info.json
ok "described" jq -e '.exports[0].description | test("guest disk")' info.json
is "read-only with nbdkit -r" "$(serve -r a.qcow2 --run 'nbdinfo --is read-only "$uri" && echo yes')" yes

for bits in 512:4096 4k:4096 2M:2097152; do
  make_image c.qcow2 10M -o cluster_size="${bits%:*}"
  is "preferred block size of ${bits%:*} clusters" "$(info .block_size_preferred c.qcow2)" "${bits#*:}"
  rm c.qcow2
done

make_image odd.qcow2 $((1954 * 512))
is "a size that is no multiple of a cluster" "$(info '."export-size"' odd.qcow2)" $((1954 * 512))
make_image none.qcow2 0
is "a disk without bytes" "$(info '."export-size"' none.qcow2)" 0

ok "another name is refused" serve a.qcow2 \
  --run '! nbdinfo "nbd+unix:///nowhere%0A?socket=$unixsocket" 2>client.log'
matches "and the server says so, without control characters" err.log 'no export "nowhere\?"'

done_testing
