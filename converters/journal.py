"""An output folder that appears whole or not at all, and can be gone on with after an interruption.

Everything is written to ``OUT.partial``; each finished file leaves a note in its journal; at the end the journal goes and
the folder is renamed. The journal begins with a fingerprint of source and plan, so that only the same work goes on.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_JOURNAL = ".journal"


class Output:
    """The folder being written. ``done`` holds what earlier runs noted, by file name."""

    def __init__(self, out: Path, fingerprint: str, *, resume: bool) -> None:
        self.out = out
        self.folder = out.with_name(out.name + ".partial")
        self._journal = self.folder / _JOURNAL
        check_free(out)
        if self.folder.is_dir() and resume:
            self._lock()
            try:
                self._check(fingerprint)
            except ValueError:
                self.release()
                raise
        else:
            if self.folder.is_dir():
                self._lock()
                self.release()
            shutil.rmtree(self.folder, ignore_errors=True)
            self._journal.mkdir(parents=True)
            self._lock()
            _write_whole(self._journal / "plan", fingerprint)
        self.done: dict[str, Any] = dict(self._notes())

    def note(self, file: str, content: Any) -> None:
        """Remember that ``file`` is finished."""
        size = (self.folder / file).stat().st_size
        _write_whole(self._journal / f"{file}.json", json.dumps({"file": file, "size": size, "content": content}))

    def finish(self) -> None:
        """Make the folder the output."""
        shutil.rmtree(self._journal)
        os.rename(self.folder, self.out)  # an empty folder of that name gives way

    def release(self) -> None:
        """Let others write."""
        os.close(self._descriptor)

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _lock(self) -> None:
        self._journal.mkdir(exist_ok=True)
        self._descriptor = os.open(self._journal / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise ValueError(f"{self.folder} is being written by another conversion") from error

    def _check(self, fingerprint: str) -> None:
        plan = self._journal / "plan"
        if not plan.is_file() or plan.read_text() != fingerprint:
            raise ValueError(
                f"--resume: {self.folder} was begun from another source or with other options; start again without --resume"
            )

    def _notes(self) -> Mapping[str, Any]:
        found = {}
        for note in self._journal.glob("*.json"):
            content = json.loads(note.read_text())
            file = self.folder / content["file"]
            if file.is_file() and file.stat().st_size == content["size"]:
                found[content["file"]] = content["content"]
        return found


def check_free(out: Path) -> None:
    """ValueError unless ``out`` can become a new folder."""
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"--out {out} is not empty; name a folder that does not exist yet, or empty it")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder that does not exist yet")


def fingerprint(folder: Path, *options: object) -> str:
    """What must be the same for a conversion to go on: the source's files, by size and time of change, and the options."""
    files = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.iterdir() if file.is_file())
    return hashlib.sha256(json.dumps([str(folder.resolve()), files, [repr(option) for option in options]]).encode()).hexdigest()


def _write_whole(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    os.replace(beside, path)
