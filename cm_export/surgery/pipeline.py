"""The rewrites in order: traced graph -> dense graph -> sparse graph. Read this file to know what happens to a graph.

traced --bind_weights--> dense
dense prefill --replace_ffn, replace_attention, choose_tokens, cut_tokens, score_neurons, report_means--> prefill
dense decode  --replace_ffn, replace_attention (indexed), add_bias--------------------------------------> decode
                 or, where the graph itself chooses: predict_neurons, replace_ffn (per token), bind_predictor
                 or, by thresholds: keep_active, in the FFNs, attention's products and the head
dense decode  --replace_ffn, replace_attention, choose_tokens, score_neurons, report_means, last_logits-> turn
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from ..base import by_name, dims
from ..base.errors import InputError
from ..bundle.predictor import group_of
from ..bundle.weights import Tensor, WeightFile
from ..families import Family, Shape
from ..recipe import facts
from ..recipe.recipe import Recipe
from .bind_weights import bind_weights
from .choose_tokens import choose_tokens, report_tokens, whole_prompt
from .cut_tokens import cut_tokens, leave_out
from .edit import Edit
from .fill_ffn import add_bias, report_means
from .find_sites import FFN
from .keep_active import keep_active
from .new_rows import last_logits, of_new_rows, of_question
from .predict_neurons import bind_predictor, predict_neurons
from .replace_attention import replace_attention
from .replace_ffn import replace_ffn
from .score_neurons import score_neurons, token_weights


@dataclass(frozen=True)
class Pass:
    """What one rewrite did, for the manifest."""

    graph: str
    name: str
    count: int


def check_recipe(recipe: Recipe, shape: Shape) -> None:
    """Raises InputError for a recipe that this model cannot follow; cheap, before any work."""
    prunes = facts.token_policy(recipe.tokens.policy).scores
    if prunes and not shape.sees:
        raise InputError(
            f"{recipe.tokens.policy!r} prunes image tokens, and this model reads text only",
            where="recipe: tokens.policy",
            fix="leave the options of tokens out, or build with --tokens dense",
        )
    if prunes and recipe.tokens.prune_layer < 1:
        fix = "give a layer, or build anew with the calibration that knows one"
        raise InputError("no layer is known after which to cut", where="recipe: tokens.prune_layer = 0", fix=fix)
    if prunes and recipe.tokens.prune_layer >= shape.layers:
        raise InputError(
            f"prune_layer {recipe.tokens.prune_layer} leaves no layer to run on kept tokens",
            where="recipe: tokens.prune_layer",
            fix=f"this model has {shape.layers} layers: "
            + (f"give 1 to {shape.layers - 1}" if shape.layers > 1 else "build with --tokens dense"),
        )
    first = recipe.tokens.first != "none"
    if prunes and (recipe.tokens.prune_layer < shape.whole_layers or (first and shape.whole_layers)):
        what = f"the first {shape.whole_layers} layers of this model must see every token"
        raise InputError(
            what,
            where="recipe: tokens.first" if first else f"recipe: tokens.prune_layer = {recipe.tokens.prune_layer}",
            fix=f"give a prune_layer of {shape.whole_layers} or more, and no first cut",
        )
    if shape.ffn % recipe.neurons.block:
        raise InputError(
            f"{shape.ffn} neurons are not whole blocks of {recipe.neurons.block}",
            where="recipe: neurons.block",
            fix="give a block that divides them",
        )
    if recipe.neurons.in_decode:
        group_of(shape.hidden)  # raises where it does not divide


def dense(
    name: str, traced: onnx.ModelProto, weights: dict[str, Tensor], family: Family
) -> tuple[onnx.ModelProto, list[Pass]]:
    """The traced graph with its weights bound; changes `traced` in place."""
    return traced, [Pass(name, "bind_weights", bind_weights(traced, weights, family))]


def sparse_prefill(
    model: onnx.ModelProto,
    family: Family,
    shape: Shape,
    recipe: Recipe,
    constants: dict[str, np.ndarray] | None = None,
) -> tuple[onnx.ModelProto, list[Pass]]:
    """Dense prefill -> prefill that reports core scores and keeps core tokens. Raises SurgeryError, InputError.

    `constants`: what the neuron policy reads besides activations, from `neuron_constants`.
    """
    edit, tokens, log = Edit(model), recipe.tokens, []
    token_policy = by_name.load(facts.TOKENS, tokens.policy, "token policy")
    neuron_policy = by_name.load(facts.NEURONS, recipe.neurons.policy, "neuron policy")
    ffns = replace_ffn(edit, family, shape.layers, shape.activation, indexed=False)
    attentions = replace_attention(edit, family, shape.layers, indexed=False)
    log += [Pass("prefill", "replace_ffn", len(ffns)), Pass("prefill", "replace_attention", len(attentions))]
    borders = [(token_policy, tokens.prune_layer)] if facts.token_policy(tokens.policy).scores else []
    if tokens.first != "none":
        borders.insert(0, (by_name.load(facts.TOKENS, tokens.first, "token policy"), 0))
    prompt = whole_prompt(edit, tokens) if borders else None
    seen = [prompt] * shape.layers  # by each layer
    for policy, layer in borders:
        assert prompt is not None  # it is there wherever there are borders
        keep, kept_mask = choose_tokens(edit, policy, tokens, prompt, layer, ffns, attentions)
        log.append(Pass("prefill", "choose_tokens", 1))
        if tokens.cache == "cut":
            kv = [shape.kv_heads, shape.head_dim]
            prompt = cut_tokens(edit, prompt, ffns, keep, kept_mask, layer, kv)
            seen[layer:] = [prompt] * (shape.layers - layer)
            log.append(Pass("prefill", "cut_tokens", 2 * layer + 1))
        else:
            prompt = leave_out(edit, prompt, keep, kept_mask)
    if prompt is not None:
        report_tokens(edit, prompt.rows if tokens.cache == "cut" else keep, kept_mask)
    if facts.neuron_policy(recipe.neurons.policy).scores:
        weights = token_weights(edit, recipe.neurons, seen, prompt)
        score_neurons(edit, neuron_policy, recipe.neurons, ffns, weights, constants or {})
        log.append(Pass("prefill", "score_neurons", len(ffns)))
        if recipe.neurons.fill == "prompt":
            log.append(Pass("prefill", "report_means", report_means(edit, ffns, weights, shape.hidden)))
    return edit.export(), log


def sparse_decode(
    model: onnx.ModelProto,
    family: Family,
    shape: Shape,
    recipe: Recipe,
    predictor: dict[str, Tensor] | None = None,
    file: WeightFile | None = None,
) -> tuple[onnx.ModelProto, list[Pass]]:
    """Dense decode -> decode with core_neurons [L,B,K] (and core_tokens [B,M]) as inputs. Raises SurgeryError.

    Where decode chooses its neurons itself (policy `predicted`), core_counts [L] takes the place of core_neurons, and
    `predictor` says where its copies lie. Where it keeps what is above thresholds (`active`), core_thresholds [B,4L+1]
    does, and `file` is where the norms of the weights are read.
    """
    edit = Edit(model)
    neuron_policy = by_name.load(facts.NEURONS, recipe.neurons.policy, "neuron policy")
    indexed = facts.token_policy(recipe.tokens.policy).scores and recipe.tokens.cache == "index"
    attentions = replace_attention(edit, family, shape.layers, indexed)
    log = []
    if recipe.neurons.by_threshold:
        assert file is not None  # a recipe with thresholds brings the weights
        ffns = keep_active(edit, family, shape.layers, shape.activation, file)
        log.append(Pass("decode", "keep_active", len(ffns)))
    elif recipe.neurons.in_decode:
        group, block = group_of(shape.hidden), recipe.neurons.block

        def rows(site: FFN) -> Any:
            return predict_neurons(edit, neuron_policy, site, shape.layers, shape.activation, group, block)

        ffns = replace_ffn(edit, family, shape.layers, shape.activation, indexed=False, predicted=rows)
        log.append(Pass("decode", "predict_neurons", len(ffns)))
    else:
        counted = recipe.neurons.layers != "uniform"
        ffns = replace_ffn(edit, family, shape.layers, shape.activation, indexed=True, counted=counted)
    log += [Pass("decode", "replace_ffn", len(ffns)), Pass("decode", "replace_attention", len(attentions))]
    if recipe.neurons.fill != "none" and recipe.neurons.policy != "dense":
        log.append(Pass("decode", "add_bias", add_bias(edit, ffns, shape.hidden)))
    return bind_predictor(edit.export(), predictor or {}), log


def turn(
    model: onnx.ModelProto,
    family: Family,
    shape: Shape,
    recipe: Recipe,
    constants: dict[str, np.ndarray] | None = None,
) -> tuple[onnx.ModelProto, list[Pass]]:
    """Dense decode -> the graph that reads a later question over the whole cache. Raises SurgeryError, InputError.

    Outputs: logits [B,V] of the last token, the cache with rows added, core scores of the new rows' activations, and
    kept_tokens over the whole context where the question matters to the policy. For recipes that have one (`has_turn`).
    """
    edit, log = Edit(model), []
    edit.add_input("image_mask", bool, [dims.BATCH, dims.CONTEXT])
    token_policy = by_name.load(facts.TOKENS, recipe.tokens.policy, "token policy")
    neuron_policy = by_name.load(facts.NEURONS, recipe.neurons.policy, "neuron policy")
    ffns = replace_ffn(edit, family, shape.layers, shape.activation, indexed=False)
    attentions = replace_attention(edit, family, shape.layers, indexed=False)
    log += [Pass("turn", "replace_ffn", len(ffns)), Pass("turn", "replace_attention", len(attentions))]
    if recipe.tokens.later == "again":
        prompt, layer = whole_prompt(edit, recipe.tokens), recipe.tokens.prune_layer
        kept = choose_tokens(edit, token_policy, recipe.tokens, prompt, layer, ffns, attentions, of_question)
        report_tokens(edit, *kept)
        log.append(Pass("turn", "choose_tokens", 1))
    if facts.neuron_policy(recipe.neurons.policy).scores:
        weights = token_weights(edit, recipe.neurons, [None] * shape.layers, None, of_new_rows)
        score_neurons(edit, neuron_policy, recipe.neurons, ffns, weights, constants or {})
        log.append(Pass("turn", "score_neurons", len(ffns)))
        if recipe.neurons.fill == "prompt":
            log.append(Pass("turn", "report_means", report_means(edit, ffns, weights, shape.hidden)))
    last_logits(edit, dims.BATCH, shape.vocab)
    log.append(Pass("turn", "last_logits", 1))
    return edit.export(), log
