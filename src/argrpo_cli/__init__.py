"""argrpo: GRPO fine-tuning of autoregressive image models. Importing it imports no deep-learning library."""

from __future__ import annotations

import logging
import os

# TRL reports every trainer it builds to its makers unless told otherwise before it is imported; users' runs are theirs.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it where it is, and it tells what it lacks

__version__ = "0.1.0"
