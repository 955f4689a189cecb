"""Publication of a trained VL-JEPA: the repository's folder, a loading check, the upload."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.dynamic_module_utils import get_relative_import_files

from eval.models import check_vljepa
from modeling_vljepa import VLJEPAForConditionalGeneration, VLJEPAModel
from modeling_vljepa.hub_files import write_hub_files
from processing import VLJEPAProcessor, read_rows
from processing.output import check_output_folder, writing
from processing.rows import media_of
from training.arguments import RecipeError
from training.hub.examples import answer_examples
from training.hub.licences import UNKNOWN, licence_of, licence_table
from training.hub.model_card import write_card
from training.hub.training_facts import read_runs
from training.model.checkpoint_files import find_file, load
from training.model.parameters import count_parameters

ROOT = Path(__file__).parents[2]
# Our modules that `space/` imports, by their packages.
SPACE_IMPORTS = {
    "modeling_vljepa/pipelines": ("decoding.py", "stream_session.py"),
    "processing": ("containers.py", "images.py"),
}
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "USE_POLICY.md", "NOTICE", "NOTICE.txt")
ST_SETTINGS = "sentence_transformer_vljepa.json"
TOLERANCE = 1e-6  # for embeddings: weights at other memory addresses change their last bits

# Run in a fresh process that cannot import this package.
VERIFY = """
import sys
sys.modules.update(dict.fromkeys(("modeling_vljepa", "processing", "training", "eval")))
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor
import torch
source, probe = sys.argv[1:]
model = AutoModel.from_pretrained(source, trust_remote_code=True, dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
probe = load_file(probe)
texts = processor(text=["what is there ?", "a"], targets=["a red ball", "something else"])
assert all(torch.equal(texts[k], probe[k]) for k in texts), "the tokenizers give other tokens"
with torch.no_grad():
    predicted = model.predict(probe["pixels"], texts["input_ids"], texts["attention_mask"])
    target = model.encode_target(texts["target_input_ids"], texts["target_attention_mask"])
worst = max((predicted - probe["predicted"]).abs().max(), (target - probe["target"]).abs().max())
print(worst.item())
"""


# -- the folder ----------------------------------------------------------------------------


def load_trained(
    path: str,
) -> tuple[VLJEPAModel | VLJEPAForConditionalGeneration, VLJEPAProcessor]:
    """Load the model, with its Y-Decoder if it has one, and the processor of a folder.

    An adapter's folder gives the base model with the adapter, without a Y-Decoder.
    """
    model = load(AutoModel, "--model", path)
    check_vljepa("--model", path, model.config, "model cards describe a VL-JEPA")
    is_adapter = (Path(path) / "adapter_config.json").is_file()
    if model.config.decoder_config is not None and not is_adapter:
        model = load(AutoModelForImageTextToText, "--model", path)
    return model.eval(), load(AutoProcessor, "--model", path)


def read_results(source: Path, model: VLJEPAModel) -> dict[str, Any]:
    """Return the parameter counts, and the evaluation in `eval/results.json` if it exists."""
    path = source / "eval" / "results.json"
    measured = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {"benchmarks": {}, **measured, "parameters": count_parameters(model)}


def read_answers(path: str) -> list[str]:
    """Return the distinct targets of a JSONL file of questions, in alphabetical order."""
    try:
        rows, _ = read_rows(path)
    except OSError as error:
        raise RecipeError(f"--answers: cannot read {path}: {error}") from error
    return sorted({row["target"] for row in rows if row["query"]})


def write_weights(
    source: Path, folder: Path, model: VLJEPAModel, processor: VLJEPAProcessor, base: str | None
) -> list[str]:
    """Write weights, configuration, code and processor.

    Returns: the Hub ids of the models that this one is made from, for the card.
    """
    processor.save_pretrained(folder)
    if base is None:
        model.save_pretrained(folder, max_shard_size="5GB")
        keep_default_query(source, folder)
        return sorted({name for name in model.config.backbones.values() if "/" in name})
    write_hub_files(folder, model.config.prompts)  # for sentence-transformers, which reads adapters
    keep_default_query(source, folder)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(source / name, folder)
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    # peft wrote a local path here, and `auto_mapping` names our package, which users do not have.
    settings |= {"base_model_name_or_path": base, "auto_mapping": None}
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True))
    return [base]


def keep_default_query(source: Path, folder: Path) -> None:
    """Copy the query that replaces the model's own in sentence-transformers, if there is one."""
    if (source / ST_SETTINGS).is_file():
        shutil.copy(source / ST_SETTINGS, folder)


def drop_loading_options(folder: Path) -> None:
    """Remove from the tokenizers' settings how they were loaded, which transformers saves too.

    It depends on the environment, and the same model must give the same files.
    """
    for path in folder.rglob("tokenizer_config.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        for name in ("is_local", "local_files_only"):
            settings.pop(name, None)
        text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def write_licences(folder: Path, backbones: dict[str, str]) -> list[str]:
    """Copy our licence and those in the backbones' repositories.

    Returns: a line for each backbone without a licence file.
    """
    shutil.copy(ROOT / "LICENSE", folder)
    absent = []
    for part, source in sorted(backbones.items()):
        try:
            found = [path for name in LICENCE_FILES if (path := find_file(source, name))]
        except OSError:  # no such repository, or no network: the licence is reported as missing
            found = []
        target = folder / "licences" / part
        for path in found:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target / Path(path).name)
        if not found:
            absent.append(f"{part} ({source}): {licence_of(source).url or 'unknown licence'}")
    return absent


def origin_url() -> str | None:
    """Return the web address of the clone's origin without user or password.

    It is `None` for a clone without an origin, or with one on a disk.
    """
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(ROOT), "remote", "get-url", "origin"]
    address = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    # https://user:token@host/owner/name.git, ssh://git@host:22/owner/name, git@host:owner/name
    form = r"(?:(?:https?|ssh)://(?:[^@/]+@)?([^:/]+)(?::\d+)?/|[^@/:]+@([^:/]+):)(.+?)(?:\.git)?/?"
    found = re.fullmatch(form, address)
    return f"https://{found[1] or found[2]}/{found[3]}" if found else None


