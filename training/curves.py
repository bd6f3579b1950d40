"""One stage of several runs side by side, over seconds of training: ``python training/curves.py RUN … --stage 1.1``.

Prints a table of what each run had come to after so many seconds, and with ``--png`` draws the curves.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the command works without an install

from bytekernels.files import write_whole
from models.command import CommandParser, counting_number
from training.errors import UserError
from training.run_folder import logs_of
from training.sinks import JSONL, read_lines

Curve = list[tuple[float, float]]  # seconds of training, and the value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = CommandParser(prog="curves.py", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="runs' folders")
    parser.add_argument("--stage", required=True, help="as in recipes")
    parser.add_argument("--metric", default="loss", help="of metrics.jsonl: loss (default), mse, kl, …")
    parser.add_argument("--points", type=counting_number, default=8, help="rows of the table (default: 8)")
    parser.add_argument("--png", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        names = [run.resolve().name for run in options.runs]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"two runs are called {twice}, which the table could not tell apart: rename one's folder")
        read = (read_curve(run, options.stage, options.metric) for run in options.runs)
        curves = dict(zip(names, read, strict=True))
        print("\n".join(compare(curves, options.points)))
        if options.png:
            title = f"stage {options.stage}"
            write_whole(options.png, lambda partial: draw(curves, title, options.metric, partial))
    except (UserError, OSError) as error:
        parser.error(str(error))
    return 0


def read_curve(run: Path, stage: str, metric: str) -> Curve:
    """A metric of a run's stage, as it was logged; without steps at which it was not finite.

    Raises:
        UserError: the stage has no log, or its log no such metric.
    """
    log = logs_of(run, stage) / JSONL
    if not log.is_file():
        raise UserError(f"{run} has no log of stage {stage} ({log}): give the folder of a run that has begun it")
    lines = read_lines(log)
    curve = [(line["seconds"], line[metric]) for line in lines if line.get(metric) is not None]
    if not curve:
        known = ", ".join(sorted(lines[0])) if lines else "nothing"
        raise UserError(f"the log of stage {stage} in {run} has no {metric}; it has {known}")
    return curve


def compare(curves: dict[str, Curve], points: int) -> list[str]:
    """Lines of a Markdown table: a row for each of so many moments, a column for each run; empty where it had ended."""
    longest = max(curve[-1][0] for curve in curves.values())
    lines = [f"| seconds | {' | '.join(curves)} |", f"|--:|{'--:|' * len(curves)}"]
    for number in range(1, points + 1):
        moment = longest * number / points
        cells = (_value_at(curve, moment) for curve in curves.values())
        lines.append(f"| {moment:.0f} | {' | '.join(cells)} |")
    return lines


def _value_at(curve: Curve, moment: float) -> str:
    """The mean of the values in the last twentieth before a moment: one step's alone is noisy."""
    if curve[-1][0] < 0.95 * moment:
        return ""
    near = [value for seconds, value in curve if 0.95 * moment <= seconds <= moment]
    return f"{sum(near) / len(near):.4g}" if near else f"{min(curve, key=lambda one: abs(one[0] - moment))[1]:.4g}"


def draw(curves: dict[str, Curve], title: str, metric: str, path: Path) -> None:
    """A PNG of all curves in one frame, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, curve in curves.items():
        axis.plot(*zip(*curve, strict=True), label=name, linewidth=1)
    axis.set(title=title, xlabel="seconds of training", ylabel=metric, yscale="log")
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
