"""What a server is made to do: functions of its URI that return (figure, bytes moved)."""

import json
import os
import time

import processes
from scale import KIB, MIB


def fio(log, rw, block=4 * KIB, connections=1, **options):
    """Operations a second where they are random, else MiB a second.  The depth is 16, of
    each connection.  options are fio's; time_based ones end after `runtime'.
    """
    settings = {"rw": rw, "bs": block, "numjobs": connections, "iodepth": 16, **options}
    if "io_size" not in settings and "runtime" in settings:
        settings["time_based"] = 1

    def load(uri):
        out = log + ".json"
        processes.run(["fio", "--name=load", "--ioengine=nbd", "--uri=" + uri, "--group_reporting",
                       "--norandommap", "--output=" + out, "--output-format=json"] +
                      ["--%s=%s" % (k, v) for k, v in settings.items()], log)
        done = fio_result(out)["write" if "write" in rw else "read"]
        figure = done["iops"] if "rand" in rw else done["bw_bytes"] / MIB
        return figure, done["io_bytes"]
    return load


def fio_result(path):
    with open(path) as f:
        text = f.read()
    try:
        # Its engine says something in front of the object.
        job = json.loads(text[text.index("\n{") + 1:] if text[0] != "{" else text)["jobs"][0]
    except (ValueError, LookupError) as e:
        raise processes.Failed("fio says what cannot be understood: " + text[:200]) from e
    if job["error"]:
        raise processes.Failed("fio: " + os.strerror(job["error"]))
    return job


def copy_out(log, size, seconds):
    """nbdcopy of the whole disk into nothing, over and over for so long: MiB a second."""
    def load(uri):
        begun, copies = time.monotonic(), 0
        while copies == 0 or time.monotonic() - begun < seconds:
            processes.run(["nbdcopy", uri, "null:"], log)
            copies += 1
        return copies * size / MIB / (time.monotonic() - begun), copies * size
    return load