def write_folder(
    source: Path,
    folder: Path,
    repo: str,
    *,
    base: str | None = None,
    answers: str | None = None,
    example: str | None = None,
    code_url: str | None = None,
) -> tuple[dict[str, str], list[str]]:
    """Write the contents of the Hub repository into a new folder.

    Returns: the source of the weights of each part, and the backbones without a licence file.
    """
    model, processor = load_trained(str(source))
    examples = None if example is None else answer_examples(model, processor, example)
    if answers is not None:
        model.config.answers = read_answers(answers)
    results = read_results(source, model)
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results, indent=2, sort_keys=True))
    builds_on = write_weights(source, folder, model, processor, base)
    absent = write_licences(folder, model.config.backbones)
    drop_loading_options(folder)
    if examples is not None:
        shutil.copy(media_of(examples.first.row), folder / examples.file)
    recipes = source / "recipes.yaml"
    write_card(
        folder,
        repo=repo,
        model=model,
        processor=processor,
        results=results,
        recipes=yaml.safe_load(recipes.read_text(encoding="utf-8")) if recipes.is_file() else [],
        runs=read_runs(source),
        trainer_state=source / "trainer_state.json",
        base_model=builds_on,
        code_url=code_url,
        examples=examples,
    )
    return model.config.backbones, absent


# -- the check -----------------------------------------------------------------------------


@torch.no_grad()
def write_probe(source: str, path: Path) -> None:
    """Write example inputs and the trained model's embeddings of them."""
    model, processor = load_trained(source)
    model.float()
    side = processor.video_processor.crop_size["height"]
    pixels = torch.randn(2, 2, 3, side, side, generator=torch.Generator().manual_seed(0))
    texts = processor(text=["what is there ?", "a"], targets=["a red ball", "something else"])
    embeds = {
        "pixels": pixels,
        "predicted": model.base_model.predict(pixels, texts["input_ids"], texts["attention_mask"]),
        "target": model.base_model.encode_target(
            texts["target_input_ids"], texts["target_attention_mask"]
        ),
    }
    save_file({**texts, **embeds}, path)


