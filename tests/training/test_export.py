"""A run's result as a Hugging Face folder."""

import re

import pytest
import torch

from models import ByteLM, ByteLMConfig
from training import export
from training.checkpoint import write_folder
from training.parallel import Ranks
from training.snapshot import Snapshots

SIZES = dict(width=16, encoder_layers=1, decoder_layers=1, state_size=8, head_dim=16, bridge_inner=32, router_inner=16)


@pytest.fixture
def run(teacher, tmp_path):
    """A run whose stage 1.1 has finished, and whose stage 1.2 has a checkpoint in which the encoder is all ones."""
    torch.manual_seed(0)
    model = ByteLM.from_teacher(teacher, ByteLMConfig(**SIZES))
    folder = tmp_path / "run"
    write_folder(folder / "stages" / "1.1", model.save_pretrained, {})
    snapshots = Snapshots(folder / "stages" / "1.2.checkpoint", Ranks(0, 1, torch.device("cpu")))
    ones = {f"model/{name}": torch.ones_like(p) for name, p in model.named_parameters() if name.startswith("encoder.")}
    snapshots.save(7, {**ones, "optimizer/x": torch.zeros(3)}, {"origin": "stage 1.1"})
    snapshots.wait()
    return folder, model


def exported(*arguments, expect=0):
    assert export.main([str(word) for word in arguments]) == expect


def test_the_last_finished_stage(run, tmp_path, capsys):
    folder, model = run
    exported(folder, tmp_path / "out")
    found = ByteLM.from_pretrained(tmp_path / "out")
    assert not found.config.token_head
    kept = {name: value for name, value in model.state_dict().items() if not name.startswith("token_head")}
    assert found.state_dict().keys() == kept.keys()
    assert all(torch.equal(value, kept[name]) for name, value in found.state_dict().items())
    assert "parameters in float32" in capsys.readouterr().out


def test_in_bfloat16(run, tmp_path):
    folder, model = run
    exported(folder, tmp_path / "out", "--dtype", "bfloat16", "--stage", "1.1")
    found = ByteLM.from_pretrained(tmp_path / "out")
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.decoder.head.weight, model.decoder.head.weight.bfloat16())


def test_a_checkpoint_of_a_stage_that_has_not_finished(run, tmp_path):
    folder, model = run
    exported(folder, tmp_path / "out", "--stage", "1.2", "--checkpoint")
    found = ByteLM.from_pretrained(tmp_path / "out")
    assert all((parameter == 1).all() for parameter in found.encoder.parameters())
    assert torch.equal(found.decoder.head.weight, model.decoder.head.weight)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stage", "2.2"], "stage 2.2 of .* is not finished .finished: 1.1"),
        (["--checkpoint"], "--checkpoint needs --stage"),
        (["--stage", "1.3", "--checkpoint"], "stage 1.3 of .* has no checkpoint"),
    ],
)
def test_mistakes_take_one_line(run, tmp_path, capsys, flags, message):
    folder, _ = run
    exported(folder, tmp_path / "out", *flags, expect=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("export.py: ")
    assert re.search(message, line)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_kept(run, tmp_path, capsys):
    folder, _ = run
    (tmp_path / "out").mkdir()
    exported(folder, tmp_path / "out", expect=2)
    assert "is there already: --overwrite" in capsys.readouterr().err
    exported(folder, tmp_path / "out", "--overwrite")
    exported(tmp_path / "nothing", tmp_path / "other", expect=2)
    assert "has no finished stage" in capsys.readouterr().err
