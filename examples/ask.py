"""Ask a question about a clip, then find a clip by a sentence: `python examples/ask.py MODEL`."""

import sys
from glob import glob

import torch
from transformers import AutoModel, AutoProcessor

import modeling_vljepa  # noqa: F401  makes VL-JEPA known to AutoModel and AutoProcessor

model, processor = (auto.from_pretrained(sys.argv[1]) for auto in (AutoModel, AutoProcessor))
clips = sorted(glob("data/demo/babyai/clips/test_*.mp4"))[:50]

with torch.inference_mode():
    answers = ["zero", "one", "two", "three", "four"]
    asked = processor(videos=clips[0], text="How many balls are there?")
    scores = model.predict(**asked) @ model.encode_target(**processor(targets=answers)).T
    print(clips[0], dict(zip(answers, scores[0].tolist(), strict=True)))

    library = processor(videos=clips, text=[model.config.prompts["retrieval"]] * len(clips))
    wanted = model.encode_target(**processor(targets="pick up the blue key"))
    print(clips[(model.predict(**library) @ wanted.T).argmax()])
