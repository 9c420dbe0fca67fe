#!/bin/bash
# L2 entries that cannot be right, of every kind: each loses its own guest cluster and no other,
# in each snapshot that shares its table, and nothing at all where the rest can be believed.
. "$(dirname "$0")/../lib.sh"

copied=$((1 << 63))
compressed=$((1 << 62))

# sound CLUSTER_SIZE COMPAT BYTES [EXTRA...]: sound.qcow2, five eighths of it written, the first eighth
# once more after the snapshot `one' if that is an EXTRA; so are `backing' and `bitmap'.
sound ()
{
  local back=() extra
  cs=$1 compat=$2 size=$3
  shift 3

  rm -f sound.qcow2
  patch noise bytes "$SEED" $((size * 5 / 8))
  patch noise2 bytes "$((SEED + 1))" $((size / 8))
  patch base.raw bytes "$((SEED + 2))" "$size"
  backing=
  disks=(-)
  [[ " $* " != *" backing "* ]] || { back=(-b "$PWD/base.raw" -F raw); backing=backing=follow; }
  make_image sound.qcow2 "$size" -o "cluster_size=$cs,compat=$compat" "${back[@]}"
  io sound.qcow2 "write -s noise 0 $((size * 5 / 8))"
  for extra; do
    case $extra in
      snapshot) guest_raw sound.qcow2 sound.one.raw; qemu-img snapshot -c one sound.qcow2; disks=(- one)
                io sound.qcow2 "write -s noise2 0 $((size / 8))" ;;
      bitmap) qemu-img bitmap --add sound.qcow2 b; io sound.qcow2 "write -s noise2 0 $((size / 8))" ;;
    esac
  done
  guest_raw sound.qcow2 sound.-.raw
  clusters=$(patch sound.qcow2 get clusters)
}

# Name, code, raw value in terms of the old one, and `kept' or `lost'.
values ()
{
  local old=$1 name off
  [ "$cs" = 512 ] || echo "misaligned T12 $((old + 512)) lost"
  echo "reserved T11 $((old | 0x1e)) kept"
  echo "reserved-high T11 $((old | 1 << 60)) kept"
  [ "$compat" != 0.10 ] || echo "zero-in-version-2 T11 $((old | 1)) kept"
  echo "outside T13 $((copied | clusters * cs)) lost"
  echo "far T13 $((old + (1 << 55))) lost"
  echo "compressed-outside T13 $((compressed | (clusters + 1) * cs)) lost"
  echo "compressed-far T13 $((compressed | (1 << 50))) lost"
  echo "compressed-into-header T14 $((compressed | 104)) lost"
  echo "compressed-into-l1 T14 $((compressed | $(patch sound.qcow2 get l1_table_offset))) lost"
  while read -r name off; do
    # Among so few clusters, more than a tenth damaged: then refcounts are no evidence.
    [ "$cs$name" != 2097152rt ] && [ "$cs$name" != 2097152rb ] || continue
    echo "into-$name T14 $((copied | off)) lost"
  done < <(patch sound.qcow2 places)
}

# damage GUEST VALUE LOST
damage ()
{
  local cluster="$(($1 * cs)) $cs " table
  patch d.qcow2 l2 "$1" "$2"
  [ "$3" = lost ] || return 0
  may[-]+=$cluster
  # Without the COPIED flag the snapshot has the same table.
  table=$(patch sound.qcow2 l1 $(($1 / (cs / 8))))
  [ $((table & copied)) != 0 ] || may[one]+=$cluster
}

# each: one at a time, in tables of the disk's own and in shared ones by turns.
each ()
{
  local k=0 guest name code value fate
  while read -r name code value fate; do
    guest=$((size / cs / 16 + (k++ % 2) * (size / cs / 4) + 3))
    may=()
    cp sound.qcow2 d.qcow2
    # The values were made for one entry; what depends on the old value is made anew.
    value=$(values "$(patch sound.qcow2 l2 $guest)" | sed -n "s/^$name $code \([^ ]*\) .*/\1/p")
    damage $guest "$value" "$fate"
    heals_losing "$cs, $name" "$code" ${backing:+$backing}
    [ "$fate" = lost ] || is "$cs, $name: nothing is lost" "$(jq '.lost.ranges | length' report.json)" 0
  done < <(values 0)
}

# all: every one of them in one image.
all ()
{
  local k=0 guest name code value fate codes=
  may=()
  cp sound.qcow2 d.qcow2
  while read -r name _; do
    guest=$((k / 2 + (k % 2) * (size / cs / 4) + 1)) k=$((k + 1))
    read -r code value fate < <(values "$(patch sound.qcow2 l2 $guest)" | sed -n "s/^$name //p")
    damage $guest "$value" "$fate"
    [[ $codes == *$code* ]] || codes+=" $code"
  done < <(values 0)
  heals_losing "$cs, version $compat${backing:+, backing file}, all $k" "${codes# }" ${backing:+$backing}
}

sound 4096 1.1 $((8 << 20)) backing snapshot bitmap
[ -z "$SOAK" ] || each
all
sound 512 0.10 $((256 << 10)) backing
all
sound 512 1.1 $((256 << 10)) snapshot bitmap
all
sound 4096 0.10 $((8 << 20)) snapshot
all
sound 65536 1.1 $((16 << 20)) backing bitmap snapshot
all
sound 65536 0.10 $((16 << 20)) backing
all
sound 2097152 1.1 $((160 << 20)) snapshot
all

done_testing
