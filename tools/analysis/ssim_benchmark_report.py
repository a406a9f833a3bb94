"""What tools/analysis/benchmark_ssim.py has measured, as Markdown and JSON."""

import json
import statistics

from msad_kd.checkpoint.files import write_json
from msad_kd.utils.errors import InputError


def summary(rows):
    """Per device, dtype and padding: what ours gains over the fastest peer, and in memory."""
    groups = {}
    for row in rows:
        if "ratio" in row:
            groups.setdefault((row["device"], row["dtype"], row["padding"]), []).append(row)
    result = []
    for key, group in sorted(groups.items()):
        fastest = {}
        for row in group:
            place = row["shape"], row["maps"]
            fastest[place] = min(fastest.get(place, row["ratio"][0]), row["ratio"][0])
        least = min(fastest, key=fastest.get)
        result.append(
            {
                **dict(zip(("device", "dtype", "padding"), key)),
                "least": fastest[least],
                "least_shape": least[0],
                "geometric_mean": statistics.geometric_mean(fastest.values()),
                "least_memory": min(row["peer_kept"] / row["ours_kept"] for row in group),
            }
        )
    return result


def markdown(content):
    """The report on what was measured, as Markdown."""
    facts = ", ".join(f"{key} {value}" for key, value in content["machine"].items())
    lines = [
        "# SSIM: forward and backward against four other implementations",
        "",
        f"Machine: {facts}.",
        "",
        "Time of the fastest peer of the same padding over ours, and the least memory of a peer "
        "over ours:",
        "",
        "| device | dtype | padding | least, at | geometric mean | memory |",
        "|---|---|---|---|---|---|",
    ]
    for row in summary(content["rows"]):
        lines.append(
            "| {device} | {dtype} | {padding} | {least:.2f}x, {least_shape} | "
            "{geometric_mean:.2f}x | {least_memory:.1f}x |".format(**row)
        )
    if not any(row["device"] == "cuda" for row in content["rows"]):
        lines.append("| cuda | | | not measured | not measured | not measured |")
    lines += [
        "",
        "Forward and backward, median of the rounds; ratio peer / ours with quartiles; memory kept "
        "in units of one fp32 input:",
        "",
        "| device | dtype | maps | padding | peer | ours ms | peer ms | ratio | ours kept | kept |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        start = "| {device} | {dtype} | {maps} x {shape} | {padding} | {peer} | ".format(**row)
        if "cannot" in row:
            lines.append(f"{start}| cannot | | | |")
            continue
        middle, low, high = row["ratio"]
        lines.append(
            f"{start}{row['ours_ms'][0]:.2f} | {row['peer_ms'][0]:.2f} | "
            f"{middle:.2f} ({low:.2f} to {high:.2f}) | {row['ours_kept']:.2f} | "
            f"{row['peer_kept']:.1f} |"
        )
    if content["blurs"]:
        lines += [
            "",
            "Ours with either blur on a CPU, fp32:",
            "",
            "| maps | padding | matrix ms | conv ms | conv / matrix |",
            "|---|---|---|---|---|",
        ]
    for row in content["blurs"]:
        middle, low, high = row["conv_over_matrix"]
        lines.append(
            "| {maps} x {shape} | {padding} | {matrix_ms:.2f} | {conv_ms:.2f} | ".format(**row)
            + f"{middle:.2f} ({low:.2f} to {high:.2f}) |"
        )
    return "\n".join(lines) + "\n"


def same_place(row, other):
    """Whether two rows are of one cell of the tables, so that the later replaces the other."""
    keys = ("device", "dtype", "maps", "shape", "padding", "peer")
    return all(row.get(key) == other.get(key) for key in keys)


def merged(old, new):
    """The old rows, those that were measured again replaced."""
    return [row for row in old if not any(same_place(row, other) for other in new)] + new


def size(row):
    """Height and width of a row's maps."""
    return tuple(map(int, row["shape"].split("x")))


def write(path, content, add=False):
    """Write the report and, beside it, the numbers.

    Args:
        path: of the Markdown; the JSON has the same name.
        content: dict of the machine and the rows.
        add: keep the rows that are there and were not measured again.

    Returns:
        the Markdown.

    Raises:
        InputError: those that are there were measured on another machine.
    """
    data = path.with_suffix(".json")
    if add and data.exists():
        old = json.loads(data.read_text())
        if old["machine"] != content["machine"]:
            raise InputError(f"'{data}' was measured elsewhere: {old['machine']}")
        for key in ("rows", "blurs"):
            content[key] = merged(old[key], content[key])
    for key in ("rows", "blurs"):
        content[key].sort(
            key=lambda row: (
                *(row.get("device", ""), row.get("dtype", ""), *size(row)),
                *(row["padding"], row.get("peer", "")),
            )
        )
    content["summary"] = summary(content["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(data, content, indent=1)
    path.with_suffix(".md").write_text(markdown(content))
    return markdown(content)
