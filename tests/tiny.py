"""Tiny targets, the data to run them on, and runs."""

import os

import lightning
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_ablate import AblationCallback, AblationModule, Calibration, CausalLM, Scored
from lightning_ablate.phases import CalibrationPhase
from lightning_ablate.run import Run
from lightning_ablate.sites import find_sites
from lightning_ablate.statistics import Moments, SiteStatistics, with_needs
from tests.targets import *  # noqa: F403 - tests say tiny.gpt2() and so on
from tests.targets import VOCABULARY, gpt2

LENGTH = 16


def tokens(batch=3, length=LENGTH, seed=0):
    """A batch of token ids, the last two positions of the first example being padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY - 20, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "index": torch.arange(batch)}


def mixed(positions=400, far=100):
    """Neurons that depend on one another, one far from zero, one constant, one tiny; ``(positions, 12)``."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(positions, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    x[:, 1], x[:, 2], x[:, 3] = x[:, 1] + far, 3.0, x[:, 3] * 1e-6
    return x


def gathered(site, batches, *kinds, valid=None, weight=None):
    """Statistics of a site, each with those before it."""
    found = {}
    for kind in kinds:
        found[kind] = kind.of(site, SiteStatistics(site.name, found))
        for batch in batches:
            found[kind].update(batch, valid)
    return SiteStatistics(site.name, found, weight=weight)


def built(module):
    """The module, with its target made, as a Trainer would have it made."""
    module.configure_model()
    return module


def run(model):
    with torch.no_grad():
        if hasattr(model, "config"):
            ids = tokens()["input_ids"]
            return model(ids, **({"labels": ids[:, :9].clone()} if model.config.is_encoder_decoder else {})).logits
        return model(torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)))


def sites(model, *which):
    return find_sites(model, lambda: run(model), which or ("attention",))


class Own(AblationModule):
    """A target that is already there, on token batches."""

    def __init__(self, model, name="own"):
        super().__init__(name)
        self.own = [model]  # in a list, so that it becomes a submodule only when the target is built

    def build_target(self):
        return self.own[0]

    def evaluate(self, batch):
        return CausalLM.evaluate(self, batch)

    def valid(self, batch):
        return CausalLM.valid(self, batch)

    def logits_at(self, batch, rows, places):
        return self.logits(batch)[rows, places]

    def logits(self, batch):
        return self.target(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


class Ran(Own):
    """Any target, on the inputs of ``run`` whatever the batch, outside of a Trainer."""

    def __init__(self, model):
        super().__init__(model)
        self.target = model

    def evaluate(self, batch):
        logits = run(self.target)
        count = len(logits[..., 0].flatten())
        return Scored(logits.view(count, -1), torch.zeros(count, dtype=torch.int64), torch.arange(count) // len(logits))

    def valid(self, batch):
        return None

    def examples_of(self, batch, batch_idx):
        return torch.arange(3)

    def first(self, batch, count):
        return None


def calibrated(model, *methods, module=None, batches=(None,)):
    """What these methods need to know, gathered in plain loops; by default from the inputs of ``run``."""
    found = Run("", Calibration())
    kinds = with_needs([Moments, *(kind for method in methods for kind in method.statistics)])
    phase = CalibrationPhase(module or Ran(model), found, kinds)
    for epoch in range(phase.epochs):
        phase.begin_epoch(epoch)
        for index, batch in enumerate(batches):
            phase.step(batch, index)
        phase.end_epoch()
    return found.calibration


class Counting(Own):
    passes = 0

    def evaluate(self, batch):
        self.passes += 1
        return super().evaluate(batch)


def loader(examples=6, batch_size=2, seed=0):
    batch = tokens(examples, seed=seed)
    rows = [{name: value[i] for name, value in batch.items()} for i in range(examples)]
    return DataLoader(rows, batch_size=batch_size)


def stream(batches):
    """A loader of batches that tells no length."""

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(batches)

    return DataLoader(Stream(), batch_size=None)


class Death(Exception):
    """A run that dies."""


class Dies(lightning.Callback):
    """Ends a run behind a batch of an epoch of ``fit``, or of the sweep (epoch None): by Death, or by a signal."""

    def __init__(self, epoch: int | None, batch: int, signal: int | None = None):
        self.epoch, self.batch, self.signal = epoch, batch, signal

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._end((trainer.current_epoch, batch_idx))

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self._end((None, batch_idx))

    def _end(self, here):
        if here == (self.epoch, self.batch):
            if self.signal is None:
                raise Death
            os.kill(os.getpid(), self.signal)


def trainer(folder, callback, *more, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    quiet |= {"logger": False, "accelerator": "cpu", "max_epochs": 1, "default_root_dir": str(folder)}
    return lightning.Trainer(callbacks=[callback, *more], **(quiet | options))


def fit(folder, module=None, train=None, val=None, callback=None, more=(), **options):
    """Runs the whole of ``fit`` and returns the module and the callback."""
    module = module or Own(gpt2())
    callback = callback or AblationCallback(fractions=[0.5, 1.0], seeds=[1, 2])
    val = loader(seed=2) if val is None else val  # a stream has no length, and so no truth
    trainer(folder, callback, *more, **options).fit(module, loader(seed=1) if train is None else train, val)
    return module, callback


def validate(folder, checkpoint, callback=None, module=None, more=()):
    """Sweeps by ``validate``, from a checkpoint, and returns the results."""
    callback = callback or AblationCallback(fractions=[0.5, 1.0], seeds=[1, 2])
    made, module = trainer(folder, callback, *more), module or Own(gpt2())
    made.validate(module, loader(seed=2), ckpt_path=checkpoint, verbose=False)
    return callback.results
