#!/usr/bin/env python3
"""A line to an NBD server that misbehaves on command, and counts what passes.

    nbd-proxy.py --listen SOCKET --control SOCKET --far SOCKET [--log FILE]
                 [--tcp] [--fifo NAME] [--ready FILE]
    nbd-proxy.py --send CONTROL-SOCKET COMMAND...

Each client's connection gets one of its own to the far server.  The proxy follows the
newstyle handshake and then requests and replies (simple and structured), so that each
fault hits a message where it is meant to.  TLS is not offered.  --tcp listens on
127.0.0.1, too, on a port that the command `port' tells.  --fifo: commands are read from
the pipe NAME.in and answered into NAME.out, too, for shells.  --ready: its process id is
written there when it listens.

Commands, one line to the control socket, answered by one line `ok ...' or `error ...':

    drop                    close all connections now
    drop-after N requests [mid] [every]
                            N more read replies pass, the next one is not begun, or (mid)
                            cut in its middle: all connections are closed.  every: again
                            after the next N, and so on
    drop-after N bytes [every]
                            likewise after N more bytes of data that was read
    drop-after off
    refuse on|close|off     do not listen; or accept and close at once.  What is open stays
    stall on|off            forward nothing more, in either direction; new connections too
    stall-reads on|off      hold back reads, everything else passes
    nonsense KIND [N]       corrupt the next N (1) replies to reads, KIND is one of
                              magic     no reply's magic
                              handle    a cookie that nobody sent
                              length    a structured chunk of nearly 4 GiB
                              short     half of the data, and then the end of the reply
                              chunk     a structured chunk that lies outside the request
                            `length' and `chunk' wait for a structured reply
    nonsense off
    status bad [KIND] | off answer block status with extents of no length (zero), past the
                            request (past), of a context nobody knows (context); without
                            KIND each in turn
    error OFF LEN [ERRNO]   reads that touch the range get this error (EIO), in addition to
                            the ranges of before; `error off' ends it
    delay MS                each reply comes this much after its request; as many as the
                            client likes may be under way
    rate BYTES_PER_S        bandwidth of the line, each way, all connections together; 0: no limit
    size N|off              later connections are told this size of the export
    multi-conn on|off       off: later connections are told that there may be no others
    extents on|off          off: neither structured replies nor block status for later ones
    readonly on|off         later connections are told so, and their writes get EPERM
    blocksize MIN PREF MAX | off
                            later connections are told so; what breaks it gets EINVAL and
                            counts as a violation
    backend SOCKET          later connections go to this server
    max-conns N|off         further connections are accepted, and answered when a place is
                            free
    lose-writes on|now|flush|off
                            on: from now on, remember what writes change until a flush is answered; now:
                            undo that, and close all connections, as a server that crashed
                            does; flush: do it when the next flush arrives, instead
    stats                   ok KEY=NUMBER...
    await KEY N [SECONDS]   answers once that number is at least N, within 30 seconds
    sync                    the log file is complete up to here
    reset                   all numbers (but those of the present) are 0, the log is empty
    port, pid, quit

Numbers: connections (made), turned-away, waiting and open (now), peak-open, inflight (now),
peak (most requests in flight at once), peak-conn (on one connection), requests of each kind
(read write flush trim cache zero status disc), read-bytes (asked for), sent-bytes
(data that was read and passed on), written-bytes, violations (of block sizes, and
requests that are empty or end after the export), errors (answered by the proxy),
nonsense, bad-status, drops (times that drop and drop-after closed connections), crashes.

The log has a line for each request: KIND CONNECTION OFFSET LENGTH, and `violation
KIND CONNECTION OFFSET LENGTH' after one that is.
"""

import argparse
import os
import signal
import socket
import sys
import threading
import time

sys.dont_write_bytecode = True

import nbdwire as nbd           # noqa: E402
from nbdline import CHANGES, Connection, Faults, Numbers, Undo  # noqa: E402


class Usage(Exception):
    """A command that makes no sense."""


# --- the whole

