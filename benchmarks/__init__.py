"""What is fast, measured."""

from helpers import libraries

libraries.prepare()  # as train_sd2x.py does, before any of them is imported
