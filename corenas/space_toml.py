"""How a search space is written in TOML, and how its table is read with all its mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import asdict, evolve

from corenas.errors import Fault, KeyPath, UserError, collecting, did_you_mean, dotted_key, raise_if_any
from corenas.options import build
from corenas.value import Constant, Value
from corenas.variables import OVERRIDE, TWICE, TYPES, Categorical, Condition, Variable, always_holds, parent_of

MOST_BLOCKS = 200
"""The largest depth of a stage whose blocks are written."""
MOST_DEPTH = 300
"""The largest depth of a stage that writes none."""
LARGEST = 1e15
"""The largest number, of any sign: products of a few are whole numbers still."""


_TOO_LARGE = f"expected numbers of at most {LARGEST:g}"


def read_space(table: Mapping[str, Any]) -> tuple[list[Variable], dict[str, Any]]:
    """Return the variables of a space and its tree, read from its TOML table (`SearchSpace.from_table`).

    Raises UserError with all mistakes, each with its key.
    """
    if not isinstance(table, Mapping):
        raise UserError(f"expected a table, found {table!r}")
    reader = _Reader()
    tree = reader.table(table, (), ())
    for key in tree.keys() - reader.variables.keys():
        if key.startswith(OVERRIDE):
            reader.fault("expected a variable: what is fixed belongs into the spec itself", (key,))
    raise_if_any(reader.faults)
    return [*reader.variables.values()], {key: item for key, item in tree.items() if not key.startswith(OVERRIDE)}


def write_space(variables: Sequence[Variable], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the TOML table of a space, its blocks written out one by one."""
    loose = {v.key: v for v in variables if v.key.startswith(OVERRIDE) or not tree}
    first_index: dict[str, int] = {}
    for index, variable in enumerate(variables):
        table = variable.key if variable.key in loose else variable.key.partition(".")[0]
        first_index.setdefault(table, index)
    in_order = sorted({**loose, **tree}.items(), key=lambda item: first_index.get(item[0], -1))
    return _written(dict(in_order), ())


def _written(tree: Any, when: Sequence[Condition], brief: bool = True) -> Any:
    """Return a part of a tree as TOML.

    when: the conditions that follow from where it stands, which are not written
    brief: whether a variable may be a mere list of its choices
    """
    if isinstance(tree, Constant):
        return tree.number
    if isinstance(tree, Variable):
        own = {c.key: sorted(c.choices) for c in tree.when if c not in when}
        if brief and not own and type(tree) is Categorical and tree.default == tree.largest:
            return [*tree.choices]
        name = next(name for name, cls in TYPES.items() if cls is type(tree))
        options = asdict(tree, filter=lambda f, x: f.init and f.name not in ("key", "when") and x is not None)
        return {"type": name, **options, **({"when": own} if own else {})}
    if isinstance(tree, Mapping):
        table = {}
        for key, item in tree.items():
            if key == "blocks" and isinstance(item, list):
                table[key] = [_written(x, _reached(tree.get("depth"), i, when)) for i, x in enumerate(item)]
            else:
                # Writers of TOML put tables behind what is none: a list after them would be moved.
                brief = not any(isinstance(x, dict) or _nested(x) for x in table.values())
                table[key] = _written(item, when, brief)
        return table
    return [_written(item, when) for item in tree] if isinstance(tree, list) else tree


def _nested(item: Any) -> bool:
    return isinstance(item, list) and any(isinstance(x, Mapping | list) for x in item)


def _reached(depth: Any, index: int, when: Sequence[Condition]) -> Sequence[Condition]:
    """Return the conditions of what stands in a block: the depth beside it, if that is a variable, reaches it."""
    if not isinstance(depth, Variable):
        return when
    reached = Condition(depth.key, frozenset(d for d in depth.choices if d > index))
    return when if always_holds(reached, depth, when) else (*when, reached)


