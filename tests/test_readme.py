"""The README's example is the file it names, and it runs."""

import re
import subprocess
import sys
from pathlib import Path

from tests.tiny import noise, tiny_model, tiny_processor, write_clip

ROOT = Path(__file__).parent.parent


def test_the_example_stands_in_the_readme() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks == [(ROOT / "examples" / "ask.py").read_text()]


def test_the_example_answers_and_finds(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    clips = tmp_path / "data" / "demo" / "babyai" / "clips"
    clips.mkdir(parents=True)
    for number in range(3):
        write_clip(clips / f"test_{number}.mp4", noise(number + 1, 40, 40, 3))
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / "ask.py", "model"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    answers, found = run.stdout.splitlines()[-2:]
    similarities = re.findall(r"'(\w+)': (-?[\d.e-]+)", answers)
    assert [answer for answer, _ in similarities] == ["zero", "one", "two", "three", "four"]
    assert all(-1 <= float(value) <= 1 for _, value in similarities)
    assert found in [f"data/demo/babyai/clips/test_{number}.mp4" for number in range(3)]
