"""Pictures of one run, drawn from its metrics.jsonl, and what pictures of several share."""

import math
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from switchlora.runlog import read_events
from switchlora.surgery import family

Event = dict[str, Any]
FULL_SHADE, ADAPTER_SHADE = "#dfe7f1", "#f6e6d3"
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#555555"
RUN_COLORS = ("#0072b2", "#d55e00", "#000000", "#cc79a7", "#009e73", "#e69f00", "#56b4e9")
"""of Okabe and Ito, who see red and green alike"""
RUN_DASHES = ("-", "--", "-.", (0, (1, 1.2)))
RUN_MARKERS = ("o", "s", "^", "D", "v")
STATISTICS = {
    "update_norms": ("relative_update_norm", "relative update norm, %", 100.0),
    "stable_ranks": ("update_stable_rank", "stable rank of the update", 1.0),
    "weight_stable_ranks": ("weight_stable_rank", "stable rank of the weight", 1.0),
}
"""by picture: key of the events, label, and what its values are multiplied with"""


def draw_figures(folder: Path) -> list[Path]:
    """Draw what the run in ``folder`` measured into ``folder/figures``; return the files."""
    events = list(read_events(folder))
    pictures = layer_figures(events)
    if any(e["event"] in ("train", "eval") for e in events):
        pictures["training"] = training_curves(events)
    return [_save(figure, folder / "figures" / f"{name}.png") for name, figure in pictures.items()]


def layer_figures(events: Sequence[Event]) -> dict[str, Figure]:
    """Pictures, by name, of what the monitor measured in each layer; none where nothing was."""
    measured = [e for e in events if e["event"] == "measure"]
    if not measured:
        return {}
    switch = switch_update(events)
    pictures = {
        name: small_multiples(measured, key, label, switch, unit)
        for name, (key, label, unit) in STATISTICS.items()
    }
    return pictures | {"update_norm_map": heat_map(measured, "relative_update_norm", switch)}


