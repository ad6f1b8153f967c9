"""What an arch looks like: its stages and blocks, as text and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import attrs
import numpy as np
from attrs import frozen

from corenas.space import Arch, SearchSpace, flatten
from corenas.value import Value
from corenas_tool_report.words import Html, join, plural, tag

WIDTHS = ("width", "channels", "out_channels", "dim", "embed_dim")
"""Keys that say how wide a stage or a block is."""
KINDS = ("op", "kernel", "kernel_size")
"""Keys that colour blocks, the first that there is."""
COLOURS = 6
"""How many colours the style sheet has."""
HEIGHT, LINE, GAP, ROW = 112, 16, 6, 6
"""Of a picture, in pixels: the highest block, a line of text, the space between blocks; and blocks in a row."""


@frozen
class Part:
    """A stage of a network, or what comes before and behind them.

    notes: what holds for all of it
    blocks: those that there are, each with what was chosen for it
    reach: how many there could be; None where that is no question
    """

    name: str
    notes: Mapping[str, Any]
    blocks: Sequence[Mapping[str, Any]]
    reach: int | None = None

    def text(self) -> str:
        """In a line: "stage 1: width 24, 2 of 3 blocks (k5 e3, k3 e4)"."""
        return f"{self.name}: {', '.join(filter(None, [said(self.notes), self.count()]))}"

    def count(self) -> str:
        """How many blocks of how many."""
        if self.reach is None:
            return ""
        most = "" if self.reach == len(self.blocks) else f" of at most {self.reach}"
        return f"{len(self.blocks)}{most} blocks" if most else plural(len(self.blocks), "block")


def parts_of(space: SearchSpace, arch: Arch, fixed: bool = True) -> tuple[dict[str, Any], list[Part]]:
    """What was chosen for the whole network, and its parts in order. All of the first if the space has no tree.

    fixed: False leaves out what no arch of the space could choose
    """
    active = space.active(space.encode([arch]))[0]
    chosen = {key: arch[key] for key, on in zip(space.keys, active, strict=True) if on}
    if not space.tree:
        return chosen, []
    tree = _resolved(space.tree, arch, chosen.keys(), fixed)
    loose = {key: item for key, item in tree.items() if not isinstance(item, Mapping | list)}
    parts = [*_parts({key: item for key, item in tree.items() if key not in loose}, "")]
    keys = {*_keys_of_blocks(space.tree)}
    return loose, [_spread(part, keys) for part in parts]


def _keys_of_blocks(tree: Any) -> Iterator[str]:
    if isinstance(tree, Mapping):
        for block in tree.get("blocks", ()):
            yield from flatten(block) if isinstance(block, Mapping) else ()
    for item in tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list) else ():
        yield from _keys_of_blocks(item)


def _resolved(item: Any, arch: Arch, active: Set[str], fixed: bool) -> Any:
    """A part of a tree with its choice at each leaf. Left out: inactive variables and, if asked for, what is fixed."""

    def kept(key: Any, x: Any) -> bool:
        if isinstance(x, Mapping | list):
            return True
        if isinstance(x, Value) and x.keys:
            return active >= {*x.keys}
        return fixed or key == "depth"

    if isinstance(item, Mapping):
        return {key: _resolved(x, arch, active, fixed) for key, x in item.items() if kept(key, x)}
    if isinstance(item, list):
        return [_resolved(x, arch, active, fixed) for x in item if kept(None, x)]
    choice = item(arch) if isinstance(item, Value) else item
    return choice.item() if isinstance(choice, np.generic) else choice


def _parts(tree: Mapping[str, Any], prefix: str) -> Iterator[Part]:
    for key, item in tree.items():
        name = f"{prefix}{key}"
        if isinstance(item, list):
            one = name.removesuffix("s")
            if all(isinstance(x, Mapping) for x in item):
                for i, x in enumerate(item, 1):
                    yield from _part(x, f"{one} {i}", True)
            else:
                yield Part(name, {}, [flatten({key.removesuffix("s"): x}) for x in item])
        elif isinstance(item, Mapping):
            yield from _part(item, name, False)


def _part(item: Mapping[str, Any], name: str, stage: bool) -> Iterator[Part]:
    own = {key: x for key, x in item.items() if not isinstance(x, Mapping | list)}
    rest = {key: x for key, x in item.items() if isinstance(x, Mapping | list) and key != "blocks"}
    if "blocks" in item:
        depth = own.pop("depth", len(item["blocks"]))
        blocks = [flatten(b) if isinstance(b, Mapping) else {"": b} for b in item["blocks"][:depth]]
        yield Part(name, own, blocks, len(item["blocks"]))
    elif stage:
        depth = own.pop("depth", 1)
        yield Part(name, own, [{}] * depth if isinstance(depth, int) else [{}], depth)
    elif own:
        yield Part(name, own, [{}])
    yield from _parts(rest, f"{name} ")


def _spread(part: Part, keys: set[str]) -> Part:
    """A stage without choices in its blocks, with what other stages choose by block in its blocks as well."""
    if part.reach is None or any(part.blocks):
        return part
    spread = {key: note for key, note in part.notes.items() if key in keys}
    notes = {key: note for key, note in part.notes.items() if key not in keys}
    return attrs.evolve(part, notes=notes, blocks=[spread for _ in part.blocks])


def said(notes: Mapping[str, Any], between: str = ", ") -> str:
    """Choices as text: a switch by its name, a word as it is, a number behind its key."""
    words = [
        f"{key} {_plain(note)}" if _numeric(note) else note if isinstance(note, str) else key if note else ""
        for key, note in notes.items()
    ]
    return between.join(filter(None, words))


def _plain(note: Any) -> str:
    return f"{note:.4g}" if isinstance(note, float) else str(note)


def short_keys(parts: Sequence[Part]) -> dict[str, str]:
    """The keys of blocks that hold numbers, each with the letter that stands for it, or with itself where letters
    would be the same.
    """
    choices = [item for part in parts for block in part.blocks for item in block.items()]
    keys = [*dict.fromkeys(key for key, choice in choices if _numeric(choice))]
    letters = [key.rpartition(".")[2][:1] for key in keys]
    return {key: letter if letters.count(letter) == 1 else f"{key} " for key, letter in zip(keys, letters, strict=True)}


def _numeric(choice: Any) -> bool:
    return not isinstance(choice, bool) and (not isinstance(choice, str) or choice.isdigit())


def labels(block: Mapping[str, Any], short: Mapping[str, str]) -> list[str]:
    """A block's choices as short texts: k5, e3; a word as it is, a switch by its name."""
    words = [
        f"{short[key]}{_plain(choice)}"
        if _numeric(choice)
        else choice
        if isinstance(choice, str)
        else key.rpartition(".")[2]
        if choice
        else ""
        for key, choice in block.items()
    ]
    return [*filter(None, words)]


