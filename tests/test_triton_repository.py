"""A bundle as a Triton repository, without a server: what is written, what is refused, and the model `vlm` by itself.

test_triton_server.py asks a real server (`make test-triton`).
"""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import fake_triton
import numpy as np
import pytest
import yaml
from conftest import cm_export
from fake_triton import Request, Sent
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from cm_export import load
from cm_export.base.errors import CmExportError, InputError
from cm_export.bundle.bundle import Bundle
from cm_export.deploy.triton import containers, fit, repository, runtime
from cm_export.host.sampling import Sampling
from cm_export.recipe.aliases import DEMO
from cm_export.serving import triton, triton_request
from cm_export.serving.metrics import FIGURES
from cm_export.serving.triton import Model
from cm_export.serving.triton_metrics import TritonSink
from cm_export.serving.triton_settings import Settings

IMAGES = [p.read_bytes() for p in sorted((DEMO.parent / "images").glob("*.png"))]
QUESTION = "describe : what shape is in the image?"


# ---------------------------------------------------------------- config.pbtxt, as the server's parser reads it

S, I32, I64, B = "TYPE_STRING", "TYPE_INT32", "TYPE_INT64", "TYPE_BOOL"
MESSAGES = {  # of Triton's model_config.proto: what our files may use; any other name is an error of the parser
    "ModelConfig": {
        "name": S, "platform": S, "backend": S, "default_model_filename": S, "max_batch_size": I32,
        "version_policy": "Policy", "input": ["Input"], "output": ["Output"], "instance_group": ["Group"],
        "model_warmup": ["WarmUp"], "model_transaction_policy": "Transaction", "parameters": ["Parameter"],
    },
    "Policy": {"latest": "Latest"}, "Latest": {"num_versions": I32}, "Transaction": {"decoupled": B},
    "Input": {"name": S, "data_type": "DataType", "dims": [I64], "optional": B},
    "Output": {"name": S, "data_type": "DataType", "dims": [I64]},
    "Group": {"count": I32, "kind": "Kind"},
    "WarmUp": {"name": S, "batch_size": I32, "inputs": ["WarmUpInput"]},
    "WarmUpInput": {"key": S, "value": "WarmUpValue"},
    "WarmUpValue": {"data_type": "DataType", "dims": [I64], "zero_data": B, "input_data_file": S},
    "Parameter": {"key": S, "value": "ParameterValue"}, "ParameterValue": {"string_value": S},
}  # fmt: skip
ENUMS = {
    "DataType": "TYPE_INVALID TYPE_BOOL TYPE_INT32 TYPE_INT64 TYPE_FP16 TYPE_BF16 TYPE_FP32 TYPE_STRING",
    "Kind": "KIND_AUTO KIND_GPU KIND_CPU KIND_MODEL",
}  # fmt: skip
BYTES = {"TYPE_BOOL": 1, "TYPE_INT32": 4, "TYPE_INT64": 8, "TYPE_FP32": 4, "TYPE_FP16": 2}


def _parser():
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference", syntax="proto3")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values.split()):
            enum.value.add(name=value, number=number)
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (field, kind) in enumerate(fields.items(), 1):
            several = isinstance(kind, list)
            kind = kind[0] if several else kind
            one = message.field.add(name=field, number=number, label=3 if several else 1)
            if kind.startswith("TYPE_"):
                one.type = getattr(one, kind)
            else:
                one.type, one.type_name = one.TYPE_ENUM if kind in ENUMS else one.TYPE_MESSAGE, f".inference.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


ModelConfig = _parser()


def config(repository, model):
    return text_format.Parse((repository / model / "config.pbtxt").read_text(), ModelConfig())