def small_multiples(
    measured: Sequence[Event], key: str, label: str, switch: int | None, unit: float = 1.0
) -> Figure:
    """One panel per family with a line per layer, dark for the first block, light for the last."""
    names = targets_of(measured[0], key)
    families = list(dict.fromkeys(family(name) for name in names))
    figure, axes = family_panels(families)
    updates = [e["num_updates"] for e in measured]
    for name, axis in zip(families, axes.flat, strict=False):
        members = [n for n in names if family(n) == name]
        for place, member in enumerate(members):
            color = colormaps["viridis"](0.9 * place / max(len(members) - 1, 1))
            values = [unit * number(e.get(f"{key}/{member}")) for e in measured]
            axis.plot(updates, values, color=color, linewidth=1.4)
        _mark_switch(axis, switch)
    _label_blocks(figure, axes, len(names) // len(families))
    figure.supylabel(label, fontsize=10)
    figure.supxlabel("optimizer updates", fontsize=10)
    return figure


def family_panels(families: Sequence[str]) -> tuple[Figure, np.ndarray]:
    """A figure with one titled panel per family, in two columns on common axes."""
    columns = min(len(families), 2)
    rows = math.ceil(len(families) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis, name in zip(axes.flat, families, strict=False):
        axis.set_title(name, fontsize=10)
        tidy(axis)
    for axis in list(axes.flat)[len(families) :]:
        axis.set_visible(False)
    return figure, axes


def run_styles(count: int) -> list[dict[str, Any]]:
    """Colour, dashes and marker of each of ``count`` runs: no two share all, also in grey."""
    kinds = zip(cycle(RUN_COLORS), cycle(RUN_DASHES), cycle(RUN_MARKERS), strict=False)
    return [
        {"color": color, "linestyle": dashes, "marker": marker}
        for color, dashes, marker in islice(kinds, count)
    ]


def run_labels(folders: Sequence[Path]) -> list[str]:
    """Names of run folders, with as much of the path before them as tells all apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def heat_map(measured: Sequence[Event], key: str, switch: int | None) -> Figure:
    """Layers by time: the relative update norm of every target."""
    names = sorted(targets_of(measured[0], key), key=lambda n: (family(n), _depth(n)))
    values = np.array([[100 * number(e.get(f"{key}/{n}")) for e in measured] for n in names])
    figure = Figure(figsize=(7.2, 1.2 + 0.16 * len(names)), layout="constrained")
    axis = figure.subplots()
    updates = [e["num_updates"] for e in measured]
    edges = [0, *updates] if len(updates) == 1 else [2 * updates[0] - updates[1], *updates]
    mesh = axis.pcolormesh(
        edges, np.arange(len(names) + 1), values, vmin=0, cmap="viridis", rasterized=True
    )
    axis.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=6)
    axis.invert_yaxis()
    axis.set_xlabel("optimizer updates")
    if switch is not None:
        axis.set_title(f"until the switch at update {switch:,}", fontsize=10)
    figure.colorbar(mesh, label="relative update norm, %")
    return figure


def training_curves(events: Sequence[Event]) -> Figure:
    """Train and validation loss, and top1, with the full and the adapter phase shaded."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    loss, top1 = figure.subplots(1, 2)
    switch, last = switch_update(events), max(e["num_updates"] for e in events)
    series = _series(events)
    loss.plot(*series("train", "train/loss"), color=GREY, linewidth=0.6, label="train")
    loss.plot(*series("eval", "val/loss"), "o-", color=BLUE, markersize=3, label="validation")
    top1.plot(*series("eval", "val/top1"), "o-", color=BLUE, markersize=3, label="validation")
    updates, averaged = series("eval", "val/ema_top1")
    if updates:
        top1.plot(updates, averaged, "o-", color=ORANGE, markersize=3, label="validation, EMA")
    for axis, name in ((loss, "loss"), (top1, "top1, %")):
        _shade(axis, switch, last)
        axis.set_xlabel("optimizer updates")
        axis.set_title(name, fontsize=10)
        axis.legend(fontsize=8, framealpha=1, edgecolor="none")
        tidy(axis)
    return figure


def _series(events: Sequence[Event]) -> Callable[[str, str], tuple[list[int], list[float]]]:
    def points(event: str, key: str) -> tuple[list[int], list[float]]:
        found = [(e["num_updates"], e[key]) for e in events if e["event"] == event and key in e]
        return [n for n, _ in found], [number(value) for _, value in found]

    return points


def targets_of(event: Event, key: str) -> list[str]:
    """Targets of which an event holds the statistic ``key``."""
    return [name.removeprefix(f"{key}/") for name in event if name.startswith(f"{key}/")]


def switch_update(events: Sequence[Event]) -> int | None:
    """Update at which a run switched."""
    return next((e["num_updates"] for e in events if e["event"] == "switch"), None)


def _mark_switch(axis: Axes, switch: int | None) -> None:
    if switch is not None:
        axis.axvline(switch, color=ORANGE, linestyle="--", linewidth=1.2)
        axis.annotate(
            "switch",
            (switch, 1),
            xytext=(-3, -2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8,
            color=ORANGE,
        )


def _shade(axis: Axes, switch: int | None, last: int) -> None:
    axis.axvspan(0, last if switch is None else switch, color=FULL_SHADE, label="full phase")
    if switch is not None:
        axis.axvspan(switch, last, color=ADAPTER_SHADE, label="adapter phase")
    axis.set_xlim(0, last)


def _label_blocks(figure: Figure, axes: np.ndarray, layers: int) -> None:
    if layers > 1:
        scale = Normalize(0, (layers - 1) / 0.9)
        bar = ScalarMappable(norm=scale, cmap="viridis")
        shown = figure.colorbar(bar, ax=axes, shrink=0.6, ticks=[0, layers - 1])
        shown.ax.set_ylim(0, layers - 1)
        shown.set_label("block")


def _depth(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdigit()]


def number(value: float | None) -> float:
    """NaN for what JSON has no number for."""
    return math.nan if value is None else value


def tidy(axis: Axes) -> None:
    """No frame on top and right, small tick labels."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
