"""Speed against yardsticks measured in the same run: `tools/benchmark.py`. One module per suite."""
