"""``python -m lightning_ablate fit`` and ``validate``."""

import sys
import warnings


def main() -> None:
    """Runs the command line; what the user can mend ends in one line."""
    # the target is meant to be in eval mode and without gradients, and the embedded runs are short
    for message in ("Found .* module.* in eval mode", "The '.*_dataloader' does not have many workers", ".*LeafSpec.*"):
        warnings.filterwarnings("ignore", message)
    from lightning_ablate.cli import AblationCLI
    from lightning_ablate.errors import AblationError

    try:
        AblationCLI()
    except AblationError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
