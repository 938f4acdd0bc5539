"""Mistakes that the queue refuses before anything is loaded, on their node: by the host's own validation."""

import asyncio
import inspect
import json
import re
from collections import Counter
from types import SimpleNamespace

import comfy_extras.nodes_custom_sampler as custom
import execution
import folder_paths
import pytest
from subject_dla.common import prompt_graph
from subject_dla.loaders import folders as folder_names
from subject_dla.loaders import host
from subject_dla.nodes import SubjectExtension, marks, queued_graph
from subject_dla.nodes import stages as stage_nodes
from subject_dla.nodes.schema import with_title
from subject_dla.nodes.translation import translate
from subject_dla.sampling.stages import preset

import nodes as host_nodes

OURS = asyncio.run(SubjectExtension().get_node_list())


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for node in (*OURS, custom.KSamplerSelect, custom.SamplerCustomAdvanced):
        monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, node.__name__, node)


def errors(node: str, kind: str = "custom_validation_failed", **graph) -> list[str]:
    """What the host says of a node of a graph that is queued: the details of its errors of ours."""
    prompt = {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in graph.items()}

    async def validate():
        queued_graph.remember({"prompt": prompt})
        takes = len(inspect.signature(execution.validate_prompt).parameters)
        return await execution.validate_prompt(*("job", prompt, None)[:takes])

    found = asyncio.run(validate())[3].get(node, {"errors": []})["errors"]
    details = [error["details"] for error in found if error["type"] == kind]
    for text in details:  # each has a Chinese form with its values
        said = text.split(" - ", 1)[1] if kind == "custom_validation_failed" else text
        lines = zip(said.split("\n"), translate(said, "zh").split("\n"), strict=True)
        assert all(re.search("[\u4e00-\u9fff]", line.split("：", 1)[-1]) for _, line in lines), said
        assert set(re.findall(r"\d\.\d+|\w+\.safetensors", said)) <= set(
            re.findall(r"\d\.\d+|\w+\.safetensors", translate(said, "zh"))
        )
    return details


def schedule(clock="flow_time", tau1=0.95, tau2=0.85, name="paper") -> dict:
    return {"preset": name, "clock": clock, "tau1": tau1, "tau2": tau2}


def staged(sampler="euler", **values) -> dict:
    """Apply Stages before a KSampler whose picture is saved."""
    sampled = {"model": ["2", 0], "positive": ["9", 0], "negative": ["9", 0], "latent_image": ["8", 0]}
    sampled |= {"seed": 1, "steps": 4, "cfg": 1.0, "sampler_name": sampler, "scheduler": "simple", "denoise": 1.0}
    return {
        "n1": ("UNETLoader", {"unet_name": "a.safetensors", "weight_dtype": "default"}),
        "2": ("SubjectApplyStages", {"model": ["n1", 0], **schedule(**values)}),
        "3": ("KSampler", sampled),
        "4": ("VAEDecode", {"samples": ["3", 0], "vae": ["7", 0]}),
        "5": ("SaveImage", {"images": ["4", 0], "filename_prefix": "x"}),
        "7": ("VAELoader", {"vae_name": "v.safetensors"}),
        "8": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
        "9": ("SubjectStageSchedule", schedule()),  # of a wrong type, so that other errors are there, too
    }


@pytest.mark.parametrize("values, words", [
    ({"tau1": 0.5}, ["tau1 is 0.5", "tau2 0.85", "below tau1"]),
    ({"clock": "steps"}, ["tau1 is 0.95", "above tau1", "flow times"]),
    ({"tau1": 1.5}, ["tau1 is 1.5", "between 0 and 1"]),
    ({"tau1": 1.0}, ["tau1 is 1", "first stage"]),
    ({"clock": "steps", "tau1": 0.2, "tau2": 0.4, "sampler": "dpm_adaptive"}, ["dpm_adaptive", "flow_time"]),
])  # fmt: skip
def test_thresholds_that_make_no_schedule_are_refused_by_their_names(values, words):
    (text,) = errors("2", **staged(**values))
    marked = "clock" if "sampler" in values else "tau1"
    assert text.startswith(f"{marked} - Apply Stages: ") and all(word in text for word in words), text


