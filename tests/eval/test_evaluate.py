"""The evaluation from files to report, with models whose right scores are known."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import eval.tasks
from eval.benchmarks import load_benchmarks
from eval.compare import main as compare
from eval.embed import embed_texts, predict_rows
from eval.evaluate import main
from eval.intervals import WILSON, difference_interval
from eval.items import FILE
from eval.metrics import wilson
from eval.report import frame_strip, write_report
from eval.task import Task
from eval.tasks import TASKS, classification, retrieval, vqa
from eval.tasks.classification import ClassificationBenchmark
from eval.tasks.retrieval import RetrievalBenchmark
from eval.tasks.vqa import QuestionOnly, VQABenchmark
from modeling_vljepa import VLJEPAModel
from processing import VLJEPAProcessor, read_clip, read_rows
from processing.rows import media_of
from tests.tiny import tiny_config, tiny_model, tiny_processor, write_clip, write_rows

COLORS = ("red", "green", "blue")
WORDS = (*COLORS, "yes", "no")
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


class Oracle:
    """A model that names the one colour of an image, and answers whether it is red."""

    device, dtype = torch.device("cpu"), torch.float32
    y_encoder = y_head = torch.nn.Identity()  # in training mode, so no text is cached

    def __init__(self, processor: VLJEPAProcessor):
        self.processor, self.base_model = processor, self
        self.config = tiny_config()
        self.seen: list[torch.Tensor] = []  # pixels, batch by batch
        self.asked: list[str] = []

    def eval(self) -> None: ...

    def encode_video(self, pixel_values_videos: torch.Tensor) -> torch.Tensor:
        self.seen.append(pixel_values_videos)
        return (pixel_values_videos.mean(dim=(1, 3, 4)) * STD + MEAN)[:, None]  # (B, 1, 3)

    def predict(
        self, visual_embeds: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        queries = self.processor.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        self.asked += queries
        embeds = torch.zeros(len(queries), len(WORDS))
        for row, (query, (color,)) in enumerate(zip(queries, visual_embeds, strict=True)):
            if query.startswith("is it"):
                is_red = color.tolist()[0] > 0.9
                embeds[row, WORDS.index("yes" if is_red else "no")] = 1
            else:
                embeds[row, :3] = color.round(decimals=2)
        return F.normalize(embeds, dim=-1)

    def encode_target(
        self, target_input_ids: torch.Tensor, target_attention_mask: torch.Tensor
    ) -> torch.Tensor:
        tokenizer = self.processor.target_tokenizer
        texts = tokenizer.batch_decode(target_input_ids, skip_special_tokens=True)
        return torch.stack([torch.eye(len(WORDS))[WORDS.index(text.split()[-1])] for text in texts])


@pytest.fixture
def processor() -> VLJEPAProcessor:
    return tiny_processor(num_frames=2)


@pytest.fixture
def model() -> VLJEPAModel:
    return tiny_model()


def image(folder: Path, name: str, color: str) -> str:
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[..., COLORS.index(color)] = 255
    Image.fromarray(pixels).save(folder / name)
    return name


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Write six images, two of each colour, two questions about each, and captions in groups."""
    images = {image(tmp_path, f"{color}{i}.png", color): color for color in COLORS for i in "01"}
    questions = [
        row
        for name, color in images.items()
        for row in (
            {"image": name, "query": "what is it?", "target": color, "question_type": "color"},
            {
                "image": name,
                "query": "is it red?",
                "target": "yes" if color == "red" else "no",
                "question_type": "yes/no",
            },
        )
    ]
    write_rows(tmp_path / "vqa.jsonl", questions)
    captions = [
        {"image": name, "target": f"{words} {color}", "group_id": name}
        for name, color in images.items()
        for words in ("all is", "it is")
        if name.endswith("0.png")
    ]
    write_rows(tmp_path / "captions.jsonl", captions)
    labels = [{"image": name, "target": color} for name, color in images.items()]
    write_rows(tmp_path / "labels.jsonl", labels)
    return tmp_path


def vqa_benchmark(data: Path) -> VQABenchmark:
    rows = data / "vqa.jsonl"
    return VQABenchmark("colours", "vqa", rows, "Colours.", train_rows=rows)


