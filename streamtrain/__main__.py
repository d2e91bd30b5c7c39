"""`python -m streamtrain`: answers Ctrl-C before it imports what takes a while."""

import sys

from sharding.interrupt import answer_interrupts

if __name__ == "__main__":
    answer_interrupts()
    from streamtrain.cli import main
    from streamtrain.startup import settle_torch

    settle_torch()
    sys.exit(main())
