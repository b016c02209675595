"""Recipes are read strictly: unknown keys, wrong types and impossible values are named."""

import pytest

from cm_export.base.errors import InputError
from cm_export.recipe import recipe
from cm_export.recipe.unread import unread


def test_the_shipped_recipes_are_valid():
    assert recipe.load("demo").model == "demo"


def test_overrides_touch_only_what_they_name():
    base = recipe.Recipe()
    changed = base.replace(tokens__share=0.25, neurons__policy="coreinfer", seed=None)
    assert (changed.tokens.share, changed.neurons.policy, changed.seed) == (0.25, "coreinfer", base.seed)
    assert changed.replace(tokens__share=base.tokens.share, neurons__policy=base.neurons.policy) == base


def test_a_recipe_survives_the_manifest():
    base = recipe.Recipe().replace(tokens__budget="knee", tokens__min_share=0.2)
    assert recipe.from_dict(base.to_dict() | {"model": None}) == base


def test_a_recipe_finds_its_calibration_beside_itself(tmp_path):
    (tmp_path / "r.toml").write_text('calibration = "c.safetensors"\n[neurons]\nrow_norm = true\n')
    found = recipe.load(str(tmp_path / "r.toml"))
    assert found.calibration == str(tmp_path / "c.safetensors") and found.neurons.row_norm


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"nerons": {}}, "did you mean 'neurons'"),
        ({"tokens": {"shar": 0.5}}, "did you mean 'share'"),
        ({"tokens": {"share": "half"}}, "not a float"),
        ({"tokens": {"share": True}}, "not a float"),
        ({"tokens": {"share": 0}}, "not a share"),
        ({"neurons": {"share": 1.5}}, "not a share"),
        ({"neurons": {"share": float("nan")}}, "not a share"),
        ({"neurons": {"policy": "grifin"}}, "did you mean 'griffin'"),
        ({"tokens": {"voters": "some"}}, "tokens.voters"),
        ({"tokens": {"budget": "count"}}, "without a count"),
        ({"tokens": {"min_share": 0.9, "max_share": 0.1}}, "min_share is above"),
        ({"tokens": {"prune_layer": 0}}, "prune_layer"),
        ({"tokens": 3}, "must be a table"),
        ({"dtype": "int4"}, "dtype"),
        ({"neurons": {"fill": "promt"}}, "did you mean 'prompt'"),
        ({"neurons": {"layers": "own"}}, "neurons.layers"),
        ({"neurons": {"block": 12}}, "neurons.block = 12; known: 1, 8, 16, 32"),
        ({"neurons": {"image_weight": -0.1}}, "neurons.image_weight"),
        ({"neurons": {"image_weight": 0.5, "policy": "coreinfer"}}, "counts whole tokens"),
        ({"neurons": {"mix": 1.1}}, "neurons.mix"),
        ({"neurons": {"row_norm": 1}}, "row_norm = 1 is not a bool"),
        ({"neurons": {"policy": "glass"}}, "'glass' needs a calibration"),
        ({"neurons": {"fill": "calibrated"}}, "neurons.fill needs a calibration"),
        ({"neurons": {"layers": "calibrated"}}, "neurons.layers needs a calibration"),
        ({"seed": -1}, "seed"),
    ],
)
def test_what_cannot_hold_is_refused_in_one_line(values, words):
    with pytest.raises(InputError, match=words) as caught:
        recipe.from_dict(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"neurons__rho": 0.3}, ["neurons.rho = 0.3 is not read by policy 'griffin'"]),
        ({"neurons__rho": 0.3, "neurons__policy": "coreinfer"}, []),
        ({"neurons__mix": 0.1}, ["neurons.mix"]),
        ({"neurons__row_norm": True}, []),
        ({"neurons__row_norm": True, "neurons__policy": "coreinfer"}, ["neurons.row_norm"]),
        ({"neurons__voters": "text", "neurons__policy": "random"}, ["neurons.voters"]),
        ({"neurons__share": 0.3, "neurons__policy": "dense"}, ["neurons.share"]),
        ({"tokens__rho": 0.3, "tokens__beta": 0.3}, ["tokens.rho", "tokens.beta"]),
        ({"tokens__rho": 0.3, "tokens__beta": 0.3, "tokens__policy": "overlap"}, []),
        ({"tokens__voters": "text"}, ["tokens.voters"]),
        ({"tokens__voters": "text", "tokens__policy": "attention"}, []),
        ({"tokens__count": 3}, ["tokens.count = 3 is not read with tokens.budget = 'share'"]),
        ({"tokens__count": 3, "tokens__budget": "count", "tokens__share": 0.2}, ["tokens.share"]),
        ({"tokens__share": 0.2, "tokens__budget": "knee", "tokens__min_share": 0.2}, []),
        ({"tokens__min_share": 0.2}, ["tokens.min_share"]),
        ({"tokens__first_share": 0.7}, ["tokens.first_share"]),
        ({"weights__cache": "int8", "weights__precision": "fp32"}, ["weights.cache"]),
        ({"weights__cache": "int8", "weights__precision": "int4", "backend": "tensorrt"}, ["weights.cache"]),
        ({"weights__cache": "int8", "weights__precision": "int8", "neurons__policy": "dense"}, []),
        ({"weights__cache": "fp16", "weights__precision": "fp32"}, ["weights.cache"]),
        ({"weights__cache": "fp16", "weights__precision": "int8", "neurons__policy": "dense"}, []),
        ({"tokens__share": 0.2, "tokens__policy": "dense"}, ["tokens.share"]),
    ],
)
def test_a_setting_that_nothing_reads_is_named(changes, named):
    found = unread(recipe.Recipe().replace(**changes))
    assert len(found) == len(named) and all(n in f for n, f in zip(named, found, strict=True)), found


@pytest.mark.parametrize("name", ["demo", "scenes", "scenes-llava"])
def test_a_shipped_recipe_sets_nothing_that_is_not_read(name):
    assert unread(recipe.load(name)) == []
