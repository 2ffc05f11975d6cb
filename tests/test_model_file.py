import pytest
import torch
from safetensors.torch import save_file

from limner.model_file import ModelFile, read_model


def model(**changes):
    values = {
        "task": "nuclei",
        "weights": {"a.weight": torch.arange(6.0).view(2, 3), "n": torch.tensor(4)},
        "settings": {"steps": 5, "loss": "weighted"},
        "pixel_size": 0.25,
        "record": {"seed": 3, "seconds": {"training": 1.5}},
    }
    return ModelFile(**(values | changes))


def test_round_trip(tmp_path):
    model().write(tmp_path / "m.safetensors")
    found = read_model(tmp_path / "m.safetensors", "nuclei")
    assert (found.task, found.settings, found.pixel_size, found.record) == (
        "nuclei",
        {"steps": 5, "loss": "weighted"},
        0.25,
        {"seed": 3, "seconds": {"training": 1.5}},
    )
    for name, weight in model().weights.items():
        torch.testing.assert_close(found.weights[name], weight)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_what_is_no_model_for_the_task_is_refused(tmp_path):
    file = tmp_path / "m.safetensors"
    with pytest.raises(ValueError, match=r"m.safetensors does not exist; name a model that `limner nuclei fit` wrote"):
        read_model(file, "nuclei")
    model(task="membranes").write(file)
    with pytest.raises(ValueError, match="is a model for membranes; give one for nuclei"):
        read_model(file, "nuclei")
    save_file({"a": torch.zeros(2)}, str(file))
    with pytest.raises(ValueError, match="is no model of Limner's"):
        read_model(file, "nuclei")


@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_a_truncated_file_is_named(tmp_path, kept):
    file = tmp_path / "m.safetensors"
    model().write(file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"m.safetensors cannot be read") as raised:
        read_model(file, "nuclei")
    assert "\n" not in str(raised.value)


def test_a_newer_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("limner.model_file.FORMAT", 9)
    model().write(tmp_path / "m.safetensors")
    monkeypatch.setattr("limner.model_file.FORMAT", 1)
    with pytest.raises(ValueError, match=r"comes from a newer Limner \(format 9\); update Limner"):
        read_model(tmp_path / "m.safetensors", "nuclei")
