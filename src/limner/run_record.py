"""What a run did and may resume: ``run.json`` and the store of finished stages.

`Store` keeps the result of each finished stage under the content it was made from, so that a stopped run goes on where
it stopped and a corrected section redoes only what depended on it. `RunRecord` is what ``run.json`` holds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import struct
import threading
import time
import tokenize
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

PACKAGES = ("limner", "torch", "numpy", "scipy", "SimpleITK", "scikit-image")
_KEY = "key"
_ARRAY = "array."
# numpy parses the header of each array as Python; before 3.11.8 Python's parser errs now and then when two threads use
# it at once ("AST constructor recursion depth mismatch", https://github.com/python/cpython/pull/113035)
ONE_READS = threading.Lock()
_DAMAGE = (  # what numpy raises for a damaged .npz
    *(OSError, EOFError, ValueError, KeyError, NotImplementedError, SyntaxError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)


def content_key(*parts: object) -> str:
    """Hash of what a result depends on, the same in every run and on every platform.

    Parameters
    ----------
    *parts : object
        Arrays (by dtype, shape and values; neither memory layout nor byte order matters), strings, bytes, numbers,
        bools, None, paths (as strings), tuples and lists, mappings (in any order), sets, dataclasses.

    Returns
    -------
    str
        64 hexadecimal digits (SHA-256).

    Raises
    ------
    ValueError
        If a part is of another kind, whose content cannot be told from the outside.

    Examples
    --------
    >>> content_key({"a": 1, "b": 2.0}) == content_key({"b": 2.0, "a": 1})
    True
    >>> content_key("ab", "c") == content_key("a", "bc")
    False
    """
    return _digest(tuple(parts)).hex()


def _digest(part: object) -> bytes:
    """SHA-256 of one part; each kind has its own tag, so that ``"1"``, ``1`` and ``(1,)`` differ."""
    if isinstance(part, np.ndarray):
        return _digest_array(part)
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        values = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
        return _sha(b"dataclass", type(part).__name__.encode(), _digest(values))
    if isinstance(part, Mapping):
        pairs = sorted(_digest(k) + _digest(v) for k, v in part.items())
        return _sha(b"mapping", *pairs)
    if isinstance(part, set | frozenset):
        return _sha(b"set", *sorted(_digest(p) for p in part))
    if isinstance(part, tuple | list):
        return _sha(b"sequence", *(_digest(p) for p in part))
    return _digest_scalar(part)


def _digest_scalar(part: object) -> bytes:
    value = part.item() if isinstance(part, np.generic) else part
    if value is None or isinstance(value, bool):
        return _sha(b"constant", str(value).encode())
    if isinstance(value, int):
        return _sha(b"int", str(value).encode())
    if isinstance(value, float):
        return _sha(b"float", struct.pack("<d", value))
    if isinstance(value, str | Path):
        return _sha(b"str", str(value).encode())
    if isinstance(value, bytes):
        return _sha(b"bytes", value)
    raise ValueError(
        f"content_key(): {type(part).__name__} has no content that could be hashed; give arrays or numbers"
    )


def _digest_array(array: NDArray[Any]) -> bytes:
    if array.dtype.hasobject:
        raise ValueError("content_key(): an array of Python objects cannot be hashed; give it a numeric dtype")
    plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return _sha(b"array", plain.dtype.str.encode(), str(array.shape).encode(), plain.reshape(-1).view(np.uint8).data)


def _sha(*fields: bytes | memoryview) -> bytes:
    """SHA-256 over length-prefixed fields, so that no two different lists of fields read the same."""
    sha = hashlib.sha256()
    for part in fields:
        sha.update(struct.pack("<Q", len(part)))
        sha.update(part)
    return sha.digest()


@dataclass(frozen=True)
class Store:
    """Results of finished stages in a folder, one compressed ``.npz`` a stage, each with the key it was made from.

    Different stages may be loaded and saved from several threads at once. A stage saved again replaces the earlier one.

    Parameters
    ----------
    folder : Path
        Made on the first `save`.

    Examples
    --------
    >>> import tempfile
    >>> store = Store(Path(tempfile.mkdtemp()))
    >>> store.save("section-0003", content_key("labels", 1), {"probabilities": np.ones(2)})
    >>> store.load("section-0003", content_key("labels", 1))
    {'probabilities': array([1., 1.])}
    >>> store.load("section-0003", content_key("labels", 2)) is None
    True
    """

    folder: Path

    def load(self, stage: str, key: str) -> dict[str, NDArray[Any]] | None:
        """The arrays saved for `stage`, or None when there are none, they had another key, or the file is damaged."""
        try:
            # opened here, for numpy leaves the handle open when the file turns out to be damaged
            with ONE_READS, self._path(stage).open("rb") as handle, np.load(handle, allow_pickle=False) as saved:
                if saved[_KEY].item() != key:
                    return None
                return {n.removeprefix(_ARRAY): saved[n] for n in saved.files if n.startswith(_ARRAY)}
        except _DAMAGE:
            return None

    def holds(self, stage: str, key: str) -> bool:
        """Whether there are arrays of `stage` made from `key`; they are not read."""
        try:
            with ONE_READS, self._path(stage).open("rb") as handle, np.load(handle, allow_pickle=False) as saved:
                return bool(saved[_KEY].item() == key)
        except _DAMAGE:
            return False

    def remove(self, stage: str) -> None:
        """Forget a stage, where there is one."""
        self._path(stage).unlink(missing_ok=True)

    def save(self, stage: str, key: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep `arrays` (no Python objects) as the result of `stage` made from `key`; complete or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # the prefix keeps an array called "file" or "key" from meeting savez's own arguments
        named: dict[str, Any] = {_ARRAY + name: array for name, array in arrays.items()}
        named[_KEY] = np.array(key)
        write_atomically(self._path(stage), lambda handle: np.savez_compressed(handle, **named))

    def stages(self) -> tuple[str, ...]:
        """Names of the stages that have a file, sorted."""
        return tuple(sorted(p.name.removesuffix(".npz") for p in self.folder.glob("*.npz")))

    def _path(self, stage: str) -> Path:
        if not stage or not all(c.isalnum() or c in "-_." for c in stage) or stage.startswith("."):
            raise ValueError(f"Store(): {stage!r} is no stage name; use letters, digits, '-', '_' and '.'")
        return self.folder / f"{stage}.npz"


def stored(
    store: Store | None, stage: str, key: str, make: Callable[[], dict[str, NDArray[Any]]]
) -> dict[str, NDArray[Any]]:
    """The arrays of a stage: read where `store` has them under `key`, else made and kept there.

    Parameters
    ----------
    store : Store, optional
        None: always made, kept nowhere.
    stage, key : str
        As for `Store.save`.
    make : callable
        Gives the arrays.

    Returns
    -------
    dict of str to ndarray
    """
    if store is None:
        return make()
    found = store.load(stage, key)
    if found is None:
        found = make()
        store.save(stage, key, found)
    return found


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Note the seconds that a block took under the name of its stage."""
    began = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - began


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file under a temporary name beside it and rename it: a reader sees the old file or the whole new one.

    Parameters
    ----------
    path : Path
        The file; its folder must exist.
    write : callable
        Called with the open binary file. Where it raises, `path` stays as it was and nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as handle:
            write(handle)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class RunRecord:
    """What ``run.json`` says about one run.

    Parameters
    ----------
    command : tuple of str
        The command line as it was given.
    settings : mapping
        Every setting that the result depends on, by name; a later run with others is another run.
    inputs : mapping of str to mapping of str to str
        For each input (``images``, ``labels``, ``truth``) the SHA-256 of its files, by file name.
    options : mapping
        What may change between runs without making the result another one (which sections count as labelled, what is
        scored, what is written besides): a run with other options goes on from what is there.
    device : str
        ``cpu`` or ``cuda`` with the GPU's name.
    seed : int
        The seed of all random numbers.
    status : {'running', 'complete'}
        ``running`` also for a run that was stopped.
    started, ended : str
        Time in UTC, ISO 8601; `ended` is empty until the run is complete.
    versions, machine : mapping
        Versions of Python and of the packages that compute; platform and number of CPUs.
    seconds : mapping of str to float
        Seconds per stage.
    sections : mapping of str to mapping
        For each completed section, by index: name, seconds, iterations, objective history, mean uncertainty.
    images : mapping of str to mapping
        For each image of a batch, by the name of its results: what it was made from (``key``), where its results are,
        and what was found; or only ``problem``, why there is nothing.
    calibration, scores : mapping
        Calibration of the uncertainty; scores against the truth where one was given.
    organs : mapping of str to mapping
        For each organ found from scribbles, by its label: name, volume and interval in mm3.
    chosen : mapping
        Settings that the run chose itself where none was given, and what they were chosen by.
    suggestions : tuple of int
        Sections that would help most if labelled next.
    summary : str
        The result in one sentence.
    notes : tuple of str
        Warnings for the user.
    outputs : mapping of str to str
        SHA-256 of each file that the run wrote, by its name relative to the folder: these, and no others, a later run
        may replace, as long as they hold what was written.
    replaceable : mapping of str to str
        The same of other files that the run may replace: those of an earlier run, until all results are in place.

    Examples
    --------
    >>> import tempfile
    >>> record = RunRecord(command=("limner",), settings={"seed": 3}, inputs={}, device="cpu", seed=3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_record(Path(folder, "run.json"), record.completed(seconds={"network": 1.5}))
    ...     read_record(Path(folder, "run.json")).seconds
    {'network': 1.5}
    """

    command: tuple[str, ...]
    settings: Mapping[str, Any]
    inputs: Mapping[str, Mapping[str, str]]
    device: str
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)
    status: Literal["running", "complete"] = "running"
    started: str = field(default_factory=lambda: utc_now())
    ended: str = ""
    versions: Mapping[str, str] = field(default_factory=lambda: package_versions())
    machine: Mapping[str, Any] = field(default_factory=lambda: machine())
    seconds: Mapping[str, float] = field(default_factory=dict)
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    images: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    calibration: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, Any] = field(default_factory=dict)
    organs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    chosen: Mapping[str, Any] = field(default_factory=dict)
    suggestions: tuple[int, ...] = ()
    summary: str = ""
    notes: tuple[str, ...] = ()
    outputs: Mapping[str, str] = field(default_factory=dict)
    replaceable: Mapping[str, str] = field(default_factory=dict)

    def completed(self, **results: Any) -> RunRecord:
        """The same record with its results (fields by name), status ``complete`` and the time now as its end."""
        return replace(self, **results, status="complete", ended=utc_now())


