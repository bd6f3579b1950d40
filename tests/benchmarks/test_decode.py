"""The decoding benchmark: all providers write the same bytes, and one that does not is refused."""

import json

import pytest
import torch

from benchmarks import bench_decode
from models import Sampling, Writer
from tests.models.conftest import small_model


def test_a_quick_run_reports_every_provider(tmp_path, capsys):
    path = tmp_path / "decode.json"
    small_model().save_pretrained(tmp_path / "model")
    assert (
        bench_decode.main(["--model", str(tmp_path / "model"), "--quick", "--device", "cpu", "--json", str(path)]) == 0
    )
    report = json.loads(path.read_text())
    assert [row["provider"] for row in report["rows"]] == ["bytekernels", "one by one", "recompute"]
    for row in report["rows"]:
        assert row["batch"] == 2 and 0 < row["new_bytes"] <= 32
        assert row["bytes_per_second"] == pytest.approx(row["new_bytes"] / row["seconds"])
    assert report["machine"]["torch"] == torch.__version__ and report["bytes"] == 16
    assert "bytes/s" in capsys.readouterr().out


def test_a_provider_that_writes_other_bytes_is_refused():
    model = small_model()

    def wrong(prompts, size):
        return [text.new for text in Writer(model, prompts, sampling=Sampling(temperature=1.0)).write(size)]

    providers = bench_decode.writers(model, None) | {"wrong": wrong, "silent": lambda prompts, size: [b""]}
    rows, refused = bench_decode.measure(providers, [1], 24, torch.device("cpu"), 1)
    assert [row.provider for row in rows] == ["bytekernels", "one by one", "recompute"]
    assert refused == ["wrong at batch 1 wrote other bytes", "silent at batch 1 wrote nothing"]


@pytest.mark.parametrize("flags", [["--batch", "0"], ["--bytes", "-1"], ["--repeats", "0"]])
def test_sizes_must_be_positive(flags, capsys):
    with pytest.raises(SystemExit):
        bench_decode.main(["--quick", "--device", "cpu", *flags])
    assert "must be at least 1" in capsys.readouterr().err
