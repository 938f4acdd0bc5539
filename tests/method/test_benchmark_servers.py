"""A benchmark over several servers: who draws what, services that have little of ComfyUI's interface, errors of a
server and of a case. The servers are threads that speak HTTP; real ones are in tests/server/test_benchmark.py."""

import base64
import io
import json
import socket
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image
from subject_dla.common.list_files import Example
from subject_dla.tools.benchmark import worker
from subject_dla.tools.benchmark.__main__ import main
from subject_dla.tools.benchmark.ledger import RunError
from subject_dla.tools.benchmark.runner import Benchmark
from subject_dla.tools.benchmark.servers import Found, check_equal, clients
from subject_dla.tools.benchmark.sets import Case
from subject_dla.tools.benchmark.template import Template
from subject_dla.tools.comfy_client.client import Client, HostError

GRAPH = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "own.png"}},
    "2": {"class_type": "TextEncode", "inputs": {"image": ["1", 0], "text": "words"}},
    "3": {"class_type": "KSampler", "inputs": {"positive": ["2", 0], "seed": 5, "unet_name": "dit.safetensors"}},
    "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "x"}},
}
MEMORY = "Allocation on device\nThis error means you ran out of memory on your GPU."


class Service(ThreadingHTTPServer):
    """A service with ComfyUI's interface. It draws the seed as a colour, a job at a time in `seconds`.

    parts: what it has beyond /prompt, /history, /view and /upload/image. fails: texts of errors, by prompt or for all.
    """

    daemon_threads = True

    def __init__(self, *, prefix="", headers=None, parts=("system_stats", "queue"), seconds=0.01, fails=None, lacks=()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.prefix, self.headers, self.parts, self.seconds, self.fails = prefix, headers or {}, parts, seconds, fails
        self.status = 0  # of every answer to /prompt, where it is set
        self.odd = {}  # by part: what it answers instead, and the status
        self.jobs, self.uploads, self.drawn, self.deleted = {}, [], [], []
        self.nodes = {node["class_type"]: {"input": {"required": {}}, "output": [], "output_node": False}
                      for node in GRAPH.values() if node["class_type"] not in lacks}  # fmt: skip
        self.nodes["SaveImage"]["output_node"] = True
        files = [name for name in ("dit.safetensors",) if name not in lacks]
        self.nodes.get("KSampler", {"input": {}})["input"]["required"] = {"unet_name": [files, {}]}
        self.free = time.monotonic()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}{self.prefix}"

    def stop(self):
        self.shutdown()
        self.server_close()

    def result(self, job):
        prompt, done = self.jobs[job]
        if time.monotonic() < done:
            return None
        text, seed = prompt["2"]["inputs"]["text"], prompt["3"]["inputs"]["seed"]
        error = self.fails if isinstance(self.fails, str) else (self.fails or {}).get(text)
        if error:
            message = ["execution_error", {"node_id": "3", "exception_message": error}]
            return {"status": {"status_str": "error", "messages": [message]}, "outputs": {}}
        self.drawn.append(text)
        return {"outputs": {"4": {"images": [{"filename": f"{seed}.png", "type": "output"}]}}}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, value, status=200):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "image/png" if isinstance(value, bytes) else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def path_of(self):
        service = self.server
        if any(self.headers.get(name) != value for name, value in service.headers.items()):
            return self.answer({}, 401)
        if not self.path.startswith(service.prefix):
            return self.answer(b"<html>", 404)
        path = self.path[len(service.prefix) + 1 :]
        part = path.split("/")[0].split("?")[0]
        if part not in ("prompt", "history", "view", "upload", *service.parts):
            return self.answer({"error": "no such thing"}, 404)
        if part in service.odd and (part != "history" or path.split("/")[1] in service.jobs):
            odd, status = service.odd[part]
            return self.answer(odd(path.split("/")[-1]) if callable(odd) else odd, status)
        return path

    def do_GET(self):
        service = self.server
        if (path := self.path_of()) is None:
            return
        if path == "queue":
            waiting = [[0, job] for job, (_, done) in service.jobs.items() if time.monotonic() < done]
            return self.answer({"queue_running": waiting[:1], "queue_pending": waiting[1:]})
        if path.startswith("history"):
            job = path.split("/")[1]
            found = service.result(job) if job in service.jobs else None
            return self.answer({job: found} if found else {})
        if path.startswith("view"):
            seed, file = int(path.split("=")[1].split(".")[0]), io.BytesIO()
            Image.new("RGB", (8, 8), f"#{seed % 2**24:06x}").save(file, "png")
            return self.answer(file.getvalue())
        self.answer(service.nodes if path == "object_info" else {"system": {"comfyui_version": "1"}})

    def do_POST(self):
        service, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        if (path := self.path_of()) is None:
            return
        if path.startswith("upload"):
            name = body.split(b'filename="')[1].split(b'"')[0].decode()
            service.uploads.append(name)
            return self.answer({"name": name})
        if path == "queue":
            service.deleted += json.loads(body)["delete"]
            return self.answer({})
        if service.status:
            return self.answer({}, service.status)
        sent = json.loads(body)
        service.free = max(service.free, time.monotonic()) + service.seconds
        service.jobs[sent["prompt_id"]] = sent["prompt"], service.free
        self.answer({"prompt_id": sent["prompt_id"]})


