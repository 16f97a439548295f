"""``python -m lightning_ablate.export RUN OUT``: writes a condition of a run of ``fit`` as a smaller model."""

import argparse
from pathlib import Path

from lightning_ablate.__main__ import running
from lightning_ablate.calibration import Calibration
from lightning_ablate.cli import AblationCLI, callback_of
from lightning_ablate.errors import ConfigError
from lightning_ablate.identity import fingerprint
from lightning_ablate.results import Results
from lightning_ablate.run import CHECKPOINT, Run
from lightning_ablate.trust import HELP, config_of


def main() -> None:
    """Reads the command line, builds the run's model and callback again, and exports."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_ablate.export",
        description="Writes a condition of a run as a smaller model that transformers or timm load by themselves.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run of `fit`, which holds ablation.ckpt")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    parser.add_argument("--method", required=True, help="the method, as results call it")
    parser.add_argument("--fraction", type=float, help="the fraction that was ablated; by default the only one")
    parser.add_argument("--seed", type=int, help="of the choice of neurons; by default the first one")
    parser.add_argument("--trust", metavar="NAME", action="append", help=HELP)
    given, more = parser.parse_known_args()
    checkpoint = str(given.run / CHECKPOINT)
    config = config_of(checkpoint, given.trust or (), more)
    if config is None:
        raise ConfigError(f"{checkpoint!r} holds no configuration: of a run in Python, use callback.export()")
    here = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto", "--trainer.logger=false"]
    cli = AblationCLI(["--config", config, *here, *more], run=False)
    callback = callback_of(cli.trainer)
    cli.model.configure_model()
    cli.model = cli.trainer.precision_plugin.convert_module(cli.model)  # to the precision of the calibration
    callback.run = Run(
        fingerprint(cli.model.target), Calibration.load(checkpoint, cli.model.target, callback.sweep.bases)
    )
    callback.results = Results.load(given.run)
    condition = {"method": given.method, "fraction": given.fraction, "seed": given.seed}
    print(callback.export(cli.model, given.out, **condition, trainer=cli.trainer, data=cli.datamodule))


if __name__ == "__main__":
    running(main)
