"""Steps of many small kernels, recorded once and launched together: CUDA graphs.

A GPU finishes a small kernel before the CPU has launched the next, so a decode step takes as long as its launches. A
graph launches all of them at once. It is a recording: addresses, shapes and Python numbers stay those of its recording.
So what changes from call to call must stand in a tensor that stays where it is (`Graphs` keeps one, and copies into
it), what is a number belongs to the graph's key, and every other tensor (weights, caches) must outlive the graph, at
its place. Nothing in a recording may wait for the GPU or copy from the CPU.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Work = Callable[[], Tensor]
Record = Callable[[Work], Work]
"""Makes of a call its replay, which does the same to the same tensors and returns the same one, written anew. It may
call it several times, so that doing it again must change nothing."""
AFTER = 8
"""Calls with a key before it is recorded, which takes as long as tens of calls."""
LIMIT = 32
"""Keys that are kept, those used last."""


@dataclass
class _Entry:
    calls: int = 0
    inputs: Tensor | None = None
    replay: Work | None = None


class Graphs:
    """Of one function: a graph for every shape of its inputs and all numbers that come often.

    A call that cannot be recorded is named in the log, and nothing is recorded any more.
    """

    def __init__(self, record: Record, *, after: int = AFTER, limit: int = LIMIT) -> None:
        self._record, self._after, self._limit = record, after, limit
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._works = True

    def __call__(self, function: Callable[..., Tensor], inputs: Tensor, *numbers: int | None) -> Tensor:
        """`function(inputs, *numbers)`, always the same function; the result is the caller's.

        It is handed in, not kept: whose method it is may keep the graphs, and both go together.
        """
        entry = self._entry((inputs.shape, numbers))
        entry.calls += 1
        if entry.replay is None and entry.calls > self._after and self._works:
            kept = entry.inputs = inputs.clone()
            try:
                entry.replay = self._record(lambda: function(kept, *numbers))
            except RuntimeError as error:
                cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
                log.warning("a step could not be recorded as a CUDA graph (%s): steps run without", cause)
                self._works = False
        if entry.replay is None or entry.inputs is None:
            return function(inputs, *numbers)
        entry.inputs.copy_(inputs)
        return entry.replay().clone()

    def _entry(self, key: Hashable) -> _Entry:
        entry = self._entries.setdefault(key, _Entry())
        self._entries.move_to_end(key)
        if len(self._entries) > self._limit:
            self._entries.popitem(last=False)
        return entry


def recorder(device: torch.device) -> Record | None:
    """Records CUDA graphs that share their memory; None where there are none, on CPU.

    They may share it, as no two run at one time, and results are read before the next one runs.
    """
    if device.type != "cuda":
        return None
    pool = torch.cuda.graph_pool_handle()

    def record(work: Work) -> Work:
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # libraries make plans and workspaces, which a recording must not
            work()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # others' threads may go on
            out = work()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    return record
