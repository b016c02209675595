"""What a plugin library promises besides its numbers: names, attributes, shapes, types, refusals, workspace.

Every promise is a function that yields what it found wrong. None of them runs a kernel, so no GPU is needed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from cm_export.base.onnx_text import DOMAIN

from ..contract import Op
from .cases import OPS, Call, calls
from .library import BUILD, FIELD_TYPES, TYPES, Library, Plugin, Tensor

_KIND = "PLUGIN CREATOR_V3ONE"
# Letters of one size: with low bits D, its words W and its groups G.
_TIED = {"W": "D", "G": "D"}


@dataclass(frozen=True)
class Problem:
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def problems(library: Library) -> list[Problem]:
    """All broken promises; an empty list is what a release needs."""
    found = list(_creators(library))
    if found:
        return found
    # One call per form and type is enough here: sizes beyond that are for run.py.
    seen, chosen = set(), []
    for call in calls():
        key = call.op.name, call.dtype, tuple(call.case.axes.items()), tuple(call.case.attributes.items())
        if key not in seen:
            seen.add(key)
            chosen.append(call)
    for op in OPS:
        found += _attributes(library, op, next(c for c in chosen if c.op is op))
    for call in chosen:
        plugin = library.creators[call.op.name].create(call.case.attributes)
        if plugin is None:
            found.append(Problem(str(call), f"not created: {library.log()}"))
            continue
        for promise in (_outputs, _formats, _refusals, _dynamic, _workspace):
            found += promise(library, plugin, call)
    return found


def _creators(library: Library) -> Iterator[Problem]:
    expected = {(op.name, DOMAIN, op.version, _KIND) for op in OPS}
    got = {(c.name, c.namespace, c.version, c.kind) for c in library.creators.values()}
    if got != expected:
        yield Problem("creators", f"{sorted(got)} instead of {sorted(expected)}")


def _attributes(library: Library, op: Op, call: Call) -> Iterator[Problem]:
    creator, given = library.creators[op.name], call.case.attributes
    expected = {name: FIELD_TYPES[type(value)] for name, value in given.items()}
    if creator.fields != expected or tuple(creator.fields) != op.attributes:
        yield Problem(op.name, f"fields {creator.fields} instead of {expected}")
    bad: list[dict[str, Any]] = [{n: v for n, v in given.items() if n != name} for name in given]
    bad += [given | {name: 1.5 if isinstance(value, int) else 3} for name, value in given.items()]
    packed = {"bits": 4, "group": 32}
    if op.name == "CoreLinear":
        bad += [given | {"by_inputs": 0}, given | packed | {"bits": 3}, given | packed | {"group": 0}]
    if op.name == "CoreFFN":
        bad += [given | {"activation": "silo"}, given | {"activation": ""}, given | {"block": 0}, given | {"block": -8}]
        bad += [given | packed | {"bits": 3}, given | packed | {"group": 0}, given | {"bits": 0, "group": 32}]
    for attributes in bad:
        if creator.create(attributes, BUILD) is not None:
            yield Problem(op.name, f"accepts the attributes {attributes}")
        elif not library.log():
            yield Problem(op.name, f"does not say why it refuses {attributes}")


def _outputs(library: Library, plugin: Plugin, call: Call) -> Iterator[Problem]:
    expected = [t.shape for t in call.outputs]
    if (got := plugin.output_shapes(call.inputs)) != expected:
        yield Problem(str(call), f"output shapes {got} instead of {expected}")
    types = [t.dtype for t in call.inputs]
    if (got := plugin.output_types(types)) != [call.dtype] * len(expected):
        yield Problem(str(call), f"output types {got}")
    for wrong in (types[:-2], [*types, "int32", "int32"]):
        if plugin.output_types(wrong) is not None:
            yield Problem(str(call), f"accepts {len(wrong)} inputs")
    library.log()


def _formats(library: Library, plugin: Plugin, call: Call) -> Iterator[Problem]:
    """Each place accepts its own type in linear layout and nothing else, given that all others are right."""
    types = [t.dtype for t in (*call.inputs, *call.outputs)]
    for place, right in enumerate(types):
        for dtype in TYPES:
            for layout in (0, 1):
                tried = [dtype if i == place else t for i, t in enumerate(types)]
                formats = [layout if i == place else 0 for i in range(len(types))]
                # the type of the first input is free among the floats: the others follow it
                free = place == 0 and dtype in ("float32", "float16", "bfloat16")
                wanted = layout == 0 and (dtype == right or free)
                if plugin.supports(place, tried, formats) != wanted:
                    yield Problem(str(call), f"tensor {place} as {dtype}, layout {layout}: supported is {not wanted}")
    if plugin.supports(len(types), [*types, "int32"], [0] * (len(types) + 1)):
        yield Problem(str(call), "one input too many is supported")


def _changed(tensor: Tensor, place: int, by: int) -> Tensor:
    return replace(tensor, shape=tuple(n + by * (i == place) for i, n in enumerate(tensor.shape)))


def _letters(call: Call) -> list[list[str]]:
    """Axis letters of each input."""
    return [call.case.axes[name].split(",") for name in call.feeds]


def _refusals(library: Library, plugin: Plugin, call: Call) -> Iterator[Problem]:
    """One dimension of one input changed: refused unless no other input has that size; so is another rank."""
    letters = _letters(call)
    tied = [[_TIED.get(letter, letter) for letter in axes] for axes in letters]
    every = [letter for axes in tied for letter in axes]
    for i, tensor in enumerate(call.inputs):
        for place, letter in enumerate(tied[i]):
            if letter == "1" and place == 0:
                continue  # the mask of all requests; with B it becomes one mask each
            free = every.count(letter) == 1 and letter not in ("1", "H", "Hk")
            inputs = [_changed(t, place, 1) if j == i else t for j, t in enumerate(call.inputs)]
            if call.op.name == "CoreAttention" and letter in ("H", "Hk"):
                free = inputs[0].shape[1] % inputs[1].shape[1] == 0 and letter == "H"
            if (plugin.shapes(inputs, call.outputs) or plugin.configure(inputs, call.outputs)) != free:
                yield Problem(str(call), f"input {i} as {inputs[i].shape}: accepted is {not free}")
            if not free and not library.log():
                yield Problem(str(call), f"does not say why it refuses input {i} as {inputs[i].shape}")
        # [B,S,K] without its K is a list per request of S ids
        shorter = () if letters[i] == ["B", "S", "K"] else (tensor.shape[:-1],)
        for shape in ((1, *tensor.shape, 1), *shorter):
            inputs = [replace(t, shape=shape) if j == i else t for j, t in enumerate(call.inputs)]
            if plugin.shapes(inputs, call.outputs) or plugin.configure(inputs, call.outputs):
                yield Problem(str(call), f"input {i} of rank {len(shape)} is accepted")
    if plugin.shapes(call.inputs[:3], call.outputs) or plugin.shapes(call.inputs, [*call.outputs] * 2):
        yield Problem(str(call), "three inputs, or the outputs twice, are accepted")
    library.log()


def _dynamic(library: Library, plugin: Plugin, call: Call) -> Iterator[Problem]:
    """All sizes but those of the weights and heads may be unknown while an engine is built."""
    dynamic = {"B", "S", "K", "P", "M"}
    inputs = [
        replace(t, shape=tuple(-1 if letter in dynamic else n for n, letter in zip(t.shape, axes, strict=True)))
        for t, axes in zip(call.inputs, _letters(call), strict=True)
    ]
    if not plugin.configure(inputs, call.outputs):
        yield Problem(str(call), f"dynamic sizes are refused: {library.log()}")


def _workspace(library: Library, plugin: Plugin, call: Call) -> Iterator[Problem]:
    """A larger shape never needs less: an engine gives every call what its largest shape asked for."""
    before = plugin.workspace(call.inputs, call.outputs)
    if before is None:
        yield Problem(str(call), f"its shapes are refused: {library.log()}")
        return
    for grown in "BSKPM":
        inputs = [
            replace(t, shape=tuple(n * (4 if letter == grown else 1) for n, letter in zip(t.shape, axes, strict=True)))
            for t, axes in zip(call.inputs, _letters(call), strict=True)
        ]
        after = plugin.workspace(inputs, call.outputs)
        if after is None or after < before:
            yield Problem(str(call), f"{grown} times 4: workspace {after} after {before}")
    library.log()
