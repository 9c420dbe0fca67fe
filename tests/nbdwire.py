#!/usr/bin/env python3
"""NBD on the wire, in as much as the tests need it; and a small client.

As a program it does things one after another on one connection:

    nbdwire.py [-t SECONDS] URI-OR-SOCKET COMMAND...

    'read OFF LEN [FILE]'     compares with the same range of FILE, if there is one
    'write OFF LEN BYTE'      'zero OFF LEN'      'trim OFF LEN'      'flush'
    'scan STEP FILE [SMALL]'  reads it all and compares; where a read fails, again in
                              SMALL pieces.  Prints a line `failed OFF LEN' for each run
                              of them.
    'sh COMMAND'              between the others: a shell command

Each prints one line: `ok', `error NAME' (an errno), `DIFFERENT' or `ok right=N failed=N
wrong=N' (bytes).  The exit status is 0 unless bytes were wrong or the connection broke.
Numbers may be hexadecimal.  Shares no code with the plugin.
"""

import errno
import socket
import struct
import subprocess
import sys
import urllib.parse

GREETING = b"NBDMAGIC"
OPTION_MAGIC = b"IHAVEOPT"
OPTION_REPLY = 0x3e889045565a9
REQUEST = 0x25609513
SIMPLE = 0x67446698
CHUNK = 0x668e33ef

OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_STARTTLS = 1, 2, 3, 5
OPT_INFO, OPT_GO, OPT_STRUCTURED, OPT_LIST_META, OPT_SET_META = 6, 7, 8, 9, 10
REP_ACK, REP_SERVER, REP_INFO, REP_META = 1, 2, 3, 4
REP_ERROR = 1 << 31
REP_UNSUP = REP_ERROR + 1
INFO_EXPORT, INFO_BLOCK_SIZE = 0, 3

FLAG_READ_ONLY, FLAG_MULTI_CONN = 2, 256
CMDS = ["read", "write", "disc", "flush", "trim", "cache", "zero", "status"]
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZERO, STATUS = range(8)
CMD_FUA = 1

CHUNK_DONE = 1
CHUNK_NONE, CHUNK_DATA, CHUNK_HOLE, CHUNK_STATUS = 0, 1, 2, 5
CHUNK_ERROR = 1 << 15

# The errors that NBD knows; their numbers are those of Linux.
ERRNOS = {n: getattr(errno, n) for n in
          ("EPERM", "EIO", "ENOMEM", "EINVAL", "ENOSPC", "EOVERFLOW", "ENOTSUP", "ESHUTDOWN")}


class Broken(Exception):
    """The other side went away in the midst of something."""


class Stream:
    """A socket read in exact pieces."""

    def __init__(self, sock):
        self.sock = sock
        self.file = sock.makefile("rb", 1 << 18)

    def read(self, n):
        try:
            data = self.file.read(n)
        except (OSError, ValueError) as e:
            raise Broken(str(e))
        if len(data) < n:
            raise Broken("end of stream")
        return data

    def read_into(self, view):
        done = 0
        while done < len(view):
            try:
                n = self.file.readinto(view[done:])
            except (OSError, ValueError) as e:
                raise Broken(str(e))
            if not n:
                raise Broken("end of stream")
            done += n

    def send(self, data):
        try:
            self.sock.sendall(data)
        except OSError as e:
            raise Broken(str(e))


def dial(where, timeout=None):
    """Connect to HOST:PORT, or else to a Unix socket."""
    if "/" not in where and ":" in where:
        host, port = where.rsplit(":", 1)
        return socket.create_connection((host, int(port)), timeout)
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(timeout)
    s.connect(where)
    return s


class NBDError(Exception):
    """The server's answer is an error."""

    def __init__(self, number):
        super().__init__(errno.errorcode.get(number, str(number)))