def label_benchmark(data: Path, **keys: object) -> ClassificationBenchmark:
    rows = data / "labels.jsonl"
    return ClassificationBenchmark("labels", "classification", rows, "", **keys)


def read(path: Path) -> list[dict]:
    rows, bad = read_rows(path)
    assert not bad
    return rows


# -- scores ---------------------------------------------------------------------------------


def test_vqa_scores_accuracy_and_its_baselines(data, processor):
    result = vqa.evaluate(Task(Oracle(processor), processor, vqa_benchmark(data)))
    accuracy = result.scores["accuracy"]
    assert (accuracy.value, accuracy.n) == (1.0, 12)
    assert accuracy.baselines["chance"] == pytest.approx(1 / 5)  # red green blue yes no
    assert accuracy.baselines["majority"] == pytest.approx(4 / 12)  # no
    # "what is it?" -> one colour, right twice of six; "is it red?" -> no, right four times.
    assert accuracy.baselines["question only"] == pytest.approx(6 / 12)
    assert result.by_type["color"].baselines["question only"] == pytest.approx(2 / 6)
    assert result.by_type["yes/no"].baselines["question only"] == pytest.approx(4 / 6)
    assert (result.protocol["rows"], result.protocol["media"]) == (12, 6)
    # Two questions about each image: six clusters, all right
    assert (accuracy.clusters, accuracy.interval) == (6, WILSON)
    assert (accuracy.low, accuracy.high) == wilson(6, 6)
    facts = [result.protocol[fact] for fact in ("interval", "cluster", "clusters", "resamples")]
    assert facts == ["95 %, Wilson", "clip", "6", 2000]
    assert (result.protocol["candidates"], result.protocol["frames"]) == (5, "1")
    assert result.protocol["media_shared_with_training"] == 6


def test_vqa_counts_an_answer_without_training_rows_as_wrong(data, processor):
    train = write_rows(
        data / "train.jsonl", [row for row in read(data / "vqa.jsonl") if row["target"] != "blue"]
    )
    benchmark = VQABenchmark("colours", "vqa", data / "vqa.jsonl", "", train_rows=train)
    result = vqa.evaluate(Task(Oracle(processor), processor, benchmark))
    assert result.protocol["answers_not_among_candidates"] == 2
    assert result.protocol["candidates"] == 4
    assert result.scores["accuracy"].value == pytest.approx(10 / 12)
    assert result.scores["accuracy"].baselines["chance"] == pytest.approx(10 / 12 / 4)


def test_vqa_against_blind_pairs_rows_and_resamples_clips():
    """The question alone answers "red" and "yes"; the model is right in all rows but the last."""
    train = [{"query": "what?", "target": "red"}, {"query": "is it?", "target": "yes"}]
    rows = [
        row
        for clip, color in enumerate(["red", "green", "blue", "blue"])
        for row in (
            {"image": f"{clip}.png", "query": "what?", "target": color, "question_type": "color"},
            {"image": f"{clip}.png", "query": "is it?", "target": "yes", "question_type": "yes/no"},
        )
    ]
    ranks = torch.tensor([1, 1, 1, 1, 1, 1, 1, 2])
    found = vqa.against_blind(rows, ranks, QuestionOnly(train))
    better = np.array([0, 0, 1, 0, 1, 0, 1, -1.0])
    clips = np.repeat(np.arange(4), 2)
    expected = difference_interval(better, clips, 1.0)
    assert found["accuracy against question only"] == pytest.approx(
        {"difference": 2 / 8, "low": expected.low, "high": expected.high}, abs=1e-4
    )
    assert found["color against question only"]["difference"] == 3 / 4
    assert found["yes/no against question only"]["difference"] == -1 / 4
    assert list(found)[1:] == [f"{name} against question only" for name in ("color", "yes/no")]


def test_question_only_falls_back_from_question_to_type_to_all():
    def row(query, target, question_type):
        return {"query": query, "target": target, "question_type": question_type}

    blind = QuestionOnly(
        [row("how many balls?", "two", "count")] * 2
        + [row("how many keys?", "one", "count")] * 3
        + [row("is it open?", "yes", "exists")] * 4
    )
    assert blind.answer(row("how many balls?", "", "count")) == "two"
    assert blind.answer(row("how many boxes?", "", "count")) == "one"
    assert blind.answer(row("where is it?", "", "where")) == "yes"
    assert blind.answer({"query": "where is it?"}) == "yes"
    assert blind.majority() == "yes"


