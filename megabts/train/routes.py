"""What a MoE model's routers did in a training step, for the log, the metrics file and TensorBoard."""

from collections.abc import Iterator
from contextlib import contextmanager

from megabts.moe.model import MoEModel
from megabts.moe.routes import record_routes, route_figures
from megabts.train.setup import Run


@contextmanager
def watch_routes(run: Run, *, wanted: bool) -> Iterator[dict[str, float]]:
    """Around a training step: the yielded dict has `route_figures` of the whole global batch once the block has ended.

    It stays empty for other models, and where the figures are not `wanted` (the same on every rank). Every rank must
    call it, and gets all layers. With train.recompute full each pass counts twice, which changes no figure.
    """
    figures: dict[str, float] = {}
    if not wanted or not isinstance(run.model, MoEModel):
        yield figures
        return
    with record_routes(run.model) as record:
        yield figures
    record.over_ranks(run.config.model.num_layers, run.config.moe, (run.mesh.dp, run.mesh.pp), run.device)
    figures.update(route_figures(record, run.config.moe.balance))
