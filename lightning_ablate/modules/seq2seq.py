"""Encoder-decoder language models that transformers loads."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_ablate.metrics import Scored
from lightning_ablate.modules.language import LanguageModel, TextBatch
from lightning_ablate.seeds import seed_of
from lightning_ablate.shown import shown_text
from lightning_ablate.sites import Site
from lightning_ablate.sites.hooks import first_of

_FIRST, _SECOND = 5, 3  # tokens of two texts


class Seq2SeqLM(LanguageModel):
    """An encoder-decoder that reads one text and predicts another; scored at every token of the second.

    Batches hold ``labels`` ``(batch, target_seq)`` int64, -100 at padding, and the inputs of any language model.
    """

    auto_class = "AutoModelForSeq2SeqLM"
    ahead = 1  # the decoder reads the label before

    def inputs(self, batch: TextBatch) -> dict[str, Tensor]:
        """The target's arguments for a batch, its decoder's among them; its logits are at the labels' positions."""
        target: Any = self.target
        if not hasattr(target, "prepare_decoder_input_ids_from_labels"):
            return {**super().inputs(batch), "labels": batch["labels"]}  # the target makes its decoder's inputs of them
        decoded = target.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        return {**super().inputs(batch), "decoder_input_ids": decoded}

    def evaluate(self, batch: TextBatch) -> Scored:
        """Every position of the second text, unless it or the one before is padding."""
        scored = self._decoded(batch)
        scored[:, 1:] &= batch["labels"][:, :-1] >= 0  # a decoder reads the label before
        rows, places = scored.nonzero(as_tuple=True)
        logits = self.logits_at(batch, rows, places)
        return Scored(logits, batch["labels"][rows, places], batch["index"][rows], position=places)

    def position_at(self, site: Site, position: Tensor) -> Tensor | None:
        """None within the encoder, which reads the first text."""
        return None if self._reads_first(site) else position

    def shown(self, batch: TextBatch) -> list[dict[str, Any]]:
        """The text of each token that the decoder reads, the first of which is the start token; None at padding."""
        labels = batch["labels"]
        pairs = zip(labels.clamp_min(0), labels >= 0, strict=True)
        return [{"tokens": ["", *shown_text(self.tokenizer, *one)["tokens"]]} for one in pairs]

    def valid_at(self, site: Site, batch: TextBatch) -> Tensor:
        """Everything but padding: of the first text in the encoder and where it is read, else of the second."""
        return self.valid(batch) if self._reads_first(site) else self._decoded(batch)

    def probes(self, batch: TextBatch) -> tuple[TextBatch, TextBatch]:
        """The first example, and the same with other first tokens in both texts."""
        one, other = super().probes(batch)
        return one, {**other, "labels": self._with_another(one["labels"])}

    def hidden(self, batch: TextBatch) -> Sequence[Tensor]:
        """The encoder's last tokens, and the logits of every position of the second text."""
        output = self.target(**self.inputs(batch))
        return [output.encoder_last_hidden_state, output.logits]

    def source(self, kind: str, seed: int, batch: TextBatch) -> TextBatch:
        """Two texts of random characters or token ids, as long as those of the batch; there is no generated text."""
        first = super().source(kind, seed, batch)
        if kind == "example":
            return first
        second = super().source(kind, seed_of(seed, "second"), {**batch, "input_ids": batch["labels"]})
        return {**first, "labels": second["input_ids"]}

    def on_train_batch_start(self, batch: TextBatch, batch_idx: int) -> None:
        """At the first batch, also finds which modules read which text, by texts of two lengths."""
        super().on_train_batch_start(batch, batch_idx)
        if batch_idx == 0 and not self._lengths:
            ids = batch["input_ids"][:1, :1].expand(1, _FIRST + _SECOND)  # any token
            one = {"input_ids": ids[:, :_FIRST], "labels": ids[:, _FIRST:]}
            with ExitStack() as stack, torch.no_grad():
                for path, module in self.target.named_modules():
                    stack.callback(module.register_forward_hook(partial(self._note_length, path)).remove)
                self.target(**self.inputs(one | {"attention_mask": torch.ones_like(one["input_ids"])}))

    def _note_length(self, path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if (made := first_of(output)) is not None:
            self._lengths[path] = made.shape[1]

    def _reads_first(self, site: Site) -> bool:
        known = self._lengths.get(site.path)
        within = self.target.get_submodule(site.path) in self._encoder
        return known == _FIRST if known in (_FIRST, _SECOND) else within

    @cached_property
    def _lengths(self) -> dict[str, int]:
        """How many positions each module has where the texts have ``_FIRST`` and ``_SECOND`` tokens."""
        return {}

    @cached_property
    def _encoder(self) -> set[nn.Module]:
        return set(cast(Any, self.target).get_encoder().modules())

    def _decoded(self, batch: TextBatch) -> Tensor:
        return (batch["labels"] >= 0) & (batch["index"] >= 0).unsqueeze(1)
