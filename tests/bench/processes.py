"""Programs that are started, timed and ended; nothing of them stays.

Whatever is started here leads a process group of its own and is in `running'
until it is waited for, so that kill_all ends it and its children and nobody else's.
"""

import os
import signal
import subprocess
import sys

PATIENCE = 3600         # seconds: a program that hangs must not hang the bench for ever

running = {}            # process id -> Popen
starting = False        # between fork and `running': a signal waits for that
pending = None          # the signal that does


class Failed(Exception):
    """A program did not do what it was started for; the text says what and why."""


def start(args, **kw):
    global starting
    kw.setdefault("stdin", subprocess.DEVNULL)
    starting = True
    try:
        p = subprocess.Popen(args, start_new_session=True, **kw)
        running[p.pid] = p
    except OSError as e:
        raise Failed("%s: %s" % (args[0], e.strerror)) from e
    finally:
        starting = False
        if pending:
            interrupted(pending, None)
    return p


def interrupted(number, frame):
    """The handler of signals that end the bench."""
    global pending
    pending = number
    if not starting:
        sys.exit(128 + number)


def kill_group(p, sig=signal.SIGKILL):
    try:
        os.killpg(p.pid, sig)
    except ProcessLookupError:
        pass


def reap(p, patience=PATIENCE):
    """Its exit code, once it has ended by itself or its time is up."""
    try:
        return p.wait(patience)
    except subprocess.TimeoutExpired:
        raise Failed("%s did not end in %d s" % (p.args[0], patience)) from None
    finally:
        if p.poll() is None:
            kill_group(p)
            p.wait()
        running.pop(p.pid, None)


def stop(p, scrap=False):
    """A server: asked, so that it leaves its files as it should, which may take the disk
    a while; or not asked, if they are scrap.
    """
    kill_group(p, signal.SIGKILL if scrap else signal.SIGTERM)
    reap(p)


def kill_all():
    for p in list(running.values()):
        kill_group(p)
        p.wait()
    running.clear()


def run(args, log, exits=(0,), stdout=None, **kw):
    """To its end; its last words are in the message if it fails."""
    with open(log, "wb") as f:
        p = start(args, stdout=stdout or f, stderr=f, **kw)
        code = reap(p)
    if code not in exits:
        raise Failed("%s ended with %d: %s" % (" ".join(args[:3]), code, tail(log)))
    return code


def tail(log):
    with open(log, "rb") as f:
        f.seek(max(0, os.path.getsize(log) - 300))
        return " ".join(f.read().decode(errors="replace").split())


def cpu_seconds(pid):
    """Of a process that runs, user and system."""
    with open("/proc/%d/stat" % pid) as f:
        fields = f.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_kib(pid):
    """The largest resident set it ever had."""
    with open("/proc/%d/status" % pid) as f:
        for line in f:
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    return 0
