#!/usr/bin/env python3
"""What becomes of damaged images: here, and under `qemu-img check -r all'.

    recovery.py page [CASE...]      docs/recovery.md on stdout
    recovery.py compare PAGE CASE...
                                    ours only: the rows must be those of PAGE, and
                                    none may fail; TAP on stdout

From the environment: PLUGIN, and KEEP=DIR to keep the images.

Each case starts from an image with a file system whose bytes are known, and is
damaged by mkimage/damage.py, which shares nothing with core/.  What comes out is
compared with the bytes that are known, read by nbdcopy and by stock QEMU.  A
healing is right if every byte of every disk that differs lies in a range that
the report lists as lost, the damaged file is what it was, QEMU finds nothing
wrong with the healed image, and reads the same bytes from it; and if none differs,
the file system's own checker finds nothing either.
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "mkimage"))
import damage                           # noqa: E402

SEED = 20221
DISK = 16 << 20
BLOCK = 512                             # bytes are compared in blocks, for speed
SNAPSHOTS = ["one", "two", "three"]


def run(*args, timeout=120, **kw):
    """Exit code and everything printed; a code of None: it took too long."""
    try:
        p = subprocess.run(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout,
                           stdin=subprocess.DEVNULL, **kw)
        return p.returncode, p.stdout.decode(errors="replace")
    except subprocess.TimeoutExpired:
        return None, ""


def must(*args, **kw):
    code, out = run(*args, **kw)
    if code != 0:
        sys.exit("%s: exit %s\n%s" % (" ".join(args), code, out))
    return out


def read(path):
    with open(path, "rb") as f:
        return f.read()


# --- images

FILE_SYSTEMS = {        # checked how: the exit code is 0 if nothing is wrong
    "ext4": ["e2fsck", "-f", "-n"],
    "xfs": ["xfs_repair", "-n", "-f", "-o", "force_geometry"],   # it has one group only
    "ntfs": ["ntfsfix", "-n"],
}
# Other file systems than ext4: what a row does is not the file system's choice, so
# one of each kind of damage does.
OTHERS = ["%s/%s" % (fs, name) for fs in ("xfs", "ntfs")
          for name in ("l1-outside", "l2-into-l2", "l2-reserved", "rt-zero")]


def split_name(name):
    """File system, and case in damage.py."""
    fs, _, case = name.rpartition("/")
    return fs or "ext4", case


def make_files(folder):
    """Files of known contents."""
    rnd = random.Random(SEED)
    tree = os.path.join(folder, "tree")
    os.makedirs(tree)
    for i in range(36):
        with open(os.path.join(tree, "file%d" % i), "wb") as f:
            f.write(rnd.randbytes(1000 + i * 20000) if i % 3 else b"line of text %d\n" % i * 9000)
    return tree


def make_disk(fs, tree, disk):
    """A file system with these files."""
    names = sorted(os.listdir(tree))
    with open(disk, "wb") as f:
        f.truncate(DISK)
    if fs == "ext4":
        must("mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-O", "^has_journal",
             "-U", "6b1f1e0e-3a0e-4f6a-9d53-0123456789ab",
             "-E", "hash_seed=6b1f1e0e-3a0e-4f6a-9d53-0123456789ab,lazy_itable_init=0",
             "-d", tree, disk, "%dK" % (DISK >> 10), env={**os.environ, "E2FSPROGS_FAKE_TIME": "1700000000"})
    elif fs == "xfs":
        proto = disk + ".proto"
        with open(proto, "w") as f:
            f.write("/dev/null\n0 0\nd--755 0 0\n")
            f.writelines("%s ---644 0 0 %s\n" % (n, os.path.join(tree, n)) for n in names)
            f.write("$\n")
        # Smaller than anybody ought to make one.
        must("mkfs.xfs", "-q", "-f", "--unsupported", "-m",
             "uuid=6b1f1e0e-3a0e-4f6a-9d53-0123456789ab,reflink=0", "-d", "agcount=1", "-p", proto, disk)
    else:
        must("mkntfs", "-q", "-F", "-Q", "-c", "4096", "-s", "512", "-p", "0", "-H", "0", "-S", "0", disk)
        for n in names:
            must("ntfscp", disk, os.path.join(tree, n), n)
    return disk


def make_image(kind, disk, folder):
    """img.qcow2 in folder, which is made; and what its disks hold, by snapshot
    name ("" is the active one).
    """
    os.makedirs(folder)
    img = os.path.join(folder, "img.qcow2")
    opts, args = "cluster_size=4k", []
    if kind == "compressed":
        args = ["-c"]
    elif kind == "subclusters":
        opts = "cluster_size=16k,extended_l2=on"
    if kind == "backing":
        base = os.path.join(folder, "base.qcow2")
        must("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", opts, disk, base)
        must("qemu-img", "create", "-q", "-f", "qcow2", "-o", opts, "-b", "base.qcow2",
             "-F", "qcow2", img)
        write(img, 3)
    else:
        must("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", opts, *args, disk, img)
    if kind == "snapshots":
        for i, name in enumerate(SNAPSHOTS):
            must("qemu-img", "snapshot", "-c", name, img)
            write(img, i)
    elif kind == "bitmaps":
        for name in "ab":
            must("qemu-img", "bitmap", "--add", "-g", "4k", img, name)
            write(img, 1)
    return {name: convert(img, name) for name in [""] + (SNAPSHOTS if kind == "snapshots" else [])}


def write(img, n):
    """A little of what a guest does, into free space of its file system."""
    must("qemu-io", "-f", "qcow2", "-c", "write -P %d 15M 64k" % (n + 1),
         "-c", "write -P %d %dk 20k" % (n + 9, 15700 + 60 * n), img)


def convert(img, snapshot="", salvage=False):
    """The bytes of a disk as stock QEMU reads them, None if it does not open it."""
    out = img + ".raw"
    if img.startswith("json:"):
        out = json.loads(img[5:])["file"]["file"]["filename"] + ".raw"
    args = ["-l", "snapshot.name=" + snapshot] if snapshot else []
    fmt = [] if img.startswith("json:") else ["-f", "qcow2"]
    code, _ = run("qemu-img", "convert", *(["--salvage"] if salvage else []), *args, *fmt,
                  "-O", "raw", img, out)
    data = read(out) if code == 0 else None
    if os.path.exists(out):
        os.unlink(out)
    return data


# --- opinions

def differing(got, want):
    """Blocks in which two disks differ, as a set."""
    if got == want:
        return set()
    n = max(len(got), len(want))
    return {b for b in range(0, n, BLOCK) if got[b:b + BLOCK] != want[b:b + BLOCK]}


def placed(img):
    """{guest offset: host offset} of data, in an image that is sound."""
    out = must("qemu-img", "map", "-f", "qcow2", "--output=json", img)
    return {m["start"] + i: m["offset"] + i for m in json.loads(out)
            if m.get("depth") == 0 and m.get("data") and "offset" in m
            for i in range(0, m["length"], BLOCK)}


def destroyed(want, hosts, damaged, repaired):
    """Bytes of the active disk that lay in their places before and do not now."""
    n = 0
    for guest, host in hosts.items():
        block = want[guest:guest + BLOCK]
        if damaged[host:host + BLOCK] == block != repaired[host:host + BLOCK] and any(block):
            n += BLOCK
    return n


def fsck(fs, data, folder, name):
    """The exit code of the file system's own checker, as text."""
    path = os.path.join(folder, name)
    with open(path, "wb") as f:
        f.write(data)
    code, _ = run(*FILE_SYSTEMS[fs], path)
    os.unlink(path)
    return "none" if code is None else str(code)


