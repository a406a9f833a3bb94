"""The pictures of a study: differences to a control, AP by iterations, AP against cost."""

from adjustText import adjust_text
from matplotlib.figure import Figure

REACH = 3.0  # AP: where the axis of differences ends
NEAR = 12.0  # AP: models further below the best are drawn at the lower edge


def _figure(title, panels, height, extra=1.5):
    figure = Figure(figsize=(extra + 4 * panels, height), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def draw_differences(title, control, gains):
    """Draw rows' differences to the control: a bar for the mean, a dot per seed.

    `gains` has, by "box" and the like and by the row's title, a series of differences in AP.
    """
    rows = list(next(iter(gains.values())))
    figure, axes = _figure(title, len(gains), 1.4 + 0.3 * len(rows), extra=5)
    note = f"AP less that of '{control}' (dots: seeds; hatched: beyond the axis)"
    figure.supxlabel(note, fontsize="medium")
    for axis, (kind, series) in zip(axes, gains.items()):
        for place, values in enumerate(series.values()):
            if len(values):
                mean = values.mean()
                near, colour = (
                    min(max(mean, -REACH), REACH),
                    "tab:green" if mean > 0 else "tab:gray",
                )
                axis.barh(place, near, color=colour, alpha=0.6, hatch="//" if near != mean else "")
                axis.plot(values, [place] * len(values), "k.", ms=4)
                text = f"{mean:+.1f}" + (f" ± {values.std():.1f}" if len(values) > 1 else "")
                axis.text(1.75 * REACH, place, text, ha="right", va="center", fontsize="small")
        axis.axvline(0, color="black", lw=1)
        axis.set_yticks(range(len(rows)), rows if axis is axes[0] else [""] * len(rows))
        axis.set_xticks(range(-int(REACH), int(REACH) + 1))
        axis.set_xlim(-REACH, 1.8 * REACH)
        axis.set_title(f"{kind} AP", fontsize="medium")
        axis.invert_yaxis()
    return figure


def draw_curves(title, panels):
    """Draw AP against iterations: each point is a training of that length, with its own schedule.

    A panel is (name of the AP, label to {iterations: AP by seed}, label to the AP of a level).
    """
    figure, axes = _figure(title, len(panels), 4.2)
    for axis, (name, lines, levels) in zip(axes, panels):
        lengths = sorted({length for points in lines.values() for length in points})
        for label, points in lines.items():
            aps = [points[length] for length in sorted(points)]
            axis.plot(sorted(points), [ap.mean() for ap in aps], marker="o", label=label)
            low, high = [ap.min() for ap in aps], [ap.max() for ap in aps]
            axis.fill_between(sorted(points), low, high, alpha=0.2)
        for (label, level), style in zip(levels.items(), ("--", ":", "-.")):
            axis.axhline(level, ls=style, color="gray", label=label)
        axis.set_xscale("log")
        axis.set_xticks(lengths, [f"{length:,.0f}" for length in lengths])
        axis.minorticks_off()
        axis.set_xlabel("iterations (shade: smallest to largest seed)")
        axis.set_ylabel(name)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, fontsize="small")
    return figure


def draw_ap_cost(lines, kinds, detections):
    """Draw AP against GMACs; models far below the best are drawn at the lower edge, as stated.

    `lines` has title, gmacs and results of each model, `kinds` their kinds, as "bbox", and names.
    """
    title = f"AP against cost, at {detections} detections in every model"
    figure, axes = _figure(title, len(kinds), 4.5)
    figure.draw_without_rendering()
    for axis, (kind, name) in zip(axes, kinds.items()):
        aps = [line[kind]["AP"] for line in lines]
        floor = min(ap for ap in aps if ap > max(aps) - NEAR) - 3
        axis.set_ylim(floor, max(aps) + 1.5)
        axis.set_xlim(0, 1.25 * max(line["gmacs"] for line in lines))
        labels = []
        for line, ap in zip(lines, aps):
            place, below = max(ap, floor + 0.4), ap < floor
            axis.plot(line["gmacs"], place, "v" if below else "o", ms=8)
            text = f"{line['title']}: {ap:.1f}" + " (far below)" * below
            labels.append(axis.text(line["gmacs"], place, text, fontsize="small"))
        adjust_text(labels, ax=axis, expand=(1.2, 2), arrowprops={"arrowstyle": "-", "alpha": 0.5})
        axis.set_xlabel("GMACs per image")
        axis.set_ylabel(f"{name} AP (the axis starts at {floor:.0f})")
        axis.grid(color="#dddddd", lw=0.6)
    return figure
