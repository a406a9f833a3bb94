"""Write the measurements of tools/analysis/benchmark_ssim.py as Markdown and JSON."""

import json
import statistics

from msad_kd.checkpoint.files import write_json
from msad_kd.utils.errors import InputError


def summary(rows):
    """Return the gain over the fastest peer and in memory by device, dtype and padding."""
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
    """Return the report as Markdown."""
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


def place(row):
    """Return a row's place in the sorted tables; a later row of one place replaces the earlier."""
    height_width = tuple(map(int, row["shape"].split("x")))
    keys = row.get("device", ""), row.get("dtype", ""), *height_width
    return *keys, row["padding"], row.get("peer", ""), row["maps"]


def write(path, content, add=False):
    """Write the report and, beside it, the numbers, and return the report.

    Args:
        path: the Markdown file; the JSON file has the same name.
        content: a dict of the machine and the rows.
        add: whether to keep the file's rows that were not measured again.

    Raises:
        InputError: if the file's rows were measured on another machine.
    """
    data = path.with_suffix(".json")
    old = json.loads(data.read_text()) if add and data.exists() else {**content, "rows": []}
    if old["machine"] != content["machine"]:
        raise InputError(f"'{data}' was measured elsewhere: {old['machine']}")
    for key in ("rows", "blurs"):
        by_place = {place(row): row for row in [*old[key], *content[key]]}
        content[key] = [row for _, row in sorted(by_place.items(), key=lambda item: item[0])]
    content["summary"] = summary(content["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(data, content, indent=1)
    path.with_suffix(".md").write_text(markdown(content))
    return markdown(content)