def size(n):
    for unit, bits in (("MiB", 20), ("KiB", 10)):
        if n >= 1 << bits:
            return "%s %s" % ("%.1f" % (n / (1 << bits)) if n % (1 << bits) else n >> bits, unit)
    return "%d bytes" % n


# --- QEMU

def qemu(fs, folder, want, hosts):
    """The row's cells: exit code, guest bytes, file system, data destroyed in the file."""
    img = os.path.join(folder, "img.qcow2")
    before = read(img)
    code, _ = run("qemu-img", "check", "-r", "all", "-f", "qcow2", img)
    got = convert(img, salvage=True)
    lost = destroyed(want[""], hosts, before, read(img))
    if got is None:
        guest = "not opened"
    else:
        bad = len(differing(got, want[""])) * BLOCK
        guest = "right" if bad == 0 else size(bad) + " wrong"
    for name in want:
        if name and guest == "right":
            snap = convert(img, name, True)
            if snap is None:
                guest = "right; a snapshot is gone"
            elif snap != want[name]:
                guest = "right; a snapshot is wrong"
    return ["none (killed)" if code is None else str(code), guest,
            fsck(fs, got, folder, "qemu.fsck") if got is not None else "-",
            size(lost) if lost else "none"]


# --- ours

class Ours:
    """One healing through an overlay, and what is wrong with it (self.wrong)."""

    def __init__(self, fs, folder, want, name):
        self.fs, self.folder, self.want, self.wrong = fs, folder, want, []
        self.img = os.path.join(folder, "img.qcow2")
        self.overlay = os.path.join(folder, "o.qcow2")
        before = hashlib.sha256(read(self.img)).digest()
        self.serve(name)
        if hashlib.sha256(read(self.img)).digest() != before:
            self.wrong.append("the original was changed")
        if self.served:
            self.look()

    def path(self, name):
        return os.path.join(self.folder, name)

    def serve(self, name):
        self.backing = "none" if name == "backing-missing" or name == "backing-outside" else "follow"
        copies = ["timeout 30 nbdcopy \"$uri\" '%s'" % self.path("out.raw")]
        for s in self.want:
            copies.append("timeout 20 nbdcopy --synchronous \"nbd+unix:///%s?socket=$unixsocket\" '%s' 2>/dev/null || rm -f '%s'" % (
                "snapshot%2F" + s if s else "lost%2Bfound", self.path("snap." + s), self.path("snap." + s)))
        code, self.log = run(
            "nbdkit", "-U", "-", os.environ["PLUGIN"], "file=" + self.img, "repair=all", "check=deep",
            "backing=" + self.backing, "overlay=" + self.overlay, "report=" + self.path("report.json"),
            "--run", "set -e; " + "; ".join(copies))
        try:
            self.report = json.loads(read(self.path("report.json")))
        except FileNotFoundError:
            self.report = {}
        self.served = self.report.get("served", "no")
        if self.served == "no":
            self.wrong.append("not served: " + self.report.get("error", "exit %s" % code).replace(self.folder + "/", ""))
            self.served = ""
        elif code != 0:
            self.wrong.append("served, but cannot be read")
            self.served = ""

    def codes(self):
        return sorted({f["code"] for f in self.report.get("findings", [])})

    def lost_blocks(self, snapshot):
        out = set()
        for r in self.report["lost"]["ranges"]:
            if r.get("snapshot-name", "") == snapshot:
                first = r["guest-offset"] // BLOCK * BLOCK
                out |= set(range(first, r["guest-offset"] + r["guest-length"], BLOCK))
        return out

    def shared_blocks(self):
        """Of guest clusters that are said to share a host cluster: which of them it
        belonged to, nothing can tell.  S07: a snapshot's is in use by somebody else.
        """
        cs = self.report["cluster-size"]
        places = [(f["guest-offset"], cs * f["count"]) for f in self.report["findings"]
                  if f["code"] in ("T15", "S07") and "guest-offset" in f]
        places += [(f["expected"], cs * f["count"]) for f in self.report["findings"]
                   if f["code"] == "T15"]
        return {b for at, n in places for b in range(at, at + n, BLOCK)}

    def disk(self, snapshot, got):
        """Every difference listed?"""
        diff = differing(got, self.want[snapshot])
        lost = self.lost_blocks(snapshot)
        if diff - lost:
            shared = (diff - lost) & self.shared_blocks()
            self.shared += len(shared) * BLOCK
            diff -= shared
        whose = "snapshot %s: " % snapshot if snapshot else ""
        if len(got) != len(self.want[snapshot]):
            self.wrong.append("%sof another size" % whose)
        if diff - lost:
            self.unlisted(whose, diff - lost, self.want[snapshot])
        return len(diff) * BLOCK, len(lost) * BLOCK

    def unlisted(self, whose, blocks, want):
        """Not listed as lost: at least reported, and kept for carving?"""
        found = self.path("snap.")
        kept = read(found) if os.path.exists(found) else b""
        kept = {kept[i:i + BLOCK] for i in range(0, len(kept), BLOCK)}
        missing = [b for b in blocks if any(want[b:b + BLOCK]) and want[b:b + BLOCK] not in kept]
        if not whose and not missing and {"O01", "O02"} & set(self.codes()):
            self.found = len(blocks) * BLOCK
        else:
            self.wrong.append("%s%s differ and are not listed" % (whose, size(len(blocks) * BLOCK)))

    def look(self):
        self.found = self.shared = 0
        got = read(self.path("out.raw"))
        self.differ, self.lost = self.disk("", got)
        self.fsck = fsck(self.fs, got, self.folder, "fsck.raw")
        if self.fsck != "0" and not (self.differ or self.shared or self.found):
            self.wrong.append("all bytes are right, but not the file system")
        self.snapshot_bytes = self.report["lost"]["bytes"] - self.report["lost"]["active-bytes"]
        self.snapshots(got)

    def snapshots(self, got):
        """Each is right, but for what is listed, or listed as gone: by its name, or
        as one whose name could not be read.
        """
        listed = [s["snapshot-name"] for s in self.report["lost"]["snapshots"]]
        disks = {"": got}
        self.snapshots_lost = 0
        for name in self.want:
            if not name:
                continue
            if os.path.exists(self.path("snap." + name)):
                disks[name] = read(self.path("snap." + name))
                self.disk(name, disks[name])
            elif name in listed:
                self.snapshots_lost += 1
            elif "" in listed:
                self.snapshots_lost += 1
                if "S01" not in self.codes():   # else one stands for all
                    listed.remove("")
            else:
                self.wrong.append("snapshot %s is gone and not listed" % name)
        self.nested(disks)

    def nested(self, disks):
        """Stock QEMU's opinion of the healed image, through the overlay."""
        base = {"driver": "qcow2", "file": {"driver": "file", "filename": self.path("base.qcow2")}}
        follow = self.backing == "follow" and os.path.exists(self.path("base.qcow2"))
        node = "json:" + json.dumps({"driver": "qcow2", "backing": base if follow else None, "file": {
            "driver": "qcow2", "file": {"driver": "file", "filename": self.overlay}}})
        code, out = run("qemu-img", "check", node)
        if "O01" in self.codes() or "O02" in self.codes():
            if code not in (0, 3) or "ERROR" in out:
                self.wrong.append("QEMU finds errors in the healed image")
        elif code != 0 or "No errors were found" not in out:
            self.wrong.append("QEMU finds errors in the healed image" if code != 3 else
                              "QEMU finds leaks in the healed image")
        if not self.report.get("sound") and not self.found:
            self.wrong.append("damage remains")
        for name, got in disks.items():
            if convert(node, name) != got:
                self.wrong.append("QEMU reads other bytes" + (" from snapshot " + name if name else ""))

    def cells(self):
        if not self.served:
            return ["refused", "FAILS: " + "; ".join(self.wrong), "-"]
        if self.found:
            guest = "%s reported as orphaned, all of it in lost+found" % size(self.found)
        elif self.lost:
            guest = "%s lost and listed, all else right" % size(self.lost)
        else:
            guest = "right"
        if self.shared:
            guest += "; %s reported as shared by two places" % size(self.shared)
        if self.snapshot_bytes:
            guest += "; %s of snapshots lost and listed" % size(self.snapshot_bytes)
        if self.snapshots_lost:
            guest += "; %d snapshot%s lost and listed" % (self.snapshots_lost,
                                                        "s" * (self.snapshots_lost > 1))
        if self.wrong:
            guest = "FAILS: " + "; ".join(self.wrong)
        return [self.served, guest, self.fsck]


