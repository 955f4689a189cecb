"""A published model equals the trained one, loads without this package, and has a model card."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from markdown_it import MarkdownIt
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from modeling_vljepa import LORA_MODULES_TO_SAVE, LORA_TARGET_MODULES, VLJEPAModel
from processing.output import OutputError
from tests.fake_hub import FakeHub
from tests.tiny import (
    run_elsewhere,
    tiny_model,
    tiny_processor,
    tiny_recipe,
    tiny_rows,
    tiny_tokenizer,
    tiny_writer,
)
from training.arguments import RecipeError
from training.hub import publishing
from training.hub.licences import UNKNOWN, licence_of
from training.hub.model_card import hub_task, protocol_line
from training.hub.publishing import verify, write_folder, write_probe
from training.loop.trainer import VLJEPATrainer
from training.publish import main

ROOT = Path(__file__).parents[2]
COMMIT = "abcdefab" * 5
PROTOCOL = {"candidates": 13, "frames": "1", "prompt": "the question", "split": "test"}
RESULTS = {
    "model": "sft",
    "benchmarks": {
        "easy_vqa": {
            "title": "easy_vqa",
            "reservations": [],
            "paper": None,
            "task": "vqa",
            "description": "Questions about shape and colour.",
            "protocol": PROTOCOL,
            "scores": {
                "accuracy": {
                    "value": 0.9123,
                    "low": 0.9011,
                    "high": 0.9234,
                    "n": 9673,
                    "baselines": {"chance": 0.0769, "question only": 0.667},
                }
            },
        },
        "msr_vtt": {
            "title": "MSR-VTT (879 of 1,000 clips)",
            "reservations": ["879 of 1,000 clips"],
            "paper": {"metric": "R@1", "table": "Table 1", "scores": {"VL-JEPA BASE": 40.0}},
            "task": "retrieval",
            "description": "Clips of one caption each.",
            "protocol": {"source_dataset": "mteb/MSR-VTT", "source_revision": COMMIT, "frames": 8},
            "scores": {
                "R@5": {"value": 0.655, "low": 0.6, "high": 0.7, "n": 879, "baselines": {}},
                "R@1": {
                    **{"value": 0.4321, "low": 0.4, "high": 0.47, "n": 879},
                    "baselines": {"chance": 0.001},
                },
            },
        },
    },
}
SOURCES = [
    {"rows": "/somewhere/mine.jsonl", "licence": "cc-by-4.0"},
    {"dataset": "owner/set", "streaming": True},
]
RECIPES = [
    {
        "model": {"vocab_size": 300},
        "data": {"sources": SOURCES},
        "training": {"output_dir": "runs/sft", "max_steps": 7},
    }
]
RUN = {"first_step": 1, "last_step": 7, "seconds": 5400.0, "device": "NVIDIA H100", "processes": 8}
RUNS = [{"stage": "sft", **RUN, "precision": "bf16"}]
HISTORY = [{"step": 1, "loss": 2.0, "chance_loss": 2.1}, {"step": 2, "loss": 1.0}]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run after training and evaluation."""
    folder = tmp_path_factory.mktemp("run") / "sft"
    names = {"text": "sentence-transformers/all-MiniLM-L6-v2"}
    tiny_model(backbones=names).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    (folder / "eval").mkdir()
    (folder / "eval" / "results.json").write_text(json.dumps(RESULTS))
    (folder / "recipes.yaml").write_text(yaml.safe_dump(RECIPES))
    (folder / "training_runs.json").write_text(json.dumps(RUNS))
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    return folder


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options that show rows and the address of the code."""
    rows = tiny_rows(tmp_path_factory.mktemp("rows"))
    return ["--example", str(rows), "--code-url", "https://host.test/open-vljepa"]


def command(model: Path, *options: str) -> list[str]:
    words = ["-m", "training.publish", "--model", str(model), "--repo", "me/tiny"]
    return [sys.executable, *words, *options]


def run(model: Path, hub: FakeHub, home: Path, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(model, *options),
        cwd=ROOT,
        env=os.environ | hub.environment(home),
        capture_output=True,
        text=True,
        check=False,
    )


def elsewhere(script: str, hub: FakeHub, home: Path, folder: Path) -> subprocess.CompletedProcess:
    """Run a script in a process that cannot import this repository's packages."""
    hide = "import sys\nhidden = ('modeling_vljepa', 'processing', 'training', 'eval')\n"
    hide += "sys.modules.update(dict.fromkeys(hidden))\n"
    environment = os.environ | hub.environment(home)
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
        [sys.executable, "-c", hide + script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def published(trained: Path, shown: list[str], tmp_path_factory: pytest.TempPathFactory):
    with FakeHub() as hub:
        home = tmp_path_factory.mktemp("home")
        result = run(trained, hub, home, "--private", "--space", "me/show", *shown)
        assert result.returncode == 0, result.stderr
        yield hub, home, result.stdout


# -- on the Hub ----------------------------------------------------------------------------


def test_publish_uploads_every_file_and_loads_the_model_back(published):
    hub, _, output = published
    files = hub.repositories["me/tiny"]
    assert hub.private["me/tiny"]
    for name in (
        "config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "target_tokenizer/tokenizer.json",
        "modeling_vljepa.py",
        "processing_vljepa.py",
        "pipeline_vljepa.py",
        "handler.py",
        "st_vljepa.py",
        "modules.json",
        "README.md",
        "results.json",
        "loss.png",
        "example.mp4",
        "examples.png",
        ".eval_results/msr_vtt.yaml",
        "LICENSE",
    ):
        assert name in files, name
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
    off = [float(found) for found in re.findall(r"off by ([\d.e+-]+)", output)]
    assert len(off) == 2 and max(off) <= 1e-6  # before and after the upload
    assert "sentence-transformers/all-MiniLM-L6-v2" in output  # the licence table
    space = hub.repositories["me/show"]
    assert {"app.py", "space/app.py", "README.md", "requirements.txt"} <= space.keys()
    assert any(name.startswith("space/examples/") for name in space)
    assert hub.variables["me/show"] == {"VLJEPA_MODEL": "me/tiny"}
    assert hub.commits == 2


@pytest.mark.slow
def test_published_model_loads_the_same_in_all_ways_without_this_package(
    published, trained, tmp_path
):
    hub, home, _ = published
    probe = tmp_path / "probe.safetensors"
    write_probe(str(trained), probe)
    script = f"""
import numpy as np, torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline
probe = load_file({str(probe)!r})
config = AutoConfig.from_pretrained("me/tiny", trust_remote_code=True)
model = AutoModel.from_pretrained("me/tiny", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("me/tiny", trust_remote_code=True)
assert processor.tokenizer.get_vocab() != processor.target_tokenizer.get_vocab()
assert config.model_type == "vljepa"
texts = ["a red ball", "something else"]
with torch.no_grad():
    target = model.encode_target(**processor(targets=texts))
assert (target - probe["target"]).abs().max() <= 1e-6
sentences = SentenceTransformer("me/tiny", trust_remote_code=True, device="cpu").encode(texts)
assert np.abs(sentences - probe["target"].numpy()).max() <= 1e-6
clip = np.arange(4 * 48 * 64 * 3, dtype=np.uint8).reshape(4, 48, 64, 3)
with torch.no_grad():
    predicted = model.predict(**processor(videos=clip, text="what ?"))
expected = dict(zip(texts, (predicted @ target.T)[0].tolist()))
ask = pipeline("visual-question-answering", model="me/tiny", trust_remote_code=True)
rank = pipeline("video-text-retrieval", model="me/tiny", trust_remote_code=True)
answers = ask(video=clip, question="what ?", candidates=texts)
assert {{a["answer"] for a in answers}} == set(texts)
for answer in answers:
    assert abs(answer["score"] - expected[answer["answer"]]) <= 1e-6
assert len(rank(video=clip, texts=texts)) == 2
print(type(model).__module__.split(".")[0], "equal")
"""
    result = elsewhere(script, hub, home, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == "transformers_modules equal"


@pytest.mark.slow
def test_published_code_is_not_executed_without_trust_remote_code(published, tmp_path):
    hub, home, _ = published
    for load in (
        "from transformers import AutoModel; AutoModel.from_pretrained('me/tiny', {})",
        "from sentence_transformers import SentenceTransformer; SentenceTransformer('me/tiny', {})",
    ):
        script = "import os, sys\n" + load.format("trust_remote_code=False")
        script += "\nprint('loaded')"
        result = elsewhere(script, hub, home / "untrusting", tmp_path)
        assert result.returncode != 0 and "loaded" not in result.stdout
        assert "trust_remote_code" in result.stderr
        modules = home / "untrusting" / "modules" / "transformers_modules"
        assert not list(modules.rglob("*vljepa*.py"))


@pytest.mark.slow
def test_publish_twice_gives_the_same_content(published, trained, shown):
    hub, home, _ = published
    before = dict(hub.repositories["me/tiny"])
    hub.repositories["me/tiny"]["stale.txt"] = b"from an earlier commit"
    result = run(trained, hub, home, *shown)
    assert result.returncode == 0, result.stderr
    assert hub.repositories["me/tiny"] == before


@pytest.mark.long
def test_publish_killed_and_repeated_gives_the_same_content(published, trained, shown, tmp_path):
    complete = published[0].repositories["me/tiny"]
    generator = random.Random(0)
    with FakeHub() as hub:
        for _ in range(6):
            process = subprocess.Popen(
                command(trained, *shown),
                cwd=ROOT,
                env=os.environ | hub.environment(tmp_path),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            time.sleep(generator.uniform(3, 25))
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            found = hub.repositories.get("me/tiny", {})
            assert set(found) in (
                set(),
                {".gitattributes"},
                set(complete),
            )  # never a part of the files
        result = run(trained, hub, tmp_path, *shown)
        assert result.returncode == 0, result.stderr
        assert hub.repositories["me/tiny"] == complete


# -- before and without the Hub ------------------------------------------------------------


@pytest.mark.slow
def test_publish_dry_run_sends_nothing(trained, tmp_path):
    with FakeHub() as hub:
        result = run(trained, hub, tmp_path, "--dry-run")
        assert result.returncode == 0, result.stderr
        assert hub.repositories == {} and not any(way == "POST" for way, _ in hub.log)
    for name in ("model.safetensors", "README.md", "pipeline_vljepa.py"):
        assert re.search(rf"[\d,]+  {re.escape(name)}$", result.stdout, re.MULTILINE)
    assert "Dry run: nothing was sent to me/tiny." in result.stdout


def test_publish_output_writes_what_would_be_sent(
    published, trained, shown, tmp_path, capsys, monkeypatch
):
    sent = dict(published[0].repositories["me/tiny"])
    del sent[".gitattributes"]  # the Hub's own
    monkeypatch.setattr("training.hub.publishing.upload", None)  # not called
    monkeypatch.setattr("training.hub.publishing.verify", lambda *_: 0.0)  # its process is slow
    folder = tmp_path / "new" / "folder"
    main([*command(trained)[3:], *shown, "--output", str(folder)])
    written = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert written == sent
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]  # no scratch is left
    output = capsys.readouterr().out
    assert re.search(
        r"fresh process: off by [\d.e+-]+\n.*folder has what me/tiny would get", output
    )
    with pytest.raises(RecipeError, match="--output: .*folder is not empty; give a new folder"):
        main([*command(trained)[3:], "--output", str(folder)])


def test_publish_output_is_absent_after_a_failed_check(trained, tmp_path, monkeypatch):
    def refuse(*arguments: object) -> float:
        raise RecipeError("other embeddings")

    monkeypatch.setattr("training.hub.publishing.verify", refuse)
    with pytest.raises(RecipeError, match="other embeddings"):
        main([*command(trained)[3:], "--output", str(tmp_path / "folder")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("https://user:secret@host.test/owner/name.git", "https://host.test/owner/name"),
        ("http://host.test:8080/owner/name/", "https://host.test/owner/name"),
        ("git@host.test:owner/name.git", "https://host.test/owner/name"),
        ("ssh://git@host.test:22/group/owner/name", "https://host.test/group/owner/name"),
        ("/srv/name.git", None),
        ("../name", None),
        (None, None),
    ],
)
def test_origin_url_is_a_web_address_without_secrets(address, url, tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    if address is not None:
        subprocess.run(["git", "-C", tmp_path, "remote", "add", "origin", address], check=True)
    monkeypatch.setattr(publishing, "ROOT", tmp_path)
    assert publishing.origin_url() == url


@pytest.mark.slow
def test_verify_raises_for_a_changed_weight(trained, tmp_path):
    """Positive control of every 'off by' above."""
    write_probe(str(trained), tmp_path / "probe.safetensors")
    copy = tmp_path / "copy"
    model = VLJEPAModel.from_pretrained(trained)
    with torch.no_grad():
        model.predictor_head.projection.bias[0] += 0.01
    model.save_pretrained(copy)
    tiny_processor().save_pretrained(copy)
    with pytest.raises(RecipeError, match="gives other embeddings than the trained model: off by"):
        verify(str(copy), tmp_path / "probe.safetensors")
    (copy / "modeling_vljepa.py").unlink()
    with pytest.raises(RecipeError, match="does not load in a fresh process"):
        verify(str(copy), tmp_path / "probe.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--repo", "me/with space"), "--repo: .*with space"),
        (("--repo", "a/b/c"), "--repo: "),
        (("--repo", "name"), "--repo: name names no owner; give user/name"),
        (("--space", "a/b/c"), "--space: "),
        (("--code-url", "host.test/code"), "--code-url: host.test/code is not a web address"),
        (("--output", __file__), f"--output: {__file__} is a file. Give a folder."),
        (("--example", "nowhere.jsonl"), "--example: cannot read nowhere.jsonl"),
        (("--model", "nowhere"), "--model: cannot load nowhere as a folder or Hub id"),
    ],
)
def test_publish_names_a_wrong_option(options, message, trained):
    given = {"--model": str(trained), "--repo": "me/tiny", **dict([options])}
    with pytest.raises((OutputError, RecipeError), match=message):
        main([word for pair in given.items() for word in pair])


