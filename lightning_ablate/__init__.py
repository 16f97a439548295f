"""Evaluates neuron ablation in transformers: what a model loses, and what to put in a neuron's place.

The names in ``__init__.pyi`` are imported when they are asked for, so that ``--help`` doesn't cost the import of torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
