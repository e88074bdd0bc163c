"""Other libraries are quiet."""

from __future__ import annotations


def quiet_libraries() -> None:
    """Switch off the progress bars and notices of other libraries: progress is ours to show."""
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    disable_progress_bars()
    hub.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