# --- rows

class Bench:
    def __init__(self, folder):
        self.folder = folder
        self.tree = make_files(folder)
        self.made = {}

    def prepare(self, names):
        wanted = [split_name(n) for n in names]
        for fs in sorted({fs for fs, _ in wanted}):
            disk = make_disk(fs, self.tree, os.path.join(self.folder, fs + ".raw"))
            if fsck(fs, read(disk), self.folder, "fsck.raw") != "0":
                sys.exit("the %s of the tests is not sound to begin with" % fs)
            for kind in sorted({damage.CASES[c][0] for f, c in wanted if f == fs}):
                path = os.path.join(self.folder, fs + "." + kind)
                want = make_image(kind, disk, path)
                self.made[fs, kind] = want, placed(os.path.join(path, "img.qcow2")), path

    def row(self, name, with_qemu):
        fs, case = split_name(name)
        kind, title, _ = damage.CASES[case]
        want, hosts, made = self.made[fs, kind]
        ours = os.path.join(self.folder, "ours." + name.replace("/", "."))
        shutil.copytree(made, ours)
        must(sys.executable, os.path.join(HERE, "mkimage", "damage.py"),
             os.path.join(ours, "img.qcow2"), case)
        if case == "snap-forgotten":    # a guest wrote since
            want = {**want, "": want[""][:14 << 20] + b"M" * (40 << 10)
                    + want[""][(14 << 20) + (40 << 10):]}
        theirs = os.path.join(self.folder, "qemu." + name.replace("/", "."))
        shutil.copytree(ours, theirs)
        cells = ["`%s`" % name, title] + (qemu(fs, theirs, want, hosts) if with_qemu else [])
        cells += Ours(fs, ours, want, case).cells()
        if not os.environ.get("KEEP"):
            shutil.rmtree(ours)
            shutil.rmtree(theirs)
        return cells


