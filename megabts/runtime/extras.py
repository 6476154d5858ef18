"""Libraries that some commands alone need: extras of setup.py."""

from importlib import util

from megabts.errors import UserError

NEEDS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "hf": ("comparing logits", ("transformers",), ", or give --check tensors"),
    "eval": ("running tasks", ("lm_eval",), ""),
    "serve": ("serving", ("fastapi", "uvicorn", "prometheus_client"), ""),
}
"""By extra: what is done with it, its modules, and what can be done without it."""


def require(extra: str) -> None:
    """Raise UserError when a module of an extra is not installed; none of them is loaded."""
    purpose, modules, otherwise = NEEDS[extra]
    missing = [name for name in modules if util.find_spec(name) is None]
    if missing:
        raise UserError(f"{purpose} needs {', '.join(missing)}; pip install -e '.[{extra}]'{otherwise}")
