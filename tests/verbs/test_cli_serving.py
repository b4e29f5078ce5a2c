"""The server as a process of its own, on a run directory."""

import http.client
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
import yaml

from command_line import Call
from impatient import cli
from impatient.verbs.run_directory import RunDirectory
from impatient.verbs.serve import TOKEN

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "serving"


@pytest.fixture(scope="module")
def server(finished: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-m", "impatient.cli", "serve", str(finished), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--drain-ms", "2000"], stdout=subprocess.PIPE, text=True, env=environment
    )
    for line in process.stdout:
        found = re.search(r"serving digits at http://127\.0\.0\.1:(\d+)", line)
        if found:
            break
    # what else it says is read, so that it never waits for us
    reader = threading.Thread(target=process.stdout.read)
    reader.start()
    yield process, int(found[1])
    process.kill()
    process.wait()
    reader.join()
    process.stdout.close()


def test_the_address_of_grpc_is_said_and_answers(finished: Path, capsys) -> None:
    command = [sys.executable, "-m", "impatient.cli", "serve", str(finished), "--port", "0"]
    with subprocess.Popen(
        [*command, "--grpc-port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        for line in process.stdout:
            found = re.search(r"over gRPC at (127\.0\.0\.1:\d+)", line)
            if found:
                break
        try:
            with triton.InferenceServerClient(found[1]) as client:
                assert client.is_model_ready("digits")
            example = runpy.run_path(str(EXAMPLES / "ask.py"))
            example["ask_for_every_exit"](found[1], "digits", 5000.0)
            said = [int(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
            # every exit as it comes, then the one that stands
            assert said == [*range(len(said) - 1), said[-2]]
        finally:
            process.send_signal(signal.SIGTERM)
            process.stdout.read()
    assert process.returncode == 0


def ask(connection: http.client.HTTPConnection, what: str, body: object) -> bytes:
    """Post a request and read the whole reply."""
    connection.request("POST", f"/v2/models/digits/{what}", json.dumps(body))
    return connection.getresponse().read()


def body_of(raw: np.ndarray, **parameters: object) -> dict[str, object]:
    tensor = {"name": "input", "datatype": "FP32", "shape": [1, *raw.shape]}
    return {"inputs": [{**tensor, "data": raw.ravel().tolist()}], "parameters": parameters}


@pytest.mark.parametrize("page", ["README.md", "docs/how-to/serving.md"])
def test_the_command_of_the_pages_asks_the_server(server, page) -> None:
    _process, port = server
    blocks = re.findall(r"```text\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if "curl" in block]
    # what is typed after a prompt, or else the whole block
    (command,) = re.findall(r"^\$ (curl.*)$", block, re.MULTILINE) or [block]
    command = command.replace(":8000", f":{port}").replace("impatient-demo", "digits")
    command = command.replace("python -c", f"{sys.executable} -c")
    told = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    reply = json.loads(told.stdout)
    assert len(reply["outputs"][0]["data"]) == 10
    assert reply["parameters"]["n_exits"] == 3


@pytest.mark.parametrize(
    ("http", "model", "said"),
    [
        (None, "digits", "nothing answers over gRPC at localhost:1; start the server with --grpc"),
        (None, "letters", "no model 'letters'; there are: digits"),
        ("localhost:1", "digits", "no server at localhost:1; start one with: impatient serve DIR"),
    ],
)
def test_the_example_asks_the_server_or_says_what_is_missing(
    server, capsys, monkeypatch, http, model, said
) -> None:
    _process, port = server
    address = http or f"localhost:{port}"
    options = ["--http", address, "--grpc", "localhost:1", "--deadline-ms", "5000"]
    monkeypatch.setattr(sys, "argv", ["ask.py", *options, "--model", model])
    with pytest.raises(SystemExit, match=re.escape(said)):
        runpy.run_path(str(EXAMPLES / "ask.py"), run_name="__main__")
    answered = re.search(r"\d: exit \d of 2 after \d+\.\d ms, stopped", capsys.readouterr().out)
    assert bool(answered) is said.startswith("nothing answers over gRPC")


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")
def test_the_example_in_javascript_asks_the_server(server) -> None:
    _process, port = server
    script = f"""
        import {{ ask, everyExit }} from {json.dumps((EXAMPLES / "ask.mjs").as_uri())};
        const server = ["http://127.0.0.1:{port}", "digits", new Array(64).fill(0.5), 5000];
        const found = [await ask(...server)];
        for await (const answer of everyExit(...server)) found.push(answer);
        console.log(JSON.stringify(found));
    """
    command = ["node", "--input-type=module", "--eval", script]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    answer, *every = json.loads(told.stdout.splitlines()[-1])
    assert len(answer["output"]) == 10
    assert answer["stopped_by"]
    assert [one["exit"] for one in every[:-1]] == list(range(len(every) - 1))
    assert "stopped_by" in every[-1]


def test_the_manifest_for_kserve_says_what_the_server_knows(server) -> None:
    _process, port = server
    manifest = yaml.safe_load((EXAMPLES / "kserve.yaml").read_text(encoding="utf-8"))
    predictor = manifest["spec"]["predictor"]
    [container] = predictor["containers"]
    options = cli.parse([*container["command"][1:], *container["args"]])
    assert options.port == container["ports"][0]["containerPort"]
    assert options.drain_s < predictor["terminationGracePeriodSeconds"]
    assert TOKEN in [entry["name"] for entry in container["env"]]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[probe]["httpGet"]
        assert asked["port"] == options.port
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{asked['path']}") as reply:
            assert reply.status == 200


def test_a_load_is_counted_as_its_callers_see_it(server, finished, call, tmp_path) -> None:
    _process, port = server
    instants = tmp_path / "instants.npy"
    np.save(instants, np.linspace(0.0, 7.0, 40))
    known = float(RunDirectory(finished).recording("test").quality.mean())
    for extra in (["--arrivals", "gamma"], ["--trace", instants]):
        code, said = call(
            "bench-serve",
            finished,
            "--address",
            f"http://127.0.0.1:{port}",
            "--requests",
            40,
            "--rate",
            40,
            "--budgets-ms",
            "2000,3000",
            "--json",
            *extra,
        )
        assert code == 0
        # notes are on the error stream
        found = json.loads(said[: said.rindex("}") + 1])
        assert "sending 40 requests, which takes" in said
        assert found["requests"] == 40
        assert found["status"] == {"200": 40}
        assert found["in_time"] == 1.0
        assert abs(found["timely_accuracy"] - known) < 0.3
        assert sum(found["exits"].values()) == 40


def test_a_load_without_a_server_says_what_to_start(call, finished) -> None:
    code, said = call("bench-serve", finished, "--address", "http://127.0.0.1:1")
    assert code == 1
    assert "impatient serve DIR" in said


def test_ray_that_is_missing_is_asked_for_by_its_extra(call, finished, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    code, said = call("serve", finished, "--ray", "--port", "0")
    assert code == 1
    assert "pip install 'impatient[ray]'" in said


def test_a_served_network_is_as_right_as_its_recording_and_ends_when_told(server, finished) -> None:
    process, port = server
    run = RunDirectory(finished)
    preprocess = run.spec().preprocess
    data = run.data()
    recording = run.recording("test")
    mean, std = (np.array(part)[:, None, None] for part in (preprocess.mean, preprocess.std))
    inputs, labels = next(data.batches("test", 40))
    right = []
    exits = []
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    for x, label in zip(inputs, labels, strict=True):
        body = body_of(x.numpy() * std + mean, deadline_ms=2000)
        reply = json.loads(ask(connection, "infer", body))
        exits.append(reply["parameters"]["exit"])
        right.append(np.argmax(reply["outputs"][0]["data"]) == int(label))
    known = recording.quality[exits, range(40)].bool().tolist()
    assert right == known

    # the connection that is open does not keep the server from ending
    assert b"event: answer" in ask(connection, "stream", body_of(inputs[0].numpy()))
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert time.monotonic() - begin < 8
    connection.close()


def test_what_cannot_be_served_is_said(call: Call, finished: Path, monkeypatch) -> None:
    monkeypatch.delenv("IMPATIENT_TOKEN", raising=False)
    code, said = call("serve")
    assert code == 1
    assert "expected at least one to serve" in said
    code, said = call("serve", finished, "--host", "0.0.0.0")
    assert code == 1
    assert "set the variable IMPATIENT_TOKEN" in said
    for token in ("two words", "größe"):
        monkeypatch.setenv("IMPATIENT_TOKEN", token)
        code, said = call("serve", finished)
        assert code == 1
        assert "IMPATIENT_TOKEN holds spaces or characters" in said
    monkeypatch.delenv("IMPATIENT_TOKEN")
    for option in ("--replicas", "--most-replicas"):
        code, said = call("serve", finished, option, "2")
        assert code == 1
        assert "add --ray" in said
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, said = call("serve", finished, "--port", taken.getsockname()[1])
    assert code == 1
    assert "Choose another --port" in said
    # before a minute of measuring
    assert "measuring" not in said
    code, said = call("serve", finished / "nothing", "--port", "0")
    assert code == 1
    assert "is no run directory" in said
