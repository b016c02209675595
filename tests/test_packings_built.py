"""Whole checkpoints in few bits as bundles: greedy tokens are those of transformers on the numbers that the codes stand for.

checkpoint of floats -> the same in a format, every product in few bits -> build -> tokens      one trace for all formats
                     -> the numbers as floats -> transformers' generate -> the same tokens
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import low_bit_checkpoints as made
import numpy as np
import pytest
import qwen_models
import test_llava_families
import test_packings_hostile as hostile
import torch
import transformers
from conftest import bundles_of, take_stages
from low_bit_checkpoints import Low
from safetensors.numpy import save_file
from test_adapter import saved
from test_packed import Rounded
from test_packings import AWQ, CT, GPTQ, V2, WHOLE, ct

from cm_export import families
from cm_export.base.errors import InputError
from cm_export.build.build import build
from cm_export.build.job import prepare
from cm_export.bundle.bundle import Bundle
from cm_export.host.runner import Budget, Runner
from cm_export.recipe.recipe import Recipe
from cm_export.source.checkpoint import resolve

STEPS = 6
QUESTION = "what shape is red ?"
DECODER = r"layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj$"
TOWER = r"vision|visual|projector"
HEAD = r"lm_head$"
bundle_of = {"llava": test_llava_families.bundle_of, "qwen3": bundles_of(qwen_models.answering)}


def in_codes(make, **how):
    """module, weight -> its tensors in a format and the numbers that they stand for."""

    def pack(weight, rng):
        low = Low.of(weight.astype(np.float32), rng=rng, **how)
        return make(low), low.numbers

    return pack


def in_floats(block, name="weight_scale_inv"):
    return lambda weight, rng: made.fp8(weight.astype(np.float32), block or (1, weight.shape[1]), name)


@dataclass(frozen=True)
class Format:
    """quantization_config, how modules of these names are packed (the first that fits), and what becomes of the codes."""

    settings: dict
    packs: dict  # of the decoder
    became: dict
    tower: Callable | None = None  # how its modules are packed
    others: dict = field(default_factory=dict)  # further tensors of the file


INT4 = in_codes(made.packed, bits=4, group=32, symmetric=False)
INT8 = in_codes(made.whole, bits=8, group=-1)
KEPT = {kind: {"kept"} for kind in ("ffn", "attention", "value")}
FLOAT = {kind: {"float32"} for kind in KEPT}
FORMATS = {
    "gptq": Format(
        GPTQ | {"group_size": 32, "lm_head": True, "dynamic": {"-:.*vision.*": {}}},
        {DECODER: in_codes(made.gptq, bits=4, group=32, symmetric=False), HEAD: in_codes(made.gptq, bits=8, group=64)},
        KEPT | {"head": {"kept"}},
    ),
    "gptq v2, desc_act": Format(
        V2 | {"group_size": 32, "desc_act": True},
        {DECODER: in_codes(partial(made.gptq, v2=True), bits=4, group=32, shuffled=True)},
        FLOAT,
    ),
    "awq": Format(AWQ | {"group_size": 64}, {DECODER: in_codes(made.awq, bits=4, group=64, symmetric=False)}, KEPT),
    "int4": Format(ct(CT, 4, symmetric=False), {DECODER: INT4}, KEPT),
    "int8": Format(ct(WHOLE, 8) | {"ignore": ["lm_head"]}, {DECODER: INT8}, KEPT),
    "fp8": Format({"quant_method": "fp8", "weight_block_size": [32, 32]}, {DECODER: in_floats((32, 32))}, FLOAT),
    "float-quantized": Format(
        ct(CT | {"format": "float-quantized"}, 8, type="float"), {DECODER: in_floats(None, "weight_scale")}, FLOAT
    ),
}
# Everything at once: three ways to store a matrix, a tower and a head in few bits, modules left out, scales of a cache.
MIXED = Format(
    CT | {
        "format": "mixed-precision", "ignore": ["re:.*layers.1.mlp.*"],
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"},
        "config_groups": {
            "a": {"format": "pack-quantized", "weights": {"num_bits": 4, "type": "int", "symmetric": False}},
            "b": {"format": "int-quantized", "weights": {"num_bits": 8, "type": "int"}},
            "c": {"format": "float-quantized", "weights": {"num_bits": 8, "type": "float"}},
            "d": {"format": "pack-quantized", "weights": {"num_bits": 8, "type": "int"}},
        },
    },
    {
        r"layers\.1\.mlp": None, r"mlp\.(gate|up)_proj$": INT4, r"v_proj$": in_floats(None, "weight_scale"),
        DECODER: INT8, HEAD: in_codes(made.packed, bits=4, group=64),
    },
    KEPT | {"value": {"8 bits anew"}, "head": {"kept"}, "vision": {"kept"}},
    in_codes(made.packed, bits=8, group=-1),
    {"layers.0.self_attn.k_scale": np.full(1, 0.5, np.float32), "layers.0.self_attn.v_scale": np.full(1, 2, np.float32)},
)  # fmt: skip


def packed_as(form, source, out):
    """The checkpoint in that format at `out`, and the numbers that it stands for beside it."""
    rng = np.random.default_rng(7)

    def pack(module, weight):
        packs = {r"proj|fc\d|linear_\d|out": form.tower} if re.search(TOWER, module) else form.packs
        by = next((by for name, by in packs.items() if re.search(name, module)), None)
        return by and by(weight, rng)

    meant = made.write(source, out, form.settings, pack)
    tensors = made.read(out / "model.safetensors")
    layer = next(name.partition("layers.")[0] for name in tensors if ".layers.0.mlp." in name)
    save_file(tensors | {f"{layer}{n}": t for n, t in form.others.items()}, out / "model.safetensors")
    floats = out.with_name(f"{out.name}-floats")
    shutil.copytree(source, floats)
    save_file({n: v.astype(np.float32) for n, v in meant.items()}, floats / "model.safetensors")
    return floats


class Meant(Rounded):
    """Codes that were kept as the numbers that they stand for; what was rounded anew as it was before."""

    def __init__(self, bundle):
        super().__init__(bundle)
        kept = {weight for entry in bundle.packed.entries.values() if entry.kept for weight in entry.weights}
        self._own = {name: value for name, value in self._own.items() if name in kept}


def asked_of(runner, images):
    return runner.ask(QUESTION, runner.see(images) if images else ())


def generated(floats, runner, asked, images):
    """Greedy tokens of stock transformers for the same prompt."""
    stock, ids = family_of(floats), asked.ids
    given = {}
    if images:
        pictures = [runner.tower.picture(image, runner.picture_rule) for image in images]
        given = runner.tower.stock(pictures, ids == runner.bundle.shape.image_token)
    prompt = torch.from_numpy(ids)[None]
    with torch.no_grad():
        out = stock.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=STEPS, min_new_tokens=STEPS,
            do_sample=False, **{n: torch.from_numpy(v) for n, v in given.items()},
        )  # fmt: skip
    return out[0, len(ids) :].tolist()


def check(name, form, folder, monkeypatch, adapt=None):
    """A build of the format: what became of its codes, and its tokens beside transformers'.

    adapt: makes an adapter for the checkpoint of floats, with which it is built, and merges it into that checkpoint.
    """
    model, plan = bundle_of[name](name)
    floats, recipe = packed_as(form, model, folder / "model"), Recipe().replace(neurons__policy="dense")
    if adapt:
        recipe = recipe.replace(adapter=str(adapt(floats)))
    take_stages(plan, folder / "x.plan")
    found = build(str(folder / "model"), folder / "x.plan", recipe, threads=1)
    became = {row["kind"]: {*row["became"]} for row in found["codes"]}
    assert became == {kind: how for kind, how in form.became.items() if kind != "vision" or name != "qwen3"}
    bundle = Bundle(folder / "x.plan")
    images = [test_llava_families.noise(np.random.default_rng(5), 30, 20)] if bundle.tower else []
    runner = Runner(bundle, 1)
    if bundle.packed:
        monkeypatch.setattr(runner.backend, "_low_bits", None)
        monkeypatch.setattr(runner.backend, "weights", Meant(bundle))
    asked = asked_of(runner, images)
    tokens = [*runner.tokens(runner.prefill(asked, Budget(dense=True)), STEPS, frozenset())]
    assert tokens == generated(floats, runner, asked, images)
    return found


@pytest.mark.wide
def test_every_way_to_store_a_matrix_at_once_with_a_tower_and_a_head_in_few_bits(tmp_path, monkeypatch):
    found = check("llava", MIXED, tmp_path, monkeypatch)
    notes = "\n".join(found["notes"])
    assert "asks to round keys and values, too" in notes and "k_scale" in notes
    left_out = [found["packed"][f"layers.1.{part}"] for part in ("ffn_in", "ffn_out")]
    assert [(e["bits"], e["kept"]) for e in left_out] == [(8, False)] * 2, "never in fewer bits than 8"


@pytest.mark.wide
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["qwen3", "llava"])
def test_tokens_of_a_format_are_those_of_its_numbers(name, form, tmp_path, monkeypatch):
    check(name, FORMATS[form], tmp_path, monkeypatch)


def adapted(floats):
    """An adapter of two modules, and the checkpoint with it: the numbers of PEFT's formula, in float32."""
    stock, rng, given = family_of(floats), np.random.default_rng(2), {}
    with torch.no_grad():
        for name, p in stock.named_parameters():
            if re.search(r"layers\.\d+\.(self_attn\.q_proj|mlp\.up_proj)\.weight$", name) and not re.search(
                TOWER, name
            ):
                a, b = (
                    rng.standard_normal(shape).astype(np.float32) / 8 for shape in ((4, p.shape[1]), (p.shape[0], 4))
                )
                module = name.removesuffix(".weight")
                given |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
                p += 1.5 * (torch.from_numpy(b) @ torch.from_numpy(a))
    stock.save_pretrained(floats)
    return saved(floats.with_name("lora"), given, target_modules=["q_proj", "up_proj"])


