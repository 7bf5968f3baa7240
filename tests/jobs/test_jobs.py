"""The files under jobs/: what can be said of them without the systems that they are for."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from supir_batch.metrics import METRICS
from tests.documents import ROOT, commands, parse

JOBS = ROOT / "jobs"
KUBERAY = ["kuberay-job.yaml", "kuberay-cluster.yaml"]


def loaded(name: str) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load((JOBS / name).read_text())
    return data


# --- commands ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("jobs/slurm.sbatch", 1),
        ("jobs/kuberay-job.yaml", 1),
        ("jobs/kuberay-cluster.yaml", 1),
    ],
)
def test_every_command_is_one_that_there_is(name: str, count: int) -> None:
    found = list(commands(ROOT / name))
    assert len(found) >= count
    for words in found:
        parse(words)


def test_a_command_that_there_is_not_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("```sh\nsupir-batch submit m.yaml --address http://h:1 --limt 3   # a few\n```\n")
    (words,) = commands(tmp_path / "a.md")
    with pytest.raises(Exception, match="--limt"):
        parse(words)


# --- Kubernetes ----------------------------------------------------------------------------------------------------


def strict(schema: Any) -> Any:
    """The schema of a CRD as JSON Schema that refuses fields that Kubernetes would drop without a word."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {key: strict(value) for key, value in schema.items() if key != "format"}
    if (
        isinstance(schema.get("properties"), dict)
        and schema.get("type") == "object"
        and "additionalProperties" not in schema
        and not schema.get("x-kubernetes-preserve-unknown-fields")
    ):
        made["additionalProperties"] = False
    return made


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_takes_it(name: str, pytestconfig: pytest.Config) -> None:
    folder, data = pytestconfig.getoption("--kuberay-crds"), loaded(name)
    path = folder / f"ray.io_{data['kind'].lower()}s.yaml"
    if not path.exists():
        pytest.skip(f"{path} is not here; see pytest --help, --kuberay-crds")
    with path.open() as file:
        crd = yaml.load(file, yaml.CSafeLoader)
    (version,) = [one for one in crd["spec"]["versions"] if f"ray.io/{one['name']}" == data["apiVersion"]]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # the API server's own
    errors = list(Draft202012Validator(schema).iter_errors(data))
    assert not errors, "\n".join(f"{error.json_path}: {error.message}" for error in errors)
    misspelt = json.loads(json.dumps(data).replace('"rayStartParams"', '"rayStartParam"'))
    assert list(Draft202012Validator(schema).iter_errors(misspelt))


@pytest.mark.parametrize("name", KUBERAY)
def test_what_runs_on_kubernetes(name: str) -> None:
    spec = loaded(name)["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    assert f"ray=={cluster['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["minReplicas"] < workers["maxReplicas"]
    for group in (cluster["headGroupSpec"], workers):
        (container,) = group["template"]["spec"]["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "supir-batch-storage"}}]
        assert "env" not in container, "credentials come from the Secret"
        assert group["template"]["metadata"]["annotations"]["prometheus.io/port"] == "8080"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    if "entrypoint" in spec:
        assert isinstance(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"], str)
        parse(shlex.split(spec["entrypoint"]))


# --- Slurm and Docker ----------------------------------------------------------------------------------------------


def test_the_batch_script_is_valid_bash_and_leaves_itself_time() -> None:
    subprocess.run(["bash", "-n", str(JOBS / "slurm.sbatch")], check=True)
    text = (JOBS / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, re.MULTILINE))
    (reserve,) = re.findall(r"^RESERVE=(\d+)", text, re.MULTILINE)
    assert options["ntasks-per-node"] == "1", "one raylet has all of a node"
    assert int(options["signal"].partition("B:TERM@")[2]) < int(reserve)


def test_the_image_is_made_of_what_is_there() -> None:
    text = (JOBS / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert {word for word, _ in lines} == {"FROM", "RUN", "WORKDIR", "COPY", "USER"}
    let_in = {line.removeprefix("!") for line in (JOBS / "Dockerfile.dockerignore").read_text().split()}
    sources = [source for word, rest in lines if word == "COPY" for source in rest.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists()
        assert source in let_in
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"]} <= set(sources)
    for script in (rest for word, rest in lines if word == "RUN"):
        subprocess.run(["bash", "-n", "-c", script], check=True)
        for extras in re.findall(r"'\.\[(.*?)\]'", script):
            assert set(extras.split(",")) <= set(project["optional-dependencies"])


# --- dashboard -----------------------------------------------------------------------------------------------------


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    text = (JOBS / "grafana.json").read_text()
    offered = set()
    for metric in METRICS:
        ends = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_count", "_sum"]}[metric.kind]
        offered |= {f"ray_{metric.name}{end}" for end in ends}
    shown = set(re.findall(r"ray_supir_batch_\w+", text))
    assert shown <= offered
    for metric in METRICS:
        assert any(name.startswith(f"ray_{metric.name}") for name in shown), metric.name


def test_the_dashboards_panels_can_be_read() -> None:
    dashboard = json.loads((JOBS / "grafana.json").read_text())
    places = set()
    tags = {"run_id", "le", *(tag for metric in METRICS for tag in metric.tags)}
    for panel in dashboard["panels"]:
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        for target in panel["targets"]:
            assert 'run_id=~"$run_id"' in target["expr"]
            used = re.findall(r"by \(([\w, ]+)\)", target["expr"]) + re.findall(r"{{(\w+)}}", target["legendFormat"])
            assert {tag for group in used for tag in group.split(", ")} <= tags
            assert target["expr"].count("(") == target["expr"].count(")")
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & places, f"{panel['title']} lies over another"
        assert max(x for x, _ in cells) < 24
        places |= cells
