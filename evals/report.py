"""A report for people: Markdown tables and a chart."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bytekernels.files import write_whole
from evals.results import BITS, STUDENT, TEACHER


def markdown(report: dict[str, Any]) -> str:
    """The report's tables; numbers are in points (hundredths), ± a standard error, but for bits."""
    who = [name for name in (TEACHER, STUDENT) if name in report["models"]]
    lines = [f"# {report['suite']} suite", ""]
    lines += [f"- {name}: `{report['models'][name]['path']}`, {report['models'][name]['likelihood']}" for name in who]
    lines += [f"- {', '.join(f'{key} {value}' for key, value in report['versions'].items())}", ""]
    lines += table(["task", "questions", "metric", "chance", *who, "retention"], _task_rows(report, who))
    for what, kept in (("score", "kept"), (BITS, "bits kept")):
        rows = report.get("noise", {})
        if any(what in row.get(name, {}) for row in rows.values() for name in who):
            lines += ["", f"Under noise: mean {what}, and the share of the clean one that is kept.", ""]
            head = ["noise", *(title for name in who for title in (name, f"{name} kept"))]
            lines += table(head, [_noise_row(name, row, who, what, kept) for name, row in rows.items()])
    return "\n".join(lines) + "\n"


def _task_rows(report: dict[str, Any], who: Sequence[str]) -> list[list[str]]:
    rows = []
    for name, row in report["tasks"].items():
        bits = row["metric"] == BITS
        scores = [cell(row.get(each, {}).get(row["metric"]), bits) for each in who]
        guess = "" if bits else f"{100 * row['chance']:.1f}"
        rows.append([name, str(row["questions"]), row["metric"], guess, *scores, cell(row.get("retention"), True)])
    mean = report["mean"]
    if mean:
        rows.append(
            ["**mean**", "", "", "", *(cell(mean.get(each)) for each in who), cell(mean.get("retention"), True)]
        )
    return rows


def _noise_row(noise: str, row: dict[str, Any], who: Sequence[str], what: str, kept: str) -> list[str]:
    shown = ((what, what == BITS), (kept, True))
    return [noise, *(cell(row.get(name, {}).get(key), plain) for name in who for key, plain in shown)]


def cell(estimate: Sequence[float | None] | None, plain: bool = False) -> str:
    """A value and its standard error, as :meth:`evals.metrics.Estimate.plain` has them; in points unless ``plain``."""
    value, error = estimate or (None, None)
    if value is None:
        return ""
    text = f"{value:.3f}" if plain else f"{100 * value:.1f}"
    return text if error is None else f"{text} ± {error:.3f}" if plain else f"{text} ± {100 * error:.1f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; its first column is flush left, the others right."""
    marks = ["---" if i == 0 else "--:" for i in range(len(head))]
    return ["| " + " | ".join(cells) + " |" for cells in (head, marks, *rows)]


def draw(report: dict[str, Any], path: Path) -> None:
    """Bars with standard errors: each task's score, or what is kept of it under each noise."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    who = [name for name in (TEACHER, STUDENT) if name in report["models"]]
    if "noise" in report:
        kept = (
            "kept"
            if any("kept" in row.get(each, {}) for row in report["noise"].values() for each in who)
            else "bits kept"
        )
        bars = {name: [row.get(each, {}).get(kept) for each in who] for name, row in report["noise"].items()}
        title = "share of the clean score kept"
    else:
        rows = {name: row for name, row in report["tasks"].items() if row["metric"] != BITS}
        bars = {name: [row.get(each, {}).get(row["metric"]) for each in who] for name, row in rows.items()}
        title = "score"
    figure, axis = pyplot.subplots(figsize=(1.5 + 0.8 * len(bars), 3.5), layout="constrained")
    for place, name in enumerate(who):
        marks = [
            (i, values[place]) for i, values in enumerate(bars.values()) if (values[place] or [None])[0] is not None
        ]
        axis.bar(
            [i + (place - (len(who) - 1) / 2) * 0.4 for i, _ in marks],
            [estimate[0] for _, estimate in marks],
            0.38,
            yerr=[estimate[1] or 0 for _, estimate in marks],
            label=name,
        )
    axis.set_xticks(range(len(bars)), bars, rotation=40, ha="right")
    axis.set_ylabel(title)
    axis.legend()
    write_whole(path, lambda partial: figure.savefig(partial, dpi=120, format="png"))
    pyplot.close(figure)
