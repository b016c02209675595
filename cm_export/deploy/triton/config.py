"""The texts of a repository from templates: config.pbtxt of every model, README.md, Dockerfile, model.py.

    {"name": "past.0.key", "dtype": "float", "shape": ["batch", 2, "past", 64]}
    { name: "past.0.key" data_type: TYPE_FP32 dims: [ -1, 2, -1, 64 ] }           what has a name may change

Batches are axes of the graphs themselves, so Triton is told of none (max_batch_size: 0).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from ...serving.triton_request import INPUTS, OUTPUTS
from ...serving.triton_settings import Settings

TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "int8": "TYPE_INT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "float": "TYPE_FP32",
    "double": "TYPE_FP64",
}
PACKAGE = "cm_export.deploy.triton"
TENSORRT, ONNXRUNTIME = "tensorrt_plan", "onnxruntime"


@dataclass(frozen=True)
class Sample:
    """A request that Triton makes when it loads a model: each input's shape, and the file with its values (None: zeros)."""

    name: str
    inputs: Mapping[str, tuple[str, tuple[int, ...], str | None]]  # input -> type, shape, file in warmup/


def graph(name: str, described: Mapping[str, Any], how: str, warm_up: Sequence[Sample] = ()) -> str:
    """config.pbtxt of one graph; `described`: its part of the manifest.

    No input is a shape tensor: the builder of engines refuses those.
    """
    ports = {side: [_port(port) for port in described[side]] for side in ("inputs", "outputs")}
    return render("graph.pbtxt.j2", name=name, how=how, warm_up=warm_up, **ports)


def vlm(settings: Settings) -> str:
    """config.pbtxt of the model that answers."""
    return render("vlm.pbtxt.j2", inputs=INPUTS, outputs=OUTPUTS, parameters=settings.texts())


def _port(port: Mapping[str, Any]) -> dict[str, Any]:
    dims = [axis if isinstance(axis, int) else -1 for axis in port["shape"]]
    return {"name": port["name"], "type": TYPES[port["dtype"]], "dims": dims}


def render(template: str, **values: Any) -> str:
    """A template of this folder with these values; one that is missing is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(PACKAGE, "."),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # none of it is a page
    )
    # A protobuf text string escapes as JSON does, once everything outside ASCII is left as it is.
    environment.filters["quoted"] = lambda value: json.dumps(str(value), ensure_ascii=False)
    return environment.get_template(template).render(**values)
