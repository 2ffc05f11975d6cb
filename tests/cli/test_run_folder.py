"""What a run may write, replace and remove in its folder."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from limner.cli.run_folder import RunFolder
from limner.run_record import RunRecord, read_record

NEW = RunRecord(
    command=(), settings={"seed": 0}, inputs={"images": {"a": "1"}, "labels": {"b": "2"}}, device="cpu", seed=0
)


def write_files(**contents: str):  # type: ignore[no-untyped-def]
    def write(folder: Path) -> None:
        for name, text in contents.items():
            path = folder / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)

    return write


def run(folder: RunFolder, record: RunRecord, overwrite: bool = False, **contents: str) -> RunRecord:
    running = folder.begin(record, folder.earlier_run(record, overwrite))
    folder.finish(running, running.completed(), write_files(**contents))
    return read_record(folder.path / "run.json")


def texts(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): p.read_text()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "run.json"
    }


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_results_are_put_in_place_and_noted(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "new" / "out")
    done = run(folder, NEW, labels__s1_png="1", report_html="r")
    assert texts(folder.path) == {"labels/s1.png": "1", "report.html": "r"}
    assert done.status == "complete"
    assert done.outputs == {"labels/s1.png": sha("1"), "report.html": sha("r")}
    assert folder.holds(done, NEW)


def test_a_run_holds_only_what_was_asked_for(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")
    done = run(folder, NEW, labels_tif="1")
    assert not folder.holds(replace(done, status="running"), NEW)
    assert not folder.holds(done, replace(NEW, settings={"seed": 1}))
    assert not folder.holds(done, replace(NEW, options={"labelled": [1]}))
    assert not folder.holds(done, replace(NEW, inputs={**NEW.inputs, "labels": {"b": "3"}}))
    (folder.path / "labels.tif").unlink()
    assert not folder.holds(done, NEW)


def test_changed_labels_go_on_but_other_settings_and_images_do_not(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")
    run(folder, NEW, labels_tif="1")
    corrected = replace(NEW, inputs={**NEW.inputs, "labels": {"b": "3"}}, options={"labelled": [1]})
    assert folder.earlier_run(corrected, overwrite=False) is not None
    other = replace(NEW, settings={"seed": 1, "method": "gem"}, inputs={"images": {"a": "9"}})
    with pytest.raises(ValueError, match="differs in images, method, seed; name another folder, or add --overwrite"):
        folder.earlier_run(other, overwrite=False)
    assert folder.earlier_run(other, overwrite=True) is not None


def test_overwriting_replaces_and_removes_limners_own_files_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")
    run(folder, NEW, labels__s1_png="1", probabilities__s1_tif="p", report_html="r")
    (folder.path / "labels" / "mine.png").write_text("mine")
    (folder.path / "notes.txt").write_text("mine")
    done = run(folder, replace(NEW, settings={"seed": 1}), overwrite=True, labels__s1_png="2", report_html="s")
    assert texts(folder.path) == {
        "labels/mine.png": "mine",
        "labels/s1.png": "2",
        "notes.txt": "mine",
        "report.html": "s",
    }
    assert not (folder.path / "probabilities").exists()
    assert list(done.outputs) == ["labels/s1.png", "report.html"]


def test_results_of_a_batch_are_put_in_place_one_by_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")
    running = folder.begin(NEW, None)
    running = folder.put(running, write_files(labels__a_png="1", objects__a_csv="1"))
    running = folder.put(running, write_files(labels__b_png="2"))
    (folder.path / "labels" / "b.png").write_text("a user's")
    running = folder.put(running, write_files(labels__a_tif="3"), ["labels/a.png", "objects/a.csv"])
    assert texts(folder.path) == {"labels/a.tif": "3", "labels/b.png": "a user's"}
    assert read_record(folder.path / "run.json") == running
    assert running.outputs == {"labels/b.png": sha("2"), "labels/a.tif": sha("3")}
    for name in ("labels/b.png", "labels/c.png"):
        (folder.path / name).write_text("a user's")
        with pytest.raises(ValueError, match=f"{name} was"):
            folder.put(running, write_files(**{name.replace("/", "__").replace(".", "_"): "4"}))
        with pytest.raises(ValueError, match=r"labels/b.png was changed"):
            folder.put(running, write_files(labels__d_png="4"), ["labels/b.png"])
    left = {name: text for name, text in texts(folder.path).items() if not name.startswith(".resume")}
    assert left == {"labels/a.tif": "3", "labels/b.png": "a user's", "labels/c.png": "a user's"}


def test_a_users_file_with_the_name_of_a_result_stops_the_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")
    running = folder.begin(NEW, None)
    (folder.path / "report.html").write_text("mine")
    with pytest.raises(ValueError, match=r"report\.html was not written by Limner"):
        folder.finish(running, running.completed(), write_files(report_html="r", labels_tif="1"))
    assert texts(folder.path)["report.html"] == "mine"
    assert not (folder.path / "labels.tif").exists()


def test_a_file_that_was_changed_stops_the_next_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")
    run(folder, NEW, labels_tif="1", report_html="r")
    (folder.path / "labels.tif").write_text("2")
    corrected = replace(NEW, inputs={**NEW.inputs, "labels": {"b": "3"}})
    for new in (NEW, corrected):
        with pytest.raises(ValueError, match=r"labels\.tif was changed since Limner wrote it; move it away, name ano"):
            folder.earlier_run(new, overwrite=False)
    earlier = folder.earlier_run(NEW, overwrite=True)
    assert earlier is not None
    assert not folder.holds(earlier, NEW)
    run(folder, corrected, overwrite=True, labels_tif="1", report_html="s")
    assert texts(folder.path) == {"labels.tif": "1", "report.html": "s"}


def test_a_file_that_is_gone_is_written_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")
    done = run(folder, NEW, labels_tif="1", report_html="r")
    (folder.path / "labels.tif").unlink()
    assert not folder.holds(done, NEW)
    assert run(folder, NEW, labels_tif="1", report_html="r").outputs == done.outputs
    assert texts(folder.path) == {"labels.tif": "1", "report.html": "r"}


@pytest.mark.parametrize("contents", [{"labels_tif": "2"}, {"report_html": "r"}], ids=["to replace", "to remove"])
def test_a_file_that_is_changed_while_the_next_run_computes_stays(tmp_path: Path, contents: dict[str, str]) -> None:
    folder = RunFolder(tmp_path / "out")
    run(folder, NEW, labels_tif="1")
    running = folder.begin(NEW, folder.earlier_run(NEW, overwrite=False))
    (folder.path / "labels.tif").write_text("mine")
    with pytest.raises(ValueError, match=r"labels\.tif was changed since the run began; move it away, then the same"):
        folder.finish(running, running.completed(), write_files(**contents))
    assert texts(folder.path)["labels.tif"] == "mine"


def test_what_overwrite_allowed_to_replace_is_not_asked_for_again(tmp_path: Path) -> None:
    """The content as it was then; a later change is refused."""
    folder = RunFolder(tmp_path / "out")
    run(folder, NEW, labels_tif="1")
    (folder.path / "labels.tif").write_text("2")
    folder.begin(NEW, folder.earlier_run(NEW, overwrite=True))  # and is stopped
    assert folder.earlier_run(NEW, overwrite=False) is not None
    (folder.path / "labels.tif").write_text("3")
    with pytest.raises(ValueError, match="was changed"):
        folder.earlier_run(NEW, overwrite=False)


@pytest.mark.parametrize("earlier", [False, True])
def test_a_run_cut_short_while_moving_results_may_replace_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool
) -> None:
    folder = RunFolder(tmp_path / "out")
    if earlier:
        run(folder, NEW, labels_tif="0", report_html="q", uncertainty_tif="u")
    running = folder.begin(NEW, folder.earlier_run(NEW, overwrite=False))
    original = Path.replace

    def stop_at_report(self: Path, target: Path) -> Path:
        if Path(target).name == "report.html":
            raise KeyboardInterrupt
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop_at_report)
        with pytest.raises(KeyboardInterrupt):
            folder.finish(running, running.completed(), write_files(labels_tif="1", report_html="r"))
    assert read_record(folder.path / "run.json").status == "running"
    assert (folder.path / "labels.tif").read_text() == "1"
    done = run(folder, NEW, labels_tif="2", report_html="s")
    assert texts(folder.path) == {"labels.tif": "2", "report.html": "s"}
    assert done.status == "complete"
    assert not done.replaceable


@pytest.mark.parametrize("record", ["", '{"settings": {}', "[]"])
def test_overwriting_gets_past_a_damaged_record(tmp_path: Path, record: str) -> None:
    folder = RunFolder(tmp_path / "out")
    run(folder, NEW, labels__s1_png="1", report_html="r")
    (folder.path / "run.json").write_text(record)
    (folder.path / "labels" / "mine.png").write_text("mine")
    with pytest.raises(
        ValueError, match=r"run\.json is damaged, .*; name another folder, or add --overwrite to replace"
    ):
        folder.earlier_run(NEW, overwrite=False)
    assert (folder.path / "run.json").read_text() == record
    done = run(folder, NEW, overwrite=True, labels__s1_png="2", report_html="s")
    assert texts(folder.path) == {"labels/mine.png": "mine", "labels/s1.png": "2", "report.html": "s"}
    assert list(done.outputs) == ["labels/s1.png", "report.html"]
    assert folder.holds(done, NEW)


def test_a_folder_without_a_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    folder = RunFolder(tmp_path)
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        folder.earlier_run(NEW, overwrite=False)
    assert folder.earlier_run(NEW, overwrite=True) is None
    (tmp_path / "labels.nii.gz").write_text("mine")
    with pytest.raises(ValueError, match=r"labels\.nii\.gz was not written by Limner"):
        folder.earlier_run(NEW, overwrite=True)


def test_inputs_and_output_stay_apart(tmp_path: Path) -> None:
    images, labels = tmp_path / "images", tmp_path / "data" / "labels.nii.gz"
    for out, found in [
        (images, "is or lies in IMAGES"),
        (images / "out", "is or lies in IMAGES"),
        (tmp_path / "data", "holds LABELS"),
        (tmp_path, "holds IMAGES"),
        (images / ".." / "data", "holds LABELS"),
    ]:
        with pytest.raises(ValueError, match=found):
            RunFolder(out).check_apart_from({"IMAGES": images, "LABELS": labels})
    RunFolder(tmp_path / "images-out").check_apart_from({"IMAGES": images, "LABELS": labels})
    images.mkdir()
    (tmp_path / "link").symlink_to(images)
    with pytest.raises(ValueError, match="is or lies in IMAGES"):
        RunFolder(tmp_path / "link" / "out").check_apart_from({"IMAGES": images})
