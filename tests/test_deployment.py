"""The files in deploy/ fit the server: its options, paths, port, limits and metrics."""

import json
import re

import click
import pytest
from paths import ROOT

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed (transformers brings it)")

DEPLOY = ROOT / "deploy"
MANIFESTS = sorted(path for path in (DEPLOY / "kubernetes").glob("*.yaml") if path.name != "kustomization.yaml")
AFTER_DRAIN = 5  # seconds that the server waits for clients after --drain-timeout


def load(name):
    return yaml.safe_load((DEPLOY / name).read_text())


def manifest(kind):
    found = [yaml.safe_load(path.read_text()) for path in MANIFESTS]
    (one,) = [one for one in found if one["kind"] == kind]
    return one


@pytest.fixture
def container():
    (one,) = manifest("Deployment")["spec"]["template"]["spec"]["containers"]
    return one


@pytest.fixture
def metric_names():
    """The names of all samples that the server can export."""
    pytest.importorskip("prometheus_client", reason="prometheus-client is not installed (gpt2x[serve])")
    from gpt2x.serving.metrics import Metrics

    endings = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    return {
        metric.name + ending for metric in Metrics().registry.collect() for ending in endings.get(metric.type, [""])
    }


def metrics_in(text):
    return set(re.findall(r"\b(?:gpt2x|process)_\w+", text))


def test_every_metric_of_the_dashboard_is_exported_by_the_server(metric_names):
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = [one["query"] for one in dashboard["templating"]["list"]]
    used = metrics_in(" ".join([*expressions, *variables]))
    assert len(used) >= 15
    assert used <= metric_names


def test_every_metric_of_the_server_is_in_the_dashboard(metric_names):
    text = (DEPLOY / "grafana-dashboard.json").read_text()
    shown = {re.sub("_(bucket|sum|count|total)$", "", name) for name in metrics_in(text)}
    exported = {re.sub("_(bucket|sum|count|total)$", "", name) for name in metric_names if name.startswith("gpt2x_")}
    assert exported - shown <= {"gpt2x_texts", "gpt2x_cache_tokens"}  # the use of the cache is shown as a share


def test_the_panels_of_the_dashboard_do_not_overlap():
    panels = json.loads((DEPLOY / "grafana-dashboard.json").read_text())["panels"]
    cells = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(cells)) == len(cells)
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_the_autoscaler_uses_the_queue_that_the_adapter_reads(metric_names):
    spec = manifest("HorizontalPodAutoscaler")["spec"]
    (metric,) = spec["metrics"]
    name = metric["pods"]["metric"]["name"]
    (rule,) = load("prometheus-adapter.yaml")["rules"]["custom"]
    assert name in metric_names
    assert rule["name"]["as"] == name
    assert rule["seriesQuery"].startswith(name)
    assert spec["scaleTargetRef"]["name"] == manifest("Deployment")["metadata"]["name"]
    assert 2 <= spec["minReplicas"] < spec["maxReplicas"]
    assert "replicas" not in manifest("Deployment")["spec"]  # it would reset what the autoscaler chose


def options_of(arguments):
    """The options of a ``gpt2x serve`` command, after click has checked them."""
    from gpt2x.cli import main

    command, *rest = arguments
    with main.commands[command].make_context(command, list(rest)) as context:
        return context.params


@pytest.mark.parametrize("where", ["Dockerfile", "compose", "kubernetes"])
def test_the_server_takes_the_options(where, container):
    if where == "Dockerfile":
        arguments = json.loads(re.search(r"^CMD (.*)$", (DEPLOY / "Dockerfile").read_text(), re.M)[1])
    elif where == "compose":
        arguments = load("compose.yaml")["services"]["gpt2x"]["command"]
    else:
        arguments = container["args"]
    options = options_of(arguments)
    assert options["models"] == ("gpt2=/models/gpt2",)
    assert (options["host"], options["port"]) == ("0.0.0.0", 8000)


def test_an_unknown_option_would_be_found():
    with pytest.raises(click.UsageError):
        options_of(["serve", "gpt2=/models/gpt2", "--no-such-option"])


def test_the_probes_are_paths_of_the_server(container):
    assert container["livenessProbe"]["httpGet"] == {"path": "/health", "port": "http"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "http"}
    assert container["startupProbe"]["httpGet"] == {"path": "/ready", "port": "http"}
    app = (ROOT / "gpt2x/serving/app.py").read_text()
    assert '"/health"' in app
    assert '"/ready"' in app


def test_the_ports_are_those_of_the_server(container):
    port = options_of(container["args"])["port"]
    assert container["ports"] == [{"name": "http", "containerPort": port}]
    annotations = manifest("Deployment")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(port)
    assert manifest("Service")["spec"]["ports"][0]["targetPort"] == "http"
    assert load("prometheus.yml")["scrape_configs"][0]["static_configs"] == [{"targets": [f"gpt2x:{port}"]}]
    assert f"EXPOSE {port}" in (DEPLOY / "Dockerfile").read_text()


def test_a_pod_has_the_time_to_drain(container):
    drain = options_of(container["args"])["drain_timeout"]
    stop = int(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    grace = manifest("Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace >= stop + drain + AFTER_DRAIN
    service = load("compose.yaml")["services"]["gpt2x"]
    grace = int(service["stop_grace_period"].removesuffix("s"))
    assert grace >= options_of(service["command"])["drain_timeout"] + AFTER_DRAIN


def test_the_memory_limit_holds_the_cache(container):
    assert options_of(container["args"])["cache_memory"] < 3 << 30
    assert container["resources"]["requests"]["memory"] == "3Gi"
    assert container["resources"]["limits"]["memory"] == "4Gi"


def test_nothing_runs_as_root(container):
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    user = pod["securityContext"]["runAsUser"]
    assert re.search(rf"^USER {user}:{user}$", (DEPLOY / "Dockerfile").read_text(), re.M)


def test_all_manifests_select_the_same_pods():
    labels = manifest("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert manifest("Deployment")["spec"]["selector"]["matchLabels"] == labels
    assert manifest("Service")["spec"]["selector"] == labels
    assert manifest("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    assert sorted(load("kubernetes/kustomization.yaml")["resources"]) == [path.name for path in MANIFESTS]


def test_every_volume_of_a_mount_is_there(container):
    volumes = {volume["name"] for volume in manifest("Deployment")["spec"]["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_what_compose_mounts_is_there():
    services = load("compose.yaml")["services"]
    sources = [volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])]
    here = [source for source in sources if source.startswith("./")]
    assert len(here) == 3
    assert all((DEPLOY / source).exists() for source in here)
    assert load("grafana/dashboards/gpt2x.yaml")["providers"][0]["options"]["path"] == "/var/lib/grafana/dashboards"


def test_what_the_image_copies_is_there_and_in_the_context():
    text = (DEPLOY / "Dockerfile").read_text()
    sources = [name for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.M) for name in line.split()[:-1]]
    allowed = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert len(sources) == 6
    for name in sources:
        assert (ROOT / name).exists()
        assert f"!{name}" in allowed
