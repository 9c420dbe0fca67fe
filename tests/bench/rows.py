"""The rows: what is measured, against whom, and what it should reach.

A row is one piece of work; its contenders are made by a function of the bench, ours
first.  A target names a peer by its label.  Ratios are how many times better ours is:
more operations, less time, less memory.
"""

from dataclasses import dataclass
from typing import Callable, Optional

import loads
import servers
from contenders import Program, Served, ServedFar, Startup, Synthetic
from scale import GIB, KIB, TIB, human

FILE, QEMU, CHECK, FLAT = "nbdkit file", "qemu-nbd", "qemu-img check", "ours, plain"
REPAIR, START, ALONE = "qemu-img check -r all", "check + qemu-nbd", "the device alone"


@dataclass(frozen=True)
class Target:
    peer: str
    at_least: Optional[float]           # None: shown only
    metric: str = "speed"               # or "memory"
    earlier: Optional[str] = None       # the peer is ours in that row ...
    factor: float = 1                   # ... so many times


@dataclass(frozen=True)
class Row:
    name: str
    work: str
    unit: str                           # of the figure: s (less is better), /s, MiB/s
    make: Callable
    targets: tuple = ()
    quick: bool = False                 # part of the quick bench
    tiny: bool = False                  # part of the harness's own test
    warm_all: bool = True               # False: one run of ours warms the cache for all
    needs: Optional[Callable] = None    # why it cannot be measured here, or None


def rows(scale):
    return [*checks(scale), *reads(scale), *writes(scale), *packed(scale), *stacked(scale),
            *starts(scale), *growth(scale)]


# --- checks: programs that are run to their end

def our_check(*parameters):
    """The plugin from its start until it would serve."""
    return ["nbdkit", "-U", "-", servers.plugin_path(), *parameters, "--run", "true"]


def qemu_check(image, *options):
    return ["qemu-img", "check", *options, "-f", "qcow2", image]


def check_pair(image, **qemus):
    """qemus: what is special about QEMU's."""
    def make(b):
        path = image(b.images)
        return [Program("ours", b.folder, our_check("file=" + path, "repair=off"), path),
                Program(CHECK, b.folder, qemu_check(path), path, **qemus)]
    return make


def qemu_repair(b, before=None):
    """In place, since it knows no other way: of what huge_to_mend made before."""
    return Program(REPAIR, b.folder, qemu_check(b.images.path("mend.qcow2"), "-r", "all"),
                   b.images.huge_lost(), (0, 2, 3), before)


def rebuild(b):
    path, overlay = b.images.huge_lost(), b.images.path("o.qcow2")
    return [Program("ours", b.folder, our_check("file=" + path, "overlay=" + overlay), path,
                    before=lambda: b.forget(overlay)),
            qemu_repair(b, b.images.huge_to_mend)]


class OverNbd(Program):
    """A check of what a slow server of its own serves."""

    def __init__(self, label, b, path, milliseconds, command):
        super().__init__(label, b.folder, None, path)
        self.start = lambda: servers.Server(b.folder, label.replace(" ", "-"),
                                            servers.slow_file(path, milliseconds))
        self.of, self.server = command, None

    def open(self):
        self.server = self.start()
        self.command = self.of(self.server.uri)

    def close(self):
        if self.server:
            self.server.stop()


def check_over_nbd(milliseconds):
    def make(b):
        path = b.images.huge()
        return [OverNbd("ours", b, path, milliseconds,
                        lambda uri: our_check("uri=" + uri, "repair=off")),
                OverNbd(CHECK, b, path, milliseconds, qemu_check)]
    return make


def copy_over_nbd(s, milliseconds):
    def make(b):
        slow = lambda: servers.slow_file(b.images.disk("far"), milliseconds)
        load = loads.copy_out(b.images.path("copy.log"), s.disk, s.seconds)
        return [ServedFar("ours", b.folder, lambda far: servers.ours_far(far.uri), slow, load),
                ServedFar(QEMU, b.folder, lambda far: servers.qemu_far(far.sock), slow, load)]
    return make


