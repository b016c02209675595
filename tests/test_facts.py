"""What a policy says about itself is read from its text, and is what its module says when it runs."""

import subprocess
import sys

import pytest

from cm_export.base import by_name
from cm_export.base.errors import InputError
from cm_export.recipe import facts

READ = {facts.NEURONS: facts.neuron_policy, facts.TOKENS: facts.token_policy}
POLICIES = [(package, name) for package in READ for name in by_name.names_in(package)]
WIRES = 'WIRES = ("z",)\nATTRIBUTES = ()\n'


@pytest.mark.parametrize(("package", "name"), POLICIES, ids=lambda value: value.rpartition(".")[2])
def test_the_facts_in_the_text_are_those_of_the_module(package, name):
    module, read = by_name.load(package, name, "policy"), READ[package](name)
    assert (read.wires, read.attributes) == (module.WIRES, module.ATTRIBUTES)
    assert read.adds == getattr(module, "ADDS", False)
    assert read.scores == (module.FUNCTION is not None)
    assert read.in_decode == hasattr(module, "decode_function")


def test_facts_that_are_not_written_have_defaults():
    assert facts.parse(WIRES, "x.py") == facts.Facts(("z",), ())
    annotated = WIRES + "ADDS: bool = True\nSCORES = False\nIN_DECODE = True\nother = f(x)\n"
    assert facts.parse(annotated, "x.py") == facts.Facts(("z",), (), adds=True, scores=False, in_decode=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (WIRES + "ADDS = bool(1)\n", r"x.py:3: ADDS is not a literal; write the value itself"),
        (WIRES + "ADDS = not SCORES\n", "ADDS is not a literal"),
        ('WIRES = ("z", *MORE)\nATTRIBUTES = ()\n', r"x.py:1: WIRES is not a literal"),
        (WIRES + 'WIRES += ("vote",)\n', r"x.py:3: WIRES is not a literal"),
        (WIRES + "SCORES = 0\n", "SCORES = 0; give True or False"),
        ('WIRES = ["z"]\nATTRIBUTES = ()\n', r"WIRES = \['z'\]; give .* a tuple of names"),
        ('WIRES = ("z")\nATTRIBUTES = ()\n', "WIRES = 'z'; give"),
        ('WIRES = ("z",)\n', "x.py: says no ATTRIBUTES"),
    ],
)
def test_a_fact_that_is_not_a_literal_of_its_kind_is_refused_with_its_line(text, words):
    with pytest.raises(InputError, match=words):
        facts.parse(text, "x.py")


def test_an_unknown_policy_is_told_with_the_nearest():
    with pytest.raises(InputError, match="unknown neuron policy 'grifin'; did you mean 'griffin'"):
        facts.neuron_policy("grifin")
    with pytest.raises(InputError, match="unknown token policy"):
        facts.token_policy("griffin")


def test_a_recipe_is_checked_without_a_policy_a_backend_or_their_libraries():
    code = (
        "import sys\n"
        "from cm_export.recipe.recipe import from_dict\n"
        "for backend in ('onnxruntime', 'tensorrt', 'tensorrt-rtx'):\n"
        "    chosen = from_dict({'neurons': {'policy': 'predicted'}, 'tokens': {'first': 'spread'}, 'backend': backend})\n"
        "    assert chosen.neurons.in_decode and chosen.tokens.later == 'no'\n"
        "heavy = ('torch', 'onnx', 'onnxruntime', 'numpy')\n"
        "ours = ('cm_export.policies.neurons.', 'cm_export.policies.tokens.', 'cm_export.backends.')\n"
        "print(sorted(m for m in sys.modules if m in heavy or m.startswith(ours)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
