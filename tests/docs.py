"""Type every command and Python block of the documents, in order, as a reader would.

    python -m tests.docs [PAGE.md ...]

Run it in a clone after `make demo`, in its environment. It prints each command with its seconds.
The exit code is 1 if one failed. `tests/test_docs.py` types the short ones on less data.
"""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from training.hub.publishing import write_folder

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
LANGUAGES = {"sh", "python", "json", "yaml", "text"}

# Commands and Python blocks that are not typed: a pattern, and the reason.
NOT_TYPED = {
    r"^make (demo|test)\b": "CI runs it",
    r"^make (full|streams NAME=full|small|ablations)\b": "takes hours",
    r"^make pictures\b|demo_data\.pictures": "downloads packages with npm",
    r"runs/pictures-seed": "needs the model of `make pictures`",
    r"runs/(full|small)-seed": "needs a model that takes hours",
    r"decoder_smollm2": "takes hours on two cores",
    r"facebook/|meta-llama/|google/": "gated weights, and the network",
    r"recipes/paper/": "needs the data and the GPUs of a cluster",
    r"recipes/small/(stage2|sft)_": "needs a GPU, and the reader's data",
    r"data/pictures/|runs/own_data": "needs the data of `make pictures`",
    r"^sbatch ": "needs Slurm",
    r"\bHOST\b": "needs several machines",
    r"--source (0|rtsp:)": "needs a camera",
    r"--space |push_to_hub": "sends to the Hub",
    r"report_to=wandb": "needs wandb",
    r"^tensorboard ": "serves until it is stopped",
    r"captions_train2017": "needs the annotations of COCO",
    r"sys\.argv\[1\]": "is examples/ask.py, which a command runs",
    r"--benchmarks eval/paper": "needs the data of the paper's benchmarks",
    r"rooms\.yaml": "needs three clips; tests/eval/test_evaluation_docs.py runs the entry",
    r"\[mteb\]|eval\.mteb_": "needs mteb; tests/eval/test_mteb.py runs it",
}
# Commands that take more than a minute after `make demo`; a test does not type them.
LONG = {
    r"^python -m training\.train_decoder training/recipes/babyai_decoder\.yaml$": "nine minutes",
    r"^python -m training\.demo_data\.streams": "two minutes",
    r"^python -m training\.demo_data\.backbones": "downloads 270 MB from PyPI",
    r"data/backbones": "needs the backbones that the command above downloads",
    r"^python -m training\.memory": "four minutes",
    r"^python -m eval\.compare": "needs the results of `--tasks all`",
    r"--tasks all$|--tasks babyai_captioning": "measures thousands of rows",
    r"^(torchrun|accelerate) ": "several processes; tests of training start them",
    r"benchmarks\.": "a benchmark at the paper's size",
    r"^python -m experiments\.": "trains for hours",
    r"^rm experiments/|^git diff docs/evidence": "is a part of measuring a row anew",
    r"runs/tokens": "trains twice as long as the demonstration",
}
HUB = "user/name"
DECODER = "runs/demo-seed0/decoder"


@dataclass(frozen=True)
class Typed:
    """One thing that a reader types.

    Attributes:
        page (`str`): the document.
        kind (`str`): "sh" for a command, "python" for a whole block.
        text (`str`): the command on one line, or the block.
    """

    page: str
    kind: str
    text: str

    def reason(self, patterns: dict[str, str]) -> str | None:
        """Return the reason of the first pattern that matches, or `None`."""
        found = (why for pattern, why in patterns.items() if re.search(pattern, self.text))
        return next(found, None)


def fenced(page: str) -> list[tuple[str, str]]:
    """Return language and text of every fenced block of a document."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    return [(language, block) for language, block in blocks]


def typed(page: str) -> Iterator[Typed]:
    """Yield what a document asks its reader to type, in order."""
    for language, block in fenced(page):
        if language == "python":
            yield Typed(page, "python", block)
        elif language == "sh":
            for line in block.replace("\\\n", " ").splitlines():
                # A comment follows two spaces; a `#` in a quoted text does not.
                command = re.sub(
                    r"\s{2,}#.*|^#.*", "", re.sub(r"(?<=\S) {2,}(?=[^#\s])", " ", line)
                )
                if command.strip():
                    yield Typed(page, "sh", command.strip())


def stand_in() -> None:
    """Write the folder `user/name`, with the content that publishing would put on the Hub.

    `from_pretrained("user/name")` reads a folder of that name before it asks the Hub.
    """
    if not Path(HUB).is_dir():
        write_folder(Path(DECODER), Path(HUB), HUB)


def run_python(block: str, page: str, namespace: dict) -> None:
    """Execute a Python block in the namespace of the page's earlier blocks."""
    if HUB in block:
        stand_in()
    exec(compile(block, page, "exec"), namespace)


def main(pages: list[str]) -> int:
    """Type everything once; return the number of failures."""
    failed, done = 0, set()
    for page in pages or PAGES:
        namespace: dict = {
            "__name__": "__main__"
        }  # the Python blocks of a page continue each other
        for each in typed(page):
            shown = each.text.splitlines()[0] if each.kind == "python" else each.text
            if why := each.reason(NOT_TYPED):
                print(f"{page}: not typed ({why}): {shown}", flush=True)
                continue
            if each.kind == "sh" and each.text in done:
                print(f"{page}: typed above: {shown}", flush=True)
                continue
            done.add(each.text)
            start = time.monotonic()
            try:
                if each.kind == "python":
                    run_python(each.text, page, namespace)
                else:
                    subprocess.run(["bash", "-c", each.text], check=True, stdin=subprocess.DEVNULL)
            except Exception as error:
                failed += 1
                print(f"{page}: FAILED: {shown}: {error!r}", flush=True)
            else:
                seconds = time.monotonic() - start
                print(f"{page}: {seconds:.0f} s: {shown}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
