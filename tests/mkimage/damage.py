#!/usr/bin/env python3
"""Named damage to qcow2 images, as it happens to people: for tests/recovery.py.

    damage.py list                      every case: name, image that it wants, title
    damage.py IMAGE CASE                do it

Like qcow2patch.py, which it is made with, it shares nothing with core/.  What
image a case wants (the names are those of tests/recovery.py):

    plain       a file system, nothing else
    snapshots   three snapshots, each a little different
    compressed, subclusters, bitmaps, backing
"""

import os
import random
import struct
import subprocess
import sys

from qcow2patch import COMPRESSED, COPIED, OFF_MASK, Image, damage

BITMAPS_EXT = 0x23852875
BACKING_FORMAT_EXT = 0xe2792aca
CROSVM_FORMAT_EXT = 0xe279268f

CASES = {}      # name: (image, title, function)


def case(name, image, title):
    def add(fn):
        CASES[name] = (image, title, fn)
        return fn
    return add


def put64(img, off, v):
    img.write(off, struct.pack(">Q", v))


# --- places

def l1_entry(img, i=3):
    """Offset of an L1 entry in the middle of the disk."""
    return img.h["l1_table_offset"] + 8 * i


def l2_table(img, i=3):
    return img.l1()[i] & OFF_MASK


