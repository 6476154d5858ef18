"""Tasks of lm-evaluation-harness by name or file, run on one of megabts' models.

A name may be a task, group or tag of the harness or of a folder of task files; a file is such a task or group, and its
neighbours are known with it. The harness' own list of tasks takes half a minute to read, so it is read only where a
name is not found in the files given. Relative `data_files` mean files beside the task file (the harness alone would
look in the current folder), so that a folder of tasks and data can be moved and runs without a network.
"""

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import make_table

from megabts.errors import UsageError, UserError
from megabts.evaluation.lm_eval_model import MegabtsLM


def run_tasks(
    lm: MegabtsLM,
    found: tuple[TaskManager, Sequence[str]],
    *,
    limit: float | None = None,
    shots: int | None = None,
    unsafe_code: bool = False,
) -> dict[str, Any] | None:
    """The harness' results of the tasks that `find_tasks` found; None on ranks other than the first.

    `limit`: documents of each task (below 1: a share), for trials only. `shots`: examples in front of every question,
    for tasks that do not insist on none. `unsafe_code` as in `find_tasks`. Raises UserError.
    """
    manager, names = found
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        results: dict[str, Any] | None = simple_evaluate(
            model=lm,
            tasks=list(names),
            task_manager=manager,
            num_fewshot=shots,
            limit=limit,
            log_samples=False,
            confirm_run_unsafe_code=unsafe_code,
        )
    except UserError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:  # what the harness and `datasets` raise for bad tasks
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"tasks {','.join(names)} cannot be run: {cause} (all of it with --debug)") from error
    return results


def results_table(results: Mapping[str, Any]) -> str:
    """The harness' table of tasks and, where there are groups, of groups."""
    tables = [make_table(results)]
    if results.get("groups"):
        tables.append(make_table(results, "groups"))
    return "\n".join(table.rstrip() for table in tables)


def find_tasks(
    tasks: Sequence[str], include: Sequence[Path] = (), *, unsafe_code: bool = False
) -> tuple[TaskManager, list[str]]:
    """What knows all the tasks, and their names; `tasks` are names or files, `include` folders of task files.

    Raises UserError for a file, UsageError for a name, that is not there, and for tasks that run what a model writes,
    unless `unsafe_code` says that they may.
    """
    for folder in include:
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder} of task files (--include-path)")
    files = {task: Path(task) for task in tasks if task.endswith((".yaml", ".yml"))}
    configs = {task: _read(file) for task, file in files.items()}
    names = [configs[task].get("group") or configs[task]["task"] if task in files else task for task in tasks]
    folders = list(dict.fromkeys([*include, *(file.resolve().parent for file in files.values())]))
    manager = TaskManager(include_path=folders, include_defaults=False)
    if unknown_names(manager, names):
        manager = TaskManager(include_path=folders)
    unknown = unknown_names(manager, names)
    if unknown:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, 1)
        hint = f"did you mean {near[0]}?" if near else "lm_eval ls tasks lists the harness' own"
        raise UsageError(f"there is no task {unknown[0]}; {hint} (task files of your own: a path, or --include-path)")
    for task, name in zip(tasks, names, strict=True):  # a file that is given wins over a neighbour of the same name
        if task in files:
            entry = manager.task_index[name]
            entry.yaml_path, entry.cfg = files[task].resolve(), configs[task]
    unsafe = [name for name in leaves(manager, names) if (manager.task_index[name].cfg or {}).get("unsafe_code")]
    if unsafe and not unsafe_code:
        raise UsageError(
            f"task {unsafe[0]} runs code that the model writes, on this machine; allow it with "
            "--confirm-run-unsafe-code, in a container"
        )
    for name in leaves(manager, names):
        resolve_data_files(manager.task_index[name], folders)
    return manager, names


def _read(file: Path) -> dict[str, Any]:
    """A task file as it is, its functions by name. Raises UserError."""
    if not file.is_file():
        raise UserError(f"there is no task file {file}")
    try:
        config: dict[str, Any] = load_yaml(file, resolve_func=False)
    except Exception as error:  # YAML's, the file system's, or the loader's own
        cause = " ".join(str(error).split())
        raise UserError(f"task file {file} cannot be read: {cause}") from error
    if not isinstance(config.get("group") or config.get("task"), str):
        raise UserError(f"task file {file} names no task; write task: NAME, or group: NAME")
    return config


def members(manager: TaskManager, name: str) -> list[str]:
    """The tasks, groups and tags that a group lists or a tag has; none for a task."""
    entry = manager.task_index[name]
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    listed = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else None
    return list(_listed(listed)) if isinstance(listed, list) else []


def _listed(items: Sequence[Any]) -> Iterator[str]:
    for item in items:
        if isinstance(item, str):
            yield item
        elif isinstance(item.get("task"), list):  # a group written out inside the group
            yield from _listed(item["task"])
        elif "dataset_path" not in item:  # a task written out has its own
            yield item.get("task") or item["group"]


def unknown_names(manager: TaskManager, names: Sequence[str]) -> list[str]:
    """Those that the manager does not know, also inside groups."""
    found: list[str] = []
    for name in names:
        known = name in manager.task_index
        found += unknown_names(manager, members(manager, name)) if known else [name]
    return found


def leaves(manager: TaskManager, names: Sequence[str]) -> list[str]:
    """The tasks that are meant by names of tasks, groups and tags, all known."""
    found: list[str] = []
    for name in names:
        inside = members(manager, name)
        found += leaves(manager, inside) if inside else [name]
    return found


def resolve_data_files(entry: Any, folders: Sequence[Path]) -> None:
    """Make relative `data_files` of a task absolute, from its task file's own folder, if that lies in one of `folders`.

    `entry`: the task in the harness' index. Raises UserError for a file that is not there.
    """
    given = ((entry.cfg or {}).get("dataset_kwargs") or {}).get("data_files")
    file = entry.yaml_path
    if file is None or not given or not any(file.resolve().is_relative_to(folder.resolve()) for folder in folders):
        return
    config = load_yaml(file, resolve_func=True)
    config["dataset_kwargs"] = {**config["dataset_kwargs"], "data_files": _absolute(given, file.parent, entry.name)}
    entry.cfg, entry.yaml_path = config, None  # without a path the harness takes the configuration as it is


def _absolute(given: Any, folder: Path, task: str) -> Any:
    """One path, a list of them or a dictionary by split, as `datasets` takes them; addresses and patterns stay."""
    if isinstance(given, dict):
        return {split: _absolute(item, folder, task) for split, item in given.items()}
    if isinstance(given, list):
        return [_absolute(item, folder, task) for item in given]
    if "://" in given:
        return given
    path = (folder / given).resolve()
    if not path.is_file() and not set("*?[") & set(given):
        raise UserError(f"task {task}: there is no file {path}; data_files are sought beside the task file")
    return str(path)