def test_publish_output_refuses_options_that_send(trained, tmp_path, capsys):
    output = ["--output", str(tmp_path / "folder")]
    with pytest.raises(RecipeError, match="--space: --output sends nothing to the Hub"):
        main([*command(trained)[3:], *output, "--space", "me/show"])
    with pytest.raises(SystemExit):
        main([*command(trained)[3:], *output, "--dry-run"])
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.slow
def test_publish_adapter_names_its_base(trained, tmp_path):
    adapter = tmp_path / "adapter"
    lora = LoraConfig(
        target_modules=LORA_TARGET_MODULES,
        modules_to_save=LORA_MODULES_TO_SAVE,
        init_lora_weights=False,
    )
    adapted = get_peft_model(VLJEPAModel.from_pretrained(trained), lora).eval()
    adapted.save_pretrained(adapter)
    tiny_processor().save_pretrained(adapter)
    with pytest.raises(RecipeError, match="--base-repo: .* is an adapter; name the published"):
        main(["--model", str(adapter), "--repo", "me/tiny-lora"])
    with FakeHub() as hub:
        home = tmp_path / "home"
        assert run(trained, hub, home).returncode == 0
        result = run(adapter, hub, home, "--repo", "me/tiny-lora", "--base-repo", "me/tiny")
        assert result.returncode == 0, result.stderr
        files = hub.repositories["me/tiny-lora"]
        assert "adapter_model.safetensors" in files and "model.safetensors" not in files
        settings = json.loads(files["adapter_config.json"])
        assert settings["base_model_name_or_path"] == "me/tiny"
        assert str(tmp_path) not in str(files["adapter_config.json"])
    off = [float(found) for found in re.findall(r"off by ([\d.e+-]+)", result.stdout)]
    assert len(off) == 1 and off[0] <= 1e-6


