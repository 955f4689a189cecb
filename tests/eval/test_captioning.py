"""Captioning, measured with a fake decoder, so that the right scores are known."""

from pathlib import Path

import pytest
import torch

from eval.benchmarks import measurable
from eval.compare import main as compare
from eval.embed import embed_texts
from eval.evaluate import main
from eval.metrics import cider
from eval.report import text_tables, write_report
from eval.task import Benchmark, Task
from eval.tasks import captioning
from eval.tasks.captioning import CaptioningBenchmark
from modeling_vljepa import VLJEPAForConditionalGeneration
from processing import VLJEPAProcessor
from tests.tiny import noise, tiny_model, tiny_processor, tiny_writer, write_clip, write_rows

TRUE = ["pick up the red ball", "go to the blue key", "open the green door", "go to a box"]
TRAIN = [*TRUE[:3], "pick up the red key"]
USUAL = "go to the key"


@pytest.fixture
def model() -> VLJEPAForConditionalGeneration:
    return tiny_writer()


@pytest.fixture
def processor() -> VLJEPAProcessor:
    return tiny_processor()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Write four clips; the caption of the last one is not among the training captions."""
    for index in range(4):
        write_clip(tmp_path / f"{index}.mp4", noise(5, 40, 40, 3) // (index + 1))
    rows = [{"video": f"{index}.mp4", "target": text} for index, text in enumerate(TRUE)]
    write_rows(tmp_path / "rows.jsonl", rows)
    train = [{"video": "0.mp4", "target": text} for text in TRAIN]
    write_rows(tmp_path / "train.jsonl", train)
    return tmp_path


def benchmark(data: Path, **changes: object) -> CaptioningBenchmark:
    settings = {
        "name": "clips",
        "task": "captioning",
        "rows": data / "rows.jsonl",
        "description": "Clips.",
        "train_rows": data / "train.jsonl",
        "query": "describe",
    }
    return CaptioningBenchmark(**settings | changes)


@pytest.fixture
def writer(model, processor, monkeypatch) -> VLJEPAForConditionalGeneration:
    """Return a model that predicts the right embedding of all clips except the second, for which it
    predicts the first one's. Its decoder writes the text of a known embedding, or `USUAL`."""
    known = list(dict.fromkeys(TRUE + TRAIN))
    embeds = embed_texts(model.vljepa, processor, known)
    true = embeds[[known.index(text) for text in TRUE]]
    calls = []

    def predict(**batch: torch.Tensor) -> torch.Tensor:
        calls.append(batch)
        return true[[0, 0, 2, 3]]

    def decode(model, processor, given, queries, previous, num_beams):
        assert set(queries) == {"describe"}
        cosines, indices = (given @ embeds.T).max(dim=1)
        found = zip(cosines.tolist(), indices.tolist(), strict=True)
        # Two texts have a cosine of at most 0.87, so 0.99 means: this very text.
        return [known[index] if cosine > 0.99 else USUAL for cosine, index in found]

    monkeypatch.setattr(model.vljepa, "predict", predict)
    monkeypatch.setattr(captioning, "decode_texts", decode)
    return model


def test_captioning_scores_every_column_as_computed_by_hand(writer, processor, data):
    result = captioning.evaluate(Task(writer, processor, benchmark(data)))
    references = [[text] for text in TRUE]
    written = [TRUE[0], TRUE[0], TRUE[2], TRUE[3]]
    score = result.scores["exact match"]
    assert (score.value, score.n) == (3 / 4, 4)
    assert result.scores["CIDEr"].value == pytest.approx(cider(written, references).mean().item())
    # Second clip: both captions have five words and share only "the".
    assert result.scores["token F1"].value == pytest.approx((3 + 1 / 5) / 4)

    assert score.baselines["true text"] == 1
    best = cider(TRUE, references).mean().item()
    assert result.scores["CIDEr"].baselines["true text"] == pytest.approx(best)
    # Right for the first and third; the fourth's caption cannot be retrieved.
    assert score.baselines["nearest caption"] == 2 / 4
    usual = cider([USUAL] * 4, references).mean().item()
    assert score.baselines["unconditional"] == 0
    assert result.scores["CIDEr"].baselines["unconditional"] == pytest.approx(usual)
    assert best > result.scores["CIDEr"].value > usual > 0

    # Clip by clip only the fourth differs: 0, 0, 0, 1. Four draws contain it 0 to 4 times:
    # Binomial(4, 1/4) has P(0) = 0.32 and P(4) = 0.004. Skewness moves the upper quantile from
    # 0.975 to 0.995, which is still 3 times.
    better = result.comparisons["written against nearest caption"]
    assert better["exact match"] == 0.25
    assert better["exact match low"] == 0
    assert better["exact match high"] == 0.75
    worse = result.comparisons["written against true text"]["CIDEr"]
    assert worse == pytest.approx(result.scores["CIDEr"].value - best, abs=1e-4)

    protocol = result.protocol
    assert (protocol["clips"], protocol["training_captions"]) == (4, 4)
    assert protocol["clips_with_a_training_caption"] == 3
    assert protocol["mean_cosine_to_the_true_text"] < 1
    assert [example.rank for example in result.examples] == [1, 1, 1, 2]
    assert result.examples[-1].query == TRUE[0] and result.examples[-1].truth == [TRUE[1]]