@pytest.fixture(scope="module")
def deployed(whole_bundle, tmp_path_factory):
    """The repository that the real command writes of the demo model."""
    out = tmp_path_factory.mktemp("triton") / "model_repository"
    done = cm_export("deploy", "triton", whole_bundle, "--out", out, "--at-once", "4", "--threads", "1", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return out, json.loads(done.stdout)


def test_every_graph_becomes_a_model_that_declares_what_its_graph_has(deployed, whole_bundle):
    out, made = deployed
    graphs = Bundle(whole_bundle).manifest["graphs"]
    assert made["graphs"] == {name: "onnxruntime" for name in graphs} and made["left_out"] == {}
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == sorted([*graphs, "vlm"])
    for name, graph in graphs.items():
        found = config(out, name)
        assert (found.name, found.backend, found.max_batch_size) == (name, "onnxruntime", 0)
        assert (out / name / "1" / found.default_model_filename).is_file()
        for declared, side in ((found.input, "inputs"), (found.output, "outputs")):
            assert [p.name for p in declared] == [p["name"] for p in graph[side]]
            for port, own in zip(declared, graph[side], strict=True):
                assert list(port.dims) == [axis if isinstance(axis, int) else -1 for axis in own["shape"]]


def test_the_warm_up_of_a_graph_gives_every_input_in_full(deployed):
    out, made = deployed
    warmed = [name for name in made["graphs"] if config(out, name).model_warmup]
    assert warmed == ["prefill", "prefill_dense", "vision"]
    for name in warmed:
        found = config(out, name)
        (sample,) = found.model_warmup
        assert [i.key for i in sample.inputs] == [i.name for i in found.input]
        for given in sample.inputs:
            kind = ENUMS["DataType"].split()[given.value.data_type]
            if not given.value.zero_data:
                file = out / name / "warmup" / given.value.input_data_file
                assert file.stat().st_size == BYTES[kind] * int(np.prod(given.value.dims))
    patches = config(out, "vision").model_warmup[0].inputs[0].value.dims[0]
    assert 0 < patches <= 4096 and made["settings"]["warm_up_pixels"] > 64


def test_the_model_that_answers_declares_its_inputs_and_takes_its_settings_from_its_parameters(deployed):
    found = config(deployed[0], "vlm")
    assert found.model_transaction_policy.decoupled and found.instance_group[0].count == 1
    assert all(i.optional for i in found.input) and {tuple(i.dims) for i in found.input} == {(1,), (-1,)}
    given = {p.key: {"string_value": p.value.string_value} for p in found.parameters}
    assert Settings.of(given) == Settings(**deployed[1]["settings"]) and Settings.of(given).at_once == 4
    wrong = (("at_onec", "4", "mean 'at_once'"), ("at_once", "many", "is no int"), ("execution", "x", "in_process"))
    for name, value, words in wrong:
        with pytest.raises(InputError, match=words):
            Settings.of({name: {"string_value": value}})


def test_weights_are_second_names_of_the_bundles_files_and_nothing_is_copied(deployed, whole_bundle):
    out, made = deployed
    weights = whole_bundle / "weights.safetensors"
    assert made["copied_bytes"] == 0
    for place in ("vlm/1/bundle", "prefill/1", "vision/1"):
        assert os.path.samefile(weights, out / place / "weights.safetensors")
    assert not [p for p in out.rglob("*") if p.is_symlink()]  # ONNX Runtime refuses weights behind one


def test_where_links_do_not_work_the_bundle_is_copied_once(deployed, whole_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", _no_link)
    made = repository.deploy(whole_bundle, tmp_path / "r", Settings(warm_up_pixels=-1))
    size = sum(p.stat().st_size for p in whole_bundle.rglob("*") if p.is_file())
    assert made["copied_bytes"] == size


def _no_link(*_args, **_how):
    raise OSError(1, "Operation not permitted")


def test_the_readme_says_how_to_run_it_and_which_container(deployed):
    out, _ = deployed
    readme, dockerfile = ((out / name).read_text() for name in ("README.md", "Dockerfile"))
    for words in ("--shm-size", "--load-model=vlm", "/v2/health/ready", "/metrics", "generate_stream", "podman"):
        assert words in readme
    assert f"FROM {containers.IMAGE}:{containers.ONNXRUNTIME}-py3" in dockerfile
    pins = (out / "requirements.txt").read_text()
    assert "numpy==" in pins and "{{" not in readme + dockerfile


def test_the_package_in_the_repository_answers_without_another_one(deployed, tmp_path):
    """As in a container: our package is nowhere else, nor are torch, click and rich."""
    blocked = ["torch", "transformers", "click", "rich", "onnxscript"]
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); sys.path.insert(0, sys.argv[1] + '/vlm/1')"
    code += "; import cm_export.serving.triton as t; from cm_export.host.loaded import load; print(t.__file__)"
    code += "; print(load(sys.argv[1] + '/vlm/1/bundle', 1).generate('hello', max_new_tokens=3).token_ids)"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code, deployed[0]], env=env, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(deployed[0] / "vlm" / "1"))