def test_trainer_push_to_hub_calls_publish(tmp_path, monkeypatch):
    from training.train import main as train

    recipe = tiny_recipe(tiny_rows(tmp_path), max_steps=1, hub_model_id="me/tiny")
    trainer = train([str(recipe)])
    sent = []
    monkeypatch.setattr("training.loop.trainer.publish", lambda *a, **k: sent.append((a, k)))
    trainer.push_to_hub()
    options = {"private": trainer.args.hub_private_repo, "token": trainer.args.hub_token}
    assert sent == [((trainer.args.output_dir, "me/tiny"), options)]
    recipes = yaml.safe_load((tmp_path / "out" / "recipes.yaml").read_text())
    assert [stage["training"]["max_steps"] for stage in recipes] == [1]
    # A second stage keeps the first one's recipe.
    second = [f"model.checkpoint={tmp_path / 'out'}", f"training.output_dir={tmp_path / 'two'}"]
    train([str(recipe), *second, "model.config={}", "training.max_steps=2"])
    recipes = yaml.safe_load((tmp_path / "two" / "recipes.yaml").read_text())
    assert [stage["training"]["max_steps"] for stage in recipes] == [1, 2]
    runs = json.loads((tmp_path / "two" / "training_runs.json").read_text())
    assert [(run["stage"], run["first_step"], run["last_step"]) for run in runs] == [
        ("out", 1, 1),
        ("two", 1, 2),
    ]