def has_uri(b):
    return None if "uri" in b.parameters else "this build has no uri="


def checks(s):
    huge = human(s.huge)
    nbd = "check of a sound image over NBD, each read taking %d ms, " + huge
    return [
        Row("check", "check of a sound image, %s, 64 KiB clusters" % huge, "s",
            check_pair(lambda i: i.huge()),
            (Target(CHECK, 10), Target(CHECK, 2, "memory")), True, True, warm_all=False),
        Row("check-4k", "check of a sound image, %s, 4 KiB clusters" % human(s.fine), "s",
            check_pair(lambda i: i.metadata(s.fine, 4 * KIB)), (Target(CHECK, 15),), True,
            warm_all=False),
        Row("check-lost", "check, refcount table zeroed, " + huge, "s",
            check_pair(lambda i: i.huge_lost(), exits=(2, 3)),
            (Target(CHECK, 100),), warm_all=False),
        Row("rebuild", "rebuild of the same, ours into an overlay", "s",
            rebuild, (Target(REPAIR, 50),), False, True, warm_all=False),
        Row("check-nbd-5ms", nbd % 5, "s", check_over_nbd(5), (Target(CHECK, 30),),
            False, True, warm_all=False, needs=has_uri),
        Row("check-nbd-20ms", nbd % 20, "s", check_over_nbd(20), (Target(CHECK, 80),),
            warm_all=False, needs=has_uri),
    ]


# --- disks that are served: ours, QEMU's, and a raw file

def three(b, load):
    """Of one disk, allocated from end to end; each serves a copy of its own."""
    return [Served("ours", b.folder, lambda: servers.ours(b.images.disk("ours")), load),
            Served(FILE, b.folder, lambda: servers.raw_file(b.images.raw_copy("peer")), load),
            Served(QEMU, b.folder, lambda: servers.qemu(b.images.disk("qemu")), load)]


def three_empty(b, load):
    return [Served("ours", b.folder, lambda: servers.ours(b.images.empty("ours")), load, True),
            Served(FILE, b.folder, lambda: servers.raw_file(b.images.sparse()), load, True),
            Served(QEMU, b.folder, lambda: servers.qemu(b.images.empty("qemu")), load, True)]


def fio(b, rw, **options):
    if "io_size" not in options:
        options["runtime"] = "%dms" % (b.scale.seconds * 1000)
    return loads.fio(b.images.path("fio.log"), rw, **options)


def fio_row(name, work, unit, rw, contenders, targets, quick=False, tiny=False, **options):
    return Row(name, work, unit, lambda b: contenders(b, fio(b, rw, **options)), targets,
               quick, tiny)


def targets(limit, peer):
    return (Target(FILE, limit), Target(QEMU, peer))


def reads(s):
    random4k = "4 KiB random reads, depth 16, %d connection%s"
    return [
        fio_row("randread-1", random4k % (1, ""), "/s", "randread", three, targets(0.92, 1),
                True, True),
        fio_row("randread-4", random4k % (4, "s"), "/s", "randread", three, targets(0.92, 2),
                True, connections=4),
        fio_row("randread-16", random4k % (16, "s"), "/s", "randread", three, targets(0.92, 2),
                connections=16),
        fio_row("seqread", "256 KiB sequential reads", "MiB/s", "read", three, targets(0.95, 2),
                True, block=256 * KIB),
        Row("copy", "nbdcopy to null, " + human(s.disk), "MiB/s",
            lambda b: three(b, loads.copy_out(b.images.path("copy.log"), s.disk, s.seconds)),
            targets(0.95, 1.5), True),
        Row("copy-nbd-20ms", "nbdcopy to null over NBD, each read taking 20 ms, " + human(s.disk),
            "MiB/s", copy_over_nbd(s, 20), (Target(QEMU, 10),), needs=has_uri),
    ]


