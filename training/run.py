"""A run: a folder, a teacher, a corpus, and the stages in their order."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from models import ByteLM, ByteLMConfig, Score, score, token_score
from models.byte_lm import core_settings
from models.core import use_packed
from training import loop
from training.checkpoint import read_summary, write_folder
from training.data import Batch, Batches, Corpus, held_out_batches, prepare
from training.errors import UserError
from training.objectives import Lesson, measure, token_embeddings
from training.parallel import Ranks
from training.recipe import STAGES as ORDER
from training.recipe import Recipe, StageRecipe
from training.stages import CONTROL, STAGES, TEACHER, Stage
from training.teacher import load_teacher, save_teacher, small_llama, train_tokenizer
from training.text import Document, python_docs, read_documents


def fast_at_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices faster than fp32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class Run:
    """Everything that the stages of one run share.

    Args:
        recipe: the run's numbers.
        folder: where its results go.
        ranks: this process among its peers.
        log: make a TensorBoard log.
    """

    def __init__(self, recipe: Recipe, folder: Path, ranks: Ranks, *, log: bool = True) -> None:
        self.recipe, self.folder, self.ranks, self.log = recipe, folder, ranks, log
        self.cache = folder.parent / "cache"
        torch.manual_seed(recipe.seed)

    # ------------------------------------------------------------------------------------------ teacher and text

    def prepare(self) -> None:
        """Make or load the teacher and the corpus. Rank 0 makes, the others wait and load.

        Raises:
            UserError: whatever is wrong with the teacher or the text, in one line.
        """
        teacher_folder = self._own_teacher_folder()
        if self.recipe.teacher.path:
            self.teacher, self.tokenizer = load_teacher(self.recipe.teacher.path)
            self.corpus = self._corpus(self.tokenizer)
        else:
            self.tokenizer = self._own_tokenizer(teacher_folder)
            self.corpus = self._corpus(self.tokenizer)
            if not (teacher_folder / "config.json").is_file():
                self._make_teacher(teacher_folder)
            self.teacher, _ = load_teacher(teacher_folder)
        use_packed(self.teacher).to(self.ranks.device)
        self.teacher.requires_grad_(False)

    @cached_property
    def measure_batches(self) -> list[Batch]:
        """The held-out rows that a stage's own metrics are read on."""
        return self._held_out(self.recipe.data.measure_bytes)

    @cached_property
    def score_batches(self) -> list[Batch]:
        """The held-out rows that bits per byte are read on."""
        return self._held_out(self.recipe.data.score_bytes)

    def _held_out(self, limit_bytes: int) -> list[Batch]:
        data = self.recipe.data
        return held_out_batches(self.corpus, window=data.window, batch_bytes=data.batch_bytes, limit_bytes=limit_bytes)

    @property
    def micro_batch(self) -> int:
        """Bytes of one forward pass on one rank."""
        data = self.recipe.data
        return max(data.window, min(data.batch_bytes, data.global_batch_bytes // self.ranks.size))

    @property
    def accumulation(self) -> int:
        """Forward passes in one optimizer step on one rank."""
        return max(1, round(self.recipe.data.global_batch_bytes / (self.micro_batch * self.ranks.size)))

    def _own_teacher_folder(self) -> Path:
        key = _fingerprint(self.recipe.teacher, self.recipe.data, self.recipe.optimizer, self.recipe.seed)
        return self.cache / f"teacher-{key}"

    def _documents(self) -> Iterable[Document]:
        return read_documents(self.recipe.data.paths) if self.recipe.data.paths else self._python_docs

    @cached_property
    def _python_docs(self) -> list[Document]:
        limit = self.recipe.data.limit_bytes
        return list(python_docs() if limit is None else python_docs(limit_bytes=limit))

    def _own_tokenizer(self, teacher_folder: Path) -> PreTrainedTokenizerFast:
        folder = teacher_folder.with_name(teacher_folder.name.replace("teacher", "tokenizer"))
        if self.ranks.is_main and read_summary(folder) is None:
            self._say("training the teacher's tokenizer")
            tokenizer = train_tokenizer(self._documents(), self.recipe.teacher.vocab_size)
            write_folder(folder, lambda to: tokenizer.save_pretrained(to), {})
        self.ranks.barrier()
        return PreTrainedTokenizerFast.from_pretrained(folder)

    def _corpus(self, tokenizer: PreTrainedTokenizerFast) -> Corpus:
        sources = [(path, _stamp(path)) for path in self.recipe.data.paths]
        text = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        folder = self.cache / f"corpus-{_fingerprint(sources, self.recipe.data.limit_bytes, text)}"
        with contextlib.suppress(UserError):
            return Corpus.open(folder)
        if self.ranks.is_main:
            self._say("reading and aligning the text")
            prepare(self._documents(), tokenizer, folder, limit_bytes=self.recipe.data.limit_bytes)
        self.ranks.barrier()
        return Corpus.open(folder)

    def _make_teacher(self, folder: Path) -> None:
        recipe = self.recipe.teacher
        sizes = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe) if f.name in _LLAMA_SIZES}
        model = use_packed(small_llama(self.tokenizer, **sizes)).to(self.ranks.device)
        schedule = StageRecipe(recipe.lr, recipe.warmup, recipe.floor, "linear", seconds=recipe.seconds)
        checkpoint = folder.with_name(f"{folder.name}.checkpoint")
        self._train(TEACHER, Lesson(model, None, schedule), checkpoint, log_name=None)
        if self.ranks.is_main:
            save_teacher(model, self.tokenizer, folder)
        self.ranks.barrier()

    # ----------------------------------------------------------------------------------------------------- stages

    def stage_folder(self, name: str) -> Path:
        return self.folder / "stages" / name

    def fresh_student(self) -> ByteLM:
        """The student before its first stage: the teacher's core and head, new byte-level parts."""
        torch.manual_seed(self.recipe.seed)
        return ByteLM.from_teacher(self.teacher, self._student_config())

    def _student_config(self) -> ByteLMConfig:
        return ByteLMConfig(core=core_settings(self.teacher), **dataclasses.asdict(self.recipe.model))

    def student_before(self, name: str, start: Path | None = None) -> ByteLM:
        """The model that a stage starts from: ``start``, else the result of the stage before.

        Raises:
            UserError: there is none.
        """
        before = ORDER.index(name) - 1
        if start is None and before < 0:
            return self.fresh_student()
        folder = start or self.stage_folder(ORDER[before])
        if start is None and read_summary(folder) is None:
            raise UserError(
                f"stage {name} starts from stage {ORDER[before]}, which has no result in {folder}: "
                f"run --stage {ORDER[before]} first, or give --from MODEL"
            )
        return load_student(folder)

    def run_stage(self, name: str, model: ByteLM) -> dict[str, Any]:
        """Train one stage and keep its model; returns its row of the report."""
        lesson = Lesson(model.to(self.ranks.device), self.teacher, self.recipe.stage[name])
        row = self._train(STAGES[name], lesson, self.folder / "checkpoints" / name)
        if self.ranks.is_main:
            write_folder(self.stage_folder(name), model.save_pretrained, row)
        self.ranks.barrier()
        return row

    def run_control(self) -> tuple[ByteLM, dict[str, Any]]:
        """The same student with a fresh core, trained on stage 2.2's loss for as long as all stages together.

        Raises:
            UserError: the recipe has no control, or stages that are not measured in seconds.
        """
        if self.recipe.control is None:
            raise UserError(f"recipe {self.recipe.name} has no [control]")
        seconds = [stage.seconds for stage in self.recipe.stage.values()]
        if None in seconds:
            raise UserError("the control trains for the stages' seconds, but a stage is measured in bytes")
        folder = self.stage_folder("control")
        if (row := read_summary(folder)) is not None:
            return load_student(folder).to(self.ranks.device).eval(), row
        torch.manual_seed(self.recipe.seed + 1)
        model = ByteLM(self._student_config()).to(self.ranks.device)
        recipe = dataclasses.replace(self.recipe.control, seconds=sum(s for s in seconds if s), bytes=None)
        row = self._train(CONTROL, Lesson(model, self.teacher, recipe), self.folder / "checkpoints" / "control")
        if self.ranks.is_main:
            write_folder(folder, model.save_pretrained, row)
        self.ranks.barrier()
        return model, row

    def _train(self, stage: Stage, lesson: Lesson, checkpoint: Path, log_name: str | None = "tensorboard") -> dict[str, Any]:
        named = stage.freeze_others(lesson.model)
        self.ranks.broadcast_parameters(lesson.model)
        with self.precision():
            before = self._measure(stage, lesson)
        data = self.recipe.data
        batches = Batches(
            self.corpus,
            window=data.window,
            batch_bytes=self.micro_batch,
            seed=int(_fingerprint(self.recipe.seed, stage.name), 16) % 2**31,
            rank=self.ranks.rank,
            world_size=self.ranks.size,
        )
        progress = loop.train(
            lesson.model,
            named,
            partial(stage.objective, lesson),
            batches,
            stage=lesson.recipe,
            optimizer=self.recipe.optimizer,
            accumulation=self.accumulation,
            ranks=self.ranks,
            precision=self.precision(),
            checkpoint=checkpoint,
            checkpoint_seconds=self.recipe.checkpoint_seconds,
            log=self._writer(stage) if log_name else None,
            title=f"{stage.name:>7} {stage.title}",
        )
        with self.precision():
            after = self._measure(stage, lesson)
        return {
            "stage": stage.name,
            "title": stage.title,
            "trained": sum(parameter.numel() for _, parameter in named),
            "steps": progress.step,
            "bytes": progress.bytes,
            "seconds": round(progress.seconds, 1),
            "before": before,
            "after": after,
        }

    def _measure(self, stage: Stage, lesson: Lesson) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for kind in stage.measures:
            metrics |= measure(kind, lesson, self.measure_batches, self.ranks)
        return metrics

    def precision(self) -> AbstractContextManager:
        """Autocast to bf16, or nothing, as the recipe has it."""
        wanted = self.recipe.precision
        use = wanted == "bf16" or (wanted == "auto" and fast_at_bf16(self.ranks.device))
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=use)

    def _writer(self, stage: Stage) -> loop.Log | None:
        if not (self.ranks.is_main and self.log):
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self.folder / "tensorboard" / stage.name)

    def _say(self, text: str) -> None:
        if self.ranks.is_main:
            print(text, flush=True)

    # ------------------------------------------------------------------------------------------------------ scores

    def teacher_score(self) -> Score:
        """The teacher's log-likelihood of the held-out rows, along its own tokenization."""

        def of_batch(batch: Batch) -> Score:
            num_bytes = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).long() - 1
            embeddings = token_embeddings(self.teacher, batch)
            head = self.teacher.get_output_embeddings().weight
            return token_score(
                self.teacher.base_model, head, embeddings, batch.token_ids, batch.token_cu, num_bytes
            )

        return self._score(of_batch)

    def student_score(self, model: ByteLM) -> Score:
        """The byte-level model's log-likelihood (its honest bound) of the same rows."""
        return self._score(lambda batch: score(model, batch.ids, batch.cu_seqlens))

    def _score(self, of_batch: Any) -> Score:
        scores = []
        for batch in self.score_batches:
            scores.append(of_batch(batch.to(self.ranks.device)))
        return Score(*(torch.cat(parts).cpu() for parts in zip(*scores, strict=True)))

    def boundary_f1(self, model: ByteLM) -> float:
        lesson = Lesson(model, self.teacher, self.recipe.stage[ORDER[-1]])
        (kind,) = STAGES["1.3"].measures
        return measure(kind, lesson, self.measure_batches, self.ranks)["f1"]


