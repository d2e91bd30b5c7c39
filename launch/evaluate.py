"""Score a model: `deepspeed --quiet launch/evaluate.py --model RUN/best --shards SHARDS --out DIR`."""

import os
import sys

# The launcher puts launch/ there, not the repository
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def main() -> int:
    from sharding.interrupt import handle_interrupts

    handle_interrupts()
    from streamtrain import ranks

    return ranks.main(ranks.evaluate, "launch/evaluate.py", __doc__)


if __name__ == "__main__":
    sys.exit(main())
