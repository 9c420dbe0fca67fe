"""Runs the contenders of a row in turn, and makes medians of what they did."""

import contextlib
import statistics
import sys
import time

import processes
from scale import GIB


def say(text):
    print("# " + text, file=sys.stderr, flush=True)


class Result:
    """The samples of one contender in one row."""

    def __init__(self, label, samples):
        self.label, self.samples = label, samples

    def values(self, metric):
        if metric == "memory":
            return [s.peak_kib / 1024 for s in self.samples]
        return [s.figure for s in self.samples]

    def cpu_per_gib(self):
        return statistics.median(s.cpu_s * GIB / max(s.moved, 1) for s in self.samples)

    def peak_mib(self):
        return max(s.peak_kib for s in self.samples) / 1024


def measure(row, bench):
    """The row's results, ours first.  Machines are shared and have better and worse
    minutes, so nobody runs twice before everybody has run once, and each begins in turn.
    """
    contenders = row.make(bench)
    samples = [[] for _ in contenders]
    spent = [0.0] * len(contenders)
    with contextlib.ExitStack() as stack:
        for c in contenders:
            stack.callback(c.close)
            c.open()
        # Not counted: it brings everything into the page cache.
        for c in contenders if row.warm_all else contenders[:1]:
            c.run()
        for i in range(bench.runs):
            for j in rotated(len(contenders), i):
                # Who takes minutes is not waited for five times if time is short.
                if samples[j] and bench.budget and spent[j] > bench.budget:
                    continue
                begun = time.monotonic()
                samples[j].append(contenders[j].run())
                spent[j] += time.monotonic() - begun
    return [Result(c.label, s) for c, s in zip(contenders, samples)]


def rotated(n, by):
    return [(i + by) % n for i in range(n)]


def measure_row(row, bench):
    """(results, None), or (None, why not)."""
    reason = row.needs(bench) if row.needs else None
    if reason:
        say("%s: not measured: %s" % (row.name, reason))
        return None, reason
    begun = time.monotonic()
    try:
        results = measure(row, bench)
        say("%s: %.0f s" % (row.name, time.monotonic() - begun))
        return results, None
    except processes.Failed as e:
        bench.failed = True
        say("%s: FAILED: %s" % (row.name, e))
        return None, "failed: %s" % e
