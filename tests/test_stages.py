"""Stages of a build: each key covers what its stage reads and executes, and nothing else, so little is done again."""

import dataclasses
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fake_engines import machine
from random_models import random_checkpoint, random_config
from traces import traced_once

import cm_export
from cm_export.backends.tensorrt import builder
from cm_export.base.errors import InputError
from cm_export.build import build as builds
from cm_export.build import engines, job, sources
from cm_export.build.stage import fingerprint
from cm_export.build.stages import Stages
from cm_export.bundle.bundle import read_manifest
from cm_export.recipe.recipe import Recipe
from cm_export.source import checkpoint

ALL = ["weights", "trace", "graphs", "gates", "engines"]  # that these builds need
OWN = {"neurons__policy": "griffin", "tokens__prune_layer": 1}  # as the fixture bare_bundle was built
RECIPE = Recipe().replace(**OWN, backend="tensorrt", engine__capacity=256, engine__max_prompt=192)


def aim(recipe: Recipe, version: str = "10.3.0") -> engines.Aim:
    """What engines are for, without a machine that has TensorRT."""
    return engines.Aim(recipe.backend, version, None, ("sm_86",), False, None, recipe.engine)


@pytest.fixture
def prepared(bare_checkpoint, monkeypatch) -> job.Job:
    monkeypatch.setattr(engines, "aim", aim)
    return job.prepare(checkpoint.resolve(str(bare_checkpoint)), RECIPE, 1, lambda *_: None)


@pytest.fixture
def edit(monkeypatch) -> Callable[[str], None]:
    """edit(place) changes the source files in that folder of the package, or that file."""
    real, changed = sources.content, []
    monkeypatch.setattr(
        sources, "content", lambda file: real(file) + b"# edited" * any(p in file.as_posix() for p in changed)
    )
    return lambda place: changed.append(f"/{place}" if place.endswith(".py") else f"/{place}/")


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return [name for name in ALL if before[name] != after[name]]


# ---------------------------------------------------------------- keys: sources


EDITS = {
    "cm_export/report": [],
    "cm_export/tune": [],
    "cm_export/cli": [],
    "cm_export/evals": [],
    "cm_export/deploy": [],
    "cm_export/calibrating": [],
    "plugins/harness": [],
    "cm_export/build/quality.py": [],
    "cm_export/build/assemble.py": [],
    "cm_export/backends/tensorrt": ["engines"],
    "cm_export/build/engines.py": ["engines"],
    "cm_export/build/steps/engines.py": ["engines"],
    "cm_export/build/steps/gates.py": ["gates"],
    "cm_export/build/gates.py": ["gates", "engines"],
    "cm_export/backends/onnxruntime": ["gates", "engines"],
    "cm_export/host": ["gates", "engines"],
    "cm_export/surgery": ["graphs", "gates", "engines"],
    "cm_export/policies": ["graphs", "gates", "engines"],
    "cm_export/policies/neurons/griffin.py": ["graphs", "gates", "engines"],
    "cm_export/recipe": ["graphs", "gates", "engines"],
    "cm_export/bundle/predictor.py": ["graphs", "gates", "engines"],
    "plugins/core_ffn": ["graphs", "gates", "engines"],
    "cm_export/families": ALL,
    "cm_export/families/qwen2_vl.py": ALL,
    "cm_export/source": ALL,
    "cm_export/source/trace.py": ALL,
    "cm_export/bundle/weights.py": ALL,
    "cm_export/base": ALL,
    "cm_export/build/stage.py": ALL,
}


@pytest.mark.parametrize("place", EDITS)
def test_an_edit_changes_the_keys_of_the_stages_that_execute_the_file_and_of_those_that_read_them(
    prepared, edit, place
):
    root = Path(cm_export.__file__).parent.parent
    assert (root / place).exists() or (Path(cm_export.plugins.__file__).parent.parent / place).exists()
    before = builds.stage_keys(prepared)
    edit(place)
    assert changed(before, builds.stage_keys(prepared)) == EDITS[place]


def test_imports_in_functions_and_modules_found_by_name_are_behind_a_module_and_those_for_type_checkers_are_not():
    trace = set(sources.behind("cm_export.build.steps.trace"))
    assert "cm_export.source.trace" in trace  # imported where it is used
    assert {"cm_export.families", "cm_export.families.qwen2_vl", "cm_export.families.llama"} <= trace  # by_name.load
    assert "cm_export.build.job" not in trace
    assert {"cm_export.backends.tensorrt.builder", "cm_export.policies.tokens.spread"} <= set(
        sources.behind("cm_export.build.steps.engines")
    )  # run as a process of its own; by_name.load


