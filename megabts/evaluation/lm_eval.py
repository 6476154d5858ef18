"""lm-evaluation-harness' own command line, with the model "megabts" known to it.

python -m megabts.evaluation.lm_eval run --model megabts --model_args checkpoint=DIR --tasks gsm8k

The arguments are those of `lm_eval`, which has no way to find models outside its own package.
"""

from megabts.errors import UserError, run_tool


def main() -> None:
    """Register the model, then hand over."""
    require_lm_eval()
    from lm_eval.__main__ import cli_evaluate

    import megabts.evaluation.lm_eval_model
    from megabts.runtime.device import stop_communication
    from megabts.runtime.failure import told_once

    assert megabts.evaluation.lm_eval_model
    with told_once():
        cli_evaluate()
        stop_communication()


def require_lm_eval() -> None:
    """Raises UserError when the harness is not installed; no part of it is loaded."""
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise UserError("tasks need lm-evaluation-harness; pip install -e '.[eval]'")


if __name__ == "__main__":
    run_tool(main)