class Client:
    """One request at a time, simple replies only."""

    def __init__(self, where, export="", timeout=60):
        self.s = Stream(dial(where, timeout))
        self.cookie = 0
        self.size = self.flags = None
        self.handshake(export.encode())

    def handshake(self, export):
        if self.s.read(16) != GREETING + OPTION_MAGIC:
            raise Broken("no NBD server of the newstyle")
        flags, = struct.unpack(">H", self.s.read(2))
        self.s.send(struct.pack(">I", flags & 3))
        data = struct.pack(">I", len(export)) + export + bytes(2)
        self.s.send(OPTION_MAGIC + struct.pack(">II", OPT_GO, len(data)) + data)
        while True:
            magic, _, kind, n = struct.unpack(">QIII", self.s.read(20))
            data = self.s.read(n)
            if magic != OPTION_REPLY or kind >= REP_ERROR:
                raise Broken("refused: %s" % data.decode(errors="replace"))
            if kind == REP_ACK:
                return
            if kind == REP_INFO and data[:2] == struct.pack(">H", INFO_EXPORT):
                self.size, self.flags = struct.unpack(">QH", data[2:12])

    def request(self, cmd, off=0, n=0, data=b"", flags=0):
        self.cookie += 1
        self.s.send(struct.pack(">IHHQQI", REQUEST, flags, cmd, self.cookie, off, n) + data)
        if cmd == DISC:
            return None
        magic, error, cookie = struct.unpack(">IIQ", self.s.read(16))
        if magic != SIMPLE or cookie != self.cookie:
            raise Broken("a reply that is none")
        if error:
            raise NBDError(error)
        return self.s.read(n) if cmd == READ else None

    def pread(self, off, n):
        return self.request(READ, off, n)

    def pwrite(self, off, data, flags=0):
        self.request(WRITE, off, len(data), data, flags)

    def flush(self):
        self.request(FLUSH)

    def close(self):
        try:
            self.request(DISC)
        except Broken:
            pass
        self.s.file.close()
        self.s.sock.close()


def parse_uri(uri):
    """Where to dial, and the export's name."""
    if "://" not in uri:
        return uri, ""
    u = urllib.parse.urlsplit(uri)
    export = urllib.parse.unquote(u.path[1:])
    if u.scheme == "nbd+unix":
        return urllib.parse.parse_qs(u.query)["socket"][0], export
    return "%s:%d" % (u.hostname, u.port or 10809), export


# --- the program

class Wrong(Exception):
    """Bytes that are not what they must be."""


def file_bytes(path, off, n):
    with open(path, "rb") as f:
        f.seek(off)
        return f.read(n)


def do_read(c, off, n, path=None):
    data = c.pread(int(off, 0), int(n, 0))
    if path and data != file_bytes(path, int(off, 0), len(data)):
        raise Wrong()


def pieces(off, end, step):
    while off < end:
        yield off, min(step, end - off)
        off += step


class Scan:
    """Counts, and the runs of what failed."""

    def __init__(self, c, path):
        self.c, self.path = c, path
        self.right = self.failed = self.wrong = 0
        self.runs = []

    def add_failed(self, off, n):
        self.failed += n
        if self.runs and sum(self.runs[-1]) == off:
            self.runs[-1][1] += n
        else:
            self.runs.append([off, n])

    def piece(self, off, n, small):
        try:
            data = self.c.pread(off, n)
        except NBDError:
            if small < n:
                for o, k in pieces(off, off + n, small):
                    self.piece(o, k, k)
            else:
                self.add_failed(off, n)
            return
        if data == file_bytes(self.path, off, n):
            self.right += n
        else:
            self.wrong += n


def do_scan(c, step, path, small=None):
    scan = Scan(c, path)
    for off, n in pieces(0, c.size, int(step, 0)):
        scan.piece(off, n, int(small or step, 0))
    for run in scan.runs:
        print("failed %d %d" % tuple(run))
    if scan.wrong:
        raise Wrong("right=%d failed=%d wrong=%d" % (scan.right, scan.failed, scan.wrong))
    return "right=%d failed=%d wrong=0" % (scan.right, scan.failed)


def do_sh(_, *words):
    subprocess.run(" ".join(words), shell=True, check=True)


DO = {
    "read": do_read,
    "scan": do_scan,
    "sh": do_sh,
    "write": lambda c, off, n, byte: c.pwrite(int(off, 0), bytes([int(byte, 0)]) * int(n, 0)),
    "zero": lambda c, off, n: c.request(ZERO, int(off, 0), int(n, 0)),
    "trim": lambda c, off, n: c.request(TRIM, int(off, 0), int(n, 0)),
    "flush": lambda c: c.flush(),
}


def do(c, command):
    """One command; False if bytes were wrong."""
    name, *args = command.split()
    try:
        result = DO[name](c, *args)
    except NBDError as e:
        result = "error %s" % e
    except Wrong as e:
        print(("DIFFERENT %s" % e).rstrip(), flush=True)
        return False
    else:
        result = "ok" if result is None else "ok " + result
    if name != "sh":
        print(result, flush=True)
    return True


def main(args):
    timeout = 60.0
    if args[0] == "-t":
        timeout = float(args[1])
        args = args[2:]
    where, export = parse_uri(args[0])
    try:
        c = Client(where, export, timeout)
        good = all([do(c, command) for command in args[1:]])
        c.close()
    except (Broken, OSError, subprocess.CalledProcessError) as e:
        print("broken: %s" % e, flush=True)
        sys.exit(1)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1:])
