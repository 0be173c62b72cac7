"""argrpo: GRPO fine-tuning of autoregressive image models. Importing it imports no deep-learning library."""

from __future__ import annotations

__version__ = "0.1.0"
