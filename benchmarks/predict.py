"""Prediction against bare transformers modules: `python -m benchmarks.predict`.

Both sides have the same weights and get the same pixels and tokens. They alternate, and the minimum
of CPU-seconds counts. In fp32 their results must agree.

| case       | question                                                                        |
|------------|---------------------------------------------------------------------------------|
| clip       | one question about one clip of 8 frames                                         |
| clips      | one question about each of four clips                                           |
| queries    | 8 questions about one clip: the X-Encoder runs once on both sides               |
| candidates | the pipeline ranks 10, 100, 1,000 texts; "again" is a second question with them |

In the second precision only the first case is measured.
"""

import argparse
import copy
import time
from collections.abc import Callable

import torch

from benchmarks.configs import mid_config, small_config
from benchmarks.plain import PlainModel, to_pixels
from benchmarks.report import Goal, Report, add_arguments, chosen
from benchmarks.synthetic import Texts
from modeling_vljepa import VLJEPAModel
from modeling_vljepa.pipelines.pipeline_vljepa import VLJEPAVisualQuestionAnsweringPipeline
from processing import VLJEPAProcessor
from training.arguments import ProcessorArguments
from training.model.recipe_model import new_processor, train_tokenizer

TOLERANCE = 1e-4  # of the embeddings' numbers and of cosines, in fp32
PLAIN, OURS, RATIO = "plain, CPU-s", "ours, CPU-s", "ours / plain"
TEXTS_PER_PASS = 64  # of the plain side
QUERIES = 8


class Bench:
    """A model, its plain twin, and inputs."""

    def __init__(self, bf16: bool, quick: bool):
        config = small_config() if quick else mid_config()
        self.frames, self.rounds = (2, 2) if quick else (8, 3)
        self.bf16 = bf16
        texts = Texts()
        self.questions = [texts.question()[0] for _ in range(QUERIES)]
        tokenizer = train_tokenizer([texts.narration() for _ in range(200)], 1000)
        size = config.vision_config.crop_size
        arguments = ProcessorArguments(image_size=size, num_frames=self.frames)
        self.processor: VLJEPAProcessor = new_processor(tokenizer, arguments, None)
        torch.manual_seed(0)
        model = VLJEPAModel(config)
        dtype = torch.bfloat16 if bf16 else torch.float32
        self.plain = PlainModel(model).eval().to(dtype)
        self.model = model.eval().to(dtype)
        shape = (4, self.frames, 3, size, size)
        self.clips = torch.randint(256, shape, dtype=torch.uint8)
        self.pixels = to_pixels(self.clips, self.processor.video_processor).to(dtype)

    def tokens(self, count: int) -> dict[str, torch.Tensor]:
        return self.processor(text=self.questions[:count])

    def seconds(self, *calls: Callable[[], torch.Tensor]) -> list[float]:
        """Return the least CPU-seconds of each call; the calls alternate.

        Raises:
            RuntimeError: in fp32 their results differ.
        """
        best = [float("inf")] * len(calls)
        for _ in range(self.rounds):
            results = []
            for index, call in enumerate(calls):
                since = time.process_time()
                results.append(call())
                best[index] = min(best[index], time.process_time() - since)
            self.check(results)
        return best

    def check(self, results: list[torch.Tensor]) -> None:
        difference = max((each - results[0]).abs().max().item() for each in results)
        if not self.bf16 and not difference <= TOLERANCE:
            raise RuntimeError(f"the plain modules' results differ by {difference:.1e}")

    def compare(self, clips: int, queries: int) -> list[float]:
        """Return CPU-seconds of the plain modules and of `predict`."""
        pixels, tokens = self.pixels[:clips], self.tokens(queries)

        def plain() -> torch.Tensor:
            visual = self.plain.encode_video(pixels)
            visual = visual.expand(queries, -1, -1) if clips == 1 else visual
            return self.plain.predict(visual, tokens["input_ids"], tokens["attention_mask"])

        return self.seconds(plain, lambda: self.model.predict(pixels, **tokens))

    def rank(self, count: int) -> tuple[float, float, float]:
        """Return CPU-seconds to rank `count` texts: plain, the pipeline, the pipeline again."""
        texts = [f"{Texts(seed).narration()} {seed}" for seed in range(count)]
        again = []

        def plain() -> torch.Tensor:
            inputs = self.processor(videos=[self.clips[0]], text=self.questions[:1])
            pixels = inputs["pixel_values_videos"].to(self.pixels.dtype)
            visual = self.plain.encode_video(pixels)
            predicted = self.plain.predict(visual, inputs["input_ids"], None)[0]
            found = []
            for start in range(0, count, TEXTS_PER_PASS):
                batch = self.processor(targets=texts[start : start + TEXTS_PER_PASS])
                pooled = self.plain.encode_text(
                    batch["target_input_ids"], batch["target_attention_mask"]
                )
                found.append(self.plain.embed_text(pooled))
            return torch.cat(found) @ predicted

        def ours() -> torch.Tensor:
            # A new copy has nothing cached.
            pipe = VLJEPAVisualQuestionAnsweringPipeline(
                model=copy.deepcopy(self.model), processor=self.processor
            )
            call = {"video": self.clips[0], "candidates": texts, "top_k": count}
            since = time.process_time()
            first = pipe(question=self.questions[0], **call)
            self.first = min(self.first, time.process_time() - since)
            since = time.process_time()
            pipe(question=self.questions[1], **call)
            again.append(time.process_time() - since)
            score = {each["answer"]: each["score"] for each in first}
            return torch.tensor([score[text] for text in texts])

        self.first = float("inf")
        plain_seconds, _ = self.seconds(plain, ours)
        return plain_seconds, self.first, min(again)


def add(report: Report, case: str, plain: float, ours: float) -> None:
    report.add(case, {PLAIN: plain, OURS: ours, RATIO: ours / plain}, Goal(RATIO, most=1.05))


def ranks(bench: Bench, report: Report, precision: str, quick: bool) -> None:
    for count in (10, 50) if quick else (10, 100, 1000):
        plain, ours, again = bench.rank(count)
        numbers = {PLAIN: plain, OURS: ours, RATIO: ours / plain, "again, CPU-s": again}
        report.add(f"{count} candidates {precision}", numbers)


SHAPES = {"clip": (1, 1), "clips": (4, 4), "queries": (1, QUERIES)}  # clips and queries
CASES = dict.fromkeys((*SHAPES, "candidates"))


def main(argv: list[str] | None = None) -> list[dict]:
    """Measure and return the lines."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    report = Report("predict", args.output, args.quick)
    for precision in args.precision:
        bench = Bench(precision == "bf16", args.quick)
        for name in chosen(CASES, args.only, parser):
            if precision != args.precision[0] and name != "clip":
                continue
            report.start(f"{name} {precision}")
            with torch.inference_mode():
                if name == "candidates":
                    ranks(bench, report, precision, args.quick)
                else:
                    add(report, f"{name} {precision}", *bench.compare(*SHAPES[name]))
    return report.close()


if __name__ == "__main__":
    main()