@pytest.mark.parametrize("values", [
    {}, {"tau1": 0.9, "tau2": 0.9}, {"clock": "steps", "tau1": 0.2, "tau2": 0.4}, {"sampler": "dpm_adaptive"},
    {"clock": "steps", "tau1": 0.95, "name": "semantics_first"}, {"tau1": 0.1, "tau2": 0.9, "name": "both"},
])  # fmt: skip
def test_what_ran_is_not_refused(values):
    assert errors("2", **staged(**values)) == []


@pytest.mark.parametrize("value", ["abc", "", "0,5"])
def test_what_is_no_number_is_the_hosts_to_say(value):
    """Typed into a graph by hand; ours compared it with numbers, and said so in Python's words."""
    assert errors("2", **staged(tau1=value)) == []


def test_numbers_typed_as_text_are_judged_as_the_host_converts_them():
    (text,) = errors("2", **staged(tau1="0.5"))
    assert "tau1 is 0.5 and tau2 0.85" in text


def test_a_schedule_that_is_connected_takes_the_place_of_the_widgets():
    graph = staged(clock="steps")
    graph["2"][1]["stages"] = ["9", 0]
    assert errors("2", **graph) == []


def test_a_connected_schedule_on_steps_is_refused_with_samplers_that_choose_their_own():
    graph = staged(sampler="dpm_fast")
    graph["2"][1]["stages"] = ["9", 0]
    graph["9"] = ("SubjectStageKeyframe", keyframe(0.2, "steps"))
    (text,) = errors("2", **graph)
    assert text.startswith("stages - Apply Stages: ") and "dpm_fast" in text
    graph["9"] = ("SubjectStageKeyframe", keyframe(0.2, "flow_time"))
    assert errors("2", **graph) == errors("9", **graph) == []


def keyframe(start, clock="flow_time", previous=None) -> dict:
    given = {"start": start, "mllm_strength": 1.0, "vae_strength": 1.0, "blend": "hold", "clock": clock}
    return given | ({"previous": [previous, 0]} if previous else {})


def keyframes(*values, before=None) -> dict:
    """Apply Stages with keyframes 1, 2, … of (start, clock) in a chain, the first behind a schedule if there is one."""
    graph = staged()
    graph["2"][1]["stages"] = [f"k{len(values)}", 0]
    if before:
        graph["k0"] = ("SubjectStageSchedule", before)
    for number, (start, clock) in enumerate(values, 1):
        previous = f"k{number - 1}" if number > 1 or before else None
        graph[f"k{number}"] = ("SubjectStageKeyframe", keyframe(start, clock, previous))
    return graph


def test_keyframes_are_refused_on_the_one_that_does_not_fit_the_chain():
    graph = keyframes((1.0, "flow_time"), (0.5, "flow_time"), (0.9, "flow_time"), (0.2, "flow_time"))
    (text,) = errors("k3", **graph)
    assert text.startswith("start - Stage Keyframe: Stages out of order: keyframe 3") and "0.9" in text
    assert errors("k2", **graph) == errors("k4", **graph) == []
    (text,) = errors("k2", **keyframes((1.0, "flow_time"), (0.5, "steps")))
    assert text.count("Stage Keyframe") == 1 and "'steps'" in text and "'flow_time'" in text
    (text,) = errors("k1", **keyframes((3.0, "flow_time")))
    assert "starts at 3" in text
    graph = keyframes((0.9, "flow_time"), before=schedule(name="semantics_first"))
    assert errors("k1", **graph) == []
    (text,) = errors("k1", **keyframes((0.97, "flow_time"), before=schedule(name="semantics_first")))
    assert "keyframe 3 starts at 0.97" in text
    graph["k0"][1]["tau1"] = ["n1", 0]  # linked: known when it runs
    assert errors("k1", **graph) == []


@pytest.mark.parametrize("values, words", [
    ({}, []), ({"tau1": "0.9, x"}, ["tau1 holds 'x'"]), ({"tau1": "0.2", "tau2": "0.9"}, ["No tau2 of 0.9"]),
    ({"combine": "pairs", "tau2": "0.9"}, ["pairs"]), ({"vae_strengths": "3"}, ["vae_strengths", "0 to 2"]),
])  # fmt: skip
def test_lists_of_a_sweep_are_refused_on_the_sweep(values, words):
    graph = staged()
    graph["2"][1]["stages"] = ["9", 0]
    given = {**schedule(tau1="0.97, 0.95", tau2="0.9, 0.7, 0.6"), "combine": "grid", "controls": True}
    graph["9"] = ("SubjectThresholdSweep", {**given, "mllm_strengths": "1", "vae_strengths": "1", **values})
    found = errors("9", **graph)
    assert len(found) == bool(words)
    assert all(text.startswith("tau1 - Threshold Sweep: ") and word in text for text in found for word in words), found


