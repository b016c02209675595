"""`cm-export check-family`: every proof holds on models drawn at random, sees what it is there for, and is told in a table."""

import dataclasses
import json
import math

import numpy as np
import pytest
from onnx import helper, numpy_helper
from proofs import holds
from random_models import copy

from cm_export import families
from cm_export.backends.onnxruntime.cache import Rows
from cm_export.base.errors import InputError
from cm_export.cli import main
from cm_export.families import Family, qwen2_vl
from cm_export.host.core_rows import CoreRows
from cm_export.host.request import Request
from cm_export.parity import check as checking
from cm_export.parity import file
from cm_export.parity.check import PROOFS, check
from cm_export.parity.proof import FAILED, MISSING, NOT_ASKED, NOT_REACHED, PROVED, Found, Proof, compare
from cm_export.surgery import pipeline

BY_NAME = {p.name: p for p in PROOFS}
SEEDS = range(12, 20)


# ---------------------------------------------------------------- every family
@pytest.mark.wide
@pytest.mark.parametrize("name", families.names())
@pytest.mark.parametrize("seed", SEEDS)
def test_models_drawn_at_random_are_proved(name, seed):
    report = check(name, [seed])
    (found,) = report["configurations"]
    assert report["proved"], [p for p in found["proofs"] if p["state"] not in (PROVED, NOT_ASKED)]


@pytest.mark.parametrize("name", families.names())
def test_every_family_draws_configurations_that_differ_and_that_it_takes(name):
    drawn = [families.find(name).sample(seed) for seed in range(40)]
    assert drawn[3] == families.find(name).sample(3), "a seed says which"
    texts = [d.get("text_config", d) for d in drawn]
    for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "tie_word_embeddings", "hidden_act"):
        assert len({t[key] for t in texts}) > 1, key
    assert {t["num_attention_heads"] // t["num_key_value_heads"] for t in texts} > {3}, (
        "an odd number of heads share keys"
    )


# ---------------------------------------------------------------- planted bugs
def answer_one_further(real):
    return lambda self, *given: (real(self, *given)[0], real(self, *given)[1] + 1)


def rows_and_columns_swapped(real):
    return lambda self, *given: (real(self, *given)[0][[0, 2, 1]], real(self, *given)[1])


def pictures_run_together(real):
    return lambda *given: (found := real(*given)) | {"cu_seqlens": found["cu_seqlens"][[0, -1]]}


def squeezed_after_the_cut(real):
    def cut(edit, prompt, *more):
        half = edit.op("Div", prompt.position_ids, edit.constant(2, np.int64))
        return real(edit, dataclasses.replace(prompt, position_ids=half), *more)

    return cut


def rows_of_the_next_layer(real):
    def gather(self, cores):
        found, layers = real(self, cores), len(self.sources)
        number = lambda name: (int(name.split(".")[1]) + 1) % layers  # noqa: E731
        found.rows = {f"ffn.{number(n)}.{n.split('.')[2]}": rows for n, rows in found.rows.items()}
        return found

    return gather


def cache_of_the_first_request(real):
    return classmethod(lambda cls, rows, lengths=None: real([rows[0]] * len(rows)))


def question_one_further(real):
    return lambda self, read, count: real(self, read, count) + 1