def writes(s):
    # Less of the disk, so that the system does not begin to write it back meanwhile.
    part = {"size": s.disk // 4}
    return [
        fio_row("randwrite", "4 KiB random writes, allocated", "/s", "randwrite", three,
                (Target(FILE, 0.90), Target(QEMU, None)), True, True, **part),
        fio_row("randwrite-empty", "4 KiB random writes into an empty image", "/s", "randwrite",
                three_empty, targets(0.80, 1), True, io_size=s.burst),
        fio_row("seqwrite-empty", "256 KiB sequential writes into an empty image", "MiB/s", "write",
                three_empty, targets(0.85, 2), True, block=256 * KIB, io_size=s.disk // 2),
        fio_row("flush", "4 KiB random writes, a flush every 32", "/s", "randwrite", three,
                (Target(FILE, None), Target(QEMU, 1.5)), fsync=32, **part),
    ]


# --- compressed images

def packed_pair(how):
    def make(b, load):
        ours, qemus = (b.images.packed(how, owner) for owner in ("ours", "qemu"))
        return [Served("ours", b.folder, lambda: servers.ours(ours), load),
                Served(QEMU, b.folder, lambda: servers.qemu(qemus), load)]
    return make


def packed(s):
    return [row for how in ("zlib", "zstd") for row in packed_rows(s, how)]


def packed_rows(s, how):
    pair = packed_pair(how)
    return [
        Row("copy-" + how, "nbdcopy to null, all clusters compressed, " + how, "MiB/s",
            lambda b: pair(b, loads.copy_out(b.images.path("copy.log"), s.packed, s.seconds)),
            (Target(QEMU, 2),), how == "zlib", how == "zlib"),
        fio_row("randread-" + how, "4 KiB random reads, compressed, " + how, "/s", "randread",
                pair, (Target(QEMU, 3),), how == "zlib"),
    ]


# --- overlays, chains, fragments

def overlay_pair(fresh=False):
    """A healed image through its overlay, and the same image when nothing is wrong."""
    def make(b, load):
        overlay = b.images.path("overlay.qcow2")

        def healed():
            b.forget(overlay)
            return servers.ours(b.images.without_refcounts(), "overlay=" + overlay)
        return [Served("ours", b.folder, healed, load, fresh),
                Served(FLAT, b.folder, lambda: servers.ours(b.images.disk("ours")), load)]
    return make


def chain(b, load):
    top = b.images.chain("ours")
    return [Served("ours", b.folder, lambda: servers.ours(top, "backing=follow"), load),
            Served(FLAT, b.folder, lambda: servers.ours(b.images.disk("ours")), load),
            Served(QEMU, b.folder, lambda: servers.qemu(b.images.chain("qemu")), load)]


def fragments(b, load):
    return [Served("ours", b.folder, lambda: servers.ours(b.images.fragmented("ours")), load),
            Served(QEMU, b.folder, lambda: servers.qemu(b.images.fragmented("qemu")), load)]


def memory(b, load):
    """QEMU's cache for the mapping of the whole disk: 8 bytes a cluster."""
    cache = "l2-cache-size=%d" % (b.scale.huge // (64 * KIB) * 8)
    ours, qemus = b.images.huge(), b.images.copy(b.images.huge(), "qemu")
    return [Served("ours", b.folder, lambda: servers.ours(ours), load),
            Served(QEMU, b.folder, lambda: servers.qemu(qemus, "driver=qcow2", cache), load)]


def stacked(s):
    part = {"size": s.disk // 4}        # so that the first run has written all of it
    pieces = "%d fragments" % (s.fragments // (4 * KIB))
    huge = human(s.huge)
    return [
        fio_row("overlay-read", "4 KiB random reads through an overlay on a healed image", "/s",
                "randread", overlay_pair(), (Target(FLAT, 0.85),)),
        fio_row("overlay-write", "4 KiB random writes through it, written before", "/s",
                "randwrite", overlay_pair(), (Target(FLAT, 0.6),), **part),
        fio_row("overlay-write-first", "4 KiB random writes through it, each cluster's first",
                "/s", "randwrite", overlay_pair(True), (Target(FLAT, None),), io_size=s.burst // 4),
        fio_row("chain", "4 KiB random reads, a backing chain of %d files" % s.depth, "/s",
                "randread", chain, (Target(FLAT, 0.8), Target(QEMU, None))),
        fio_row("fragments-read", "4 KiB random reads, " + pieces, "/s", "randread",
                fragments, (Target(QEMU, None),)),
        fio_row("fragments-seq", "256 KiB sequential reads, " + pieces, "MiB/s", "read",
                fragments, (Target(QEMU, None),), block=256 * KIB),
        Row("fragments-check", "check, " + pieces, "s", check_pair(lambda i: i.fragmented("ours")),
            (Target(CHECK, None),)),
        Row("memory", "4 KiB random reads all over " + huge, "/s",
            lambda b: memory(b, fio(b, "randread", connections=4)),
            (Target(QEMU, 2, "memory"), Target(QEMU, None))),
    ]


# --- from the command line to the first byte

def start_sound(b):
    path = b.images.huge()
    check = Program(CHECK, b.folder, qemu_check(path), path)
    return [Startup("ours", b.folder, servers.ours(path), path),
            Startup(START, b.folder, servers.qemu(path), path, check)]


def start_lost(b):
    path, overlay = b.images.huge_lost(), b.images.path("o.qcow2")
    return [Startup("ours", b.folder, servers.ours(path, "overlay=" + overlay), path,
                    before=lambda: b.forget(overlay)),
            Startup(START, b.folder, servers.qemu(b.images.path("mend.qcow2")), path,
                    qemu_repair(b), b.images.huge_to_mend)]


def starts(s):
    return [
        Row("start", "from start to first byte, sound, " + human(s.huge), "s", start_sound,
            (Target(START, 10),), True, True, warm_all=False),
        Row("start-lost", "the same, refcount table zeroed, ours into an overlay", "s", start_lost,
            (Target(START, None),), warm_all=False),
    ]


# --- growth

def synthetic(bits, *options):
    def make(b):
        sizes = (bits, b.scale.synthetic)
        return [Synthetic("ours", b.folder, *options, *sizes),
                Synthetic(ALONE, b.folder, "-a", *options, *sizes)]
    return make


def larger(size, before, factor):
    """A straight line or better: no more than factor times what it takes there."""
    name = "%g x ours, %s" % (factor, human(before))
    row = "growth-" + human(before).replace(" ", "").lower()
    return Row("growth-" + human(size).replace(" ", "").lower(), "check, " + human(size), "s",
               check_pair(lambda i: i.metadata(size)),
               (Target(CHECK, None), Target(name, 1, "speed", row, factor),
                Target(name, 1, "memory", row, factor)), warm_all=False)


def growth(s):
    first = 64 * GIB
    name = "check of " + human(1 << s.synthetic) + " that is made as it is read, "
    alone = (Target(ALONE, None),)
    return [
        Row("growth-64gib", "check, 64 GiB", "s", check_pair(lambda i: i.metadata(first)),
            (Target(CHECK, None), Target(CHECK, None, "memory")), warm_all=False),
        larger(1 * TIB, first, 16),
        larger(8 * TIB, 1 * TIB, 8),
        Row("check-1pib", name + "2 MiB clusters", "s", synthetic(21), alone, True, True,
            warm_all=False),
        Row("check-1pib-scattered", name + "2 MiB clusters, in no order", "s",
            synthetic(21, "-s"), alone, warm_all=False),
        Row("check-1pib-64k", name + "64 KiB clusters", "s", synthetic(16), alone, warm_all=False),
    ]