@pytest.mark.parametrize(("kind", "videos"), [("image", 0), ("clip", 1), ("video", 3)])
def test_retrieval_scores_several_texts_per_file(data, processor, kind, videos):
    """The names of scores and facts state the kind of the pool."""
    rows = read(data / "captions.jsonl")
    for row in [row for row in rows if COLORS.index(Path(row["image"]).stem[:-1]) < videos]:
        path = data / row.pop("image")
        pixels = np.asarray(Image.open(path))
        row["video"] = str(write_clip(path.with_suffix(".mp4"), np.stack([pixels, pixels])))
    write_rows(data / "captions.jsonl", rows)
    benchmark = RetrievalBenchmark(
        "clips", "retrieval", data / "captions.jsonl", "", query="describe"
    )
    oracle = Oracle(processor)
    result = retrieval.evaluate(Task(oracle, processor, benchmark))
    assert set(oracle.asked) == {"describe"} and len(oracle.asked) == 3
    protocol = result.protocol
    assert (protocol[f"{kind}_pool"], protocol["text_pool"]) == (3, 6)
    assert (protocol[f"texts_per_{kind}"], protocol[f"{kind}s_per_text"]) == (2.0, 1.0)
    names = ("R@1", "R@5", "R@10", "nDCG@10")
    assert list(result.scores) == [
        f"{direction} {name}"
        for direction in (f"text to {kind}", f"{kind} to text")
        for name in names
    ]
    text_to_clip = result.scores[f"text to {kind} R@1"]
    assert (text_to_clip.value, text_to_clip.n, text_to_clip.clusters) == (1.0, 6, 3)
    assert text_to_clip.baselines["chance"] == pytest.approx(1 / 3)
    clip_to_text = result.scores[f"{kind} to text R@1"]
    assert (clip_to_text.value, clip_to_text.n) == (1.0, 3)
    assert clip_to_text.baselines["chance"] == pytest.approx(2 / 6)
    assert result.ranks[f"{kind} to text median rank"] == 1
    write_report(data / "report.html", "model", [result], data / "none.json")
    page = (data / "report.html").read_text(encoding="utf-8")
    assert f"The five nearest {kind}s to a text" in page and f"{kind} at rank 1" in page
    assert "video" not in page or kind == "video"


def test_retrieval_relevance_joins_texts_and_groups():
    rows = [
        {"video": "a", "target": "open", "group_id": "1"},
        {"video": "b", "target": "shut", "group_id": "1"},
        {"video": "c", "target": "open", "group_id": "2"},
        {"video": "d", "target": "wide"},
    ]
    texts, text_of = retrieval.texts_of(rows, merge=True)
    assert texts == ["open", "shut", "wide"]
    relevant = retrieval.relevance(rows, list("abcd"), text_of)
    assert relevant.int().tolist() == [[1, 1, 0], [1, 1, 0], [1, 0, 0], [0, 0, 1]]
    _, text_of = retrieval.texts_of(rows, merge=False)
    relevant = retrieval.relevance(rows, list("abcd"), text_of)
    assert relevant.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_retrieval_clusters_hold_the_texts_of_a_file_and_the_files_of_a_group():
    rows = [
        {"video": "a", "target": "open", "group_id": "1"},
        {"video": "b", "target": "shut", "group_id": "1"},
        {"video": "c", "target": "open", "group_id": "2"},  # "open" belongs to a, its first file
        {"video": "c", "target": "big"},
        {"video": "d", "target": "wide"},
        {"video": "d", "target": "far"},
    ]
    _, text_of = retrieval.texts_of(rows, merge=True)  # open, shut, big, wide, far
    files, of_texts = retrieval.clusters_of(rows, list("abcd"), text_of)
    assert files.tolist() == [0, 0, 1, 2]
    assert of_texts.tolist() == [0, 0, 1, 2, 2]


def test_predict_rows_rejects_an_empty_list(processor):
    with pytest.raises(ValueError, match="there is no row to predict: a limit"):
        predict_rows(Oracle(processor), processor, [])


def test_retrieval_rejects_several_queries(data, processor):
    benchmark = RetrievalBenchmark("clips", "retrieval", data / "vqa.jsonl", "")
    with pytest.raises(ValueError, match="asks one query"):
        retrieval.evaluate(Task(Oracle(processor), processor, benchmark))


