"""`python -m streamtrain`: answers Ctrl-C before it imports what takes a while."""

import sys

from sharding.interrupt import handle_interrupts

if __name__ == "__main__":
    handle_interrupts()
    from streamtrain.cli import main
    from streamtrain.startup import configure_threads

    configure_threads()
    sys.exit(main())
