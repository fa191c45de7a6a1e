"""Times one ONNX file in ONNX Runtime: the limit that `serving.py` and `line.py` measure the served ensemble against.

Runs in the environment that has onnxruntime (`.venv-triton`), as a process of its own, so that the measured client
never imports it. Reads one JSON request a line on standard input, `{"batch": 8, "images": 32}`, and answers each with
one line, `{"seconds": [...]}`: the wall time of each run. ONNX Runtime keeps its own defaults (spinning threads
included): it is the best case, alone on the machine while it is asked.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import onnxruntime as ort


def main(path: str, threads: str) -> None:
    """Open the graph with this many threads, warm it up at batch 1 and 8, then answer requests until the input ends."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = int(threads)
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name, *_ = (tensor.name for tensor in session.get_inputs())
    shape = session.get_inputs()[0].shape[1:]
    for batch in (1, 8):
        _time_run(session, name, np.zeros((batch, *shape), np.uint8))
    print(json.dumps({"ready": True}), flush=True)
    generator = np.random.default_rng(0)
    for line in sys.stdin:
        request = json.loads(line)
        images = generator.integers(0, 255, (request["batch"], *shape), dtype=np.uint8)
        runs = max(1, request["images"] // request["batch"])
        print(json.dumps({"seconds": [_time_run(session, name, images) for _ in range(runs)]}), flush=True)


def _time_run(session: Any, name: str, images: Any) -> float:
    start = time.perf_counter()
    session.run(None, {name: images})
    return time.perf_counter() - start


if __name__ == "__main__":
    main(*sys.argv[1:])
