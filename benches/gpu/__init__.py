"""What only a GPU can show: `python -m benches.gpu --out DIR` builds, checks, measures and records it in one file."""