PLANTED = {  # proof -> where, name and the bug
    "vision": (qwen2_vl, "vision_inputs", pictures_run_together),
    "answers": (qwen2_vl.Qwen2VL, "positions", answer_one_further),
    "two pictures": (qwen2_vl.Qwen2VL, "positions", rows_and_columns_swapped),
    "batch": (Rows, "regrouped", cache_of_the_first_request),
    "full budget": (CoreRows, "gather", rows_of_the_next_layer),
    "cut": (pipeline, "cut_tokens", squeezed_after_the_cut),
    "positions": (Request, "positions_after", question_one_further),
    "later": (Request, "positions_after", question_one_further),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_proof_sees_the_bug_that_it_is_there_for(exported, monkeypatch, name):
    where, what, bug = PLANTED[name]
    monkeypatch.setattr(where, what, bug(getattr(where, what)))
    result = BY_NAME[name].on(exported(1))
    assert result.state == FAILED, result


@pytest.mark.parametrize("name", ["prefill", "decode", "text only"])
def test_a_proof_sees_graphs_in_which_nothing_is_masked(exported, name):
    x = again(exported(1), dense={n: unmasked(copy(g)) for n, g in exported(1).dense.items()})
    assert BY_NAME[name].on(x).state == FAILED


def again(x, **changed):
    """The same subject with other parts; its weight file is mapped and must not be written anew."""
    other = dataclasses.replace(x)
    vars(other).update({"model": x.model, "weights": x.weights, "dense": x.dense, **changed})
    return other


def unmasked(model):
    nodes, graph = [], model.graph
    graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), "nothing"))
    for node in graph.node:
        if node.op_type == "Attention":
            nodes.append(helper.make_node("Mul", [node.input[3], "nothing"], [f"{node.name}/mask"]))
            node.input[3] = f"{node.name}/mask"
        nodes.append(node)
    kept = [n.__class__.FromString(n.SerializeToString()) for n in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    return model


# ---------------------------------------------------------------- how a proof ends
@pytest.mark.parametrize(
    ("run", "state", "says"),
    [
        (lambda _: Found(1e-6, 1e-5, "near"), PROVED, "near"),
        (lambda _: Found(2e-5, 1e-5, "far"), FAILED, "far"),
        (lambda _: Found(math.nan, 1e-5, "nothing"), FAILED, "nothing"),
        (lambda _: (_ for _ in ()).throw(InputError("takes no clips", fix="give pictures")), MISSING, "takes no clips"),
        (lambda _: compare({"y": (np.ones(3), np.ones(4))}, ""), FAILED, "shape (3,), expected (4,)"),
        (lambda _: compare({"y": (np.full(3, np.nan), np.ones(3))}, ""), FAILED, "NaN"),
        (lambda _: compare({}, ""), FAILED, "nothing to compare"),
        (lambda _: compare({"y": (np.ones(3), np.ones(3))}, "", {"ids": ([1, 2], [1, 3])}), FAILED, "ids: [1, 2]"),
        (lambda _: {}["tower"], FAILED, "KeyError: 'tower', in test_check_family.py:"),
    ],
)  # fmt: skip
def test_how_a_proof_ends(exported, run, state, says):
    result = Proof("x", "", run).on(exported(1))
    assert result.state == state and says in result.detail and result.holds == (state == PROVED)


def test_a_proof_about_pictures_is_not_asked_of_a_model_that_reads_none(exported):
    x = again(exported(1), shape=dataclasses.replace(exported(1).shape, sees=False))
    result = Proof("x", "", lambda _: Found(9, 1, ""), sees=True).on(x)
    assert result.state == NOT_ASKED and result.holds


# ---------------------------------------------------------------- what a file says
def tower(**changed):
    def make(self, config):
        found = qwen2_vl.Qwen2VLTower(config["vision_config"])
        vars(found).update(changed)
        return found

    return {"tower": make}


WRONG = {
    "a weight of another name": ({"gate": "mlp.gate.weight"}, "layers.0.mlp.gate.weight, it has"),
    "a weight of another size": ({"attention_out": "mlp.up_proj.weight"}, "by Family.shape"),
    "a prefix of no weight": (tower(prefixes=("visual.",)), "no weight begins with 'visual.' (prefixes)"),
    "an input that is not fed": (tower(inputs=()), "inputs and feeds differ in cu_seqlens, pixel_values, position_ids"),
    "another type": (tower(inputs=(families.Port("pixel_values", np.int64, ("p", 1)),)), "inputs and feeds differ"),
    "wrong pictures of a size": (tower(sized=lambda tokens, rng: []), "makes a picture without image tokens"),
    "lengths that are not said": (tower(axis_ranges=lambda patches: {}), "axis_ranges says nothing of 'patches'"),
    "no memory": (tower(memory=lambda picture: 0), "memory is 0 bytes"),
    "no tower": ({"tower": lambda self, config: None}, "Family.tower gives no tower"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_in_a_file_is_named(exported, case):
    changed, says = WRONG[case]
    x = dataclasses.replace(exported(1), family=type("Odd", (qwen2_vl.Qwen2VL,), changed)())
    vars(x)["model"] = exported(1).model  # nothing of it is written
    result = Proof("file", "", file.holds).on(x)
    assert result.state == FAILED and says in result.detail, result


def test_a_file_that_fits_is_proved(exported):
    holds(Proof("file", "", file.holds), exported(1))


# ---------------------------------------------------------------- the verb
@pytest.fixture
def ended(monkeypatch, exported):
    """Proofs that end as they are told: nothing is exported."""

    def put(**states):
        def proved(subject, *_):
            vars(subject)["shape"], vars(subject)["tower"] = exported(1).shape, None
            return [
                checking.Result(
                    p.name, states.get(p.name.replace(" ", "_"), PROVED), 1e-6, 1e-5, f"{p.name} was looked at"
                )
                for p in (*checking.FIRST, *PROOFS)
            ]

        monkeypatch.setattr(checking, "prove", proved)

    return put


def test_a_table_of_proofs_and_configurations(ended, capsys):
    ended()
    assert main(["check-family", "qwen2_vl", "--configurations", "2", "--seed", "12"]) == 0
    out, err = capsys.readouterr()
    assert "seed 12" in out and "seed 13" in out and "every proof holds" in out and "1.0e-06" in out
    assert all(p.name in out and p.what in out for p in PROOFS)
    assert "FAILED" not in out and "MISSING" not in out and not err.count("error")


def test_what_fails_or_is_missing_is_told_and_the_exit_code_is_1(ended, capsys, tmp_path):
    ended(cut=FAILED, two_pictures=MISSING)
    report = tmp_path / "r.json"
    assert main(["check-family", "llava", "--configurations", "1", "--json", str(report)]) == 1
    out = capsys.readouterr().out
    assert "FAILED, seed 0: cut: cut was looked at" in out and "MISSING: two pictures: two pictures was" in out
    assert "NOT PROVED" in out and "every proof holds" not in out
    found = json.loads(report.read_text())
    assert not found["proved"] and found["lacks"] == ["two pictures: two pictures was looked at"]
    states = {p["proof"]: p["state"] for p in found["configurations"][0]["proofs"]}
    assert states["cut"] == FAILED and states["vision"] == PROVED
    assert found["configurations"][0]["config"] == families.find("llava").sample(0)


@pytest.mark.parametrize("words", [["--json"], ["--json", "-"]])
def test_the_report_as_json_and_nothing_else(ended, capsys, words):
    ended()
    assert main(["check-family", "qwen3", "--configurations", "1", *words]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["proved"] and err == ""


def test_an_unknown_family_and_one_that_draws_nothing_are_told(monkeypatch, capsys):
    assert main(["check-family", "qwen2_vll"]) == 2
    assert "unknown model type 'qwen2_vll'; did you mean 'qwen2_vl'?" in capsys.readouterr().err
    monkeypatch.setattr(qwen2_vl.Qwen2VL, "sample", Family.sample)
    assert main(["check-family", "qwen2_vl", "--quiet"]) == 2
    line = capsys.readouterr().err
    assert "family qwen2_vl: its file has no sample(seed)" in line and "docs/families.md" in line


def test_a_sample_that_transformers_refuses_is_missing_and_nothing_else_is_asked(monkeypatch):
    sample = qwen2_vl.Qwen2VL.sample
    monkeypatch.setattr(qwen2_vl.Qwen2VL, "sample", lambda self, seed: sample(self, seed) | {"vision_config": 3})
    (found,) = check("qwen2_vl", [0])["configurations"]
    assert [p["state"] for p in found["proofs"]] == [MISSING, *[NOT_REACHED] * (len(PROOFS) + 1)]
    assert "transformers refuses the configuration" in found["proofs"][0]["detail"]
