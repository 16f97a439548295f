"""What the parser of the command line says: its help, and its errors in one line each."""

import inspect
import pkgutil
import re
from collections.abc import Iterable
from difflib import get_close_matches
from textwrap import shorten
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

import lightning_ablate
from lightning_ablate.choices import Choice
from lightning_ablate.data import AblationDataModule
from lightning_ablate.errors import ConfigError, loading
from lightning_ablate.modules import AblationModule

_KINDS: dict[str, type] = {"--model": AblationModule, "--data": AblationDataModule, "--ablation.neurons": Choice}
_MARKUP = re.compile(r":\w+:`~?(?:[\w.]+\.)?(\w+)`|``(.*?)``", re.DOTALL)
_KEY = re.compile(r'Parser key "([\w.]+)":')
_TYPE = re.compile(r"Expected an? (?:<class '(?:\w+\.)*(?!NoneType)(\w+)'>|typing\.Literal\[(.*?)\])")
_VALUE = re.compile(r"(?:Got|Given) value: (.+)")
_SAYS_NOTHING = ("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a <class 'NoneType'>")
_NO_OPTION = re.compile(r"(?:arguments: --|[Oo]ption ')([\w.-]+)")


class Parser(LightningArgumentParser):
    """Shows help without docstring markup, the Trainer's options last, and also of classes that have no options."""

    def add_class_arguments(self, theclass: Any, *args: Any, **options: Any) -> list[str]:
        """Adds the options of a class; of one without options what it is, which jsonargparse leaves out."""
        added = super().add_class_arguments(theclass, *args, **options)
        if not added:
            self.add_argument_group(theclass.__name__, (inspect.getdoc(theclass) or "").partition("\nExample:")[0])
        return added

    def format_help(self, *formatter: Any) -> str:
        """The help as plain text."""
        trainer = (self.groups or {}).get("trainer")
        self._action_groups: Any = sorted(self._action_groups, key=lambda group: group is trainer)
        for part, name in [
            *((action, "help") for action in self._actions),
            *((group, name) for group in self._action_groups for name in ("title", "description")),
        ]:
            if isinstance(said := getattr(part, name), str):
                setattr(part, name, _MARKUP.sub(lambda found: found[1] or found[2], said))
        return super().format_help(*formatter)


def in_a_line(said: str, options: Iterable[str]) -> str:
    """What jsonargparse says in many lines: the flag, and what was expected of it.

    If there is no such class or option, the line says which there are. ``options`` are those of the parser. ConfigError
    if a class path can't be imported.
    """
    prefix = "--" + "".join(f"{key}." for key in dict.fromkeys(_KEY.findall(said)))
    flag = prefix.removesuffix(".")
    if unknown := re.search(r"Expected a path but ([^\s\[{]\S*) either", said):
        if "." in unknown[1]:
            with loading(unknown[1], ConfigError, flag):
                pkgutil.resolve_name(unknown[1])
        kinds = [getattr(lightning_ablate, name) for name in dir(lightning_ablate)] if flag in _KINDS else []
        known = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, _KINDS[flag])]
        names = [kind.__name__ for kind in known if not inspect.isabstract(kind)]
        return f"{flag}: no such class {unknown[1]!r}, expected {', '.join(names) or 'a name'}, or the path of your own"
    if unknown := _NO_OPTION.search(said):
        for kind in re.findall(r"class_path '([\w.]+)'", said)[-1:]:
            options = [name for one in pkgutil.resolve_name(kind).__mro__ for name in inspect.signature(one).parameters]
        close = get_close_matches(unknown[1], [name.strip("-+") for name in options], 1)
        return f"no such option {prefix}{unknown[1]}" + (f" (did you mean {prefix}{close[0]}?)" if close else "")
    if types := dict.fromkeys(name or values for name, values in _TYPE.findall(said)):
        value = _VALUE.search(said)
        return shorten(f"{flag}: expected {' or '.join(types)}" + (f", got {value[1]:.60}" if value else ""), 250)
    lines = (line.strip().removeprefix("- ") for line in _KEY.sub("", said).splitlines())
    told = " ".join(line for line in lines if line and not line.startswith(_SAYS_NOTHING))
    told = re.sub(r"required: (?:fit\.|validate\.)?", f"required: {prefix}", told)
    return shorten(told if flag == "--" else f"{flag}: {told}", 250, placeholder=" ...")