@pytest.fixture
def start():
    services = []

    def begin(**options):
        services.append(Service(**options))
        return services[-1]

    yield begin
    for service in services:
        service.stop()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(worker, "LONGEST_PAUSE", 0.1)
    monkeypatch.setattr(worker, "POLL", 0.02)


def wanted(tmp_path, count):
    picture = tmp_path / "cat.png"
    Image.new("RGB", (32, 32)).save(picture)
    return [Case(f"c{n:02}", Example("cat", f"cat {n}", (picture,)), 0, 1000 + n) for n in range(count)]


def run(cases, tmp_path, *services, name="run", **options):
    said = []
    benchmark = Benchmark([Client(s.address) for s in services], Template(GRAPH, {}), tmp_path / name,
                          root=tmp_path, say=said.append, **options)  # fmt: skip
    return benchmark.run(cases), benchmark, "\n".join(said)


def lines(tmp_path, name="run"):
    return [json.loads(line) for line in (tmp_path / name / "ledger.jsonl").read_text().splitlines()]


def test_a_faster_server_does_more_and_the_ledger_is_that_of_one(start, tmp_path):
    fast, slow, alone = start(seconds=0.02), start(seconds=0.4), start()
    cases = wanted(tmp_path, 24)
    result, benchmark, _ = run(cases, tmp_path, fast, slow)
    assert result == {"pictures": 24, "made": 24, "failed": 0, "cases": 24}
    assert len(fast.drawn) > 2 * len(slow.drawn) > 0 and sorted(fast.drawn + slow.drawn) == sorted(
        c.item.prompt for c in cases
    )
    assert fast.uploads == slow.uploads == ["cat-cat.png"], "a reference goes to each server once"
    run(cases, tmp_path, alone, name="one")
    several, one = lines(tmp_path), lines(tmp_path, "one")
    assert {line["server"] for line in several} == {fast.address, slow.address}
    for line in several + one:
        del line["server"], line["seconds"]
        del line["settings"]["4"]["inputs"]["filename_prefix"]  # has the folder's name
    assert several == one and [line["name"] for line in one] == [case.name for case in cases]
    for case in cases:
        assert pixels(tmp_path / "run" / f"{case.name}.png") == pixels(tmp_path / "one" / f"{case.name}.png")


def pixels(path):
    with Image.open(path) as picture:
        return picture.tobytes()


@pytest.mark.parametrize("how", ["gone", 401, 502])
def test_the_cases_of_a_lost_server_go_to_the_others(start, tmp_path, how):
    """It ends, or answers but takes no more jobs."""
    stays, goes = start(seconds=0.1), start(seconds=0.1)
    cases = wanted(tmp_path, 20)

    def lose():
        while len(goes.drawn) < 2:
            time.sleep(0.005)
        if how == "gone":
            goes.stop()
        else:
            goes.status = how

    thread = threading.Thread(target=lose)
    thread.start()
    result, benchmark, said = run(cases, tmp_path, stays, goes)
    thread.join()
    assert result["made"] == 20 and result["failed"] == 0
    assert {line["server"] for line in lines(tmp_path)} == {stays.address, goes.address}
    assert len(lines(tmp_path)) == 20 and benchmark.workers[1].times_lost == 1
    assert f"{goes.address} does not answer" in said and (how == "gone" or f"HTTP {how}" in said)


