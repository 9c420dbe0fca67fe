#!/usr/bin/env python3
"""Is the index of lost+found true?

    lost-found.py INDEX BYTES IMAGE [MAP RAW COVERAGE]

INDEX and BYTES are the two exports, IMAGE the damaged file: regions must fill BYTES
without gaps, hold what IMAGE has at their places, and no place twice.

MAP is what `qemu-img map --output=json' said before the damage, RAW the guest's
bytes at that time, COVERAGE how many of them one L2 table maps: then each table's region
must hold, in the order of the disk, all data of one such window of it.  Prints the
numbers of these windows.
"""

import json
import sys


def main(index, got, image, map_json=None, raw=None, coverage=None):
    idx = json.load(open(index))
    got, image = open(got, "rb").read(), open(image, "rb").read()
    at, places = 0, []
    for r in idx["regions"]:
        assert r["offset"] == at, (r, at)
        pieces = r.get("extents") if r["kind"] == "table" else [r]
        for p in pieces:
            assert p["offset"] == at and p["length"] > 0, (p, at)
            end = p["host-offset"] + p["length"]
            assert got[at:at + p["length"]] == image[p["host-offset"]:end], p
            places.append((p["host-offset"], end))
            at += p["length"]
        assert at == r["offset"] + r["length"], r
    assert at == idx["size"] == len(got), (at, idx["size"], len(got))
    places.sort()
    for a, b in zip(places, places[1:]):
        assert a[1] <= b[0], (a, b)
    for kind, total in (("table", "tables"), ("data", "data"), ("unreferenced", "unreferenced")):
        assert idx[total] == sum(r["kind"] == kind for r in idx["regions"]), kind
    if map_json:
        windows(idx, got, json.load(open(map_json)), open(raw, "rb").read(), int(coverage))


def windows(idx, got, mapping, raw, coverage):
    data = [m for m in mapping if m["data"] and "offset" in m]
    wanted = {}
    for m in data:
        off = m["start"]
        while off < m["start"] + m["length"]:
            n = min(m["start"] + m["length"], (off // coverage + 1) * coverage) - off
            wanted[off // coverage] = wanted.get(off // coverage, b"") + raw[off:off + n]
            off += n
    for r in idx["regions"]:
        if r["kind"] != "table":
            continue
        host = r["extents"][0]["host-offset"]
        home = [m for m in data if m["offset"] <= host < m["offset"] + m["length"]]
        assert len(home) == 1, (host, home)
        guest = home[0]["start"] + host - home[0]["offset"]
        window = guest // coverage
        assert guest % coverage == r["extents"][0]["window-offset"], (guest, r)
        assert got[r["offset"]:r["offset"] + r["length"]] == wanted.pop(window), window
        for p in r["extents"]:
            place = window * coverage + p["window-offset"]
            assert got[p["offset"]:p["offset"] + p["length"]] == raw[place:place + p["length"]], p
        print(window)
    print("without a region:", *sorted(wanted))


main(*sys.argv[1:])
