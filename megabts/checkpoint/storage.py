"""Run folders: the last good checkpoint is always found.

A *run folder* holds `step_00000100/` folders and the text file `latest` (one line: the folder to continue from). A
*checkpoint folder* (see `folder`) holds `manifest.json` (see `manifest`), safetensors files and the caller's small
files (`config.yaml`, a tokenizer's). No pickle: opening a stranger's checkpoint runs no code of theirs.

Saving writes the new folder, then replaces `latest`, then deletes older steps, and only if the new one reads back
right; a crash at any point leaves the previous step or the new one. The next save removes what a crash left behind.
Limit: one run per run folder (take a `RunLock`); `saver` leads its ranks through a save.
"""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megabts.checkpoint.durable import FileRecord, beside, remove_tree, replace_text
from megabts.checkpoint.folder import begin_folder, finish_folder
from megabts.checkpoint.manifest import MANIFEST, CheckpointError, MemberRecord, verify
from megabts.checkpoint.pieces import Tables

LATEST = "latest"
STEP_NAME = re.compile(r"step_(\d{8,})")
LEFTOVER_NAME = re.compile(r"\.(step_(\d{8,})|latest)\.(tmp|old|trash)")
log = logging.getLogger(__name__)


def step_name(step: int) -> str:
    """Folder name of a step."""
    return f"step_{step:08d}"


def begin_step(run_dir: Path, step: int, names: Sequence[str], needed: int) -> None:
    """Make room for `step` in a run folder: the files `names`, of `needed` bytes together.

    Raises CheckpointError when there is no space or the disk fails; the steps saved before are untouched then.
    """
    try:
        _clean_up(Path(run_dir))
    except OSError as error:
        raise _not_brought_up(error, Path(run_dir), step) from error
    begin_folder(Path(run_dir) / step_name(step), names, needed)


def publish_step(
    run_dir: Path,
    step: int,
    records: Mapping[str, FileRecord],
    tables: Tables,
    state: Mapping[str, Any],
    members: Sequence[MemberRecord] = (),
    *,
    keep_last: int | None = None,
) -> Path:
    """Give `step`, whose files are all written, its name, point `latest` to it, keep `keep_last` steps (None: all).

    Deletes only steps before this one, never those beyond it (of a run that was set back). Returns the folder.
    Raises CheckpointError when the disk fails or what was written reads back wrong; older steps are untouched then.
    """
    run_dir = Path(run_dir)
    folder = run_dir / step_name(step)
    finish_folder(folder, records, tables, {**state, "step": step}, members)
    try:
        replace_text(run_dir / LATEST, folder.name + "\n")
        if keep_last is not None:
            _delete_old(run_dir, step, keep_last)
    except OSError as error:
        raise _not_brought_up(error, run_dir, step) from error
    return folder


def has_steps(run_dir: Path) -> bool:
    """Whether a run folder shows any trace of a saved step, good or damaged: then a run must not start from scratch."""
    return (Path(run_dir) / LATEST).exists() or bool(_steps(Path(run_dir)))


def resolve(path: Path, *, fallback: bool = True) -> Path:
    """The verified checkpoint folder to load for `path`, a checkpoint folder or a run folder. Changes nothing on disk.

    In a run folder that is the step `latest` names; where that is damaged, the newest good step, with a warning that
    names the damage (`fallback=False`: CheckpointError instead). A checkpoint folder given itself must be good.
    Raises UserError when there is nothing usable. Reads all bytes: let one rank resolve and tell the others.
    """
    path = Path(path)
    old = beside(path, "old")
    if STEP_NAME.fullmatch(path.name) or (path / MANIFEST).exists() or old.exists():
        folder = old if old.exists() and not path.exists() else path
        verify(folder)
        return folder
    steps = _steps(path)
    candidates = [steps[step] for step in sorted(steps, reverse=True)]
    problems: list[CheckpointError] = []
    try:
        candidates.insert(0, _tracked(path, steps))
    except CheckpointError as error:
        problems.append(error)
    for folder in dict.fromkeys(candidates):
        if problems and not fallback:
            raise problems[0]
        try:
            verify(folder)
        except CheckpointError as error:
            problems.append(error)
            continue
        for problem in problems:
            log.warning("%s", problem)
        if problems:
            log.warning("continuing from %s instead", folder)
        return folder
    found = "; ".join(map(str, problems)) if steps else "it holds no step_* folder and no HF model; check the path"
    raise CheckpointError(f"no usable checkpoint in {path}: {found}")


def _tracked(run_dir: Path, steps: Mapping[int, Path]) -> Path:
    """The folder named by `latest`; CheckpointError when the file or the folder is missing or makes no sense."""
    tracker = run_dir / LATEST
    try:
        text = tracker.read_bytes().decode(errors="replace").strip()
    except OSError as error:
        raise CheckpointError(f"{tracker}: {error.strerror}; write the name of a step folder into it") from error
    match = STEP_NAME.fullmatch(text)
    if not match or int(match[1]) not in steps:
        raise CheckpointError(f"{tracker} names {text[:80]!r}, no step here; write the name of a step folder into it")
    return steps[int(match[1])]


def _steps(run_dir: Path) -> dict[int, Path]:
    """Folders by step, complete or not; the set-aside old one where a replacement was interrupted."""
    names = os.listdir(run_dir) if run_dir.is_dir() else []
    found = {int(match[1]): run_dir / name for name in names if (match := STEP_NAME.fullmatch(name))}
    for name in names:
        match = LEFTOVER_NAME.fullmatch(name)
        if match and match[2] and match[3] == "old":
            found.setdefault(int(match[2]), run_dir / name)
    return found


def _clean_up(run_dir: Path) -> None:
    """Remove what a crashed save or deletion left; bring a step back whose replacement was interrupted."""
    for name in sorted(os.listdir(run_dir)) if run_dir.is_dir() else []:
        match = LEFTOVER_NAME.fullmatch(name)
        if not match:
            continue
        leftover, step = run_dir / name, run_dir / match[1]
        if match[3] == "old" and not step.exists():
            log.warning("restoring %s: its replacement was interrupted", step)
            os.rename(leftover, step)
        else:
            log.warning("removing %s, left by an interrupted save", leftover)
            remove_tree(leftover)


def _not_brought_up(error: OSError, run_dir: Path, step: int) -> CheckpointError:
    what = f"{error.strerror or error} ({error.filename or run_dir})"
    return CheckpointError(f"run folder {run_dir} not brought up to step {step}: {what}; check the disk")


def _delete_old(run_dir: Path, newest: int, keep_last: int) -> None:
    """Delete all but the `keep_last` last steps up to `newest`, and only if `newest` reads back right."""
    steps = {step: folder for step, folder in _steps(run_dir).items() if step <= newest}
    doomed = sorted(steps)[:-keep_last]
    if doomed:
        verify(steps[newest])
    for step in doomed:
        # A half-deleted step must not look like one: it gets another name first.
        trash = beside(steps[step], "trash")
        os.rename(steps[step], trash)
        remove_tree(trash)