def models(*values) -> dict:
    """A chain of Apply Stages of (tau1, clock), m1 first, before the sampler."""
    graph = staged()
    for number, (start, clock) in enumerate(values, 1):
        model = f"m{number - 1}" if number > 1 else "2"
        graph[f"m{number}"] = ("SubjectApplyStages", {"model": [model, 0], **schedule(clock, start, start)})
    graph["3"][1]["model"] = [f"m{len(values)}", 0]
    return graph


@pytest.mark.parametrize("chain", [keyframes, models])
def test_a_chain_is_read_once_however_long_it_is(chain, monkeypatch):
    """A chain of 1,500 keyframes kept the server's thread for a minute and a half, as each node read all before it."""
    calls = Counter()

    def count(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given: calls.update([name]) or function(*given))

    count(prompt_graph, "inputs_of")
    count(queued_graph, "inputs_of")
    count(stage_nodes, "with_keyframe")

    def calls_of(length):
        calls.clear()
        assert errors("2", **chain(*((1 - n / 1000, "flow_time") for n in range(1, length + 1)))) == []
        return Counter(calls)

    few, many = calls_of(40), calls_of(160)
    assert many["with_keyframe"] == (160 if chain is keyframes else 0)
    assert few["inputs_of"] > 40 and many["inputs_of"] <= 4 * few["inputs_of"]


def test_a_schedule_has_so_many_keyframes():
    graph = keyframes(*((1 - n / 1000, "flow_time") for n in range(300)))
    (text,) = errors("k257", **graph)
    assert "Stage Keyframe: The stage schedule has 257 keyframes, expected at most 256." in text
    assert errors("k256", **graph) == errors("k258", **graph) == []


def test_equal_thresholds_mean_an_empty_middle_stage():
    assert preset("paper", tau1=0.9, tau2=0.9) == preset("two_stage", tau1=0.9)


def sampled(node="SubjectStagedGuider", clock="flow_time", **inputs) -> dict:
    """A node that samples with stages, before a picture that is saved."""
    given = {"model": ["n1", 0], "positive": ["6", 0], "stages": ["9", 0], "cfg": 1.0, **inputs}
    custom = {"noise": ["6", 0], "guider": ["2", 0], "sampler": ["10", 0], "sigmas": ["6", 0], "latent_image": ["8", 0]}
    return staged() | {
        "2": (node, given),
        "3": ("SamplerCustomAdvanced", custom),
        "6": ("SubjectStageSchedule", schedule()),
        "9": ("SubjectStageSchedule", schedule(clock, 0.2, 0.4) if clock == "steps" else schedule()),
        "10": ("KSamplerSelect", {"sampler_name": inputs.get("sampler_name", "euler")}),
    }


@pytest.mark.parametrize("prompts", ["", " \n\n", "# a fox\n#"])
def test_a_list_without_a_prompt_is_refused_before_anything_is_loaded(prompts):
    listed = {"1": ("SubjectPromptList", {"prompts": prompts, "prefix": "subject/"})}
    listed["2"] = ("SaveImage", {"images": ["3", 0], "filename_prefix": ["1", 1]})
    listed["3"] = ("EmptyImage", {"width": 16, "height": 16, "batch_size": 1, "color": 0})
    (text,) = errors("1", **listed)
    assert text.startswith("prompts - Prompt List: prompts has no line with text")
    listed["1"][1]["prompts"] = "# a fox\na fox"
    assert errors("1", **listed) == []


@pytest.mark.parametrize("prefix, words", [
    ("../x", "leads out of its folder"), ("/tmp/x", "leads out of its folder"), ("C:\\x", "leads out of its folder"),
    ("a\nb", "control characters"), ("x" * 199, "200 bytes a name"), ("aux.", "keeps for devices"),
])  # fmt: skip
def test_a_prefix_that_save_image_refuses_is_refused_before_anything_is_loaded(prefix, words):
    listed = {"1": ("SubjectPromptList", {"prompts": "a fox", "prefix": prefix})}
    listed["2"] = ("SaveImage", {"images": ["3", 0], "filename_prefix": ["1", 1]})
    listed["3"] = ("EmptyImage", {"width": 16, "height": 16, "batch_size": 1, "color": 0})
    (text,) = errors("1", **listed)
    assert text.startswith(f"prefix - Prompt List: prefix is {prefix[:9]!r}"[:-1]) and words in text
    listed["4"] = ("SubjectPromptList", {"prompts": "a fox"})
    listed["1"][1]["prompts"] = ["4", 0]
    assert [words in text for text in errors("1", **listed)] == [True]
    listed["1"][1].update(prompts="# a fox")
    assert [text.split(" - ")[0] for text in errors("1", **listed)] == ["prompts", "prefix"]
    for fine in ("", "subject/", "a/b-", "%year%/", "aux"):
        listed["1"][1].update(prompts="a fox", prefix=fine)
        assert errors("1", **listed) == []


