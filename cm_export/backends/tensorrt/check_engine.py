"""What a TensorRT build must show before its engine is believed: nothing that we asked for was silently left out.

    network   inputs and outputs as lowered; every input reaches an output; index tensors are inputs; plugin layers are there
    engine    the same names at its border, and the plugin layers among those that the inspector lists

Parsers ignore inputs that they do not know (nonpad_kv_seqlen of Attention-24), and take a function in a plugin's place.
"""

import json
from typing import Any

# Layers without an output that decide what others compute.
_ROOTS = ("TRIP_LIMIT",)
_DTYPES = {  # of ONNX -> of TensorRT
    "float": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
    "int32": "INT32",
    "bool": "BOOL",
}


def check_network(network: Any, expected: dict[str, Any]) -> list[str]:
    """What is wrong with a parsed network (INetworkDefinition); `expected` is a graph as `write_graphs` describes it."""
    problems = _border(
        "input", [network.get_input(i) for i in range(network.num_inputs)], expected["inputs"]
    ) + _border("output", [network.get_output(i) for i in range(network.num_outputs)], expected["outputs"])
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    read = _read(network, layers)
    for i in range(network.num_inputs):
        name = network.get_input(i).name
        if name not in read:
            problems.append(f"input {name} reaches no output: the parser ignored it")
    plugins = {layer.name for layer in layers if layer.type.name.startswith("PLUGIN")}
    problems += _missing(expected["plugin_nodes"], plugins)
    there = {network.get_input(i).name for i in range(network.num_inputs)}
    problems += [f"index {name} is no input" for name in expected["index_inputs"] if name not in there]
    return problems


def check_engine(names: list[str], information: str, expected: dict[str, Any]) -> list[str]:
    """What is wrong with a built engine: `names` of its input and output tensors, `information` of the inspector (JSON)."""
    wanted = [v["name"] for v in expected["inputs"] + expected["outputs"]]
    problems = [f"{name} is not at the engine's border" for name in wanted if name not in names]
    layers = json.loads(information).get("Layers", [])
    described = [entry if isinstance(entry, dict) else {"Name": entry} for entry in layers]
    # A plugin keeps the name of its node; what was fused around it is told in the metadata.
    found = {
        node
        for node in expected["plugin_nodes"]
        for layer in described
        if "Plugin" in str(layer.get("LayerType", "Plugin")) and _names(layer, node)
    }
    return problems + _missing(expected["plugin_nodes"], found)


def _names(layer: dict[str, Any], node: str) -> bool:
    texts = [str(layer.get("Name", "")), *str(layer.get("Metadata", "")).replace("\x1e", " ").split()]
    return any(node == text or text == f"[ONNX Layer: {node}]" or text.rstrip("]") == node for text in texts)


def _missing(nodes: list[str], found: set[str]) -> list[str]:
    lost = [n for n in nodes if n not in found]
    more = f" (and {len(lost) - 3} more)" if len(lost) > 3 else ""
    return [f"no plugin layer for {', '.join(lost[:3])}{more}: the function's body was taken instead"] if lost else []


def _border(what: str, tensors: list[Any], expected: list[dict[str, Any]]) -> list[str]:
    problems, there = [], {t.name: t for t in tensors}
    for value in expected:
        tensor = there.pop(value["name"], None)
        if tensor is None:
            problems.append(f"{what} {value['name']} is missing")
            continue
        if tensor.dtype.name != _DTYPES[value["dtype"]]:
            problems.append(f"{what} {value['name']} is {tensor.dtype.name}, not {_DTYPES[value['dtype']]}")
        shape = [axis if isinstance(axis, int) else -1 for axis in value["shape"]]
        # Where the graph leaves an axis open, the parser may know its length.
        if len(tensor.shape) != len(shape) or any(a != b and b != -1 for a, b in zip(tensor.shape, shape, strict=True)):
            problems.append(f"{what} {value['name']} is {tuple(tensor.shape)}, not {tuple(shape)}")
    return problems + [f"{what} {name} was not asked for" for name in there]


def _read(network: Any, layers: list[Any]) -> set[str]:
    """Names of all tensors from which an output can be reached."""
    makers: dict[str, Any] = {layer.get_output(j).name: layer for layer in layers for j in range(layer.num_outputs)}
    todo = [network.get_output(i).name for i in range(network.num_outputs)]
    todo += [t for layer in layers if layer.type.name in _ROOTS for t in _inputs(layer)]
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo.extend(_inputs(makers[name]) if name in makers else ())
    return seen


def _inputs(layer: Any) -> list[str]:
    tensors = (layer.get_input(j) for j in range(layer.num_inputs))
    return [t.name for t in tensors if t is not None]
