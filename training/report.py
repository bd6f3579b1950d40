"""What a run came to: one table, a JSON file, the curves."""

import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from bytekernels.files import write_whole
from models import Generation
from training.meter import READINGS
from training.sinks import JSONL, LINE, read_lines
from training.stage_log import OTHERS
from training.stages import TEACHER

_SHOWN = {
    "cosine": "cosine",
    "mse": "MSE",
    "kl": "KL",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "cross_entropy": "CE",
    "bits_per_byte": "bits/byte",
    "draft_accuracy": "draft accuracy",
}


def stage_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per stage: what trained, bytes seen, seconds, its metrics at start and end."""
    cells = [("stage", "what", "trained", "bytes", "seconds", "held-out: start -> end")]
    for row in rows:
        metrics = ", ".join(
            f"{_SHOWN[name]} {row['before'][name]:.4g} -> {value:.4g}" for name, value in row["after"].items()
        )
        trained, seen = f"{row['trained'] / 1e6:.2f} M", f"{row['bytes'] / 1e6:.2f} MB"
        cells.append((row["stage"], row["title"], trained, seen, f"{row['seconds']:.0f}", metrics))
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def summary(report: dict[str, Any]) -> str:
    """Teacher and student on the same held-out rows."""
    lines = [
        f"held-out text: {report['scored_bytes']:,} bytes, the same rows for all",
        f"  teacher   {report['teacher_bpb']:.4f} bits/byte",
    ]
    if report["student_bpb"] is None:
        return "\n".join([*lines, *_without_score(report)])
    lines.append(f"  student   {report['student_bpb']:.4f} bits/byte (bound along the router's chunks)")
    if report["control_bpb"] is not None:
        lines.append(f"  control   {report['control_bpb']:.4f} bits/byte (fresh core, the same seconds)")
    f1 = "" if report["boundary_f1"] is None else f"   boundary F1 {report['boundary_f1']:.4f}"
    lines.append(f"  retention {report['retention']:.4f}{f1}")
    return "\n".join(lines)


def _without_score(report: dict[str, Any]) -> list[str]:
    """Why there are no bits per byte, and what a model that leaks makes of the text instead."""
    leaking = report["teacher_forced_leaking_bits"]
    if leaking is None:
        return ["  student   none: no stage of this curriculum trains the byte-level decoder"]
    return [
        "  student   none: its dechunk weight sees the next byte, so it has no likelihood",
        f"  teacher-forced, leaks: {leaking:.4f} (each byte is seen before it is predicted: not bits per byte)",
    ]


def continuations(generations: Sequence[Generation]) -> str:
    """Prompts and what the model wrote, with its chunk boundaries shown."""
    return "\n".join(f"  {generation.with_boundaries('|')!r}" for generation in generations)


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    try:
        root = Path(__file__).parent
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device,
        "threads": str(torch.get_num_threads()),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write(folder: Path, report: dict[str, Any]) -> None:
    """``report.json`` and ``curves.png`` in the run's folder."""
    text = json.dumps(report, indent=1)  # a diverged run has a report too, with its infinities
    write_whole(folder / "report.json", lambda partial: partial.write_text(text))
    _plot(folder, [TEACHER.name, *(row["stage"] for row in report.get("stages", ()))])


def _place(name: str, order: Sequence[str]) -> tuple[int, str]:
    return order.index(name) if name in order else len(order), name


def _plot(folder: Path, order: Sequence[str]) -> None:
    """The curves of every stage that left a file of JSON lines, in an order of their names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = []
    for path in sorted((folder / "logs").glob(f"*/{JSONL}"), key=lambda path: _place(path.parent.name, order)):
        lines = read_lines(path)
        parts = [name for name in (lines[0] if lines else ()) if name not in (*LINE, *OTHERS, *READINGS)]
        curves.append((path.parent.name, {name: [(line["step"], line.get(name)) for line in lines] for name in parts}))
    if not curves:
        return
    figure, axes = pyplot.subplots(1, len(curves), figsize=(4 * len(curves), 3), squeeze=False, layout="constrained")
    for axis, (name, series) in zip(axes[0], curves, strict=True):
        for tag, points in series.items():
            axis.plot(*zip(*points, strict=True), label=tag)
        axis.set(title=f"stage {name}", xlabel="step", yscale="log")
        axis.legend(fontsize="small")
    figure.savefig(folder / "curves.png", dpi=120)
    pyplot.close(figure)