OPTIONAL = {
    "click",
    "torch",
    "transformers",
    "prometheus_client",
    "tensorrt",
    "tensorrt_rtx",
    "cuda",
    "tomli",
    "tomllib",
    "av",  # clips
    *("anyio", "fastapi", "starlette", "uvicorn"),  # `cm-export serve`
}
MODULES = {"PIL": "pillow", "ml_dtypes": "ml-dtypes", "onnx_graphsurgeon": "onnx-graphsurgeon"}


def test_the_requirements_are_what_the_package_in_the_repository_imports(deployed):
    found = set()
    for file in (deployed[0] / "vlm" / "1" / "cm_export").rglob("*.py"):
        text = re.sub(r"if TYPE_CHECKING:\n(    .*\n)+", "", file.read_text())
        found |= set(re.findall(r"^ *(?:import|from) (\w+)", text, re.M))
    found -= sys.stdlib_module_names | OPTIONAL | {"cm_export"}
    assert sorted(MODULES.get(name, name) for name in found) == sorted(runtime.NEEDS)
    lines = (deployed[0] / "requirements.txt").read_text().splitlines()
    assert sum("==" in line for line in lines) == len(runtime.NEEDS)


def test_an_older_repository_is_replaced_and_what_is_not_ours_is_refused(deployed, whole_bundle, tmp_path):
    out = tmp_path / "r"
    shutil.copytree(deployed[0], out, copy_function=os.link)
    quick = Settings(warm_up_pixels=-1)
    repository.deploy(whole_bundle, out, quick)
    assert (
        Settings.of({p.key: {"string_value": p.value.string_value} for p in config(out, "vlm").parameters}).at_once == 8
    )
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds notes\.txt, which `deploy` did not write"):
        repository.deploy(whole_bundle, out, quick)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").touch()
    with pytest.raises(InputError, match="no repository of ours"):
        repository.deploy(whole_bundle, tmp_path / "other", quick)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "other")
    for place, words in (
        (tmp_path / "file", "is no directory"),
        (tmp_path / "a" / "b", "no directory"),
        (tmp_path / "link", "is a symbolic link; give --out .*other"),
        (whole_bundle, "no repository of ours"),
    ):
        with pytest.raises(InputError, match=words):
            repository.deploy(whole_bundle, place, quick)
    assert not list(tmp_path.glob(".*.tmp"))


def test_without_an_exchange_of_names_it_is_replaced_all_the_same_and_leftovers_go(
    deployed, whole_bundle, tmp_path, monkeypatch
):
    out = tmp_path / "r"
    shutil.copytree(deployed[0], out, copy_function=os.link)
    (tmp_path / ".r.999999999.tmp" / "vlm").mkdir(parents=True)
    monkeypatch.setattr(repository.atomic, "exchange", lambda *_: False)
    repository.deploy(whole_bundle, out, Settings(warm_up_pixels=-1, at_once=5))
    assert '"5"' in (out / "vlm" / "config.pbtxt").read_text() and [p.name for p in tmp_path.iterdir()] == ["r"]


