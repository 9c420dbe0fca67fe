"""The NBD servers: ours, and those it is compared with.

Each is a command that listens on a Unix socket.  They get what the others get: the
same number of threads and clients, the page cache, no read-only shortcuts.
"""

import os
import time

import nbd
import processes

CLIENTS = "32"          # qemu-nbd serves one client unless told


class Server:
    """A server that runs until stop."""

    def __init__(self, folder, name, command):
        self.sock = os.path.join(folder, name + ".sock")
        self.log = os.path.join(folder, name + ".log")
        self.uri = "nbd+unix:///?socket=" + self.sock
        if os.path.exists(self.sock):
            os.unlink(self.sock)
        with open(self.log, "wb") as f:
            self.process = processes.start(command(self.sock), stdout=f, stderr=f)
        self.wait_until_it_serves()

    def wait_until_it_serves(self):
        """That is, until the first bytes have been read from it."""
        end = time.monotonic() + processes.PATIENCE
        while True:
            try:
                return nbd.first_bytes(self.sock)
            except OSError as e:
                why = e
            except nbd.Refused as e:
                why, end = e, 0
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise processes.Failed("%s does not serve: %s: %s" % (
                    self.process.args[0], why, processes.tail(self.log)))
            time.sleep(0.001)

    def cpu_seconds(self):
        return processes.cpu_seconds(self.process.pid)

    def peak_kib(self):
        return processes.peak_kib(self.process.pid)

    def last_words(self):
        """If it has ended, which it should not."""
        code = self.process.poll()
        return "" if code is None else \
            "; the server ended with %d: %s" % (code, processes.tail(self.log))

    def stop(self, scrap=False):
        processes.stop(self.process, scrap)


# What follows makes commands: a function of the socket's path.

def nbdkit(*args):
    return lambda sock: ["nbdkit", "-f", "--exit-with-parent", "-U", sock, *args]


def plugin_path():
    return os.environ["PLUGIN"]


def ours(image, *parameters):
    return nbdkit(plugin_path(), "file=" + image, *parameters)


def ours_far(uri):
    return nbdkit(plugin_path(), "uri=" + uri)


def qemu_far(sock):
    """The image that another server serves at sock."""
    far = "driver=qcow2,file.driver=nbd,file.server.type=unix,file.server.path=" + sock
    return lambda own: ["qemu-nbd", "-t", "-r", "-e", CLIENTS, "-k", own, "--image-opts", far]


def raw_file(path):
    """The limit: the same server and protocol, and no format at all."""
    return nbdkit("file", path)


def slow_file(path, milliseconds):
    """A file far away: each read takes so long."""
    return nbdkit("--filter=delay", "file", path, "rdelay=%dms" % milliseconds)


def qemu(image, *options):
    """options in place of the format: the image's whole description."""
    what = ["--image-opts", ",".join(options) + ",file.filename=" + image] if options \
        else ["-f", "qcow2", image]
    return lambda sock: ["qemu-nbd", "-t", "-e", CLIENTS, "--cache=writeback", "-k", sock, *what]
