#!/usr/bin/env python3
"""What the matrix test does to which images; seeded, the same for ever.

    matrix.py recipes SEED pairs    recipes such that any two settings that can
                                    meet do meet in one of them
    matrix.py recipes SEED N        N others, taken from all there are
    matrix.py churn SEED SIZE CLUSTER_SIZE OPS COMPRESS
                                    commands for qemu-io -d unmap: writes, zeros
                                    and discards at all alignments; COMPRESS=1:
                                    some compressed
    matrix.py dirty MAP BEFORE AFTER
                                    fails if a byte differs where MAP (nbdinfo --map
                                    --json) does not say dirty
    matrix.py bytes SEED SIZE FILE  a disk to start from: text, noise and holes

A recipe is one line of key=value, for the shell.
"""

import itertools
import json
import random
import sys

DIMENSIONS = {
    "version": [2, 3],
    "cluster": [512, 4096, 16384, 65536, 2097152],
    "refcount": [1, 2, 16, 64],
    "compression": ["none", "zlib", "zstd"],
    "ext_l2": ["off", "on"],
    "snapshots": [0, 2],
    "backing": ["none", "raw-short", "qcow2-short", "qcow2-long"],
    "data": ["none", "file", "raw"],
    "lazy": ["off", "on"],
    "bitmap": [0, 1],
}


def valid(r):
    """What QEMU makes."""
    if r["version"] == 2 and (r["refcount"] != 16 or r["compression"] == "zstd" or r["bitmap"] or
                              r["ext_l2"] == "on" or r["data"] != "none" or r["lazy"] == "on"):
        return False
    if r["ext_l2"] == "on" and r["cluster"] < 16384:
        return False
    # Compressed clusters share a host cluster: too many references for 4 bits or fewer.
    if r["snapshots"] and r["refcount"] < (2 if r["compression"] == "none" else 8):
        return False
    if r["data"] != "none" and (r["compression"] != "none" or r["snapshots"]):
        return False
    return r["data"] != "raw" or r["backing"] == "none"


def recipes(seed, how):
    rnd = random.Random(seed)
    names = list(DIMENSIONS)
    if how != "pairs":
        DIMENSIONS["refcount"] += [4, 8, 32]
        DIMENSIONS["backing"] += ["raw-long"]
    every = [r for r in (dict(zip(names, v)) for v in itertools.product(*DIMENSIONS.values()))
             if valid(r)]
    rnd.shuffle(every)
    if how != "pairs":
        return every[:int(how)]

    def pairs(r):
        return set(itertools.combinations([(n, r[n]) for n in names], 2))

    missing = set().union(*map(pairs, every))
    chosen = []
    while missing:
        must = min(missing, key=str)    # progress, whatever the sample holds
        sample = rnd.sample(every, 150) + [r for r in every if must in pairs(r)][:150]
        best = max(sample, key=lambda r: len(pairs(r) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def churn(seed, size, cluster, ops, compress):
    rnd = random.Random(seed)
    for _ in range(ops):
        align = rnd.choice([1, 512, 512, 4096, cluster, cluster])
        off = rnd.randrange(size) // align * align
        n = rnd.randrange(1, rnd.choice([2000, 40000, 40000, 3 * cluster]))
        n = min(-(-n // align) * align, size - off)
        kind = rnd.randrange(20)
        if kind < 2:
            print("discard %d %d" % (off, n))
        elif kind < 4:
            print("write -z %s%d %d" % (rnd.choice(["", "-u "]), off, n))
        elif kind < 10 and compress:
            off = off // cluster * cluster
            n = min(cluster * rnd.randrange(1, 4), size - off)
            print("write -c -P %d %d %d" % (rnd.randrange(1, 256), off, n))
        else:
            print("write -P %d %d %d" % (rnd.randrange(1, 256), off, n))


def disk(seed, size, path):
    rnd = random.Random(seed)
    with open(path, "wb") as f:
        at = 0
        while at < size:
            n = min(rnd.choice([700, 5000, 30000, 200000, 600000]), size - at)
            kind = rnd.randrange(3)
            if kind:
                words = b"%d the quick brown fox " % rnd.randrange(1000)
                f.seek(at)
                f.write(rnd.randbytes(n) if kind == 1 else (words * (n // len(words) + 1))[:n])
            at += n
        f.truncate(size)


def dirty(map_file, before, after):
    with open(map_file) as f, open(before, "rb") as b, open(after, "rb") as a:
        x, y = b.read(), a.read()
        marked = bytearray(len(x))
        for e in json.load(f):
            if e["type"] & 1:
                marked[e["offset"]:e["offset"] + e["length"]] = b"\1" * e["length"]
    for i in range(0, len(x), 512):
        if x[i:i + 512] != y[i:i + 512] and not all(
                marked[k] or x[k] == y[k] for k in range(i, min(i + 512, len(x)))):
            sys.exit("byte %d or near it has changed and is not dirty" % i)
    print("%d of %d bytes are dirty" % (sum(marked[:len(x)]), len(x)))


def main(cmd, *a):
    if cmd == "recipes":
        for r in recipes(int(a[0]), a[1]):
            print(" ".join("%s=%s" % kv for kv in r.items()))
    elif cmd == "churn":
        churn(*map(int, a))
    elif cmd == "dirty":
        dirty(*a)
    elif cmd == "bytes":
        disk(int(a[0]), int(a[1]), a[2])
    else:
        sys.exit(__doc__)


main(*sys.argv[1:])
