"""Run stages of the curriculum: ``python training/stage.py --stage all``, or under torchrun."""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the command works without an install

import torch

from models import ByteLM, Generation, generate
from training import parallel, report
from training.checkpoint import read_summary
from training.errors import UserError
from training.recipe import STAGES, Recipe, parse_duration, read_recipe
from training.run import Run, load_student, start_folder

PROMPTS = ("Return the ", "The function ", "If the argument is ")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="stage.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--stage", required=True, choices=[*STAGES, "all"], help="one stage, or all in their order")
    parser.add_argument("--recipe", default="quickstart", help="a name in training/recipes, or a TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe's value")
    parser.add_argument("--teacher", metavar="PATH", help="a Hugging Face folder or a GGUF file")
    parser.add_argument("--data", nargs="+", metavar="PATH", help="files or globs: .txt .md .jsonl[.gz|.zst] .parquet")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/RECIPE)")
    parser.add_argument("--from", dest="start", type=Path, metavar="DIR", help="start the stage from this model")
    parser.add_argument("--budget", metavar="TIME", help="scale all training times to this sum, such as 3m")
    parser.add_argument("--control", action="store_true", help="also train the control (a fresh core)")
    parser.add_argument("--resume", action="store_true", help="keep finished stages, go on from the last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="make the stages anew")
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    return parser.parse_args(arguments)


def recipe_of(options: argparse.Namespace) -> Recipe:
    recipe = read_recipe(options.recipe, options.set)
    if options.teacher:
        recipe = dataclasses.replace(recipe, teacher=dataclasses.replace(recipe.teacher, path=options.teacher))
    if options.data:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, paths=tuple(options.data)))
    return recipe.scaled(parse_duration(options.budget)) if options.budget else recipe


def run_stages(run: Run, names: Sequence[str], start: Path | None) -> tuple[ByteLM, list[dict[str, Any]]]:
    """Run stages in order, each from the result of the one before; finished ones are kept."""
    model, rows = None, []
    for name in names:
        done = read_summary(run.stage_folder(name))
        if done is not None:
            model = None
            rows.append(done)
            continue
        if model is None:
            model = run.student_before(name, start if name == names[0] else None)
        rows.append(run.run_stage(name, model))
    if model is None:
        model = load_student(run.stage_folder(names[-1]))
    return model.to(run.ranks.device).eval(), rows


def samples(run: Run, model: ByteLM) -> list[Generation]:
    return [generate(model, prompt, max_new_bytes=80) for prompt in PROMPTS]


def report_on(run: Run, model: ByteLM, rows: list[dict[str, Any]], control: bool, began: float) -> dict[str, Any]:
    """Scores, samples and files of a finished curriculum, printed on rank 0."""
    with run.precision():
        teacher, student = run.teacher_score(), run.student_score(model)
        f1 = run.boundary_f1(model)
    control_bpb = None
    if control:
        control_model, row = run.run_control()
        rows = [*rows, row]
        with run.precision():
            control_bpb = run.student_score(control_model).bits_per_byte()
    result = {
        "teacher_bpb": teacher.bits_per_byte(),
        "student_bpb": student.bits_per_byte(),
        "control_bpb": control_bpb,
        "retention": teacher.bits_per_byte() / student.bits_per_byte(),
        "boundary_f1": f1,
        "scored_bytes": int(teacher.bytes.sum()),
        "stages": rows,
        "seconds": round(time.monotonic() - began, 1),
        "versions": report.versions(),
    }
    if run.ranks.is_main:
        generations = samples(run, model)
        result["continuations"] = [generation.with_boundaries() for generation in generations]
        print("\n".join(["", report.stage_table(rows), "", report.summary(result), report.continuations(generations)]))
        report.write(run.folder, result)
        model.save_pretrained(run.folder / "model")
        print(f"\nmodel, report.json and curves.png are in {run.folder}")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    options = parse(arguments)
    try:
        recipe = recipe_of(options)
        ranks = parallel.start(options.device)
        folder = options.out or Path("runs") / recipe.name
        names = list(STAGES) if options.stage == "all" else [options.stage]
        if ranks.is_main:
            start_folder(recipe, folder, names, resume=options.resume, overwrite=options.overwrite)
        ranks.barrier()
        run = Run(recipe, folder, ranks)
        run.prepare()
        model, rows = run_stages(run, names, options.start)
        if options.stage == "all":
            report_on(run, model, rows, options.control, began)
        elif ranks.is_main:
            print(report.stage_table(rows))
    except UserError as error:
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
