"""The deploy files: read by the parsers of those that will read them, and run where that can be."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from google.protobuf import text_format
from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig

from keras_emr_serving.lifecycle import Store
from keras_emr_serving.running import GrpcServer, ServerTrouble
from keras_emr_serving.server.config import read_config
from keras_emr_serving.server.metrics import Metrics
from keras_emr_serving.server.rest import METRICS_PATH
from keras_emr_serving.server.server import Options, Server
from keras_emr_serving.server.text_protos import Batching, read_batching, read_monitoring, read_ssl

DEPLOY = Path(__file__).parents[2] / "serving" / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
# Those of tensorflow_model_server, from its main.cc, that take part here.
FLAGS = {
    "port",
    "rest_api_port",
    "rest_api_timeout_in_ms",
    "model_config_file",
    "model_config_file_poll_wait_seconds",
    "file_system_poll_wait_seconds",
    "load_retry_interval_micros",
    "allow_version_labels_for_unavailable_models",
    "enable_batching",
    "batching_parameters_file",
    "monitoring_config_file",
    "ssl_config_file",
}


def read(name):
    return (DEPLOY / name).read_text()


def documents(path):
    return [one for one in yaml.safe_load_all(path.read_text()) if one is not None]


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load(read("compose.yaml"))


@pytest.fixture(scope="module")
def deployment():
    (found,) = documents(DEPLOY / "kubernetes" / "deployment.yaml")
    return found


@pytest.fixture(scope="module")
def secrets(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")
    folder = tmp_path_factory.mktemp("tls") / "secrets"
    subprocess.run([DEPLOY / "certificates.sh", folder, "my.host"], check=True, timeout=60)
    return folder


# Text protos ------------------------------------------------------------------------------------


def test_models_config():
    text = read("models.config")
    proto = text_format.Parse(text, ModelServerConfig())
    (model,) = read_config(text)
    assert [one.base_path for one in proto.model_config_list.config] == ["/models/classifier"]
    assert (model.name, model.versions, model.labels) == ("classifier", (1,), {"stable": 1})


def test_models_config_is_what_promote_writes(tmp_path):
    (tmp_path / "classifier" / "1").mkdir(parents=True)
    (tmp_path / "classifier" / "1" / "saved_model.pb").touch()
    Store(tmp_path).promote("classifier", base_path="/models")
    made = text_format.Parse((tmp_path / "models.config").read_text(), ModelServerConfig())
    assert made == text_format.Parse(read("models.config"), ModelServerConfig())
    shutil.copy(DEPLOY / "models.config", tmp_path)
    assert Store(tmp_path).status("classifier")[0].problems == []


def test_batching_config():
    sizes = (1, 2, 4, 8, 16, 32, 64)
    assert read_batching(read("batching.config")) == Batching(64, 0.001, 100, 4, sizes)


def test_monitoring_config():
    assert read_monitoring(read("monitoring.config"), "/other") == METRICS_PATH


def test_ssl_config(secrets):
    read_ssl((secrets / "ssl.config").read_text())
    for name in ("ssl.config", "server.key", "ca.key"):
        assert (secrets / name).stat().st_mode & 0o077 == 0
    template = re.findall(r"@(\w+)@", read("ssl.config.template"))
    assert set(template) == {"SERVER_KEY", "SERVER_CERT", "CUSTOM_CA", "CLIENT_VERIFY"}
    assert "@" not in (secrets / "ssl.config").read_text()


@pytest.mark.parametrize("mutual", [False, True])
def test_the_certificates_make_a_connection(secrets, store, mutual, monkeypatch):
    monkeypatch.setenv("CLIENT_VERIFY", str(mutual).lower())
    before = (secrets / "ca.crt").read_bytes()
    subprocess.run([DEPLOY / "certificates.sh", secrets], check=True, timeout=60)
    assert (secrets / "ca.crt").read_bytes() == before  # renewed certificates, the same CA
    credentials = read_ssl((secrets / "ssl.config").read_text())
    options = Options(rest_port=None, grpc_port=0, grpc_credentials=credentials)
    text = f'model_config_list {{ config {{ name: "conv" base_path: "{store}/conv" '
    with Server(read_config(text + 'model_platform: "tensorflow" } }'), options) as server:
        address = f"localhost:{server.grpc_port}"
        ca, own = secrets / "ca.crt", (secrets / "client.crt", secrets / "client.key")
        assert GrpcServer(address, ca, *own).states("conv")[1].state == "AVAILABLE"
        without = GrpcServer(address, ca)
        if mutual:
            with pytest.raises(ServerTrouble, match="UNAVAILABLE"):
                without.states("conv")
        else:
            assert without.states("conv")[1].state == "AVAILABLE"
        with pytest.raises(ServerTrouble, match="UNAVAILABLE"):
            GrpcServer(address, secrets / "client.crt").states("conv")  # not who signed it


def test_hosts_get_into_the_certificate(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")
    hosts = ("a.example", "*.b.example", "10.1.2.3", "fd00::1")
    subprocess.run([DEPLOY / "certificates.sh", tmp_path, *hosts], check=True, timeout=60)
    options = ("-noout", "-ext", "subjectAltName")
    text = subprocess.run(
        ["openssl", "x509", "-in", tmp_path / "server.crt", *options],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    found = re.split(r",\s*", text.splitlines()[1].strip())
    assert found == [
        *("DNS:localhost", "DNS:serving", "IP Address:127.0.0.1", "DNS:a.example"),
        *("DNS:*.b.example", "IP Address:10.1.2.3", "IP Address:FD00:0:0:0:0:0:0:1"),
    ]


@pytest.mark.parametrize(
    ("hosts", "days", "text"),
    [
        (["a b"], "365", "not a host. Received: 'a b'. Expected"),
        (["a,DNS:evil"], "365", "not a host"),
        ([], "soon", "DAYS: not a number of days. Received: 'soon'. Expected"),
        (["1.2.3"], "365", "openssl x509 failed: "),
    ],
)
def test_certificates_that_cannot_be_made(tmp_path, monkeypatch, hosts, days, text):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")
    monkeypatch.setenv("DAYS", days)
    folder = tmp_path / "secrets"
    done = subprocess.run(
        [DEPLOY / "certificates.sh", folder, *hosts], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"certificates.sh: {text}")
    assert not (folder / "ssl.config").exists()


# Flags and paths ----------------------------------------------------------------------------------


def flags(arguments):
    return dict(one.removeprefix("--").split("=", 1) for one in arguments)


def test_flags_are_those_of_the_server(compose, deployment):
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    ours = flags(compose["services"]["serving"]["command"])
    theirs = flags(container["args"])
    assert set(ours) == set(theirs) == FLAGS
    different = {"ssl_config_file"}
    assert {k: v for k, v in ours.items() if k not in different} == {
        k: v for k, v in theirs.items() if k not in different
    }
    assert ours["enable_batching"] == "true"  # or the file of parameters would be an error


def test_what_compose_mounts_is_there(compose):
    secret = compose["secrets"]["ssl_config"]["file"]
    made_by_script = {"./secrets/ssl.config"}
    assert secret in made_by_script
    mounted = []
    for service in compose["services"].values():
        for volume in service["volumes"]:
            if isinstance(volume, dict):
                assert volume["source"].startswith("${STORE:?") and volume["read_only"]
                continue
            source, target, *_ = volume.split(":")
            mounted.append(target)
            if source.startswith("./"):
                assert (DEPLOY / source).exists(), source
            else:
                assert source in compose["volumes"]
    command = flags(compose["services"]["serving"]["command"])
    assert command["batching_parameters_file"] in mounted
    assert command["monitoring_config_file"] in mounted
    assert command["ssl_config_file"] == "/run/secrets/ssl_config"
    assert command["model_config_file"] == "/models/models.config"


def test_compose_is_careful(compose):
    for service in compose["services"].values():
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}
        assert re.fullmatch(r"[a-z/]+:\$\{\w+_TAG:-[\w.]+\}", service["image"])
        for port in service["ports"]:
            assert "127.0.0.1:" in port
    assert compose["services"]["serving"]["user"].startswith("${SERVING_UID:-1000}")


def filled_in(text):
    """What compose reads: variables by their defaults."""
    text = re.sub(r"\$\{STORE:\?[^}]*\}", "/srv/store", text)
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def test_compose_is_valid(compose):
    specification = pytest.importorskip("compose_spec")
    text = filled_in(read("compose.yaml"))
    assert "${" not in text
    made = specification.PyCompose.from_yaml(text)
    assert sorted(made.service_names()) == sorted(compose["services"])
    for right, wrong in (("30s", "soon"), ("8500:8500", "8500:grpc"), ("read_only: true", "a: b")):
        with pytest.raises(ValueError):
            specification.PyCompose.from_yaml(text.replace(right, wrong))


def test_the_health_check_tells(compose, server):
    test = compose["services"]["serving"]["healthcheck"]["test"]
    assert test[0] == "CMD"

    def check(port):
        script = test[3].replace("$$", "$")  # as compose does
        assert "/8501" in script
        command = [*test[1:3], script.replace("/8501", f"/{port}")]
        return subprocess.run(command, capture_output=True, timeout=30).returncode

    assert check(server.rest_port) == 0
    assert check(9) != 0  # nobody listens
    wrong = test[3].replace("/monitoring/prometheus/metrics", "/v1/models/nosuch")
    command = ["bash", "-c", wrong.replace("$$", "$").replace("/8501", f"/{server.rest_port}")]
    assert subprocess.run(command, capture_output=True, timeout=30).returncode != 0


# Prometheus and Grafana ---------------------------------------------------------------------------


def names():
    """Metric -> its labels, histograms by the three names that Prometheus knows them by."""
    metrics = Metrics()
    metrics.request("m", "Predict", "REST", "OK", 5)
    metrics.examples("m", 1)
    metrics.load("/m/1", "success")
    metrics.runtime_latency.labels("m", "Predict", "TF1").observe(1)
    metrics.warmup_latency.labels("/m/1", "OK").observe(1)
    found = {}
    for name, labels in re.findall(r"^(\S+?)\{(.*?)\} ", metrics.text().decode(), re.MULTILINE):
        found[name] = set(re.findall(r'(\w+)="', labels))
    return found


def expressions():
    dashboard = json.loads(read("grafana/dashboards/keras-emr-serving.json"))
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    rules = yaml.safe_load(read("prometheus/alerts.yml"))["groups"][0]["rules"]
    return found + [rule["expr"] for rule in rules]


@pytest.mark.parametrize("expression", expressions())
def test_the_metrics_exist(expression):
    known = names()
    used = re.findall(r"(:tensorflow:[\w:]+|\bup\b)(?:\{(.*?)\})?", expression)
    assert used
    available = {"job"} if "up" in dict(used) else set()
    for name, selector in used:
        if name != "up":
            assert name in known
            available |= known[name]
            assert set(re.findall(r"(\w+)[=!]~?\"", selector)) <= known[name]
    for group in re.findall(r"by \((.*?)\)", expression):
        assert set(re.split(r",\s*", group)) <= available


def test_a_first_failure_is_seen():
    """A counter of failures begins with one: ``increase`` alone would say 0 until the second."""
    rules = yaml.safe_load(read("prometheus/alerts.yml"))["groups"][0]["rules"]
    counted = [rule["expr"] for rule in rules if rule["expr"].startswith("increase(")]
    assert len(counted) == 2
    for expression in counted:
        series = re.fullmatch(r"increase\((.*?)\[10m\]\) > 0 or .*", expression)[1]
        assert expression.endswith(f" or ({series} unless {series} offset 10m)")


def test_the_dashboard_hangs_together():
    dashboard = json.loads(read("grafana/dashboards/keras-emr-serving.json"))
    (source,) = yaml.safe_load(read("grafana/provisioning/datasources/prometheus.yaml"))[
        "datasources"
    ]
    assert all(panel["datasource"]["uid"] == source["uid"] for panel in dashboard["panels"])
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"]) >= 8
    boxes = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(boxes)) == len(boxes)
    labels = set().union(*names().values())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels


def test_prometheus_scrapes_the_server(compose):
    config = yaml.safe_load(read("prometheus/prometheus.yml"))
    (job,) = config["scrape_configs"]
    assert job["metrics_path"] == read_monitoring(read("monitoring.config"), "")
    (target,) = job["static_configs"][0]["targets"]
    service, port = target.split(":")
    assert service in compose["services"]
    assert flags(compose["services"][service]["command"])["rest_api_port"] == port
    assert all((DEPLOY / "prometheus" / name).exists() for name in config["rule_files"])
    rules = yaml.safe_load(read("prometheus/alerts.yml"))["groups"][0]["rules"]
    assert f'job="{job["job_name"]}"' in rules[0]["expr"]


def test_grafana_finds_what_it_is_given(compose):
    mounts = dict(one.split(":")[:2] for one in compose["services"]["grafana"]["volumes"])
    provider = yaml.safe_load(read("grafana/provisioning/dashboards/keras-emr.yaml"))
    assert mounts["./grafana/dashboards"] == provider["providers"][0]["options"]["path"]
    (source,) = yaml.safe_load(read("grafana/provisioning/datasources/prometheus.yaml"))[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in compose["services"]


# Kubernetes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_a_manifest_meets_its_schema(path, version):
    validate = pytest.importorskip("kubernetes_validate")
    for document in documents(path):
        validate.validate(document, version, strict=True)


def test_the_schema_would_object(deployment):
    validate = pytest.importorskip("kubernetes_validate")
    deployment["spec"]["replica"] = 2
    try:
        with pytest.raises(validate.ValidationError):
            validate.validate(deployment, "1.37", strict=True)
    finally:
        del deployment["spec"]["replica"]


def test_the_kustomization_names_every_manifest():
    made = yaml.safe_load(read("kustomization.yaml"))
    assert made["resources"] == [name for name in made["resources"] if (DEPLOY / name).is_file()]
    assert sorted(made["resources"]) == [f"kubernetes/{path.name}" for path in MANIFESTS]
    (generated,) = made["configMapGenerator"]
    assert all((DEPLOY / name).is_file() for name in generated["files"])
    (image,) = made["images"]
    default = re.search(r"serving:\$\{TF_SERVING_TAG:-([\w.]+)\}", read("compose.yaml")).group(1)
    assert image == {"name": "tensorflow/serving", "newTag": default}


def test_kubectl_builds_it():
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl")
    done = subprocess.run(
        ["kubectl", "kustomize", DEPLOY], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    assert len(built) == sum(len(documents(path)) for path in MANIFESTS) + 1
    (config,) = [one for one in built if one["kind"] == "ConfigMap"]
    assert config["data"]["batching.config"] == read("batching.config")
    (made,) = [one for one in built if one["kind"] == "Deployment"]
    volumes = made["spec"]["template"]["spec"]["volumes"]
    assert config["metadata"]["name"] in [one.get("configMap", {}).get("name") for one in volumes]


def test_the_manifests_hang_together(deployment):
    by_kind = {}
    for path in MANIFESTS:
        for document in documents(path):
            by_kind.setdefault(document["kind"], []).append(document)
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    labels = pod["metadata"]["labels"]
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    given = flags(container["args"])
    assert ports == {"grpc": int(given["port"]), "rest": int(given["rest_api_port"])}
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        by_kind["PodDisruptionBudget"][0]["spec"]["selector"]["matchLabels"],
        by_kind["NetworkPolicy"][0]["spec"]["podSelector"]["matchLabels"],
        *(one["spec"]["selector"] for one in by_kind["Service"]),
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)
    for service in by_kind["Service"]:
        assert all(one["targetPort"] in ports for one in service["spec"]["ports"])
    target = by_kind["HorizontalPodAutoscaler"][0]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    assert "cpu" in container["resources"]["requests"]  # what its percentage is of
    path = read_monitoring(read("monitoring.config"), "")
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": path, "port": "rest"}
    mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    volumes = {one["name"]: one for one in pod["spec"]["volumes"]}
    assert set(mounts) == set(volumes)
    assert volumes["models"]["persistentVolumeClaim"]["claimName"] in [
        one["metadata"]["name"] for one in by_kind["PersistentVolumeClaim"]
    ]
    generated = yaml.safe_load(read("kustomization.yaml"))["configMapGenerator"][0]
    for flag, volume in (
        ("model_config_file", "models"),
        ("batching_parameters_file", "config"),
        ("monitoring_config_file", "config"),
        ("ssl_config_file", "tls"),
    ):
        folder, name = given[flag].rsplit("/", 1)
        assert folder == mounts[volume]
        assert volume != "config" or name in generated["files"]
    rolling = deployment["spec"]["strategy"]["rollingUpdate"]
    assert rolling == {"maxUnavailable": 0, "maxSurge": 1}


def test_the_kserve_service():
    """By hand: no package ships the schema of KServe's resources."""
    (made,) = documents(DEPLOY / "kserve" / "inference-service.yaml")
    assert (made["apiVersion"], made["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    predictor = made["spec"]["predictor"]
    assert set(predictor) == {"minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "model"}
    model = predictor["model"]
    assert model["modelFormat"] == {"name": "tensorflow"}
    claims = documents(DEPLOY / "kubernetes" / "models-volume.yaml")
    assert model["storageUri"] == f"pvc://{claims[0]['metadata']['name']}/classifier"
    tag = yaml.safe_load(read("kustomization.yaml"))["images"][0]["newTag"]
    assert model["runtimeVersion"] == tag


def test_the_readme_names_every_file():
    text = read("README.md")
    for path in DEPLOY.iterdir():
        if path.name not in ("README.md", ".gitignore", "secrets", ".env"):
            assert path.name in text, path.name