class Proxy:
    def __init__(self, args):
        self.path, self.far = args.listen, args.far
        self.faults, self.numbers, self.undo = Faults(), Numbers(args.log), Undo()
        self.lock = threading.Lock()
        self.conns = set()
        self.waiting = []
        self.made = 0
        self.max_conns = None
        self.refuse_close = False
        self.tcp = args.tcp
        self.port = 0
        self.listeners = []

    # --- listening

    def listen(self):
        if os.path.exists(self.path):
            os.unlink(self.path)
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(self.path)
        self.listeners = [unix]
        if self.tcp:
            tcp = socket.socket()
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tcp.bind(("127.0.0.1", self.port))
            self.port = tcp.getsockname()[1]
            self.listeners.append(tcp)
        for s in self.listeners:
            s.listen(64)
            threading.Thread(target=self.accept, args=(s,), daemon=True).start()

    def unlisten(self):
        for s in self.listeners:
            try:
                s.shutdown(socket.SHUT_RDWR)    # wakes the thread in accept
            except OSError:
                pass
            s.close()
        self.listeners = []

    def accept(self, listener):
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            if sock.family == socket.AF_INET:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.refuse_close:
                self.numbers.add("turned-away")
                sock.close()
            else:
                self.admit(sock)

    def admit(self, sock):
        with self.lock:
            self.made += 1
            self.numbers.add("connections")
            if self.max_conns is not None and len(self.conns) >= self.max_conns:
                self.waiting.append((sock, self.made))
                self.numbers.add("waiting")
            else:
                self.begin(sock, self.made)

    def begin(self, sock, number):
        c = Connection(self, sock, number)
        self.conns.add(c)
        self.numbers.opened()
        threading.Thread(target=c.run, daemon=True).start()

    def fill_places(self):
        while self.waiting and (self.max_conns is None or len(self.conns) < self.max_conns):
            self.numbers.add("waiting", -1)
            self.begin(*self.waiting.pop(0))

    def gone(self, conn):
        with self.lock:
            self.conns.discard(conn)
            self.numbers.add("open", -1)
            self.fill_places()

    # --- breaking

    def all(self):
        with self.lock:
            return list(self.conns)

    def drop(self):
        with self.lock:
            for sock, _ in self.waiting:
                self.numbers.add("waiting", -1)
                sock.close()
            self.waiting = []
        for c in self.all():
            c.close()

    def crash(self):
        """What was acknowledged and not flushed is undone, then everyone is cut off."""
        conns = self.all()
        for c in conns:
            c.muted = True
            c.shut(c.client)
        end = time.monotonic() + 10
        while any(r.cmd in CHANGES for c in conns for r in list(c.requests.values())) and \
                time.monotonic() < end:
            time.sleep(0.002)
        self.undo.undo()
        for c in conns:
            c.close()
        self.numbers.add("crashes")

    # --- commands: each returns what follows `ok'

    def cmd_drop(self):
        self.numbers.add("drops")
        self.drop()

    def cmd_drop_after(self, n, unit="requests", *how):
        if n == "off":
            self.faults.cut = None
            return
        if unit not in ("requests", "bytes") or set(how) - {"mid", "every"}:
            raise Usage()
        n = int(n, 0)
        self.faults.cut = [unit, n, "mid" in how, n if "every" in how else None]

    def cmd_refuse(self, how):
        if how not in ("on", "off", "close"):
            raise Usage()
        self.refuse_close = how == "close"
        if how == "on":
            self.unlisten()
        elif not self.listeners:
            self.listen()

    def cmd_stall(self, how):
        if on_off(how):
            self.faults.go.clear()
        else:
            self.faults.go.set()

    def cmd_stall_reads(self, how):
        self.faults.stall_reads = on_off(how)
        if not self.faults.stall_reads:
            for c in self.all():
                c.release_reads()

    def cmd_nonsense(self, kind, n="1"):
        if kind == "off":
            self.faults.nonsense = None
        elif kind in ("magic", "handle", "length", "short", "chunk"):
            self.faults.nonsense = [kind, int(n, 0)]
        else:
            raise Usage()

    def cmd_status(self, how, kind=None):
        kinds = ["zero", "past", "context"]
        if how not in ("bad", "off") or kind not in kinds + [None]:
            raise Usage()
        self.faults.status = None if how == "off" else [kind] if kind else kinds

    def cmd_error(self, off, n=None, number="EIO"):
        if off == "off":
            self.faults.errors = []
        elif n is None or number not in nbd.ERRNOS:
            raise Usage()
        else:
            start = int(off, 0)
            self.faults.errors = self.faults.errors + \
                [(start, start + int(n, 0), nbd.ERRNOS[number])]

    def cmd_delay(self, ms):
        self.faults.delay = float(ms) / 1000

    def cmd_rate(self, rate):
        self.faults.rate = int(rate, 0)

    def cmd_size(self, n):
        self.faults.size = None if n == "off" else int(n, 0)

    def cmd_multi_conn(self, how):
        self.faults.multi_conn = on_off(how)

    def cmd_extents(self, how):
        self.faults.extents = on_off(how)

    def cmd_readonly(self, how):
        self.faults.readonly = on_off(how)

    def cmd_blocksize(self, *sizes):
        if sizes == ("off",):
            self.faults.blocksize = None
        elif len(sizes) == 3:
            self.faults.blocksize = tuple(int(s, 0) for s in sizes)
        else:
            raise Usage()

    def cmd_backend(self, path):
        self.far = path

    def cmd_max_conns(self, n):
        with self.lock:
            self.max_conns = None if n == "off" else int(n, 0)
            self.fill_places()

    def cmd_lose_writes(self, how):
        if how == "now":
            self.crash()
        elif how == "flush":
            if not self.undo.on:
                self.undo.start(True)
            self.faults.crash_at_flush = True
        else:
            self.undo.start(on_off(how))

    def cmd_stats(self):
        self.numbers.sync()
        return self.numbers.line()

    def cmd_await(self, key, n, seconds="30"):
        end = time.monotonic() + float(seconds)
        while self.numbers.get(key) < int(n, 0):
            if time.monotonic() > end:
                raise Usage("%s=%d after %s s" % (key, self.numbers.get(key), seconds))
            time.sleep(0.002)

    def cmd_sync(self):
        self.numbers.sync()

    def cmd_reset(self):
        self.numbers.reset()

    def cmd_port(self):
        return str(self.port)

    def cmd_pid(self):
        return str(os.getpid())

    def cmd_quit(self):
        threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGTERM)).start()

    def command(self, line):
        words = line.split()
        fn = getattr(self, "cmd_" + words[0].replace("-", "_"), None) if words else None
        if fn is None:
            return "error no such command: %s" % line
        try:
            return ("ok %s" % (fn(*words[1:]) or "")).strip()
        except (Usage, TypeError, ValueError, OSError, nbd.Broken, nbd.NBDError) as e:
            return "error %s: %s" % (line, e or "cannot be understood")


