"""Files of a repository that people and containers read: README.md, Dockerfile, requirements.txt, and vlm's own."""

from __future__ import annotations

import re

from ... import __version__
from ...bundle.bundle import Bundle
from ...serving.triton_request import INPUTS, OUTPUTS
from ...serving.triton_settings import BLS, Settings
from . import config, containers, runtime
from .fit import Plan

INSIDE = "vlm/1/bundle"  # where the bundle lies


def files(bundle: Bundle, name: str, plan: Plan, settings: Settings) -> dict[str, str]:
    """Path in the repository -> text."""
    loads = [f"--load-model={graph}" for graph in plan.graphs]
    preload = f"/models/{INSIDE}/{plan.plugins}" if plan.plugins else None
    bls = settings.execution == BLS
    readme = config.render(
        "README.md.j2",
        name=name,
        version=__version__,
        model=bundle.manifest["model"]["source"],
        image=re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._") or "vlm",
        container=plan.container,
        matrix=containers.MATRIX,
        tensorrt=plan.tensorrt,
        architecture=plan.architecture,
        loads=" ".join([*loads, "--load-model=vlm"] if bls else ["--load-model=vlm"]),
        graph_loads=" ".join(loads),
        bls=bls,
        preload=preload,
        sees=bundle.tower is not None,
        how=plan.how,
        graphs=list(plan.graphs),
        left_out=plan.left_out,
        inputs=INPUTS,
        outputs=OUTPUTS,
    )
    return {
        "README.md": readme,
        "Dockerfile": config.render("Dockerfile.j2", container=plan.container),
        "alive.py": config.render("alive.py.j2"),
        "requirements.txt": "\n".join(runtime.requirements(plan.tensorrt, plan.container)) + "\n",
        "vlm/config.pbtxt": config.vlm(settings),
        "vlm/1/model.py": config.render("model.py.j2"),
    }
