"""Each entry of eval/paper/world.yaml on a tiny set with the published names and columns."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from eval.benchmarks import load_benchmarks
from eval.results import TaskResult
from eval.task import Task
from eval.tasks import TASKS
from tests.paper_files import write_csv, write_json
from tests.shade_model import DARKEST, MEAN, PAPER, STD, STEP, ShadeModel, measure, write_media

Ends = tuple[int, int]


class EndsModel(ShadeModel):
    """A model that sees the first and the last frame of a clip.

    Args:
        ends: embedding of each clip by the numbers of both frames; normalised here.
        texts: similarities of each text to the unit vectors of the clips' space.
    """

    def __init__(self, ends: dict[Ends, Sequence[float]], texts: dict[str, Sequence[float]]):
        # One more coordinate gives all texts one length, so that their order is as given.
        longest = 1 + max((sum(x * x for x in found) for found in texts.values()), default=0)
        last = {text: (longest - sum(x * x for x in found)) ** 0.5 for text, found in texts.items()}
        width = len(next(iter(ends.values()))) + 1
        super().__init__([[0.0] * width], {t: [*found, last[t]] for t, found in texts.items()})
        self.ends = {pair: torch.tensor([*found, 0.0]) for pair, found in ends.items()}
        self.frames: list[int] = []

    def encode_video(self, pixel_values_videos: torch.Tensor) -> torch.Tensor:
        """Return the numbers of the first and the last frame as one visual token: `(B, 1, 2)`."""
        grey = pixel_values_videos.mean(dim=(3, 4)) * STD + MEAN  # (B, T, 3)
        numbers = (255 * grey.mean(dim=2) - DARKEST) / STEP  # (B, T)
        self.frames.append(numbers.shape[1])
        if numbers.shape[1] == 4:  # states, of two frames each
            assert (numbers[:, [0, 2]] - numbers[:, [1, 3]]).abs().max() < 0.2
        return numbers[:, None, [0, -1]]

    def predict(
        self, visual_embeds: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        self.asked += self.processor.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        pairs = [tuple(each) for each in visual_embeds[:, 0].round().int().tolist()]
        return F.normalize(torch.stack([self.ends[pair] for pair in pairs]), dim=-1)


def measure_ends(
    name: str,
    data: Path,
    ends: dict[Ends, Sequence[float]],
    texts: dict[str, Sequence[float]] | None = None,
) -> tuple[TaskResult, EndsModel]:
    [benchmark] = load_benchmarks(PAPER / "world.yaml", [name], data)
    model = EndsModel(ends, texts or {})
    return TASKS[benchmark.task].evaluate(Task(model, model.processor, benchmark)), model


# -- WorldPrediction-WM --------------------------------------------------------------------------


def segment(uid: str, video: str, start: float, end: float) -> dict:
    times = {"segment_start_time": start, "segment_end_time": end}
    return {"segment_uid": f"segment|{uid}", "video": video, **times}


def world_prediction_record(first: int, last: int, truth: int, missing: str = "") -> dict:
    """Return a record whose states are the clips `first` and `last` of one video, and whose
    candidates are the clips 4 to 7 of another."""
    candidates = [
        segment(f"c{index}", missing or "others", 0.4 * index, 0.4 * (index + 1))
        | {"action_label": f"action {index}"}
        for index in range(4)
    ]
    return {
        # The video's name has a suffix here, and those of the candidates have none.
        "states": segment("s", "states.mp4", 0.4 * first, 0.4 * (last + 1)),
        "candidates": candidates,
        "ground_truth": f"segment|c{truth}",
    }


def write_world_prediction(data: Path) -> None:
    records = {
        "COIN": {
            "u1": world_prediction_record(0, 2, truth=1),
            "u2": world_prediction_record(1, 2, truth=2),
            "u3": world_prediction_record(0, 2, truth=1, missing="gone"),
        },
        "EPIC-KITCHENS-100": {"u1": world_prediction_record(0, 1, truth=1)},
    }
    folder = data / "world_prediction"
    write_json(folder / "WorldPrediction-WM.json", records)
    for group in records:
        write_media(folder / f"videos/{group}/states.mp4", 0, 1, 2)
        write_media(folder / f"videos/{group}/others.webm", 4, 5, 6, 7)


def test_paper_world_prediction_gives_the_scores_computed_by_hand(tmp_path):
    write_world_prediction(tmp_path)
    candidates = {4: [1, 0, 0], 5: [0, 1, 0], 6: [0.6, 0.8, 0], 7: [0, 0, 1]}
    states = {
        (0, 2): [0.1, 1, 0],  # nearest to candidate 1, which is right
        (1, 2): [0, 0, 1],  # nearest to candidate 3, and 2 is right
        (0, 1): [0.1, 1, 0],  # nearest to candidate 1, which is right
        (2, 2): [0.6, 0.8, 0],  # the final state of the first two rows: candidate 2
        (1, 1): [1, 0, 0],  # that of the last row: candidate 0
    }
    ends = {(clip, clip): found for clip, found in candidates.items()} | states
    result, model = measure_ends("world_prediction_wm", tmp_path, ends)

    accuracy = result.scores["accuracy"]
    assert (accuracy.value, accuracy.n, accuracy.clusters) == (pytest.approx(2 / 3), 3, 2)
    # Candidate 2 is most like the others: cosines of 0.6 + 0.8, against 0.8, 0.6 and 0. It is right
    # in the second row, and so is the nearest to the final state, in that row alone.
    assert accuracy.baselines == {
        "chance": 1 / 4,
        "candidates only": pytest.approx(1 / 3),
        "final state only": pytest.approx(1 / 3),
    }
    assert {part: score.value for part, score in result.by_type.items()} == {
        "COIN": 1 / 2,
        "EPIC-KITCHENS-100": 1,
    }
    against = result.comparisons["accuracy against final state only"]
    assert against["difference"] == pytest.approx(1 / 3, abs=1e-4)
    [items] = result.items
    assert items.predictions == ["segment|c1", "segment|c3", "segment|c1"]
    assert set(model.asked) == {"What is the action shown?"}
    assert sorted(set(model.frames)) == [4, 32]
    protocol = result.protocol
    assert (protocol["candidates_per_row"], protocol["candidate_clips"]) == ("4", 8)
    assert (protocol["state_frames"], protocol["frames"]) == (4, "32")
    assert (result.pool, result.pool_expected) == (3, None)
    assert result.title != "WorldPrediction-WM"
    [left_out] = result.skipped
    assert "WorldPrediction-WM.json:3: " in left_out and "gone" in left_out


# -- EPIC-KITCHENS-100 ---------------------------------------------------------------------------

EK100_HEADER = (
    *("narration_id", "participant_id", "video_id", "narration_timestamp", "start_timestamp"),
    *("stop_timestamp", "start_frame", "stop_frame", "narration", "verb", "verb_class", "noun"),
    *("noun_class", "all_nouns", "all_noun_classes"),
)
VERBS = {0: "take", 1: "put", 2: "wash", 6: "turn-on"}
NOUNS = {0: "tap", 2: "plate", 8: "board:chopping"}


def ek100_row(number: int, video: str, start: int, verb: int, noun: int) -> tuple:
    time = f"00:00:{start:02d}.00"
    words = VERBS[verb], NOUNS[noun]
    return (
        *(f"{video}_{number}", video.split("_")[0], video, time, time, f"00:00:{start + 1:02d}.50"),
        *(60 * start, 60 * start + 90, " ".join(words), words[0], verb, words[1], noun),
        *(f"['{words[1]}']", f"[{noun}]"),
    )


def write_ek100(data: Path) -> None:
    """Write a video of ten clips of two seconds, five actions, and a training split."""
    folder, classes = data / "ek100", ("id", "key", "instances", "category")
    for name, keys in (("verb", VERBS), ("noun", NOUNS)):
        rows = [(number, key, f"['{key}']", "x") for number, key in keys.items()]
        write_csv(folder / f"EPIC_100_{name}_classes.csv", classes, *rows)
    # The pairs of verb and noun, in the order of their frequency
    pairs = [(0, 0), (0, 0), (0, 0), (1, 2), (1, 2), (0, 8), (1, 0), (1, 8), (6, 0), (0, 2)]
    train = [ek100_row(n, "P05_01", 1, verb, noun) for n, (verb, noun) in enumerate(pairs)]
    write_csv(folder / "EPIC_100_train.csv", EK100_HEADER, *train)
    actions = [
        ek100_row(0, "P01_11", 12, 0, 8),
        ek100_row(1, "P01_11", 3, 6, 0),
        ek100_row(2, "P02_03", 3, 0, 8),
        ek100_row(3, "P02_03", 5, 2, 2),  # "wash plate" is not in the training split
        ek100_row(4, "P03_01", 5, 0, 0),  # its video is missing
    ]
    write_csv(folder / "EPIC_100_validation.csv", EK100_HEADER, *actions)
    for video in ("P01/videos/P01_11.MP4", "P02/videos/P02_03.MP4"):
        clips = [clip for clip in range(10) for _ in range(5)]
        write_media(folder / f"EPIC-KITCHENS/{video}", *clips)


def test_paper_ek100_anticipation_gives_the_recall_computed_by_hand(tmp_path):
    write_ek100(tmp_path)
    # Four seconds that end 1, 2, 4 and 10 seconds before the action at 12 s, with two seconds per
    # clip: 7 to 11 s, 6 to 10, 4 to 8, and 0 to 2, where the video begins. Those of an action at
    # 3 s show the first clip only.
    ends = {(3, 5): [1, 0, 0, 0], (3, 4): [0, 1, 0, 0], (2, 3): [0, 0, 1, 0], (0, 0): [0, 0, 0, 1]}
    texts = {
        # "take board chopping" has the ranks 2, 6, 1 and 6; "turn on tap" has rank 1 in the last
        "take tap": [7, 7, 6, 6],
        "put plate": [5, 6, 5, 5],
        "put tap": [4, 5, 4, 4],
        "put board chopping": [3, 4, 3, 3],
        "turn on tap": [2, 3, 2, 7],
        "take board chopping": [6, 2, 7, 2],
        "take plate": [1, 1, 1, 1],
    }
    result, model = measure_ends("ek100_anticipation", tmp_path, ends, texts)

    # "take board chopping" has two rows, one of which always sees the first clip.
    recall = {1: (1 / 2 + 1) / 2, 2: (0 + 1) / 2, 4: (1 / 2 + 1) / 2, 10: (0 + 1) / 2}
    top1 = {1: 1 / 3, 2: 1 / 3, 4: 2 / 3, 10: 1 / 3}
    for seconds, value in recall.items():
        score = result.scores[f"class-mean R@5 at {seconds} s"]
        assert score.value == pytest.approx(value)
        # The five most frequent actions of training, the first of equally frequent ones: "take
        # board chopping" is among them, "turn on tap" is not.
        assert score.baselines == {"chance": pytest.approx(5 / 7), "majority": 1 / 2}
        assert 0 <= score.low <= score.value <= score.high <= 1
        assert result.scores[f"top-1 at {seconds} s"].value == pytest.approx(top1[seconds])
        baselines = result.scores[f"top-1 at {seconds} s"].baselines
        assert baselines == {"chance": pytest.approx(1 / 7), "majority": 0}
    # `eval.compare` reads a score as the mean of its items.
    for items in result.items:
        for metric, values in items.scores.items():
            assert values.mean() == pytest.approx(result.scores[metric].value)
    assert set(model.frames) == {32} and set(model.asked) == {"What is the action shown?"}
    protocol = result.protocol
    assert (protocol["candidates"], protocol["actions"], protocol["rows"]) == (7, 2, 12)
    assert (protocol["rows_of_other_actions"], protocol["clips_of_the_first_frame"]) == (1, 4)
    assert (protocol["seconds_before"], protocol["context_seconds"]) == ("1, 2, 4, 10", 4)
    assert (result.pool, result.pool_expected) == (3, None)
    assert result.paper["scores"]["VL-JEPA (fine-tuned on EK100)"] == 34.2
    assert result.paper["parts"].keys() <= result.scores.keys()
    [left_out] = result.skipped
    assert "P03_01.MP4" in left_out


# -- COIN ----------------------------------------------------------------------------------------


def coin_video(subset: str, task: str, *steps: tuple[float, str]) -> dict:
    """Return the annotation of a video; each step lasts 0.4 seconds."""
    return {
        "duration": 0.4 * len(steps),
        "class": task,
        "video_url": "https://www.youtube.com/embed/x",
        "start": 0.0,
        "end": 0.4 * len(steps),
        "subset": subset,
        "recipe_type": 7,
        "annotation": [
            {"id": str(number), "segment": [start, start + 0.4], "label": label}
            for number, (start, label) in enumerate(steps)
        ],
    }


def write_coin(data: Path) -> None:
    disk = ((0.8, "close the case"), (0.0, "take out the disk"), (0.4, "insert the disk"))
    tea = ((0.0, "boil water"), (0.4, "pour water"))
    gone = ((0.0, "cut the paper"), (0.4, "fold the paper"))
    database = {
        "vdisk": coin_video("testing", "ReplaceHardDisk", *disk),
        "vtea": coin_video("testing", "MakeTea", *tea),
        "vgone": coin_video("testing", "MakePaperDice", *gone),
        "vtrain": coin_video("training", "MakeTea", (0.0, "boil milk"), (0.4, "add tea")),
    }
    write_json(data / "coin/COIN.json", {"database": database})
    write_media(data / "coin/videos/vdisk.mp4", 0, 1, 2)
    write_media(data / "coin/videos/vtea.webm", 3, 4)


def test_paper_coin_next_step_gives_the_accuracy_computed_by_hand(tmp_path):
    write_coin(tmp_path)
    texts = {
        "insert the disk": [1, 0, 0, 0, 0],  # nearest to the clip of the first step: right
        "fold the paper": [0, 1, 0, 0, 0],  # nearest to that of the second: wrong, all others tie
        "pour water": [0, 0, 0, 1, 0],  # right, in the other video
        **dict.fromkeys(["take out the disk", "boil water", "cut the paper"], [0, 0, 0, 0, 1]),
        "close the case": [0, 0, 1, 0, 0],
    }
    result, model = measure("world", "coin_next_step", tmp_path, torch.eye(5).tolist(), texts)
    top1, recall = result.scores["top-1"], result.scores["class-mean R@5"]
    assert (top1.value, top1.n, top1.clusters) == (pytest.approx(2 / 3), 3, 2)
    assert recall.value == pytest.approx(2 / 3)
    # The steps of the missing video are candidates, those of the training video are not.
    assert result.protocol["candidates"] == 7
    assert top1.baselines == {
        "chance": pytest.approx(1 / 7),
        "majority": pytest.approx(1 / 3),  # "insert the disk" is the first of equally frequent ones
        "majority of the activity": pytest.approx(2 / 3),  # "insert the disk", and "pour water"
    }
    [items] = result.items
    assert items.texts == [["insert the disk"], ["close the case"], ["pour water"]]
    assert items.predictions == ["insert the disk", "fold the paper", "pour water"]
    assert result.protocol["next_steps_equal_to_the_step"] == 0
    assert set(model.asked) == {"What is the action shown?"}
    assert (result.pool, result.pool_expected) == (3, None)
    [left_out] = result.skipped
    assert "vgone" in left_out
