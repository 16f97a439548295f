"""Language models that transformers loads."""

import string
from collections.abc import Mapping, Sequence
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_ablate.data.text import padding_id, special_frame
from lightning_ablate.errors import DataError, TargetError
from lightning_ablate.metrics import Scored
from lightning_ablate.modules.checks import check_length, check_vocabulary, effect_of_later, vocabulary_of
from lightning_ablate.modules.head import logits_at, may_select
from lightning_ablate.modules.hub import HubModule
from lightning_ablate.seeds import seed_of
from lightning_ablate.shown import shown_text, text_of

TextBatch = Mapping[str, Tensor]
_INPUTS = "input_ids", "attention_mask", "token_type_ids", "position_ids"
_CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " "


class LanguageModel(HubModule):
    """A transformers language model and its tokenizer.

    Batches are mappings of ``input_ids`` and ``attention_mask`` ``(batch, seq)`` int64 and ``index`` ``(batch,)``
    int64, which is below 0 for examples that only fill a process's last batch. ``position_ids`` and ``token_type_ids``
    of the same shape are handed on.

    ``auto_class`` names the class of transformers that loads the target. ``causal`` is True if predictions see earlier
    tokens only, False if they see later ones too, and None if that isn't checked.
    """

    auto_class: ClassVar[str]
    causal: ClassVar[bool | None] = None
    selects: bool = False  # whether the output embedding may read the scored positions alone; the first batch shows it

    def build_target(self) -> nn.Module:
        """Loads it with its ``auto_class``."""
        return self.load(self.auto_class)

    @cached_property
    def tokenizer(self) -> Any:
        """The target's tokenizer."""
        return self.pretrained("AutoTokenizer")

    def save_processor(self, folder: Path) -> None:
        """Writes the tokenizer."""
        self.tokenizer.save_pretrained(folder)

    def valid(self, batch: TextBatch) -> Tensor:
        """Everything but padding, ``(batch, seq)``."""
        return batch["attention_mask"].bool() & (batch["index"] >= 0).unsqueeze(1)

    def logits(self, batch: TextBatch) -> Tensor:
        """The target's logits, ``(batch, seq, vocabulary)``."""
        return self.target(**self.inputs(batch)).logits

    def logits_at(self, batch: TextBatch, rows: Tensor, places: Tensor) -> Tensor:
        """The target's logits at the positions ``rows``, ``places`` ``(n,)`` int64 of a batch, ``(n, vocabulary)``."""
        head = cast(Any, self.target).get_output_embeddings() if self.selects else None
        return logits_at(lambda: self.logits(batch), head, rows, places)

    def inputs(self, batch: TextBatch) -> dict[str, Any]:
        """The target's arguments for a batch, without a cache of keys and values."""
        uncached = {"use_cache": False} if "use_cache" in self._parameters_of_forward else {}
        return {name: batch[name] for name in _INPUTS if name in batch} | uncached

    def shown(self, batch: TextBatch) -> list[dict[str, Any]]:
        """The text of each token, None at padding."""
        ids, labels = batch["input_ids"], batch.get("labels")
        if labels is not None and labels.shape == ids.shape:
            ids = torch.where(labels >= 0, labels, ids)  # what stood where the tokens are masked
        return [shown_text(self.tokenizer, *one) for one in zip(ids, batch["attention_mask"].bool(), strict=True)]

    def class_texts(self, classes: Sequence[int]) -> list[str]:
        """The text of each token."""
        return [text_of(self.tokenizer, token) for token in classes]

    def source(self, kind: str, seed: int, batch: TextBatch) -> TextBatch:
        """One sequence of random characters, token ids, or generated text; the rest is that of the first example."""
        generated = getattr(self, "_generated", None)
        make = {"characters": self._characters, "ids": self._random_ids, "generated": generated}.get(kind)
        if make is None:
            return super().source(kind, seed, batch)
        like = batch["input_ids"]
        key = kind, seed, like.shape[1]
        if key not in self._drawn:
            self._drawn[key] = make(seed_of(seed, kind), like.shape[1]).cpu()
        ids = self._drawn[key].to(like.device).unsqueeze(0)
        first = {name: tensor[:1] for name, tensor in batch.items() if name not in _INPUTS}
        return first | {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "index": ids.new_zeros(1),
            "labels": ids,
        }

    def probes(self, batch: TextBatch) -> tuple[TextBatch, TextBatch]:
        """The first example, and the same with another first token."""
        one = {name: tensor[:1] for name, tensor in batch.items()}
        return one, {**one, "input_ids": self._with_another(one["input_ids"])}

    def hidden(self, batch: TextBatch) -> Sequence[Tensor]:
        """The logits of every position."""
        return [self.logits(batch)]

    def on_before_batch_transfer(self, batch: TextBatch, dataloader_idx: int) -> TextBatch:
        """Refuses token ids that the target has no embedding for, by DataError."""
        names = ("input_ids", "partner_input_ids", "labels")
        check_vocabulary(self.target, *(batch[name] for name in names if name in batch))
        return batch

    def on_train_batch_start(self, batch: TextBatch, batch_idx: int) -> None:
        """At the first batch, refuses sequences that are too long, and a target that isn't of this kind."""
        if batch_idx == 0:
            row = int(self.valid(batch).sum(1).argmax())
            one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
            check_length(self.logits, one)
            self.selects = may_select(self.target, lambda: self.logits(one))
            if self.causal is not None:
                self._check_kind(one, self.valid(one)[0])

    def on_validation_batch_start(self, batch: TextBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """See :meth:`on_train_batch_start`."""
        self.on_train_batch_start(batch, batch_idx)

    def _check_kind(self, one: TextBatch, valid: Tensor) -> None:
        """Raises TargetError if predictions see later tokens and ``causal`` is True, or don't and it is False."""
        real, ids = valid.nonzero(), one["input_ids"]
        last = int(real.max()) if len(real) else 0  # a sharded target must run on every process, also without tokens
        others = ids[0][valid & (ids[0] != ids[0, last])]  # tokens of the text, as any other may be special
        other = int(others[0]) if len(others) else (int(ids[0, last]) + 1) % vocabulary_of(self.target)
        effect = effect_of_later(lambda changed: self.logits({**one, "input_ids": changed}), ids, last, other)
        # a quantised module's scale depends on its whole input
        quantised = any(type(module).__module__.startswith("torch.ao.") for module in self.target.modules())
        if len(real) > 1 and not quantised and (effect > 1 if self.causal else effect == 0):
            seen, kind = ("the tokens they predict", "MaskedLM") if self.causal else ("no later token", "CausalLM")
            own = type(self).__name__
            raise TargetError(f"predictions of {self.name} see {seen}, unlike a {own}'s; expected --model {kind}")

    @cached_property
    def _drawn(self) -> dict[tuple[str, int, int], Tensor]:
        """The token ids that were drawn as a source, by its kind, seed and length."""
        return {}

    @cached_property
    def _ordinary(self) -> Tensor:
        """The token ids that are not special, ``(ids,)`` int64."""
        special, known = set(self.tokenizer.all_special_ids), min(len(self.tokenizer), vocabulary_of(self.target))
        return torch.tensor([i for i in range(known) if i not in special])

    @cached_property
    def _parameters_of_forward(self) -> Sequence[str]:
        return list(signature(self.target.forward).parameters)

    def _with_another(self, ids: Tensor) -> Tensor:
        """The ids ``(1, seq)`` with another, ordinary token at the first position."""
        changed, ordinary = ids.clone(), self._ordinary.to(ids.device)
        changed[:, 0] = ordinary[ordinary != ids[0, 0]][0]
        return changed

    def _framed(self, ids: list[int], length: int) -> Tensor:
        """As many of ``ids`` as fit into ``length``, between the tokenizer's special tokens."""
        before, after = special_frame(self.tokenizer)
        return torch.tensor([*before, *ids[: length - len(before) - len(after)], *after])

    def _characters(self, seed: int, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        text, ids = "", list[int]()
        while len(ids) < length:
            drawn = torch.randint(len(_CHARACTERS), (8 * length,), generator=generator)
            text += "".join(_CHARACTERS[i] for i in drawn.tolist())
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return self._framed(ids, length)

    def _random_ids(self, seed: int, length: int) -> Tensor:
        drawn = torch.randint(len(self._ordinary), (length,), generator=torch.Generator().manual_seed(seed))
        return self._framed(self._ordinary[drawn].tolist(), length)


class CausalLM(LanguageModel):
    """A language model that predicts the next token, scored where neither a token nor the next one is padding."""

    auto_class = "AutoModelForCausalLM"
    causal, ahead = True, 1

    def repeated(self, batch: TextBatch) -> TextBatch:
        """Random tokens that aren't special, half as many as a text of the batch has, and the same ones again."""
        length = batch["input_ids"].shape[1] // 2
        drawn = torch.randint(len(self._ordinary), (length,), generator=torch.Generator().manual_seed(0))
        ids = self._ordinary[drawn].repeat(2).unsqueeze(0).to(batch["input_ids"].device)
        first = {name: tensor[:1] for name, tensor in batch.items() if name not in _INPUTS}
        return first | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def on_before_batch_transfer(self, batch: TextBatch, dataloader_idx: int) -> TextBatch:
        """With padding before a text, adds ``position_ids`` from its first token on, as ``generate`` does."""
        batch, real = super().on_before_batch_transfer(batch, dataloader_idx), batch["attention_mask"]
        if bool(real[:, 0].all()) or "position_ids" in batch or "position_ids" not in self._parameters_of_forward:
            return batch
        if any(hasattr(module, "create_position_ids_from_input_ids") for module in self.target.modules()):
            return batch  # such a target counts them from the first token by itself
        return {**batch, "position_ids": (real.cumsum(1) - 1).clamp_min(0)}

    def evaluate(self, batch: TextBatch) -> Scored:
        """Every position, unless it or the next one is padding."""
        real = self.valid(batch)
        rows, places = (real[:, :-1] & real[:, 1:]).nonzero(as_tuple=True)
        logits = self.logits_at(batch, rows, places)
        return Scored(logits, batch["input_ids"][rows, places + 1], batch["index"][rows], position=places)

    def _generated(self, seed: int, length: int) -> Tensor:
        """Sampled from the target itself, after BOS, EOS or the token 0."""
        tokens = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, 0
        ids = torch.tensor([[next(token for token in tokens if token is not None)]], device=self.device)
        options: dict[str, Any] = {"do_sample": True, "top_k": 0, "min_length": length, "max_length": length}
        options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": padding_id(self.tokenizer)}
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            return cast(Any, self.target).generate(ids, **options)[0, :length]


class PairedLM(CausalLM):
    """A causal model that decides between an answer and a foil, on the data of PairedTexts.

    The last position of each text is scored. Top-1 and the others are about the answer among all tokens;
    ``logit_difference`` is the answer's logit less the foil's, ``preferred`` the share of texts where it is above 0.
    """

    metrics = ("logit_difference", "preferred")

    def evaluate(self, batch: TextBatch) -> Scored:
        """One scored position an example."""
        if "last" not in batch:
            raise DataError(
                "PairedLM needs pairs of texts, but the batch has no entry `last`; take --data PairedTexts or alike"
            )
        rows = torch.arange(len(batch["last"]), device=batch["last"].device)
        logits = self.logits_at(batch, rows, batch["last"])
        difference = (logits[rows, batch["answer"]] - logits[rows, batch["foil"]]).float()
        extra = {"logit_difference": difference, "preferred": (difference > 0).float()}
        return Scored(logits, batch["answer"], batch["index"], extra, batch["last"])

    def source(self, kind: str, seed: int, batch: TextBatch) -> TextBatch:
        """Also the kind ``partner``: the other text of each pair."""
        if kind != "partner":
            return super().source(kind, seed, batch)
        own = {name: tensor for name, tensor in batch.items() if name != "position_ids"}
        partner = {name: batch[f"partner_{name}"] for name in ("input_ids", "attention_mask")}
        return self.on_before_batch_transfer(own | partner, 0)
