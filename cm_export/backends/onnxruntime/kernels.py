"""On a device, nodes of ours become ops of the plugin library (plugins/ort), which runs our kernels on ONNX Runtime's stream.

    CoreFFN with thresholds                        ->  CoreLinear gate, CoreLinear up, Gated, CoreLinear down
    CoreLinear(x, W [N,D], ..)                     ->  CoreLinear(x, W by inputs [D,N], ..)
    CoreFFN that reads what PredictNeurons lists, CoreAttention in a step: as they stand

The first two are what engines have, too (surgery/active_products.py). A weight is on the device once, so every other graph
reads those by inputs as they lie. An op has one output more, the memory in which it works. What has no kernel is left to `lower`.
"""

from collections.abc import Container

import onnx

from ...plugins import places
from .lower import ACTIVE_INPUTS, attribute, check_one_activation, import_domain

_WIDEST = 256  # numbers of a head, kMostColumns of the kernels


def held_by_inputs(decode: onnx.ModelProto) -> set[str]:
    """Weights [N,D] of a portable decode graph that its kernels read as [D,N]."""
    held = {n.input[1] for n in decode.graph.node if n.op_type == "CoreLinear"}
    return held.union(*(n.input[1:3] for n in decode.graph.node if _by_threshold(n)))


def use_kernels(model: onnx.ModelProto, held: Container[str], is_step: bool) -> onnx.ModelProto:
    """Rewrite a graph of the language model, which comes back; `held`: weights that are by inputs. `is_step`: of a few tokens.

    Raises SurgeryError for FFNs of several activations.
    """
    from ...surgery import active_products  # with graphsurgeon, which places without kernels do not wait for
    from ...surgery.edit import Edit

    if by_threshold := [n for n in model.graph.node if _by_threshold(n)]:
        check_one_activation(model.graph)
        edit = Edit(model, "kernels")
        active_products.products(edit, attribute(by_threshold[0], "activation"))
        model = edit.export()
    active_products.turn(model)
    _read_by_inputs(model, held)
    chosen = {n.output[0] for n in model.graph.node if n.op_type == "PredictNeurons"}
    ours = [n for n in model.graph.node if _has_kernel(n, chosen) or (is_step and _attends(n, model.graph))]
    for node in ours:
        node.domain = places.DOMAIN
        wanted = 2 if node.op_type == "CoreFFN" else 1
        names = [name or f"{node.output[0]}/{i}" for i, name in enumerate([*node.output, ""][:wanted])]
        node.output[:] = [*names, f"{node.output[0]}/workspace"]
    if ours:
        model.opset_import.append(onnx.helper.make_opsetid(places.DOMAIN, 1))
    return model


def _by_threshold(node: onnx.NodeProto) -> bool:
    return node.op_type == "CoreFFN" and len(node.input) == ACTIVE_INPUTS


def _has_kernel(node: onnx.NodeProto, chosen: Container[str]) -> bool:
    return node.op_type == "CoreLinear" or (
        node.op_type == "CoreFFN" and len(node.input) == 5 and node.input[4] in chosen
    )


def _attends(node: onnx.NodeProto, graph: onnx.GraphProto) -> bool:
    width = next((v.type.tensor_type.shape.dim[3].dim_value for v in graph.input if v.name.startswith("past.")), 0)
    return node.op_type == "CoreAttention" and 0 < width <= _WIDEST


def _read_by_inputs(model: onnx.ModelProto, held: Container[str]) -> None:
    """MatMul(x, Transpose(W)) -> MatMul(x, W by inputs), and a CoreFFN of every neuron becomes its products."""
    from ...surgery import active_products

    graph, nodes, new = model.graph, [], dict[str, onnx.TensorProto]()
    stored = {t.name: t for t in graph.initializer if t.name in held}
    turned = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Transpose" and n.input[0] in stored}

    def by_inputs(weight: str) -> str:
        return new.setdefault(weight, active_products.by_inputs(stored[weight])).name

    def product(x: str, weight: str, y: str) -> None:
        nodes.append(onnx.helper.make_node("MatMul", [x, weight], [y], f"{y}/product"))

    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in turned:
            node.input[1] = by_inputs(turned[node.input[1]])
        elif node.op_type == "CoreFFN" and len(node.input) == 4 and node.input[1] in stored:
            x, gate, up, down = node.input
            y, z = node.output[0], node.output[1] or f"{node.output[0]}/z"
            product(x, by_inputs(gate), f"{y}/gate")
            product(x, by_inputs(up), f"{y}/up")
            gated = active_products.gated_function(attribute(node, "activation"))
            nodes.append(
                onnx.helper.make_node(gated.name, [f"{y}/gate", f"{y}/up"], [z], f"{y}/gated", domain=gated.domain)
            )
            product(z, down, y)
            if all(f.name != gated.name for f in model.functions):
                check_one_activation(graph)
                model.functions.append(gated)
            import_domain(model)
            continue
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(new.values())
