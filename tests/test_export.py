"""Random Qwen2-VL configurations: every traced and rewritten graph equals stock transformers, at shapes not traced."""

import numpy as np
import pytest
import torch
import traces
from random_models import IMAGE, SEEDS, family, prompt, random_checkpoint, random_config, request_of
from stepping import Decoder, every_row, gatherer, prefill, step_feeds
from tolerances import agrees

from cm_export.families import Layout, Picture
from cm_export.host.request import prefill_feeds, sparse_feeds
from cm_export.recipe.recipe import Recipe
from cm_export.source import model as hf
from cm_export.source import trace

LAYOUTS = [[(2, 3)], [(1, 1)], [(4, 2), (1, 5)], [(3, 3), (2, 2), (1, 4)]]
seeds = pytest.mark.parametrize("seed", SEEDS)


def seen(x, grids, pixels):
    """What the vision graph of these pictures reads; grids of image tokens (rows, columns)."""
    sizes = [h * w * x.tower.merge**2 for h, w in grids]
    parts = np.split(pixels, np.cumsum(sizes)[:-1])
    return x.tower.feeds([Picture(part, Layout((1, h, w))) for part, (h, w) in zip(parts, grids, strict=True)])


def picture_feeds(x, grids, rng):
    grid = np.array([(1, h * x.tower.merge, w * x.tower.merge) for h, w in grids], np.int64).reshape(-1, 3)
    pixels = rng.standard_normal((int(grid.prod(1).sum()), x.tower.patch_dim)).astype(np.float32)
    return grid, pixels


def close(ours, theirs):
    agrees("export", ours, theirs)


def stock(x, ids, grid, pixels, steps):
    """Stock generate(): greedy tokens, and the logits of every step."""
    ids = torch.from_numpy(ids)[None]
    out = x.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.from_numpy(pixels),
        image_grid_thw=torch.from_numpy(grid),
        mm_token_type_ids=(ids == IMAGE).int(),
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[0, ids.shape[1] :].numpy(), torch.cat(out.logits).numpy()


@seeds
def test_vision_equals_transformers_on_unequal_pictures(exported, seed):
    x, rng = exported(seed), np.random.default_rng(seed)
    backend = x.backend()
    for layout in LAYOUTS:
        grid, pixels = picture_feeds(x, layout, rng)
        with torch.no_grad():
            out = x.model.get_image_features(torch.from_numpy(pixels), torch.from_numpy(grid), return_dict=True)
        ours = backend.vision(seen(x, layout, pixels))
        close(ours["image_embeds"], torch.cat(tuple(out.pooler_output)).numpy())
        for i in range(x.shape.whole_layers):
            close(ours[f"deepstack_{i}"], torch.cat(tuple(out.deepstack_features[i])).numpy())


@seeds
def test_answers_equal_stock_generate(exported, seed):
    """Dense graphs, and sparse graphs at full budget, give the greedy tokens and logits of transformers."""
    x, rng, steps = exported(seed), np.random.default_rng(seed), 6
    backend = x.backend(Recipe().replace(tokens__prune_layer=max(1, x.shape.whole_layers)))
    for layout in LAYOUTS[1:3]:
        grid, pixels = picture_feeds(x, layout, rng)
        ids = prompt(x.shape, layout, rng)
        tokens, logits = stock(x, ids, grid, pixels, steps)
        embeds = backend.vision(seen(x, layout, pixels))
        request = request_of(x, ids, grid, embeds)
        full = sparse_feeds(request, Recipe(), token_share=1.0)
        rows = gatherer(x.weights, x.family, x.shape.layers)
        for graph, constant in (("_dense", {}), ("", every_row(rows))):
            out = prefill(backend, prefill_feeds(request) | full, f"prefill{graph}")
            close(out["logits"].numpy(), logits[:1])
            decoder = Decoder(backend, f"decode{graph}", out, constant)
            for i in range(steps - 1):
                assert out["logits"].numpy()[0].argmax() == tokens[0]
                step = decoder.step(step_feeds(request, int(tokens[i]), i))
                close(step, logits[i + 1 : i + 2])
                assert step[0].argmax() == tokens[i + 1]


def further_rows(x, shape, rng):
    """Random rows for the tower's further outputs, of every token: ours by name, and as stock Qwen3-VL takes them."""
    rows = {p.name: rng.standard_normal((*shape, *p.row)).astype(np.float32) for p in x.tower.outputs[1:]}
    if not rows:
        return {}, {}
    given = [torch.from_numpy(value).flatten(0, 1) for value in rows.values()]
    return rows, {"visual_pos_masks": torch.ones(shape, dtype=torch.bool), "deepstack_visual_embeds": given}


