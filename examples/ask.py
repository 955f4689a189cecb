"""Ask a question about a clip, then find a clip by a sentence: `python examples/ask.py MODEL`."""

import sys
from glob import glob

import torch
from transformers import AutoModel, AutoProcessor

import modeling_vljepa  # noqa: F401  makes VL-JEPA known to AutoModel and AutoProcessor

model, processor = (auto.from_pretrained(sys.argv[1]) for auto in (AutoModel, AutoProcessor))
clips = sorted(glob("data/demo/babyai/clips/val_*.mp4"))[:50]

with torch.inference_mode():
    clip = "data/demo/babyai/clips/val_1000000400.mp4"  # the agent picks up the purple key
    answers = ["the purple key", "the grey box", "the green key", "the red ball", "the blue box"]
    asked = processor(videos=clip, text="What did the agent pick up?")
    scores = model.predict(**asked) @ model.encode_target(**processor(targets=answers)).T
    print(clip, dict(zip(answers, scores[0].tolist(), strict=True)))

    library = processor(videos=clips, text=[model.config.prompts["retrieval"]] * len(clips))
    wanted = model.encode_target(**processor(targets="pick up the blue key"))
    print(clips[(model.predict(**library) @ wanted.T).argmax()])  # the true one is val_1000000500
