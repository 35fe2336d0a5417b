"""What `experiments/benchmark.py` measures: rows of our work beside a peer's, each side in a process of its own."""
