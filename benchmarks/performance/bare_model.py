"""The trainer's model as transformers loads it, and nothing else: prints when it is there.

Run: python -m benchmarks.performance.bare_model MODEL
"""

import json
import sys
import time


def main() -> None:
    """Load it and print the moment."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")
    print(json.dumps({"ready": time.monotonic()}), flush=True)


if __name__ == "__main__":
    main()
