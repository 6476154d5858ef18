"""A stand-in for CUDA graphs on CPU: operators are recorded with the tensors and numbers they had, and run again so.

As in a graph, nothing of Python runs again: an operator reads and writes the very memory of the recording. What would
make a graph wait for the GPU, or copy to it, is refused.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megabts.runtime.graphs import Work

REFUSED = ("_local_scalar_dense", "lift_fresh", "nonzero", "is_nonzero", "equal", "masked_select", "unique")


class Tape(TorchDispatchMode):
    """The operators that run inside its block, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in REFUSED:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def run(self) -> None:
        """All of them again: what they return goes to where it went the first time."""
        for function, args, kwargs, out in self.calls:
            read = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            kept = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
            if function._schema.is_mutable:  # type: ignore[attr-defined]
                function(*args, **kwargs)
            elif not all(x.untyped_storage().data_ptr() in read for x in kept):  # a view is what its tensor is
                new = [x for x in tree_leaves(function(*args, **kwargs)) if isinstance(x, Tensor)]
                for old, value in zip(kept, new, strict=True):
                    old.copy_(value)


class Recorder:
    """A `runtime.graphs.Record` of tapes."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def __call__(self, work: Work) -> Work:
        self.recorded += 1
        work()
        with Tape() as tape:
            out = work()

        def replay() -> Tensor:
            self.replayed += 1
            out.fill_(float("nan"))
            tape.run()
            return out

        return replay