def test_a_fault_on_the_way_leaves_the_old_repository(deployed, whole_bundle, tmp_path, monkeypatch):
    out = tmp_path / "r"
    shutil.copytree(deployed[0], out, copy_function=os.link)
    before = (out / "vlm" / "config.pbtxt").read_text()

    def fault(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(repository.runtime, "copy", fault)
    with pytest.raises(CmExportError, match="cannot be written"):
        repository.deploy(whole_bundle, out, Settings(warm_up_pixels=-1, at_once=5))
    assert (out / "vlm" / "config.pbtxt").read_text() == before and [p.name for p in tmp_path.iterdir()] == ["r"]


def test_what_does_not_fit_is_said_before_anything_is_written(whole_bundle, tmp_path):
    out = tmp_path / "r"
    for options, words in (
        (("--backend", "tensorrt"), "holds no engines of TensorRT; build it with --backend tensorrt"),
        (("--token-share", "0"), "not above 0"),
        (("--execution", "blz"), "'in-process', 'bls'"),
    ):
        done = cm_export("deploy", "triton", whole_bundle, "--out", out, *options)
        assert done.returncode == 2 and words in done.stderr and not out.exists(), done.stderr
    done = cm_export("deploy", "tritn", whole_bundle, "--out", out)
    assert done.returncode == 2 and "did you mean 'triton'" in done.stderr


ENGINES = {"backend": "tensorrt", "version": "10.13.3.9", "architecture": "sm_89", "kv": "copy", "capacity": 256,
           "plugins": {"name": "libcm_plugins.so", "sha256": ""}}  # fmt: skip


def with_engines(bundle, **engines):
    """An open bundle whose manifest says that it has such engines."""
    opened = Bundle(bundle)
    recipe = opened.recipe.replace(backend=engines.get("backend", "tensorrt"))
    opened.__dict__["recipe"] = recipe
    opened.manifest["engines"] = {**ENGINES, "graphs": opened.manifest["graphs"], **engines}
    return opened


def test_engines_become_plans_in_the_container_of_their_tensorrt(whole_bundle):
    plan = fit.plan(with_engines(whole_bundle), None, "bls")
    assert plan.how == "tensorrt_plan" and plan.container.image.endswith(":25.09-py3") and plan.left_out == {}
    assert plan.files("prefill") == {"model.plan": "engines/prefill.plan"} and plan.plugins.endswith("libcm_plugins.so")
    assert not fit.plan(with_engines(whole_bundle, version="99.1"), None, "in_process").container.known
    assert "numpy<2" in runtime.requirements("10.6.0.26", containers.of_engines("10.6.0.26"))
    assert runtime.requirements("10.13.3.9", plan.container)[-2:] == ["tensorrt==10.13.3.9", "cuda-bindings>=12.8"]


def test_engines_that_write_their_cache_in_place_get_no_decode_model_but_answer_in_process(whole_bundle):
    bundle = with_engines(whole_bundle, kv="in_place", version="10.15.1.29")
    plan = fit.plan(bundle, None, "in_process")
    assert set(plan.left_out) == {"decode", "decode_dense"} and "prefill" in plan.graphs
    with pytest.raises(InputError, match=r"no model decode: .* cannot bind; let vlm hold"):
        fit.plan(bundle, None, "bls")
    with pytest.raises(InputError, match=r"tensorrt-rtx, for which Triton has no backend"):
        fit.plan(with_engines(whole_bundle, backend="tensorrt-rtx"), None, "in_process")
    assert fit.plan(with_engines(whole_bundle, backend="tensorrt-rtx"), "onnxruntime", "bls").how == "onnxruntime"


# ---------------------------------------------------------------- kubernetes/triton

BASE = Path(__file__).parent.parent / "kubernetes" / "triton"


@pytest.fixture(scope="module")
def base():
    """Its objects by kind, as kustomize reads them: a name that appears twice in one mapping is an error."""
    listed = yaml.safe_load((BASE / "kustomization.yaml").read_text())["resources"]
    found = [yaml.safe_load((BASE / name).read_text()) for name in listed]
    assert sorted([*listed, "kustomization.yaml", "queue-time-rule.yaml"]) == sorted(p.name for p in BASE.iterdir())
    return {one["kind"]: one for one in found}


def test_every_object_of_the_base_is_about_the_same_pods(base):
    versions = {"Deployment": "apps/v1", "Service": "v1", "PodDisruptionBudget": "policy/v1"}
    versions["HorizontalPodAutoscaler"] = "autoscaling/v2"
    assert {kind: one["apiVersion"] for kind, one in base.items()} == versions
    pod = base["Deployment"]["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert base["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert base["Service"]["spec"]["selector"] == labels
    assert base["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    target = base["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", base["Deployment"]["metadata"]["name"])
    (container,) = pod["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert (
        ports
        == {"http": 8000, "grpc": 8001, "metrics": 8002}
        == {port["targetPort"]: port["port"] for port in base["Service"]["spec"]["ports"]}
    )
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(ports["metrics"])


def test_pods_of_the_base_run_without_root_and_write_only_where_they_must(base):
    pod = base["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
    }  # fmt: skip
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {m["name"] for m in container["volumeMounts"] if not m.get("readOnly")} == {"shm", "tmp"}
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory" and set(volumes) == {"models", "shm", "tmp"}


def test_the_base_runs_and_probes_what_a_repository_has(base, deployed):
    out, _ = deployed
    (container,) = base["Deployment"]["spec"]["template"]["spec"]["containers"]
    readme = (out / "README.md").read_text()
    assert all(word in readme for word in container["args"] if not word.startswith("--exit-timeout"))
    probe = container["livenessProbe"]
    (mount,) = [m["mountPath"] for m in container["volumeMounts"] if m["name"] == "models"]
    assert probe["exec"]["command"] == ["python3", f"{mount}/alive.py"] and (out / "alive.py").is_file()
    limits = re.findall(r"timeout=(\d+)|\"deadline\": (\d+)", (out / "alive.py").read_text())
    assert all(int(a or b) < probe["timeoutSeconds"] for a, b in limits) and len(limits) == 2
    exits = next(int(word.rpartition("=")[2]) for word in container["args"] if "exit-timeout" in word)
    assert exits < base["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]


def test_pods_are_added_by_a_figure_that_the_model_counts(base):
    (metric,) = base["HorizontalPodAutoscaler"]["spec"]["metrics"]
    (rule,) = yaml.safe_load((BASE / "queue-time-rule.yaml").read_text())["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    named = set(re.findall(r"cm_export_\w+", rule["metricsQuery"] + rule["seriesQuery"]))
    assert named == {"cm_export_queue_seconds_sum", "cm_export_queue_seconds_count"}
    assert "cm_export_queue_seconds" in {figure.name for figure in FIGURES if figure.kind == "histogram"}


# ---------------------------------------------------------------- the model, without a server


@pytest.fixture(scope="module")
def asked_alone(whole_bundle):
    with load(whole_bundle, threads=1) as model:
        yield model


def opened(repository):
    """The model of a repository, with two places."""
    parameters = {k: {"string_value": v} for k, v in Settings(at_once=2, queued=2, threads=1).texts().items()}
    args = {"model_config": json.dumps({"parameters": parameters}), "model_name": "vlm", "model_version": "1"}
    return Model(args | {"model_repository": str(repository / "vlm")}, fake_triton)


@pytest.fixture(scope="module")
def vlm(deployed):
    model = opened(deployed[0])
    yield model
    model.close()


def ask(vlm, **inputs):
    sent = Sent()
    vlm.execute([Request(sent, **inputs)])
    return sent


REQUESTS = (
    ({"images": [IMAGES[0]]}, {"images": [IMAGES[0]]}),
    ({"images": [base64.b64encode(IMAGES[1])], "token_share": 0.2, "max_tokens": 5},
     {"images": [IMAGES[1]], "token_share": 0.2, "max_new_tokens": 5}),
    ({"images": IMAGES[:2], "dense": True}, {"images": IMAGES[:2], "dense": True}),
    ({"images": [IMAGES[0]], "guard": 4}, {"images": [IMAGES[0]], "guard": 4}),
    ({"temperature": 0.7, "seed": 3, "max_tokens": 9}, {"sampling": Sampling(temperature=0.7, seed=3), "max_new_tokens": 9}),
)  # fmt: skip


@pytest.mark.parametrize("number", range(len(REQUESTS)))
def test_a_stream_brings_what_the_command_line_answers(vlm, asked_alone, number):
    inputs, arguments = REQUESTS[number]
    sent = ask(vlm, text_input=QUESTION.encode(), stream=True, **inputs)
    responses, expected = sent.wait(), asked_alone.generate(QUESTION, **arguments)
    assert sent.error is None and sent.text == expected.text
    last = responses[-1][0]
    assert last["token_ids"].tolist() == expected.token_ids
    assert last["image_tokens_kept"] == expected.stats["image_tokens_kept"]
    assert last["stop_reason"][0].decode() == expected.stats["stopped"]
    assert set(last) == {t.name for t in triton_request.OUTPUTS} and set(responses[0][0]) == {"text_output"}
    whole = ask(vlm, text_input=QUESTION.encode(), **inputs)
    assert len(whole.wait()) == 1 and whole.text == expected.text  # not streamed: one response


def test_a_conversation_goes_on_and_says_which_patches_were_kept(vlm, asked_alone):
    said = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "A circle."}]
    said.append({"role": "user", "content": "what color is it ?"})
    sent = ask(vlm, messages=json.dumps(said).encode(), images=[IMAGES[0]], kept=True)
    expected = asked_alone.generate(said, images=[IMAGES[0]])
    (last, _, _) = sent.wait()[-1]
    assert sent.text == expected.text
    assert json.loads(last["stats"][0])["kept"] == [expected.kept[0].astype(int).tolist()]


REFUSED = [
    ({}, "text_input: is missing"),
    ({"text_input": b"a", "messages": b"[]"}, "text_input: stands beside messages"),
    ({"text_input": b""}, "text_input: .*no text"),
    ({"text_input": b"\xff"}, "text_input: is no text in UTF-8"),
    ({"messages": b"{"}, "messages: is no JSON"),
    ({"messages": b"[" * 9999}, "messages: is nested too deeply"),
    ({"text_input": b"a", "images": [b"/etc/passwd"]}, r"images\[0\]: "),
    ({"text_input": b"a", "images": [b"https://example.org/a.png"]}, r"images\[0\]: URLs and paths are not opened"),
    ({"text_input": b"a", "images": [IMAGES[0], IMAGES[0][:70]]}, r"images\[1\]: "),
    ({"text_input": b"a", "images": [b""]}, r"images\[0\]: is empty"),
    ({"text_input": b"a", "images": [IMAGES[0]] * 9}, "images: 9 pictures, at most 8"),
    ({"text_input": b"a", "max_tokens": 0}, "max_tokens: is 0"),
    ({"text_input": b"a", "max_tokens": np.array([1, 2], np.int32)}, "max_tokens: has 2 values"),
    ({"text_input": b"a", "temperature": float("nan")}, "temperature"),
    ({"text_input": b"a", "token_share": 1.5}, "token_share: 1.5 is not above 0"),
    ({"text_input": b"a", "dense": True, "guard": 4}, "guard"),
    ({"text_input": b"a", "stop": [b"\xff"]}, "stop: is no text"),
    ({"text_input": b"a", "deadline": 0.0}, "deadline"),
    ({"text_input": b"a", "parameters": '{"max_token": 5}'}, "unknown input 'max_token'; did you mean 'max_tokens'"),
]  # fmt: skip


def test_what_cannot_be_answered_is_an_invalid_argument_in_one_line(vlm):
    for inputs, words in REFUSED:
        sent = ask(vlm, **inputs)
        sent.wait()
        assert sent.error.code == sent.error.INVALID_ARG and "\n" not in sent.error.text
        assert re.search(words, sent.error.text), (words, sent.error.text)


def until(true, seconds=20.0):
    """Wait for what other threads do."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "did not come true"
        time.sleep(0.005)


LONG = {"text_input": b"hello", "max_tokens": 1024, "min_tokens": 1024, "stream": True}


def test_a_closed_stream_frees_its_place_and_more_than_can_wait_are_refused(vlm):
    running = []
    for busy in ((2, 0), (2, 2)):
        running += [ask(vlm, **LONG) for _ in range(2)]
        until(lambda busy=busy: (vlm.scheduler.load().running, vlm.scheduler.load().queued) == busy)
    refused = ask(vlm, text_input=b"hello")
    refused.wait()
    assert refused.error.code == refused.error.UNAVAILABLE and "try again" in refused.error.text
    for sent in running:
        sent.cancelled = True
    assert all(sent.wait(5)[-1][1].code == fake_triton.TritonError.CANCELLED for sent in running)
    assert (vlm.scheduler.load().running, vlm.scheduler.load().queued) == (0, 0)
    late = ask(vlm, **{**LONG, "deadline": 0.15})
    assert late.wait(5)[-1][0]["stop_reason"][0] == b"deadline"


def test_a_stream_that_was_closed_while_it_was_read_is_cancelled_as_soon_as_it_is_handed_in(vlm):
    sent = Sent()
    client = triton._Client(fake_triton, sent, "x", vlm._line)
    client.leave()
    vlm._begin(client, triton_request.tensors(Request(sent, **LONG), fake_triton))
    assert sent.wait(5)[-1][1].code == fake_triton.TritonError.CANCELLED


def test_requests_wait_under_the_name_that_their_client_gives(vlm):
    sent = [ask(vlm, **LONG) for _ in range(2)]
    until(lambda: vlm.scheduler.load().running == 2)
    sent += [ask(vlm, text_input=b"hello", client=name) for name in (b"a", b"b")]
    until(lambda: vlm.scheduler.load().queued == 2)
    assert set(vlm.scheduler._waiting._of) == {"a", "b"}  # these take turns
    for one in sent:
        one.cancelled = True
    for one in sent:
        one.wait(5)


def test_shares_of_the_settings_hold_for_requests_that_name_none():
    settings = Settings(token_share=0.5, neuron_share=0.75)
    text = {"text_input": b"hello"}
    budgets = [
        triton_request.read(triton_request.Given({**text, **more}), settings).asked.budget
        for more in ({}, {"token_share": 0.25}, {"dense": True})
    ]
    assert [(b.token_share, b.neuron_share, b.dense) for b in budgets] == [
        (0.5, 0.75, False),
        (0.25, 0.75, False),
        (None, None, True),
    ]


def test_a_float_is_the_decimal_number_that_was_meant():
    request = Request(Sent(), text_input=b"a", temperature=0.7, token_share=0.1)
    given = triton_request.tensors(request, fake_triton)
    assert (given.values["temperature"], given.values["token_share"]) == (0.7, 0.1)


def test_what_was_counted_reaches_the_server_once_under_its_labels(monkeypatch):
    monkeypatch.setattr(fake_triton.MetricFamily, "all", {})
    sink = TritonSink(fake_triton, {"model": "vlm", "version": "1"})
    for outcome, seconds in (("answered", 0.5), ("cancelled", 2.0), ("answered", 3.0)):
        sink.add("cm_export_requests_total", 1, outcome)
        sink.see("cm_export_request_seconds", seconds)
    sink.put("cm_export_requests_running", 3)
    sink.flush()
    sink.flush()
    families = fake_triton.MetricFamily.all
    counted = {m.labels["outcome"]: m.value for m in families["cm_export_requests_total"].metrics}
    assert counted == {"answered": 2, "cancelled": 1}
    assert families["cm_export_requests_running"].metrics[0].value == 3
    assert families["cm_export_request_seconds"].metrics[0].seen == [0.5, 2.0, 3.0]


def test_unloading_answers_those_who_are_there(deployed, monkeypatch):
    monkeypatch.setattr(fake_triton.MetricFamily, "all", {})  # those of the other model stay
    model, sent = opened(deployed[0]), [Sent() for _ in range(3)]
    for count, one in enumerate(sent, 1):
        model.execute([Request(one, text_input=b"hello", max_tokens=300, min_tokens=300)])
        until(lambda count=count: model.scheduler.load().running + model.scheduler.load().queued == count)
    model.close()
    assert [(len(one.responses), one.error) for one in sent] == [(1, None)] * 3


def test_the_log_has_a_line_of_json_for_each_request_and_no_text_of_it(vlm, capsys):
    ask(vlm, text_input=b"hello secret").wait()
    ask(vlm, text_input=b"secret", max_tokens=0).wait()
    families, said = fake_triton.MetricFamily.all, []
    until(lambda: said.append(capsys.readouterr().err) or "".join(said).count("\n") == 2)
    assert sorted(json.loads(line)["outcome"] for line in "".join(said).splitlines()) == ["InputError", "answered"]
    assert "secret" not in "".join(said)
    until(lambda: families["cm_export_time_to_first_token_seconds"].metrics[0].seen)
    assert families["cm_export_requests_waiting"].metrics[0].labels == {"model": "vlm", "version": "1"}


def test_one_thread_talks_with_the_server(vlm):
    sent = [ask(vlm, text_input=QUESTION.encode(), stream=True, **inputs) for inputs, _ in REQUESTS[:2]]
    sent += [ask(vlm, text_input=b"", stream=True)]
    for one in sent:
        one.wait()
    assert {name for one in sent for name in one.threads} == {"cm-export-line"}