def test_classification_scores_labels_and_rejects_targets_outside_the_candidates(data, processor):
    benchmark = ClassificationBenchmark(
        "labels", "classification", data / "labels.jsonl", "", query=""
    )
    result = classification.evaluate(Task(Oracle(processor), processor, benchmark))
    assert result.scores["top-1"].value == 1.0
    assert result.scores["top-1"].baselines == pytest.approx({"chance": 1 / 3, "majority": 1 / 3})
    given = ClassificationBenchmark(
        "l", "classification", data / "labels.jsonl", "", candidates=["red", "no"]
    )
    with pytest.raises(ValueError, match="blue, green"):
        classification.evaluate(Task(Oracle(processor), processor, given))


@pytest.mark.parametrize(
    ("kind", "prompt"), [("retrieval", "retrieval"), ("classification", "action")]
)
def test_benchmark_without_a_query_asks_the_prompt_of_the_model(data, processor, kind, prompt):
    def asked(rows: str = "labels.jsonl", **keys: str) -> tuple[set[str], dict]:
        benchmark = TASKS[kind].benchmark("name", kind, data / rows, "", **keys)
        oracle = Oracle(processor)
        oracle.config.prompts = {"retrieval": "which one ?", "action": "what is done ?"}
        result = TASKS[kind].evaluate(Task(oracle, processor, benchmark))
        return set(oracle.asked), result.protocol

    own = {"retrieval": "which one ?", "action": "what is done ?"}[prompt]
    queries, protocol = asked()
    assert queries == {own}
    assert (protocol["prompt"], protocol["prompt_from"]) == (own, f"the model's {prompt} prompt")
    queries, protocol = asked(query="")  # an empty query is a query too
    assert queries == {""} and protocol["prompt_from"] == "the benchmark"
    queries, protocol = asked(query="who ?")
    assert (queries, protocol["prompt"]) == ({"who ?"}, "who ?")
    rows = [row | {"query": "where ?"} for row in read(data / "labels.jsonl")]
    write_rows(data / "asked.jsonl", rows)
    queries, protocol = asked("asked.jsonl")
    assert (queries, protocol["prompt_from"]) == ({"where ?"}, "the rows")
    if kind == "classification":  # retrieval asks one query
        write_rows(data / "mixed.jsonl", [rows[0] | {"query": ""}, *rows[1:]])
        queries, protocol = asked("mixed.jsonl")
        assert queries == {"where ?", own} and protocol["prompt"] == "2 distinct queries"
        assert protocol["prompt_from"] == "the rows and the model's action prompt"


def test_vqa_benchmark_asks_the_rows_questions(data, processor):
    oracle = Oracle(processor)
    oracle.config.prompts = {"question": "answer this: {}"}
    result = vqa.evaluate(Task(oracle, processor, vqa_benchmark(data)))
    assert set(oracle.asked) == {"what is it?", "is it red?"}
    assert result.protocol["prompt_from"] == "the rows"


# -- ablations --------------------------------------------------------------------------------


def test_ablation_grey_replaces_pixels_before_normalisation(data, processor):
    oracle = Oracle(processor)
    result = vqa.evaluate(Task(oracle, processor, vqa_benchmark(data), ablation="grey"))
    expected = (127 / 255 - MEAN) / STD
    for pixels in oracle.seen:
        torch.testing.assert_close(pixels, expected[:, None, None].expand_as(pixels))
    # All colours tie, which counts as wrong; "no" to "is it red?" is right for four of six.
    assert result.by_type["color"].value == 0
    assert result.by_type["yes/no"].value == pytest.approx(4 / 6)
    assert result.protocol["ablation"] == "grey"


def test_ablation_shuffled_queries_is_a_seeded_permutation(data, processor):
    rows = read(data / "vqa.jsonl")
    first, again = (
        predict_rows(Oracle(processor), processor, rows, ablation="shuffled_queries")
        for _ in range(2)
    )
    assert first.queries == again.queries
    assert first.queries != [row["query"] for row in rows]
    assert sorted(first.queries) == sorted(row["query"] for row in rows)

    oracle = Oracle(processor)
    result = vqa.evaluate(Task(oracle, processor, vqa_benchmark(data), ablation="shuffled_queries"))
    moved = result.protocol["queries_changed_by_ablation"]
    assert moved > 0
    assert result.scores["accuracy"].value == pytest.approx((12 - moved) / 12)
    # The baseline answers the true question, so it does not depend on the ablation.
    assert result.scores["accuracy"].baselines["question only"] == pytest.approx(6 / 12)