def test_cfg_without_a_negative_is_refused():
    (text,) = errors("2", **sampled(cfg=2.5))
    assert text.startswith("cfg - Staged Guider: cfg is 2.5") and "negative" in text
    assert errors("2", **sampled(cfg=2.5, negative=["6", 0])) == errors("2", **sampled(cfg=1.0)) == []
    (text,) = errors("2", **sampled(cfg=-1.0))
    assert "expected 0 to 100" in text


@pytest.mark.parametrize("node", ["SubjectStagedGuider", "SubjectStagedSampler"])
def test_samplers_with_steps_of_their_own_are_refused_on_the_clock_steps(node):
    graph = sampled(node, "steps", sampler_name="dpm_adaptive")
    if node == "SubjectStagedSampler":  # it samples itself
        graph["4"] = ("VAEDecode", {"samples": ["2", 0], "vae": ["7", 0]})
    (text,) = errors("2", **graph)
    marked = "stages" if node == "SubjectStagedGuider" else "sampler_name"
    assert text.startswith(f"{marked} - Staged ") and "dpm_adaptive" in text and "flow_time" in text
    graph["2"][1]["cfg"] = 3.0
    assert {text.split(" - ")[0] for text in errors("2", **graph)} == {"cfg", marked}
    graph["2"][1]["cfg"] = 1.0
    assert errors("2", **{**graph, "9": ("SubjectStageSchedule", schedule())}) == []


def pipeline(**files) -> dict:
    """Load Subject Pipeline before a KSampler; the VAE and `there.safetensors` are there."""
    given = {"diffusion_model": "there.safetensors", "vae": "there.safetensors", "mllm": "m", "dla": "none", **files}
    dtypes = {"weight_dtype": "default", "mllm_weight_dtype": "default"}
    return staged() | {"n1": ("SubjectLoadPipeline", {**given, **dtypes})}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Model folders with one file each, and one MLLM."""
    for kind in ("diffusion_models", "vae", "dla"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "there.safetensors").touch()
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], {".safetensors"}))
    monkeypatch.setattr(folder_names, "mllm_names", lambda: ["m"])
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})


@pytest.mark.parametrize("absent", [("vae", "dla"), ("diffusion_model", "vae", "mllm", "dla"), ("mllm",), ()])
def test_each_missing_file_is_marked_once_and_no_other(folders, absent):
    graph = pipeline(**{name: f"{name}-gone.safetensors" for name in absent})
    found = errors("n1", **graph)
    assert [text.split(" - ")[0] for text in found] == list(absent)
    for name, text in zip(absent, found):
        assert text.startswith(f"{name} - Load Subject Pipeline: models/{name}") and "press R" in text
        assert [other for other in absent if f"{other}-gone" in text] == [name]
    assert errors("n1", "value_not_in_list", **graph) == []


def test_files_that_come_from_another_node_are_judged_when_it_runs(folders):
    graph = pipeline(dla="gone.safetensors", mllm=["n2", 0]) | {"n2": ("SubjectPromptList", {"prompts": "m"})}
    assert [text.split(" - ")[0] for text in errors("n1", **graph)] == ["dla"]


@pytest.mark.parametrize("known", [True, False])
def test_two_nodes_of_a_class_with_other_files_missing(folders, known, monkeypatch):
    """On a host that does not let know of which it asks, both are marked at both inputs, in words that are right."""
    if not known:
        monkeypatch.setattr(marks, "validated_node", lambda: None)
    other = pipeline(dla="dla-gone.safetensors")["n1"]
    graph = pipeline(vae="vae-gone.safetensors") | {"n2": other, "7": ("VAELoader", {"vae_name": "there.safetensors"})}
    graph["4"][1]["vae"] = ["n2", 1]
    by_input = dict(text.split(" - ") for text in errors("n1", **graph))
    assert "vae-gone" in by_input.pop("vae") and [*by_input] == ([] if known else ["dla"])
    assert all("is right" in text for text in by_input.values())
    by_input = dict(text.split(" - ") for text in errors("n2", **graph))
    assert "dla-gone" in by_input.pop("dla") and [*by_input] == ([] if known else ["vae"])
    assert all("is right" in text for text in by_input.values())


def training(**changed) -> dict:
    """Train DLA with these widgets; None takes one out."""
    widgets = {"name": "run", "stage": "1: MLLM tokens", "steps": 3, "lora_rank": 0, "seed": 0, "learning_rate": 1e-4}
    widgets |= {"resolution": 512, "batch_size": 1, "accumulate": 1, "data": "cats", **changed}
    widgets = {name: value for name, value in widgets.items() if value is not None}
    return staged() | {"4": ("SubjectTrainDLA", {"model": ["n1", 0], "vae": ["7", 0], "mllm": ["9", 0], **widgets})}


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """The host's input folder, empty, and its output folder."""
    (tmp_path / "input").mkdir()
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path / "input"))
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "output"))
    return tmp_path / "input"