@pytest.mark.parametrize("name", [None, "tiny"])
def test_trainer_push_to_hub_completes_the_name_of_the_repository(name, tmp_path, monkeypatch):
    trainer = VLJEPATrainer.__new__(VLJEPATrainer)
    arguments = {"hub_model_id": name, "hub_private_repo": True, "hub_token": "hf_x"}
    trainer.args = SimpleNamespace(output_dir="out", **arguments)
    sent = []

    def init_hf_repo(token: str, private: bool) -> None:
        trainer.hub_model_id = f"me/{name or 'out'}"

    monkeypatch.setattr(trainer, "init_hf_repo", init_hf_repo)
    monkeypatch.setattr(trainer, "save_model", lambda **_: None)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: True)
    monkeypatch.setattr("training.loop.trainer.publish", lambda *a, **k: sent.append((a, k)))
    trainer.push_to_hub()
    assert sent == [(("out", f"me/{name or 'out'}"), {"private": True, "token": "hf_x"})]


@pytest.mark.slow
def test_model_push_to_hub_sends_a_working_model_without_a_card_of_its_own(trained, tmp_path):
    push = f"""
from modeling_vljepa import VLJEPAModel
from processing import VLJEPAProcessor
for auto in (VLJEPAModel, VLJEPAProcessor):
    auto.from_pretrained({str(trained)!r}).push_to_hub("me/pushed")
"""
    ask = """
import numpy as np
from transformers import pipeline
ask = pipeline("visual-question-answering", model="me/pushed", trust_remote_code=True)
print(ask(video=np.zeros((4, 32, 32, 3), "uint8"), question="what ?", candidates=["a red ball"]))
"""
    with FakeHub() as hub:
        environment = os.environ | hub.environment(tmp_path / "home")
        subprocess.run([sys.executable, "-c", push], cwd=ROOT, env=environment, check=True)
        result = elsewhere(ask, hub, tmp_path / "home", tmp_path)
        assert result.returncode == 0, result.stderr[-3000:]
        assert "a red ball" in result.stdout
        card = hub.repositories["me/pushed"]["README.md"].decode()
    assert "[More Information Needed]" in card and "model-index" not in card


