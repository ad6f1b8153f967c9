"""Networks as Zen-NAS writes them: one string of super-blocks, `SuperResK1K3K1(in,out,stride,bottleneck,sub-layers)`.

SuperConvK3BNRELU(in,out,stride,sub-layers)                     convolutions, of any odd kernel
SuperResK5K5(in,out,stride,bottleneck,sub-layers)               type "XX"
SuperResK1K5K1(in,out,stride,bottleneck,sub-layers)             type "BL"
SuperResIDWE4K7(in,out,stride,bottleneck,sub-layers)            type "IDW", expansion 4
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from corenas.errors import Fault, KeyPath, UserError, raise_if_any
from corenas.options import structure as structured
from corenas.space import Arch, SearchSpace
from corenas.value import Constant, Value, as_value
from corenas.variables import Variable
from corenas_backbone_zennet import Layout, SuperBlock, SuperConv

_SUPER_BLOCK = re.compile(r"\s*(\w+)\((?:[^()|]*\|)?([^()|]*)\)\s*")  # a block's own name may stand before a bar
_ODD = r"(?P<kernel>\d*[13579])"
_NAMES = {
    "Conv": re.compile(rf"SuperConvK{_ODD}BNRELU"),
    "XX": re.compile(rf"SuperResK{_ODD}K(?P=kernel)"),
    "BL": re.compile(rf"SuperResK1K{_ODD}K1"),
    "IDW": re.compile(rf"SuperResIDWE(?P<expand>[1-9]\d*)K{_ODD}"),
}


def read(structure: str) -> dict[str, Any]:
    """The table of a space that is one network: of fixed numbers, with the keys of `Layout`.

    The first number, the channels of the images, is left out: it is an option of the backbone.
    Raises UserError with all mistakes: a block that there is not, too many or too few numbers or wrong ones, channels
    that do not follow each other, a network that does not begin and end with a SuperConv.
    """
    blocks: list[dict[str, Any]] = []
    faults: list[Fault] = []
    at, channels = 0, None
    while at < len(structure):
        match = _SUPER_BLOCK.match(structure, at)
        if match is None:
            raise UserError(f"expected Name(numbers) with commas between them, found {structure[at : at + 40]!r}")
        try:
            inputs, block = _block(match[1], match[2])
            if channels not in (None, inputs):
                raise ValueError(f"has {inputs} input channels, but {channels} come out of the block before it")
            blocks.append(block)
            channels = block["width"]
        except ValueError as error:
            faults.append(Fault(f"{match[0].strip()}, at {match.start(1)}, {error}"))
            channels = None
        at = match.end()
    raise_if_any(faults)
    ends = [block for block in blocks[:1] + blocks[1:][-1:] if block["op"] == "Conv"]
    if len(ends) < 2:
        raise UserError("expected a network that begins and ends with a SuperConv", hint="SuperConvK3BNRELU(3,16,2,1)…")
    stem, head = ({key: number for key, number in block.items() if key != "op"} for block in ends)
    return {"stem": stem, "stages": blocks[1:-1], "head": head}


def _block(name: str, numbers: str) -> tuple[int, dict[str, Any]]:
    """Input channels and table of a super-block. Raises ValueError for what is none."""
    matches = {op: match for op, pattern in _NAMES.items() if (match := pattern.fullmatch(name))}
    if not matches:
        shown = "SuperConvK3BNRELU, SuperResK3K3, SuperResK1K3K1, SuperResIDWE4K7 and the like, kernels odd"
        raise ValueError(f"is no super-block of Zen-NAS: expected {shown}")
    ((op, match),) = matches.items()
    keys = ["inputs", "width", "stride", *([] if op == "Conv" else ["bottleneck"]), "depth"]
    given = [number.strip() for number in numbers.split(",")]
    if len(given) != len(keys) or not all(re.fullmatch(r"0*[1-9]\d*", number) for number in given):
        raise ValueError(f"expected {len(keys)} whole numbers of at least 1: {', '.join(keys)}")
    table = dict(zip(keys, map(int, given), strict=True))
    sizes = {key: int(number) for key, number in match.groupdict().items()}
    return table.pop("inputs"), {"op": op, **sizes, **table}


def write(layout: Layout, choices: Mapping[str, Any] | None = None, in_channels: int = 3) -> str:
    """The structure of one network of a space.

    choices: a choice for each variable of the space, as an arch has them; none where it has no variables
    in_channels: channels of the images
    """
    text, inputs = "", in_channels
    for block in (layout.stem, *layout.stages, layout.head):
        chosen = {name: value(choices or {}) for name, value in _values(block).items()}
        if chosen["depth"] == 0:
            continue
        name = {
            "Conv": "SuperConvK{kernel}BNRELU",
            "XX": "SuperResK{kernel}K{kernel}",
            "BL": "SuperResK1K{kernel}K1",
            "IDW": "SuperResIDWE{expand}K{kernel}",
        }[chosen["op"]].format(**chosen)
        keys = ["width", "stride", *([] if chosen["op"] == "Conv" else ["bottleneck"]), "depth"]
        text += f"{name}({','.join(map(str, [inputs, *(chosen[key] for key in keys)]))})"
        inputs = chosen["width"]
    return text


def arch(structure: str, space: SearchSpace) -> Arch:
    """The arch of a space that is this network.

    Raises UserError if the structure is wrong, and with all that the space does not have: another number of
    super-blocks, a stride or another fixed number that differs, a choice that a variable does not have.
    """
    layout, network = structured(space.tree, Layout), Layout(structure)
    faults: list[Fault] = []
    choices: dict[str, Any] = {}
    pairs: list[tuple[KeyPath, Any, Any]] = [(("stem",), layout.stem, network.stem)]
    pairs += _matched(layout.stages, network.stages)
    for key, own, wanted in [*pairs, (("head",), layout.head, network.head)]:
        values = _values(own)
        numbers = {"depth": Constant(0)} if wanted is None else _values(wanted)
        for name, number in numbers.items():
            value = values.get(name)
            if isinstance(value, Variable):
                choices[value.key] = number({})
            elif value != number:
                there = "nothing" if value is None else repr(value({}))
                faults.append(Fault(f"this network has {number({})!r}, the space {there}", (*key, name)))
    raise_if_any(faults)
    return space.arch(choices)


def _matched(
    stages: Sequence[SuperBlock], blocks: Sequence[SuperBlock]
) -> list[tuple[KeyPath, SuperBlock, SuperBlock | None]]:
    """Return the stages of a space with their keys, each with the block of a network that stands there, or none.

    A stage that need not be there is left out where the next block strides, or where the stages are more than the
    blocks. Raises UserError if the network has too many blocks or too few.
    """
    pairs: list[tuple[KeyPath, SuperBlock, SuperBlock | None]] = []
    left = [*blocks]
    for i, stage in enumerate(stages):
        spare = 0 in stage.depth.possible and (not left or left[0].stride != stage.stride)
        if not spare and not left:
            break
        pairs.append((("stages", i), stage, None if spare else left.pop(0)))
    if left or len(pairs) < len(stages):
        text = f"this network has {len(blocks)} super-blocks between its first and last, the space"
        raise UserError(f"{text} has {len(stages)}", key=("stages",))
    return pairs


def _values(block: SuperConv | SuperBlock) -> dict[str, Value]:
    """All that a super-block says, as values."""
    said = {"op": "Conv", **attrs.asdict(block, recurse=False)}
    return {name: as_value(value) for name, value in said.items() if value is not None}
