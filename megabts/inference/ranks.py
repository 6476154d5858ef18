"""Ranks that serve one model together: the first decides and sends every step, the others carry it out.

A step is one broadcast of HEADER numbers, and a second one where prompts do not fit into it. Logits come out alike on
all ranks, but only the first chooses tokens, so nothing that it does besides (time, clients, stop strings) must be
known to the others. A rank that fails breaks the collectives of all; `megabts.runtime.failure` and the watchdog then
end the run.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megabts.errors import UsageError
from megabts.inference.decoding import Admission, Decoding, Step
from megabts.inference.row_gates import observe_gates
from megabts.model.decoder import Model
from megabts.parallel.mesh import ParallelMesh
from megabts.runtime.progress import Progress

HEADER = 256
"""Numbers of the first message: how many there are in all, and as many of them as it holds."""


def check_mesh(mesh: ParallelMesh) -> None:
    """Raises UsageError for degrees that generation has no use for."""
    if mesh.pp.size > 1:
        raise UsageError(
            f"parallel.pipeline is {mesh.pp.size}; generation has no pipeline: use parallel.tensor or parallel.expert"
        )
    if mesh.replicas.size > 1 or (mesh.experts.size == 1 and mesh.dp.size > 1):
        raise UsageError(
            f"{mesh.world_size} ranks are more than the model's parts; start parallel.tensor x parallel.expert ranks"
        )


def follow(model: Model, max_tokens: int, mesh: ParallelMesh, progress: Progress | None = None) -> None:
    """On every rank but the first: carry out its engine's steps, until the engine is closed."""
    check_mesh(mesh)
    progress = progress or Progress()
    with torch.inference_mode():
        decoding = Decoding(model, max_tokens, mesh)
        number = 0
        while (step := receive(decoding.device)) is not None:
            number += 1
            progress.enter("decoding", number, timed=False)
            with observe_gates(model, step.gates):
                decoding.run(step)


def send(step: Step | None, device: torch.device) -> None:
    """From the first rank to all others; None: there are no more."""
    numbers = [-1] if step is None else _pack(step)
    header = [len(numbers), *numbers[: HEADER - 1]]
    _broadcast(header + [0] * (HEADER - len(header)), device)
    if len(numbers) > HEADER - 1:
        _broadcast(numbers[HEADER - 1 :], device)


def receive(device: torch.device) -> Step | None:
    """On another rank: what the first sends."""
    length, *numbers = _broadcast([0] * HEADER, device)
    if length > len(numbers):
        numbers += _broadcast([0] * (length - len(numbers)), device)
    return None if numbers[0] < 0 else _unpack(numbers[:length])


def _broadcast(numbers: Sequence[int], device: torch.device) -> list[int]:
    sent = torch.tensor(numbers, device=device)
    dist.broadcast(sent, src=0)
    return sent.tolist()


def _pack(step: Step) -> list[int]:
    numbers = [len(step.kept), int(step.gates), *step.kept, *step.tokens]
    for new in step.admitted:
        numbers += [new.start, -1 if new.eod_id is None else new.eod_id, len(new.prompt), *new.prompt]
    return numbers


def _unpack(numbers: list[int]) -> Step:
    kept, gates = numbers[:2]
    position, admitted = 2 + 2 * kept, []
    while position < len(numbers):
        start, eod_id, length = numbers[position : position + 3]
        prompt = numbers[position + 3 : position + 3 + length]
        admitted.append(Admission(start, prompt, None if eod_id < 0 else eod_id))
        position += 3 + length
    return Step(numbers[2 : 2 + kept], numbers[2 + kept : 2 + 2 * kept], admitted, bool(gates))
