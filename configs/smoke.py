"""The whole loop on sounds made on the fly: what `bash launch/local.sh` runs, in minutes, on a CPU.

    python -m beats_jax.main --config=configs/smoke.py --workdir=/tmp/smoke

Reproduces nothing: it shows that everything is installed and works, and every test of the loop
starts from it.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Iteration 1 of a tiny model (2 layers of 64) on 13 classes of synthetic sounds, 2 s each."""
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
            model=dict(preset="tiny", bias_init="local", dropout=0.0, layerdrop=0.0),
            data=dict(
                source="synthetic",
                dir="",
                filter="",
                group="",
                num_clips=512,
                val_fraction=0.1,
                clip_seconds=2.0,
                mean=15.41663,
                std=6.55582,
            ),
            input=dict(backend="tf", frontend="auto", workers=1, prefetch=4),
            tokenizer=dict(
                mode="bestrq", codebook_size=1024, dim=16, pool=4, loudness_weight=0.1, seed=0
            ),
            pretrain=dict(
                steps=300,
                batch_size=16,
                micro_batches=1,
                lr=2e-3,
                warmup_steps=30,
                schedule="linear",
                b1=0.9,
                b2=0.98,
                eps=1e-8,
                weight_decay=0.01,
                clip_norm=1.0,
                visible=0.25,
                positions="true",
                mask_token="learned",
                predictor_layers=2,
                label_smoothing=0.0,
                calibration_batches=8,
                save_every=100,
                log_every=10,
                eval_every=100,
                keep=2,
                keep_best="",
            ),
        )
    )
