#!/usr/bin/env python3
"""Reads and damages qcow2 images, for the tests.

Written from the specification, sharing nothing with core/: what the tests say
about an image must not come from the code under test.  It trusts the image it
is given (a test made it), works on one file in place, and is not fast.

    qcow2patch.py IMAGE COMMAND [ARG...] [+ COMMAND [ARG...]]...

Numbers may be decimal or 0x.  A host cluster is a number, not an offset.

Looking:
    info                    header fields and the places of the tables, key=value
    get FIELD               one of the keys of info
    host GUEST              host cluster of a guest cluster (empty if none)
    l1 I / l2 GUEST         raw entry of the active tables
    rt-entry I              raw refcount table entry
    refcount CI             stored refcount
    refs CI                 references counted from the mapping
    l2-all                  all entries of the active L2 tables that are not 0
    ext TYPE                the bytes of a header extension, in hex
    places                  name and host offset of each kind of metadata that there is
    used / free             host clusters with or without a reference, those of
                            the refcount structure counting as free
    guest FILE              write the guest's bytes there; for images that QEMU does
                            not open, without compressed clusters
    hole N                  first of the earliest N free clusters in a row
    structure               clusters that the refcount structure takes
    lower-bound [fixed]     fewest clusters that a new structure can take, or
                            'none'; fixed: the file cannot grow
Damaging:
    set FIELD=VALUE...      header fields
    rt-zero, rt-random SEED, rt-entry I VALUE
    rb-zero I, rb-random I SEED
    refcount CI VALUE, refcounts FROM TO VALUE       [FROM, TO)
    all-refcounts VALUE     every refcount that is stored as not 0
    leak N                  the N highest free clusters with refcount 0 get 1
    l1 I VALUE, l2 GUEST VALUE
    bitmap GUEST VALUE      subclusters of an extended L2 entry
    share FROM TO N         N guest clusters from TO on get the entries of those from FROM on
    copied set|clear|flip l1|l2 I|all
    write OFFSET HEXBYTES
    add-ext TYPE HEXBYTES   a header extension after the others
    mutate SEED             one to four random changes to the metadata, and what
                            they were on stdout
Making (IMAGE is created):
    dense CLUSTER_BITS REFCOUNT_ORDER CLUSTERS
                            a file of that many clusters, all of them in use,
                            without refcount table
    bytes SEED LENGTH       random bytes
"""

import os
import random
import struct
import sys

FIELDS = {  # name: (offset, format)
    "magic": (0, ">I"), "version": (4, ">I"),
    "backing_file_offset": (8, ">Q"), "backing_file_size": (16, ">I"),
    "cluster_bits": (20, ">I"), "size": (24, ">Q"), "crypt_method": (32, ">I"),
    "l1_size": (36, ">I"), "l1_table_offset": (40, ">Q"),
    "refcount_table_offset": (48, ">Q"), "refcount_table_clusters": (56, ">I"),
    "nb_snapshots": (60, ">I"), "snapshots_offset": (64, ">Q"),
    "incompatible_features": (72, ">Q"), "compatible_features": (80, ">Q"),
    "autoclear_features": (88, ">Q"), "refcount_order": (96, ">I"),
    "header_length": (100, ">I"), "compression_type": (104, ">B"),
}
OFF_MASK = 0x00fffffffffffe00
RT_MASK = 0xfffffffffffffe00
COPIED = 1 << 63
COMPRESSED = 1 << 62


def num(text):
    return int(text, 0) & (1 << 64) - 1     # the shell's numbers are signed


