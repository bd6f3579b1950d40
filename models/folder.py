"""What a folder with a saved model must hold, checked before anything is loaded from it."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

CONFIG, INDEX = "config.json", "model.safetensors.index"
OTHERS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def check_folder(folder: Path, model_type: str, variant: str | None = None) -> None:
    """Refuse a folder that a model can't be loaded from whole.

    Args:
        folder: with ``config.json`` and ``model.safetensors``, or shards and their index.
        model_type: what ``config.json`` must say.
        variant: of the weights, as in ``model.bf16.safetensors``.

    Raises:
        OSError: a file is missing.
        ValueError: a file is not JSON, says another ``model_type``, or is not a whole safetensors file.
    """
    config = _read_json(_require(folder / CONFIG, "copy the whole folder that save_pretrained made"))
    if config.get("model_type") != model_type:
        raise ValueError(
            f"{folder / CONFIG} says model_type={config.get('model_type')!r}, not {model_type!r}: name the folder of a "
            "byte-level model (a teacher becomes one through training/stage.py)"
        )
    check_descriptions(folder)
    for file in _weight_files(folder, "" if variant is None else f".{variant}"):
        check_safetensors(file)


def check_descriptions(folder: Path) -> None:
    """Refuse a folder whose settings of generation or of the tokenizer, where it has them, are not whole.

    Raises:
        ValueError: a file is not JSON.
    """
    for name in OTHERS:
        if (folder / name).exists():
            _read_json(folder / name)


def check_safetensors(file: Path) -> None:
    """Refuse a file whose length or contents are not what its header says.

    Raises:
        ValueError: with the file's name and what is wrong.
    """
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is not a whole safetensors file ({error}): it was cut short or "
            "written over; copy or save it again"
        ) from None


def _weight_files(folder: Path, variant: str) -> list[Path]:
    whole, index = folder / f"model{variant}.safetensors", folder / f"{INDEX}{variant}.json"
    if whole.exists() or not index.exists():
        fix = "copy the whole folder that save_pretrained made"
        if pickles := ", ".join(sorted(path.name for path in folder.glob("pytorch_model*"))):
            fix = f"{pickles} can't be used, since unpickling runs code that the file brings; convert it to safetensors"
        return [_require(whole, fix)]
    content = _read_json(index)
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index} has no weight_map that names the shards: copy or save it again")
    if not isinstance(content.get("metadata"), dict):
        raise ValueError(f"{index} has no metadata, an object: copy or save it again")
    for shard in shards.values():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            raise ValueError(f"{index} names the shard {shard!r}, which is no file beside it: copy or save it again")
    return [
        _require(folder / shard, f"{index.name} names it; copy it beside the others")
        for shard in sorted({*shards.values()})
    ]


def _require(file: Path, fix: str) -> Path:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there: {fix}")
    return file


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): copy or save it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}: copy or save it again")
    return content
