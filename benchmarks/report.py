"""The form in which benchmarks report: rows, as a table, as JSON, as a plot."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bytekernels.files import write_whole

PASSES = ("forward", "backward", "both")


@dataclass
class Report:
    """What a run came to: the machine, a row for each op, pass and provider timed, and what was not timed, with why."""

    machine: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)


def table(report: Report) -> str:
    """The rows as aligned text, and below them what was refused or skipped."""
    eager = {(row["op"], row["pass"]): row["median_ms"] for row in report.rows if row["provider"] == "eager"}
    cells = [
        ["op", "pass", "provider", "median ms", "p20 - p80", "GB/s", "of copy", "of roofline", "speed-up", "peak MiB"]
    ]
    for row in report.rows:
        before = eager.get((row["op"], row["pass"]))
        cells.append(
            [
                row["op"],
                row["pass"],
                row["provider"],
                f"{row['median_ms']:.3f}",
                f"{row['p20_ms']:.3f} - {row['p80_ms']:.3f}",
                f"{row['gb_per_s']:.1f}",
                f"{row['copy_fraction']:.1%}",
                f"{row['roofline_fraction']:.1%}",
                "" if before is None else f"{before / row['median_ms']:.2f}x",
                "" if row["peak_mib"] is None else f"{row['peak_mib']:.1f}",
            ]
        )
    lines = aligned(cells, left=3)
    lines += [f"refused  {r['op']} by {r['provider']}: {r['reason']}" for r in report.refused]
    lines += [f"skipped  {s['provider']}: {s['reason']}" for s in report.skipped]
    return "\n".join(lines)


def advantages(report: Report) -> str:
    """How many times as fast as each other provider ours is."""
    medians = {(row["op"], row["pass"], row["provider"]): row["median_ms"] for row in report.rows}
    others = list(dict.fromkeys(name for _, _, name in medians if name != "bytekernels"))
    cells = [["op", "pass", *(f"over {name}" for name in others)]]
    for op, which, provider in medians:
        if provider == "bytekernels":
            ours = medians[op, which, provider]
            theirs = (medians.get((op, which, name)) for name in others)
            cells.append([op, which, *("" if time is None else f"{time / ours:.2f}x" for time in theirs)])
    if len(cells) == 1 or not others:
        return ""
    return "\n".join(["bytekernels is faster by", *aligned(cells, left=2)])


def aligned(cells: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines of a table whose first row is its head; the first ``left`` columns are flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        padded = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return [lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]]


def plot(path: Path, report: Report) -> None:
    """A PNG of the achieved bandwidth: a panel for each pass, a group of bars for each op, the copy as a line."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    passes = [which for which in PASSES if any(row["pass"] == which for row in report.rows)]
    ops = list(dict.fromkeys(row["op"] for row in report.rows))
    names = list(dict.fromkeys(row["provider"] for row in report.rows))
    figure, axes = pyplot.subplots(1, len(passes), figsize=(4 * len(passes) + 1, 4), sharey=True, squeeze=False)
    for axis, which in zip(axes[0], passes, strict=True):
        for i, name in enumerate(names):
            rows = [row for row in report.rows if row["pass"] == which and row["provider"] == name]
            x = [ops.index(row["op"]) + (i - (len(names) - 1) / 2) * 0.8 / len(names) for row in rows]
            axis.bar(x, [row["gb_per_s"] for row in rows], 0.8 / len(names), label=name)
        axis.axhline(report.machine["copy_gb_per_s"], color="black", linestyle="--", linewidth=1, label="copy")
        axis.set_xticks(range(len(ops)), ops)
        axis.set_title(which)
    axes[0][0].set_ylabel("compulsory traffic / median time, GB/s")
    axes[0][-1].legend(fontsize="small")
    shapes = " | ".join(dict.fromkeys(f"{row['shape']}, {row['dtype']}" for row in report.rows))
    figure.suptitle(f"{report.machine['device']}: {shapes}", fontsize="medium")
    figure.tight_layout()
    write_whole(path, lambda partial: figure.savefig(partial, dpi=150, format="png"))
    pyplot.close(figure)
