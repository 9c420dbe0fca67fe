"""Results -> lines; lines -> the table and the JSON object.

A line is a dict of plain values: one piece of work, ours beside one peer, in one
metric.  Nothing here judges beyond the word in the last column.
"""

import json
import os
import platform
import statistics
import subprocess

MISSED, REACHED = "below target", "reached"


def lines_of(row, results, reason, earlier):
    """earlier: the Results of rows before this one, ours, by name."""
    return [line(row, t, results, reason, earlier) for t in row.targets]


def line(row, target, results, reason, earlier):
    by_label = {r.label: r for r in results or ()}
    ours, peer, factor = by_label.get("ours"), by_label.get(target.peer), 1
    if target.earlier:
        peer, factor = earlier.get(target.earlier), target.factor
        if ours and not peer:
            reason = "needs the row " + target.earlier
    out = {"row": row.name, "work": row.work, "metric": target.metric,
           "unit": "MiB" if target.metric == "memory" else row.unit,
           "ours": None, "peer_label": target.peer, "peer": None, "ratio": None,
           "target": target.at_least, "verdict": None, "not_measured": reason}
    if not reason:
        out["ours"] = figures(ours, target.metric)
        out["peer"] = figures(peer, target.metric, factor)
        out["ratio"] = ratio(out)
        out["verdict"] = verdict(out)
    return out


def figures(result, metric, factor=1):
    values = [v * factor for v in result.values(metric)]
    return {"median": statistics.median(values), "min": min(values), "max": max(values),
            "runs": values, "peak_mib": result.peak_mib() * factor,
            "cpu_s_per_gib": result.cpu_per_gib()}


def ratio(out):
    """How many times better ours is."""
    ours, peer = out["ours"]["median"], out["peer"]["median"]
    less_is_better = out["unit"] in ("s", "MiB")
    top, bottom = (peer, ours) if less_is_better else (ours, peer)
    return top / bottom if bottom else None


def verdict(out):
    if out["target"] is None or out["ratio"] is None:
        return None
    return REACHED if out["ratio"] >= out["target"] else MISSED


# --- the table

HEADINGS = ("work", "ours", "peer", "its figure", "ratio", "target", "", "peak MiB, ours/peer",
            "CPU s/GiB, ours/peer")


def table(lines):
    cells = [HEADINGS] + [row_of(x) for x in lines]
    widths = [max(len(c[i]) for c in cells) for i in range(len(HEADINGS))]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in cells]
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(text)


def row_of(x):
    # The memory of a row that is about time is a line of its own.
    work = x["work"] + (": memory" if x["metric"] == "memory" else "")
    target = "" if x["target"] is None else "%g" % x["target"]
    if x["not_measured"]:
        return (work, "", x["peer_label"], "", "", target,
                "not measured: " + x["not_measured"], "", "")
    return (work, figure(x["ours"], x["unit"]), x["peer_label"], figure(x["peer"], x["unit"]),
            "%.3g" % x["ratio"] if x["ratio"] else "", target, x["verdict"] or "",
            "%.0f / %.0f" % (x["ours"]["peak_mib"], x["peer"]["peak_mib"]),
            "%.2f / %.2f" % (x["ours"]["cpu_s_per_gib"], x["peer"]["cpu_s_per_gib"]))


def figure(f, unit):
    """The median, and half of how far the runs lay apart."""
    m = f["median"]
    spread = 100 * (f["max"] - f["min"]) / 2 / m if m else 0
    digits = "%.3f" if unit == "s" and m < 1 else "%.2f" if unit == "s" else "%.0f"
    runs = len(f["runs"])
    return digits % m + unit.join((" ", "")).replace(" /", "/") + " ±%.0f%%" % spread + \
        (" (%d run%s)" % (runs, "s" if runs > 1 else "") if runs < 5 else "")


# --- the object

def first_line(*command):
    try:
        r = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True, check=False)
        return r.stdout.split("\n")[0].strip()
    except OSError:
        return None


def machine():
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {"cpus": len(os.sched_getaffinity(0)), "memory_mib": pages * page >> 20,
            "kernel": platform.release(), "load": os.getloadavg()[0],
            "versions": [first_line(p, "--version")
                         for p in ("qemu-img", "nbdkit", "fio", "nbdcopy")]}


def legend(m):
    return "%d CPUs, %d MiB, Linux %s, load %.2f before; %s." % (
        m["cpus"], m["memory_mib"], m["kernel"], m["load"], ", ".join(map(str, m["versions"])))


def write_json(path, bench, about, lines):
    """Whole or not at all."""
    whole = {"scale": bench.scale.name, "runs": bench.runs, "seconds": bench.scale.seconds,
             "machine": about, "rows": lines}
    with open(path + ".part", "w") as f:
        json.dump(whole, f, indent=1)
        f.write("\n")
    os.replace(path + ".part", path)
