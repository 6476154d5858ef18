"""lm-evaluation-harness' own command line, with the model "megabts" known to it.

python -m megabts.evaluation.lm_eval run --model megabts --model_args checkpoint=DIR --tasks gsm8k

The arguments are those of `lm_eval`, which has no way to find models outside its own package.
"""

from megabts.errors import run_tool
from megabts.runtime.extras import require
from megabts.runtime.log import quiet_bars


def main() -> None:
    """Register the model, then hand over."""
    require("eval")
    quiet_bars()
    from lm_eval.__main__ import cli_evaluate

    import megabts.evaluation.lm_eval_model
    from megabts.runtime.device import stop_communication
    from megabts.runtime.failure import told_once

    assert megabts.evaluation.lm_eval_model
    with told_once():
        cli_evaluate()
        stop_communication()


if __name__ == "__main__":
    run_tool(main)
