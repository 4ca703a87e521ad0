"""Iteration 3+ of the paper: the tokenizer learns from a fine-tuned (supervised) iteration 2.

    python -m beats_jax.main --config=configs/iter3plus.py --workdir=W \
        --config.data.dir=/data/audioset_prepared --config.teacher=BEATs_iter2_finetuned_AS2M.pt

The teacher is `W/iter2/finetune` unless `config.teacher` names another: the estimator learns its
class logits, patch by patch (our reading of the paper; there is no code for this step anywhere).
Reproduces: BEATs_iter3+ with the AudioSet-2M teacher (paper): after fine-tuning 48.6 mAP on
AudioSet-2M, 98.1 % on ESC-50 (with AudioSet-2M's labels); with the AudioSet-20K teacher 38.9 on
AudioSet-20K. Not verified here: that takes AudioSet and an accelerator.
Cost (estimate): as `iter2.py`. From the paper: the tokenizer's peak rate, ten times `iter2.py`'s.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """iter2's recipe with a supervised teacher."""
    config = runpy.run_path(str(Path(__file__).with_name("iter2.py")))["get_config"]()
    config.iteration = "iter3plus"
    config.tokenizer.lr = 5e-4
    return config
