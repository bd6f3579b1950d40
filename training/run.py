"""A run: a folder, a teacher, a corpus, and the stages in their order."""

import dataclasses
import math
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from bytekernels import AlignedBatch
from models import ByteLM, ByteLMConfig
from models.byte_lm import core_settings
from models.core import use_packed
from models.local_stack import BLOCKS
from models.suffix import SuffixFeatures, Vocabulary
from training import loop
from training.alignment import TokenBytes
from training.changed import Change, ChangedBatches
from training.checkpoint import read_summary, write_folder
from training.context import Anchor, Context, Learner, Teacher
from training.data import Batches, held_out_batches
from training.errors import UserError
from training.flops import CoreSizes, Extras, Rows, Sizes, next_token_flops, stage_flops
from training.meter import Meter, Peak, peak_flops
from training.metrics import Metrics
from training.noise import Noise
from training.objectives import measure
from training.parallel import Ranks, blocks_of, full_state, shard_
from training.plan import check_teacher
from training.precision import fast_at_bf16
from training.recipe import Recipe, StageRecipe, batch_sizes
from training.remembered import Remembered
from training.run_folder import checkpoint_of, logs_of
from training.sinks import check_wandb
from training.snapshot import Snapshots
from training.sources import Sources, fingerprint
from training.stage_log import StageLog
from training.stages import CONTROL, STAGES, TEACHER, Stage
from training.stream import StreamBatches
from training.student import check_model_folder, load_student
from training.teacher import load_teacher, small_teacher
from training.vocabulary import VocabularyDraw, vocabulary_of


