"""Tokens a second with 1 and with 2 replicas, on a local Ray.

    python examples/ray_serve/measure.py gpt2-onnx/ --clients 16 --seconds 20

Each replica has one thread. The two numbers are measured alternately, several times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
import time
import urllib.request
from pathlib import Path

PORT = 8265


class Clients:
    """Clients that ask for texts until a time, and count the tokens.

    Args:
        number: how many ask at once.
        tokens: of each text.
    """

    def __init__(self, number: int, tokens: int) -> None:
        self.number = number
        self.tokens = tokens
        self.done = 0
        self._lock = threading.Lock()

    def run(self, seconds: float) -> float:
        """Returns the tokens a second."""
        begin = time.monotonic()
        threads = [threading.Thread(target=self._work, args=(begin + seconds,)) for _ in range(self.number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.done / (time.monotonic() - begin)

    def _work(self, end: float) -> None:
        body = {"prompt": "ROMEO:", "max_tokens": self.tokens, "temperature": 1}
        data = json.dumps(body).encode()
        while time.monotonic() < end:
            request = urllib.request.Request(
                f"http://127.0.0.1:{PORT}/v1/completions", data, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=300) as answer:
                count = json.load(answer)["usage"]["completion_tokens"]
            with self._lock:
                self.done += count


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="directory that gpt2x export --onnx --cache inplace wrote")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    here = Path(__file__).parent
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here), *sys.path])  # for the replicas
    import ray
    from app import build
    from ray import serve

    ray.init(num_cpus=4, resources={"gateway": 1}, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(arguments.rounds):
        for replicas, found in rates.items():
            serve.run(build({"model": str(Path(arguments.model).resolve()), "replicas": str(replicas)}))
            Clients(arguments.clients, arguments.tokens).run(3)  # until every replica is warm
            found.append(Clients(arguments.clients, arguments.tokens).run(arguments.seconds))
            serve.delete("default")
    for replicas, found in rates.items():
        print(f"{replicas} replicas: {statistics.median(found):.0f} tokens/s of {[round(rate) for rate in found]}")
    print(f"ratio: {statistics.median(rates[2]) / statistics.median(rates[1]):.2f}")
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
