"""What libraries may say on the console while a run has its own progress line."""

from __future__ import annotations

import sys

import datasets
import huggingface_hub
import transformers


def quiet_libraries() -> None:
    """Switch off the bars and notes of the libraries; their warnings stay.

    Bars of downloads stay on a terminal, because a download takes long and nothing of ours shows it.
    """
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_warning()
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
