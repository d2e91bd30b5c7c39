"""Train: `deepspeed --quiet launch/train.py --config configs/zero2.json [--set section.key=value …]`."""

import os
import sys

# The launcher puts launch/ there, not the repository
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def main() -> int:
    from sharding.interrupt import handle_interrupts

    handle_interrupts()
    from streamtrain import ranks

    return ranks.main(ranks.train, "launch/train.py", __doc__)


if __name__ == "__main__":
    sys.exit(main())
