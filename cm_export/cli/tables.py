"""Tables for people, drawn by rich on stdout; the same values go to machines as JSON through `emit_json`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..base.units import size
from .console import wants_plain_text

TOP_OPS = 6  # operators named per graph; --json and --graph have them all


def print_build(manifest: Mapping[str, Any]) -> None:
    """manifest: what `build.build` returns, the bundle's manifest with `path`, `seconds`, `stages_reused`."""
    console, files = _console(), manifest["files"]
    _gates(console, manifest["gates"])
    rows = [
        (f"{name}.onnx", f"{graph['nodes']} nodes", size(files[f"{name}.onnx"]["bytes"]))
        for name, graph in manifest["graphs"].items()
    ]
    own = (".safetensors", ".plan", ".so")
    rows += [(name, "", size(entry["bytes"])) for name, entry in files.items() if name.endswith(own)]
    console.print(_table(("file", "holds", "size"), rows, right=(1, 2)))
    reused = f" (unchanged: {', '.join(manifest['stages_reused'])})" if manifest["stages_reused"] else ""
    total = size(sum(entry["bytes"] for entry in files.values()))
    line = f"{manifest['path']}  {total} in {manifest['seconds']:.1f} s{reused}"
    console.print(line, markup=False, soft_wrap=True)
    for note in manifest["notes"]:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def print_bundle(bundle: Mapping[str, Any]) -> None:
    """bundle: what `inspect_bundle.describe` returns."""
    console = _console()
    console.print(Text(f"{bundle['path']}  ({_value(bundle['model'])})", style="bold"))
    if bundle.get("adapter"):
        console.print(_adapter(bundle["adapter"]), markup=False, soft_wrap=True)
    facts = [
        ("reads", bundle["reads"]),
        *_flat(bundle["recipe"]),
        *((f"pruned {key}", value) for key, value in bundle["pruned"].items()),
    ]
    console.print(_table(("recipe", "value"), facts))
    rows = [
        (g["name"], g["nodes"], size(g["bytes"]), _names(g["inputs"]), _names(g["outputs"]), _ops(g["ops"]))
        for g in bundle["graphs"]
    ]
    console.print(_table(("graph", "nodes", "size", "inputs", "outputs", "operators"), rows, right=(1, 2)))
    weights = bundle["weights"]
    console.print(f"weights  {weights['file']}: {weights['tensors']} tensors, {size(weights['bytes'])}", markup=False)
    if packed := weights.get("packed"):
        kept = "with" if packed["float32"] else "without"
        what = f"{packed['matrices']} matrices in few bits, {size(packed['bytes'])}, {kept} their float32 numbers"
        console.print(f"         {packed['file']}: {what}", markup=False)
    for row in bundle.get("codes") or ():
        console.print(row["said"], markup=False, soft_wrap=True)
    if bundle["engines"]:
        _engines(console, bundle["engines"])
    _gates(console, bundle["gates"])
    passes = [(p["graph"], p["name"], f"{p['count']}") for p in bundle["passes"]]
    console.print(_table(("graph", "pass", "sites"), passes, right=(2,)))
    console.print(_table(("made with", "version"), bundle["versions"].items()))


def _adapter(adapter: Mapping[str, Any]) -> str:
    said = "adapter {name}, merged into {weights} weights: rank {rank}, alpha {alpha}".format(**adapter)
    return f"{said}; sha256 {adapter['files']['adapter_model.safetensors'][:16]}"


def _engines(console: Console, engines: Mapping[str, Any]) -> None:
    title = "{backend} {version} for {architecture}, {precision}, {capacity} rows of cache".format(**engines)
    rows = [
        (
            g["name"],
            size(g["bytes"]),
            "not opened here" if g["layers"] is None else f"{g['layers']}",
            ", ".join(f"{n} {op}" for op, n in g["plugins"].items()) or "none",
            f"{g['index_inputs']}",
        )
        for g in engines["graphs"]
    ]
    console.print(_table(("engine", "size", "layers", "plugins", "index inputs"), rows, title=title, right=(1, 2, 4)))