def test_captioning_takes_several_references_and_rejects_several_queries(writer, processor, data):
    rows = [{"video": f"{index}.mp4", "target": text} for index, text in enumerate(TRUE)]
    write_rows(data / "rows.jsonl", [*rows, {"video": "1.mp4", "target": TRUE[0]}])
    result = captioning.evaluate(Task(writer, processor, benchmark(data)))
    assert result.protocol["references_per_clip"] == 5 / 4
    assert result.scores["exact match"].value == 1  # it is now a reference of the second clip
    write_rows(data / "rows.jsonl", [rows[0] | {"query": "who?"}, rows[1]])
    with pytest.raises(ValueError, match="asks one query"):
        captioning.evaluate(Task(writer, processor, benchmark(data, query=None)))


def test_captioning_without_training_captions_compares_with_the_true_text_only(
    writer, processor, data
):
    result = captioning.evaluate(Task(writer, processor, benchmark(data, train_rows=None)))
    assert list(result.scores["CIDEr"].baselines) == ["true text"]
    assert list(result.comparisons) == ["written against true text"]
    assert result.protocol["training_captions"] == 0
    assert "train_rows_file" not in result.protocol
    assert result.scores["exact match"].value == 3 / 4


def test_captioning_decodes_with_the_beams_of_the_benchmark(writer, processor, data, monkeypatch):
    asked, decode = [], captioning.decode_texts
    monkeypatch.setattr(
        captioning,
        "decode_texts",
        lambda *args, **kwargs: asked.append(kwargs["num_beams"]) or decode(*args, **kwargs),
    )
    result = captioning.evaluate(Task(writer, processor, benchmark(data, num_beams=3)))
    assert asked == [3, 3, 3]  # written, true text, unconditional
    assert result.protocol["beams"] == 3


def test_report_shows_captions_and_comparisons(writer, processor, data):
    result = captioning.evaluate(Task(writer, processor, benchmark(data)))
    table = text_tables([result])
    assert "captioning (in %)" in table and "nearest caption" in table
    assert "clips: written against nearest caption: CIDEr " in table
    write_report(data / "report.html", "model", [result], data / "no_log.json")
    page = (data / "report.html").read_text(encoding="utf-8")
    for text in (
        "<th>unconditional</th>",
        f"nearest caption: {TRUE[0]}",
        "Captions and those they",
        "match low",
    ):
        assert text in page


def test_captioning_and_measurable_need_a_decoder(processor, data, monkeypatch, capsys):
    with pytest.raises(ValueError, match="clips: captioning needs a Y-Decoder"):
        captioning.evaluate(Task(tiny_model(), processor, benchmark(data)))
    captions = benchmark(data)
    labels = Benchmark("labels", "classification", data / "rows.jsonl", "Labels.")
    assert measurable([captions, labels], ["all"], has_decoder=True) == [captions, labels]
    assert measurable([captions, labels], ["all"], has_decoder=False) == [labels]
    assert capsys.readouterr().out.strip().endswith("has no Y-Decoder: clips")
    with pytest.raises(ValueError, match="clips needs a Y-Decoder, and this model has none"):
        measurable([captions], ["clips"], has_decoder=False)
    stream = Benchmark("streams", "streaming", data / "rows.jsonl", "Streams.")
    with pytest.raises(ValueError, match="streams needs a Y-Decoder, which a hybrid cannot have"):
        measurable([captions, stream], ["streams"], has_decoder=False, has_tokens=True)


def test_evaluate_measures_all_kinds_on_one_model_with_a_decoder(
    model, processor, data, monkeypatch
):
    """The weights are random, so only the metrics' names are compared."""
    monkeypatch.chdir(data)
    (data / "b.yaml").write_text(
        "clips: {task: captioning, rows: rows.jsonl, train_rows: train.jsonl, description: C.}\n"
        "labels: {task: classification, rows: rows.jsonl, description: L.}\n"
    )
    model.save_pretrained(data / "model")
    processor.save_pretrained(data / "model")
    main(["--model", "model", "--tasks", "all", "--benchmarks", "b.yaml"])
    results = (data / "model/eval/results.json").read_text()
    assert '"CIDEr"' in results and '"top-1"' in results
    compared = compare(["model", "model/eval"])
    assert [each.metric for each in compared] == [
        "CIDEr", "exact match", "token F1", "top-1", "top-5"
    ]  # fmt: skip
    assert {(each.items, each.clusters, each.difference) for each in compared} == {(4, 4, 0.0)}