def write_record(path: Path, record: RunRecord) -> None:
    """Write ``run.json``: UTF-8, two-space indent, NaN and infinity as null; replaces an earlier one in one step."""
    text = json.dumps(to_plain(record), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, lambda handle: handle.write(text.encode() + b"\n"))


def read_record(path: Path) -> RunRecord:
    """Read ``run.json``.

    Raises
    ------
    ValueError
        If the file is missing, no JSON, or lacks a field; names the file.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        known = {f.name for f in dataclasses.fields(RunRecord)}
        values = {name: value for name, value in values.items() if name in known}
        for name in ("command", "suggestions", "notes"):
            values[name] = tuple(values.get(name, ()))
        for name in ("outputs", "replaceable"):
            values[name] = dict(values.get(name, {}))
        return RunRecord(**values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"read_record(): {path} is no record of a run ({error})") from error


def differing_settings(a: RunRecord | Mapping[str, Any], b: RunRecord | Mapping[str, Any]) -> list[str]:
    """Names of the settings that two runs do not share, sorted; a setting that only one of them has counts.

    Examples
    --------
    >>> differing_settings({"seed": 0, "method": "gem"}, {"seed": 1, "method": "gem"})
    ['seed']
    """
    first = to_plain(a.settings if isinstance(a, RunRecord) else a)
    second = to_plain(b.settings if isinstance(b, RunRecord) else b)
    missing = object()
    return sorted(n for n in {*first, *second} if first.get(n, missing) != second.get(n, missing))


def hash_inputs(path: Path, names: Sequence[str] = ()) -> dict[str, str]:
    """SHA-256 of an input's files.

    Parameters
    ----------
    path : Path
        A file, or a folder of sections.
    names : sequence of str, optional
        The files that were read, relative to the folder or to that of the file (`limner.io.names_read` gives them);
        default: the file alone, or all files of the folder that are not hidden.

    Returns
    -------
    dict of str to str
        File name -> 64 hexadecimal digits, sorted by name.
    """
    folder = path if path.is_dir() else path.parent
    if not names:
        files = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")] if path.is_dir() else [path]
        names = [p.name for p in files]
    return {name: hash_file(folder / name) for name in sorted(names)}


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages whose numbers a result depends on."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def machine() -> dict[str, Any]:
    """Platform, processor architecture and number of CPUs (no name of the machine or its user)."""
    return {"platform": platform.platform(), "architecture": platform.machine(), "cpus": os.cpu_count()}


def utc_now() -> str:
    """The time now in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def to_plain(value: Any) -> Any:
    """`value` as JSON knows it: dataclasses and mappings as dicts, arrays as lists, NaN and infinity as None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return to_plain(value.tolist())
    if isinstance(value, tuple | list):
        return [to_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