@pytest.mark.parametrize("data", ["offered", "", None])
def test_without_training_data_the_node_says_what_to_do(inputs, data):
    """As the editor queues its only choice, a saved workflow without one, and the API without the input."""
    if data == "offered":
        train = next(node for node in OURS if node.__name__ == "SubjectTrainDLA")
        (data,) = next(one for one in train.define_schema().inputs if one.id == "data").options
    (text,) = errors("4", "exception_during_validation", **training(data=data))
    assert text.startswith("Train DLA: no data is chosen in ComfyUI's input folder") and "press R" in text
    assert errors("4", "required_input_missing", **training(data=data)) == []


@pytest.mark.parametrize("changed, words", [
    ({"name": ""}, "run.name is ''"), ({"stage": "3"}, "stage is '3'"), ({"steps": -1}, "training.steps is -1"),
    ({"learning_rate": 2.0}, "training.learning_rate is 2.0"), ({"start_lora": "x"}, "models/loras has no 'x'"),
    ({"options": "training.warmup = x"}, "options: not TOML"), ({"options": 'run.name = "C:\\data"'}, "In TOML a back"),
    ({"options": "x.y = 1"}, "options: 'x' is no setting"), ({"options": "data.source = 'x'"}, "is the input `data`"),
    ({"options": "training.x = 1"}, "[training] has no 'x'"), ({"options": "training.mllm_only = 1"}, "shares of the"),
    ({"options": "dla.pooling = 'x'"}, "expected one of softmax"), ({"options": "dla.layer_subset = 1"}, "a list"),
    ({"options": "training.checkpointing = 1"}, "expected true or false"),
    ({"options": "run.dtype = 1"}, "expected text"),
    ({"options": "run.save_every = -1"}, "a whole number from 0 up"), ({"data": "dogs"}, "no data 'dogs'"),
    ({"options": "run.start_dla = '../x'"}, "is no name in models/dla"), ({"options": "run.start_dla = 'x'"}, "no DLA"),
    ({"options": "run.start_dla = 'x.safetensors'"}, "models/dla has no 'x.safetensors'"),
    ({"options": "run.start_lora = 'x'"}, "models/loras has no 'x'"), ({"options": "data.source"}, "not TOML"),
])  # fmt: skip
def test_what_train_dla_refuses_before_it_runs_is_said_in_chinese_too(inputs, changed, words):
    """By `errors`."""
    (inputs / "cats").mkdir()
    for name in ("1.jpg", "1.txt"):
        (inputs / "cats" / name).touch()
    (text,) = errors("4", "exception_during_validation", **training(**changed))
    assert text.startswith("Train DLA: ") and words in text, text


