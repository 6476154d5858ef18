"""The stand-in's FusedAdam, from the documented formula; apex's has the same arguments, of these, and state."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):
    """AdamW or Adam; it counts steps in the group, and skips parameters without a gradient."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        adam_w_mode: bool = True,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = adam_w_mode

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2), decay = self.state[parameter], group["betas"], group["weight_decay"]
        if not state:
            state.update(exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        grad = parameter.grad if self.adam_w_mode else parameter.grad + decay * parameter
        m = state["exp_avg"].copy_(beta1 * state["exp_avg"] + (1 - beta1) * grad)
        v = state["exp_avg_sq"].copy_(beta2 * state["exp_avg_sq"] + (1 - beta2) * grad * grad)
        update = m / (1 - beta1 ** group["step"]) / ((v / (1 - beta2 ** group["step"])).sqrt() + group["eps"])
        if self.adam_w_mode:
            update += decay * parameter
        parameter.sub_(group["lr"] * update)
