"""``python -m lightning_ablate fit`` and ``validate``."""

import errno
import re
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


# jsonargparse lists every type it tried; what went wrong is said in between
_TRIED = re.compile(r"Does not validate|Subtypes:|Errors:|Given value|- Expected a <class 'NoneType'>")


def main() -> None:
    """Runs the command line; what the user can mend ends in one line."""
    for message in EXPECTED:
        warnings.filterwarnings("ignore", message)
    from jsonargparse import ArgumentError
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from lightning_ablate.cli import AblationCLI
    from lightning_ablate.errors import AblationError

    try:
        AblationCLI()
    except (AblationError, MisconfigurationException) as error:
        sys.exit(f"error: {error}")
    except ArgumentError as error:
        print(f"error: {_in_a_line(str(error))} (--help lists the options)", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that can't be written
        if error.errno not in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EFBIG):
            raise
        sys.exit(f"error: could not write {error.filename or 'a file'}: {error.strerror}; what was written stays")
    except SIGTERMException:  # Lightning's, with which Python would exit as if all were well
        print("stopped by SIGTERM; the same command with the same --ablation.folder goes on", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)


def _in_a_line(message: str) -> str:
    lines = [line.strip().removeprefix("- ") for line in message.splitlines() if not _TRIED.match(line.strip())]
    return " ".join(filter(None, lines))


if __name__ == "__main__":
    main()
