"""Masked pre-training (paper, section 3.3): predict the acoustic tokens of hidden patches.

Three quarters of a clip's patches are hidden; the encoder sees the others, at their true
positions, and a shallow predictor guesses every hidden patch's token. The tokenizer is frozen and
comes in as an argument: the arrays of a random projection (iteration 1) or of a distilled tokenizer
(later), which sees the whole clip; or its ids come in the batch ("token_ids").

What a healthy run looks like: `loss` falls below `unigram_loss` (what guessing from each band's
token counts would cost) within a few hundred steps and `masked_accuracy` leaves
`unigram_accuracy` behind. Staying at the unigram means a collapse: `warn` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from beats_jax.fbank import BANDS, SAMPLE_RATE, num_tokens
from beats_jax.flops import encoder_flops, predictor_flops, tokenizer_flops
from beats_jax.losses import cross_entropy
from beats_jax.masking import Visible, random_masking
from beats_jax.metrics import Histogram, Mean, Spread, summarize
from beats_jax.models.beats import BEATs, Predictor, token_padding_mask
from beats_jax.models.tokenizer import (
    Tokenizer,
    distilled_ids,
    init_random_projection,
    random_projection_ids,
)
from beats_jax.stages import (
    Metrics,
    Pretrained,
    Stage,
    batch_patches,
    compute_dtype,
    example_noise,
    model_arguments,
    named_key,
    no_alarm,
    renormalisation,
)

COUNT_DECAY = 0.999  # of the running code counts: about the last 1000 batches
LOW_PERPLEXITY = 50.0  # below this most patches share a few dozen codes
# Rules of thumb from small runs: healthy ones reach 2.5 times the unigram and a spread of 0.3.
LOW_GAIN, LOW_SPREAD = 1.2, 0.05


def band_counts(token_ids: jax.Array, where: jax.Array, num_codes: int) -> jax.Array:
    """How often each code occurs in each mel band.

    Args:
      token_ids: int32 [B, L], time-major: the band of token p is p % 8.
      where: bool [B, L], which tokens count.
      num_codes: size of the codebook, K.

    Returns:
      float32 [8, K].
    """
    band = jnp.arange(token_ids.shape[1]) % BANDS
    flat = (band * num_codes + token_ids).reshape(-1)
    counts = jnp.zeros(BANDS * num_codes, jnp.float32)
    counts = counts.at[flat].add(where.reshape(-1).astype(jnp.float32))
    return counts.reshape(BANDS, num_codes)


def unigram(counts: jax.Array, token_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What guessing from each band's token counts scores on every token.

    Args:
      counts: [8, K] of the training data so far.
      token_ids: int32 [B, L].

    Returns:
      The cross-entropy in nats (add-one smoothed), float32 [B, L], and whether the band's most
      frequent code is right, bool [B, L].
    """
    band = jnp.arange(token_ids.shape[1]) % BANDS
    log_probs = jnp.log((counts + 1) / jnp.sum(counts + 1, axis=-1, keepdims=True))
    loss = -log_probs[band, token_ids]
    return loss, jnp.argmax(counts, axis=-1)[band] == token_ids


def measure(
    counts: jax.Array,
    seen: jax.Array,
    token_ids: jax.Array,
    predictions: tuple[jax.Array, Visible, jax.Array, jax.Array],
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array, Metrics, dict[str, jax.Array]]:
    """Loss and figures of one batch's predictions.

    Args:
      counts: [8, K], the unigram's.
      seen: [8, K], the batch's own (`band_counts`).
      token_ids: int32 [B, L].
      predictions: features [B, K', D], the visible tokens, hidden bool [B, L] (to predict), and
        logits [B, L, K].
      label_smoothing: of the loss.

    Returns:
      Sum of the loss over hidden tokens, their number, metrics, and per token: `nll`, `valid`
      (hidden) and `predicted_ids`, each [B, L].
    """
    features, visible, hidden, logits = predictions
    nll = cross_entropy(logits, token_ids, label_smoothing)
    predicted = jnp.argmax(logits, axis=-1)
    guess_loss, guess_right = unigram(counts, token_ids)
    metrics = {
        "loss": Mean.of(nll, hidden),
        "masked_accuracy": Mean.of(predicted == token_ids, hidden),
        "unigram_loss": Mean.of(guess_loss, hidden),
        "unigram_accuracy": Mean.of(guess_right, hidden),
        "code": Histogram(jnp.sum(seen, axis=0)),
        "predicted_code": Histogram.of(predicted, logits.shape[-1], hidden),
        "feature_std": _spread(features, visible.valid),
    }
    tokens = {"nll": nll, "valid": hidden, "predicted_ids": predicted}
    return *metrics["loss"], metrics, tokens


