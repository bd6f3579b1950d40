"""A run is a recipe: a TOML file read into frozen dataclasses, every key checked."""

import dataclasses
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models import ByteLMConfig
from training.errors import UserError
from training.stage_recipe import JOINT, KNOWN_STAGES, STAGES, StageRecipe, check_stage
from training.tables import build, check_not_negative, check_one_of, check_positive, check_share, merge, parse_override

RECIPES = Path(__file__).parent / "recipes"
ARCHITECTURES = ("llama", "qwen3", "olmo2")


@dataclass(frozen=True)
class TeacherConfig:
    """What a public teacher's ``config.json`` says of its sizes, so that a run can be planned without its files."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int


@dataclass(frozen=True)
class TeacherRecipe:
    """The token-trained model. Without a ``path`` a small one is trained on the run's own text, once, and cached.

    Attributes:
        path: a Hugging Face folder or a GGUF file.
        config: the sizes of the model at ``path``, for ``--plan``; a model of other sizes is refused.
        architecture: of the small one: ``llama``, ``qwen3`` or ``olmo2``.
        vocab_size: of its byte-level BPE.
        hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, intermediate_size: its sizes.
        seconds: training time of the small one.
        bytes: its training bytes, in place of a time.
        lr, warmup, floor: its learning-rate schedule, as in :class:`StageRecipe`.
    """

    path: str | None = None
    config: TeacherConfig | None = None
    architecture: str = "llama"
    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    intermediate_size: int = 688
    seconds: float = 300
    bytes: int | None = None
    lr: float = 3e-3
    warmup: float = 0.05
    floor: float = 0.02

    @property
    def sizes(self) -> dict[str, int]:
        """The small one's own numbers."""
        names = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size"
        return {name: getattr(self, name) for name in names.split()}


@dataclass(frozen=True)
class DataRecipe:
    """Text and how it is cut.

    Attributes:
        paths: files, globs, and datasets of the `datasets` package (``hf:NAME``, ``hf:NAME:CONFIG``; the name may be
            a folder); empty for the documentation that every Python installation carries.
        split: of the datasets.
        download: fetch datasets whole before reading them; else they are read as they come over the network.
        limit_bytes: read at most this much text; None for all. Not for a stream.
        stream: read, tokenize and align text while training on it, instead of preparing all of it on disk first.
        streams: logical streams of the text, over all ranks: a multiple of the number of ranks.
        shuffle_bytes: text that is held in memory and shuffled, over all ranks.
        workers: processes of each rank that tokenize and align a stream; 0 for none beside the training process.
        window: bytes of one sequence, BOS included.
        batch_bytes: most bytes in one forward pass on one device.
        global_batch_bytes: bytes in one optimizer step over all devices.
        measure_bytes: held-out bytes that a stage's own metric is read on.
        score_bytes: held-out bytes that bits per byte are read on.
    """

    paths: tuple[str, ...] = ()
    split: str = "train"
    download: bool = False
    limit_bytes: int | None = None
    stream: bool = False
    streams: int = 64
    shuffle_bytes: int = 268_435_456
    workers: int = 1
    window: int = 8192
    batch_bytes: int = 65536
    global_batch_bytes: int = 2_097_152
    measure_bytes: int = 1_000_000
    score_bytes: int = 4_000_000


@dataclass(frozen=True)
class ModelRecipe:
    """Sizes of the byte-level parts: see :class:`models.ByteLMConfig`.

    Attributes:
        suffix_features: the encoder has the teacher's embedding of the longest vocabulary string at each byte
            (:mod:`models.suffix`).
    """

    width: int = 1536
    encoder: str = "mamba2"
    encoder_layers: int = 4
    decoder_layers: int = 4
    state_size: int = 128
    expand: int = 2
    head_dim: int = 64
    num_groups: int = 1
    conv_kernel: int = 4
    attention_window: int = 256
    router: str = "integrated"
    router_layers: int = 2
    bridge_inner: int = 8192
    router_inner: int = 8192
    lookahead: bool = True
    constrain_chunks: bool = False
    chunk_cost: float = 0.0
    dechunk: str = "hold"
    draft_head: bool = False
    marginal_head: bool = False
    suffix_features: bool = False
    suffix_scope: str = "sequence"

    def settings(self, vocabulary_bytes: int) -> dict[str, Any]:
        """Settings of a :class:`models.ByteLMConfig`, for a teacher whose vocabulary has so many bytes."""
        settings = dataclasses.asdict(self)
        settings["suffix_bytes"] = vocabulary_bytes if settings.pop("suffix_features") else 0
        return settings


