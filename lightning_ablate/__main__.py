"""``python -m lightning_ablate fit`` and ``validate``; the first screen doesn't import torch."""

import errno
import signal
import sys
import warnings
from collections.abc import Callable

EXPECTED = (
    "Found .* module.* in eval mode",  # the target always is
    "The '.*_dataloader' does not have many workers",
    "The number of training batches",
    "You have overridden `on_before_batch_transfer`",  # masking belongs to MaskedLM, whatever the data
    ".*LeafSpec.*",  # Lightning's own call of torch
)
_FAULTS = errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EFBIG
USAGE = """usage: python -m lightning_ablate {fit,validate} [options]

Evaluates neuron ablation in transformers: what a model loses, and what to put in a neuron's place.

  fit       calibrates (and learns, where a method asks for it), leaves ablation.ckpt, and sweeps all conditions
  validate  sweeps again with the statistics of a checkpoint (--ckpt_path), under other options if you like

Without options, fit runs on an embedded model and data. All options: python -m lightning_ablate fit --help
"""


def main() -> None:
    """Runs the command line."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(USAGE)
        return
    if sys.argv[1] not in ("fit", "validate") and not sys.argv[1].startswith("-"):
        print(f"error: unknown command {sys.argv[1]!r}, expected fit or validate (--help)", file=sys.stderr)
        sys.exit(2)

    def command() -> object:
        from lightning_ablate.cli import AblationCLI

        return AblationCLI()

    running(command)


def running(command: Callable[[], object]) -> None:
    """Calls a command; errors that the user can mend end in one line."""
    for message in EXPECTED:
        warnings.filterwarnings("ignore", message)
    from jsonargparse import ArgumentError
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from lightning_ablate.errors import AblationError
    from lightning_ablate.progress import above_bars

    try:
        with above_bars():
            command()
    except (AblationError, MisconfigurationException) as error:
        sys.exit(f"error: {error}")
    except ArgumentError as error:
        print(f"error: {error} (--help lists the options)", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that can't be written
        if error.errno not in _FAULTS:
            raise
        sys.exit(f"error: could not write {error.filename or 'a file'}: {error.strerror}; what was written stays")
    except SIGTERMException:  # Lightning's, with which Python would exit as if all were well
        print("stopped by SIGTERM; the same command with the same --ablation.dirpath goes on", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    main()
