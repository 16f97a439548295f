"""Targets that transformers loads: from the Hugging Face hub, or from a local folder of the same form."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from torch import Tensor, nn

from lightning_ablate.data.labels import names_of
from lightning_ablate.demo import resolve
from lightning_ablate.errors import TargetError, few, loading
from lightning_ablate.modules.base import AblationModule


class HubModule(AblationModule):
    """A target that transformers loads by its name.

    Args:
        name: a hub name, a local folder, or ``demo:gpt2``, ``demo:roberta`` and ``demo:vit`` for the embedded targets.
        revision: branch, tag or commit on the hub.
        dtype: of the weights; ``auto`` keeps theirs.
        attn_implementation: ``eager``, ``sdpa`` or another one that transformers knows; None lets it choose.
        gguf_file: the GGUF file under that name, whose weights are dequantised.
        trust_remote_code: runs the code that comes with a hub model. Off unless you have read that code.
    """

    def __init__(
        self,
        name: str,
        *,
        revision: str | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        attn_implementation: str | None = None,
        gguf_file: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(name)
        self._given: list[nn.Module] = []  # in a list, so that it is no submodule before it is the target
        self.revision, self.dtype_name, self.attn_implementation = revision, dtype, attn_implementation
        self.gguf_file, self.trust_remote_code = gguf_file, trust_remote_code

    @classmethod
    def of(cls, model: nn.Module, *, name: str | None = None, **parts: Any) -> Self:
        """The module of a model that is loaded already, which it freezes and puts into eval mode.

        ``name`` is what results call it, by default where it was loaded from. ``parts`` are its ``tokenizer``, or its
        ``transform`` of an image.
        """
        made = cls(name or getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__)
        made._given = [model]
        for key, value in parts.items():
            setattr(made, key, value)
        return made

    def load(self, auto_class: str) -> Any:
        """The model that was given, or else by one of transformers' AutoModel classes; TargetError if it can't be."""
        if self._given:
            return self._given[0]
        options: dict[str, Any] = {"dtype": self.dtype_name, "attn_implementation": self.attn_implementation}
        if self.gguf_file is not None:
            from transformers import GgufConfig

            options["quantization_config"] = GgufConfig(dequantize=True)
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # these are refused here, by name
        model, found = self.pretrained(auto_class, **options)
        lost = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
        if lost:
            raise TargetError(
                f"{self.name} lacks weights of a {type(model).__name__}, or has them in other sizes: {few(lost)}; "
                "choose the --model whose head it has, or train that head first (--model.name)"
            )
        return model

    def pretrained(self, auto_class: str, **options: Any) -> Any:
        """The model, tokenizer or image processor under the name, by an Auto class of transformers; or TargetError."""
        import transformers

        options |= {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        if self.gguf_file is not None:
            options["gguf_file"] = self.gguf_file
        with loading(self.name, TargetError, "--model.name"):
            return getattr(transformers, auto_class).from_pretrained(resolve(self.name), **options)

    @property
    def class_names(self) -> list[str] | None:
        """The target's names of its classes, where it has some; they don't need its weights."""
        target: Any = self._modules.get("target") or next(iter(self._given), None)
        if target is None:
            facts = self.config_file(resolve(self.name))
        else:
            facts = target.config.to_dict() if hasattr(target, "config") else getattr(target, "pretrained_cfg", {})
        return names_of(facts.get("id2label") or facts.get("label_names"))

    def class_texts(self, classes: Sequence[int]) -> list[str]:
        """The names of the classes, where the target has some."""
        names = self.class_names
        return super().class_texts(classes) if names is None else [names[one] for one in classes]

    def config_file(self, name: str) -> Mapping[str, Any]:
        """What config.json holds under a name, for an adapter that of its base; empty where there is none."""
        from transformers.utils import cached_file, find_adapter_config_file

        revision = self.revision
        with loading(self.name, TargetError, "--model.name"):
            if adapter := find_adapter_config_file(name, revision=revision):
                name, revision = json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"], None
            found = cached_file(name, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
            return {} if found is None else json.loads(Path(found).read_text(encoding="utf-8"))

    def describe(self) -> dict[str, Any]:
        """Adds the revision and the attention implementation."""
        config: Any = getattr(self.target, "config", None)
        return super().describe() | {
            "revision": self.revision or getattr(config, "_commit_hash", None),
            "attn_implementation": getattr(config, "_attn_implementation", "its own"),
        }


def last_states(output: Any) -> Sequence[Tensor]:
    """The last layer's tokens in an output of transformers; of an encoder-decoder those of each half."""
    if getattr(output, "hidden_states", None) is not None:
        return [output.hidden_states[-1]]
    return [output.encoder_last_hidden_state, output.decoder_hidden_states[-1]]
