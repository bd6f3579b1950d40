"""Saved models: they come back bit for bit, and what is not whole is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from models import ByteLM, ByteTokenizer
from tests.models.conftest import packed_bytes, small_model, small_teacher

LOADERS = [ByteLM.from_pretrained, AutoModelForCausalLM.from_pretrained]


@pytest.fixture
def folder(tmp_path):
    small_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def shards(tmp_path):
    small_model().save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    return tmp_path / "shards"


def assert_refused(folder, error, message, **options):
    for load in LOADERS:
        with pytest.raises(error, match=message):
            load(folder, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("load", LOADERS)
def test_logits_are_the_same_bits_after_saving(dtype, load, tmp_path):
    model = small_model().to(dtype)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    batch = packed_bytes([7, 0, 900])
    assert type(loaded) is ByteLM and loaded.dtype == dtype and not loaded.training
    assert torch.equal(loaded(*batch).logits, model(*batch).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_dtype_can_be_asked_for(dtype, folder):
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    small_model().to(other).save_pretrained(folder)
    loaded = ByteLM.from_pretrained(folder, dtype=dtype)
    batch = packed_bytes([7, 40])
    assert {value.dtype for value in loaded.state_dict().values()} == {dtype}
    assert torch.equal(loaded(*batch).logits, small_model().to(other).to(dtype)(*batch).logits)


@pytest.mark.parametrize("load", LOADERS)
def test_the_dtype_of_a_teachers_own_file_decides_nothing(load, tmp_path):
    """A teacher of a GGUF file says float32 in its configuration, which a folder in bfloat16 keeps."""
    core = {**small_model().config.core, "dtype": "float32"}
    model = small_model(core=core).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded, batch = load(tmp_path), packed_bytes([7, 40])
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.bfloat16}
    assert torch.equal(loaded(*batch).logits, model(*batch).logits)


def test_casting_leaves_the_cores_positions_exact():
    model = small_model()
    wanted = {name: buffer.clone() for name, buffer in model.named_non_persistent_buffers()}
    found = dict(model.to(torch.bfloat16).named_non_persistent_buffers())
    assert "core.backbone.rotary_emb.inv_freq" in wanted
    assert all(torch.equal(found[name], buffer) for name, buffer in wanted.items())


def test_the_folder_brings_tokenizer_and_generation_settings(folder):
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json")
    }
    assert type(AutoTokenizer.from_pretrained(folder)) is ByteTokenizer
    settings = GenerationConfig.from_pretrained(folder)
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (0xFE, 0xFF, 0xFF)
    assert settings.top_k is None


def test_shards_load(shards):
    assert len(list(shards.glob("*.safetensors"))) > 2
    batch = packed_bytes([20])
    assert torch.equal(ByteLM.from_pretrained(shards)(*batch).logits, small_model()(*batch).logits)


def cut(file, keep):
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    sizes = dict(nothing=0, length=5, header=header // 2, start=header, data=(header + len(data)) // 2)
    file.write_bytes(data[: sizes.get(keep, len(data) - 1)])


@pytest.mark.parametrize("keep", ["nothing", "length", "header", "start", "data", "all but one byte"])
def test_cut_weights_are_refused_by_name(keep, folder, shards):
    cut(folder / "model.safetensors", keep)
    assert_refused(folder, ValueError, r"model\.safetensors \(\d+ bytes\) is not a whole safetensors file")
    shard = sorted(shards.glob("*.safetensors"))[1]
    cut(shard, keep)
    assert_refused(shards, ValueError, f"{shard.name} .* is not a whole safetensors file .* copy or save it again")


def test_other_damage_is_refused_by_name(folder):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    for damaged in (data + b"\0", data[:8] + b"x" + data[9:], b"\xff" * 8 + data[8:], b"version https://git-lfs\n"):
        file.write_bytes(damaged)
        assert_refused(folder, ValueError, "model.safetensors .* is not a whole safetensors file")


def test_missing_files_are_refused_by_name(folder, shards):
    (folder / "model.safetensors").unlink()
    assert_refused(folder, OSError, "model.safetensors is not there: copy the whole folder")
    torch.save({}, folder / "pytorch_model.bin")
    assert_refused(folder, OSError, "pytorch_model.bin can't be used, since unpickling runs code")
    shard = sorted(shards.glob("*.safetensors"))[-1]
    shard.unlink()
    assert_refused(shards, OSError, f"{shard.name} is not there: model.safetensors.index.json names it")


def test_damaged_descriptions_are_refused_by_name(folder, shards):
    (shards / "model.safetensors.index.json").write_text("{}")
    assert_refused(shards, ValueError, "index.json has no weight_map")
    (folder / "generation_config.json").write_text("{")
    assert_refused(folder, ValueError, "generation_config.json is not JSON")
    (folder / "generation_config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "By')
    assert_refused(folder, ValueError, "tokenizer_config.json is not JSON")
    with pytest.raises(ValueError, match="tokenizer_config.json is not JSON"):
        ByteTokenizer.from_pretrained(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json must hold a JSON object, got list"):
        ByteLM.from_pretrained(folder)
    (folder / "config.json").write_bytes(b'{"width": \xff')
    with pytest.raises(ValueError, match="config.json is not JSON"):
        ByteLM.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json is not there"):
        ByteLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(metadata=None), "index.json has no metadata, an object"),
        (dict(metadata=[]), "index.json has no metadata, an object"),
        (dict(weight_map={"a": 3}), "index.json names the shard 3, which is no file beside it"),
        (dict(weight_map={"a": "../x.safetensors"}), "index.json names the shard '../x.safetensors', which is no file"),
        (dict(weight_map={"a": "/x.safetensors"}), "index.json names the shard '/x.safetensors', which is no file"),
        (dict(weight_map={"a": ""}), "index.json names the shard '', which is no file"),
        (dict(weight_map={"a": "x.safetensors", "b": None}), "index.json names the shard None, which is no file"),
    ],
)
def test_an_index_that_names_no_shards_beside_it_is_refused(shards, change, message):
    index = shards / "model.safetensors.index.json"
    content = json.loads(index.read_text()) | change
    index.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    assert_refused(shards, ValueError, message)


def test_folders_of_something_else_are_refused(folder, tmp_path):
    small_teacher().save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="says model_type='llama', not 'bytekernels'"):
        ByteLM.from_pretrained(tmp_path / "teacher")
    with pytest.raises(NotADirectoryError, match="nowhere is no folder"):
        ByteLM.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match="config.json is no folder"):
        ByteLM.from_pretrained(folder / "config.json")
    with pytest.raises(NotADirectoryError, match="config.json is a file: name a folder"):
        small_model().save_pretrained(folder / "config.json")
    with pytest.raises(ValueError, match="use_safetensors=False"):
        ByteLM.from_pretrained(folder, use_safetensors=False)


def change_weights(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_weights_of_another_model_are_refused_by_name(folder):
    change_weights(folder, lambda tensors: tensors.pop("decoder.head.weight"))
    assert_refused(folder, ValueError, r"1 tensors are missing \(decoder.head.weight\)")
    change_weights(folder, lambda tensors: tensors.update({"decoder.head.weight": torch.zeros(512, 25)}))
    message = r"1 tensors have another shape \(decoder.head.weight \[512, 25\] for \[512, 24\]\)"
    assert_refused(folder, ValueError, message)
    change_weights(folder, lambda tensors: tensors.update({"decoder.head.weight": torch.zeros(512, 24)}))
    change_weights(folder, lambda tensors: tensors.update({"decoder.bead.weight": torch.zeros(1)}))
    assert_refused(folder, ValueError, r"1 tensors belong to no part of the model \(decoder.bead.weight\)")


def test_a_configuration_of_another_model_is_refused(folder):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "encoder_layers": 3}))
    assert_refused(folder, ValueError, r"tensors are missing \(encoder.stack.blocks.2.* more\)")


def test_random_weights_and_the_loading_report_can_be_asked_for(folder):
    change_weights(folder, lambda tensors: tensors.update({"decoder.head.weight": torch.zeros(512, 25)}))
    model, info = ByteLM.from_pretrained(folder, ignore_mismatched_sizes=True, output_loading_info=True)
    assert type(model) is ByteLM and [name for name, *_ in info["mismatched_keys"]] == ["decoder.head.weight"]
