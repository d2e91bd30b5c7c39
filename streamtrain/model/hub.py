"""Check once, with a time limit, whether the model hub answers: libraries would each retry for a minute."""

import os
import ssl
import threading
import urllib.error
import urllib.request
from pathlib import Path
from queue import Empty, SimpleQueue

HUB = "https://huggingface.co"
HUB_SEC = 8.0


def needs_hub(name: str) -> bool:
    """Return whether a model is looked up on the hub: it is no local path, and HF_HUB_OFFLINE does not forbid it."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return not offline and not Path(name).is_dir() and not name.startswith(("/", ".", "~"))


def why_unreachable() -> str | None:
    """Return why the hub cannot be reached; None if it answers, with whatever status."""
    hub = os.environ.get("HF_ENDPOINT", HUB)
    answers: SimpleQueue[str | None] = SimpleQueue()
    threading.Thread(target=lambda: answers.put(_ask(hub)), daemon=True).start()  # a time-out does not bound all of it
    try:
        return answers.get(timeout=HUB_SEC)
    except Empty:
        return f"{hub} does not answer within {HUB_SEC:g} s"


def _ask(hub: str) -> str | None:
    try:
        urllib.request.urlopen(urllib.request.Request(hub, method="HEAD")).close()
    except (urllib.error.HTTPError, ssl.SSLError):
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return None if isinstance(reason, ssl.SSLError) else f"{hub}: {reason}"
    return None