def lines(space: SearchSpace | None, arch: Arch) -> list[str]:
    """What was chosen in an arch, in a few lines of text, one for each part."""
    if space is None:
        return _listed(arch)
    try:
        loose, parts = parts_of(space, arch, fixed=False)
    except (KeyError, ValueError):  # an arch of another space
        return _listed(arch)
    short = short_keys(parts)
    texts = _listed(loose)
    for part in parts:
        blocks = " | ".join(" ".join(labels(block, short)) for block in part.blocks)
        texts.append(f"{part.text()}: {blocks}" if blocks.strip(" |") else part.text())
    return texts


def _listed(choices: Mapping[str, Any]) -> list[str]:
    texts = [f"{key} {_plain(choice)}" for key, choice in choices.items()]
    return texts if len(texts) <= 24 else [*texts[:24], f"and {len(texts) - 24} more"]


def picture(space: SearchSpace, arch: Arch) -> Html:
    """An arch as drawings of its stages, one beside the other as far as the page is wide, with a legend.

    A block is as high as it is wide in channels, and has the colour of its kernel or operation.
    """
    loose, parts = parts_of(space, arch)
    if not parts:
        return tag(
            "ul",
            *(tag("li", said({key: x}) if isinstance(x, bool) else f"{key} {_plain(x)}") for key, x in loose.items()),
            class_="chips",
        )
    short = short_keys(parts)
    keys = [*dict.fromkeys(key for part in parts for block in part.blocks for key in block)]
    kind = next((key for key in (*KINDS, *keys) if key in keys), None)
    kinds = _kinds(space, kind, parts)
    widest = _widest(space)
    cut = any((_width(block, part) or 0) > widest for part in parts for block in part.blocks)
    deep = max([0, *(len(labels(block, short)) for part in parts for block in part.blocks)])
    drawn = [_drawn(part, short, kind, kinds, widest, deep) for part in parts]
    whole = tag("p", said(loose)) if loose else ""
    return join(
        [
            whole,
            tag("div", *drawn, class_="arch", role="group", aria_label="picture of the arch"),
            _legend(short, kind, kinds, widest, cut),
        ]
    )


