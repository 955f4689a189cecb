"""The demonstration data: easy-VQA images and BabyAI clips, made from installed packages alone.

    python -m training.demo_data --output data/demo

Nothing is downloaded. The same arguments give the same rows on any number of workers.
"""