@pytest.mark.slow
def test_training_with_push_to_hub_publishes_the_model(tmp_path):
    options = {"push_to_hub": True, "hub_model_id": "me/fresh", "hub_private_repo": True}
    recipe = tiny_recipe(tiny_rows(tmp_path), max_steps=2, **options)
    with FakeHub() as hub:
        result = subprocess.run(
            [sys.executable, "-m", "training.train", str(recipe)],
            cwd=ROOT,
            env=os.environ | hub.environment(tmp_path / "home"),
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        files = hub.repositories["me/fresh"]
        assert hub.private["me/fresh"]
    assert {"model.safetensors", "pipeline_vljepa.py", "README.md", "loss.png"} <= files.keys()
    assert "max_steps: 2" in files["README.md"].decode()
    assert "off by" in result.stdout


# -- the card ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def card(published) -> ModelCard:
    return ModelCard(published[0].repositories["me/tiny"]["README.md"].decode())


def test_model_card_is_complete_and_its_numbers_are_the_results(card, published):
    text = card.text
    for left_over in ("[More Information Needed]", "{{", "{%", "TODO", "None", "undefined"):
        assert left_over not in text
    results = json.loads(published[0].repositories["me/tiny"]["results.json"])
    table = text[text.index("## Results") : text.index("## Intended use")]
    score = results["benchmarks"]["easy_vqa"]["scores"]["accuracy"]
    known = [score["value"], score["low"], score["high"], *score["baselines"].values()]
    for score in results["benchmarks"]["msr_vtt"]["scores"].values():
        known += [score["value"], score["low"], score["high"], *score["baselines"].values()]
    known = {f"{100 * share:.1f}" for share in known} | {"9673", "95", "40.0"}
    known |= {str(value) for value in PROTOCOL.values()} | {"8", "1", "5"}
    known |= {"879", "1", "000"}  # the pools
    assert set(re.findall(r"\d+(?:\.\d+)?", table)) <= known
    parts = text[text.index("## Architecture") : text.index("Videos are sampled")]
    counts = {f"{n:,}" for box in results["parameters"].values() for n in box.values()}
    cells = {cell.strip() for cell in parts.split("|")}
    assert {cell for cell in cells if re.fullmatch("[0-9,]+", cell)} <= counts
    assert f"{results['parameters']['all']['parameters']:,}" in cells


def test_model_card_states_code_time_hardware_and_data(card):
    text = card.text
    assert "[host.test/open-vljepa](https://host.test/open-vljepa)" in text
    assert "[arXiv:2512.10942](https://arxiv.org/abs/2512.10942)" in text
    assert "| sft | 1 to 7 | 1.5 h | 8 | NVIDIA H100 | bf16 |" in text
    assert "Together 1.5 h of wall time" in text
    assert "| `mine.jsonl` | cc-by-4.0 |" in text
    assert "| [`owner/set`](https://huggingface.co/datasets/owner/set) | unknown |" in text
    assert "no recipe states a licence" in text  # the cure of `unknown`
    assert card.data.datasets == ["owner/set"]
    assert card.data.library_name == "transformers"
    assert {"sentence-transformers", "video-text-to-text", "custom_code"} <= set(card.data.tags)
    for picture in ("loss.png", "examples.png"):
        assert f"]({picture})" in text


def test_model_card_tables_are_tables_to_a_markdown_parser(card):
    """A blank line between header, rule and rows would make text of them."""
    tokens = MarkdownIt("commonmark").enable("table").parse(card.text)
    tables = [token for token in tokens if token.type == "table_open"]
    rules = re.findall(r"^\|[-|]+\|$", card.text, re.MULTILINE)
    # architecture, runs, two benchmarks, the paper's numbers, licences, data
    assert len(tables) == len(rules) == 7
    cells = [token.content for token in tokens if token.type == "inline"]
    assert not [cell for cell in cells if cell.count("|") > 1]  # no row was left as text


def test_protocol_line_names_an_empty_prompt():
    assert protocol_line({"protocol": {"prompt": "", "rows_file": "a"}}) == (
        "prompt: none; rows file: a"
    )


def test_model_card_metadata_contain_scores_and_protocol(card, published):
    data = card.data
    assert data.pipeline_tag == "visual-question-answering"
    assert data.license == "apache-2.0"
    assert data.base_model == ["sentence-transformers/all-MiniLM-L6-v2"]
    result, *others = sorted(data.eval_results, key=lambda each: each.dataset_name)[::-1]
    assert result.metric_value == 0.9123 and result.dataset_args == PROTOCOL
    assert result.dataset_name == "easy_vqa" and result.task_name == "vqa"
    assert result.task_type == "visual-question-answering"  # of images: one frame each
    assert {each.dataset_name for each in others} == {"MSR-VTT (879 of 1,000 clips)"}
    assert {(each.dataset_type, each.dataset_revision) for each in others} == {
        ("mteb/MSR-VTT", COMMIT)
    }


def test_eval_results_have_the_main_score_of_data_of_the_hub(card, published):
    """The Hub requires the id of a data set there, and ranks one score of it."""
    files = published[0].repositories["me/tiny"]
    names = [name for name in files if name.startswith(".eval_results")]
    assert names == [".eval_results/msr_vtt.yaml"]
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[names[0]]))
    assert (entry.dataset_id, entry.task_id) == ("mteb/MSR-VTT", "default")
    assert (entry.dataset_revision, entry.value) == (COMMIT, 0.4321)
    assert entry.notes.startswith("MSR-VTT (879 of 1,000 clips); R@1; source dataset: mteb")
    assert "so scores on other data are not there" in card.text


