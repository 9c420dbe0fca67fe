"""The images, each made when it is first asked for, and once.

Programs that write, or that lock what they serve, get copies of their own: `owner'.
"""

import json
import os
import random
import sys

import processes
from scale import KIB, MIB

PATCH = os.path.join(os.path.dirname(__file__), "..", "mkimage", "qcow2patch.py")
SEED = 20221
TEXT = 16 * MIB         # bytes of text before it comes again; far more than a cluster


class Images:
    def __init__(self, folder, scale):
        self.folder, self.scale = folder, scale

    def path(self, name):
        return os.path.join(self.folder, name)

    def log(self):
        return self.path("images.log")

    def run(self, *args):
        processes.run(args, self.log())

    def made(self, name, make, *args):
        """make (path, *args) unless it is there.  On the disk before it is used, so that
        nobody is measured while the system still writes it.
        """
        path = self.path(name)
        if not os.path.exists(path):
            make(path + ".part", *args)
            with open(path + ".part", "rb") as f:
                os.fsync(f.fileno())
            os.rename(path + ".part", path)
        return path

    def copy(self, original, owner):
        return self.made("%s.%s" % (os.path.basename(original), owner),
                         lambda part: self.run("cp", "--sparse=always", original, part))

    def create(self, path, size, *options):
        self.run("qemu-img", "create", "-q", "-f", "qcow2", *options, path, str(size))

    def patch(self, path, *args):
        self.run(sys.executable, PATCH, path, *args)

    # --- disks with data that does not compress

    def raw(self):
        return self.made("disk.raw", write_noise, self.scale.disk)

    def disk(self, owner):
        return self.copy(self.made("disk.qcow2", self.convert, self.raw()), owner)

    def convert(self, path, raw, *options):
        self.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, raw, path)

    def raw_copy(self, owner):
        return self.copy(self.raw(), owner)

    def without_refcounts(self):
        """The disk, its refcount table zeroed."""
        def make(path):
            self.run("cp", self.disk("plain"), path)
            self.patch(path, "rt-zero")
        return self.made("damaged.qcow2", make)

    # --- disks with nothing in them, new each time

    def empty(self, owner):
        path = self.path("empty.%s.qcow2" % owner)
        self.create(path, 4 * self.scale.disk)
        return path

    def sparse(self):
        path = self.path("sparse.raw")
        with open(path, "wb") as f:
            f.truncate(4 * self.scale.disk)
        return path

    # --- disks that are all metadata

    def metadata(self, size, cluster=64 * KIB):
        return self.made("metadata-%d-%d.qcow2" % (size, cluster), self.create, size, "-o",
                         "preallocation=metadata,cluster_size=%d" % cluster)

    def huge(self):
        return self.metadata(self.scale.huge)

    def huge_lost(self):
        def make(path):
            self.run("cp", "--sparse=always", self.huge(), path)
            self.patch(path, "rt-zero")
        return self.made("huge-lost.qcow2", make)

    def huge_to_mend(self):
        """Another one each time, for who repairs it in place."""
        path = self.path("mend.qcow2")
        self.run("cp", "--sparse=always", self.huge_lost(), path)
        return path

    # --- compressed ones

    def packed(self, how, owner):
        return self.copy(self.made("packed-%s.qcow2" % how, self.compress, how), owner)

    def compress(self, path, how):
        text = self.made("text.raw", write_text, self.scale.packed)
        self.convert(path, text, "-c", "-o", "compression_type=" + how)
        counts = self.counts(path)
        if counts.get("compressed-clusters") != counts["total-clusters"]:
            raise processes.Failed("not every cluster of %s was compressed" % path)

    def counts(self, path):
        with open(self.path("check.json"), "wb") as f:
            processes.run(["qemu-img", "check", "--output=json", "-f", "qcow2", path],
                          self.log(), stdout=f)
        with open(f.name) as f:
            return json.load(f)

    # --- fragmented ones

    def fragmented(self, owner):
        return self.copy(self.made("fragments.qcow2", self.fragment), owner)

    def fragment(self, path):
        """A shuffled disk: clusters are allocated in the order in which they are written."""
        cluster = 4 * KIB
        self.create(path, self.scale.fragments, "-o", "cluster_size=%d" % cluster)
        order = list(range(self.scale.fragments // cluster))
        random.Random(SEED).shuffle(order)
        self.write(path, ("write -q -P %d %d %d" % (1 + i % 255, i * cluster, cluster)
                          for i in order))
        if self.counts(path)["fragmented-clusters"] < len(order) * 9 // 10:
            raise processes.Failed("%s is not fragmented" % path)

    def write(self, path, commands):
        script = path + ".io"
        with open(script, "w") as f:
            f.write("\n".join(commands) + "\n")
        with open(script, "rb") as f:
            processes.run(["qemu-io", "-f", "qcow2", "-t", "writeback", path], self.log(), stdin=f)
        os.unlink(script)

    # --- chains

    def chain(self, owner):
        """The last of so many files, of which each has a few clusters of its own."""
        below, last = self.disk("chain"), self.scale.depth - 1
        for i in range(1, last):
            below = self.made("chain-%d.qcow2" % i, self.link, below, i)
        return self.made("chain-top.%s.qcow2" % owner, self.link, below, last)

    def link(self, path, below, seed):
        self.run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", below, path)
        clusters = self.scale.disk // (64 * KIB)
        own = random.Random(seed).sample(range(clusters), clusters // 32)
        self.write(path, ("write -q -P %d %dk 64k" % (seed, i * 64) for i in own))


def write_noise(path, size):
    rnd = random.Random(SEED)
    with open(path, "wb") as f:
        for _ in range(0, size, MIB):
            f.write(rnd.randbytes(MIB))


def write_text(path, size):
    """Words in no order, as many kinds as a language has in daily use: about 2:1."""
    rnd = random.Random(SEED)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    kinds = ["".join(rnd.choices(letters, range(26, 0, -1), k=rnd.randint(2, 9)))
             for _ in range(8000)]
    n = min(TEXT, size)
    text = " ".join(rnd.choices(kinds, k=n // 5)).encode()[:n]
    with open(path, "wb") as f:
        for _ in range(0, size, n):
            f.write(text)
