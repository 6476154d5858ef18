"""The CPU suite: training steps and greedy decoding, against transformers (eager) in the same run.

- `training`: dense and stitched steps, their memory, and the stitched step against the count of operations.
- `scaling`: the stitched step as experts and stitch layers grow, against the count of operations.
- `decode-...`: tokens per second with a cache, for each shape, precision and batch.
"""

from megabts.benchmark import decode
from megabts.benchmark.suite import Benchmark
from megabts.benchmark.training import scaling, training

BENCHMARKS = (
    Benchmark("training", training, needs=("transformers",)),
    Benchmark("scaling", scaling),
    *decode.BENCHMARKS,
)
