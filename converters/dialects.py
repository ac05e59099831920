"""What each world calls the parameters of a GPT-2, and how it lays them out. Tables, and one way to read them.

A dialect maps each row of ``SPEC`` to a name, wrapped in a layout where the bytes or the shape differ from the
canonical ``[in, out]``. The same table reads and writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .errors import CheckpointError
from .spec import LM_HEAD, SPEC, SWITCHES, GPT2Config, rows
from .tensors import LazyTensor


@dataclass(frozen=True)
class Same:
    """The canonical layout under another name."""

    name: str

    def read(self, tensor: LazyTensor) -> LazyTensor:
        """From the dialect's layout to the canonical one."""
        return tensor

    def write(self, tensor: LazyTensor) -> LazyTensor:
        """From the canonical layout to the dialect's: the inverse of ``read``."""
        return tensor


@dataclass(frozen=True)
class Lead1(Same):
    """A leading axis of length one, as in the kernel of a one-wide convolution: ``[1, in, out]``."""

    def read(self, tensor: LazyTensor) -> LazyTensor:
        if len(tensor.shape) < 2 or tensor.shape[0] != 1:
            raise CheckpointError(f"{self.name} is {list(tensor.shape)}; a leading axis of 1 is expected")
        return tensor.reshape(tensor.shape[1:])

    def write(self, tensor: LazyTensor) -> LazyTensor:
        return tensor.reshape((1, *tensor.shape))


@dataclass(frozen=True)
class Dialect:
    """One world's names. ``{i}`` stands for the layer.

    ``prefixes`` may stand before every name but ``lm_head``; ``extras`` are known tensors that are no parameters;
    ``slots`` are suffixes which make a parameter's name that of an optimizer's slot.
    """

    name: str
    table: Mapping[str, Same]
    lm_head: str | None = None
    prefixes: tuple[str, ...] = ("",)
    extras: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()
    only_default_switches: bool = False

    def locate(self, name: str, prefix: str = "") -> tuple[str, int] | None:
        """The row of SPEC and the layer (-1 outside the blocks) that a name stands for, or None."""
        if name == self.lm_head:
            return LM_HEAD, -1
        if not name.startswith(prefix):
            return None
        bare = name[len(prefix) :]
        for row, layout in self.table.items():
            layer = match(layout.name, bare)
            if layer is not None:
                return row, layer
        return None

    def is_extra(self, name: str, prefix: str) -> bool:
        """Whether a name is known not to be a parameter."""
        bare = name.removeprefix(prefix)
        stems = (name.removesuffix(slot) for slot in self.slots if name.endswith(slot))
        return any(match(extra, bare) is not None for extra in self.extras) or any(
            self.locate(s, prefix) for s in stems
        )

    def layout(self, canonical: str) -> tuple[str, Same]:
        """The name that a canonical name has here, and its layout."""
        if canonical == LM_HEAD:
            if self.lm_head is None:
                raise CheckpointError(
                    f"an output that is not tied to the token embedding cannot be written as {self.name}"
                )
            return self.lm_head, Same(self.lm_head)
        row, layer = _row_of(canonical)
        layout = self.table[row]
        return layout.name.replace("{i}", str(layer)), layout

    def write(self, tensors: Mapping[str, LazyTensor], config: GPT2Config) -> dict[str, LazyTensor]:
        """A whole model under this dialect's names and layouts.

        Raises:
            CheckpointError: if this dialect cannot say what the model is.
        """
        if self.only_default_switches and (faults := list(_not_default(config))):
            raise CheckpointError.listing(
                f"this model cannot be written as {self.name}, whose code computes only GPT-2's published arithmetic",
                faults,
            )
        placed = {name: self.layout(name) for name in tensors}
        return {placed[name][0]: placed[name][1].write(tensor) for name, tensor in tensors.items()}


def match(template: str, name: str) -> int | None:
    """The layer where ``name`` fits ``template``, -1 where it fits one without ``{i}``, else None."""
    if "{i}" not in template:
        return -1 if name == template else None
    head, tail = template.split("{i}")
    middle = name[len(head) : len(name) - len(tail)]
    if len(name) <= len(head) + len(tail) or head + middle + tail != name:
        return None
    plain = middle.isascii() and middle.isdigit() and len(middle) < 6 and (middle == "0" or middle[0] != "0")
    return int(middle) if plain else None


def _row_of(canonical: str) -> tuple[str, int]:
    return next((row, layer) for row in SPEC if (layer := match(row, canonical)) is not None)


def _not_default(config: GPT2Config) -> Iterable[str]:
    yield from config.differences(GPT2Config(), SWITCHES)
    if config.n_inner != 4 * config.n_embd:
        yield f"n_inner is {config.n_inner}, not 4 x n_embd"


# OpenAI's gpt-2/src/model.py; verified against the index of the 117M release.
OPENAI = Dialect(
    "openai",
    {
        "wte.weight": Same("model/wte"),
        "wpe.weight": Same("model/wpe"),
        "h.{i}.ln_1.weight": Same("model/h{i}/ln_1/g"),
        "h.{i}.ln_1.bias": Same("model/h{i}/ln_1/b"),
        "h.{i}.attn.c_attn.weight": Lead1("model/h{i}/attn/c_attn/w"),
        "h.{i}.attn.c_attn.bias": Same("model/h{i}/attn/c_attn/b"),
        "h.{i}.attn.c_proj.weight": Lead1("model/h{i}/attn/c_proj/w"),
        "h.{i}.attn.c_proj.bias": Same("model/h{i}/attn/c_proj/b"),
        "h.{i}.ln_2.weight": Same("model/h{i}/ln_2/g"),
        "h.{i}.ln_2.bias": Same("model/h{i}/ln_2/b"),
        "h.{i}.mlp.c_fc.weight": Lead1("model/h{i}/mlp/c_fc/w"),
        "h.{i}.mlp.c_fc.bias": Same("model/h{i}/mlp/c_fc/b"),
        "h.{i}.mlp.c_proj.weight": Lead1("model/h{i}/mlp/c_proj/w"),
        "h.{i}.mlp.c_proj.bias": Same("model/h{i}/mlp/c_proj/b"),
        "ln_f.weight": Same("model/ln_f/g"),
        "ln_f.bias": Same("model/ln_f/b"),
    },
    extras=("global_step", "beta1_power", "beta2_power"),
    slots=("/Adam", "/Adam_1", "/Momentum"),
    only_default_switches=True,
)

# transformers' GPT2LMHeadModel; the canonical names are its own. The official file has them without a prefix.
HF = Dialect(
    "hf",
    {row: Same(row) for row in SPEC},
    lm_head=LM_HEAD,
    prefixes=("", "transformer."),
    extras=("h.{i}.attn.bias", "h.{i}.attn.masked_bias"),
)

DIALECTS = (OPENAI, HF)


def recognise(names: Iterable[str]) -> tuple[Dialect, str]:
    """The dialect and prefix under which most of the names are a GPT-2's."""
    names = list(names)

    def score(candidate: tuple[Dialect, str]) -> int:
        return sum(candidate[0].locate(name, candidate[1]) is not None for name in names)

    return max(((d, prefix) for d in DIALECTS for prefix in d.prefixes), key=score)


def expected_names(dialect: Dialect, prefix: str, n_layer: int) -> dict[str, str]:
    """Name in the file -> canonical name, for the parameters of a tied model of this depth."""
    return {prefix + dialect.layout(name)[0]: name for _, _, name in rows(n_layer)}