def test_model_card_has_the_published_numbers_and_why_they_are_not_comparable(card):
    text = card.text
    assert "**MSR-VTT (879 of 1,000 clips)**: Clips of one caption each." in text
    assert "Not comparable with the published numbers: 879 of 1,000 clips. Published num" in text
    assert (
        "| R@5 | 65.5 | 60.0 to 70.0 | 879 | – |\n| R@1 | 43.2 | 40.0 to 47.0 | 879 | 0.1 |" in text
    )
    assert "| this model | 43.2 |\n| VL-JEPA BASE, published | 40.0 |" in text


@pytest.mark.parametrize(
    ("task", "frames", "name"),
    [
        ("vqa", "1", "visual-question-answering"),
        ("vqa", "1, 4", "video-text-to-text"),
        ("classification", "8", "video-classification"),
        ("retrieval", "8", "feature-extraction"),
        ("captioning", "1", "image-to-text"),
        ("streaming", 1, "video-text-to-text"),
    ],
)
def test_hub_task_depends_on_the_medium(task, frames, name):
    assert hub_task({"task": task, "protocol": {"frames": frames}}) == name


@pytest.mark.slow
def test_model_card_snippets_run_and_print_what_the_card_states(card, published, tmp_path):
    hub, home, _ = published
    snippets = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    result = elsewhere("".join(snippets), hub, home, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    [stated] = re.findall(r"```text\n(.*?)```", card.text, re.DOTALL)
    printed = result.stdout.splitlines()
    for line, expected in zip(printed, stated.splitlines(), strict=False):
        score, text = line.split(" ", 1)
        expected_score, expected_text = expected.split(" ", 1)
        assert text == expected_text and abs(float(score) - float(expected_score)) <= 1e-3
    assert "    'he rides a bike',  # the true one\n" in card.text
    assert len(stated.splitlines()) == 4 and printed[4].startswith("tensor")


@pytest.mark.slow
def test_model_card_snippets_run_without_an_example(tmp_path):
    tiny_model().save_pretrained(tmp_path / "run")
    tiny_processor().save_pretrained(tmp_path / "run")
    write_folder(tmp_path / "run", tmp_path / "me" / "bare", "me/bare")
    text = (tmp_path / "me" / "bare" / "README.md").read_text(encoding="utf-8")
    assert "a blank clip" in text and "these answers mean nothing" in text
    assert "examples.png" not in text and "Code for training" not in text
    # `from_pretrained` reads a folder of the repository's name before it asks the Hub.
    printed = run_elsewhere("".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), tmp_path)
    assert "'a red ball'" in printed and "tensor" in printed