def make(
    encoder: BEATs,
    predictor: Predictor,
    tokenize: Callable[[Any, jax.Array, jax.Array], jax.Array] | None,
    *,
    mean: float,
    std: float,
    keep: float = 0.25,
    positions: str = "true",
    label_smoothing: float = 0.0,
    flops_per_clip: float = 0.0,
) -> Stage:
    """Masked pre-training as a `Stage`.

    Args:
      encoder: the model to train.
      predictor: turns the encoder's visible outputs into a token distribution at every place.
      tokenize: (frozen["tokenizer"], patches [B, L, 256], padding_mask [B, L]) -> ids int32 [B, L];
        None where the batch has "token_ids".
      mean, std: the log-mel's normalisation.
      keep: share of patches the encoder sees (paper: 0.25).
      positions: "true", or "compact" to close the gaps as ESPnet does.
      label_smoothing: of the cross-entropy.
      flops_per_clip: analytic cost of one training step per clip, for MFU.

    Raises:
      ValueError: unknown `positions`.
    """
    if positions not in ("true", "compact"):
        raise ValueError(f'positions "{positions}" is unknown; use "true" or "compact"')
    num_codes = predictor.num_classes

    def inputs(frozen, batch):
        patches = batch_patches(batch, mean, std)
        padding_mask = token_padding_mask(batch["num_samples"], patches.shape[1])
        if tokenize is None or "token_ids" in batch:
            return patches, padding_mask, batch["token_ids"]
        return patches, padding_mask, tokenize(frozen["tokenizer"], patches, padding_mask)

    def forward(params, patches, padding_mask, noise, rngs=None):
        visible, hidden = random_masking(noise, padding_mask, keep)
        kwargs: dict[str, Any] = dict(deterministic=rngs is None, rngs=rngs)
        features: Any = encoder.apply(
            {"params": params["encoder"]},
            patches,
            padding_mask,
            visible=visible,
            compact=positions == "compact",
            **kwargs,
        )
        logits: Any = predictor.apply(
            {"params": params["predictor"]},
            features,
            visible,
            patches.shape[1],
            padding_mask,
            **kwargs,
        )
        return features, visible, hidden, logits

    def init(rng, batch):
        patches = batch_patches(batch, mean, std)
        padding_mask = token_padding_mask(batch["num_samples"], patches.shape[1])
        noise = example_noise(rng, batch["counter"], patches.shape[1])
        visible, _ = random_masking(noise, padding_mask, keep)
        features, encoder_params = encoder.init_with_output(
            named_key(rng, "encoder"), patches, padding_mask, visible=visible
        )
        predictor_params = predictor.init(
            named_key(rng, "predictor"), features, visible, patches.shape[1], padding_mask
        )
        params = {"encoder": encoder_params["params"], "predictor": predictor_params["params"]}
        return params, {"band_counts": jnp.zeros((BANDS, num_codes), jnp.float32)}

    @jax.jit
    def count_codes(frozen, batch):
        _, padding_mask, token_ids = inputs(frozen, batch)
        return band_counts(token_ids, ~padding_mask, num_codes)

    def calibrate(params, model_state, frozen, batches, rng):
        del params, rng
        counts = model_state["band_counts"]
        for batch in batches:
            counts = counts + count_codes(frozen, batch)
        per_code = jnp.sum(counts, axis=0)
        report = summarize({"code": Histogram(per_code)})
        report["most_used_code"] = float(jnp.max(per_code) / jnp.sum(per_code))
        return {"band_counts": counts}, report

    def loss_fn(params, model_state, frozen, batch, rng):
        patches, padding_mask, token_ids = inputs(frozen, batch)
        noise = example_noise(named_key(rng, "mask"), batch["counter"], patches.shape[1])
        # The first example's counter tells micro-batches of one step apart.
        dropout = jax.random.fold_in(named_key(rng, "dropout"), batch["counter"][0])
        rngs = {"dropout": dropout, "layerdrop": named_key(rng, "layerdrop")}
        predictions = forward(params, patches, padding_mask, noise, rngs)
        seen = band_counts(token_ids, ~padding_mask, num_codes)
        loss_sum, weight, metrics, _ = measure(
            model_state["band_counts"], seen, token_ids, predictions, label_smoothing
        )
        return loss_sum, weight, ({"band_counts": seen}, metrics)

    def update_fn(model_state, stats):
        counts = COUNT_DECAY * model_state["band_counts"] + stats["band_counts"]
        return {"band_counts": counts}

    def eval_fn(params, model_state, frozen, batch):
        patches, padding_mask, token_ids = inputs(frozen, batch)
        # One fixed mask a clip, so that evaluations at different steps compare.
        noise = example_noise(jax.random.key(0), batch["counter"], patches.shape[1])
        predictions = forward(params, patches, padding_mask, noise)
        seen = band_counts(token_ids, ~padding_mask, num_codes)
        *_, metrics, tokens = measure(model_state["band_counts"], seen, token_ids, predictions)
        shown = {"patches": patches, "token_ids": token_ids, "padding_mask": padding_mask}
        return metrics, tokens | shown

    return Stage(init, calibrate, loss_fn, update_fn, eval_fn, warn, no_alarm, flops_per_clip)


