#!/usr/bin/env python3
"""Measures this plugin beside its peers; docs/BENCHMARKING.md says how to read it.

    bench.py [OPTION...] [PATTERN...]

Runs the rows whose name matches one of the patterns (shell's), or all; prints one
table, and with --json writes the same as JSON.  It reports and does not judge: exit 1
only if a program failed.  From the environment: PLUGIN, BUILD, TMPDIR.

Everything is made in a temporary folder that is gone at the end, also after a signal,
like all that was started.  This file is the way through it; rows.py is the table of rows.
"""

import sys
sys.dont_write_bytecode = True

import argparse                         # noqa: E402
import fnmatch                          # noqa: E402
import os                               # noqa: E402
import re                               # noqa: E402
import shutil                           # noqa: E402
import signal                           # noqa: E402
import subprocess                       # noqa: E402
import tempfile                         # noqa: E402

import measure                          # noqa: E402
import output                           # noqa: E402
import processes                        # noqa: E402
import rows                             # noqa: E402
import scale                            # noqa: E402
from images import Images               # noqa: E402


class Bench:
    """What every row needs to know."""

    def __init__(self, options, folder):
        self.scale = options.scale
        self.runs = options.runs or self.scale.runs
        self.budget = options.budget
        self.folder = folder
        self.images = Images(folder, self.scale)
        self.parameters = plugin_parameters()
        self.failed = False

    @staticmethod
    def forget(path):
        if os.path.exists(path):
            os.unlink(path)


def plugin_parameters():
    out = subprocess.run(["nbdkit", os.environ["PLUGIN"], "--dump-plugin"], check=True,
                         stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True).stdout
    return re.search("^qcow2repair_parameters=(.*)$", out, re.M).group(1).split(",")


def parse():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("pattern", nargs="*", help="names of rows; * and ? as in the shell")
    p.add_argument("--json", metavar="FILE", help="write the results there, too")
    p.add_argument("--list", action="store_true", help="name the rows and end")
    p.add_argument("--runs", type=int, metavar="N", help="of each program (5)")
    p.add_argument("--budget", type=float, metavar="SECONDS",
                   help="give up repeating a program that has taken so long in one row")
    p.add_argument("--quick", dest="scale", action="store_const", const=scale.QUICK,
                   help="some rows, smaller and shorter: under two minutes")
    p.add_argument("--tiny", dest="scale", action="store_const", const=scale.TINY,
                   help="a few rows, too small to mean anything: for the test of the bench")
    p.set_defaults(scale=scale.FULL)
    return p.parse_args()


def selected(options):
    chosen = [r for r in rows.rows(options.scale)
              if options.scale is scale.FULL or getattr(r, options.scale.name)]
    if options.pattern:
        chosen = [r for r in chosen if any(fnmatch.fnmatchcase(r.name, p) for p in options.pattern)]
    if not chosen:
        sys.exit("bench.py: no row is called that; --list names them")
    return chosen


def bench(options, chosen):
    folder = tempfile.mkdtemp(prefix="qcow2repair-bench.")
    try:
        b, about = Bench(options, folder), output.machine()
        lines = measured(b, chosen)
        print(output.table(lines))
        print("\nMedians of %d runs, ± half their range.  %s" % (b.runs, output.legend(about)))
        if options.json:
            output.write_json(options.json, b, about, lines)
        return b.failed
    finally:
        # A second signal must not stop this.
        for s in SIGNALS:
            signal.signal(s, signal.SIG_IGN)
        processes.kill_all()
        shutil.rmtree(folder, ignore_errors=True)


def measured(b, chosen):
    lines, ours = [], {}
    for row in chosen:
        results, reason = measure.measure_row(row, b)
        lines += output.lines_of(row, results, reason, ours)
        if results:
            ours[row.name] = results[0]
    return lines


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main():
    options = parse()
    chosen = selected(options)
    if options.list:
        print("\n".join("%-22s %s" % (r.name, r.work) for r in chosen))
        return 0
    for s in SIGNALS:
        signal.signal(s, processes.interrupted)
    return bench(options, chosen)


if __name__ == "__main__":
    sys.exit(main())