def test_a_server_that_comes_back_takes_cases_again_and_not_its_old_jobs(start, tmp_path):
    stays, comes = start(seconds=0.05), start(seconds=0.05)
    cases = wanted(tmp_path, 40)
    port, again = comes.server_port, []

    def leave():
        while len(comes.drawn) < 3:
            time.sleep(0.005)
        comes.stop()
        time.sleep(0.5)
        new = Service.__new__(Service)
        new.__dict__ |= {k: v for k, v in comes.__dict__.items() if not k.startswith("_Base")}
        ThreadingHTTPServer.__init__(new, ("127.0.0.1", port), Handler)
        again.append(new)
        threading.Thread(target=new.serve_forever, args=(0.01,), daemon=True).start()

    thread = threading.Thread(target=leave)
    thread.start()
    result, benchmark, said = run(cases, tmp_path, stays, comes)
    thread.join()
    again[0].stop()
    assert result["made"] == 40 and len(lines(tmp_path)) == 40
    assert "answers again" in said and benchmark.workers[1].usable
    assert benchmark.workers[1].made > 4 and comes.deleted, "what was given back was left in its queue"
    assert comes.uploads == ["cat-cat.png"] * 2, "it may have come back with an empty folder"


def test_all_lost_is_an_error_and_the_same_run_continues(start, tmp_path):
    first, second, third = start(seconds=0.1), start(seconds=0.1), start()
    cases = wanted(tmp_path, 40)

    def lose():
        while len(first.drawn) < 4:
            time.sleep(0.005)
        first.stop()
        second.stop()

    threading.Thread(target=lose).start()
    with pytest.raises(RunError, match="No server is left") as caught:
        run(cases, tmp_path, first, second, patience=0.5)
    assert first.address in str(caught.value) and second.address in str(caught.value)
    before = len(lines(tmp_path))
    assert 4 <= before < 40
    result, *_ = run(cases, tmp_path, third)
    assert result == {"pictures": 40, "made": 40 - before, "failed": 0, "cases": 40}
    assert [line["name"] for line in lines(tmp_path)] == [case.name for case in cases]


def test_errors_of_cases_and_of_servers(start, tmp_path):
    """A bad case fails twice and is recorded; where memory is short every server may try; a server that fails all that
    others draw is left out."""
    small, other, large = start(fails={"cat 3": MEMORY, "cat 5": "odd"}), start(), start(seconds=0.03)
    other.fails = small.fails
    large.fails = {"cat 5": "odd"}
    cases = wanted(tmp_path, 12)
    result, *_ = run(cases, tmp_path, small, other, large)
    assert result["made"] == 11 and result["failed"] == 1
    found = {line["prompt"]: line for line in lines(tmp_path)}
    assert found["cat 3"]["server"] == large.address, "only this one has the memory"
    assert found["cat 5"]["status"] == "failed" and found["cat 5"]["error"] == "node 3 (KSampler): odd"
    one, *_ = run(wanted(tmp_path, 4), tmp_path, start(fails={"cat 3": MEMORY}), name="one")
    assert one["failed"] == 1 and "ran out of memory" in lines(tmp_path, "one")[3]["error"]

    broken, well = start(fails="CUDA error: an illegal memory access", seconds=0.001), start(seconds=0.05)
    result, benchmark, said = run(wanted(tmp_path, 30), tmp_path, broken, well, name="broken")
    assert result["made"] == 30 and result["failed"] == 0 and len(broken.jobs) <= 8
    assert f"{broken.address} fails what others draw" in said and benchmark.workers[0].out


def record(value):
    return lambda job: {job: value}


