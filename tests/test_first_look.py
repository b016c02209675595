"""What a newcomer sees first: `make demo` builds a bundle that answers rightly, and draws kept patches on the shapes."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cm_export.evals import scene
from cm_export.host.loaded import load

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "cm_export" / "demo" / "pictures" / "four-shapes.png"
SCENE = scene.scene("test", 1)


@pytest.fixture(scope="module")
def answers(first_look) -> dict[bool, object]:
    """dense? -> the answer to the prompt of `make demo`."""
    model = load(first_look, threads=1)
    picture = Image.open(PICTURE)
    return {dense: model.generate("describe the image.", images=[picture], dense=dense) for dense in (False, True)}


def test_the_shipped_picture_is_one_that_the_model_was_not_trained_on():
    assert np.array_equal(np.asarray(Image.open(PICTURE)), np.asarray(scene.draw(SCENE)))
    assert len(SCENE.things) == 4


def test_the_pruned_model_and_the_dense_one_both_describe_the_picture_rightly(answers):
    _, right = scene.ask(SCENE, "describe")
    assert [answers[dense].text.strip() for dense in (False, True)] == [right, right]


def test_a_third_of_the_patches_is_kept_and_covers_every_shape(answers):
    """A patch of 8 x 8 pixels belongs to a shape if at least a fifth of its pixels lie in the shape's box."""
    (kept,) = answers[False].kept
    assert kept.sum() == 48 and kept.size == 144 and answers[True].kept[0].all()
    cell = scene.SIZE // len(kept)
    for thing in SCENE.things:
        x0, y0, x1, y1 = thing.box
        box = np.zeros((scene.SIZE, scene.SIZE))
        box[y0:y1, x0:x1] = 1
        patches = box.reshape(len(kept), cell, len(kept), cell).mean((1, 3)) >= 0.2
        assert kept[patches].mean() >= 0.8, thing.name


def test_make_demo_asks_what_these_tests_ask():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    demo = makefile[makefile.index("\ndemo:") : makefile.index("\ntest:")]
    assert re.findall(r"--recipe (\S+)", demo) == ["first-look"]
    assert f"PICTURE := {PICTURE.relative_to(ROOT)}" in makefile
    assert 'QUESTION := "describe the image."' in makefile and "--prompt $(QUESTION)" in makefile
