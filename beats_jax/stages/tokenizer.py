"""Tokenizer distillation (paper, section 3.2): learn tokens that a teacher's knowledge fits into.

An encoder and a codebook turn every patch into one of K codes; from the codes alone a shallow
estimator has to tell what a frozen teacher says of each patch: the last layer's output of the
encoder of the iteration before, or the class logits of a fine-tuned one (iter3+; per patch, since
the head is applied before pooling: our reading of the paper). No masking: everybody sees the whole
clip. Loss, summed over unpadded patches: 1 - cos(estimate, teacher), plus `commitment` times the
squared distance of the normalised vector to its code (paper, Eq. 3; the codebook's own term is a
moving average instead).

The codebook is no parameter: gradients do not touch it. It starts from k-means over the untrained
encoder's vectors and moves in `update_fn`, from sums over the whole batch.

What a healthy run looks like: `teacher_cosine` leaves `constant_cosine` (the best that one vector
for all patches could do) behind, and `codes_used` stays a large part of what a batch could use. A
codebook of which hardly anything is used for long stops the run.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from beats_jax.fbank import SAMPLE_RATE, num_tokens
from beats_jax.flops import encoder_flops, estimator_flops, tokenizer_flops
from beats_jax.metrics import Histogram, Mean, Resultant, summarize
from beats_jax.models.beats import BEATs, token_padding_mask
from beats_jax.models.quantizer import (
    candidate_sums,
    code_statistics,
    kmeans,
    l2_normalise,
    move_codes,
    move_usage,
    quantize,
    revive,
)
from beats_jax.models.tokenizer import Estimator, Tokenizer
from beats_jax.stages import (
    Pretrained,
    Stage,
    batch_patches,
    example_noise,
    model_arguments,
    named_key,
    renormalisation,
)

DEAD = 1e-3  # usage below it: at a decay of 0.99, not taken for some hundred batches
KMEANS_VECTORS = 50_000  # of several batches: enough to stop looking for more


def make(
    tokenizer: Tokenizer,
    estimator: Estimator,
    teacher: BEATs,
    num_codes: int,
    *,
    mean: float,
    std: float,
    commitment: float = 0.04,
    decay: float = 0.99,
    revive_below: float = 0.0,
    batch_tokens: int = 0,
    collapse_share: float = 0.0,
    collapse_steps: int = 0,
    flops_per_clip: float = 0.0,
) -> Stage:
    """Tokenizer distillation as a `Stage`.

    Args:
      tokenizer: the model to train.
      estimator: tells the teacher's output from the codes.
      teacher: the frozen encoder; `frozen["teacher"]` holds its arrays (`teacher_arrays`).
      num_codes: size of the codebook, K.
      mean, std: the log-mel's normalisation.
      commitment: weight of the commitment loss, in the paper's units (a sum over the code's
        dimension; the official code's beta is on the mean).
      decay: of the codebook's and the usage's moving averages.
      revive_below: usage (codes a batch) under which a code is thrown to where vectors are; 0 =
        never, as in the paper.
      batch_tokens: patches in a global batch, which `revive_below` chooses from.
      collapse_share, collapse_steps: with less than this share of the codes in use for this many
        steps in a row the run stops; 0 = never.
      flops_per_clip: analytic cost of one training step per clip, for MFU.
    """

    def inputs(batch):
        patches = batch_patches(batch, mean, std)
        return patches, token_padding_mask(batch["num_samples"], patches.shape[1])

    def target(frozen, patches, padding_mask):
        arrays = frozen["teacher"]
        factor, offset = arrays["renormalise"]
        x = teacher.apply({"params": arrays["encoder"]}, patches * factor + offset, padding_mask)
        x = jnp.asarray(x, jnp.float32)
        if "head" in arrays:
            x = x @ arrays["head"]["kernel"] + arrays["head"]["bias"]
        return x

    def forward(params, codebook, frozen, batch, rngs=None):
        patches, padding_mask = inputs(batch)
        kwargs: dict[str, Any] = dict(deterministic=rngs is None, rngs=rngs)
        vectors: Any = tokenizer.apply({"params": params}, patches, padding_mask, **kwargs)
        quantized = quantize(vectors, codebook)
        estimate: Any = estimator.apply(
            {"params": params["estimator"]}, quantized.codes, padding_mask, **kwargs
        )
        estimate, wanted = map(l2_normalise, (estimate, target(frozen, patches, padding_mask)))
        return patches, ~padding_mask, quantized, estimate, wanted

    def measure(model_state, valid, quantized, estimate, wanted, counts):
        cosine = jnp.sum(estimate * wanted, axis=-1)
        loss = 1 - cosine + commitment * quantized.distance
        dead = jnp.sum(model_state["usage"] < DEAD)
        metrics = {
            "loss": Mean.of(loss, valid),
            "teacher_cosine": Mean.of(cosine, valid),
            "constant_cosine": Resultant.of(wanted, valid),
            "commitment": Mean.of(quantized.distance, valid),
            "code": Histogram(counts),
            "dead_codes": Mean.of(dead),
            "steps_collapsed": Mean.of(model_state["steps_collapsed"]),
        }
        return loss, metrics

    def statistics(quantized, valid):
        unit = quantized.unit.reshape(-1, quantized.unit.shape[-1])
        return unit, code_statistics(unit, quantized.ids.reshape(-1), valid.reshape(-1), num_codes)

    def init(rng, batch):
        patches, padding_mask = inputs(batch)
        vectors, params = tokenizer.init_with_output(
            named_key(rng, "tokenizer"), patches, padding_mask
        )
        codes = quantize(vectors, jnp.zeros((num_codes, vectors.shape[-1]), jnp.float32)).codes
        estimator_params = estimator.init(named_key(rng, "estimator"), codes, padding_mask)
        model_state = {
            "codebook": jnp.zeros((num_codes, vectors.shape[-1]), jnp.float32),
            "usage": jnp.zeros(num_codes, jnp.float32),
            "steps_collapsed": jnp.zeros((), jnp.int32),
        }
        return {**params["params"], "estimator": estimator_params["params"]}, model_state

    @jax.jit
    def unit_vectors(params, batch):
        patches, padding_mask = inputs(batch)
        vectors = tokenizer.apply({"params": params}, patches, padding_mask)
        return l2_normalise(jnp.asarray(vectors)), ~padding_mask

    @jax.jit
    def cluster(rng, parts):
        unit, where = (jnp.concatenate([x.reshape(-1, *x.shape[2:]) for x in p]) for p in parts)
        return kmeans(rng, unit, where, num_codes)

    def calibrate(params, model_state, frozen, batches, rng):
        del frozen
        parts, found = [], 0
        for batch in batches:
            parts.append(unit_vectors(params, batch))
            found += int(jnp.sum(parts[-1][1]))
            if found >= KMEANS_VECTORS and len(parts) > 1:
                break
        codebook, bins = cluster(named_key(rng, "kmeans"), list(zip(*parts, strict=True)))
        report = {"kmeans_vectors": float(found), **summarize({"code": Histogram(bins)})}
        usage = bins / len(parts)
        return {**model_state, "codebook": codebook, "usage": usage}, report

    def loss_fn(params, model_state, frozen, batch, rng):
        # The first example's counter tells micro-batches of one step apart.
        dropout = jax.random.fold_in(named_key(rng, "dropout"), batch["counter"][0])
        rngs = {"dropout": dropout, "layerdrop": named_key(rng, "layerdrop")}
        _, valid, quantized, estimate, wanted = forward(
            params, model_state["codebook"], frozen, batch, rngs
        )
        unit, stats = statistics(quantized, valid)
        if revive_below:
            throw = example_noise(named_key(rng, "revive"), batch["counter"], valid.shape[1])
            where = valid.reshape(-1)
            stats["candidates"] = candidate_sums(
                throw.reshape(-1), unit, where, num_codes, batch_tokens
            )
        _, metrics = measure(model_state, valid, quantized, estimate, wanted, stats["counts"])
        # A codebook that follows its vectors is no function that gradients go through.
        return *metrics["loss"], (jax.lax.stop_gradient(stats), metrics)

    def update_fn(model_state, stats):
        codebook = move_codes(model_state["codebook"], stats["counts"], stats["sums"], decay)
        usage = move_usage(model_state["usage"], stats["counts"], decay)
        if revive_below:
            codebook, usage = revive(codebook, usage, stats["candidates"], revive_below)
        low = jnp.sum(stats["counts"] > 0) < collapse_share * num_codes
        steps = jnp.where(low, model_state["steps_collapsed"] + 1, 0)
        return {"codebook": codebook, "usage": usage, "steps_collapsed": steps}

    def eval_fn(params, model_state, frozen, batch):
        patches, valid, quantized, estimate, wanted = forward(
            params, model_state["codebook"], frozen, batch
        )
        _, stats = statistics(quantized, valid)
        loss, metrics = measure(model_state, valid, quantized, estimate, wanted, stats["counts"])
        shown = {"patches": patches, "token_ids": quantized.ids, "padding_mask": ~valid}
        figures = ("loss", "teacher_cosine", "constant_cosine", "commitment", "code")
        return {name: metrics[name] for name in figures}, {"nll": loss, "valid": valid} | shown

    def alarm(metrics):
        if not collapse_steps:
            return None
        total, weight = metrics["steps_collapsed"]
        if (steps := float(total) / float(weight)) < collapse_steps:
            return None
        return (
            f"the codebook has collapsed: fewer than {collapse_share:.1%} of its {num_codes} codes "
            f"in use for {steps:.0f} steps; start again in another --workdir "
            "with a lower --config.tokenizer.lr, a longer warmup_steps, another "
            "--config.tokenizer.commitment, or --config.tokenizer.revive_below=0.01"
        )

    return Stage(init, calibrate, loss_fn, update_fn, eval_fn, warn, alarm, flops_per_clip)


def warn(metrics: dict[str, float]) -> str | None:
    """What is unhealthy in a report of `calibrate` or in one step's metrics, and what to change."""
    used, perplexity = metrics.get("codes_used", 1.0), metrics.get("code_perplexity", 1.0)
    if used > 1 and perplexity < 0.1 * used:
        return (
            f"few codes do the work: perplexity {perplexity:.0f} of {used:.0f} codes in use; a "
            "larger --config.tokenizer.commitment may help"
        )
    if metrics.get("teacher_cosine", 1.0) < metrics.get("constant_cosine", 0.0):
        return (
            f"the tokens say nothing of the teacher: cosine {metrics['teacher_cosine']:.2f}, where "
            f"one vector for all patches has {metrics['constant_cosine']:.2f}; raise "
            "--config.tokenizer.lr or train longer"
        )
    return None


