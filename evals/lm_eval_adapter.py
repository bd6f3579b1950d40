"""Byte-level models under lm-evaluation-harness (>= 0.4.9), as its model ``bytekernels``.

    python -m evals.lm_eval_adapter --model_args pretrained=runs/quickstart/model --tasks NAME …

is lm-eval's own command line with this model chosen, its device found and ``--batch_size auto``; all of lm-eval's flags
may follow. From Python, importing this module makes ``lm_eval.simple_evaluate(model="bytekernels", …)`` work. Under
torchrun every process answers a share of the requests.

No tokenizer takes part. A log-likelihood is :class:`models.Scorer`'s, an honest lower bound on that of the bytes given
the bytes before (BOS before an empty context), and since a context may end anywhere in bytes, spaces are not moved from
context to continuation as they are for tokens. Tasks count lengths in tokens: ``max_gen_toks`` and its other names are
multiplied by ``bytes_per_token``; ``max_gen_bytes`` says it in bytes.

An answer depends neither on ``batch_size`` nor on the other requests: log-likelihoods are equal within rounding, and
texts exactly equal where that was measured (``docs/scoring.md``).
"""

import hashlib
import math
import operator
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
import torch.distributed as dist
from tqdm import tqdm

from evals.examinee import examinee
from models import ByteLM, Sampling, TokenScorer, generate
from models.beam import Combine
from models.command import DTYPES
from models.scoring import batches
from models.utf8 import to_bytes
from models.writer import Mode
from training import parallel
from training.errors import UserError

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error.name} is not installed: pip install -e '.[eval]'", name=error.name) from None

MAX_GEN_TOKS = 256  # where a task says nothing: lm-eval's own default
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def _whole(value: Any) -> int:
    return int(value) if isinstance(value, str) else operator.index(value)


SAMPLING: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("top_k", "seed"), _whole),
    **dict.fromkeys(("top_p", "min_p", "repetition_penalty"), float),
}
KNOWN = ("until", "max_gen_bytes", *LENGTHS, "do_sample", "temperature", *SAMPLING)


class Writing(NamedTuple):
    """How one request is to be continued.

    Attributes:
        max_new_bytes: the most bytes to write.
        stop: strings that end it, left out of the answer.
        sampling: how bytes are drawn.
    """

    max_new_bytes: int
    stop: tuple[str, ...]
    sampling: Sampling


def read_generation(arguments: Mapping[str, Any], bytes_per_token: float) -> Writing:
    """lm-eval's ``generation_kwargs``, in bytes.

    Greedy unless ``do_sample`` is true or ``temperature`` above 0; sampled without a temperature it is 1. Of several
    lengths the first in ``max_gen_bytes``, ``max_gen_toks``, ``max_new_tokens``, … holds. ``use_cache`` is ignored.

    Raises:
        UserError: an argument that is not known here, or a value that it can't have.
    """
    given = {name: value for name, value in arguments.items() if value is not None and name != "use_cache"}
    if given.pop("num_beams", 1) != 1:
        raise UserError(f"num_beams={arguments['num_beams']}: a byte-level model writes without beams; use num_beams=1")
    if unknown := given.keys() - set(KNOWN):
        name = min(unknown)
        raise UserError(f"generation argument {name}={given[name]!r} is not known; there are {', '.join(KNOWN)}")
    until = given.get("until", ())
    stop = tuple(until) if isinstance(until, list | tuple) else (until,)
    if wrong := [word for word in stop if not isinstance(word, str)]:
        raise UserError(f"until={until!r}: {wrong[0]!r} is not a string; give a string or a list of strings")
    sample = given.get("do_sample", "temperature" in given)
    if sample not in (True, False):
        raise UserError(f"generation argument do_sample={sample!r}: give True or False")
    lengths = {"max_gen_bytes": 1.0, **dict.fromkeys(LENGTHS, bytes_per_token)}
    length = next((name for name in lengths if name in given), "max_gen_toks")
    wanted = _number(f"generation argument {length}", given.get(length, MAX_GEN_TOKS), least=0) * lengths[length]
    try:
        chosen = {name: kind(given[name]) for name, kind in SAMPLING.items() if name in given}
        sampling = Sampling(temperature=float(given.get("temperature", 1)) if sample else 0.0, **chosen)
    except (TypeError, ValueError) as error:
        raise UserError(f"generation arguments {dict(arguments)}: {error}") from None
    return Writing(round(wanted), tuple(word for word in stop if word), sampling)


