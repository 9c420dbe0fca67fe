"""As much of the NBD protocol as it takes to read once, with nothing that takes time of its own."""

import socket
import struct

READ, DISCONNECT = 0, 2
IHAVEOPT, GO, ACK = 0x49484156454F5054, 7, 1


class Refused(Exception):
    """Somebody listens, and does not do what was asked."""


def receive(s, n):
    data = b""
    while len(data) < n:
        more = s.recv(n - len(data))
        if not more:
            raise Refused("the server hung up")
        data += more
    return data


def choose_default_export(s):
    """Fixed newstyle negotiation."""
    receive(s, 18)
    name = struct.pack(">IH", 0, 0)
    s.sendall(struct.pack(">IQII", 3, IHAVEOPT, GO, len(name)) + name)
    kind = None
    while kind != ACK:
        kind, length = struct.unpack(">12xII", receive(s, 20))
        receive(s, length)
        if kind >> 31:
            raise Refused("the server refuses its export")


def request(kind, length):
    return struct.pack(">IHHQQI", 0x25609513, 0, kind, 0, 0, length)


def first_bytes(path, length=4096):
    """Connect to the socket and read the first bytes of the default export.  OSError if
    nobody listens there (yet).
    """
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(path)
        choose_default_export(s)
        s.sendall(request(READ, length))
        error = struct.unpack(">4xI8x", receive(s, 16))[0]
        if error:
            raise Refused("the first read failed: error %d" % error)
        data = receive(s, length)
        s.sendall(request(DISCONNECT, 0))
        return data
