#!/usr/bin/env python3
"""forget.py REPORT DISK RAW [OFFSET LENGTH]...: zero what a report says is lost.

RAW has a disk's bytes before the damage; afterwards it has what a reader of the healed disk
must get.  DISK is the name of a snapshot, or `-'.  Nothing may be lost but parts of the
ranges given, which are those that the damage explains; else this fails.
"""

import json
import os
import sys


def main(report, disk, raw, *allowed):
    numbers = [int(x, 0) for x in allowed]
    may = sorted(zip(numbers[::2], numbers[1::2]))
    size = os.path.getsize(raw)
    lost = [(r["guest-offset"], r["guest-length"])
            for r in json.load(open(report)).get("lost", {}).get("ranges", [])
            if r.get("snapshot-name", "-") == disk]
    bad = 0
    with open(raw, "r+b") as f:
        for off, n in lost:
            at = off
            for m, k in may:
                if m <= at < m + k:
                    at = min(m + k, off + n)
            if at < off + n or off + n > size:
                print("lost, and nothing explains it: %d of %d bytes at %d" % (off + n - at, n, off))
                bad = 1
            f.seek(off)
            f.write(bytes(n))
    sys.exit(bad)


if __name__ == "__main__":
    main(*sys.argv[1:])