class _Reader:
    """Walks a space's TOML table, collecting its variables and its mistakes. None stands where a mistake was found."""

    def __init__(self) -> None:
        self.variables: dict[str, Variable] = {}
        self.faults: list[Fault] = []

    def fault(self, message: str, path: KeyPath, hint: str | None = None) -> None:
        self.faults.append(Fault(message, path, hint=hint))

    def table(self, table: Mapping[str, Any], path: KeyPath, when: Sequence[Condition]) -> dict[str, Any]:
        rest = {key: item for key, item in table.items() if key not in ("block", "blocks")}
        tree = {key: self.item(item, (*path, key), when) for key, item in rest.items()}
        if len(rest) < len(table):
            tree["blocks"] = self.blocks(table, tree, path, when)
            return tree
        depth = tree.get("depth")
        if isinstance(depth, Value) and not isinstance(depth.largest, str) and depth.largest > MOST_DEPTH:
            self.fault(f"expected a depth of at most {MOST_DEPTH:,}, found {depth.largest:g}", (*path, "depth"))
        return tree

    def blocks(
        self, table: Mapping[str, Any], tree: Mapping[str, Any], path: KeyPath, when: Sequence[Condition]
    ) -> Any:
        """Return the blocks of a stage, each active where the stage's depth reaches it."""
        pattern, written = table.get("block"), table.get("blocks")
        given = [x for x in (pattern, written) if x is not None]
        if len(given) != 1 or not isinstance(given[0], list if pattern is None else Mapping):
            return self.fault("expected `block`, a table as pattern, or `blocks`, an array of tables", path)
        depth = tree.get("depth", Constant(-1 if written is None else len(written)))
        depths = depth.possible if isinstance(depth, Value) else ()
        if not depths or not all(type(d) is int and 0 <= d <= MOST_BLOCKS for d in depths):
            if depth is not None:  # else its own mistake is told already
                self.fault(f"blocks need a `depth` beside them: whole numbers from 0 to {MOST_BLOCKS:,}", path)
            depth, depths = None, (1,)  # one block shows the mistakes of all
        elif written is not None and (len(written) < depths[-1] or (len(written) > depths[-1] and not depth.keys)):
            self.fault(f"{len(written)} blocks, but depth reaches {depths[-1]}", (*path, "blocks"))
        blocks = []
        for i, item in enumerate([pattern] * depths[-1] if written is None else written):
            before = len(self.faults)
            blocks.append(self.item(item, (*path, "blocks", i), _reached(depth, i, when)))
            if written is None and len(self.faults) > before:  # they stand where the pattern stands, once
                of_pattern = [evolve(f, key=(*path, "block", *f.key[len(path) + 2 :])) for f in self.faults[before:]]
                self.faults[before:] = of_pattern
                break
        return blocks

    def item(self, item: Any, path: KeyPath, when: Sequence[Condition]) -> Any:
        if isinstance(item, Mapping):
            return self.typed(item, path, when) if "type" in item else self.table(item, path, when)
        if _nested(item):
            return [self.item(x, (*path, i), when) for i, x in enumerate(item)]
        if isinstance(item, list):
            return self.variable(path, Categorical, when, {"choices": item})
        if isinstance(item, bool | str):
            return item
        if isinstance(item, int | float):
            if abs(item) > LARGEST:
                return self.fault(_TOO_LARGE, path)
            return Constant(item)
        return self.fault(f"expected a number, a string, a list or a table, found {item!r}", path)

    def several(self, item: Mapping[str, Any], path: KeyPath, when: Sequence[Condition]) -> Any:
        """Return `length` times what `item` says, each drawn by itself: pycls's sampler `list`, which may nest."""
        for key in item.keys() - {"type", "length", "item"}:
            self.fault("unknown key", (*path, key), "a list has a length and an item")
        length = item.get("length")
        if type(length) is not int or not 1 <= length <= MOST_DEPTH:
            return self.fault(f"expected a whole number from 1 to {MOST_DEPTH}, found {length!r}", (*path, "length"))
        if "item" not in item:
            return self.fault("expected what each of the list is", (*path, "item"))
        return [self.item(item["item"], (*path, i), when) for i in range(length)]

    def typed(self, item: Mapping[str, Any], path: KeyPath, when: Sequence[Condition]) -> Any:
        if item["type"] == "list":
            return self.several(item, path, when)
        cls = TYPES.get(str(item["type"]).lower())
        if cls is None:
            hint = did_you_mean(str(item["type"]), TYPES, "types of variables")
            return self.fault(f"no type of variable {item['type']!r}", (*path, "type"), hint)
        conditions = [*when, *self.conditions(item.get("when", {}), path)]
        return self.variable(path, cls, conditions, {k: x for k, x in item.items() if k not in ("type", "when")})

    def conditions(self, table: Any, path: KeyPath) -> list[Condition]:
        """`when = { op = "mbconv" }` speaks of a variable in the same table, `{ "stages.0.op" = … }` of any."""
        conditions: list[Condition] = []
        if not isinstance(table, Mapping):
            self.fault(f"expected a table of keys and choices, found {table!r}", (*path, "when"))
            table = {}
        for key, choices in table.items():
            near = dotted_key(*path[:-1], key)
            with collecting(self.faults, *path, "when", key, also=ValueError):
                parent = parent_of(near if near in self.variables else key, self.variables)
                wanted = choices if isinstance(choices, list) else [choices]
                conditions.append(Condition(parent.key, frozenset(map(parent.canonical, wanted))))
        return conditions

    def variable(
        self, path: KeyPath, cls: type[Variable], when: Sequence[Condition], options: Mapping[str, Any]
    ) -> Variable | None:
        key = dotted_key(*path)
        if key in self.variables:
            return self.fault(TWICE, path)
        with collecting(self.faults, *path):
            variable = build(cls, options, key=key, when=when)
            if any(not isinstance(choice, str) and abs(choice) > LARGEST for choice in variable.choices):
                raise UserError(_TOO_LARGE)
            self.variables[key] = variable
        return self.variables.get(key)
