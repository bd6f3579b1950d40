"""Run stages of the curriculum: ``python training/stage.py --stage all``, or under torchrun."""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the command works without an install

import torch
import transformers

from models import ByteLM, generate
from training import parallel, plan_command, report, scores
from training.checkpoint import write_folder
from training.errors import Preempted, UserError
from training.loop import told_to_stop
from training.recipe import Recipe, parse_duration, read_recipe, recipe_from
from training.run import Run
from training.run_folder import claim_folder
from training.stage_recipe import KNOWN_STAGES
from training.stages import STAGES
from training.student import load_student

DATA_HELP = "files or globs (.txt .md .jsonl[.gz|.zst] .parquet), or datasets: hf:NAME, hf:NAME:CONFIG, hf:FOLDER"
PROMPTS = ("Return the ", "The function ", "If the argument is ")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="stage.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--stage", required=True, choices=[*KNOWN_STAGES, "all"], help="one stage, or the curriculum")
    parser.add_argument("--recipe", default="quickstart", help="a name in training/recipes, or a TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe's value")
    parser.add_argument("--teacher", metavar="PATH", help="a Hugging Face folder or a GGUF file")
    parser.add_argument("--data", nargs="+", metavar="PATH", help=DATA_HELP)
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/RECIPE)")
    parser.add_argument("--from", dest="start", type=Path, metavar="DIR", help="start the stage from this model")
    parser.add_argument(
        "--budget", metavar="TIME", help="training time, such as 3m: of the one stage, or all scaled to it"
    )
    parser.add_argument("--control", action="store_true", help="also train the control (a fresh core)")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="keep finished stages, go on from the last checkpoint")
    again.add_argument("--overwrite", action="store_true", help="make the stages anew, and those after them")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), metavar="DIR", help="kept between runs")
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    plan_command.add_flags(parser)
    return parser.parse_args(arguments)


def recipe_of(options: argparse.Namespace, folder: Path | None) -> Recipe:
    """The recipe that the flags ask for; a resumed run without any takes up the one that it was started with."""
    plain = not (options.set or options.teacher or options.data or options.budget)
    kept = (folder or Path("runs") / options.recipe) / "recipe.json"
    if options.resume and plain and kept.is_file():
        return recipe_from(json.loads(kept.read_text()))
    recipe = read_recipe(options.recipe, options.set)
    if options.teacher:
        teacher = dataclasses.replace(recipe.teacher, path=options.teacher, config=None)  # its own files tell its sizes
        recipe = dataclasses.replace(recipe, teacher=teacher)
    if options.data:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, paths=tuple(options.data)))
    if not options.budget:
        return recipe
    seconds = parse_duration(options.budget)
    return recipe.scaled(seconds) if options.stage == "all" else recipe.with_time(options.stage, seconds)


def run_stages(run: Run, names: Sequence[str], start: Path | None) -> tuple[ByteLM, list[dict[str, Any]]]:
    """Run stages in order, each from the result of the one before; finished ones are kept."""
    model, rows = None, []
    for name in names:
        row = run.result_of(run.stage_folder(name))
        if row is not None:
            model = None
        else:
            if model is None:
                model = run.student_before(name, start if name == names[0] else None)
            row = run.run_stage(name, model, start if name == names[0] else None)
            if run.ranks.size > 1:
                model = None
        rows.append(row)
    if model is None:
        model = load_student(run.stage_folder(names[-1]))
    return model.to(run.ranks.device).eval(), rows


def report_on(run: Run, model: ByteLM, rows: list[dict[str, Any]], control: bool, began: float) -> None:
    """Scores, continuations and files of a finished curriculum, printed by rank 0."""
    boundary_f1 = next((row["after"]["f1"] for row in reversed(rows) if "f1" in row["after"]), None)
    control_model = None
    if control:
        control_model, row = run.run_control()
        rows = [*rows, row]
    writes = any("decoder." in STAGES[name].trains for name in run.recipe.order)
    teacher = scores.teacher_score(run)
    student, leaking = (scores.student_score(run, model), scores.leaking_score(run, model)) if writes else (None, None)
    control_score = scores.student_score(run, control_model) if control_model else None
    if run.ranks.is_main:
        teacher_bpb = teacher.bits_per_byte()
        student_bpb = student.bits_per_byte() if student else None
        written = [] if student is None else [generate(model, prompt, max_new_bytes=80) for prompt in PROMPTS]
        result = {
            "teacher_bpb": teacher_bpb,
            "student_bpb": student_bpb,
            "control_bpb": control_score.bits_per_byte() if control_score else None,
            "retention": teacher_bpb / student_bpb if student_bpb else None,
            "teacher_forced_leaking_bits": leaking.bits_per_byte() if leaking else None,
            "boundary_f1": boundary_f1,
            "scored_bytes": int(teacher.bytes.sum()),
            "teacher": run.teacher_row,
            "teacher_folder": str(run.teacher_folder),
            "stages": rows,
            "continuations": [generation.with_boundaries() for generation in written],
            "seconds": round(time.monotonic() - began, 1),
            "versions": report.versions(),
        }
        if writes and model.config.token_head_is_spare:
            model.drop_token_head()
        write_folder(run.folder / "model", model.save_pretrained, {})
        report.write(run.folder, result)
        table = report.stage_table([run.teacher_row, *rows] if run.teacher_row else rows)
        print("\n".join(["", table, "", report.summary(result), report.continuations(written)]))
        print(f"\nmodel, report.json and curves.png are in {run.folder}, the teacher in {run.teacher_folder}")
    run.ranks.barrier()


def main(arguments: Sequence[str] | None = None) -> int:
    with told_to_stop() as told:
        return run_command(arguments, told)


def run_command(arguments: Sequence[str] | None, told: Sequence[int]) -> int:
    """The command; ``told`` is not empty once SIGTERM has come."""
    began = time.monotonic()
    options = parse(arguments)
    transformers.utils.logging.disable_progress_bar()  # ours is the one to look at
    try:
        recipe = recipe_of(options, options.out)
        if options.control and options.stage != "all":
            raise UserError("--control compares with the whole curriculum: give --stage all")
        names = list(recipe.order) if options.stage == "all" else [options.stage]
        if plan_command.run_command(recipe, names, options):
            return 0
        ranks = parallel.start(options.device)
        run = Run(recipe, options.out or Path("runs") / recipe.name, options.cache, ranks, told)
        run.check(names, options.start, options.control)
        if ranks.is_main:
            restarted = parallel.is_restarted(run.folder)
            again = options.resume or restarted
            modes = {"resume": again, "overwrite": options.overwrite and not again}
            claim_folder(recipe, run.folder, names, **modes, start=options.start)
        ranks.barrier()
        run.prepare()
        model, rows = run_stages(run, names, options.start)
        if options.stage == "all":
            report_on(run, model, rows, options.control, began)
        elif ranks.is_main:
            print(report.stage_table(rows))
    except Preempted as stopped:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"stage.py: {stopped}: --resume goes on from there", file=sys.stderr, flush=True)
    except (UserError, OSError) as error:
        print(f"stage.py: {error}", file=sys.stderr, flush=True)
        # Peers may be waiting in a collective: without this they would wait for its time-out.
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            os._exit(2)
        return 2
    parallel.finish()
    return 0


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    sys.exit(main())