def test_what_a_run_that_is_there_refuses_is_said_in_chinese_too(inputs, tmp_path, monkeypatch):
    """By `errors`: other settings than it began with, a damaged checkpoint, a file that it did not make."""
    dla = tmp_path / "models" / "dla"
    dla.mkdir(parents=True)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "dla", ([str(dla)], {".safetensors"}))
    for name in ("1.jpg", "1.txt"):
        (inputs / "cats" / name).parent.mkdir(exist_ok=True)
        (inputs / "cats" / name).touch()
    (dla / "run.safetensors").touch()
    (text,) = errors("4", "exception_during_validation", **training())
    assert "dla/run.safetensors is there already" in text
    checkpoint = tmp_path / "output" / "subject_dla" / "runs" / "run" / "checkpoint-00000001"
    checkpoint.mkdir(parents=True)
    for name in ("dla.safetensors", "optimizer.safetensors", "state.json"):
        (checkpoint / name).touch()
    (text,) = errors("4", "exception_during_validation", **training())
    assert "checkpoint-00000001: state.json" in text and "Move this folder away" in text
    state = {"step": 1, "losses": [1.0], "validation": {}, "identity": "x", "mllm": "m", "family": "flux"}
    state |= {"data": {"fingerprint": "x"}, "optimizer": {}, "recipe": {"training": {"seed": 5}}}
    (checkpoint / "state.json").write_text(json.dumps(state))
    (text,) = errors("4", "exception_during_validation", **training())
    assert "was begun with training.seed = 5, now it is 0" in text


def test_a_users_own_language_is_that_of_the_request(tmp_path, monkeypatch):
    """With --multi-user the host says of requests whose they are; without a choice the editor has the browser's."""
    users = {"anna": '{"Comfy.Locale": "zh"}', "ben": '{"Comfy.Locale": "en"}', "cyr": "{}", "dan": "["}
    for name, settings in users.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "comfy.settings.json").write_text(settings)

    class Manager:
        def get_request_user_filepath(self, request, file, type="userdata", create_dir=True):
            if (user := request.headers.get("comfy-user", "default")) not in users:
                raise KeyError(f"Unknown user: {user}")
            assert not create_dir
            return str(tmp_path / user / file)

    server = SimpleNamespace(user_manager=Manager(), app=SimpleNamespace(middlewares=[]), on_prompt_handlers=[])
    monkeypatch.setattr(host, "_server", lambda: server)
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    host.remember_requests()
    host.remember_requests()
    (remember,) = server.app.middlewares

    async def answer(request):
        return host.editor_language()

    def language(user, browser=""):
        headers = {"comfy-user": user} | ({"Accept-Language": browser} if browser else {})
        return asyncio.run(remember(SimpleNamespace(headers=headers), answer))

    assert [language(user) for user in users] == ["zh", "en", "en", "en"]
    assert language("ben", "zh-CN,zh;q=0.9") == "en"
    assert language("cyr", "zh-CN,zh;q=0.9") == language("dan", "zh") == "zh"
    assert language("nobody", "fr;q=1") == "fr" and language("cyr", "../x") == "../x" and translate("a", "../x") == "a"
    assert host.editor_language() == "en", "a run does not say whose it is"


def test_saved_training_data_that_are_not_offered_are_judged_by_the_node(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    (tmp_path / "bare").mkdir()
    (text,) = errors("4", "exception_during_validation", **training(data="bare"))
    assert text.startswith("Train DLA: the folder 'bare' has no captions") and "SUBJECT/PICTURE.txt" in text


def test_messages_are_in_the_language_of_the_editor(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    (text,) = errors("2", **staged(tau1=1.5))
    assert text.startswith("tau1 - Apply Stages: tau1 is 1.5")
    settings = tmp_path / "default" / "comfy.settings.json"
    settings.parent.mkdir()
    for damaged in ("{", "[]", '{"Comfy.Locale": 3}', '{"Comfy.Locale": "../../x"}', '{"Comfy.Locale": "fr"}'):
        settings.write_text(damaged)
        assert errors("2", **staged(tau1=1.5)) == [text]
    settings.write_text('{"Comfy.Locale": "zh"}')
    (chinese,) = errors("2", **staged(tau1=1.5))
    assert chinese.startswith("tau1 - 应用阶段：tau1 为 1.5") and "flow_time" in chinese


def test_errors_of_a_run_begin_with_the_display_name():
    guider = next(node for node in OURS if node.__name__ == "SubjectStageKeyframe")
    with pytest.raises(ValueError, match="^Stage Keyframe: .*starts at 3"):
        guider.execute(3.0, 1.0, 1.0, "hold", "flow_time")
    sampler = next(node for node in OURS if node.__name__ == "SubjectStagedSampler")
    text = "Apply Stages: its sigmas are [0.0]"
    assert with_title(sampler, text) == "Staged Sampler: its sigmas are [0.0]"
    assert with_title(next(node for node in OURS if node.__name__ == "SubjectApplyStages"), text) == text
