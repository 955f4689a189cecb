"""Kill training runs at random moments, resume them, and compare with an uninterrupted run.

    python -m benchmarks.kills --kills 20

SIGKILL ends all processes of a run or one of them, at any time after its start (so also before its
first checkpoint) or during the writing of a checkpoint. The run is then resumed with
`training.resume_from_checkpoint=true`. It must end with the same weights, bit for bit, and the same
losses.
"""

import argparse
import json
import os
import random
import shutil
import socket
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import yaml
from PIL import Image

from training.loop.checkpoints import INCOMPLETE
from training.train import main as train

CONTEXT = get_context("forkserver")
STEPS, SAVE_STEPS = 12, 3


@dataclass(frozen=True)
class Setting:
    """The number of processes, and the rows per part of GradCache (`None`: no GradCache)."""

    processes: int
    gradient_cache_rows: int | None


SETTINGS = [Setting(1, None), Setting(2, None), Setting(1, 1), Setting(2, 1)]
# Each kill of a setting takes the next pair, and each setting starts at another: during the writing
# of a checkpoint, or between two; one process, or all. The moment is random.
MANNERS = [(False, False), (True, True), (False, True), (True, False)]


def write_recipe(folder: Path) -> Path:
    """Write a recipe for twelve small images, once in memory and once streamed.

    The model has dropout, so a resumed run must also restore the random state.
    """
    generator = random.Random(0)
    rows = []
    for number in range(12):
        pixels = generator.randbytes(32 * 32 * 3)
        Image.frombytes("RGB", (32, 32), pixels).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "query": "what ?", "target": f"number {number}"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    recipe = {
        "model": {
            "vocab_size": 300,
            "config": {
                "embedding_dim": 16,
                "vision_config": {
                    "model_type": "vjepa2",
                    **sizes,
                    "pred_hidden_size": 16,
                    "pred_num_hidden_layers": 1,
                    "pred_num_attention_heads": 2,
                },
                "predictor_config": {
                    "model_type": "llama",
                    **sizes,
                    "intermediate_size": 64,
                    "num_key_value_heads": 2,
                    "head_dim": 16,
                    "attention_dropout": 0.2,
                },
                "text_config": {"model_type": "bert", **sizes, "intermediate_size": 64},
            },
        },
        "processor": {"image_size": 32},
        "data": {
            "sources": [
                {"rows": str(folder / "rows.jsonl"), "augment": True},
                {"rows": str(folder / "rows.jsonl"), "streaming": True, "shuffle_rows": 8},
            ],
            "cache_dir": str(folder / "cache"),
            "num_workers": 1,
        },
        "training": {
            "output_dir": str(folder / "out"),
            "max_steps": STEPS,
            "global_batch_size": 4,
            "learning_rate": 1.0e-3,
            "precision": "fp32",
            "use_cpu": True,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": SAVE_STEPS,
            "save_total_limit": 2,
            "report_to": "none",
            "resume_from_checkpoint": True,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def work(rank: int, setting: Setting, port: int, arguments: list[str], log: Path) -> None:
    """Run one process of a training, with torchrun's environment and one thread."""
    number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(number, 1), os.dup2(number, 2)
    if setting.processes > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(setting.processes),
            "LOCAL_WORLD_SIZE": str(setting.processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    torch.set_num_threads(1)
    train(arguments)


def start(setting: Setting, recipe: Path, output: Path) -> list[BaseProcess]:
    arguments = [str(recipe), f"training.output_dir={output}"]
    if setting.gradient_cache_rows is not None:
        arguments.append(f"training.gradient_cache_rows={setting.gradient_cache_rows}")
    log, port = output.with_suffix(".log"), free_port()
    processes = [
        CONTEXT.Process(target=work, args=(rank, setting, port, arguments, log))
        for rank in range(setting.processes)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[BaseProcess], seconds: float = 900) -> None:
    """Wait until all processes of a run have ended.

    Raises:
        RuntimeError: a process failed, or was still running after `seconds`.
    """
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    kill(processes)
    if codes != [0] * len(processes):
        raise RuntimeError(f"a run ended with exit codes {codes}: see its .log file")


def kill(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def result(output: Path) -> tuple[bytes, list[float]]:
    """Return the weights, and the loss of every step."""
    state = json.loads((output / "trainer_state.json").read_text())
    losses = [line["loss"] for line in state["log_history"] if "loss" in line]
    return (output / "model.safetensors").read_bytes(), losses


def last_checkpoint(output: Path) -> int:
    """Return the step of the last complete checkpoint, or 0."""
    return max([int(path.name.split("-")[1]) for path in output.glob("checkpoint-*")], default=0)


def kill_once(
    setting: Setting,
    recipe: Path,
    output: Path,
    duration: float,
    turn: int,
    chance: random.Random,
) -> str:
    """Start a run and kill it; return a line on the moment and the manner."""
    while_writing, alone = MANNERS[(turn + SETTINGS.index(setting)) % len(MANNERS)]
    alone = alone and setting.processes > 1
    # Checkpoints to wait for; in the first turn none, so the run is killed before its first.
    saved = chance.randrange(STEPS // SAVE_STEPS) if turn else 0
    delay = chance.uniform(0, duration if saved == 0 else duration / 10)
    processes = start(setting, recipe, output)
    begun = time.monotonic()
    while last_checkpoint(output) < saved * SAVE_STEPS and processes[0].is_alive():
        time.sleep(0.001)
    if while_writing:
        while not (output / INCOMPLETE).exists() and processes[0].is_alive():
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.01))
    else:
        time.sleep(delay)
    seconds = time.monotonic() - begun
    writing = (output / INCOMPLETE).exists()
    kill([chance.choice(processes)] if alone else processes)
    time.sleep(0.2 * alone)  # the other processes notice the loss before they are killed
    kill(processes)
    return (
        f"{setting}: {'one process' if alone else 'all processes'} killed after {seconds:.2f} s"
        f"{', during the writing of a checkpoint' if writing else ''}, last checkpoint at step "
        f"{last_checkpoint(output)}"
    )


def kill_and_resume(folder: Path, kills: int, seed: int = 0) -> list[str]:
    """Kill and resume `kills` runs, over all settings in turn; return a line for each.

    Raises:
        AssertionError: a resumed run ended with other weights or losses.
    """
    CONTEXT.set_forkserver_preload(["training.train"])  # one import for all runs
    chance, lines, expected = random.Random(seed), [], {}
    recipe = write_recipe(folder)
    for number in range(kills):
        turn, index = divmod(number, len(SETTINGS))
        setting = SETTINGS[index]
        if setting not in expected:
            output = folder / f"whole-{setting.processes}-{setting.gradient_cache_rows}"
            if not expected:
                finish(start(setting, recipe, output))  # fills the caches before the timed runs
                shutil.rmtree(output)
            begun = time.monotonic()
            finish(start(setting, recipe, output))
            expected[setting] = (*result(output), time.monotonic() - begun)
        weights, losses, duration = expected[setting]
        output = folder / f"killed-{number}"
        lines.append(kill_once(setting, recipe, output, duration, turn, chance))
        finish(start(setting, recipe, output))
        assert result(output) == (weights, losses), lines[-1]
        shutil.rmtree(output)
        print(lines[-1], "- resumed: same weights, same losses", flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = kill_and_resume(Path(folder), args.kills, args.seed)
    writing = sum("during the writing" in line for line in lines)
    early = sum(line.endswith("step 0") for line in lines)
    alone = sum("one process" in line for line in lines)
    print(
        f"{len(lines)} kills, {alone} of one process, {writing} during the writing of a "
        f"checkpoint, {early} before the first checkpoint: every run ended with the weights of "
        "the uninterrupted run, bit for bit"
    )


if __name__ == "__main__":
    main()