@dataclass(frozen=True)
class OptimizerRecipe:
    """Who moves the weights.

    Attributes:
        kind: AdamW (``adamw``), or Muon for the matrices beside it (``muon``).
        beta1, beta2: AdamW's.
        weight_decay: falls on matrices only.
        clip: most length of the gradient.
        max_skipped: steps in a row whose loss or gradient is not finite, and which therefore move nothing, before the
            run stops.
    """

    kind: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip: float = 1.0
    max_skipped: int = 10


@dataclass(frozen=True)
class ParallelRecipe:
    """How a model is spread over processes, and what is recomputed. One process holds everything.

    Attributes:
        shard: processes that hold a model's parts between them; 0 for all. With fewer the model is repeated: 8 on four
            nodes of eight devices keeps the gathering of parameters inside each node.
        checkpoint_activations: keep only what enters each block, and compute the rest again in the backward pass.
        compile: blocks by torch.compile.
    """

    shard: int = 0
    checkpoint_activations: bool = False
    compile: bool = False


@dataclass(frozen=True)
class LogRecipe:
    """Where a stage's numbers go, and how often.

    Attributes:
        every: optimizer steps from one log to the next.
        jsonl: write ``metrics.jsonl``.
        tensorboard: write TensorBoard's events.
        wandb: the Weights & Biases project to log to; None for none. Needs ``pip install wandb``.
        peak_tflops: TFLOP/s of one device that MFU is a share of; None for the published or measured peak.
    """

    every: int = 10
    jsonl: bool = True
    tensorboard: bool = True
    wandb: str | None = None
    peak_tflops: float | None = None


