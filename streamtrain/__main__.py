"""Run `streamtrain`, also as `python -m streamtrain`; Ctrl-C is answered before it imports what takes a while."""

import sys

from sharding.interrupt import handle_interrupts


def main() -> int:
    handle_interrupts()
    from streamtrain.cli import main as run_command
    from streamtrain.startup import configure_threads

    configure_threads()
    return run_command()


if __name__ == "__main__":
    sys.exit(main())