def data_entries(img, i=3):
    """Offsets and values of the L2 entries in table i that name data."""
    at = l2_table(img, i)
    table = img.table(at, img.cs // 8)[::img.l2e // 8]
    return [(at + k * img.l2e, e) for k, e in enumerate(table) if e & (OFF_MASK | COMPRESSED)]


def l2_entry(img, i=3):
    """An entry that names data, in the middle of the table."""
    entries = data_entries(img, i)
    return entries[len(entries) // 2]


def compressed_entry(img):
    return next(e for i in range(img.h["l1_size"]) for e in data_entries(img, i)
                if e[1] & COMPRESSED)


def bitmap_directory(img):
    for kind, off, _ in img.extensions():
        if kind == BITMAPS_EXT:
            _, _, size, start = struct.unpack(">IIQQ", img.read(off, 24))
            return off, start, size
    sys.exit("no bitmaps")


def bitmap_table(img, n=0):
    _, at, _ = bitmap_directory(img)
    for _ in range(n):
        name, extra = struct.unpack(">HI", img.read(at + 18, 6))
        at += 24 + name + extra + 7 & ~7
    return struct.unpack(">Q", img.read(at, 8))[0]


PLACES = {      # name: (image, where in words, host offset)
    "header": ("plain", "the header", lambda img: 0),
    "l1": ("plain", "the L1 table", lambda img: img.h["l1_table_offset"]),
    "l2": ("plain", "an L2 table", lambda img: l2_table(img, 5)),
    "rt": ("plain", "the refcount table", lambda img: img.h["refcount_table_offset"]),
    "rb": ("plain", "a refcount block", lambda img: img.rb_off(0)),
    "snaptab": ("snapshots", "the snapshot table", lambda img: img.h["snapshots_offset"]),
    "snap-l1": ("snapshots", "a snapshot's L1 table", lambda img: list(img.snapshots())[1][1]),
    "bitmap": ("bitmaps", "a bitmap's table", bitmap_table),
    "data": ("plain", "guest data", lambda img: l2_entry(img, 5)[1] & OFF_MASK),
}


# --- entries that cannot be right, in both kinds of tables

def entry_cases(level, what, entry):
    def add(name, image, title, new):
        @case("%s-%s" % (level, name), image, title)
        def _(img):
            off, old = entry(img)
            put64(img, off, new(img, old))

    add("outside", "plain", what + " names the first cluster after the file",
        lambda img, old: COPIED | img.clusters * img.cs)
    add("far", "plain", what + " names a place 2^55 bytes away",
        lambda img, old: old + (1 << 55))
    add("misaligned", "plain", what + " is misaligned", lambda img, old: old + 512)
    add("reserved", "plain", what + " has reserved bits set", lambda img, old: old | 0x1e)
    for place, (image, where, find) in PLACES.items():
        # Two clusters of data on one: two-on-one.  A 0 in an L2 entry means "none".
        if (level, place) not in (("l2", "data"), ("l2", "header")):
            add("into-" + place, image, "%s names %s" % (what, where),
                lambda img, old, f=find: COPIED | f(img))


entry_cases("l1", "an L1 entry", lambda img: (l1_entry(img), img.l1()[3]))
entry_cases("l2", "an L2 entry", l2_entry)


@case("l1-zero", "plain", "the L1 table is zeroed")
def _(img):
    img.write(img.h["l1_table_offset"], bytes(img.h["l1_size"] * 8))


@case("l1-entry-zero", "plain", "an L1 entry is zeroed")
def _(img):
    put64(img, l1_entry(img), 0)


@case("l2-random", "plain", "an L2 table is overwritten with noise")
def _(img):
    img.write(l2_table(img), random.Random(1).randbytes(img.cs))


@case("l2-shared", "plain", "two L1 entries name one L2 table")
def _(img):
    put64(img, l1_entry(img), img.l1()[5])


@case("two-on-one", "plain", "two guest clusters name one host cluster")
def _(img):
    put64(img, l2_entry(img)[0], l2_entry(img, 5)[1])


@case("compressed-outside", "compressed", "a compressed cluster lies outside the file")
def _(img):
    off, _ = compressed_entry(img)
    put64(img, off, COMPRESSED | img.clusters * img.cs + 4096)


@case("compressed-overwritten", "compressed", "a compressed stream is overwritten")
def _(img):
    _, e = compressed_entry(img)
    img.write(e & (1 << 62 - (img.bits - 8)) - 1, b"\xff" * 64)


@case("subclusters", "subclusters", "subclusters are both allocated and zero")
def _(img):
    put64(img, l2_entry(img, 0)[0] + 8, (1 << 64) - 1)


# --- files cut short

for _name, _title, _end in [
        ("cut-last", "the file ends a cluster early", lambda img: (img.clusters - 1) * img.cs),
        ("cut-odd", "the file ends inside its last cluster",
         lambda img: (img.clusters - 1) * img.cs + img.cs // 2 + 100),
        ("cut-90", "the last tenth of the file is missing", lambda img: img.size * 9 // 10),
        ("cut-half", "half of the file is missing", lambda img: img.size // 2 & -img.cs)]:
    case(_name, "plain", _title)(lambda img, f=_end: os.truncate(img.f.name, f(img)))


# --- the header

def header_case(name, image, title, change):
    case(name, image, title)(
        lambda img: damage(img, "set", ["%s=%d" % kv for kv in change(img).items()]))


header_case("l1-size-small", "plain", "l1_size is one too small",
            lambda img: {"l1_size": img.h["l1_size"] - 1})
header_case("l1-size-large", "plain", "l1_size is ten times too large",
            lambda img: {"l1_size": img.h["l1_size"] * 10})
header_case("l1-size-absurd", "plain", "l1_size is absurd", lambda img: {"l1_size": 0x7fffffff})
header_case("backing-outside", "backing", "the backing name lies outside the first cluster",
            lambda img: {"backing_file_offset": img.cs * 5})
header_case("dirty", "plain", "the dirty bit is set", lambda img: {"incompatible_features": 1})
header_case("corrupt", "plain", "the corrupt bit is set", lambda img: {"incompatible_features": 2})


@case("ext-length", "plain", "a header extension's length is absurd")
def _(img):
    img.write(img.h["header_length"] + 4, b"\x7f\xff\xff\xff")


@case("crosvm-format", "backing", "the backing format has crosvm's extension type")
def _(img):
    for kind, off, _ in img.extensions():
        if kind == BACKING_FORMAT_EXT:
            img.write(off - 8, struct.pack(">I", CROSVM_FORMAT_EXT))


@case("backing-missing", "backing", "the backing file is missing")
def _(img):
    os.unlink(os.path.join(os.path.dirname(img.f.name), "base.qcow2"))


# --- snapshots and bitmaps

header_case("snap-count", "snapshots", "the number of snapshots is absurd",
            lambda img: {"nb_snapshots": 0x00ffffff})
header_case("snap-offset", "snapshots", "the snapshot table lies outside the file",
            lambda img: {"snapshots_offset": 1 << 50})


@case("snap-entry", "snapshots", "one entry of the snapshot table makes no sense")
def _(img):
    img.write(list(img.snapshots())[1][0] + 12, b"\xff\xff\xff\xff")


@case("snap-l1-outside", "snapshots", "a snapshot's L1 table lies outside the file")
def _(img):
    put64(img, list(img.snapshots())[1][0], img.clusters * img.cs)


@case("snap-forgotten", "snapshots", "software that forgets snapshots rebuilt the refcounts, then wrote")
def _(img):
    """As crosvm does it: what only a snapshot refers to is free, but not erased."""
    count = img.h["nb_snapshots"]
    structure = {e >> img.bits for e in img.rt() if e}
    structure |= {(img.h["refcount_table_offset"] >> img.bits) + i
                  for i in range(img.h["refcount_table_clusters"])}
    img.h["nb_snapshots"] = 0
    damage(img, "set", ["nb_snapshots=0"])
    refs = img.references()
    for ci in range(img.clusters):
        if ci not in structure:
            img.set_refcount(ci, refs.get(ci, 0))
    damage(img, "copied", ["set", "l1", "all"])
    damage(img, "copied", ["set", "l2", "all"])
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 77 14M 40k", img.f.name],
                   check=True, capture_output=True)
    damage(img, "set", ["nb_snapshots=%d" % count])


@case("bitmap-directory", "bitmaps", "the bitmap directory lies outside the file")
def _(img):
    put64(img, bitmap_directory(img)[0] + 16, img.clusters * img.cs)


@case("bitmap-table", "bitmaps", "one bitmap's table makes no sense")
def _(img):
    put64(img, bitmap_table(img, 1), 1 << 50)


# --- refcounts

for _name, _title, _args in [
        ("rt-zero", "the refcount table is zeroed", ["rt-zero"]),
        ("rt-random", "the refcount table is overwritten with noise", ["rt-random", "1"]),
        ("rb-zero", "a refcount block is zeroed", ["rb-zero", "1"]),
        ("refcounts-zero", "every refcount is zero", ["all-refcounts", "0"]),
        ("copied", "COPIED flags are wrong", ["copied", "flip", "l2", "all"])]:
    case(_name, "snapshots" if _name == "refcounts-zero" else "plain", _title)(
        lambda img, a=_args: damage(img, a[0], a[1:]))


@case("refcount-low", "snapshots", "the refcounts of data that a snapshot shares are too low")
def _(img):
    for _, e in data_entries(img)[:40]:
        img.set_refcount((e & OFF_MASK) >> img.bits, 1)


@case("everything", "snapshots", "many of these at once")
def _(img):
    for name in ["l1-outside", "snap-entry"]:
        CASES[name][2](img)
    tables = [data_entries(img, i) for i in (1, 5, 6)]
    for i, bad in enumerate([COPIED | img.clusters * img.cs, 1 << 55, 0x8000000000000200,
                             img.h["l1_table_offset"], COPIED | img.rb_off(0), 0]):
        for off, old in tables[0][10 * i:10 * i + 20:7]:
            put64(img, off, bad or old | 0x1e)
    for (off, _), (_, other) in zip(tables[1][:60:6], tables[2][:60:6]):
        put64(img, off, other)
    damage(img, "rt-entry", ["0", "0x1234"])
    damage(img, "set", ["incompatible_features=3"])
    img.write(img.h["header_length"] + 4, b"\x7f\xff\xff\xff")


def main(argv):
    if argv[1:] == ["list"]:
        for name, (image, title, _) in CASES.items():
            print("%-24s %-12s %s" % (name, image, title))
    elif len(argv) == 3 and argv[2] in CASES:
        CASES[argv[2]][2](Image(argv[1], True))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv)
