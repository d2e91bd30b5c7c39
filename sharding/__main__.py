"""Run `python -m sharding`; Ctrl-C is answered before it imports what takes a while."""

import sys

from sharding.interrupt import handle_interrupts

if __name__ == "__main__":
    handle_interrupts()
    from sharding.cli import main

    sys.exit(main())