def test_tracing_loads_nothing_that_its_key_does_not_cover(tmp_path):
    config = random_config(1)
    config["text_config"]["num_hidden_layers"] = 1
    path = random_checkpoint(config, tmp_path / "model")
    code = (
        "import sys; from pathlib import Path; from cm_export.source.model import trace_graph;"
        f"trace_graph(Path({str(path)!r}), 'decode', Path({str(tmp_path / 'x.onnx')!r}));"
        "print(*(m for m in sys.modules if m.split('.')[0] == 'cm_export'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "cm_export.source.wrappers" in loaded
    assert loaded <= set(sources.behind("cm_export.build.steps.trace"))


# ---------------------------------------------------------------- keys: inputs


CHOICES = {
    "engine__precision": ("fp32", ["engines"]),
    "engine__capacity": (512, ["engines"]),
    "engine__optimization_level": (1, ["engines"]),
    "neurons__share": (0.25, ["graphs", "gates", "engines"]),
    "neurons__policy": ("random", ["graphs", "gates", "engines"]),
    "tokens__cache": ("index", ["graphs", "gates", "engines"]),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_of_the_recipe_changes_the_keys_of_the_stages_that_read_it(prepared, choice):
    value, expected = CHOICES[choice]
    recipe = prepared.recipe.replace(**{choice: value})
    other = dataclasses.replace(prepared, recipe=recipe, aim=aim(recipe))
    assert changed(builds.stage_keys(prepared), builds.stage_keys(other)) == expected


def test_neither_the_name_of_a_model_nor_a_backend_changes_a_key_of_portable_stages(prepared):
    recipe = prepared.recipe.replace(backend="tensorrt-rtx", model="another/name", revision="main")
    other = dataclasses.replace(prepared, recipe=recipe, aim=aim(recipe))
    assert changed(builds.stage_keys(prepared), builds.stage_keys(other)) == ["engines"]


JOBS = {
    "threads": (lambda job: {"threads": 2}, ["gates"]),
    "TensorRT": (lambda job: {"aim": aim(job.recipe, "10.4.0")}, ["engines"]),
    "calibration": (lambda job: {"measured": "0" * 64}, ["graphs", "gates", "engines"]),
    "order": (lambda job: {"order": np.zeros((2, 3), np.int32)}, ["weights", "graphs", "gates", "engines"]),
    "configuration": (lambda job: {"config": job.config | {"x": 1}}, ["trace", "graphs", "gates", "engines"]),
    "probe": (lambda job: {"inputs": {"x": np.zeros(3)}}, ["weights", "graphs", "gates", "engines"]),
    "checkpoint": (
        lambda job: {"source": dataclasses.replace(job.source, files=job.source.files | {"model.safetensors": "0"})},
        ["weights", "graphs", "gates", "engines"],
    ),
}


@pytest.mark.parametrize("what", JOBS)
def test_an_input_changes_the_keys_of_the_stages_that_read_it(prepared, what):
    change, expected = JOBS[what]
    other = dataclasses.replace(prepared, **change(prepared))
    assert changed(builds.stage_keys(prepared), builds.stage_keys(other)) == expected


def test_a_head_that_differs_from_the_embedding_is_traced_anew_under_the_same_configuration(prepared, monkeypatch):
    before = builds.stage_keys(prepared)
    real = builds.trace.model.head_differs
    monkeypatch.setattr(builds.trace.model, "head_differs", lambda path: not real(path))
    assert "trace" in changed(before, builds.stage_keys(prepared))


@pytest.mark.parametrize(
    ("library", "expected"),
    [
        ("onnxruntime", ["gates", "engines"]),
        ("onnx-graphsurgeon", ["graphs", "gates", "engines"]),
        ("onnxscript", ["trace", "graphs", "gates", "engines"]),
        ("transformers", ALL),
        ("rich", []),
    ],
)
def test_another_version_of_a_library_changes_the_keys_of_the_stages_that_use_it(
    prepared, monkeypatch, library, expected
):
    before, real = builds.stage_keys(prepared), sources.version
    same = library.replace("-", "_")
    other = lambda name: "99" if name.replace("-", "_") == same else real(name)  # noqa: E731
    monkeypatch.setattr(sources, "version", other)
    assert changed(before, builds.stage_keys(prepared)) == expected


def test_what_a_package_brings_for_itself_alone_is_no_library_of_a_stage(tmp_path, monkeypatch):
    before = sources.libraries("cm_export.build.steps.graphs")
    assert "tomli" not in before  # imported by recipes on Python 3.10 only
    private, public = tmp_path / "package" / "_vendor", tmp_path / "site"
    for place in (private, public):
        for name in ("tomli", "tomli-9.0.dist-info"):
            (place / name).mkdir(parents=True)
        (place / "tomli" / "__init__.py").touch()
        (place / "tomli-9.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: tomli\nVersion: 9.0\n")
        (place / "tomli-9.0.dist-info" / "top_level.txt").write_text("tomli\n")
    (private.parent / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [*sys.path, str(private)])
    assert sources.libraries("cm_export.build.steps.graphs") == before
    monkeypatch.setattr(sys, "path", [*sys.path, str(public)])
    assert sources.libraries("cm_export.build.steps.graphs") == before | {"tomli": "9.0"}


def test_a_fingerprint_depends_on_every_value_type_and_name_and_not_on_the_order_of_names():
    @dataclasses.dataclass(frozen=True)
    class Words:
        ids: np.ndarray
        grids: tuple = ()

    a = np.arange(6)
    values = [
        a,
        a.reshape(2, 3),
        a.astype(np.int32),
        {"a": a},
        {"b": a},
        Words(a),
        Words(a, (1,)),
        Words(a + 1),
        (a,),
        [1, "x"],
    ]
    assert len({fingerprint(v) for v in values}) == len(values)
    assert fingerprint({"a": 1, "b": a}) == fingerprint({"b": a.copy(), "a": 1})
    with pytest.raises(TypeError, match="object"):
        fingerprint(object())


# ---------------------------------------------------------------- builds


@pytest.fixture
def place(bare_bundle, tmp_path) -> Path:
    """A finished portable bundle with its stages, in a folder of its own."""
    for name in ("x.plan", ".x.plan.stages"):
        shutil.copytree(bare_bundle.with_name(name), tmp_path / name)
    return tmp_path / "x.plan"


@pytest.fixture
def build(bare_checkpoint, place, monkeypatch) -> Callable[..., list[str]]:
    """build(recipe overrides) -> stages reused. Engines are files that say what they were built for."""
    monkeypatch.setattr(engines, "aim", aim)

    def engine(source, family, probe, folder, aim, progress, threads, piece) -> dict:
        assert not multiprocessing.active_children()  # those that traced hold memory that engines need
        (folder / "decode.plan").write_text(aim.engine.precision)
        return {"backend": aim.backend, "precision": aim.engine.precision, "graphs": {}, "gates": []}

    monkeypatch.setattr(engines, "build_engines", engine)

    def build(threads: int = 0, **chosen: object) -> list[str]:
        with traced_once():
            return builds.build(str(bare_checkpoint), place, RECIPE.replace(**chosen), threads=threads)["stages_reused"]

    return build


def test_a_build_redoes_what_an_edit_or_a_choice_concerns_and_takes_the_rest_over(build, place, edit):
    assert build() == ["weights", "trace", "graphs", "gates"]  # of the portable build
    assert build() == ALL
    assert build(engine__precision="fp32") == ["weights", "trace", "graphs", "gates"]
    assert (place / "engines" / "decode.plan").read_text() == "fp32"
    assert read_manifest(place)["engines"]["precision"] == "fp32"
    assert build(threads=1, engine__precision="fp32") == ["weights", "trace", "graphs", "engines"]
    assert build(threads=1) == ["weights", "trace", "graphs", "gates"]
    assert build(threads=1, neurons__share=0.25) == ["weights", "trace"]
    edit("cm_export/report")
    assert build(threads=1, neurons__share=0.25) == ALL
    edit("cm_export/surgery")
    assert build(threads=1, neurons__share=0.25) == ["weights", "trace"]
    edit("cm_export/families")
    assert build(threads=1, neurons__share=0.25) == []
    assert build(threads=1, neurons__share=0.25) == ALL
    assert sorted(os.listdir(place.with_name(".x.plan.stages"))) == sorted([*ALL, "lock"])


def test_whatever_a_stage_executes_is_covered_by_its_key_or_by_that_of_a_stage_it_reads(
    bare_checkpoint, place, monkeypatch
):
    at = machine("10.3.0").sit_at(monkeypatch)
    (plugins := place.with_name("libcm_plugins.so")).write_text("not a library")
    monkeypatch.setattr(engines, "installed", lambda backend: at.trt.__version__)
    monkeypatch.setattr(engines, "run_builder", lambda job, step: builder.build(at.trt, job, lambda message: None))
    for name in ("weights", "graphs", "gates"):  # tracing runs in other processes, and has a test of its own
        shutil.rmtree(place.with_name(".x.plan.stages") / name)
    executed, run = {}, Stages.run

    def watched(self, name, key, work):
        def work_watched(folder):
            files = executed[name] = set()
            sys.setprofile(lambda frame, event, _: files.add(frame.f_code.co_filename) if event == "call" else None)
            try:
                return work(folder)
            finally:
                sys.setprofile(None)

        return run(self, name, key, work_watched)

    monkeypatch.setattr(Stages, "run", watched)
    recipe = RECIPE.replace(neurons__row_norm=True, engine__plugins=str(plugins))
    told = builds.build(str(bare_checkpoint), place, recipe, progress=lambda *_: None, threads=1)
    assert told["stages_reused"] == ["trace"]
    ours = {str(sources.file_of(m).resolve()) for m in _modules()}
    stages = {s.name: s for s in builds.STAGES}

    def covered(name: str) -> set[str]:
        below = [covered(n) for n in stages[name].reads]
        files = {str(sources.file_of(m).resolve()) for m in sources.behind(stages[name].run.__module__)}
        return files.union(*below)

    assert set(executed) == {"weights", "graphs", "gates", "engines"}
    for name, files in executed.items():
        found = {str(Path(f).resolve()) for f in files if Path(f).is_file()} & ours
        assert str(sources.file_of(f"cm_export.build.steps.{name}")) in found
        found -= {str(sources.file_of("cm_export.build.stages"))}  # where it finds the files of other stages
        assert found <= covered(name), (name, sorted(found - covered(name)))


def _modules() -> list[str]:
    root, plugins = Path(cm_export.__file__).parent, Path(cm_export.plugins.__file__).parent
    places = [("cm_export", root), ("cm_export.plugins", plugins)]
    names = {
        ".".join([top, *p.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__")
        for top, folder in places
        for p in folder.rglob("*.py")
    }
    return sorted(n for n in names if not n.startswith("cm_export.recipes") and sources.file_of(n))


def test_the_table_in_build_lists_the_stages_in_their_order():
    named = re.findall(r"^(\w+) {2,}\w", builds.__doc__, re.M)
    assert named[0] == "stage" and named[1:] == [stage.name for stage in builds.STAGES]
    assert [name for name in named[1:] if name not in ("measured", "packed")] == ALL


def test_a_stage_reads_only_stages_before_it():
    for i, stage in enumerate(builds.STAGES):
        assert set(stage.reads) <= {before.name for before in builds.STAGES[:i]}


def test_the_graphs_stage_cannot_read_the_engines_part_of_a_recipe(prepared):
    seen = builds.graphs.STAGE.inputs(prepared)["recipe"]
    assert seen["engine"] is None and seen["backend"] == "" and seen["neurons"]["share"] == 0.6


# ---------------------------------------------------------------- refused


def test_a_refused_build_leaves_no_folder_of_stages(bare_checkpoint, tmp_path):
    with pytest.raises(InputError, match="prune_layer"):
        builds.build(str(bare_checkpoint), tmp_path / "x.plan", Recipe().replace(tokens__prune_layer=99))
    assert os.listdir(tmp_path) == []


def test_a_folder_of_stages_goes_when_the_build_it_was_made_for_finished_none(tmp_path):
    def build(folder: Path, finish: bool) -> None:
        with pytest.raises(InputError), (stages := Stages(folder)).lock():
            if finish:
                stages.run("w", "key", lambda folder: {})
            raise InputError("refused")

    (tmp_path / "mine").mkdir()
    build(tmp_path / "made", False), build(tmp_path / "mine", False), build(tmp_path / "kept", True)
    assert sorted(os.listdir(tmp_path)) == ["kept", "mine"]
    assert Stages(tmp_path / "kept").finished("w", "key") is not None


def test_stages_tell_what_was_done_in_this_build_or_before(tmp_path):
    for _ in range(2):
        stages = Stages(tmp_path / "s")
        stages.run("w", "key", lambda folder: {"answer": 42})
        assert stages.state("w")["answer"] == 42 and stages.keys == {"w": "key"}