def _widest(space: SearchSpace) -> float:
    """The largest width of a stage in the space, so that pictures of one space have one scale. Heads are wider than
    that, often by so much that they would leave nothing of the stages to be seen.
    """
    _, parts = parts_of(space, space.largest())
    staged = [part for part in parts if part.reach is not None] or parts
    return max([0, *(_width(block, part) or 0 for part in staged for block in part.blocks)])


def _kinds(space: SearchSpace, kind: str | None, parts: Sequence[Part]) -> dict[Any, int]:
    """What colours blocks: all that the space has, so that pictures of one space agree; else what there is."""
    if kind is None:
        return {}
    found = {block[kind] for part in parts for block in part.blocks if kind in block}
    for variable in space.variables:
        if variable.key.endswith(f".{kind}") and isinstance(getattr(variable, "choices", None), tuple):
            found |= {*variable.choices}
    ordered = sorted(found, key=lambda choice: (isinstance(choice, str), choice))
    return {choice: i % COLOURS for i, choice in enumerate(ordered)}


def _width(block: Mapping[str, Any], part: Part) -> float | None:
    for where in (block, part.notes):
        for key in WIDTHS:
            if isinstance(where.get(key), int | float):
                return where[key]
    return None


def _drawn(
    part: Part, short: Mapping[str, str], kind: str | None, kinds: Mapping[Any, int], widest: float, deep: int
) -> Html:
    """A stage: its blocks in rows, each with its labels below, `deep` lines of them; no higher than it need be."""
    texts = [labels(block, short) for block in part.blocks]
    wide = max([48, *(8 * len(word) + 2 for words in texts for word in words)])
    highs = []
    for block in part.blocks:
        width = _width(block, part)
        highs.append(min(HEIGHT, max(8, round(HEIGHT * width / widest))) if width and widest else HEIGHT // 3)
    high = max([8, *highs])
    each = high + 6 + LINE * deep
    columns, rows = min(max(len(texts), 1), ROW), max(1, -(-len(texts) // ROW))
    size = (columns * (wide + GAP) - GAP, rows * (each + GAP) - GAP)
    shapes = []
    for i, (block, words) in enumerate(zip(part.blocks, texts, strict=True)):
        x, base = i % ROW * (wide + GAP), i // ROW * (each + GAP) + high
        colour = f"kind{kinds[block[kind]]}" if kind is not None and kind in block else "plain"
        shapes.append(tag("rect", class_=colour, x=x, y=base - highs[i], width=wide, height=highs[i], rx=4))
        if (_width(block, part) or 0) > widest:
            shapes.append(tag("line", x1=x, x2=x + wide, y1=base - high + 10, y2=base - high + 10, class_="cut"))
        for line, word in enumerate(words, 1):
            shapes.append(tag("text", word, x=f"{x + wide / 2:g}", y=base + LINE * line, text_anchor="middle"))
    if not texts:
        shapes.append(tag("line", x1=0, x2=wide, y1=high, y2=high))
    blocks = ", ".join(" ".join(words) for words in texts if words)
    svg = tag(
        "svg",
        *shapes,
        role="img",
        aria_label=f"{part.text()}{blocks and ': ' + blocks}",
        width=size[0],
        height=size[1],
        viewBox=f"0 0 {size[0]} {size[1]}",
    )
    notes = " · ".join(filter(None, [part.count(), said(part.notes, " · ")]))
    caption = tag("figcaption", tag("strong", part.name), " ", notes)
    return tag("figure", tag("div", svg, class_="scroll"), caption, style=f"width:{max(size[0], 104)}px")


def _legend(short: Mapping[str, str], kind: str | None, kinds: Mapping[Any, int], widest: float, cut: bool) -> Html:
    items = [
        tag(
            "li",
            tag(
                "svg",
                tag("rect", class_=f"kind{colour}", width=14, height=14, rx=3),
                width=14,
                height=14,
                aria_hidden="true",
            ),
            f"{kind} {_plain(choice)}",
        )
        for choice, colour in kinds.items()
    ]
    words = [f"{letter} is {key}" for key, letter in short.items() if letter != f"{key} "]
    words += [f"a block is as high as it is wide, in this space at most {_plain(widest)}"] if widest else []
    words += ["a dashed line: wider than drawn"] if cut else []
    return tag("ul", *items, *(tag("li", word) for word in words), class_="legend")