def _spread(features: jax.Array, valid: jax.Array) -> Spread:
    """Spread over clips of the mean visible feature: near 0 when all clips look alike."""
    count = jnp.sum(valid, axis=1)
    summed = jnp.sum(features.astype(jnp.float32) * valid[..., None], axis=1)
    return Spread.of(summed / jnp.maximum(count, 1)[:, None], count > 0)


def warn(metrics: dict[str, float]) -> str | None:
    """What is unhealthy in a report of `calibrate` or in one step's metrics, and what to change."""
    if metrics.get("code_perplexity", LOW_PERPLEXITY) < LOW_PERPLEXITY:
        return (
            f"the tokens use only {metrics['code_perplexity']:.0f} codes' worth of the codebook "
            "(perplexity): a random projection's are probably decided by loudness, lower "
            "--config.random_projection.loudness_weight or check --config.data.mean and .std "
            "(`beats-jax stats`); a distilled tokenizer's own plots show where its codes went"
        )
    if "masked_accuracy" in metrics and (
        metrics["masked_accuracy"] < LOW_GAIN * metrics["unigram_accuracy"]
        or metrics["feature_std"] < LOW_SPREAD
    ):
        return (
            f"looks collapsed: masked accuracy {metrics['masked_accuracy']:.3f} against the "
            f"per-band unigram's {metrics['unigram_accuracy']:.3f}, feature_std "
            f"{metrics['feature_std']:.3f}; lower --config.pretrain.lr, lengthen its warmup_steps "
            "or take --config.model.bias_init=local"
        )
    return None


def random_projection(config: Any) -> tuple[Callable, dict[str, Any], int]:
    """Iteration 1's tokenizer: how ids come from patches, its arrays, the number of codes."""
    options = config.random_projection
    arrays = init_random_projection(
        options.seed,
        codebook_size=options.codebook_size,
        dim=options.dim,
        pool=options.pool,
        mode=options.mode,
    )

    def tokenize(arrays, patches, padding_mask):
        del padding_mask
        return random_projection_ids(
            arrays,
            patches,
            mode=options.mode,
            loudness_weight=options.loudness_weight,
            std=config.data.std,
        )

    return tokenize, arrays, options.codebook_size


def distilled(config: Any, tokenizer: Pretrained) -> tuple[Callable, dict[str, Any], Tokenizer]:
    """A learned tokenizer: how ids come from patches, its arrays, its model."""
    assert tokenizer.codebook is not None
    encoder = tokenizer.model.clone(dtype=compute_dtype(config.precision), remat="")
    model = Tokenizer(encoder, tokenizer.codebook.shape[1])
    used = ("encoder", "quantize_layer_0", "quantize_layer_2")
    arrays = {
        "params": {name: tokenizer.params[name] for name in used},
        "codebook": tokenizer.codebook,
        "renormalise": renormalisation(tokenizer, config),
    }

    def tokenize(arrays, patches, padding_mask):
        factor, offset = arrays["renormalise"]
        patches = patches * factor + offset
        return distilled_ids(model, arrays["params"], arrays["codebook"], patches, padding_mask)

    return tokenize, arrays, model


def from_config(config: Any, tokenizer: Pretrained | int | None) -> tuple[Stage, dict[str, Any]]:
    """The stage of a config, and what is frozen in it: the tokenizer's arrays.

    Args:
      config: of the run.
      tokenizer: a distilled one; None for the random projection; or the number of codes, where the
        ids come in the batch.

    Raises:
      ValueError: an unknown preset, tokenizer mode or option.
    """
    section = config.pretrain
    model = BEATs(**model_arguments(config))
    tokens = int(num_tokens(round(config.data.clip_seconds * SAMPLE_RATE)))
    frozen: dict[str, Any] = {}
    tokenize, labelling = None, 0.0
    if tokenizer is None:
        tokenize, frozen["tokenizer"], num_codes = random_projection(config)
    elif isinstance(tokenizer, Pretrained):
        tokenize, frozen["tokenizer"], labeller = distilled(config, tokenizer)
        num_codes = tokenizer.num_codes
        labelling = tokenizer_flops(labeller, tokens, num_codes)
    else:
        num_codes = tokenizer
    predictor = Predictor(
        **model.settings()
        | dict(
            num_layers=section.predictor_layers,
            num_classes=num_codes,
            mask_token=section.mask_token,
        )
    )
    visible = round(section.visible * tokens)
    forward = encoder_flops(model, tokens, visible) + predictor_flops(predictor, tokens, visible)
    stage = make(
        model,
        predictor,
        tokenize,
        mean=config.data.mean,
        std=config.data.std,
        keep=section.visible,
        positions=section.positions,
        label_smoothing=section.label_smoothing,
        flops_per_clip=3 * forward + labelling,
    )
    return stage, frozen
