"""How large and how long: the full bench, the quick one, and one for its own test."""

from dataclasses import dataclass

KIB, MIB, GIB, TIB, PIB = (1 << shift for shift in (10, 20, 30, 40, 50))


@dataclass(frozen=True)
class Scale:
    name: str
    disk: int           # bytes of the disks that are served
    packed: int         # bytes of those that are compressed
    huge: int           # bytes of the disk that has metadata only
    fine: int           # likewise, in clusters of 4 KiB
    fragments: int      # bytes of the disk whose clusters of 4 KiB lie in no order
    burst: int          # bytes that random writes into an empty image write
    seconds: float      # of load in each run
    runs: int           # of each program
    depth: int          # files of the backing chain
    synthetic: int      # log2 of the disk that is checked without being anywhere


FULL = Scale("full", 1 * GIB, 512 * MIB, 1 * TIB, 64 * GIB, 512 * MIB, 128 * MIB, 1.5, 5, 10, 50)
QUICK = Scale("quick", 256 * MIB, 64 * MIB, 1 * TIB, 8 * GIB, 64 * MIB, 32 * MIB, 0.2, 5, 10, 50)
TINY = Scale("tiny", 16 * MIB, 8 * MIB, 4 * GIB, 1 * GIB, 4 * MIB, 4 * MIB, 0.1, 2, 3, 40)


def human(n):
    """Whole bytes in the largest unit that leaves nothing over."""
    for size, unit in ((PIB, "PiB"), (TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if n % size == 0 and n:
            return "%d %s" % (n // size, unit)
    return "%d bytes" % n
