"""A BTS model without some of its experts, out of the parameters of the whole one: no weight is read or copied."""

from collections.abc import Iterable

import torch

from megabts.bts.build import remove_expert
from megabts.bts.model import BTSModel
from megabts.model.torch_backend import TorchBackend
from megabts.parallel.mesh import ParallelMesh


def without_experts(whole: BTSModel, names: Iterable[str]) -> BTSModel:
    """The model that removing these experts leaves, of the whole one's own tensors; for a model on one rank.

    Its layers are torch's, whatever library the whole one's are of. Raises UserError for a name that is no expert's,
    or when none would be left.
    """
    bts = whole.bts
    for name in names:
        bts = remove_expert(bts, {}, name)[0]
    model = BTSModel(whole.config, bts, TorchBackend(whole.dtype, "meta", ParallelMesh().tp))
    known = dict(whole.named_parameters(remove_duplicate=False))  # a tied head is the embedding, by both names
    with torch.no_grad():
        model.load_state_dict({name: known[name] for name in model.state_dict()}, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.train(False)
    return model
