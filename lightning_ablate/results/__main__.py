"""``python -m lightning_ablate.results RUN RUN ...``."""

from lightning_ablate.join import main

if __name__ == "__main__":
    main()
