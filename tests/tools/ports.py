"""Ports of loopback for the servers and ranks of several processes of tests at once."""

import itertools
import os
import socket
from contextlib import suppress

# Below those the kernel gives to whoever asks for any, and each process of the tests begins elsewhere: what is free
# when it is looked for is then still free when a server takes it
PORTS = range(10_000, 32_000)
_places = itertools.count(os.getpid() * 97)


def free_port() -> int:
    while True:
        port = PORTS[next(_places) % len(PORTS)]
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