class Run:
    """Everything that the stages of one run share.

    Args:
        recipe: the run's numbers.
        folder: where its results go.
        cache: where the teacher and the prepared text are kept between runs.
        ranks: this process among its peers.
        told: is not empty once this process has been told to stop.
    """

    def __init__(self, recipe: Recipe, folder: Path, cache: Path, ranks: Ranks, told: Sequence[int] = ()) -> None:
        self.recipe, self.folder, self.ranks, self.told = recipe, folder, ranks, told
        self.sources = Sources(recipe, cache, ranks)
        self.teacher_row: dict[str, Any] | None = None

    def prepare(self) -> None:
        """Make or load the teacher and the corpus.

        Raises:
            UserError: whatever is wrong with the teacher or the text, in one line.
        """
        with self.sources.lock():
            if self.recipe.teacher.path:
                self.teacher_folder = Path(self.recipe.teacher.path)
                teacher, self.tokenizer = load_teacher(self.teacher_folder)
                check_teacher(self.recipe.teacher, teacher.config)
                self.corpus = self.sources.corpus(self.tokenizer)
            else:
                self.tokenizer = self.sources.own_tokenizer()
                self.corpus = self.sources.corpus(self.tokenizer)
                teacher = self._own_teacher()
        self.teacher = Teacher(teacher)

    @cached_property
    def placed_teacher(self) -> Teacher:
        """The teacher as it computes: cut over all processes, on a GPU in bf16 where the student computes in it.

        No student can be made from it any more.
        """
        teacher = self.teacher
        if self.ranks.device.type == "cuda" and self.is_bf16():
            teacher.narrow(torch.bfloat16)
        return self._place(teacher)

    def _place(self, module: Any, narrow: torch.dtype | None = None) -> Any:
        """A module on this process's device, or cut over those of all processes."""
        if self.ranks.size == 1:
            return module.to(self.ranks.device)
        shard_(module, self._mesh, narrow, keep=tuple(BLOCKS.values()))
        return module

    @property
    def _narrow(self) -> torch.dtype | None:
        """What blocks that are cut over processes compute in beside fp32 masters."""
        return torch.bfloat16 if self.is_bf16() else None

    @cached_property
    def _mesh(self) -> DeviceMesh:
        return self.ranks.mesh(self.recipe.parallel.shard)

    def _own_teacher(self) -> PreTrainedModel:
        data, recipe = self.recipe.data, self.recipe.teacher
        batch = (data.window, data.batch_bytes, data.global_batch_bytes)
        key = fingerprint(self.corpus.fingerprint, recipe, batch, self.recipe.optimizer, self.recipe.seed)
        self.teacher_folder = folder = self.sources.cache / f"teacher-{key}"
        self.teacher_row = self.result_of(folder)
        if self.teacher_row is None:
            tokenizer = self.sources.own_tokenizer()
            torch.manual_seed(self.recipe.seed)
            model = use_packed(small_teacher(tokenizer, recipe.architecture, **recipe.sizes))
            length = {"seconds": recipe.seconds} if recipe.bytes is None else {"bytes": recipe.bytes}
            schedule = StageRecipe(recipe.lr, recipe.warmup, recipe.floor, "linear", **length)
            self._train(TEACHER, Context(model, None, schedule), folder, tokenizer=tokenizer)
            self.teacher_row = self.result_of(folder)
        return load_teacher(folder)[0]

    @cached_property
    def measure_batches(self) -> list[AlignedBatch]:
        """The held-out rows that a stage's own metrics are read on."""
        return self._held_out(self.recipe.data.measure_bytes)

    @cached_property
    def score_batches(self) -> list[AlignedBatch]:
        """The held-out rows that bits per byte are read on."""
        return self._held_out(self.recipe.data.score_bytes)

    def _held_out(self, limit_bytes: int) -> list[AlignedBatch]:
        data = self.recipe.data
        return held_out_batches(self.corpus, window=data.window, batch_bytes=data.batch_bytes, limit_bytes=limit_bytes)

    # ----------------------------------------------------------------------------------------------------- stages

    def stage_folder(self, name: str) -> Path:
        return self.folder / "stages" / name

    def result_of(self, folder: Path) -> dict[str, Any] | None:
        """The summary of a stage that has finished, as the first process sees it, on every rank."""
        row = None
        if self.ranks.is_main and (row := read_summary(folder)) is not None:
            shutil.rmtree(checkpoint_of(folder), ignore_errors=True)  # of a run that was killed before it could
        return self.ranks.gather(row)[0]

    def check(self, names: Sequence[str], start: Path | None, control: bool) -> None:
        """Find out before any work whether these stages can be run.

        Raises:
            UserError: there is nothing to start from, or no control to train.
        """
        for name in names:
            if self.recipe.stage_recipe(name).remember_bytes and self.ranks.size > 1:
                raise UserError(
                    f"stage {name}: remember_bytes is for one process, and there are {self.ranks.size}: leave it out"
                )
        check_wandb(self.recipe.log.wandb)
        first = names[0]
        if start is not None:
            check_model_folder(start)
        elif (before := self.recipe.before(first)) and self.result_of(self.stage_folder(before)) is None:
            raise UserError(
                f"stage {first} starts from stage {before}, which has no result in {self.stage_folder(before)}: "
                f"run --stage {before} first, or give --from MODEL"
            )
        if control:
            self._control_recipe()

    def student_before(self, name: str, start: Path | None = None) -> ByteLM:
        """The model that a stage starts from: ``start``, else the result of the stage before, else a fresh student.

        Raises:
            UserError: it has other sizes than the recipe or the teacher.
        """
        before = self.recipe.before(name)
        torch.manual_seed(self.recipe.seed)  # of a fresh student, or of parts that are made anew
        if start is None and before is None:
            vocabulary = self.vocabulary if self.recipe.model.suffix_features else None
            return ByteLM.from_teacher(self.teacher.model, self._student_config(), vocabulary)
        folder = start or self.stage_folder(str(before))
        return load_student(folder, self._student_config(), decoder_is_trained=name == "2.2")

    def _student_config(self) -> ByteLMConfig:
        settings = self.recipe.model.settings(self.vocabulary.num_bytes if self.recipe.model.suffix_features else 0)
        return ByteLMConfig(core=core_settings(self.teacher.model), **settings)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The teacher's, in bytes."""
        return vocabulary_of(TokenBytes(self.tokenizer))

    def run_stage(self, name: str, model: ByteLM, start: Path | None = None) -> dict[str, Any]:
        """Train one stage and keep its model; returns its row of the report.

        With several processes the model is cut over them, and is no use afterwards: load it from the stage's folder.
        """
        context = self.context(name, model)
        before = self.recipe.before(name)
        origin = str(start.resolve()) if start else f"stage {before}" if before else "a fresh model"
        return self._train(STAGES[name], context, self.stage_folder(name), origin=origin)

    def context(self, name: str, model: ByteLM) -> Context:
        """A stage's teacher and numbers around the model that it begins with, as it is when it is resumed too.

        Raises:
            UserError: the stage reads the token head of a model that has lost it.
        """
        recipe, anchor = self.recipe.stage[name], None
        reads_tokens = name in ("1.2", "joint") or recipe.distill_weight or recipe.anchor_weight
        if reads_tokens and not model.config.token_head:
            raise UserError(f"stage {name} needs a model with its token head: start --from a stage's folder")
        if recipe.anchor_weight:
            anchor = self._place(Anchor(model), self._narrow)
        entries = self.teacher.head.shape[0]
        vocabulary = self.vocabulary.by_prefix(entries).to(self.ranks.device) if recipe.byte_marginals else None
        remembered = Remembered() if recipe.remember_bytes else None
        return Context(model, self.placed_teacher, recipe, anchor, vocabulary, remembered)

    def run_control(self) -> tuple[ByteLM, dict[str, Any]]:
        """The same student with a fresh core, trained on stage 2.2's loss for as long as all stages together.

        Raises:
            UserError: the recipe has no control, or stages that are not measured in seconds.
        """
        recipe, folder, config = self._control_recipe(), self.stage_folder("control"), self._student_config()
        config.marginal_head = False  # a fresh token head, which nothing trains, has nothing to say
        if (row := self.result_of(folder)) is not None:
            return load_student(folder, config).to(self.ranks.device).eval(), row
        torch.manual_seed(self.recipe.seed + 1)
        model = ByteLM(config)
        if model.encoder.suffix is not None:
            taught = load_student(self.stage_folder(self.recipe.order[-1]))
            model.encoder.suffix.fill_from(cast(SuffixFeatures, taught.encoder.suffix))
        row = self._train(CONTROL, Context(model, self.placed_teacher, recipe), folder)
        return load_student(folder, config).to(self.ranks.device).eval(), row

    def _control_recipe(self) -> StageRecipe:
        if self.recipe.control is None:
            raise UserError(f"recipe {self.recipe.name} has no [control], which --control trains")
        seconds = [self.recipe.stage[name].seconds for name in self.recipe.order]
        if None in seconds:
            raise UserError("--control trains for the stages' seconds, but the recipe measures a stage in bytes")
        return dataclasses.replace(self.recipe.control, seconds=sum(s for s in seconds if s), bytes=None)

    def _train(
        self, stage: Stage, context: Context, folder: Path, *, tokenizer: Any = None, origin: str = ""
    ) -> dict[str, Any]:
        """Train, measure before and after, and write the result; its row is the folder's summary."""
        model, learner = context.model, self.learner(stage, context)
        self.ranks.barrier()  # models are read at different speeds
        before = self._measure(stage, learner)
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        snapshots = Snapshots(checkpoint_of(folder), self.ranks, self.recipe.keep_checkpoints)
        batches, accumulation = self.batches(stage, context.recipe)
        with closing(batches):
            progress = loop.train(
                learner,
                named,
                partial(learner, stage.objective),
                batches,
                stage=context.recipe,
                optimizer=self.recipe.optimizer,
                accumulation=accumulation,
                ranks=self.ranks,
                precision=self.precision(),
                snapshots=snapshots,
                checkpoint_seconds=self.recipe.checkpoint_seconds,
                log=partial(self._log, stage, context),
                origin=origin,
                told=self.told,
            )
        row = {
            "stage": stage.name,
            "title": stage.title,
            "trained": sum(parameter.numel() for _, parameter in named),
            "steps": progress.step,
            "skipped": progress.skipped,
            "bytes": progress.bytes,
            "seconds": round(progress.seconds, 1),
            "data_wait": round(progress.data_wait, 4),
            "mfu_of": str(self.peak) if self.ranks.is_main else None,
            "before": before,
            "after": self._measure(stage, learner),
        }
        state = full_state(model)
        if self.ranks.is_main:

            def save(to: Path) -> None:
                model.save_pretrained(to, state_dict=state)
                if tokenizer is not None:
                    tokenizer.save_pretrained(to)

            write_folder(folder, save, row)
            shutil.rmtree(snapshots.folder, ignore_errors=True)
        self.ranks.barrier()
        return row

    def learner(self, stage: Stage, context: Context) -> Learner:
        """The model as it is trained: what does not learn frozen, blocks as the recipe has them, cut over processes."""
        parallel, model = self.recipe.parallel, context.model
        stage.freeze_others(model)
        if parallel.checkpoint_activations:
            # transformers renamed it; the old name warns where there is the new one.
            newer = getattr(model, "activation_checkpointing_enable", None)
            (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
        if parallel.compile:
            for block in blocks_of(model):
                block.compile(dynamic=True)
        return self._place(Learner(context), self._narrow)

    def batches(self, stage: Stage, recipe: StageRecipe) -> tuple[Batches | StreamBatches | ChangedBatches, int]:
        """Batches of one rank, and how many of them make an optimizer step."""
        batch_bytes, accumulation = batch_sizes(self.recipe.data, recipe, self.ranks.size)
        seed = int(fingerprint(self.recipe.seed, stage.name), 16) % 2**31
        limit = recipe.remember_bytes
        batches = self.sources.batches(
            self.corpus, self.tokenizer, batch_bytes=batch_bytes, seed=seed, limit_bytes=limit
        )
        change = self._change(recipe, seed)
        return batches if change is None else ChangedBatches(batches, change), accumulation

    def _change(self, recipe: StageRecipe, seed: int) -> Change | None:
        """What a stage does to its batches."""
        if recipe.noise_share:
            return Noise(recipe.noise_share, recipe.noise_kinds, recipe.noise_rate, seed)
        if not recipe.vocabulary_share:
            return None
        return VocabularyDraw.by_frequency(
            TokenBytes(self.tokenizer),
            self.corpus.train.token_ids,
            power=recipe.vocabulary_power,
            share=recipe.vocabulary_share,
            rate=recipe.vocabulary_rate,
            seed=seed,
        )

    def _measure(self, stage: Stage, learner: Learner) -> dict[str, float]:
        metrics: dict[str, float] = {}
        with self.precision():
            for kind in stage.measures:
                metrics |= measure(kind, learner, self.measure_batches, self.ranks)
        return {name: value for name, value in metrics.items() if not math.isnan(value)}

    def precision(self) -> AbstractContextManager:
        """Autocast to bf16, or nothing, as the recipe has it."""
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.is_bf16())

    def is_bf16(self) -> bool:
        """Whether the recipe, on this device, asks for bf16."""
        wanted = self.recipe.precision
        return wanted == "bf16" or (wanted == "auto" and fast_at_bf16(self.ranks.device))

    def _log(self, stage: Stage, context: Context, progress: loop.Progress) -> StageLog:
        recipe, ranks = self.recipe.log, self.ranks
        title, rate = f"{stage.name:>7} {stage.title}", self.flops_per_byte(stage, context)
        meter = Meter(
            ranks.device,
            ranks.size,
            self.peak if ranks.is_main else None,
            num_bytes=progress.bytes,
            seconds=progress.seconds,
            waited=progress.waited,
            flops=rate * progress.bytes,
        )
        name, config = f"{self.folder.name} {title.strip()}", dataclasses.asdict(self.recipe)
        metrics = Metrics(
            logs_of(self.folder, stage.name),
            title,
            recipe,
            is_main=ranks.is_main,
            step=progress.step,
            name=name,
            config=config,
        )
        return StageLog(metrics, meter, recipe.every, lambda num_bytes: rate * num_bytes)

    @cached_property
    def peak(self) -> Peak:
        """What a device could do at the most, for MFU."""
        dtype = torch.bfloat16 if self.is_bf16() else torch.float32
        return peak_flops(self.ranks.device, dtype, self.recipe.log.peak_tflops)

    def flops_per_byte(self, stage: Stage, context: Context) -> float:
        """Of training, where text is cut as the held-out text is."""
        batches, config = self.measure_batches, context.model.config
        rows = Rows(
            bytes=sum(batch.ids.shape[0] for batch in batches),
            chunks=sum(batch.token_ids.shape[0] for batch in batches),
            sequences=sum(batch.cu_seqlens.shape[0] - 1 for batch in batches),
        )
        if stage is TEACHER:
            return next_token_flops(CoreSizes.of(config), rows).total / rows.bytes
        extras = Extras.of(stage.name, context.recipe)
        return stage_flops(Sizes.of(config), stage.name, rows, extras).total / rows.bytes