ODD = {
    "refusal of a proxy": ("prompt", {"error": "boom"}, 500),
    "refusal that is a list": ("prompt", [1], 400),
    "errors without texts": ("prompt", {"node_errors": {"3": {"errors": ["x"]}}}, 400),
    "job without a name": ("prompt", {"prompt_id": None}, 200),
    "history that is a list": ("history", [], 200),
    "history in no encoding": ("history", b"\xff{", 200),
    "history in error": ("history", {"error": {"message": "boom"}}, 500),
    "record that is text": ("history", record("x"), 200),
    "record without messages": ("history", record({"status": {"messages": None}, "outputs": {}}), 200),
    "outputs that are null": ("history", record({"outputs": None}), 200),
    "images that are null": ("history", record({"outputs": {"4": {"images": None}}}), 200),
    "no picture": ("history", record({"outputs": {"4": {}}}), 200),
    "texts that are null": ("history", record({"outputs": {"4": {"images": [{"filename": "5.png", "type": "output"}],
                                                                 "text": None}}}), 200),
    "queue in error": ("queue", {}, 500),
    "upload without a name": ("upload", {}, 200),
    "upload that is a list": ("upload", [], 200),
    "nodes that are a list": ("object_info", [{}], 200),
    "nodes that are numbers": ("object_info", {"KSampler": 1}, 200),
    "version that is none": ("system_stats", {"system": {"comfyui_version": {}}}, 200),
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_a_server_whose_answers_are_odd_costs_no_case(odd, start, tmp_path, capsys):
    """Whatever it says, the other one draws what it does not, and no case is taken for what ended it."""
    part, *answer = ODD[odd]
    parts = ("system_stats", "queue", "object_info")
    good, bad = start(seconds=0.03, parts=parts), start(parts=parts)
    bad.odd[part] = answer
    wanted(tmp_path, 1)
    (tmp_path / "list.json").write_text(
        json.dumps([{"prompt": f"cat {n}", "image_paths": ["cat.png"]} for n in range(10)])
    )
    (tmp_path / "flow.json").write_text(json.dumps(GRAPH))
    command = ["run", str(tmp_path / "list.json"), "--workflow", str(tmp_path / "flow.json"), "--out"]
    assert main([*command, str(tmp_path / "out"), "--server", f"{good.address},{bad.address}", "--patience", "5"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["made"], result["failed"]) == (10, 0)
    assert result["servers"][bad.address] == 0 or part in ("object_info", "system_stats")


def test_no_case_waits_for_a_server_that_hangs_from_the_start(start, tmp_path, capsys, monkeypatch):
    """It takes connections and never answers."""
    works, asked, held = start(seconds=0.02), [], []

    def take(server):
        while True:
            try:
                held.append(server.accept()[0])
            except OSError:
                return
            asked.append(held[-1].recv(1000).split(b"\r\n")[0])

    wait = urllib.request.urlopen
    monkeypatch.setattr(urllib.request, "urlopen", lambda request, timeout: wait(request, timeout=min(timeout, 1)))
    wanted(tmp_path, 1)
    (tmp_path / "list.json").write_text(
        json.dumps([{"prompt": f"cat {n}", "image_paths": ["cat.png"]} for n in range(60)])
    )
    (tmp_path / "flow.json").write_text(json.dumps(GRAPH))
    with socket.create_server(("127.0.0.1", 0)) as hangs:
        threading.Thread(target=take, args=(hangs,), daemon=True).start()
        address = f"http://127.0.0.1:{hangs.getsockname()[1]}"
        command = ["run", str(tmp_path / "list.json"), "--workflow", str(tmp_path / "flow.json")]
        assert main([*command, "--out", str(tmp_path / "out"), "--server", f"{works.address},{address}"]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert result["made"] == 60 and list(result["lost"]) == [address]
    assert f"{address} does not answer (timed out); waiting for it." in said.err
    assert set(asked) == {b"GET /system_stats HTTP/1.1"}


def test_a_server_that_never_ends_a_job_does_not_hold_the_run(start, tmp_path):
    hangs, works = start(seconds=3600), start(seconds=0.05)
    result, benchmark, said = run(wanted(tmp_path, 12), tmp_path, hangs, works, patience=1)
    assert result["made"] == 12 and "has finished nothing for 1 s" in said
    assert len(hangs.deleted) == 2 and not hangs.drawn


def test_a_service_with_the_least_of_the_interface(start, tmp_path, capsys):
    """Behind a path, a password or a key, without /queue, /object_info and /system_stats."""
    code = base64.b64encode(b"me:a b").decode()
    locked = start(prefix="/comfy/one", headers={"Authorization": f"Basic {code}"}, parts=())
    key = start(prefix="/v2", headers={"X-Key": "secret"}, parts=())
    Image.new("RGB", (32, 32)).save(tmp_path / "cat.png")
    (tmp_path / "list.json").write_text(
        json.dumps([{"prompt": f"cat {n}", "image_paths": ["cat.png"]} for n in range(3)])
    )
    (tmp_path / "flow.json").write_text(json.dumps(GRAPH))
    command = ["run", str(tmp_path / "list.json"), "--workflow", str(tmp_path / "flow.json")]
    address = locked.address.replace("//", "//me:a%20b@")
    assert main([*command, "--out", str(tmp_path / "a"), "--server", address]) == 0
    assert main([*command, "--out", str(tmp_path / "b"), "--server", key.address, "--header", "X-Key: secret"]) == 0
    said = capsys.readouterr()
    assert "does not show its queue" in said.err and json.loads(said.out.splitlines()[0])["pictures"] == 3
    written = "".join(path.read_text() for folder in "ab" for path in (tmp_path / folder).glob("*.json*"))
    assert not any(secret in said.err + said.out + written for secret in ("secret", "a%20b", "a b", code))
    assert main([*command, "--out", str(tmp_path / "c"), "--server", locked.address]) == 1
    assert "does not answer as a ComfyUI (HTTP 401" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "c"), "--server", "127.0.0.1:1", "--header", "odd"]) == 1
    assert "expected NAME: VALUE" in capsys.readouterr().err

    graph = {"nodes": [], "links": []}
    (tmp_path / "flow.json").write_text(json.dumps(graph))
    assert main([*command, "--out", str(tmp_path / "c"), "--server", address]) == 1
    assert "export the workflow from the editor in API format" in capsys.readouterr().err