@register_model("bytekernels")
class ByteLMEval(LM):
    """A byte-level model that lm-eval can ask; or, to compare with, its teacher or a model of stage 1, scored in bytes.

    Args:
        pretrained: the folder of a model after stage 2; or the model, in evaluation mode, on its device.
        teacher: a Hugging Face folder or a GGUF file. Alone, the teacher itself is scored; with a model of stage 1 as
            ``pretrained``, that model is, at the ends of the teacher's tokens. Neither writes.
        dtype: ``float32`` or ``bfloat16``, of the weights that are read.
        batch_bytes: bytes that are scored in one forward pass.
        beam: paths of boundary bits for each text when scoring; more give a tighter bound.
        combine: what is made of these paths: their ``sum``, or the ``best``.
        truncate: drop the beginning of a context that makes more chunks than the core has positions, instead of an
            error; where the model writes, less one for every ``bytes_per_token`` that it may write.
        bytes_per_token: what one token of a task's ``max_gen_toks`` is worth.
        mode: ``joint`` or ``multibyte``, how the model writes.
        batch_size: requests that are served at once, or ``auto`` (or lm-eval's ``auto:N``): as many as ``batch_bytes``
            hold.
        max_batch_size: the most for ``auto``.
        device: ``cuda`` or ``cpu``; None takes a GPU where there is one.

    Raises:
        UserError: an argument that is not known, or a value that it can't have.
    """

    def __init__(
        self,
        pretrained: str | Path | ByteLM | None = None,
        *,
        teacher: str | Path | None = None,
        dtype: str = "float32",
        batch_bytes: int | str = 65536,
        beam: int | str = 1,
        combine: Combine = "sum",
        truncate: bool = False,
        bytes_per_token: float | str = 4,
        mode: Mode = "joint",
        batch_size: int | str | None = "auto",
        max_batch_size: int | str | None = None,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            known = [name for name in ByteLMEval.__init__.__annotations__ if name not in ("unknown", "return")]
            name, value = next(iter(unknown.items()))
            raise UserError(f"model argument {name}={value!r} is not known; there are {', '.join(known)}")
        for name, value, allowed in (
            ("dtype", dtype, tuple(DTYPES)),
            ("combine", combine, get_args(Combine)),
            ("truncate", truncate, (True, False)),
            ("mode", mode, get_args(Mode)),
        ):
            if value not in allowed:
                raise UserError(f"model argument {name}={value!r}: use one of {', '.join(map(str, allowed))}")
        self.batch_bytes, self.mode = _count("batch_bytes", batch_bytes), mode
        auto = batch_size is None or re.fullmatch(r"auto(:\d+)?", str(batch_size))
        self.batch_size = None if auto else _count("batch_size", batch_size)
        self.max_batch_size = None if max_batch_size is None else _count("max_batch_size", max_batch_size)
        self.bytes_per_token = _number("model argument bytes_per_token", bytes_per_token, least=1)
        paths = _count("beam", beam)
        self.ranks = parallel.start(device)
        self._device = self.ranks.device
        if pretrained is None and teacher is None:
            raise UserError("no model is given: --model_args pretrained=MODEL, such as runs/quickstart/model")
        self.examinee = examinee(
            pretrained,
            teacher,
            dtype=dtype,
            device=self._device,
            batch_bytes=self.batch_bytes,
            beam=paths,
            combine=combine,
            truncate=truncate,
            mode=mode,
        )
        self.model, self.scorer = self.examinee.model, self.examinee.scorer

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, would greedy decoding write it) of each continuation, in nats, given its context."""
        pairs = _each("loglikelihood", requests, lambda x, y: (to_bytes(x), to_bytes(y)))

        def answer(batch: list[int]) -> list[tuple[float, bool]]:
            return [(s.log_likelihood, s.is_greedy) for s in self.scorer.score([pairs[i] for i in batch])]

        cut = self._batches([len(context) + len(continuation) for context, continuation in pairs])
        return self._serve("loglikelihood", requests, cut, answer, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in nats, given BOS."""
        texts = _each("loglikelihood_rolling", requests, to_bytes)

        def answer(batch: list[int]) -> list[float]:
            return [s.log_likelihood for s in self.scorer.rolling([texts[i] for i in batch])]

        return self._serve(
            "loglikelihood_rolling", requests, self._batches(list(map(len, texts))), answer, disable_tqdm
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop string (left out), the document's end or the length.

        Draws depend on the context, how often it was asked before, and ``seed``, and on no other request.
        """
        scorer = self.scorer
        if isinstance(scorer, TokenScorer):
            raise UserError("models before stage 2 and teachers are only scored here: leave out tasks that generate")
        prompts = _each("generate_until", requests, lambda context, _: to_bytes(context))
        writings = _each("generate_until", requests, lambda _, given: read_generation(given, self.bytes_per_token))
        groups: dict[int, list[int]] = {}
        samplings, asked = [], Counter[bytes]()
        for i, (prompt, writing) in enumerate(zip(prompts, writings, strict=True)):
            groups.setdefault(writing.max_new_bytes, []).append(i)
            samplings.append(replace(writing.sampling, seed=_seed(prompt, asked[prompt], writing.sampling.seed)))
            asked[prompt] += 1

        def answer(batch: list[int]) -> list[str]:
            max_new_bytes = writings[batch[0]].max_new_bytes
            spare = math.ceil(max_new_bytes / self.bytes_per_token)
            written = generate(
                scorer.model,
                [scorer.fitted_context(prompts[i], spare=spare) for i in batch],
                max_new_bytes=max_new_bytes,
                sampling=[samplings[i] for i in batch],
                stop=[writings[i].stop for i in batch],
                mode=self.mode,
            )
            return [generation.new_text for generation in written]

        costs = [len(prompt) + writing.max_new_bytes for prompt, writing in zip(prompts, writings, strict=True)]
        cut = [
            [group[place] for place in batch]
            for group in groups.values()
            for batch in self._batches([costs[i] for i in group])
        ]
        return self._serve("generate_until", requests, cut, answer, disable_tqdm)

    @property
    def tokenizer_name(self) -> str:
        """Empty: there is no tokenizer, so nothing of one marks lm-eval's cached requests."""
        return ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Byte-level models have no chat template.

        Raises:
            UserError: always.
        """
        raise UserError("a byte-level model has no chat template: leave out --apply_chat_template")

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside its results."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "likelihood": self.examinee.likelihood,
            "bytes_per_token": self.bytes_per_token,
            "processes": self.ranks.size,
        }

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Requests of these lengths in batches, longest first."""
        auto = self.batch_size is None
        most = self.max_batch_size if auto else self.batch_size
        runs = batches(lengths, self.batch_bytes if auto else sys.maxsize)
        return [run[i : i + (most or len(run))] for run in runs for i in range(0, len(run), most or len(run))]

    def _serve(
        self,
        kind: str,
        requests: list[Instance],
        cut: list[list[int]],
        answer: Callable[[list[int]], list[Any]],
        disable_tqdm: bool,
    ) -> list[Any]:
        """Answers in the requests' order; each process sees to its share of the batches and then tells the others."""
        mine = cut[self.ranks.rank :: self.ranks.size]
        found: dict[int, Any] = {}
        total = sum(map(len, mine))
        with tqdm(total=total, desc=f"{kind} requests", disable=disable_tqdm or not self.ranks.is_main) as bar:
            for batch in mine:
                for i, result in zip(batch, _answers(kind, requests, batch, answer), strict=True):
                    found[i] = result
                    self.cache_hook.add_partial(kind, requests[i].args, result)
                bar.update(len(batch))
        if self.ranks.size > 1:
            parts: list[dict[int, Any]] = [{} for _ in range(self.ranks.size)]
            dist.all_gather_object(parts, found)
            found = {i: result for part in parts for i, result in part.items()}
        return [found[i] for i in range(len(requests))]


@contextmanager
def _named(kind: str, requests: Sequence[Instance], place: int) -> Iterator[None]:
    """Says of a mistake in which request it is."""
    try:
        yield
    except (ValueError, UserError) as error:
        request = requests[place]
        name = f"{kind} request {place}"
        if request.task_name is not None:
            name = f"task {request.task_name}, document {request.doc_id}, {kind} request {request.idx}"
        raise UserError(f"{name}: {str(error).removeprefix('pair 0: ')}") from error


def _each(kind: str, requests: Sequence[Instance], read: Callable[..., Any]) -> list[Any]:
    """What is read from the arguments of every request."""
    found = []
    for place, request in enumerate(requests):
        with _named(kind, requests, place):
            found.append(read(*request.args))
    return found


def _answers(
    kind: str, requests: Sequence[Instance], batch: list[int], answer: Callable[[list[int]], list[Any]]
) -> list[Any]:
    """A batch's answers; where it is refused, its requests are asked one by one, so that the error names the one."""
    try:
        return answer(batch)
    except ValueError:
        found = []
        for place in batch:
            with _named(kind, requests, place):
                found += answer([place])
        return found


def _number(what: str, value: Any, *, least: float) -> float:
    with suppress(TypeError, ValueError):
        if least <= float(value) < math.inf:
            return float(value)
    raise UserError(f"{what}={value!r} is not a number >= {least:g}")


def _count(name: str, value: Any) -> int:
    with suppress(TypeError, ValueError):
        if _whole(value) >= 1:
            return _whole(value)
    raise UserError(f"model argument {name}={value!r} is not a whole number >= 1")


def _seed(prompt: bytes, times: int, seed: int) -> int:
    digest = hashlib.blake2b(prompt, digest_size=7, salt=times.to_bytes(8), person=(seed % 2**64).to_bytes(8))
    return int.from_bytes(digest.digest())


def main(arguments: Sequence[str]) -> None:
    """lm-eval's command line; where it evaluates, its defaults are this model, the device that is there, and any batch.

    Defaults other than the model are left to a ``--config`` file where one is given.
    """
    arguments = list(arguments)
    at = 1 if arguments[:1] == ["run"] else 0
    if arguments[at:] and arguments[at].startswith("-") and arguments[at] not in ("-h", "--help"):
        defaults = ["--model", "bytekernels"]
        if not any(argument.split("=")[0] in ("-C", "--config") for argument in arguments):
            device = "cuda" if torch.cuda.is_available() else "cpu"
            defaults += ["--device", device, "--batch_size", "auto"]
        arguments[at:at] = defaults
    sys.argv = ["lm_eval", *arguments]
    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        parallel.finish()


if __name__ == "__main__":
    main(sys.argv[1:])
