"""What is measured: one program, or one server under a load, run by run.

A contender has a label and open, run and close; run returns a Sample.  What has to be
made anew before a run is made outside the time that is measured.
"""

import json
import os
import time
from dataclasses import dataclass

import processes
import servers
from scale import MIB


@dataclass
class Sample:
    figure: float       # in the row's unit
    peak_kib: int       # largest resident set of the server or program
    cpu_s: float        # seconds of all CPUs that it used
    moved: int          # bytes that the figure is about


class Contender:
    def __init__(self, label):
        self.label = label

    def open(self):
        pass

    def close(self):
        pass


class Program(Contender):
    """Run to its end; the figure is seconds.  metadata: the file that it works through.
    What it says goes to a file, as it does for anybody who is going to read it.
    """

    def __init__(self, label, folder, command, metadata, exits=(0,), before=None):
        super().__init__(label)
        self.command, self.metadata = command, metadata
        self.exits, self.before = exits, before or (lambda: None)
        self.log = os.path.join(folder, "program.log")
        self.peak = os.path.join(folder, "program.peak")

    def run(self):
        self.before()
        seconds, kib, cpu = timed(self.command, self.peak, self.log, self.exits)
        os.truncate(self.log, 0)        # gigabytes, some of them
        return Sample(seconds, kib, cpu, allocated(self.metadata))


class Served(Contender):
    """A server and a load.  command () makes what it serves, too; with fresh each run gets
    a new one, and a new server.
    """

    def __init__(self, label, folder, command, load, fresh=False):
        super().__init__(label)
        self.folder, self.command, self.load, self.fresh = folder, command, load, fresh
        self.server = None

    def open(self):
        if not self.fresh:
            self.start()

    def start(self):
        self.server = servers.Server(self.folder, self.label.replace(" ", "-"), self.command())

    def run(self):
        if self.fresh:
            self.close()
            self.start()
        before = self.server.cpu_seconds()
        try:
            figure, moved = self.load(self.server.uri)
        except processes.Failed as e:
            raise processes.Failed("%s: %s%s" % (self.label, e, self.server.last_words())) from e
        return Sample(figure, self.server.peak_kib(), self.server.cpu_seconds() - before, moved)

    def close(self):
        if self.server:
            self.server.stop(scrap=self.fresh)
            self.server = None


class ServedFar(Served):
    """A server of what a slow server serves.  command: of the far one."""

    def __init__(self, label, folder, command, slow, load):
        super().__init__(label, folder, lambda: command(self.far), load)
        self.slow, self.far = slow, None

    def start(self):
        self.far = servers.Server(self.folder, self.label.replace(" ", "-") + "-far", self.slow())
        super().start()

    def close(self):
        super().close()
        if self.far:
            self.far.stop()
            self.far = None


class Startup(Contender):
    """From the command line to the first bytes: seconds.  first: a program that has to
    be run to its end before, within the time.
    """

    def __init__(self, label, folder, command, metadata, first=None, before=None):
        super().__init__(label)
        self.folder, self.command, self.metadata = folder, command, metadata
        self.first, self.before = first, before or (lambda: None)

    def run(self):
        self.before()
        begun = time.monotonic()
        sample = self.first.run() if self.first else Sample(0, 0, 0, allocated(self.metadata))
        # This returns when the first bytes are there.
        server = servers.Server(self.folder, "startup", self.command)
        sample.figure = time.monotonic() - begun
        sample.peak_kib = max(sample.peak_kib, server.peak_kib())
        sample.cpu_s += server.cpu_seconds()
        server.stop()
        return sample


class Synthetic(Contender):
    """tests/bench/synthetic.c, which says itself how long it took."""

    def __init__(self, label, folder, *args):
        super().__init__(label)
        self.command = [in_build("bench/synthetic")] + [str(a) for a in args]
        self.out = os.path.join(folder, "synthetic")

    def run(self):
        with open(self.out, "wb") as f:
            kib = timed(self.command, self.out + ".peak", self.out + ".log", stdout=f)[1]
        with open(self.out) as f:
            r = json.load(f)
        return Sample(r["seconds"], kib, r["cpu_s"], r["bytes"])


def timed(command, peak, log, exits=(0,), **kw):
    """Seconds, largest resident set in KiB, CPU seconds.  By a small program: Python's own
    size would count as that of what it starts.
    """
    processes.run([in_build("peak"), peak] + command, log, exits, **kw)
    with open(peak) as f:
        ms, kib, cpu = f.read().split()
    return float(ms) / 1000, int(kib), float(cpu)


def in_build(name):
    return os.path.join(os.environ["BUILD"], "tests", name)


def allocated(path):
    """Bytes of a file that are there."""
    return max(os.stat(path).st_blocks * 512, 1) if path else MIB
