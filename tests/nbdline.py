"""One connection of tests/nbd-proxy.py, what goes wrong on it, and the numbers.

What can be told to the proxy is listed there.  A connection has two threads: one passes
requests up to the far server, one its replies down.  A reply that is to be late makes its
thread sleep until so long after its request, so that others, which came at the same time,
follow at once.
"""

import collections
import socket
import struct
import threading
import time

import nbdwire as nbd

PIECE = 1 << 18
CHANGES = (nbd.WRITE, nbd.ZERO, nbd.TRIM)


# --- numbers

class Numbers:
    """What passed, and the log."""

    PRESENT = ("open", "waiting", "inflight")

    def __init__(self, path):
        self.lock = threading.Lock()
        self.path = path
        self.log = open(path, "w", 1 << 16) if path else None
        self.n = collections.Counter()

    def add(self, key, n=1):
        with self.lock:
            self.n[key] += n

    def request(self, conn, r):
        name = nbd.CMDS[r.cmd] if r.cmd < len(nbd.CMDS) else "other"
        with self.lock:
            n = self.n
            n[name] += 1
            if r.cmd == nbd.READ:
                n["read-bytes"] += r.n
            elif r.cmd == nbd.WRITE:
                n["written-bytes"] += r.n
            if self.log:
                self.log.write("%s %d %d %d\n" % (name, conn.number, r.off, r.n))
            if r.violation:
                n["violations"] += 1
                if self.log:
                    self.log.write("violation %s %d %d %d\n" % (name, conn.number, r.off, r.n))
            if r.cmd != nbd.DISC:
                n["inflight"] += 1
                conn.inflight += 1
                n["peak"] = max(n["peak"], n["inflight"])
                n["peak-conn"] = max(n["peak-conn"], conn.inflight)

    def opened(self):
        with self.lock:
            self.n["open"] += 1
            self.n["peak-open"] = max(self.n["peak-open"], self.n["open"])

    def answered(self, conn, count=1):
        with self.lock:
            self.n["inflight"] -= count
            conn.inflight -= count

    def line(self):
        keys = ["connections", "turned-away", "open", "waiting", "peak-open", "inflight",
                "peak", "peak-conn"] + nbd.CMDS + ["read-bytes", "sent-bytes", "written-bytes",
                "violations", "errors", "nonsense", "bad-status", "drops", "crashes"]
        with self.lock:
            return " ".join("%s=%d" % (k, self.n[k]) for k in keys)

    def get(self, key):
        with self.lock:
            return self.n[key]

    def sync(self):
        with self.lock:
            if self.log:
                self.log.flush()

    def reset(self):
        with self.lock:
            for k in list(self.n):
                if k not in self.PRESENT:
                    del self.n[k]
            if self.log:
                self.log.close()
                self.log = open(self.path, "w", 1 << 16)


# --- a server that forgets