def rows(names, with_qemu):
    folder = os.environ.get("KEEP")
    if folder:
        os.makedirs(folder)
        return rows_in(folder, names, with_qemu)
    with tempfile.TemporaryDirectory(prefix="qcow2repair-recovery.") as folder:
        return rows_in(folder, names, with_qemu)


def rows_in(folder, names, with_qemu):
    bench = Bench(folder)
    bench.prepare(names)
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda n: bench.row(n, with_qemu), names))


def page(names):
    with open(os.path.join(HERE, "recovery.head.md")) as f:
        sys.stdout.write(f.read().replace("@QEMU@", must("qemu-img", "--version").split()[2]))
    print("\n| case | damage | QEMU's exit code | guest disk | file system | data destroyed | "
          "qcow2repair serves | guest disk | file system |")
    print("|---|---|---|---|---|---|---|---|---|")
    for cells in rows(names, True):
        print("| %s |" % " | ".join(cells))


def compare(path, names):
    with open(path) as f:
        known = {line.split(" | ")[0]: line.rstrip(" |\n").split(" | ")[-3:] for line in f
                 if line.startswith("| `")}
    sys.stdout.flush()
    print("1..%d" % len(names))
    failed = 0
    for n, cells in enumerate(rows(names, False), 1):
        want, got = known.get("| " + cells[0], ["no such row"]), cells[-3:]
        good = got == want and not got[1].startswith("FAILS")
        failed |= not good
        print("%s %d - %s: %s" % ("ok" if good else "not ok", n, cells[0].strip("`"), cells[1]))
        if got != want:
            print("# got: %s\n# the page (made by `make recovery'): %s" % (got, want))
    sys.exit(failed)


def main(argv):
    if argv[1:2] == ["page"]:
        page(argv[2:] or list(damage.CASES) + OTHERS)
    elif argv[1:2] == ["compare"] and len(argv) > 3:
        compare(argv[2], argv[3:])
    else:
        sys.exit(__doc__)


main(sys.argv)