def on_off(word):
    if word not in ("on", "off"):
        raise Usage()
    return word == "on"


# --- control socket

def serve_control(proxy, path):
    if os.path.exists(path):
        os.unlink(path)
    s = socket.socket(socket.AF_UNIX)
    s.bind(path)
    s.listen(16)

    def one(sock):
        with sock, sock.makefile("rw") as f:
            f.write(proxy.command(f.readline().strip()) + "\n")

    def loop():
        while True:
            threading.Thread(target=one, args=(s.accept()[0],), daemon=True).start()

    threading.Thread(target=loop, daemon=True).start()


def serve_fifo(proxy, name):
    def loop():
        # Opened for both: so that there is no end of file when a shell closes its side.
        with open(os.open(name + ".in", os.O_RDWR)) as commands, \
                open(os.open(name + ".out", os.O_RDWR), "w") as answers:
            for line in commands:
                answers.write(proxy.command(line.strip()) + "\n")
                answers.flush()

    threading.Thread(target=loop, daemon=True).start()


def send_command(path, words):
    s = socket.socket(socket.AF_UNIX)
    s.connect(path)
    with s, s.makefile("rw") as f:
        f.write(" ".join(words) + "\n")
        f.flush()
        answer = f.readline().strip()
    print(answer)
    return 0 if answer.split(" ")[0] == "ok" else 1


def main():
    if sys.argv[1:2] == ["--send"]:
        sys.exit(send_command(sys.argv[2], sys.argv[3:]))
    parser = argparse.ArgumentParser(usage=__doc__)
    for name in ("--listen", "--control", "--far"):
        parser.add_argument(name, required=True)
    for name in ("--log", "--ready", "--fifo"):
        parser.add_argument(name)
    parser.add_argument("--tcp", action="store_true")
    args = parser.parse_args()
    sys.setswitchinterval(0.001)
    proxy = Proxy(args)
    proxy.listen()
    serve_control(proxy, args.control)
    if args.fifo:
        serve_fifo(proxy, args.fifo)
    if args.ready:
        with open(args.ready, "w") as f:
            f.write("%d\n" % os.getpid())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        while True:
            signal.pause()
    finally:
        proxy.numbers.sync()


if __name__ == "__main__":
    main()