def teacher_arrays(teacher: Pretrained, config: Any) -> dict[str, Any]:
    """What the step needs of a teacher: its encoder, its head if it has one, its front end."""
    arrays = {name: teacher.params[name] for name in ("encoder", "head") if name in teacher.params}
    return {**arrays, "renormalise": renormalisation(teacher, config)}


def from_config(config: Any, teacher: Pretrained) -> tuple[Stage, dict[str, Any]]:
    """The stage of a config, and what is frozen in it: the teacher.

    Raises:
      ValueError: an unknown preset.
    """
    section = config.tokenizer
    model = Tokenizer(BEATs(**model_arguments(config)), section.codebook_dim)
    head = teacher.params.get("head")
    width = teacher.model.embed_dim if head is None else head["kernel"].shape[1]
    same = head is None and width == model.encoder.embed_dim
    estimator = Estimator(
        **model.encoder.settings()
        | dict(num_layers=section.estimator_layers, target_dim=None if same else width)
    )
    teacher_model = teacher.model.clone(dtype=model.encoder.dtype, remat="")
    tokens = int(num_tokens(round(config.data.clip_seconds * SAMPLE_RATE)))
    student = tokenizer_flops(model, tokens, section.codebook_size) + estimator_flops(
        estimator, section.codebook_dim, tokens
    )
    stage = make(
        model,
        estimator,
        teacher_model,
        section.codebook_size,
        mean=config.data.mean,
        std=config.data.std,
        commitment=section.commitment,
        decay=section.ema_decay,
        revive_below=section.revive_below,
        batch_tokens=section.batch_size * tokens,
        collapse_share=section.collapse_share,
        collapse_steps=section.collapse_steps,
        flops_per_clip=encoder_flops(teacher_model, tokens) + 3 * student,
    )
    return stage, {"teacher": teacher_arrays(teacher, config)}