def print_graph(graph: Mapping[str, Any]) -> None:
    """graph: one entry of `describe()["graphs"]`."""
    console = _console()
    console.print(Text(f"{graph['name']}  {graph['nodes']} nodes, {size(graph['bytes'])}", style="bold"))
    ports = [("in", p) for p in graph["inputs"]] + [("out", p) for p in graph["outputs"]]
    rows = [(way, p["name"], p["dtype"], ", ".join(map(_value, p["shape"]))) for way, p in ports]
    console.print(_table(("", "name", "dtype", "shape"), rows))
    ops = sorted(graph["ops"].items(), key=lambda item: (-item[1], item[0]))
    console.print(_table(("operator", "nodes"), [(op, f"{count}") for op, count in ops], right=(1,)))


def print_rows(report: Mapping[str, Any], title: str) -> None:
    """report: `rows`, a list of flat mappings that share their keys; `notes`, an optional list of lines."""
    console, rows = _console(), report["rows"]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    numeric = [n for n, key in enumerate(keys) if all(isinstance(row.get(key), int | float | None) for row in rows)]
    cells = [[_value(row.get(key)) for key in keys] for row in rows]
    console.print(_table([key.replace("_", " ") for key in keys], cells, title=title, right=numeric))
    for note in report.get("notes", ()):
        console.print(note, markup=False, highlight=False)


def print_pairs(title: str, pairs: Iterable[tuple[str, Any]]) -> None:
    """A table of two columns."""
    _console().print(_table((title, ""), pairs))


class _Console(Console):
    """What is read from a pipe or a file has no blanks at the end of its lines."""

    def print(self, *objects: Any, **how: Any) -> None:
        if self.is_terminal:
            return super().print(*objects, **how)
        with self.capture() as captured:
            super().print(*objects, **how)
        self.file.write("".join(f"{line.rstrip(' ')}\n" for line in captured.get().split("\n")[:-1]))


def _console() -> Console:
    console = _Console(highlight=False, soft_wrap=False, color_system=None if wants_plain_text() else "auto")
    if not console.is_terminal:
        console.width = 160  # a pipe or a file has no width; rich would cut names at 80 columns
    return console


def _gates(console: Console, gates: Sequence[Mapping[str, Any]]) -> None:
    rows = []
    for gate in gates:
        mark = Text("passed", style="green") if gate["passed"] else Text("FAILED", style="bold red")
        if gate["limit"] is None:  # nothing to pass: the value is there to be read
            mark = Text("reported", style="cyan")
        rows.append((gate["name"], mark, _value(gate["value"]), _value(gate["limit"]), gate.get("detail") or ""))
    console.print(_table(("gate", "", "value", "limit", "detail"), rows, right=(2, 3)))


def _table(
    heads: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None, right: Sequence[int] = ()
) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number in right else "left", overflow="fold")
    for row in rows:
        # Text, not str: names from a bundle may hold [brackets], which rich would read as markup.
        table.add_row(*(cell if isinstance(cell, Text) else Text(_value(cell)) for cell in row))
    return table


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _names(ports: Sequence[Mapping[str, Any]]) -> str:
    """Names of inputs or outputs; the per-layer ones (past.0.key, past.1.key ...) as one."""
    groups: dict[str, int] = {}
    for port in ports:
        name = ".".join("*" if part.isdigit() else part for part in port["name"].split("."))
        groups[name] = groups.get(name, 0) + 1
    return ", ".join(f"{name} x{count}" if count > 1 else name for name, count in groups.items())


def _ops(ops: Mapping[str, int]) -> str:
    """The operators that this tool puts in, then the most frequent ones."""
    ranked = sorted(ops.items(), key=lambda item: ("Core" not in item[0], -item[1], item[0]))
    more = f", {len(ranked) - TOP_OPS} more" if len(ranked) > TOP_OPS else ""
    return ", ".join(f"{count} {op}" for op, count in ranked[:TOP_OPS]) + more