def family_of(path):
    """Stock transformers of a checkpoint."""
    config = json.loads((path / "config.json").read_text())
    return getattr(transformers, families.find(config["model_type"]).model_class).from_pretrained(path).eval()


@pytest.mark.wide
@pytest.mark.parametrize("name", ["qwen3", "llava"])
def test_an_adapter_is_merged_into_the_numbers_that_the_codes_stand_for(name, tmp_path, monkeypatch):
    """Of its matrices the codes give way to the merged numbers in 8 bits, gate with up as they are read together."""
    form = replace(
        FORMATS["int4"], became=KEPT | {"ffn": {"kept", "8 bits anew"}, "attention": {"kept", "8 bits anew"}}
    )
    found = check(name, form, tmp_path, monkeypatch, adapted)
    said = "\n".join(row["said"] for row in found["codes"])
    assert said.count("an adapter is merged into them") == 2


def test_an_adapter_on_a_checkpoint_in_few_bits_says_which_codes_give_way(tmp_path):
    path = hostile.checkpoint("gptq")
    names = ["model.layers.0.self_attn.q_proj", "lm_head"]
    sizes = {"lm_head": hostile.known().shapes["lm_head.weight"], names[0]: (64, 64)}
    given = {f"{n}.lora_{part}.weight": np.ones(shape, np.float32)
             for n in names for part, shape in (("A", (4, sizes[n][1])), ("B", (sizes[n][0], 4)))}  # fmt: skip
    folder = saved(tmp_path / "lora", given, target_modules=["q_proj", "lm_head"])
    job = prepare(resolve(str(path), None, folder), Recipe(), 1, lambda *_, **__: None)
    assert job.codes.others == {"model.layers.0.self_attn.q_proj.weight": "an adapter is merged into them"}
    assert len(job.codes.kept) == 6 and {*job.merge.changes} == {f"{n}.weight" for n in names}
    with pytest.raises(InputError, match=r"cannot be kept, e\.g\. .*q_proj.*an adapter is merged"):
        prepare(resolve(str(path), None, folder), Recipe().replace(weights__codes="kept"), 1, lambda *_, **__: None)
