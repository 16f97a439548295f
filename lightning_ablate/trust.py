"""What a checkpoint's configuration may name by itself, and what needs the user's own word."""

import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_ablate.errors import ConfigError, TargetError, loading

CONFIG = "ConfigInCheckpoint"  # the callback in a checkpoint that holds the configuration

HELP = """validate only. A class, module or folder that the checkpoint may load; repeat it for several. Without it
only classes of lightning_ablate and Lightning. Even of these, no trainer.callbacks, .plugins or .profiler, and no
logger but TensorBoardLogger and CSVLogger, which write below the current folder. Code from the hub needs
--model.trust_remote_code=true again. If `fit` had an --ablation.dirpath, results go beside the checkpoint."""
_OWN = ("lightning_ablate", "lightning")
_BESIDE = re.compile(r"trainer\.(callbacks|logger|plugins|profiler)\b")
_HARMLESS = ("TensorBoardLogger", "CSVLogger", "RichProgressBar", "TQDMProgressBar")
_NAMES = ("name", "tokenizer", "gguf_file")  # options whose files are read as data
_WORDS = ("ablation.sites", "_column")  # options whose words are patterns and names of columns
_BELOW = re.compile(r"(?!/)(?!.*\.\.)[\w./ =,-]*")


def config_of(checkpoint: str, trusted: Sequence[str], words: Sequence[str]) -> str | None:
    """The configuration in a checkpoint as YAML, without the options of ``fit`` alone; None if Python code wrote it.

    Raises:
        ConfigError: if it names what the user doesn't trust, see :func:`check_trusted`.
        TargetError: if there is no checkpoint, or it can't be read.
    """
    if checkpoint in ("last", "best"):  # Lightning looks for it, under a configuration of the user's own
        return None
    if not Path(checkpoint).is_file():
        raise TargetError(
            f"the checkpoint {checkpoint!r} does not exist; `fit` leaves one in its run's folder (--ckpt_path)"
        )
    with loading(checkpoint, TargetError, "--ckpt_path"):
        callbacks = torch.load(checkpoint, map_location="cpu", weights_only=True)["callbacks"]
        if CONFIG not in callbacks:
            return None
        config = yaml.safe_load(callbacks[CONFIG]["config"])
        config = {key: config[key] for key in ("seed_everything", "trainer", "model", "data", "ablation")}
        check_trusted(config, trusted, words)
        if config["ablation"].get("dirpath"):  # a folder that only its author chose
            config["ablation"]["dirpath"] = str(Path(checkpoint).parent)
    return yaml.safe_dump(config)


def check_trusted(config: Mapping[str, Any], trusted: Sequence[str], words: Sequence[str]) -> None:
    """Raises ConfigError if a configuration names what isn't ``trusted``, before anything of it is imported.

    ``words`` are those of the command line; they may turn remote code on again.
    """
    for option, value in _walked(config):
        if option.endswith("trust_remote_code"):
            if value and not re.search(rf"--{option}[= ]true\b", " ".join(words), re.IGNORECASE):
                raise ConfigError(
                    f"the checkpoint turns on remote code, which runs only if you say so again: --{option}=true"
                )
        elif isinstance(value, str) and not _is_safe(option, value):
            if not any(re.match(rf"{re.escape(name)}(?![\w-])", value) for name in trusted):
                raise ConfigError(
                    f"the checkpoint names {value!r:.80} at {option.removesuffix('.class_path'):.60}, which could run "
                    f"or write something; if you trust it, say so: --trust {value!r:.80}"
                )


def _walked(value: Any, option: str = "") -> Iterator[tuple[str, Any]]:
    """The options of a configuration and their values, as ``("model.name", "gpt2")``."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _walked(one, option if key == "init_args" else f"{option}.{key}".strip("."))
    elif isinstance(value, list):
        for one in value:
            yield from _walked(one, option)
    elif isinstance(value, str):
        held = None
        with suppress(yaml.YAMLError):  # jsonargparse reads strings as YAML, too
            held = yaml.safe_load(value)
        yield from _walked(held, option) if isinstance(held, Mapping | list) else [(option, value.strip())]
    else:
        yield option, value


def _is_safe(option: str, value: str) -> bool:
    """True if, whatever reads it, the value can neither run foreign code nor write outside the current folder."""
    key = option.rpartition(".")[2]
    package, dot, _ = value.partition(".")
    if option.endswith(_WORDS):
        return True
    if key == "class_path" or (re.fullmatch(r"\w+(\.\w+)+", value) and _is_package(package)):
        if _BESIDE.match(option) and value.rpartition(".")[2] not in _HARMLESS:
            return False
        return not dot or (package in _OWN and _is_own_class(value))
    if option.startswith(("trainer.logger", "trainer.default_root_dir")):
        return bool(_BELOW.fullmatch(value))
    return key in _NAMES or not Path(value).is_file()  # jsonargparse would read the file as a configuration


def _is_package(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:  # the module has no file
        return True


def _is_own_class(name: str) -> bool:
    """Whether a class path of one of our packages names a class of its own, not one that it imports."""
    try:
        found = pkgutil.resolve_name(name)
    except (AttributeError, ImportError, ValueError):
        return True  # there is no such class, which ends in an error later
    return isinstance(found, type) and found.__module__.partition(".")[0] in _OWN
