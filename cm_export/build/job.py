"""What a build knows before its first stage: everything that can be refused without work has been refused by then."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import families
from ..base import by_name, disk
from ..base.errors import InputError
from ..base.hashes import file_sha256
from ..bundle.calibration import Calibration, belongs
from ..bundle.calibration import read as read_calibration
from ..calibrating import prune_layers
from ..families import Family, Shape, Tower
from ..plugins.core_ffn.op import ACTIVATIONS
from ..recipe.recipe import Recipe
from ..recipe.unread import unread
from ..source import generation, model, packings, processor, quantised
from ..source.adapter import Merge, fit
from ..source.checkpoint import Checkpoint
from ..source.generation import Generation
from ..source.parameters import parameters
from ..source.probe import Probe, probe
from ..surgery import pipeline
from . import engines, kept

Step = Callable[..., None]


@dataclass(frozen=True)
class Job:
    """What the stages read; a stage names in its `inputs` what of this its result depends on."""

    source: Checkpoint
    family: Family
    config: dict[str, Any]  # normalised by transformers
    shape: Shape
    tower: Tower | None  # None: the model reads no pictures
    recipe: Recipe  # as the bundle records it: nothing is left for the model or the calibration to decide
    inputs: Probe
    generation: Generation  # what the checkpoint says about its answers
    calibration: Calibration | None  # neurons in the order of the weight file
    order: np.ndarray | None  # [L,F] of the weight file: place -> neuron; None: the checkpoint's own
    measured: str | None  # sha256 of the calibration file
    merge: Merge | None  # the adapter that the weights are written with
    codes: kept.Codes | None  # of a checkpoint in few bits
    aim: engines.Aim | None  # of TensorRT engines; None with other backends
    threads: int
    progress: Step
    notes: tuple[str, ...] = ()  # what is no error and yet may surprise; the manifest keeps them


def prepare(source: Checkpoint, recipe: Recipe, threads: int, progress: Step) -> Job:
    """Raises InputError for a checkpoint, recipe, calibration or machine with which the build cannot end well."""
    family = families.find(source.model_type)
    config = model.read_config(source.path)
    family.check_config(config)
    shape, tower = family.shape(config), family.tower(config)
    asked, recipe = recipe, recipe.for_model(shape)
    # Cheap, and before the calibration is read, which may know the layer that 0 stands for.
    pipeline.check_recipe(recipe if recipe.tokens.prune_layer else recipe.replace(tokens__prune_layer=1), shape)
    if shape.activation not in ACTIVATIONS:
        fix = by_name.nearest(shape.activation, [*ACTIVATIONS])
        raise InputError(f"unknown hidden_act {shape.activation!r}", where=source.path / "config.json", fix=fix)
    with tempfile.TemporaryDirectory(prefix=disk.TEMPORARY) as work, disk.writing(Path(work)):
        found = processor.check(source.path, source.config, shape, tower, Path(work))
    held = quantised.find(source.path)
    named = parameters(source.path, family)
    if not held:
        named.check_files(source.path)
    merge = fit(source.adapter, named) if source.adapter else None
    settings = generation.read(source.path, source.config)
    notes = (*source.notes, *(packings.notes(held.settings) if held else ()), *found, *unread(recipe))
    for note in (*notes, *settings.notes):
        progress(f"note: {note}")
    aim = engines.aim(recipe) if recipe.backend in engines.MODULES else None
    calibration, order = _calibration(recipe, source)
    codes = kept.survey(held, named, family, tower) if held else None
    if codes is not None:
        recipe, codes = kept.settle(codes, asked, recipe, merge.changes if merge else (), order is not None)
    elif recipe.weights.codes == "kept":
        raise InputError(
            "weights.codes = 'kept', and the checkpoint holds no codes", where=source.path, fix="leave it out"
        )
    recipe = prune_layers.resolve(recipe, calibration)
    pipeline.check_recipe(recipe, shape)
    measured = file_sha256(Path(recipe.calibration)) if recipe.calibration is not None else None
    inputs = probe(shape, tower, config)  # not the recipe's seed: the weights stage keeps PyTorch's answers to it
    if aim is not None:
        check_proof(recipe, tower, inputs)
    return Job(
        source, family, config, shape, tower, recipe, inputs, settings, calibration, order, measured, merge, codes,
        aim, threads, progress, notes,
    )  # fmt: skip


def check_proof(recipe: Recipe, tower: Tower | None, asked: Probe) -> None:
    """Raises InputError where engines could not take the prompt and the pictures on which they are proved."""
    e, tokens = recipe.engine, len(asked.ids)
    what = "engines are proved on a prompt of {} tokens with pictures of this model"
    if tokens > e.max_prompt:
        raise InputError(what.format(tokens), where=f"engine.max_prompt = {e.max_prompt}", fix=f"--max-prompt {tokens}")
    if tower and any(tower.beyond(tower.feeds([picture]), e.max_patches) for picture in asked.pictures):
        where = f"engine.max_patches = {e.max_patches}"
        raise InputError(f"{what.format(tokens)}, one of which has more patches", where=where, fix="raise it")


def _calibration(recipe: Recipe, source: Checkpoint) -> tuple[Calibration | None, np.ndarray | None]:
    """The recipe's calibration, ids in the order of the weight file, and that order [L,F] if it is another. Raises InputError."""
    if recipe.calibration is None:
        return None, None
    found = read_calibration(Path(recipe.calibration))
    belongs(found, source.identity, recipe.calibration)
    return (found.reordered(), found.order) if recipe.neurons.block > 1 else (found, None)
