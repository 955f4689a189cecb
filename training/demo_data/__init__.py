"""Demonstration data: easy-VQA images and BabyAI clips, made from installed packages.

    python -m training.demo_data --output data/demo

Nothing is downloaded. The same arguments give the same rows with any number of workers.
"""