class Image:
    def __init__(self, path, writable):
        self.f = open(path, "r+b" if writable else "rb", buffering=0)
        self.size = self.f.seek(0, os.SEEK_END)
        self.h = {n: self.field(n) for n in FIELDS}
        if self.h["version"] == 2:
            self.h.update(incompatible_features=0, compatible_features=0,
                          autoclear_features=0, refcount_order=4, header_length=72)
        self.bits = self.h["cluster_bits"]
        self.cs = 1 << self.bits
        self.rbits = 1 << self.h["refcount_order"]
        self.rb_entries = self.cs * 8 // self.rbits
        self.ext_l2 = bool(self.h["incompatible_features"] & 16)
        self.l2e = 16 if self.ext_l2 else 8
        self.l2_entries = self.cs // self.l2e
        self.clusters = -(-self.size // self.cs)

    # --- bytes
    def read(self, off, n):
        self.f.seek(off)
        data = b""
        while len(data) < n:
            got = self.f.read(n - len(data))
            if not got:
                break
            data += got
        return data + bytes(n - len(data))

    def write(self, off, data):
        self.f.seek(off)
        self.f.write(data)

    def field(self, name):
        off, fmt = FIELDS[name]
        return struct.unpack(fmt, self.read(off, struct.calcsize(fmt)))[0]

    def table(self, off, n):
        return list(struct.unpack(">%dQ" % n, self.read(off, n * 8)))

    # --- refcounts
    def rt_off(self, i):
        if i * 8 >= self.h["refcount_table_clusters"] * self.cs:
            sys.exit("refcount table entry %d: past its end" % i)
        return self.h["refcount_table_offset"] + i * 8

    def rt(self):
        n = self.h["refcount_table_clusters"] * self.cs // 8
        return self.table(self.h["refcount_table_offset"], n)

    def rb_off(self, i):
        off = struct.unpack(">Q", self.read(self.rt_off(i), 8))[0] & RT_MASK
        if not off:
            sys.exit("refcount block %d does not exist" % i)
        return off

    def _slot(self, k):
        """Byte offset in a block, width in bytes, shift and mask of refcount k."""
        if self.rbits >= 8:
            w = self.rbits // 8
            return k * w, w, 0, (1 << self.rbits) - 1
        per = 8 // self.rbits
        return k // per, 1, k % per * self.rbits, (1 << self.rbits) - 1

    def refcount(self, ci):
        i, k = divmod(ci, self.rb_entries)
        if i * 8 >= self.h["refcount_table_clusters"] * self.cs:
            return 0
        off = struct.unpack(">Q", self.read(self.rt_off(i), 8))[0] & RT_MASK
        if not off:
            return 0
        at, w, shift, mask = self._slot(k)
        return int.from_bytes(self.read(off + at, w), "big") >> shift & mask

    def set_refcount(self, ci, v):
        i, k = divmod(ci, self.rb_entries)
        at, w, shift, mask = self._slot(k)
        off = self.rb_off(i) + at
        old = int.from_bytes(self.read(off, w), "big")
        new = old & ~(mask << shift) | (v & mask) << shift
        self.write(off, new.to_bytes(w, "big"))

    # --- references
    def l1(self):
        return self.table(self.h["l1_table_offset"], self.h["l1_size"])

    def snapshots(self):
        off = self.h["snapshots_offset"]
        for _ in range(self.h["nb_snapshots"]):
            fixed = self.read(off, 40)
            l1_off, l1_size, id_len, name_len = struct.unpack(">QIHH", fixed[:16])
            extra = struct.unpack(">I", fixed[36:40])[0]
            yield off, l1_off, l1_size
            off += 40 + extra + id_len + name_len + 7 & ~7
        self.snapshots_end = off

    def extensions(self):
        off = self.h["header_length"]
        while off + 8 <= self.cs:
            kind, n = struct.unpack(">II", self.read(off, 8))
            if kind == 0:
                return
            yield kind, off + 8, n
            off += 8 + (n + 7 & ~7)

    def references(self):
        """{host cluster: references}, without the refcount structure."""
        refs = {}

        def claim(off, n):
            if n:
                for ci in range(off >> self.bits, (off + n - 1 >> self.bits) + 1):
                    refs[ci] = refs.get(ci, 0) + 1

        def mapping(l1_off, l1_size):
            claim(l1_off, l1_size * 8)
            for e in self.table(l1_off, l1_size):
                l2_off = e & OFF_MASK
                if not l2_off:
                    continue
                claim(l2_off, self.cs)
                for e2 in self.table(l2_off, self.cs // 8)[::self.l2e // 8]:
                    if e2 & COMPRESSED:
                        x = 62 - (self.bits - 8)
                        off = e2 & (1 << x) - 1
                        sectors = ((e2 & ~(COMPRESSED | COPIED)) >> x) + 1
                        claim(off, sectors * 512 - (off & 511))
                    elif e2 & OFF_MASK:
                        claim(e2 & OFF_MASK, self.cs)

        claim(0, self.cs)
        mapping(self.h["l1_table_offset"], self.h["l1_size"])
        if self.h["nb_snapshots"]:
            for _, l1_off, l1_size in self.snapshots():
                mapping(l1_off, l1_size)
            start = self.h["snapshots_offset"]
            claim(start, self.snapshots_end - start)
        for kind, off, n in self.extensions():
            if kind == 0x0537be77:
                claim(*struct.unpack(">QQ", self.read(off, 16)))
            elif kind == 0x23852875 and self.h["autoclear_features"] & 1:
                nr, _, size, start = struct.unpack(">IIQQ", self.read(off, 24))
                claim(start, size)
                at = start
                for _ in range(nr):
                    t_off, t_n, _, _, _, name, extra = struct.unpack(
                        ">QIIBBHI", self.read(at, 24))
                    claim(t_off, t_n * 8)
                    for e in self.table(t_off, t_n):
                        if e & OFF_MASK:
                            claim(e & OFF_MASK, self.cs)
                    at += 24 + name + extra + 7 & ~7
        return refs

    def free(self):
        refs = self.references()
        return [ci for ci in range(self.clusters) if ci not in refs]

    def structure(self):
        return self.h["refcount_table_clusters"] + sum(1 for e in self.rt() if e)

    def active_l2(self, guest):
        """Offset of the entry of a guest cluster."""
        i, k = divmod(guest, self.l2_entries)
        l2_off = self.l1()[i] & OFF_MASK
        if not l2_off:
            sys.exit("guest cluster %d has no L2 table" % guest)
        return l2_off + k * self.l2e


def fewest_clusters(img, can_grow):
    """Fewest clusters of any refcount structure that covers what is used and
    itself, over every place that the table could have.  None if there is none.

    Not a plan: blocks are counted, not placed, since any free cluster of a
    covered range does for a block.  Past the end only if nothing fits inside.
    """
    used = img.references()
    n, per = img.clusters, img.rb_entries
    base = {ci // per for ci in used if ci < n}

    for grow in ([False, True] if can_grow else [False]):
        end = n
        if grow:
            end += 2 * (-(-n // per) + 64) + 2 * per + n * 8 // (per * img.cs)
        room = {}
        for ci in range(end):
            if ci not in used:
                room[ci // per] = room.get(ci // per, 0) + 1

        def cost(t, first):
            covered = base | set(range(first // per, (first + t - 1) // per + 1))
            reach = t * img.cs // 8
            avail = sum(room.get(r, 0) for r in covered) - t
            spare = sorted(((room[r], -r) for r in room if r not in covered and r < reach),
                           reverse=True)
            while avail < len(covered):
                if not spare:
                    return None
                k, r = spare.pop(0)
                covered.add(-r)
                avail += k
            return t + len(covered) if max(covered) < reach else None

        best, t = None, -(-(max(base) + 1) * 8 // img.cs)
        while (best is None or t + len(base) < best) and t <= end:
            seen, run = set(), 0
            for ci in range(end):
                run = 0 if ci in used else run + 1
                if run < t:
                    continue
                first = ci - t + 1
                key = (first // per, ci // per)
                if key in seen:
                    continue
                seen.add(key)
                c = cost(t, first)
                if c is not None and (best is None or c < best):
                    best = c
            if not seen:
                break       # no run of t clusters, so none of t + 1 either
            t += 1
        if best is not None:
            return best
    return None


def places(img):
    """Where something lies that no entry of the mapping may name."""
    yield "l1", img.h["l1_table_offset"]
    yield "l2", next(e & OFF_MASK for e in reversed(img.l1()) if e & OFF_MASK)
    yield "rt", img.h["refcount_table_offset"]
    yield "rb", next(e for e in img.rt() if e)
    if img.h["nb_snapshots"]:
        _, l1_off, l1_size = next(img.snapshots())
        yield "snapshot-table", img.h["snapshots_offset"]
        yield "snapshot-l1", l1_off
        yield "snapshot-l2", next(e & OFF_MASK for e in img.table(l1_off, l1_size) if e & OFF_MASK)
    for kind, off, _ in img.extensions():
        if kind == 0x23852875:
            directory, = struct.unpack(">Q", img.read(off + 16, 8))
            table, = struct.unpack(">Q", img.read(directory, 8))
            yield "bitmap-directory", directory
            yield "bitmap-table", table
            data = struct.unpack(">Q", img.read(table, 8))[0] & OFF_MASK
            if data:
                yield "bitmap-data", data


def make_dense(path, bits, order, clusters):
    """Every cluster of the file is the header, a table, or data."""
    cs = 1 << bits
    per = cs // 8
    # Data clusters d need ceil (d / per) L2 tables, these need L1 clusters.
    d = clusters
    while True:
        l2 = -(-d // per)
        l1 = -(-l2 * 8 // cs)
        over = 1 + l1 + l2 + d - clusters
        if over <= 0:
            break
        d -= max(1, over // 2)
    if over < 0:
        l1 -= over          # a few L1 clusters more than the data needs
    entries = l1 * per
    header = struct.pack(">IIQIIQIIQQIIQ", 0x514649fb, 3, 0, 0, bits, d * cs, 0, entries,
                         cs, 0, 0, 0, 0)
    header += struct.pack(">QQQII", 0, 0, 0, order, 104)
    with open(path, "wb") as f:
        f.write(header)
        f.seek(cs)
        l2_ci, data_ci = 1 + l1, 1 + l1 + l2
        f.write(struct.pack(">%dQ" % l2, *(COPIED | (l2_ci + i) * cs for i in range(l2))))
        f.seek(l2_ci * cs)
        f.write(struct.pack(">%dQ" % d, *(COPIED | (data_ci + i) * cs for i in range(d))))
        for i in range(0, d, max(1, d // 64)):      # something to read here and there
            f.seek((data_ci + i) * cs)
            f.write(b"data %d" % i)
        f.truncate(clusters * cs)


def add_extension(img, kind, data):
    end = img.h["header_length"]
    for _, off, n in img.extensions():
        end = off + (n + 7 & ~7)
    ext = struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8) + bytes(8)
    name_off, name_len = img.h["backing_file_offset"], img.h["backing_file_size"]
    name = img.read(name_off, name_len) if name_off else b""
    if end + len(ext) + len(name) > img.cs:
        sys.exit("no room for a header extension")
    img.write(end, ext + name)
    if name_off:
        damage(img, "set", ["backing_file_offset=%d" % (end + len(ext))])


def copied(img, how, level, which):
    offs = []
    l1 = img.l1()
    if level == "l1":
        offs = [img.h["l1_table_offset"] + i * 8 for i, e in enumerate(l1) if e & OFF_MASK]
        if which != "all":
            offs = [img.h["l1_table_offset"] + num(which) * 8]
    elif which != "all":
        offs = [img.active_l2(num(which))]
    else:
        for e in l1:
            if e & OFF_MASK:
                table = img.table(e & OFF_MASK, img.cs // 8)
                offs += [(e & OFF_MASK) + k * 8 for k in range(0, len(table), img.l2e // 8)
                         if table[k] & OFF_MASK and not table[k] & COMPRESSED]
    for off in offs:
        v = struct.unpack(">Q", img.read(off, 8))[0]
        v = {"set": v | COPIED, "clear": v & ~COPIED, "flip": v ^ COPIED}[how]
        img.write(off, struct.pack(">Q", v))


def mutate(img, seed):
    """Random damage where it hurts: values of any kind in fields and entries."""
    rnd = random.Random(seed)
    rt_off = img.h["refcount_table_offset"]
    places = [(name, off, struct.calcsize(fmt)) for name, (off, fmt) in FIELDS.items()] * 2
    places += [("extension", img.h["header_length"] + i, 4) for i in range(0, 80, 4)]
    l1 = [(img.h["l1_table_offset"], img.h["l1_size"])]
    if img.h["nb_snapshots"]:
        at = img.h["snapshots_offset"]
        places += [("snapshot table", at + i, w) for i in range(0, 80, 4) for w in (2, 4, 8)]
        l1 += [(off, n) for _, off, n in img.snapshots()]
    for off, n in l1:
        places += [("L1 entry", off + 8 * rnd.randrange(n), 8) for _ in range(8)]
        for e in img.table(off, n):
            if e & OFF_MASK:
                places += [("L2 entry", (e & OFF_MASK) + 8 * rnd.randrange(img.cs // 8), 8)
                           for _ in range(4)]
    blocks = [e for e in img.rt() if e]
    places += [("refcount table entry", rt_off + 8 * rnd.randrange(len(blocks) + 2), 8)
               for _ in range(12)]
    places += [("refcounts", rnd.choice(blocks) + 2 * rnd.randrange(img.cs // 2), 2)
               for _ in range(8)]
    offsets = [0, img.cs, img.size, img.size & -img.cs, img.h["l1_table_offset"], rt_off,
               blocks[0], l1[-1][0]] + [e & OFF_MASK for e in img.l1()]

    for _ in range(rnd.randint(1, 4)):
        if rnd.random() < 0.06:
            n = rnd.randrange(img.size)
            os.truncate(img.f.name, n)
            print("cut to %d bytes" % n)
            return
        name, off, width = rnd.choice(places)
        old = int.from_bytes(img.read(off, width), "big")
        top = 1 << 8 * width
        new = rnd.choice([
            lambda: rnd.choice([0, 1, 2, top - 1, top >> 1, (top >> 1) - 1, 0x7fffffffffffffff]),
            lambda: rnd.choice(offsets) | rnd.choice([0, 0, COPIED, COMPRESSED, 1]),
            lambda: rnd.choice(offsets) + rnd.choice([1, 512, -512, img.cs, 1 << 40, 1 << 55]),
            lambda: old ^ 1 << rnd.randrange(8 * width),
            lambda: old + rnd.choice([-1, 1, 8, 512, img.cs]),
            lambda: rnd.getrandbits(8 * width)])() % top
        img.write(off, new.to_bytes(width, "big"))
        print("%s at %d: 0x%x -> 0x%x" % (name, off, old, new))


def write_guest(img, path):
    with open(path, "wb") as f:
        for i, e in enumerate(img.l1()):
            if not e & OFF_MASK:
                continue
            entries = img.table(e & OFF_MASK, img.cs // 8)[::img.l2e // 8]
            for k, e2 in enumerate(entries):
                at = (i * img.l2_entries + k) * img.cs
                if e2 & OFF_MASK and not e2 & 1 and at < img.h["size"]:
                    data = img.read(e2 & OFF_MASK, img.cs)
                    if any(data):
                        f.seek(at)
                        f.write(data)
        f.truncate(img.h["size"])


LOOKING = {"info", "places", "ext", "guest", "get", "host", "refs", "used", "free", "hole", "structure",
           "l2-all", "lower-bound"}
EITHER = {"l1": 1, "l2": 1, "rt-entry": 1, "refcount": 1}    # that many arguments: looking


def look(img, cmd, a):
    if cmd == "info":
        for k, v in img.h.items():
            print("%s=%d" % (k, v))
        print("clusters=%d\nl1_clusters=%d\nblocks=%d" % (
            img.clusters, -(-img.h["l1_size"] * 8 // img.cs), sum(1 for e in img.rt() if e)))
    elif cmd == "places":
        for name, off in places(img):
            print(name, off)
    elif cmd == "get":
        print(img.h[a[0]] if a[0] in img.h else img.clusters)
    elif cmd == "host":
        off = struct.unpack(">Q", img.read(img.active_l2(num(a[0])), 8))[0] & OFF_MASK
        print(off >> img.bits if off else "")
    elif cmd == "l1":
        print("0x%x" % img.l1()[num(a[0])])
    elif cmd == "l2":
        print("0x%x" % struct.unpack(">Q", img.read(img.active_l2(num(a[0])), 8))[0])
    elif cmd == "rt-entry":
        print("0x%x" % struct.unpack(">Q", img.read(img.rt_off(num(a[0])), 8))[0])
    elif cmd == "refcount":
        print(img.refcount(num(a[0])))
    elif cmd == "refs":
        print(img.references().get(num(a[0]), 0))
    elif cmd == "used":
        print("\n".join(map(str, sorted(img.references()))))
    elif cmd == "free":
        print("\n".join(map(str, img.free())))
    elif cmd == "l2-all":
        for e in img.l1():
            table = img.table(e & OFF_MASK, img.cs // 8) if e & OFF_MASK else []
            for e2 in table[::img.l2e // 8]:
                if e2:
                    print("0x%016x" % e2)
    elif cmd == "ext":
        for kind, off, n in img.extensions():
            if kind == num(a[0]):
                print(img.read(off, n).hex())
    elif cmd == "guest":
        write_guest(img, a[0])
    elif cmd == "hole":
        n, run, last = num(a[0]), 0, -2
        for ci in img.free():
            run = run + 1 if ci == last + 1 else 1
            last = ci
            if run == n:
                print(ci - n + 1)
                return
        print("none")
    elif cmd == "structure":
        print(img.structure())
    elif cmd == "lower-bound":
        n = fewest_clusters(img, not a)
        print("none" if n is None else n)


def damage(img, cmd, a):
    if cmd == "set":
        for f in a:
            name, value = f.split("=")
            off, fmt = FIELDS[name]
            mask = (1 << 8 * struct.calcsize(fmt)) - 1
            img.write(off, struct.pack(fmt, num(value) & mask))
    elif cmd in ("rt-zero", "rt-random"):
        n = img.h["refcount_table_clusters"] * img.cs
        data = bytes(n) if cmd == "rt-zero" else random.Random(num(a[0])).randbytes(n)
        img.write(img.h["refcount_table_offset"], data)
    elif cmd == "rt-entry":
        img.write(img.rt_off(num(a[0])), struct.pack(">Q", num(a[1])))
    elif cmd == "rb-zero":
        img.write(img.rb_off(num(a[0])), bytes(img.cs))
    elif cmd == "rb-random":
        img.write(img.rb_off(num(a[0])), random.Random(num(a[1])).randbytes(img.cs))
    elif cmd == "refcount":
        img.set_refcount(num(a[0]), num(a[1]))
    elif cmd == "refcounts":
        for ci in range(num(a[0]), num(a[1])):
            img.set_refcount(ci, num(a[2]))
    elif cmd == "all-refcounts":
        for ci in range(img.clusters):
            if img.refcount(ci):
                img.set_refcount(ci, num(a[0]))
    elif cmd == "leak":
        free = [ci for ci in img.free() if img.refcount(ci) == 0][-num(a[0]):]
        if len(free) < num(a[0]):
            sys.exit("only %d free clusters" % len(free))
        for ci in free:
            img.set_refcount(ci, 1)
    elif cmd == "l1":
        img.write(img.h["l1_table_offset"] + num(a[0]) * 8, struct.pack(">Q", num(a[1])))
    elif cmd == "l2":
        img.write(img.active_l2(num(a[0])), struct.pack(">Q", num(a[1])))
    elif cmd == "bitmap":
        img.write(img.active_l2(num(a[0])) + 8, struct.pack(">Q", num(a[1])))
    elif cmd == "share":
        for i in range(num(a[2])):
            img.write(img.active_l2(num(a[1]) + i), img.read(img.active_l2(num(a[0]) + i), img.l2e))
    elif cmd == "copied":
        copied(img, *a)
    elif cmd == "mutate":
        mutate(img, num(a[0]))
    elif cmd == "add-ext":
        add_extension(img, num(a[0]), bytes.fromhex(a[1]))
    elif cmd == "write":
        img.write(num(a[0]), bytes.fromhex(a[1]))
    else:
        sys.exit("unknown command " + cmd)


def main(argv):
    if len(argv) < 3:
        sys.exit(__doc__)
    path, rest = argv[1], argv[2:]
    while rest:
        at = rest.index("+") if "+" in rest else len(rest)
        (cmd, *a), rest = rest[:at], rest[at + 1:]
        if cmd == "bytes":
            with open(path, "wb") as f:
                f.write(random.Random(num(a[0])).randbytes(num(a[1])))
        elif cmd == "dense":
            make_dense(path, *map(num, a))
        elif cmd in LOOKING or EITHER.get(cmd) == len(a):
            look(Image(path, False), cmd, a)
        else:
            damage(Image(path, True), cmd, a)


if __name__ == "__main__":
    main(sys.argv)