@dataclass(frozen=True)
class Recipe:
    """A whole run.

    Attributes:
        name: of the run's folder.
        curriculum: names of the stages in the order in which they run; the paper's, as far as the recipe has them,
            where it is None. A stage may be left out; ``joint`` stands for 1.1 to 1.3 at once.
        seed: of weights, data order and draws.
        precision: ``auto`` (bf16 compute where the device is fast at it), ``bf16`` or ``fp32``; masters are fp32.
        checkpoint_seconds: time between checkpoints inside a stage.
        keep_checkpoints: how many of them are kept.
        stage: the stages by name.
        parallel: how it is spread over processes.
        log: where numbers go.
        control: the same student with a fresh core, trained on stage 2.2's loss for as long as all stages together.
    """

    name: str
    stage: dict[str, StageRecipe]
    curriculum: tuple[str, ...] | None = None
    seed: int = 0
    precision: str = "auto"
    checkpoint_seconds: float = 300
    keep_checkpoints: int = 2
    teacher: TeacherRecipe = field(default_factory=TeacherRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    model: ModelRecipe = field(default_factory=ModelRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    parallel: ParallelRecipe = field(default_factory=ParallelRecipe)
    log: LogRecipe = field(default_factory=LogRecipe)
    control: StageRecipe | None = None

    def __post_init__(self) -> None:
        where = f"recipe {self.name}"
        for name, stage in self.stage.items():
            if name not in KNOWN_STAGES:
                raise UserError(f"{where}: unknown stage {name!r}; the stages are {', '.join(STAGES)} and {JOINT}")
            check_stage(f"{where}: stage {name}", name, stage)
            if stage.vocabulary_share and self.data.stream:
                raise UserError(
                    f"{where}: stage {name}: vocabulary_share counts tokens in a text that is prepared: set "
                    "data.stream=false, or leave it out"
                )
        self._check_curriculum(where)
        if self.control:
            check_stage(f"{where}: control", "control", self.control, needs_length=False)
        check_one_of(where, self, "precision", ("auto", "bf16", "fp32"))
        check_one_of(f"{where}: optimizer", self.optimizer, "kind", ("adamw", "muon"))
        check_one_of(f"{where}: teacher", self.teacher, "architecture", ARCHITECTURES)
        check_positive(f"{where}: teacher", self.teacher, "seconds", "bytes", "lr", "vocab_size", *self.teacher.sizes)
        check_share(f"{where}: teacher", self.teacher, "warmup", "floor")
        if self.teacher.hidden_size % self.teacher.num_attention_heads:
            raise UserError(f"{where}: teacher: num_attention_heads must divide hidden_size {self.teacher.hidden_size}")
        if self.teacher.num_attention_heads % self.teacher.num_key_value_heads:
            raise UserError(f"{where}: teacher: num_key_value_heads must divide num_attention_heads")
        check_positive(where, self, "keep_checkpoints")
        if self.teacher.config is not None:
            numbers = [f.name for f in dataclasses.fields(TeacherConfig) if f.type is int]
            check_positive(f"{where}: teacher.config", self.teacher.config, *numbers)
        check_positive(f"{where}: optimizer", self.optimizer, "clip")
        check_not_negative(f"{where}: optimizer", self.optimizer, "max_skipped")
        check_not_negative(f"{where}: parallel", self.parallel, "shard")
        check_positive(f"{where}: log", self.log, "every", "peak_tflops")
        if self.log.wandb is not None and not self.log.wandb.strip():
            raise UserError(f"{where}: log: wandb names a project, got {self.log.wandb!r}; leave it out for none")
        sizes = ("batch_bytes", "global_batch_bytes", "measure_bytes", "score_bytes", "limit_bytes")
        check_positive(f"{where}: data", self.data, *sizes, "streams", "shuffle_bytes")
        _check_data(f"{where}: data", self.data)
        if not 3 <= self.data.window <= self.data.batch_bytes:
            raise UserError(
                f"{where}: data: window must hold BOS, a byte and EOS and fit in batch_bytes {self.data.batch_bytes}, "
                f"got {self.data.window}"
            )
        repeated = next((name for name, stage in self.stage.items() if stage.remember_bytes), None)
        if repeated and self.data.stream:
            raise UserError(
                f"{where}: stage {repeated}: remember_bytes is of text that is prepared, and a stream reads on: "
                "leave it out, or set data.stream=false"
            )
        marginal = next((name for name, stage in self.stage.items() if stage.byte_marginals), None)
        if marginal and not self.model.lookahead:
            raise UserError(
                f"{where}: stage {marginal}: byte_marginals go by the tokenizer's chunk ends, and "
                "model.lookahead=false by their starts: leave one of them out"
            )
        try:
            ByteLMConfig(**self.model.settings(vocabulary_bytes=1))
        except ValueError as error:
            raise UserError(f"{where}: model: {error}") from None

    def _check_curriculum(self, where: str) -> None:
        if self.curriculum is not None and not self.curriculum:
            raise UserError(f"{where}: curriculum is empty: name a stage, or leave it out for the paper's order")
        if self.curriculum is None and JOINT in self.stage:
            raise UserError(f"{where}: stage {JOINT} is in no order of its own: give a curriculum that names it")
        if not self.order:
            raise UserError(f'{where}: there is no stage: add a table such as [stage."1.1"]')
        for number, name in enumerate(self.order):
            if name not in KNOWN_STAGES:
                raise UserError(
                    f"{where}: curriculum: unknown stage {name!r}; the stages are {', '.join(STAGES)} and {JOINT}"
                )
            if name in self.order[:number]:
                raise UserError(f"{where}: curriculum names stage {name} twice: each has one result, so leave one out")
            if name not in self.stage:
                raise UserError(
                    f'{where}: curriculum names stage {name}, which has no numbers: add a table [stage."{name}"] with '
                    "its lr and its bytes or seconds, or leave it out"
                )

    @property
    def order(self) -> tuple[str, ...]:
        """The stages' names in the order in which they run."""
        if self.curriculum is not None:
            return self.curriculum
        return tuple(name for name in STAGES if name in self.stage)

    def stage_recipe(self, name: str) -> StageRecipe:
        """The numbers of a stage.

        Raises:
            UserError: the curriculum leaves it out.
        """
        if name not in self.order:
            raise UserError(
                f"recipe {self.name} has no stage {name} in its curriculum; it has {', '.join(self.order)}: "
                "set curriculum to one with it"
            )
        return self.stage[name]

    def before(self, name: str) -> str | None:
        """The stage that runs before one of the curriculum; None before the first."""
        number = self.order.index(name)
        return self.order[number - 1] if number else None

    def with_time(self, name: str, seconds: float) -> "Recipe":
        """The same run with one stage measured in seconds, so many of them.

        Raises:
            UserError: the curriculum leaves the stage out.
        """
        stage = dataclasses.replace(self.stage_recipe(name), seconds=seconds, bytes=None)
        return dataclasses.replace(self, stage={**self.stage, name: stage})

    def scaled(self, budget: float) -> "Recipe":
        """The same run with its training times scaled so that they sum to ``budget`` seconds.

        Raises:
            UserError: a stage is measured in bytes, so that its time is not known.
        """
        timed = [self.stage[name].seconds for name in self.order]
        if any(seconds is None for seconds in timed) or self.teacher.bytes is not None:
            raise UserError(f"recipe {self.name}: --budget needs stages, and a teacher, that are measured in seconds")
        own_teacher = 0.0 if self.teacher.path else self.teacher.seconds
        factor = budget / (sum(s for s in timed if s is not None) + own_teacher)
        stages = {
            name: dataclasses.replace(stage, seconds=stage.seconds * factor) if stage.seconds else stage
            for name, stage in self.stage.items()
        }
        teacher = dataclasses.replace(self.teacher, seconds=self.teacher.seconds * factor)
        return dataclasses.replace(self, stage=stages, teacher=teacher)


def batch_sizes(data: DataRecipe, stage: StageRecipe, processes: int) -> tuple[int, int]:
    """Bytes of one process's batch, and how many of them it takes for an optimizer step."""
    wanted = stage.global_batch_bytes or data.global_batch_bytes
    batch_bytes = max(data.window, min(data.batch_bytes, wanted // processes))
    return batch_bytes, max(1, round(wanted / (batch_bytes * processes)))


def _check_data(where: str, data: DataRecipe) -> None:
    if data.workers < 0:
        raise UserError(f"{where}: workers must be 0 or more, got {data.workers}")
    if data.stream and data.limit_bytes is not None:
        raise UserError(f"{where}: a stream reads on, and has no limit_bytes: leave it out, or set data.stream=false")


def read_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name (``quickstart``) or from a TOML file, and apply ``key=value`` overrides.

    An override is a line of TOML, such as ``data.window=1024`` or ``stage."2.2".lr=1e-4``; a bare word counts as a
    string.

    Raises:
        UserError: no such recipe, broken TOML, an unknown key, a value of the wrong type.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = RECIPES / f"{name_or_path}.toml"
    if not path.is_file():
        known = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.toml")))
        raise UserError(f"no recipe {name_or_path!r}: give a .toml file or one of {known}")
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path}: {error}") from None
    table.setdefault("name", path.stem)
    for override in overrides:
        merge(table, parse_override(override))
    return recipe_from(table)


def recipe_from(table: dict[str, Any]) -> Recipe:
    """A recipe from nested tables; it must have a name.

    Raises:
        UserError: an unknown key, a value of the wrong type or out of range.
    """
    recipe: Recipe = build(Recipe, table, f"recipe {table['name']}")
    stages = {name: recipe.stage[name] for name in KNOWN_STAGES if name in recipe.stage}
    return dataclasses.replace(recipe, stage=stages)


def parse_duration(text: str) -> float:
    """Seconds of ``90``, ``90s``, ``3m``, ``1.5h``.

    Raises:
        UserError: anything else, or not positive.
    """
    factors = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, factor = (text[:-1], factors[text[-1]]) if text and text[-1] in factors else (text, 1.0)
    try:
        seconds = float(number) * factor
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"a duration is a positive number with s, m or h, such as 90s or 3m; got {text!r}")
    return seconds