def verify(source: str, probe: Path) -> float:
    """Load a folder or repository in a fresh process without this package, and compare embeddings.

    Returns: the largest difference from the embeddings in `probe`.

    Raises:
        RecipeError: it does not load, or gives other embeddings.
    """
    with tempfile.TemporaryDirectory() as elsewhere:
        # An empty code cache: an older copy of the same module would be loaded from a full one.
        environment = {**os.environ, "HF_MODULES_CACHE": elsewhere}
        environment.pop("PYTHONPATH", None)
        run = subprocess.run(
            [sys.executable, "-c", VERIFY, source, str(probe)],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    if run.returncode:
        raise RecipeError(f"{source} does not load in a fresh process:\n{run.stderr[-2000:]}")
    worst = float(run.stdout.split()[-1])
    if not worst <= TOLERANCE:  # not `>`: comparisons with NaN are false
        raise RecipeError(
            f"{source} gives other embeddings than the trained model: off by {worst}."
        )
    return worst


# -- the upload ----------------------------------------------------------------------------


def upload(folder: Path, repo: str, *, private: bool | None, token: str | None = None) -> str:
    """Replace the contents of the repository by this folder in one commit; return its address.

    Nothing is visible before the commit. Large files from an interrupted upload are not sent again.
    """
    api = HfApi(token=token)
    url = api.create_repo(repo, private=private, exist_ok=True)
    api.upload_folder(
        repo_id=repo, folder_path=folder, delete_patterns="*", commit_message="Publish VL-JEPA"
    )
    return str(url)


def write_space(folder: Path) -> None:
    """Write the files of a Space: the package `space`, our modules that it imports, `app.py`.

    The Space loads model and processor with the code of the published model, so it needs no other
    module of ours, and our classes must not be registered in it.
    """
    settings = ("README.md", "requirements.txt")  # the Hub reads them in the top folder only
    left_out = shutil.ignore_patterns(*settings, "make_examples.py", "__pycache__")
    shutil.copytree(ROOT / "space", folder / "space", ignore=left_out)
    for name in settings:
        shutil.copy(ROOT / "space" / name, folder)
    for source, names in SPACE_IMPORTS.items():
        package = folder / source
        package.mkdir(parents=True)
        for path in (package, *package.parents[: source.count("/")]):
            (path / "__init__.py").touch()
        for name in names:
            module = ROOT / source / name
            for path in (module, *get_relative_import_files(module)):
                shutil.copy(path, package)
    (folder / "app.py").write_text("from space.app import main\n\nmain()\n")


def publish_space(repo: str, space: str, *, private: bool | None, token: str | None = None) -> str:
    """Create a Space that shows the published model; return its address."""
    api = HfApi(token=token)
    url = api.create_repo(
        space, repo_type="space", space_sdk="gradio", private=private, exist_ok=True
    )
    api.add_space_variable(space, "VLJEPA_MODEL", repo)
    with tempfile.TemporaryDirectory() as folder:
        write_space(Path(folder))
        api.upload_folder(
            repo_id=space,
            repo_type="space",
            folder_path=folder,
            delete_patterns="*",
            commit_message=f"Show {repo}",
        )
    return str(url)


def check_arguments(
    source: str,
    repo: str,
    *,
    output: str | None,
    base_repo: str | None,
    code_url: str | None,
    space: str | None,
) -> None:
    """Check the arguments of `publish` before it works.

    Raises:
        OutputError: `output` cannot be written.
        RecipeError: a name or address is invalid, `output` has files, or an adapter has no
            published base.
    """
    for option, name in (("--repo", repo), ("--space", space)):
        try:
            validate_repo_id(name or repo)
        except HFValidationError as error:
            raise RecipeError(f"{option}: {error}") from error
        if "/" not in (name or repo):
            raise RecipeError(f"{option}: {name} names no owner; give user/name.")
    if code_url is not None and not re.match(r"https?://[^/]", code_url):
        raise RecipeError(f"--code-url: {code_url} is not a web address; begin with https://.")
    if output is not None:
        if space is not None:
            raise RecipeError("--space: --output sends nothing to the Hub; leave one out.")
        check_output_folder("--output", output)
        if Path(output).exists() and any(Path(output).iterdir()):
            raise RecipeError(f"--output: {output} is not empty; give a new folder.")
    if (Path(source) / "adapter_config.json").is_file() and base_repo is None:
        raise RecipeError(
            f"--base-repo: {source} is an adapter; name the published model that it adapts."
        )


def publish(
    source: str,
    repo: str,
    *,
    private: bool | None = None,
    dry_run: bool = False,
    output: str | None = None,
    base_repo: str | None = None,
    answers: str | None = None,
    example: str | None = None,
    code_url: str | None = None,
    space: str | None = None,
    token: str | None = None,
) -> None:
    """Write the repository's folder, check it, upload it and check the upload.

    Args:
        source: folder of a trained VL-JEPA or an adapter.
        repo: the repository's name on the Hub.
        private: create the repository as private; `None` is the Hub account's default.
        dry_run: stop before the upload.
        output: a new folder for the repository's content, which is then not uploaded.
        base_repo: for an adapter, the published model that it adapts.
        answers: JSONL of questions; their answers are the choices of the VQA pipeline.
        example: JSONL of rows; a clip of one is published with the model, the card shows six.
        code_url: address of the training code's repository; `None` is the clone's origin.
        space: name of a Space that shows the model.

    Raises:
        OutputError: the folder cannot be written.
        RecipeError: the model does not load, an argument is invalid, or the published model gives
            other embeddings.
        TokenModelError: the model predicts tokens.
    """
    check_arguments(
        source, repo, output=output, base_repo=base_repo, code_url=code_url, space=space
    )
    is_adapter = (Path(source) / "adapter_config.json").is_file()
    scratch_in = None
    if output is not None:  # next to its final path, so that it is renamed and not copied
        scratch_in = Path(output).absolute().parent
        with writing(output):
            scratch_in.mkdir(parents=True, exist_ok=True)
    code_url = origin_url() if code_url is None else code_url
    if code_url is None:
        print(
            "Note: this clone has no origin, so the card has no link to the code; give --code-url."
        )
    with tempfile.TemporaryDirectory(dir=scratch_in) as scratch:
        folder, probe = Path(scratch) / "repo", Path(scratch) / "probe.safetensors"
        with writing(scratch, "" if output else "TMPDIR names the folder."):
            write_probe(source, probe)
            backbones, absent = write_folder(
                Path(source),
                folder,
                repo,
                base=base_repo if is_adapter else None,
                answers=answers,
                example=example,
                code_url=code_url,
            )
        print(licence_table(backbones))
        print("\n".join(f"No licence file found for {line}" for line in absent))
        warn_of_licences(repo, backbones)
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            print(f"{path.stat().st_size:>14,}  {path.relative_to(folder)}")
        if not is_adapter:  # an adapter loads its base from the Hub, so it is checked there
            print(f"Loaded in a fresh process: off by {verify(str(folder), probe):.1e}", flush=True)
        if output is not None:
            with writing(output):
                folder.rename(output)  # replaces an empty folder
            print(f"{output} has what {repo} would get; nothing was sent.")
            return
        if dry_run:
            print(f"Dry run: nothing was sent to {repo}.")
            return
        try:
            url = upload(folder, repo, private=private, token=token)
            print(f"Loaded back from {url}: off by {verify(repo, probe):.1e}", flush=True)
            if space is not None:
                print(publish_space(repo, space, private=private, token=token))
        except HfHubHTTPError as error:
            raise RecipeError(f"the Hub refused the upload: {error}") from error


def warn_of_licences(repo: str, backbones: dict[str, str]) -> None:
    """Print notes on a licence's condition for the repository's name, and on unknown licences."""
    for part, source in backbones.items():
        licence = licence_of(source)
        if licence.name.startswith("llama") and not repo.split("/")[-1].startswith("Llama"):
            print(f"Note: the {licence.name} licence requires a name that begins with 'Llama'.")
        if licence is UNKNOWN:
            print(f"Note: the licence of {source} ({part}) is unknown; check it before publishing.")
