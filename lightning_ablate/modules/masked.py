"""Masked language models that transformers loads."""

from typing import Any

import torch
from torch import Tensor

from lightning_ablate.errors import ConfigError
from lightning_ablate.metrics import Scored
from lightning_ablate.modules.language import LanguageModel, TextBatch
from lightning_ablate.seeds import seed_of


class MaskedLM(LanguageModel):
    """A language model that fills in chosen tokens, and is scored at these.

    The share ``mlm_probability`` of each example's tokens is chosen: 80% of them are masked, 10% replaced by a random
    token, 10% kept (Devlin et al. 2019). The draw depends on the seed and the example alone, so it is the same for each
    condition, batch size and process. Calibration reads the same kind of input.

    Args:
        mlm_probability: share of an example's ordinary tokens that is chosen, above 0 and at most 1; at least one is.
        mask_seed: of the draw.
    """

    auto_class = "AutoModelForMaskedLM"
    causal = False
    facts = ("mlm_probability", "mask_seed")

    def __init__(self, name: str, *, mlm_probability: float = 0.15, mask_seed: int = 0, **options: Any) -> None:
        if not 0 < mlm_probability <= 1:
            raise ConfigError(
                f"mlm_probability is {mlm_probability}, expected a share of the tokens above 0 and at most 1 "
                "(--model.mlm_probability)"
            )
        super().__init__(name, **options)
        self.mlm_probability, self.mask_seed = mlm_probability, mask_seed

    def on_before_batch_transfer(self, batch: TextBatch, dataloader_idx: int) -> TextBatch:
        """Adds ``labels`` (-100 where nothing is asked) and masks ``input_ids``, unless the data bring labels.

        Adds ``chosen`` ``(batch, most)``, the positions of the labels, filled with -1, so that a GPU needn't find them.
        """
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        if "labels" not in batch:
            batch = {**batch, **self._masked(batch)}
        return {**batch, "chosen": _label_positions(batch)}

    def evaluate(self, batch: TextBatch) -> Scored:
        """The chosen positions."""
        chosen = batch["chosen"] if "chosen" in batch else _label_positions(batch)
        position = chosen.clamp_min(0)
        rows = torch.arange(len(position), device=position.device).unsqueeze(1)
        targets = batch["labels"].gather(1, position).clamp_min(0)
        example = torch.where(chosen < 0, -1, batch["index"].unsqueeze(1))
        logits = self.logits_at(batch, rows.expand_as(position).flatten(), position.flatten())
        return Scored(logits, targets.flatten(), example.flatten(), position=position.flatten())

    def _masked(self, batch: TextBatch) -> dict[str, Tensor]:
        inputs, labels = batch["input_ids"].clone(), torch.full_like(batch["input_ids"], -100)
        eligible = batch["attention_mask"].bool() & torch.isin(inputs, self._ordinary)
        for ids, asked, candidates, index in zip(inputs, labels, eligible, batch["index"].tolist(), strict=True):
            generator = torch.Generator().manual_seed(seed_of(self.mask_seed, "mask", index))
            positions = candidates.nonzero().squeeze(1)
            count = min(len(positions), max(1, round(self.mlm_probability * len(positions))))
            chosen = positions[torch.randperm(len(positions), generator=generator)[:count]]
            fate = torch.rand(count, generator=generator)
            random = self._ordinary[torch.randint(len(self._ordinary), (count,), generator=generator)]
            asked[chosen] = ids[chosen]
            ids[chosen] = torch.where(fate < 0.8, self._mask_token(), torch.where(fate < 0.9, random, ids[chosen]))
        return {"input_ids": inputs, "labels": labels}

    def _generated(self, seed: int, length: int) -> Tensor:
        """Starts from masks alone, and samples a random sixteenth of them at a time (Wang & Cho 2019)."""
        generator = torch.Generator().manual_seed(seed)
        ids = self._framed([self._mask_token()] * length, length)
        positions = (ids == self._mask_token()).nonzero().squeeze(1)
        for some in positions[torch.randperm(len(positions), generator=generator)].tensor_split(16):
            batch = {"input_ids": ids.unsqueeze(0).to(self.device)}
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            logits = self.logits(batch)[0, some.to(self.device)].float().cpu()[:, self._ordinary]
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1) if len(some) else some
            ids[some] = self._ordinary[drawn]
        return ids

    def _mask_token(self) -> int:
        if self.tokenizer.mask_token_id is None:
            raise ConfigError(f"the tokenizer of {self.name} has no mask token; a causal model is a CausalLM")
        return self.tokenizer.mask_token_id


def _label_positions(batch: TextBatch) -> Tensor:
    """Where ``labels`` ``(batch, seq)`` ask for a token that isn't padding: ``(batch, most)`` int64, filled with -1."""
    asked = (batch["labels"] != -100) & batch["attention_mask"].bool()
    most = int(asked.sum(1).max())
    order = torch.argsort(asked.to(torch.int8), dim=1, descending=True, stable=True)[:, :most]
    return torch.where(asked.gather(1, order), order, -1)