def test_model_card_states_a_missing_evaluation(tmp_path):
    from training.hub.publishing import write_folder

    tiny_model().save_pretrained(tmp_path / "run")
    tiny_processor().save_pretrained(tmp_path / "run")
    write_folder(tmp_path / "run", tmp_path / "repo", "me/bare")
    text = (tmp_path / "repo" / "README.md").read_text(encoding="utf-8")
    assert "This model has not been evaluated." in text
    assert "No training recipe is recorded" in text and "model-index" not in text
    assert "Training time and hardware are not recorded" in text
    assert text.count("| random weights | none | yes | none |") == 3


# -- licences ------------------------------------------------------------------------------


@pytest.mark.slow
def test_publish_prints_notes_on_restricted_licences(tmp_path, capsys):
    names = {
        "vision": "facebook/vjepa2-vitl-fpc64-256",
        "predictor": "meta-llama/Llama-3.2-1B",
        "text": "google/embeddinggemma-300m",
    }
    tiny_model(backbones=names).save_pretrained(tmp_path / "run")
    tiny_processor().save_pretrained(tmp_path / "run")
    main(["--model", str(tmp_path / "run"), "--repo", "me/mine", "--dry-run"])
    output = capsys.readouterr().out
    assert "requires a name that begins with 'Llama'" in output
    assert ("no link to the code; give --code-url" in output) == (publishing.origin_url() is None)
    assert "yes, with conditions" in output and "ai.google.dev/gemma/terms" in output
    assert "No licence file found for predictor (meta-llama/Llama-3.2-1B)" in output
    main(["--model", str(tmp_path / "run"), "--repo", "me/Llama-mine", "--dry-run"])
    assert "requires a name" not in capsys.readouterr().out


