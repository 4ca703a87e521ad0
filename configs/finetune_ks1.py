"""Speech Commands v1 (KS1): ten commands, `_unknown_` and `_silence_`, as SUPERB has them.

    beats-jax prepare speech_commands_v0.01 ks1_prepared
    python -m beats_jax.main --config=configs/finetune_ks1.py --workdir=W \
        --config.data.dir=ks1_prepared --config.init_from=BEATs_iter3.pt

`W/ks1/finetune/results.json` holds the accuracy on the testing list, of all its words: SUPERB's
testing set is an archive of its own with few unknown words, which is a folder of classes for
`beats-jax evaluate`. Weights are chosen by the validation list; sampling is balanced, because most
clips are of unknown words.
Reproduces: BEATs (paper, table 1), 98.0 % from iteration 1, 97.7 % from 3, 98.1 % from iter3+.
Not verified here: that takes official weights and an accelerator.
Cost (estimate) and hyper-parameters: as `finetune_ks2.py`, with whose doubts.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """finetune_ks2 with twelve classes, drawn equally often."""
    config = runpy.run_path(str(Path(__file__).with_name("finetune_ks2.py")))["get_config"]()
    config.iteration = "ks1"
    config.data.update(dict(mean=11.43905, std=5.64913))
    config.finetune.balanced_sampling = True
    return config
