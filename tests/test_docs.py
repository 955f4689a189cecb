"""The guide to streams runs as it stands."""

import re
from pathlib import Path

import numpy as np

from tests.pipelines.test_stream_session import scenes
from tests.tiny import run_elsewhere, tiny_processor, tiny_writer, write_clip
from training.hub.publishing import write_folder

ROOT = Path(__file__).parents[1]


def test_the_guides_snippets_run_in_turn(tmp_path):
    """With a published model at the place where the Hub's would be, and the installed library."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/streaming.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    tiny_writer().save_pretrained(tmp_path / "trained")
    tiny_processor().save_pretrained(tmp_path / "trained")
    write_folder(tmp_path / "trained", tmp_path / "user" / "name", "user/name")
    write_clip(tmp_path / "kitchen.mp4", np.stack([frame for _, frame in scenes([40, 30])]))
    library = f"import sys\nsys.path.append({str(ROOT)!r})\n"
    printed = run_elsewhere(library + "".join(blocks), tmp_path)
    windows = re.findall(r"^(\S+) (\S+) torch.Size\(\[\d+\]\)$", printed, re.MULTILINE)
    assert [(float(start), float(end)) for start, end in windows] == [
        (start, start + 1.8) for start in (0, 1, 2, 3, 4, 5)
    ]
    reports = re.findall(r"StreamReport\(frames=(\d+)", printed)
    assert len(reports) == 2 and len(set(reports)) == 1
    assert re.search(r"'text': '(cuts an onion|washes a pan|nothing happens)'", printed)
