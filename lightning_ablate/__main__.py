"""``python -m lightning_ablate fit`` and ``validate``."""

import errno
import signal
import sys
import warnings

EXPECTED = (
    "Found .* module.* in eval mode",  # as the target is meant to be
    "The '.*_dataloader' does not have many workers",
    "The number of training batches",
    "You have overridden `on_before_batch_transfer`",  # masking belongs to MaskedLM, whatever the data
    ".*LeafSpec.*",  # Lightning's own call of torch
)


def main() -> None:
    """Runs the command line; what the user can mend ends in one line."""
    for message in EXPECTED:
        warnings.filterwarnings("ignore", message)
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from lightning_ablate.cli import AblationCLI
    from lightning_ablate.errors import AblationError

    try:
        AblationCLI()
    except AblationError as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # a full disk, a folder that can't be written
        if error.errno not in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EFBIG):
            raise
        sys.exit(f"error: could not write {error.filename or 'a file'}: {error.strerror}; what was written stays")
    except SIGTERMException:  # Lightning's, with which Python would exit as if all were well
        print("stopped by SIGTERM; the same command with the same --ablation.folder goes on", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    main()
