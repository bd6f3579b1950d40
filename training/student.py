"""Byte-level models from folders that stages have written."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models import ByteLM, ByteLMConfig
from training.errors import UserError
from training.recipe import ModelRecipe

# What a stage may want otherwise than the model that it starts from.
_CHANGEABLE = ("chunk_cost", "constrain_chunks", "dechunk", "draft_head", "marginal_head")


def load_student(folder: Path, config: ByteLMConfig | None = None, *, decoder_is_trained: bool = False) -> ByteLM:
    """A byte-level model from a folder.

    Args:
        folder: written by a stage.
        config: the sizes it must have. Other rules for where chunks end are no obstacle, nor is another dechunk weight,
            or a draft head that is missing or too many: the dechunk, or the head, is then made anew or dropped. With a
            marginal head where there was none, or without, the whole decoder is made anew.
        decoder_is_trained: that would lose what stage 2.1 has learnt, and is refused.

    Raises:
        UserError: no such folder, no byte-level model in it, other sizes, or no token head for a marginal head.
    """
    check_model_folder(folder)
    try:
        model = ByteLM.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot load {folder}: {str(error).splitlines()[0]}") from error
    if config is None:
        return model
    for name, found, wanted in _sizes(model.config, config):
        if found != wanted:
            raise UserError(f"{folder} has {name} {found!r}, but the recipe and its teacher ask for {wanted!r}")
    if config.marginal_head and not model.config.token_head:
        raise UserError(f"{folder} has lost its token head, which marginal_head reads: start --from a stage's folder")
    if decoder_is_trained and model.config.marginal_head != config.marginal_head:
        raise UserError(
            f"{folder} was trained with model.marginal_head={model.config.marginal_head}, and the recipe has "
            f"{config.marginal_head}, for which its decoder would be made anew: run stage 2.1 with it first"
        )
    others = {name: getattr(config, name) for name in _CHANGEABLE}
    if all(getattr(model.config, name) == value for name, value in others.items()):
        return model
    anew = {"dechunk": "dechunk.", "marginal_head": "decoder."}
    parts = tuple(part for name, part in anew.items() if getattr(model.config, name) != others[name])
    kept = {name: value for name, value in model.state_dict().items() if not name.startswith(parts)}
    other = ByteLM(ByteLMConfig.from_dict({**model.config.to_dict(), **others}))
    own = other.state_dict()
    other.load_state_dict({name: kept.get(name, value) for name, value in own.items()})
    return other


def _sizes(found: ByteLMConfig, wanted: ByteLMConfig) -> Iterator[tuple[str, Any, Any]]:
    """(name, found, wanted) of whatever decides a parameter's shape or meaning, but for what may change."""
    unused = {"attention_window"} if wanted.encoder != "attention" else set()
    unused |= set() if wanted.suffix_bytes or found.suffix_bytes else {"suffix_scope"}
    unused |= {"router_layers"} if wanted.router != "split" else set()
    for name in ModelRecipe().settings(vocabulary_bytes=0):
        if name not in {*_CHANGEABLE, *unused}:
            yield name, getattr(found, name), getattr(wanted, name)
    for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        yield f"core.{name}", (found.core or {}).get(name), (wanted.core or {}).get(name)


def check_model_folder(folder: Path) -> None:
    """Raises UserError where no byte-level model is in a folder."""
    if not (folder / "config.json").is_file():
        raise UserError(f"no byte-level model in {folder}: give a folder that a stage has written")
