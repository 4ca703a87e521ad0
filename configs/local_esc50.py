"""A small model on folders of real audio: an hour on two CPU cores.

    beats-jax stats PREPARED…   # the mean and std below are those of ESC-50's and RAVDESS's clips
    python -m beats_jax.main --config=configs/local_esc50.py --workdir=runs/local \
        --config.data.dir=ESC50_FOLDER,RAVDESS_FOLDER

Reproduces nothing of the paper: it shows that the loop learns, on audio a laptop can hold. README,
"Results", has the curves and the probe it led to. A folder is any folder of audio, with or without
a metadata.csv; `--config.data.filter="esc10=True,fold!=5"` selects rows of that file.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Iteration 1, small: random-projection tokens of 4×4-pooled patches, 4 layers of 192."""
    return ConfigDict(
        dict(
            seed=0,
            iteration="iter1",
            stages=("pretrain",),
            resume="",
            init_from="",
            precision="auto",
            remat="",
            deterministic=False,
            compilation_cache="~/.cache/beats_jax/xla",
            mesh=dict(data=-1, fsdp=1, tensor=1),
            # A short run does not find locality by itself; method.md (b) 6.
            model=dict(preset="small", bias_init="local", dropout=0.0, layerdrop=0.0),
            data=dict(
                source="folder",
                dir="",
                filter="",
                num_clips=512,  # of synthetic sounds
                group="src_file",
                val_fraction=0.1,
                clip_seconds=4.0,
                mean=8.42069,
                std=9.83390,
            ),
            input=dict(backend="tf", frontend="auto", workers=1, prefetch=4),
            tokenizer=dict(
                mode="bestrq", codebook_size=1024, dim=16, pool=4, loudness_weight=0.1, seed=0
            ),
            pretrain=dict(
                steps=1500,
                batch_size=32,
                micro_batches=1,
                lr=7e-4,
                warmup_steps=150,
                schedule="linear",
                b1=0.9,
                b2=0.98,
                eps=1e-8,
                weight_decay=0.01,
                clip_norm=1.0,
                visible=0.25,
                positions="true",
                mask_token="learned",
                predictor_layers=3,
                label_smoothing=0.0,
                calibration_batches=20,
                save_every=100,
                log_every=25,
                eval_every=150,
                keep=2,
                keep_best="",
            ),
        )
    )