def test_licence_of_uses_the_longest_prefix():
    assert licence_of("facebook/vjepa2-vitl-fpc64-256").name == "mit"
    assert licence_of("facebook/dinov3-vits16").name == "dinov3-license"
    assert licence_of("google/embeddinggemma-300m").name == "gemma"
    for source in ("facebook/PE-Core-L14-336", "PE-Core-L14-336.pt", "timm/PE-Core-L-14-336"):
        assert licence_of(source).name == "apache-2.0"
    assert licence_of("somebody/model") is UNKNOWN


def test_write_licences_copies_the_backbones_licence_files(tmp_path):
    from training.hub.publishing import write_licences

    backbone, folder = tmp_path / "llama", tmp_path / "repo"
    backbone.mkdir()
    folder.mkdir()
    (backbone / "LICENSE.txt").write_text("the agreement")
    (backbone / "USE_POLICY.md").write_text("the policy")
    absent = write_licences(folder, {"predictor": str(backbone), "text": "gone/model"})
    assert (folder / "licences" / "predictor" / "LICENSE.txt").read_text() == "the agreement"
    assert (folder / "licences" / "predictor" / "USE_POLICY.md").exists()
    assert absent == ["text (gone/model): unknown licence"]
    assert "Apache License" in (folder / "LICENSE").read_text(encoding="utf-8")


def test_published_weights_equal_the_trained_ones_bitwise(published, trained, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(published[0].repositories["me/tiny"]["model.safetensors"])
    sent, kept = load_file(path), load_file(trained / "model.safetensors")
    assert sent.keys() == kept.keys()
    assert all(torch.equal(sent[name], kept[name]) for name in kept)
    save_file(sent, path)  # readable as plain safetensors


# -- with a Y-Decoder ------------------------------------------------------------------------


@pytest.mark.slow
def test_published_decoder_generates_the_same_text(tmp_path):
    model, source, folder = tiny_writer(), tmp_path / "decoder", tmp_path / "repo"
    tiny_model().save_pretrained(source)  # the checkpoint before `training.train_decoder`
    model.config.auto_map = VLJEPAModel.from_pretrained(source).config.auto_map
    model.save_pretrained(source)
    processor = tiny_processor()
    processor.decoder_tokenizer = tiny_tokenizer()
    processor.save_pretrained(source)
    write_probe(str(source), tmp_path / "probe.safetensors")
    write_folder(source, folder, "me/tiny")
    assert verify(str(folder), tmp_path / "probe.safetensors") <= 1e-6

    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "A decoder turns" in card and "# a generated answer" in card
    [row] = [line for line in card.splitlines() if line.startswith("| Y-Decoder |")]
    assert "llama, 2 layers, reads the embedding as 4 tokens" in row
    table = card[card.index("| module |") :].split("\n\n")[0]
    assert table.splitlines()[-2] == row  # no gap in the table

    printed = run_elsewhere(
        """
import numpy as np
from transformers import pipeline
ask = pipeline("visual-question-answering", model="repo", trust_remote_code=True)
clip = np.zeros((4, 48, 64, 3), np.uint8)
print(ask(video=clip, question="what ?", generate_kwargs={"max_new_tokens": 4})[0]["answer"])
""",
        tmp_path,
    )
    pixels = processor(videos=np.zeros((4, 48, 64, 3), np.uint8), text="what ?")
    generated = model.generate(
        **pixels, max_new_tokens=4, output_logits=True, return_dict_in_generate=True
    )
    # The random model's choice must not depend on rounding: its best logit is well ahead.
    for logits in generated.logits:
        best, second = logits[0].topk(2).values
        assert best - second > 1e-4
    [text] = processor.batch_decode(generated.sequences, skip_special_tokens=True)
    assert printed == text.strip()