class Undo:
    """What the disk held before the writes that no flush has made durable.

    Generations of {block: bytes}: a flush that is under way seals those before it, and
    drops them when it is answered.  Undone newest first."""

    BLOCK = 512

    def __init__(self):
        self.lock = threading.Lock()
        self.on = False
        self.generations = [{}]
        self.far = self.client = None

    def start(self, on):
        with self.lock:
            self.on = on
            self.generations = [{}]
            self.far = self.client = None       # the server may be another one by now

    def connect(self, far):
        if self.far != far:
            self.far, self.client = far, nbd.Client(far)

    def blocks(self, off, n):
        return range(off // self.BLOCK, (off + n + self.BLOCK - 1) // self.BLOCK)

    def read(self, first, count):
        """{block: bytes} of the disk as it is now."""
        off = first * self.BLOCK
        data = self.client.pread(off, min(count * self.BLOCK, self.client.size - off))
        return {first + i: data[i * self.BLOCK:(i + 1) * self.BLOCK] for i in range(count)}

    def save(self, far, off, n):
        with self.lock:
            self.connect(far)
            newest = self.generations[-1]
            blocks = self.blocks(off, n)
            for b, data in self.read(blocks[0], len(blocks)).items():
                newest.setdefault(b, data)

    def durable(self, off, n):
        """A write that was durable at once: what is there now must stay."""
        with self.lock:
            blocks = self.blocks(off, n)
            for b, data in self.read(blocks[0], len(blocks)).items():
                for g in self.generations:
                    if b in g:
                        g[b] = data

    def seal(self):
        with self.lock:
            sealed = list(self.generations)
            self.generations.append({})
            return sealed

    def forget(self, sealed):
        with self.lock:
            self.generations = [g for g in self.generations if all(g is not s for s in sealed)]

    def undo(self):
        with self.lock:
            for g in reversed(self.generations):
                for b, data in g.items():
                    self.client.pwrite(b * self.BLOCK, data)
            if self.client:
                self.client.flush()
            self.generations = [{}]


# --- what is to go wrong

class Faults:
    """Set by commands, read by connections."""

    def __init__(self):
        self.lock = threading.Lock()
        self.go = threading.Event()
        self.go.set()
        self.stall_reads = False
        self.cut = None             # [unit, how many are left, mid, how many again]
        self.nonsense = None        # [kind, how many]
        self.status = None          # kinds, next first
        self.errors = []            # (off, end, errno)
        self.delay = 0.0
        self.rate = 0
        self.free = {"up": 0.0, "down": 0.0}    # when the line will be
        self.size = None
        self.blocksize = None
        self.multi_conn = self.extents = True
        self.readonly = False
        self.crash_at_flush = False

    def error_for(self, off, n):
        for start, end, number in self.errors:
            if off < end and start < off + n:
                return number
        return None

    def cut_reply(self):
        """At the start of a read reply: None, or how to cut it: 0 before it, 2 in its middle."""
        with self.lock:
            if self.cut is None or self.cut[0] != "requests":
                return None
            if self.cut[1] > 0:
                self.cut[1] -= 1
                return None
            mid = self.cut[2]
            self.rearm()
            return 2 if mid else 0

    def cut_bytes(self, n):
        """How many of the next n bytes of data pass."""
        with self.lock:
            if self.cut is None or self.cut[0] != "bytes":
                return n
            if n <= self.cut[1]:
                self.cut[1] -= n
                return n
            n = self.cut[1]
            self.rearm()
            return n

    def rearm(self):
        again = self.cut[3]
        self.cut = [self.cut[0], again, self.cut[2], again] if again is not None else None

    def take_nonsense(self, structured):
        with self.lock:
            if self.nonsense is None or (self.nonsense[0] in ("length", "chunk") and not structured):
                return None
            kind = self.nonsense[0]
            self.nonsense[1] -= 1
            if self.nonsense[1] == 0:
                self.nonsense = None
            return kind

    def take_status(self):
        with self.lock:
            if not self.status:
                return None
            self.status.append(self.status.pop(0))
            return self.status[-1]

    def wait_line(self, way, since, n):
        """Until n bytes that were ready at `since' have come out of the line."""
        due = since
        if self.rate:
            with self.lock:
                due = max(due, self.free[way]) + n / self.rate
                self.free[way] = due
        due += self.delay if way == "down" else 0
        left = due - time.monotonic()
        if left > 0:
            time.sleep(left)


# --- one connection

class Request:
    __slots__ = ("cmd", "flags", "off", "n", "at", "answer", "begun", "violation", "sealed",
                 "undoable")

    def __init__(self, flags, cmd, off, n):
        self.cmd, self.flags, self.off, self.n = cmd, flags, off, n
        self.at = time.monotonic()
        self.answer = None          # the errno that the proxy answers
        self.begun = False
        self.violation = self.undoable = False
        self.sealed = None


class Connection:
    def __init__(self, proxy, sock, number):
        self.p, self.f, self.number = proxy, proxy.faults, number
        self.client = nbd.Stream(sock)
        self.far = None
        self.far_name = proxy.far
        self.inflight = 0
        self.requests = {}          # by cookie
        self.held = []              # reads that are stalled: headers
        self.far_lock = threading.Lock()
        self.closed = self.muted = False
        self.structured = self.zeroes = False
        self.size = self.far_size = 0
        self.readonly = False
        self.blocksize = None

    # The thread of the connection.
    def run(self):
        down = None
        try:
            self.far = nbd.Stream(nbd.dial(self.far_name))
            if self.handshake():
                down = threading.Thread(target=self.guarded, args=(self.replies,), daemon=True)
                down.start()
                self.guarded(self.up)
        except (nbd.Broken, OSError):
            pass
        finally:
            if down is None or not self.muted and not self.said_goodbye:
                self.close()
            if down:
                down.join()
            self.end()

    said_goodbye = False

    def guarded(self, fn):
        try:
            fn()
        except (nbd.Broken, OSError, ValueError):
            if not self.muted or fn == self.replies:
                self.close()

    def end(self):
        self.p.numbers.answered(self, self.inflight)
        for s in (self.client, self.far):
            if s:
                s.file.close()
                s.sock.close()
        self.p.gone(self)

    def shut(self, stream):
        if stream:
            try:
                stream.sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def close(self):
        """Both threads will find out."""
        self.closed = True
        self.shut(self.client)
        self.shut(self.far)

    def gate(self):
        while not self.f.go.wait(0.05):
            if self.closed:
                raise nbd.Broken("closed while stalled")

    def to_client(self, data):
        self.gate()
        if not self.muted:
            self.client.send(data)

    # --- handshake

    def relay(self, n):
        data = self.far.read(n)
        self.to_client(data)
        return data

    def handshake(self):
        """False if the client goes away before it has an export."""
        self.f.wait_line("down", time.monotonic(), 18)
        greeting = self.relay(18)
        if greeting[:16] != nbd.GREETING + nbd.OPTION_MAGIC:
            raise nbd.Broken("not an NBD server")
        flags = self.client.read(4)
        self.zeroes = not struct.unpack(">I", flags)[0] & 2
        self.gate()
        self.far.send(flags)
        while True:
            magic, option, n = struct.unpack(">8sII", self.client.read(16))
            data = self.client.read(n)
            at = time.monotonic()
            self.gate()
            if option in self.not_offered():
                self.f.wait_line("down", at, 20)
                self.to_client(struct.pack(">QIII", nbd.OPTION_REPLY, option, nbd.REP_UNSUP, 0))
                continue
            self.far.send(struct.pack(">8sII", magic, option, n) + data)
            self.f.wait_line("down", at, 64)
            if option == nbd.OPT_EXPORT_NAME:
                return self.old_export()
            kind = self.option_replies(option)
            if option == nbd.OPT_ABORT:
                return False
            if option == nbd.OPT_STRUCTURED and kind == nbd.REP_ACK:
                self.structured = True
            if option == nbd.OPT_GO and kind == nbd.REP_ACK:
                return True

    def not_offered(self):
        if self.f.extents:
            return (nbd.OPT_STARTTLS,)
        return nbd.OPT_STARTTLS, nbd.OPT_STRUCTURED, nbd.OPT_LIST_META, nbd.OPT_SET_META

    def option_replies(self, option):
        """Pass them on up to the last one; its type."""
        while True:
            head = self.far.read(20)
            _, _, kind, n = struct.unpack(">QIII", head)
            data = self.far.read(n)
            if kind == nbd.REP_INFO:
                what, = struct.unpack(">H", data[:2])
                if what == nbd.INFO_EXPORT:
                    data = data[:2] + self.export_info(data[2:])
                elif what == nbd.INFO_BLOCK_SIZE and self.f.blocksize:
                    continue        # ours comes before the last reply
            if kind == nbd.REP_ACK and option in (nbd.OPT_INFO, nbd.OPT_GO) and self.f.blocksize:
                self.blocksize = self.f.blocksize
                info = struct.pack(">HIII", nbd.INFO_BLOCK_SIZE, *self.blocksize)
                self.to_client(struct.pack(">QIII", nbd.OPTION_REPLY, option, nbd.REP_INFO,
                                           len(info)) + info)
            self.to_client(head + data)
            if kind == nbd.REP_ACK or kind >= nbd.REP_ERROR:
                return kind

    def export_info(self, data):
        """Size and flags, as we want them to be."""
        size, flags = struct.unpack(">QH", data)
        self.far_size = size
        self.size = size if self.f.size is None else self.f.size
        if not self.f.multi_conn:
            flags &= ~nbd.FLAG_MULTI_CONN
        self.readonly = self.f.readonly
        if self.readonly:
            flags |= nbd.FLAG_READ_ONLY
        return struct.pack(">QH", self.size, flags)

    def old_export(self):
        self.to_client(self.export_info(self.far.read(10)))
        if self.zeroes:
            self.relay(124)
        return True

    # --- requests

    def up(self):
        buf = memoryview(bytearray(PIECE))
        while True:
            head = self.client.read(28)
            magic, flags, cmd, cookie, off, n = struct.unpack(">IHHQQI", head)
            if magic != nbd.REQUEST:
                raise nbd.Broken("no request")
            r = Request(flags, cmd, off, n)
            self.judge(r)
            self.p.numbers.request(self, r)
            if cmd == nbd.DISC:
                self.said_goodbye = True
                self.gate()
                self.far.send(head)
                return
            if cmd == nbd.FLUSH and self.f.crash_at_flush:
                self.f.crash_at_flush = False
                threading.Thread(target=self.p.crash, daemon=True).start()
                self.muted = True
                return
            self.requests[cookie] = r
            self.forward(r, cookie, head, buf)

    def judge(self, r):
        """Is it one that the far server is not to see?"""
        if r.cmd in (nbd.FLUSH, nbd.DISC):
            return
        if r.n == 0 or r.off + r.n > self.size:
            r.violation = True
        if self.blocksize:
            least, _, most = self.blocksize
            if r.off % least or r.n % least or (r.cmd in (nbd.READ, nbd.WRITE) and r.n > most):
                r.violation = True
                r.answer = nbd.ERRNOS["EINVAL"]
        if r.cmd in CHANGES and self.readonly:
            r.answer = nbd.ERRNOS["EPERM"]
        if r.cmd == nbd.READ and r.answer is None:
            r.answer = self.f.error_for(r.off, r.n)
        if r.answer is not None:
            self.p.numbers.add("errors")

    def forward(self, r, cookie, head, buf):
        payload = r.n if r.cmd == nbd.WRITE else 0
        if r.answer is not None:
            # It goes there as a harmless read, whose reply is replaced: so that ours keeps
            # its place among the others.
            try:
                self.pieces_up(b"", payload, buf, False)
            except nbd.Broken:
                self.requests.pop(cookie, None)
                raise
            head = struct.pack(">IHHQQI", nbd.REQUEST, 0, nbd.READ, cookie, 0,
                               min(512, self.far_size))
            payload = 0
        elif self.p.undo.on and r.cmd in CHANGES:
            self.p.undo.save(self.far_name, r.off, r.n)
            r.undoable = True
        elif self.p.undo.on and r.cmd == nbd.FLUSH:
            r.sealed = self.p.undo.seal()
        self.gate()
        with self.far_lock:
            if r.cmd == nbd.READ and self.f.stall_reads:
                self.held.append(head)
                return
            try:
                self.pieces_up(head, payload, buf, True)
            except nbd.Broken:
                self.requests.pop(cookie, None)
                raise

    def pieces_up(self, head, n, buf, send):
        if n == 0 and head:
            self.far.send(head)
            return
        while n > 0:
            k = min(n, PIECE)
            self.client.read_into(buf[:k])
            n -= k
            self.f.wait_line("up", time.monotonic(), k)
            self.gate()
            if send:
                self.far.send(head + bytes(buf[:k]))
                head = b""

    def release_reads(self):
        with self.far_lock:
            for head in self.held:
                try:
                    self.far.send(head)
                except nbd.Broken:
                    pass
            self.held = []

    # --- replies

    def replies(self):
        buf = memoryview(bytearray(64 + PIECE))
        while True:
            start = self.far.read(4)
            magic, = struct.unpack(">I", start)
            if magic == nbd.SIMPLE:
                head = start + self.far.read(12)
                error, cookie = struct.unpack(">IQ", head[4:])
                r = self.request_of(cookie, True)
                n = r.n if r.cmd == nbd.READ and error == 0 and r.answer is None else 0
                if r.answer is not None and error == 0:
                    n = min(512, self.far_size)
                self.reply(r, cookie, head, n, True, None, buf)
            elif magic == nbd.CHUNK:
                head = start + self.far.read(16)
                flags, kind, cookie, n = struct.unpack(">HHQI", head[4:])
                r = self.request_of(cookie, flags & nbd.CHUNK_DONE)
                self.reply(r, cookie, head, n, flags & nbd.CHUNK_DONE, kind, buf)
            else:
                raise nbd.Broken("no reply")

    def request_of(self, cookie, last):
        """Forgotten with the last of its replies, before that is passed on: QEMU uses a cookie
        again at once."""
        try:
            return self.requests.pop(cookie) if last else self.requests[cookie]
        except KeyError:
            raise nbd.Broken("a reply to nobody")

    def reply(self, r, cookie, head, n, last, kind, buf):
        """One reply, or one chunk of one: head was read, n bytes follow."""
        if last:
            self.before_ack(r)
        if r.answer is not None:
            self.far.read(n)
            if last:
                self.f.wait_line("down", r.at, 0)
                self.to_client(self.error_reply(r, cookie, kind is not None))
        elif kind == nbd.CHUNK_STATUS and self.f.status:
            self.bad_status(r, head, self.far.read(n))
        elif r.cmd == nbd.READ:
            self.read_reply(r, head, n, kind, buf)
        else:
            self.pass_on(r, head, n, buf)
        if last:
            self.p.numbers.answered(self)

    def before_ack(self, r):
        if r.sealed is not None:
            self.p.undo.forget(r.sealed)
        elif r.undoable and r.flags & nbd.CMD_FUA:
            self.p.undo.durable(r.off, r.n)

    def error_reply(self, r, cookie, structured):
        if not structured:
            return struct.pack(">IIQ", nbd.SIMPLE, r.answer, cookie)
        return struct.pack(">IHHQIIH", nbd.CHUNK, nbd.CHUNK_DONE, nbd.CHUNK_ERROR + 1, cookie, 6,
                           r.answer, 0)

    def pass_on(self, r, head, n, buf):
        """The head, and n bytes; in pieces, so that a slow line is slow all the time."""
        k = len(head)
        buf[:k] = head
        while True:
            part = min(n, PIECE, max(4096, self.f.rate // 20) if self.f.rate else PIECE)
            self.far.read_into(buf[k:k + part])
            self.f.wait_line("down", r.at, k + part)
            if r.cmd == nbd.READ:
                allowed = self.f.cut_bytes(part)
                self.p.numbers.add("sent-bytes", allowed)
            else:
                allowed = part
            self.to_client(buf[:k + allowed])
            if allowed < part:
                self.cut_now()
            n -= part
            k = 0
            if n == 0:
                return

    def cut_now(self):
        self.p.numbers.add("drops")
        self.p.drop()
        raise nbd.Broken("cut")

    def read_reply(self, r, head, n, kind, buf):
        cut = None if r.begun else self.f.cut_reply()
        if cut is not None:
            self.f.wait_line("down", r.at, n)
            self.to_client((head + self.far.read(n))[:cut and len(head) + n // 2])
            self.cut_now()
        has_data = n > 0 and kind in (None, nbd.CHUNK_DATA, nbd.CHUNK_HOLE)
        nonsense = self.f.take_nonsense(kind is not None) if has_data and not r.begun else None
        r.begun = True
        if nonsense is None:
            self.pass_on(r, head, n, buf)
        else:
            self.p.numbers.add("nonsense")
            self.f.wait_line("down", r.at, n)
            self.to_client(self.corrupt(nonsense, r, head, self.far.read(n), kind))

    def corrupt(self, what, r, head, data, kind):
        if what == "magic":
            return struct.pack(">I", 0x12345678) + head[4:] + data
        if what == "handle":
            return head[:8] + struct.pack(">Q", 0xfedcba9876543210) + head[16:] + data
        if what == "length":
            return head[:16] + struct.pack(">I", 0xfffffff0) + data
        if what == "chunk":
            return head + struct.pack(">Q", r.off + r.n) + data[8:]
        return self.shortened(head, data, kind)

    def shortened(self, head, data, kind):
        if kind is None:
            return head + data[:len(data) // 2]
        flags, _, cookie, n = struct.unpack(">HHQI", head[4:])
        if kind == nbd.CHUNK_HOLE:
            off, hole = struct.unpack(">QI", data)
            data = struct.pack(">QI", off, hole // 2)
        else:
            data = data[:8 + (len(data) - 8) // 2]
        return struct.pack(">IHHQI", nbd.CHUNK, flags, kind, cookie, len(data)) + data

    def bad_status(self, r, head, data):
        context, = struct.unpack(">I", data[:4])
        extents = [struct.unpack(">II", data[i:i + 8]) for i in range(4, len(data), 8)]
        what = self.f.take_status()
        self.p.numbers.add("bad-status")
        if what == "zero":
            extents = [(0, 3)]
        elif what == "past":
            extents = self.past_request(extents, r.n)
        else:
            context ^= 0x5555
        data = struct.pack(">I", context) + b"".join(struct.pack(">II", *e) for e in extents)
        self.f.wait_line("down", r.at, len(data))
        self.to_client(head[:16] + struct.pack(">I", len(data)) + data)

    @staticmethod
    def past_request(extents, n):
        """True as far as the request goes, and then a hole that nobody asked for."""
        out = []
        for length, flags in extents:
            out.append((min(length, n), flags))
            n -= min(length, n)
            if n == 0:
                break
        return out + [(1 << 30, 3)]
