"""One script per claim: `make bench NAME=...` runs `python -m benchmarks.NAME`."""
