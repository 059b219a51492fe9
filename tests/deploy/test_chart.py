"""The Helm chart: rendered by Go's templates with sprig's functions, judged by Kubernetes' own schemas."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import go_template
import kubernetes_validate
import pytest
import yaml

from triptych.python_models.contract.metrics import METRICS

CHART = Path(__file__).parents[2] / "docker/helm/triptych"
KUBERNETES = "1.30"
EVERYTHING = {
    "servedModelName": "mine",
    "args": ["--context-length", "16384"],
    "env": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}],
    "apiKeySecret": "keys",
    "imagePullSecrets": [{"name": "registry"}],
    "cache": {"claim": "checkpoints"},
    "volumes": [{"name": "models", "hostPath": {"path": "/models"}}],
    "volumeMounts": [{"name": "models", "mountPath": "/models"}],
    "encoders": {"enabled": True, "args": ["--mm-cache-size-mb", "1024"], "nodeSelector": {"gpu": "l4"}},
    "autoscaling": {"enabled": True},
    "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
}


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """As Helm merges values."""
    out = dict(base)
    for key, value in over.items():
        own = out.get(key)
        out[key] = merged(own, value) if isinstance(own, dict) and isinstance(value, dict) else value
    return out


def render(tmp_path: Path, over: dict[str, Any]) -> dict[tuple[str, str], Any]:
    """(kind, name) -> object."""
    helpers = (CHART / "templates/_helpers.tpl").read_text()
    context = {
        "Values": merged(yaml.safe_load((CHART / "values.yaml").read_text()), over),
        "Release": {"Name": "prod", "Namespace": "default"},
        "Chart": {"AppVersion": yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]},
    }

    def run(text: str) -> str:
        file = tmp_path / "template"
        file.write_text(helpers + text)
        return str(go_template.render(file, context).decode())

    def include(match: re.Match[str]) -> str:
        # the one function of Helm's own that the chart uses
        text = run(f'{{{{ template "{match[1]}" . }}}}').strip("\n")
        return "\n" + "\n".join(" " * int(match[2]) + line for line in text.split("\n"))

    found: dict[tuple[str, str], Any] = {}
    for file in sorted((CHART / "templates").glob("*.yaml")):
        text = re.sub(r'\s*\{\{- include "([\w.]+)" \. \| nindent (\d+) \}\}', include, file.read_text())
        assert "include" not in re.sub(r"#.*", "", text)
        for item in yaml.safe_load_all(run(text)):
            if item:
                found[item["kind"], item["metadata"]["name"]] = item
    return found


def arguments(item: Any) -> list[str]:
    return list(item["spec"]["template"]["spec"]["containers"][0]["args"])


@pytest.mark.parametrize("over", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_objects_are_kubernetes_own(tmp_path: Path, over: dict[str, Any]) -> None:
    for (kind, _), item in render(tmp_path, over).items():
        if kind != "PodMonitor":  # the Prometheus operator's
            kubernetes_validate.validate(item, KUBERNETES, strict=True)


def test_defaults(tmp_path: Path) -> None:
    found = render(tmp_path, {})
    assert set(found) == {("Deployment", "prod"), ("Service", "prod")}
    pod = found["Deployment", "prod"]["spec"]["template"]["spec"]["containers"][0]
    assert pod["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert pod["args"][0] == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert {probe for probe in pod if probe.endswith("Probe")} == {"startupProbe", "readinessProbe", "livenessProbe"}
    assert found["Deployment", "prod"]["spec"]["replicas"] == 1


def test_everything(tmp_path: Path) -> None:
    found = render(tmp_path, EVERYTHING)
    server, encoders = found["Deployment", "prod"], found["Deployment", "prod-encoders"]
    assert "--vision-encoder-url=prod-encoders:8001" in arguments(server)
    assert found["Service", "prod-encoders"]["spec"]["clusterIP"] == "None"
    assert "--stages=vision_encoder,audio_encoder" in arguments(encoders)
    assert arguments(server)[-2:] == ["--context-length", "16384"]
    # autoscalers decide the number
    assert "replicas" not in server["spec"]
    for name in ("prod", "prod-encoders"):
        assert found["HorizontalPodAutoscaler", name]["spec"]["scaleTargetRef"]["name"] == name
        selector = found["Service", name]["spec"]["selector"]
        labels = found["Deployment", name]["spec"]["template"]["metadata"]["labels"]
        assert selector.items() <= labels.items()
    assert found["PodMonitor", "prod"]["metadata"]["labels"]["release"] == "prometheus"


def test_autoscalers_ask_for_what_the_adapter_makes_of_our_metrics(tmp_path: Path) -> None:
    rules = yaml.safe_load((CHART.parent / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    scalers = [item for (kind, _), item in render(tmp_path, EVERYTHING).items() if kind == "HorizontalPodAutoscaler"]
    asked = {metric["pods"]["metric"]["name"] for item in scalers for metric in item["spec"]["metrics"]}
    assert asked == {rule["name"]["as"] for rule in rules}
    for name in re.findall(r"triptych_\w+(?=[{\[])", json.dumps([rule["metricsQuery"] for rule in rules])):
        assert re.sub(r"_(sum|count)$", "", name) in METRICS
