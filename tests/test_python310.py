"""What runs on a device works on Python 3.10, without onnx, onnxruntime and torch: JetPack 6 has no newer one.

A 3.10 interpreter of this machine (PATH, pyenv) with the packages that these parts need; what it answers is compared with
what this interpreter answers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from cm_export.recipe.aliases import DEMO

ROOT = Path(__file__).parent.parent
ABSENT = ("onnx", "onnxruntime", "torch", "transformers")
PARTS = ("base", "quant", "families", "recipe", "bundle", "host")
ENGINES = (
    "tensorrt_rtx",
    *(f"tensorrt.{n}" for n in ["backend", "session", "decode", "cuda", "targets", "check_engine"]),
)

IMPORT_ALL = """
import importlib, json, pkgutil, sys
parts, engines, absent = json.loads(sys.argv[1])
names = [f"cm_export.backends.{name}" for name in engines]
for part in parts:
    package = importlib.import_module(f"cm_export.{part}")
    names += [m.name for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
wrong = {}
for name in names:
    try:
        importlib.import_module(name)
    except Exception as e:
        wrong[name] = repr(e)
there = [name for name in absent if importlib.util.find_spec(name)]
print(json.dumps({"version": sys.version_info[:2], "imported": len(names), "wrong": wrong, "there": there}))
"""

READ_A_BUNDLE = """
import json, sys
from cm_export.bundle.bundle import Bundle
from cm_export.host.chat import Chat
from cm_export.host.images import open_image

bundle = Bundle(sys.argv[1])
bundle.wait_verified()
rule = bundle.tower.rule(json.loads(bundle.processor("preprocessor_config.json").read_bytes()))
picture = bundle.tower.picture(open_image(sys.argv[2]), rule)
chat, pictures = Chat(bundle), [picture.layout]
turns = chat.encode_turns(["describe the image", "what color is it ?"], ["a circle ."], "be brief", pictures)
ids = chat.encode("describe : what shape is in the image?", None, pictures)
print(json.dumps({
    "recipe": bundle.recipe.to_dict(), "in_decode": bundle.recipe.neurons.in_decode, "later": bundle.recipe.tokens.later,
    "ids": ids.tolist(), "turns": turns.tolist(), "text": chat.decode(ids.tolist()), "stop": sorted(chat.stop_ids),
    "grid": picture.grid, "pixels": picture.pixels.tolist(),
}))
"""


def answer_of(python: str, code: str, *args: object) -> dict:
    """What `code` prints as JSON under an interpreter, with this tree as its cm_export."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([python, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_file_compiles(bare310, tmp_path):
    env = os.environ | {"PYTHONPYCACHEPREFIX": str(tmp_path)}
    folders = [str(ROOT / name) for name in ("cm_export", "plugins", "recipes")]
    done = subprocess.run([bare310, "-m", "compileall", "-q", *folders], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout
    assert len(list(tmp_path.rglob("*.pyc"))) > 100


def test_everything_that_runs_engines_imports_without_onnx_onnxruntime_and_torch(python310):
    found = answer_of(python310, IMPORT_ALL, json.dumps([PARTS, ENGINES, ABSENT]))
    assert found["version"] == [3, 10] and found["there"] == []
    assert found["wrong"] == {} and found["imported"] > 30


def test_recipe_tokens_and_pixels_are_those_of_this_interpreter(python310, demo_bundle):
    asked = (demo_bundle, DEMO.parent / "images" / "teal-circle.png")
    there, here = (answer_of(python, READ_A_BUNDLE, *asked) for python in (python310, sys.executable))
    assert there["recipe"]["neurons"]["policy"] == "griffin" and len(there["ids"]) > 64 and there["pixels"]
    for what in here:
        assert there[what] == here[what], what
