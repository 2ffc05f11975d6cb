"""The folder of a run: what may be written there, what is there already, and putting results in place."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from limner.run_record import RunRecord, Store, differing_settings, hash_file, read_record, write_record

RECORD = "run.json"
# without their endings
RESULTS = (
    *(
        "labels",
        "uncertainty",
        "areas",
        "probabilities",
        "heat_maps",
        "cells",
        "linked_cells",
        "structures",
        "objects",
        "sections",
    ),
    *("images", "samples", "transforms", "volumes", "dice", "report"),
)


@dataclass(frozen=True)
class RunFolder:
    """A folder that holds one run: ``run.json``, the results, and ``.resume`` with the finished stages.

    Parameters
    ----------
    path : Path
        The folder; made when the run begins.

    Examples
    --------
    >>> RunFolder(Path("completed")).store.folder.as_posix()
    'completed/.resume/stages'
    """

    path: Path

    @property
    def store(self) -> Store:
        """Results of finished stages."""
        return Store(self.path / ".resume" / "stages")

    def check_apart_from(self, inputs: Mapping[str, Path]) -> None:
        """Refuse a folder that is an input, lies in one, or holds one.

        Parameters
        ----------
        inputs : mapping of str to Path
            Files and folders that the user made, by the argument that named them.

        Raises
        ------
        ValueError
            Names the argument and its path.
        """
        own = self.path.resolve()
        for argument, path in inputs.items():
            other = path.resolve()
            if own == other or other in own.parents:
                raise ValueError(f"--output: {self.path} is or lies in {argument} {path}; name a folder of its own")
            if own in other.parents:
                raise ValueError(f"--output: {self.path} holds {argument} {path}; name a folder of its own")

    def earlier_run(self, new: RunRecord, overwrite: bool) -> RunRecord | None:
        """What ran here before, when the new run may take its place.

        Parameters
        ----------
        new : RunRecord
            The run that is to begin.
        overwrite : bool
            Whether the user allowed to replace a run with other settings, and files that were changed since.

        Returns
        -------
        RunRecord or None
            None where the folder is new or holds no run.

        Raises
        ------
        ValueError
            If the folder is a file, holds files but no run, a damaged record, or a run with other settings or images,
            or if a file of the run is not as Limner wrote it.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--output: {self.path} is a file; name a folder")
        if not self.path.exists() or not any(self.path.iterdir()):
            return None
        if not (self.path / RECORD).exists():
            self._check_foreign(overwrite)
            return None
        try:
            earlier = read_record(self.path / RECORD)
        except ValueError:
            return self._after_damage(new, overwrite)
        differing = differing_settings(earlier, new)
        if earlier.inputs.get("images") != new.inputs.get("images"):
            differing = ["images", *differing]
        if differing and not overwrite:
            raise ValueError(
                f"--output: {self.path} holds a run that differs in {', '.join(differing)}; name another folder, or "
                "add --overwrite"
            )
        changed = self._changed(earlier)
        if changed and not overwrite:
            raise ValueError(
                f"--output: {self.path / changed[0]} was changed since Limner wrote it; move it away, name another "
                "folder, or add --overwrite to lose the changes"
            )
        return earlier

    def holds(self, earlier: RunRecord, new: RunRecord) -> bool:
        """Whether `earlier` is complete, its files are there as written, and `new` asks for nothing else."""
        return (
            earlier.status == "complete"
            and not differing_settings(earlier, new)
            and not differing_settings(earlier.options, new.options)
            and earlier.inputs == new.inputs
            and all((self.path / name).is_file() for name in earlier.outputs)
            and not self._changed(earlier)
        )

    def begin(self, record: RunRecord, earlier: RunRecord | None) -> RunRecord:
        """Make the folder and note that the run has begun; it may replace files of the earlier run as they are now."""
        self.path.mkdir(parents=True, exist_ok=True)
        outputs = self._hashes(earlier.outputs) if earlier is not None else {}
        replaceable = self._hashes(earlier.replaceable) if earlier is not None else {}
        running = replace(record, status="running", outputs=outputs, replaceable=replaceable)
        write_record(self.path / RECORD, running)
        return running

    def finish(self, running: RunRecord, done: RunRecord, write: Callable[[Path], None]) -> None:
        """Write the results, put them in place, and note that the run is complete.

        Parameters
        ----------
        running : RunRecord
            As `begin` returned it: its `outputs` and `replaceable` are files of an earlier run.
        done : RunRecord
            The completed record.
        write : callable
            Writes the results into the folder that it is given.

        Raises
        ------
        ValueError
            If a file that Limner did not write, or that was changed since the run began, has the name of a result.
        """
        outputs = self._place(running, write, {*running.outputs, *running.replaceable})
        self._remove(set(running.outputs) - set(outputs))
        write_record(self.path / RECORD, replace(done, outputs=outputs, replaceable={}))

    def put(self, running: RunRecord, write: Callable[[Path], None], earlier: Collection[str] = ()) -> RunRecord:
        """Put some results of a running batch in place; the record says so, and those of other images stay.

        Parameters
        ----------
        running, write
            As of `finish`.
        earlier : collection of str
            Files of `running` that these results replace: those that are not written again are removed.

        Returns
        -------
        RunRecord
            The running record with what is there now.

        Raises
        ------
        ValueError
            As of `finish`.
        """
        written = self._place(running, write, earlier)
        self._remove(set(earlier) - set(written))
        kept = {name: sha for name, sha in running.outputs.items() if name not in earlier}
        running = replace(running, outputs={**kept, **written})
        write_record(self.path / RECORD, running)
        return running

    def withdraw(self, earlier: RunRecord | None, made: bool) -> None:
        """Take back a run that gave nothing, so that it stands in the way of no other.

        Parameters
        ----------
        earlier : RunRecord or None
            What was there before, whose record is put back; where there was none, this run's record and stages go.
        made : bool
            Whether the run made the folder; then it goes too, where nothing else is in it.
        """
        if earlier is not None:
            write_record(self.path / RECORD, earlier)
            return
        (self.path / RECORD).unlink(missing_ok=True)
        shutil.rmtree(self.path / ".resume", ignore_errors=True)
        if made and not any(self.path.iterdir()):
            self.path.rmdir()

    def note(self, record: RunRecord) -> None:
        """Write the record as it is."""
        write_record(self.path / RECORD, record)

    def _place(self, running: RunRecord, write: Callable[[Path], None], removable: Collection[str]) -> dict[str, str]:
        """Write results beside their places, then move them there; gives their hashes by name."""
        staging = self.path / ".resume" / "results"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        write(staging)
        names = [p.relative_to(staging).as_posix() for p in sorted(staging.rglob("*")) if p.is_file()]
        outputs = {name: hash_file(staging / name) for name in names}
        self._check_free(names, removable, running)
        # noted before they are moved: a run cut short in between may replace them, and those that they replace
        noted = replace(
            running,
            outputs={**running.outputs, **outputs},
            replaceable={**running.replaceable, **running.outputs},
        )
        write_record(self.path / RECORD, noted)
        for name in names:
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).replace(self.path / name)
        shutil.rmtree(staging)
        return outputs

    def _check_foreign(self, overwrite: bool) -> None:
        """A folder without a run: only when asked, and only where no file has the name of a result."""
        for path in sorted(self.path.iterdir()):
            if path.name.split(".")[0] in RESULTS:
                raise ValueError(f"--output: {path} was not written by Limner; name another folder, or move it away")
        if not overwrite:
            raise ValueError(
                f"--output: {self.path} is not empty and holds no run of Limner's; name another folder, or add "
                "--overwrite to write beside what is there"
            )

    def _after_damage(self, new: RunRecord, overwrite: bool) -> RunRecord:
        """A run that stopped at once, after which files with the name of a result may be replaced; none is removed."""
        if not overwrite:
            raise ValueError(
                f"--output: {self.path / RECORD} is damaged, so that Limner cannot tell its own files; name another "
                f"folder, or add --overwrite to replace what is called {', '.join(RESULTS)} there"
            )
        results = [path for path in self.path.iterdir() if path.name.split(".")[0] in RESULTS]
        files = [p for path in results for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file()]
        return replace(new, replaceable=self._hashes(p.relative_to(self.path).as_posix() for p in files))

    def _check_free(self, names: Collection[str], removable: Collection[str], running: RunRecord) -> None:
        own = {*running.outputs, *running.replaceable}
        foreign = [name for name in names if name not in own and (self.path / name).exists()]
        changed = self._changed(running, {*names, *removable})
        if foreign or changed:
            found = "was not written by Limner" if foreign else "was changed since the run began"
            raise ValueError(
                f"--output: {self.path / (foreign or changed)[0]} {found}; move it away, then the same command goes on "
                "where it stopped"
            )

    def _changed(self, record: RunRecord, among: Collection[str] | None = None) -> list[str]:
        """Files that the record lists and that hold something else now; one that is gone is no loss."""
        listed_files = {*record.replaceable, *record.outputs}
        found = self._hashes(listed_files if among is None else listed_files & set(among))
        known = (record.outputs, record.replaceable)
        return [name for name, now in found.items() if now not in [listed.get(name) for listed in known]]

    def _hashes(self, names: Iterable[str]) -> dict[str, str]:
        """SHA-256 of those that are there."""
        paths = {name: self.path / name for name in sorted(names)}
        return {name: hash_file(path) if path.is_file() else "" for name, path in paths.items() if path.exists()}

    def _remove(self, names: set[str]) -> None:
        """Remove files of an earlier run that this one did not write again, and folders that this leaves empty."""
        for name in sorted(names):
            (self.path / name).unlink(missing_ok=True)
        for folder in {(self.path / name).parent for name in names} - {self.path}:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
