"""Language models from the Hugging Face hub, or from a local folder of the same form."""

import re
import string
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_ablate.choices import seed_of
from lightning_ablate.data.text import padding_id, special_frame
from lightning_ablate.errors import ConfigError, DataError
from lightning_ablate.metrics import Scored
from lightning_ablate.modules.hub import HubModule

TextBatch = Mapping[str, Tensor]
_POSITIONS = re.compile(r"(wpe|position_embeddings|embed_positions)$")  # names of tables of learned positions
_CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " "


class LanguageModel(HubModule):
    """A transformers language model and its tokenizer, see :class:`HubModule`.

    Batches are mappings of ``input_ids`` and ``attention_mask`` ``(batch, seq)`` int64 and ``index`` ``(batch,)``
    int64, the example's place in the data, below 0 for examples that only fill a rank's last batch. ``auto_class``
    names the class of transformers that loads the target.
    """

    auto_class: ClassVar[str]

    def build_target(self) -> nn.Module:
        """Loads it with its ``auto_class``."""
        target = self.load(self.auto_class)
        target.config.use_cache = False
        return target

    @cached_property
    def tokenizer(self) -> Any:
        """The target's tokenizer."""
        return self.beside("AutoTokenizer")

    def save_beside(self, folder: Path) -> None:
        """Writes the tokenizer."""
        self.tokenizer.save_pretrained(folder)

    def valid(self, batch: TextBatch) -> Tensor:
        """Everything but padding, ``(batch, seq)``."""
        return batch["attention_mask"].bool() & (batch["index"] >= 0).unsqueeze(1)

    def logits(self, batch: TextBatch) -> Tensor:
        """The target's logits, ``(batch, seq, vocabulary)``."""
        return self.target(**self.inputs(batch)).logits

    def inputs(self, batch: TextBatch) -> dict[str, Tensor]:
        """What of a batch the target takes."""
        return {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}

    def source(self, kind: str, seed: int, batch: TextBatch) -> TextBatch:
        """One sequence of random characters, token ids, or generated text; the rest is that of the first example."""
        generated = getattr(self, "_generated", None)
        makers = {"characters": self._characters, "ids": self._random_ids, "generated": generated}
        maker = makers.get(kind)
        if maker is None:
            return super().source(kind, seed, batch)
        like = batch["input_ids"]
        key = (kind, seed, like.shape[1])
        if key not in self._source_ids:
            self._source_ids[key] = maker(seed_of(seed, kind), like.shape[1]).cpu()
        ids = self._source_ids[key].to(like.device).unsqueeze(0)
        first = {name: tensor[:1] for name, tensor in batch.items() if name != "token_type_ids"}
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "index": ids.new_zeros(1), "labels": ids}
        return first | made

    def probes(self, batch: TextBatch) -> tuple[TextBatch, TextBatch]:
        """The first example, and the same with another first token."""
        one = {name: tensor[:1] for name, tensor in batch.items()}
        return one, {**one, "input_ids": self._with_another(one["input_ids"])}

    def hidden(self, batch: TextBatch) -> Sequence[Tensor]:
        """The logits of every position."""
        return [self.logits(batch)]

    def on_train_batch_start(self, batch: TextBatch, batch_idx: int) -> None:
        """Refuses token ids and lengths that the target has no embedding for, at the first batch."""
        if batch_idx > 0:
            return
        ids = batch["input_ids"]
        vocabulary = cast(Any, self.target).get_input_embeddings().num_embeddings
        if int(ids.max()) >= vocabulary:
            raise DataError(
                f"the text has the token id {int(ids.max())}, expected ids below {vocabulary}, "
                "the target's embeddings; use its own tokenizer"
            )
        for name, module in self.target.named_modules():
            if isinstance(module, nn.Embedding) and _POSITIONS.search(name):
                before = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
                if ids.shape[1] > module.num_embeddings - before:
                    raise DataError(
                        f"the sequences have {ids.shape[1]} tokens, expected at most {module.num_embeddings - before}, "
                        f"the positions of {name}; lower --data.max_length"
                    )

    def on_validation_batch_start(self, batch: TextBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Refuses token ids and lengths that the target has no embedding for, at the first batch."""
        self.on_train_batch_start(batch, batch_idx)

    @cached_property
    def _source_ids(self) -> dict[tuple[str, int, int], Tensor]:
        return {}

    @cached_property
    def _ordinary(self) -> Tensor:
        """The token ids that are not special, ``(ids,)`` int64."""
        special = set(self.tokenizer.all_special_ids)
        return torch.tensor([i for i in range(len(self.tokenizer)) if i not in special])

    def _with_another(self, ids: Tensor) -> Tensor:
        """The ids ``(1, seq)`` with an ordinary token in the first place that wasn't there."""
        here = self._ordinary.to(ids.device)
        changed = ids.clone()
        changed[:, 0] = here[here != ids[0, 0]][0]
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
    """A language model that predicts the next token; scored at every position whose next token isn't padding."""

    auto_class = "AutoModelForCausalLM"

    def evaluate(self, batch: TextBatch) -> Scored:
        """Every position, those without a next token marked as not scored."""
        example = torch.where(self.valid(batch), batch["index"].unsqueeze(1), -1).roll(-1, 1)
        example[:, -1] = -1
        targets = batch["input_ids"].roll(-1, 1)
        return Scored(self.logits(batch).flatten(0, 1), targets.flatten(), example.flatten())

    def _generated(self, seed: int, length: int) -> Tensor:
        """Sampled from the target itself, after its first special token."""
        tokens = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, 0
        ids = torch.tensor([[next(token for token in tokens if token is not None)]], device=self.device)
        options: dict[str, Any] = {"do_sample": True, "top_k": 0, "min_length": length, "max_length": length}
        options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": padding_id(self.tokenizer)}
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            return cast(Any, self.target).generate(ids, **options)[0, :length]


class PairedLM(CausalLM):
    """A causal model that decides between an answer and a foil, on :class:`~lightning_ablate.data.PairedTexts`.

    The last token of each text is scored, by what comes next: top-1 and the others by the answer among all tokens;
    ``logit_difference`` is the answer's logit less the foil's, ``preferred`` the share of texts where it is above 0.
    """

    metrics = ("logit_difference", "preferred")

    def evaluate(self, batch: TextBatch) -> Scored:
        """One scored position an example."""
        if "last" not in batch:
            raise DataError(
                "PairedLM reads pairs of texts, and these are none; expected --data PairedTexts or another of its kind"
            )
        rows = torch.arange(len(batch["last"]), device=batch["last"].device)
        logits = self.logits(batch)[rows, batch["last"]]
        difference = (logits[rows, batch["answer"]] - logits[rows, batch["foil"]]).float()
        extra = {"logit_difference": difference, "preferred": (difference > 0).float()}
        return Scored(logits, batch["answer"], batch["index"], extra)

    def source(self, kind: str, seed: int, batch: TextBatch) -> TextBatch:
        """Also the kind ``partner``: the other text of each pair."""
        if kind != "partner":
            return super().source(kind, seed, batch)
        return {**batch, **{name: batch[f"partner_{name}"] for name in ("input_ids", "attention_mask")}}


class MaskedLM(LanguageModel):
    """A language model that fills in chosen tokens; scored at these.

    Of each example's tokens ``mlm_probability`` are chosen: 80% of them are masked, 10% replaced by a random token, 10%
    kept (Devlin et al. 2019). The draw depends on the seed and the example alone, so every condition, batch size and
    rank sees the same. Calibration reads the same kind of input.

    Args:
        name: a hub name, a local folder, or ``demo:roberta``.
        mlm_probability: share of an example's ordinary tokens that is chosen, above 0 and at most 1; at least one is.
        mask_seed: of the draw.
        options: see :class:`LanguageModel`.
    """

    auto_class = "AutoModelForMaskedLM"

    def __init__(self, name: str, *, mlm_probability: float = 0.15, mask_seed: int = 0, **options: Any) -> None:
        if not 0 < mlm_probability <= 1:
            raise ConfigError(
                f"mlm_probability is {mlm_probability}, expected a share of the tokens above 0 and at most 1 "
                "(--model.mlm_probability)"
            )
        super().__init__(name, **options)
        self.mlm_probability, self.mask_seed = mlm_probability, mask_seed

    def describe(self) -> dict[str, Any]:
        """And how its tokens are chosen."""
        return {**super().describe(), "mlm_probability": self.mlm_probability, "mask_seed": self.mask_seed}

    def on_before_batch_transfer(self, batch: TextBatch, dataloader_idx: int) -> TextBatch:
        """Adds ``labels`` (-100 where nothing is asked) and masks ``input_ids``, unless the data bring labels.

        ``chosen`` ``(batch, most)`` says where the labels are, filled with -1, so that a GPU's host need not look.
        """
        if "labels" in batch:
            return {**batch, "chosen": _places(batch["labels"])}
        inputs, labels = batch["input_ids"].clone(), torch.full_like(batch["input_ids"], -100)
        ordinary = self._ordinary
        eligible = batch["attention_mask"].bool() & torch.isin(inputs, ordinary)
        for ids, own, candidates, index in zip(inputs, labels, eligible, batch["index"].tolist(), strict=True):
            generator = torch.Generator().manual_seed(seed_of(self.mask_seed, "mask", index))
            places = candidates.nonzero().squeeze(1)
            count = min(len(places), max(1, round(self.mlm_probability * len(places))))
            chosen = places[torch.randperm(len(places), generator=generator)[:count]]
            fate = torch.rand(count, generator=generator)
            random = ordinary[torch.randint(len(ordinary), (count,), generator=generator)]
            own[chosen] = ids[chosen]
            ids[chosen] = torch.where(fate < 0.8, self._mask_token(), torch.where(fate < 0.9, random, ids[chosen]))
        return {**batch, "input_ids": inputs, "labels": labels, "chosen": _places(labels)}

    def evaluate(self, batch: TextBatch) -> Scored:
        """The chosen positions."""
        chosen = batch["chosen"] if "chosen" in batch else _places(batch["labels"])
        place = chosen.clamp_min(0)
        rows = torch.arange(len(place), device=place.device).unsqueeze(1)
        targets = batch["labels"].gather(1, place).clamp_min(0)
        example = torch.where(chosen < 0, -1, batch["index"].unsqueeze(1))
        return Scored(self.logits(batch)[rows, place].flatten(0, 1), targets.flatten(), example.flatten())

    def _generated(self, seed: int, length: int) -> Tensor:
        """Starts from masks alone and samples a sixteenth of them at a time, at random places (Wang & Cho 2019)."""
        generator = torch.Generator().manual_seed(seed)
        ids = self._framed([self._mask_token()] * length, length)
        places = (ids == self._mask_token()).nonzero().squeeze(1)
        for some in places[torch.randperm(len(places), generator=generator)].tensor_split(16):
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


def _places(labels: Tensor) -> Tensor:
    """Where labels ``(batch, seq)`` ask for something, ``(batch, most)`` int64, filled with -1."""
    asked = labels != -100
    most = int(asked.sum(1).max())
    order = torch.argsort(asked.to(torch.int8), dim=1, descending=True, stable=True)[:, :most]
    return torch.where(asked.gather(1, order), order, -1)