# -- files, batches, texts ------------------------------------------------------------------


def test_predict_rows_encodes_each_file_once(data, processor):
    oracle = Oracle(processor)
    predict_rows(oracle, processor, read(data / "vqa.jsonl"), batch_size=4)
    assert [len(pixels) for pixels in oracle.seen] == [4, 2]
    assert len(oracle.asked) == 12


def test_predict_rows_keeps_the_order_of_rows_with_videos_and_images(data, processor):
    frames = np.zeros((8, 40, 40, 3), np.uint8)
    frames[:4] = 255
    write_clip(data / "late.mp4", frames)
    rows = [
        {"video": "late.mp4", "query": "is it red?", "target": "no"},
        {"image": "red0.png", "query": "is it red?", "target": "yes"},
        {"video": "late.mp4", "query": "what is it?", "target": "red"},
    ]
    rows = read(write_rows(data / "mixed.jsonl", rows))
    oracle = Oracle(processor)
    predictions = predict_rows(oracle, processor, rows, num_frames=4)
    assert [pixels.shape[1] for pixels in oracle.seen] == [1, 4]
    levels = (oracle.seen[1].mean(dim=(0, 3, 4)) * STD + MEAN).mean(dim=1)
    torch.testing.assert_close(levels, torch.tensor([1.0, 1, 0, 0]), atol=0.02, rtol=0)
    assert [row["line"] for row in predictions.rows] == [1, 2, 3]
    grey = F.normalize(torch.tensor([1.0, 1, 1, 0, 0]), dim=0)
    expected = torch.stack([torch.eye(5)[WORDS.index("no")], torch.eye(5)[3], grey])
    torch.testing.assert_close(predictions.embeds, expected, atol=0.02, rtol=0)


def test_predict_rows_and_the_report_treat_parts_of_a_video_as_clips(tmp_path, processor, model):
    write_clip(
        tmp_path / "two.mp4",
        np.concatenate([np.zeros((10, 48, 64, 3)), np.full((10, 48, 64, 3), 200)]).astype(np.uint8),
    )
    path = str(tmp_path / "two.mp4")
    whole = read_clip(path)
    middle = float(whole.timestamps[10])
    parts = [{}, {"end": middle}, {"start": middle}]
    rows = [{"video": path, "query": "", "target": "x", "line": 1, **part} for part in parts]
    embeds = predict_rows(model, processor, rows).embeds
    frames = [whole.frames, whole.frames[:10], whole.frames[10:]]
    for found, clip in zip(embeds, frames, strict=True):
        expected = model.predict(**processor(videos=[clip], text=[""]))[0]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (embeds[0] - embeds[1]).abs().max() > 1e-3  # positive control
    assert frame_strip(media_of(rows[1]), 4) != frame_strip(media_of(rows[2]), 4)


def test_predict_rows_and_embed_texts_do_not_depend_on_the_batch_size(data, processor, model):
    rows = read(data / "vqa.jsonl")
    one = predict_rows(model, processor, rows, batch_size=1)
    many = predict_rows(model, processor, rows, batch_size=64)
    torch.testing.assert_close(one.embeds, many.embeds, atol=1e-5, rtol=0)
    texts = ["red", "a much longer text", "red", "it is green"]
    single = embed_texts(model, processor, texts, batch_size=1)
    torch.testing.assert_close(
        single, embed_texts(model, processor, texts, batch_size=64), atol=1e-5, rtol=0
    )
    assert torch.equal(single[0], single[2])
    assert not torch.allclose(single[0], single[1], atol=1e-3)
    assert not torch.allclose(one.embeds[0], one.embeds[1], atol=1e-3)


