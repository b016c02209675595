"""The Kubernetes bases of `cm-export serve` and of Triton are valid; that of serve, and its Dockerfile, fit the command.

What the base of Triton says about a model repository is tested beside the repository (test_triton_repository.py).
"""

import re
from pathlib import Path

import pytest
import yaml

from cm_export.cli.verbs import serve
from cm_export.serving.door import _OPEN
from cm_export.serving.metrics import FIGURES

ROOT = Path(__file__).parent.parent
BASE = ROOT / "deploy" / "kubernetes" / "serve"
NAME = "app.kubernetes.io/name"
BASES = {"serve": BASE, "triton": ROOT / "kubernetes" / "triton"}
KUSTOMIZATION = yaml.safe_load((BASE / "kustomization.yaml").read_text())


def objects(base):
    """What a base makes, by kind."""
    listed = yaml.safe_load((base / "kustomization.yaml").read_text())["resources"]
    return {o["kind"]: o for name in listed for o in yaml.safe_load_all((base / name).read_text())}


OBJECTS = objects(BASE)
POD = OBJECTS["Deployment"]["spec"]["template"]["spec"]
(SERVE,) = POD["containers"]


@pytest.mark.parametrize(("base", "kind"), [(name, kind) for name, base in BASES.items() for kind in objects(base)])
def test_every_object_is_valid_for_the_oldest_and_the_newest_kubernetes_in_use(base, kind):
    schemas = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate brings the schemas")
    for version in ("1.31", schemas.latest_version()):
        schemas.validate(objects(BASES[base])[kind], version, strict=True)


def test_a_field_that_does_not_exist_is_found():
    schemas = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate brings the schemas")
    with pytest.raises(schemas.ValidationError):
        schemas.validate({**OBJECTS["Service"], "spec": {"prots": []}}, "1.31", strict=True)


def test_the_base_holds_what_a_service_needs_and_every_file_is_used():
    kinds = {
        "ServiceAccount",
        "Deployment",
        "Service",
        "HorizontalPodAutoscaler",
        "PodDisruptionBudget",
        "NetworkPolicy",
    }
    assert set(OBJECTS) == kinds
    files = {f.name for f in BASE.glob("*.yaml")} - {"kustomization.yaml", "prometheus-adapter-rules.yaml"}
    assert files == set(KUSTOMIZATION["resources"])


def test_selectors_find_the_pods():
    labels = OBJECTS["Deployment"]["spec"]["template"]["metadata"]["labels"]
    specs = {kind: o.get("spec", {}) for kind, o in OBJECTS.items()}
    for found in (
        specs["Deployment"]["selector"]["matchLabels"], specs["Service"]["selector"],
        specs["PodDisruptionBudget"]["selector"]["matchLabels"], specs["NetworkPolicy"]["podSelector"]["matchLabels"],
        POD["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
    ):  # fmt: skip
        assert found.items() <= labels.items() and NAME in found
    assert specs["HorizontalPodAutoscaler"]["scaleTargetRef"]["name"] == OBJECTS["Deployment"]["metadata"]["name"]
    assert POD["serviceAccountName"] == OBJECTS["ServiceAccount"]["metadata"]["name"]
    assert specs["Service"]["ports"][0]["targetPort"] == SERVE["ports"][0]["name"] == "http"


def test_nothing_in_the_pod_may_be_written_or_raised_and_it_reaches_nobody():
    own = SERVE["securityContext"]
    assert (
        own["readOnlyRootFilesystem"]
        and own["allowPrivilegeEscalation"] is False
        and own["capabilities"]["drop"] == ["ALL"]
    )
    assert POD["securityContext"]["runAsNonRoot"] and POD["securityContext"]["runAsUser"] > 0
    assert POD["automountServiceAccountToken"] is False and OBJECTS["NetworkPolicy"]["spec"]["egress"] == []
    mounts = {mount["name"]: mount.get("readOnly", False) for mount in SERVE["volumeMounts"]}
    assert mounts == {"bundle": True, "tmp": False}


def test_the_container_is_asked_and_stopped_as_the_server_expects_it():
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert SERVE[probe]["httpGet"]["path"] in _OPEN and SERVE[probe]["httpGet"]["port"] == "http"
    options = {name for param in serve.command.params for name in param.opts}
    assert {a for a in SERVE["args"] if a.startswith("--")} <= options
    drain = int(SERVE["args"][SERVE["args"].index("--drain") + 1])
    slept = int(SERVE["lifecycle"]["preStop"]["exec"]["command"][1])
    assert POD["terminationGracePeriodSeconds"] > drain + slept
    assert [e["name"] for e in SERVE["env"]] == ["CM_EXPORT_API_KEY"]
    assert SERVE["resources"]["requests"] == SERVE["resources"]["limits"]


def test_the_autoscaler_reads_figures_that_the_server_counts():
    rules = yaml.safe_load((BASE / "prometheus-adapter-rules.yaml").read_text())["rules"]
    asked = {m["pods"]["metric"]["name"] for m in OBJECTS["HorizontalPodAutoscaler"]["spec"]["metrics"]}
    assert asked == {rule["name"]["as"] for rule in rules}
    counted = {figure.name for figure in FIGURES}
    read = {
        re.sub(r"_(sum|count)$", "", n)
        for r in rules
        for n in re.findall(r"cm_export_\w+", r["seriesQuery"] + r["metricsQuery"])
    }
    assert read <= counted


def test_the_image_runs_the_command_as_the_same_user_with_pinned_versions():
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    lines = re.sub(r"\\\n", " ", text).splitlines()
    assert f"USER {POD['securityContext']['runAsUser']}:{POD['securityContext']['runAsGroup']}" in lines
    assert any("--constraint constraints.txt" in line and "[serve]" in line for line in lines)
    assert 'ENTRYPOINT ["cm-export", "serve"]' in lines and lines[-1].startswith('CMD ["/bundle", "--host", "0.0.0.0"')
    pinned = {
        re.split("==", line)[0].lower().replace("-", "_") for line in (ROOT / "constraints.txt").read_text().split()
    }
    assert {"fastapi", "uvicorn", "starlette", "prometheus_client", "h11", "anyio", "pydantic"} <= pinned