def hf_decoder(x, embeds, positions, mask, past=None, **further):
    with torch.no_grad():
        out = x.model.model.language_model(
            inputs_embeds=torch.from_numpy(embeds),
            position_ids=torch.from_numpy(positions if len(positions) > 1 else positions[0]),
            attention_mask=torch.from_numpy(mask),
            past_key_values=past,
            use_cache=True,
            **further,
        )
        return x.model.lm_head(out.last_hidden_state[:, -1]).numpy(), out.past_key_values


@seeds
@pytest.mark.parametrize(("batch", "length"), [(3, 13), (1, 2), (2, 31)])
def test_prefill_with_left_padding_equals_transformers(exported, seed, batch, length):
    x, rng = exported(seed), np.random.default_rng(seed + length)
    embeds = rng.standard_normal((batch, length, x.shape.hidden)).astype(np.float32)
    positions = rng.integers(0, 50, (x.shape.position_axes, batch, length))
    mask = np.ones((batch, length), np.int64)
    for b in range(1, batch):
        mask[b, : rng.integers(0, length)] = 0
    rows, further = further_rows(x, (batch, length), rng)
    logits, cache = hf_decoder(x, embeds, positions, mask, **further)
    feeds = {"inputs_embeds": embeds, "position_ids": positions, "attention_mask": mask, **rows}
    out = prefill(x.backend(), feeds, "prefill_dense")
    close(out["logits"].numpy(), logits)
    for i, layer in enumerate(cache.layers):
        real = mask[:, None, :, None] == 1  # rows of padding are never read
        close(out[f"present.{i}.key"].numpy() * real, layer.keys.numpy() * real)
        close(out[f"present.{i}.value"].numpy() * real, layer.values.numpy() * real)


@seeds
@pytest.mark.parametrize(("batch", "past", "new"), [(3, 1, 1), (1, 77, 1), (2, 5, 1), (1, 7, 2), (3, 5, 6), (2, 1, 17)])
def test_decode_at_any_past_and_of_any_length_equals_transformers(exported, seed, batch, past, new):
    x, rng = exported(seed), np.random.default_rng(seed + past)
    first = rng.standard_normal((batch, past, x.shape.hidden)).astype(np.float32)
    positions = rng.integers(0, 50, (x.shape.position_axes, batch, past + new))
    mask = np.ones((batch, past + new), np.int64)
    mask[1:, : past // 2] = 0
    _, cache = hf_decoder(x, first, positions[..., :past], mask[:, :past])
    rows = {}
    for i, layer in enumerate(cache.layers):
        rows[f"past.{i}.key"], rows[f"past.{i}.value"] = layer.keys.numpy().copy(), layer.values.numpy().copy()
    added = rng.standard_normal((batch, new, x.shape.hidden)).astype(np.float32)
    expected = []
    for i in range(new):  # transformers reads them one by one
        here = slice(past + i, past + i + 1)
        logits, cache = hf_decoder(x, added[:, i : i + 1], positions[..., here], mask[:, : past + i + 1], cache)
        expected.append(logits)
    feeds = {"inputs_embeds": added, "position_ids": positions[..., past:], "attention_mask": mask, **rows}
    backend = x.backend()
    dense = backend.session("decode_dense").run(["logits"], feeds)[0]
    close(dense, np.stack(expected, 1))
    ids = np.broadcast_to(np.arange(x.shape.ffn, dtype=np.int32), (x.shape.layers, batch, x.shape.ffn))
    portable = backend.session("decode", rows_as_inputs=False)
    close(portable.run(["logits"], feeds | {"core_neurons": np.ascontiguousarray(ids)})[0], dense)


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_what_tests_share_is_traced_of_an_equal_configuration(tmp_path, part):
    """The tests' memory of graphs: any setting of a part changes the graphs of that part alone, and weights are no part of it."""

    def digests(name, seed, **changed):
        config = random_config(1)
        config[part] |= changed
        path = random_checkpoint(config, tmp_path / name, seed)
        return [traces.digest(s) for s in trace.specs(hf.skeleton(path, family), family, hf.read_config(path))]

    plain = digests("one", 0)
    assert digests("other", 1) == plain and len({*plain}) == 3
    for i, changed in enumerate(
        ({"hidden_act": "relu"}, {"num_hidden_layers": 3} if part == "text_config" else {"depth": 3})
    ):
        same = [found == one for found, one in zip(digests(str(i), 0, **changed), plain, strict=True)]
        vision = part == "text_config"
        assert same == [vision, not vision, not vision]  # vision, prefill, decode
