"""A folder with a missing or truncated file is refused, and the error names the file."""

import pytest

from models import ByteLM
from tests.models.conftest import small_model


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_truncated_file_is_refused(kept, tmp_path):
    small_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises((OSError, ValueError), match=r"model\.safetensors"):
        ByteLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_refused(name, tmp_path):
    small_model().save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises((OSError, ValueError), match=name.replace(".", r"\.")):
        ByteLM.from_pretrained(tmp_path)
