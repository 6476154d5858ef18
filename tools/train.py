"""Train a model of any method but btm: `tools/train.py --config FILE [--section.key value ...]`.

Under torchrun every rank runs this file. `--help` lists all settings.
"""

import os
import sys
from pathlib import Path

from megabts.config.load import difference, explicit_keys, load_config
from megabts.errors import run_tool
from megabts.runtime.failure import told_once


def main() -> int:
    """Config, ranks, model and data, trainer, fit."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # below it: pages of C++ frames when a rank is gone
    with told_once():
        config = load_config(sys.argv[1:])
        from megabts.parallel.layout import check_layout
        from megabts.runtime.device import Launch, stop_communication
        from megabts.runtime.log import configure_logging
        from megabts.runtime.rendezvous import meet
        from megabts.runtime.watchdog import watched
        from megabts.train.setup import adopt_sizes, build_run, open_start, start_ranks
        from megabts.train.trainer import Trainer

        launch = Launch.from_environment()
        configure_logging(launch.rank)
        meeting = meet(launch, config.parallel.timeout)
        with watched(meeting, config.parallel.timeout) as progress:
            mesh, device = start_ranks(config, launch, meeting.store if meeting else None)
            start = open_start(config, mesh)
            config = adopt_sizes(config, explicit_keys(sys.argv[1:]), start)
            check_layout(config, launch.world_size)  # before the settings are listed, so that its line stands alone
            if launch.rank == 0:
                print(difference(config), flush=True)
            code = Trainer(build_run(config, mesh, device, start), progress).fit()
            stop_communication()
        if "LAUNCH_EXIT_CODE" in os.environ:  # megabts.runtime.torchrun: after a signal torchrun does not know it
            Path(os.environ["LAUNCH_EXIT_CODE"]).write_text(str(code))
        return code


if __name__ == "__main__":
    run_tool(main)