def test_evaluation_reports_a_broken_file_and_leaves_it_out(data, processor):
    (data / "blue1.png").write_bytes(b"no picture")
    with open(data / "vqa.jsonl", "a") as file:
        file.write(json.dumps({"image": "red0.png", "query": "yes", "target": "yes"}) + "\n")
        file.write(json.dumps({"image": "gone.png", "query": "q", "target": "yes"}) + "\n")
    result = vqa.evaluate(Task(Oracle(processor), processor, vqa_benchmark(data)))
    assert result.scores["accuracy"].n == 10
    assert result.scores["accuracy"].value == 1.0
    assert [line.split(": ")[0] for line in result.skipped] == [
        f"vqa.jsonl:{number}" for number in (11, 12, 13, 14)
    ]
    assert "blue1.png: not an image" in result.skipped[0]
    assert "query equals target" in result.skipped[2]
    assert result.skipped[3].endswith("missing: gone.png")
    assert not any(str(data) in line for line in result.skipped)

    labels = ClassificationBenchmark(
        "labels", "classification", data / "labels.jsonl", "", query=""
    )
    result = classification.evaluate(Task(Oracle(processor), processor, labels))
    assert (result.scores["top-1"].n, len(result.skipped)) == (5, 1)


# -- the benchmark file ----------------------------------------------------------------------


def test_load_benchmarks_reads_the_shipped_files(monkeypatch):
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    folder = Path(__file__).parents[2] / "eval"
    names = ("benchmarks.yaml", "streams.yaml", "pictures.yaml", "mteb.yaml")
    names += ("validation.yaml", "pictures_validation.yaml")
    benchmarks = [each for name in names for each in load_benchmarks(folder / name, ["all"])]
    kinds = {"anticipation", "captioning", "classification", "retrieval", "streaming", "vqa"}
    kinds |= {"world_prediction"}
    assert {benchmark.task for benchmark in benchmarks} == kinds <= set(TASKS)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{task: vqa, rows: vqa.jsonl, description: d}", "a vqa benchmark needs train_rows"),
        ("{task: vqa, rows: vqa.jsonl, train_rows: x.jsonl, description: d}", "x.jsonl"),
        ("{task: retrieval, rows: vqa.jsonl, description: d, frames: 2}", "takes no frames"),
        ("{task: counting, rows: vqa.jsonl, description: d}", "task is 'counting'"),
        ("{task: [vqa], rows: vqa.jsonl, description: d}", r"task is \['vqa'\]"),
        (
            "{task: vqa, rows: vqa.jsonl, train_rows: vqa.jsonl, description: d, query: q}",
            "takes no query: its rows ask",
        ),
        (
            "{task: retrieval, rows: vqa.jsonl, description: d, num_frames: '2'}",
            r"num_frames is '2', must be int \| None",
        ),
        ("{task: retrieval, rows: 7, description: d}", "rows is 7, must be str"),
        *(
            (
                f"{{task: captioning, rows: vqa.jsonl, description: d, {key}: {value}}}",
                f"name: {key} is {words}, must be a number above 0",
            )
            for key, value, words in (
                ("num_frames", "0", "0"),
                ("num_frames", "true", "True"),
                ("num_beams", "-1", "-1"),
            )
        ),
        ("5", "name: a benchmark has keys and values, found 5"),
    ],
)
def test_load_benchmarks_names_a_wrong_entry(data, monkeypatch, entry, message):
    monkeypatch.chdir(data)
    (data / "b.yaml").write_text(f"name: {entry}")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_benchmarks(data / "b.yaml", ["all"])
    with pytest.raises(ValueError, match="has no other. It has: name"):
        load_benchmarks(data / "b.yaml", ["other"])


