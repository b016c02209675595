"""A Python-based Triton backend that stands in for `onnxruntime` and `tensorrt` where a server has neither.

model.onnx -> ONNX Runtime             model.plan of tests/fake_tensorrt.py -> the lowered graph in it -> ONNX Runtime

It takes a repository as it is, and refuses what the real ones refuse: inputs of another type or shape than was declared.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        return config

    def initialize(self, args):
        config = json.loads(args["model_config"])
        file = Path(args["model_repository"]) / args["model_version"] / config["default_model_filename"]
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(_model(file), options, providers=["CPUExecutionProvider"])
        inputs = {value.name for value in self.session.get_inputs()}
        declared = {port["name"] for port in config["input"]}
        if inputs != declared:
            raise pb_utils.TritonModelException(f"{args['model_name']}: declares {declared ^ inputs} wrongly")
        self.inputs, self.outputs = list(declared), [port["name"] for port in config["output"]]

    def execute(self, requests):
        return [self.answered(request) for request in requests]

    def answered(self, request):
        feeds = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
        try:
            values = self.session.run(self.outputs, feeds)
        except Exception as error:
            return pb_utils.InferenceResponse([], pb_utils.TritonError(str(error)))
        tensors = [pb_utils.Tensor(n, np.ascontiguousarray(v)) for n, v in zip(self.outputs, values, strict=True)]
        return pb_utils.InferenceResponse(tensors)


def _model(file):
    """What ONNX Runtime loads: a path, whose weights lie beside it, or the bytes of the graph in a stand-in's plan."""
    if file.suffix != ".plan":
        return str(file)
    import onnx

    data = file.read_bytes()
    assert data[:4] == b"plan", "is no plan of tests/fake_tensorrt.py"
    model = onnx.load_from_string(data[8 + int.from_bytes(data[4:8], "little") :])
    for node in model.graph.node:  # what only TensorRT reads
        kept = [a for a in node.attribute if not a.name.startswith("TRT_")]
        del node.attribute[:]
        node.attribute.extend(kept)
    return model.SerializeToString()