_LLAMA_SIZES = {
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
}


def load_student(folder: Path) -> ByteLM:
    """A byte-level model from a folder.

    Raises:
        UserError: no such folder, or it holds no byte-level model.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"no byte-level model in {folder}: give a folder that a stage has written")
    try:
        return ByteLM.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot load {folder}: {str(error).splitlines()[0]}") from error


def start_folder(recipe: Recipe, folder: Path, names: list[str], *, resume: bool, overwrite: bool) -> None:
    """Claim a run's folder for some stages.

    Raises:
        UserError: it holds results of these stages and neither ``resume`` nor ``overwrite`` is asked for, or results
            of another recipe.
    """
    mark = folder / "recipe.json"
    wanted = json.loads(json.dumps(dataclasses.asdict(recipe)))
    if mark.is_file() and not overwrite:
        found = json.loads(mark.read_text())
        if found != wanted:
            raise UserError(
                f"{folder} was made with other numbers ({_first_difference(found, wanted)}): "
                "give another --out, or --overwrite to start anew"
            )
    taken = [name for name in names if _exists(folder, name)]
    if taken and not (resume or overwrite):
        raise UserError(
            f"{folder} already holds stage {taken[0]}: --resume to go on, --overwrite to start anew, or another --out"
        )
    if overwrite:
        for name in names:
            _remove(folder, name)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps(wanted, indent=1))


def _exists(folder: Path, name: str) -> bool:
    return any((folder / kind / name).exists() for kind in ("stages", "checkpoints"))


def _remove(folder: Path, name: str) -> None:
    import shutil

    for kind in ("stages", "checkpoints"):
        shutil.rmtree(folder / kind / name, ignore_errors=True)
    shutil.rmtree(folder / "tensorboard" / name, ignore_errors=True)


def _first_difference(found: Any, wanted: Any, at: str = "") -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted({*found, *wanted}):
            if found.get(key) != wanted.get(key):
                return _first_difference(found.get(key), wanted.get(key), f"{at}.{key}")
    return f"{at.lstrip('.')}: {found!r} then, {wanted!r} now"


def _fingerprint(*values: Any) -> str:
    text = json.dumps([dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for v in values], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _stamp(pattern: str) -> list[tuple[str, int, int]]:
    import glob

    stamps = []
    for path in sorted(glob.glob(pattern, recursive=True)):
        stat = Path(path).stat()
        stamps.append((path, stat.st_size, stat.st_mtime_ns))
    return stamps