def test_tasks_has_one_kind_per_module_under_its_own_name():
    modules = {path.stem for path in Path(eval.tasks.__file__).parent.glob("[!_]*.py")}
    assert {kind.evaluate.__module__ for kind in TASKS.values()} == {
        f"eval.tasks.{name}" for name in modules
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "b.yaml: benchmarks are entries `name: {task: …}`, found None"),
        ("- 1", "b.yaml: benchmarks are entries .* found .1."),
        ("a: [1", "b.yaml: not a YAML file: "),
        ("a: {}\na: {}", "b.yaml: not a YAML file: 'a' stands twice"),
    ],
)
def test_load_benchmarks_names_a_file_without_benchmarks(tmp_path, content, message):
    (tmp_path / "b.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_benchmarks(tmp_path / "b.yaml", ["all"])


# -- the command -----------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["0", "-1"])
def test_evaluate_rejects_a_limit_below_one(limit, capsys):
    """A limit of -1, as a slice, would leave the last row out."""
    with pytest.raises(SystemExit):
        main(["--model", "m", "--tasks", "all", "--limit", limit])
    assert f"argument --limit: it is {limit}; give 1 or more" in capsys.readouterr().err


BENCHMARKS = """
colours: {task: vqa, rows: vqa.jsonl, train_rows: vqa.jsonl, description: Colours.}
clips: {task: retrieval, rows: captions.jsonl, query: describe, description: Clips.}
labels: {task: classification, rows: labels.jsonl, query: "", description: Labels.}
"""


def test_evaluate_writes_equal_files_for_equal_runs(data, processor, model, monkeypatch, capsys):
    monkeypatch.chdir(data)
    (data / "b.yaml").write_text(BENCHMARKS)
    model.save_pretrained(data / "model")
    processor.save_pretrained(data / "model")
    log = [{"step": step, "loss": 3.0 - step, "chance_loss": 3.0} for step in range(3)]
    (data / "model" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    arguments = ["--model", "model", "--tasks", "all", "--benchmarks", "b.yaml"]
    main(arguments)
    main([*arguments, "--output", "again"])
    main([*arguments, "--output", "small", "--batch-size", "2"])
    main([*arguments, "--ablation", "grey"])

    results = (data / "model/eval/results.json").read_bytes()
    assert results == (data / "again/results.json").read_bytes()
    # Ranks are equal at every batch size: the similarities of a row differ by 4e-4 and more.
    assert results == (data / "small/results.json").read_bytes()
    assert str(data).encode() not in results
    items = (data / "model/eval" / FILE).read_bytes()
    assert items == (data / "again" / FILE).read_bytes()
    assert str(data).encode() not in items
    assert len(items.splitlines()) == 12 + (6 + 3) + 6  # questions, texts and images, labels
    for found in compare(["model", "again"]):
        assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)
    # Items pair across an ablation, which hides pixels and leaves files and questions as they are.
    scores = json.loads(results)["benchmarks"]["colours"]["scores"]["accuracy"]
    [found, *_] = compare(["model/eval_grey", "model", "--tasks", "colours"])
    assert (found.b, found.items, found.clusters) == (pytest.approx(scores["value"]), 12, 6)
    content = json.loads(results)
    assert list(content["benchmarks"]) == ["colours", "clips", "labels"]
    assert content["model"] == "model"
    assert content["benchmarks"]["colours"]["protocol"]["rows_file"] == "vqa.jsonl"
    grey = json.loads((data / "model/eval_grey/results.json").read_bytes())
    assert grey["benchmarks"]["colours"]["protocol"]["ablation"] == "grey"

    printed = capsys.readouterr().out
    table = next(line for line in printed.splitlines() if "question only" in line)
    assert table.split("  ")[0] == "benchmark"
    page = (data / "model/eval/report.html").read_text(encoding="utf-8")
    assert page == (data / "again/report.html").read_text(encoding="utf-8")
    for name in content["benchmarks"]:
        assert f"<h2>{name}</h2>" in page
    assert 'alt="loss over training steps"' in page
    assert "http" not in page


@pytest.mark.parametrize("name", ["predictor_head.projection.weight", "y_head.projection.bias"])
def test_evaluate_rejects_a_model_that_lacks_a_weight(data, processor, model, monkeypatch, name):
    """transformers would initialise the weight at random."""
    monkeypatch.chdir(data)
    (data / "b.yaml").write_text(BENCHMARKS)
    weights = model.state_dict()
    del weights[name]
    model.save_pretrained(data / "half", state_dict=weights)
    processor.save_pretrained(data / "half")
    with pytest.raises(ValueError, match=f"--model: half lacks {name}, which would be random"):
        main(["--model", "half", "--tasks", "all", "--benchmarks", "b.yaml"])
    assert not (data / "half/eval").exists()


def test_report_escapes_the_texts_of_rows(data, processor):
    script = "<script>alert(1)</script>"
    write_rows(data / "vqa.jsonl", [row | {"query": script} for row in read(data / "vqa.jsonl")])
    result = vqa.evaluate(Task(Oracle(processor), processor, vqa_benchmark(data)))
    write_report(data / "report.html", script, [result], data / "trainer_state.json")
    page = (data / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "trainer_state.json not found" in page
