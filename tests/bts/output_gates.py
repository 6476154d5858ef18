"""The gates of a mixture's output a second time: from the members' log-probabilities along a whole text, in loops."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megabts.bts.model import BTSModel
from megabts.model.attention import make_context
from tests.bts.reference import rms_norm, softmax


@torch.no_grad()
def output_gates(model: BTSModel, ids: Sequence[int], eod_id: int | None = None) -> Tensor:
    """[s, members], of one text whose documents, each ended by `eod_id`, know nothing of one another."""
    ends = [place + 1 for place, token in enumerate(ids) if token == eod_id]
    starts = [0, *(end for end in ends if end < len(ids))]
    stops = [*starts[1:], len(ids)]
    return torch.cat([_of_document(model, ids[a:b]) for a, b in zip(starts, stops, strict=True)])


def _of_document(model: BTSModel, ids: Sequence[int]) -> Tensor:
    names, config = list(model.bts.members), model.config
    weights = {name: parameter.double() for name, parameter in model.named_parameters()}
    context = make_context(config, torch.arange(len(ids)), model.dtype)
    states = model.run_layers(0, config.num_layers, model.embed(torch.tensor([ids])), context)[:, :, 0].double()
    rows = []
    told: list[list[Tensor]] = []  # by position and member, log-probabilities [V] of the next token
    for t in range(len(ids)):
        normed = [
            rms_norm(state[t], weights[f"members.{name}.final_norm.weight"], config.norm_eps)
            for name, state in zip(names, states, strict=True)
        ]
        logits = [weights[f"output.gates.{name}.weight"][0] @ normed[0] for name in names]
        for j in range(min(model.bts.evidence, t)):
            tap, token = weights["output.evidence"][j], ids[t - j]
            logits = [logit + tap * told[t - j - 1][member][token] for member, logit in enumerate(logits)]
        rows.append(torch.stack(softmax(logits)))
        spoken = [torch.exp(weights[f"members.{n}.head.weight"] @ x) for n, x in zip(names, normed, strict=True)]
        told.append([torch.log(powers / powers.sum()) for powers in spoken])
    return torch.stack(rows).float()