def test_a_models_folder_that_no_server_has_is_said_too():
    nodes = {"SubjectLoadMLLM": {"input": {"required": {"mllm": [["other"], {}]}}, "output_node": True}}
    prompt = {"1": {"class_type": "SubjectLoadMLLM", "inputs": {"mllm": "InternVL3-8B-hf"}}}
    with pytest.raises(RunError, match="InternVL3-8B-hf, mllm of node 1"):
        check_equal([Found(Client("http://127.0.0.1:1"), "", nodes)], prompt)


def test_what_servers_lack_is_said_before_the_start(start, tmp_path, capsys):
    parts = ("system_stats", "queue", "object_info")
    whole, bare, old = start(parts=parts), start(parts=parts, lacks=["dit.safetensors"]), start(parts=parts)
    del old.nodes["TextEncode"]
    Image.new("RGB", (32, 32)).save(tmp_path / "cat.png")
    (tmp_path / "list.json").write_text(json.dumps([{"prompt": "cat", "image_paths": ["cat.png"]}]))
    (tmp_path / "flow.json").write_text(json.dumps(GRAPH))
    command = ["run", str(tmp_path / "list.json"), "--workflow", str(tmp_path / "flow.json"), "--out"]
    several = f"{whole.address},{bare.address}"
    assert main([*command, str(tmp_path / "a"), "--server", several, "--server", old.address]) == 1
    said = capsys.readouterr().err
    assert f"{bare.address}: dit.safetensors, unet_name of node 3 (KSampler)" in said
    assert f"{old.address}: the node TextEncode" in said and f"{whole.address}:" not in said
    assert not any(service.jobs for service in (whole, bare, old)) and not (tmp_path / "a").exists()

    gone = start()
    gone.stop()
    assert main([*command, str(tmp_path / "a"), "--server", f"{gone.address},{whole.address}/,{whole.address}"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["servers"] == {gone.address: 0, whole.address: 1} and list(result["lost"]) == [gone.address]
    assert [one.address for one in clients([" 127.0.0.1:8188 ,http://a/b/", "http://a/b"])] == [
        "http://127.0.0.1:8188",
        "http://a/b",
    ]


@pytest.mark.parametrize("address", ["file:///etc/hosts", "ftp://127.0.0.1", "javascript://x"])
def test_only_http_is_asked(address):
    with pytest.raises(HostError, match="is no address of a server"):
        Client(address)
