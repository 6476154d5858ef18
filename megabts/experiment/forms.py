"""The stitched models of the comparison: how their settings differ from the paper's form (BTS, arXiv 2502.00075)."""

from dataclasses import replace

from megabts.bts.parameters import parameter_report
from megabts.bts.plan import stitch_plan
from megabts.config.methods import FORMS, BTSConfig
from megabts.config.model import ModelConfig
from megabts.config.run import RunConfig

Settings = dict[str, str]
"""Values by the keys that `tools/train.py` takes, and `hub`: the expert that is the hub, `without`: one left out."""

STITCHED: dict[str, Settings] = {
    name: {f"bts.{key}": str(value) for key, value in form.items()} for name, form in FORMS.items()
}
"""The paper's form, and the best found."""


def ablations(model: ModelConfig, stitch: RunConfig, experts: tuple[str, ...]) -> dict[str, Settings]:
    """The paper's ablations and forms beyond it, for members of `model` and the configuration of the stitches' runs.

    The paper's: how many stitch layers, one kind of them only, which member is the hub, what experts continue with,
    how the stitches start. Beyond it: where the stitch layers sit, gates, rank, learning rate, and what of the mixture
    of outputs matters.
    """
    mixture, lr = STITCHED["bts-mixture"], stitch.optimizer.lr
    return {
        **{f"bts, K = {name}": layers(number) for name, number in _numbers(model, stitch.bts).items()},
        "bts, Experts-into-Hub only": {"bts.alternating": "false"},
        f"bts, hub {experts[0]}": {"hub": experts[0]},
        "bts, stream unchanged": {"bts.expert_stream": "unchanged"},
        "bts, hub leaning": {"bts.start": "hub_leaning"},
        "bts, hub preserving": {"bts.start": "hub_preserving"},
        **{f"bts, placed {name}": {"bts.placement": str(at)} for name, at in placements(model, stitch.bts).items()},
        "bts, token gates": {"bts.gate": "token"},
        "bts, normalised gate input": {"bts.gate_input": "normalised"},
        "bts, 3 x lr": {"optimizer.lr": f"{3 * lr:g}"},
        "bts, 0.33 x lr": {"optimizer.lr": f"{lr / 3:.3g}"},
        **equal_parameters(model, replace(stitch.bts, experts=dict.fromkeys(experts, ""))),
        "bts-mixture, no evidence": {key: value for key, value in mixture.items() if key != "bts.evidence"},
        "bts-mixture, nothing else": {"bts.output": "mixture"},
        "bts-mixture, token gates": {**mixture, "bts.gate": "token"},
        "bts-mixture, K = 1": {**mixture, **layers(1)},
    }


def layers(number: int) -> Settings:
    """So many stitch layers."""
    return {"bts.num_stitch_layers": str(number)}


def _numbers(model: ModelConfig, bts: BTSConfig) -> dict[str, int]:
    """Numbers of stitch layers by their names; 1, 4 and 10 are the paper's, L is one after every layer."""
    all_layers = model.num_layers
    few = {str(number): number for number in (1, 2, 4, 10) if number < all_layers}
    return {name: number for name, number in {**few, "L": all_layers}.items() if number != bts.num_stitch_layers}


def placements(model: ModelConfig, bts: BTSConfig) -> dict[str, list[int]]:
    """Uneven places for as many stitch layers, that train as many parameters: each kind is there as often.

    late: after the last K layers; early: after the first K - 1, and L. None that is the places of `bts` itself.
    """
    num_layers, number = model.num_layers, bts.num_stitch_layers
    uneven = {"late": [*range(num_layers - number + 1, num_layers + 1)], "early": [*range(1, number), num_layers]}
    own = [point.after for point in stitch_plan(num_layers, bts)]
    return {name: places for name, places in uneven.items() if places != own}


def equal_parameters(model: ModelConfig, paper: BTSConfig) -> dict[str, Settings]:
    """More stitch layers with projections of low rank, that train as many parameters as the paper's form (within 2%).

    A full gate slice is as large as a full projection, so that one stitch layer more, or two, is what low rank pays
    for; with token gates, which cost next to nothing, a stitch layer after every layer is. Beside the forms of equal
    size by nature (gate input, learning rate) these tell what the parameters are best spent on. With 8 layers of width
    128 and three experts, of 425,984 parameters: K = 5 of rank 34 425,472, K = 6 of rank 18 427,008, and with token
    gates K = 8 of rank 69 427,520.
    """
    target = parameter_report(model, paper).trained
    more = {
        f"low rank, K = {number}": replace(paper, num_stitch_layers=number)
        for number in range(paper.num_stitch_layers + 1, model.num_layers)[:2]
    }
    more["low rank, token gates, K = L"] = replace(paper, num_stitch_layers=model.num_layers, gate="token")
    found = {}
    for name, bts in more.items():
        rank = matching_rank(model, bts, target)
        gate = {"bts.gate": "token"} if bts.gate == "token" else {}
        if rank:
            found[f"bts, {name}"] = {**layers(bts.num_stitch_layers), **gate, "bts.projection_rank": str(rank)}
    return found


def matching_rank(model: ModelConfig, bts: BTSConfig, trained: int) -> int:
    """The rank with which `bts` trains about `trained` parameters; 0 where the gates alone are too many."""
    first, second = (parameter_report(model, replace(bts, projection_rank=rank)).trained for rank in (1, 2))
    return max(0, 1 + round((trained - first) / (second - first)))
