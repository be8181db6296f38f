"""What must hold between the groups of a configuration (a part of mmdiff/config.py)."""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mmdiff.config_model import AUTOENCODERS, DENSE_LIMIT, RAW_ONLY, SEMANTIC, TOKENIZERS, ConfigError, require
from mmdiff.config_tokenizer import AUTOENCODER_ONLY, SEMANTIC_ONLY

if TYPE_CHECKING:
    from mmdiff.config import Config

GUIDING = ("guidance_interval", "guidance_rescale")  # how guidance acts on denoising
IMAGE_SAMPLING = ("solver", "grid", "sigma_max", "sigma_min", *GUIDING)  # of denoising


def check(cfg: "Config") -> None:
    """Raises ConfigError."""
    _check_mesh(cfg)
    model, layout = cfg.model, cfg.layout
    require(
        (model.time == "token") == layout.time_token,
        f"model.time={model.time!r} and layout.time_token={layout.time_token} do not go together: set both or neither.",
    )
    if model.network != "transfusion":
        _check_rival(cfg)
    if cfg.few_step.objective != "none":
        _check_few_step(cfg)
    _check_tokenizer(cfg)
    _check_images(cfg)
    _check_front_end(cfg)
    require(
        cfg.sampling.solver != "few_step" or model.step_input,
        "sampling.solver='few_step' needs model.step_input=True, and training with few_step.objective.",
    )
    require(
        cfg.model.time_embedding == "smooth" or cfg.diffusion.schedule == "ddpm",
        "model.time_embedding='table' needs diffusion.schedule='ddpm': the table has one entry per DDPM step.",
    )


def _check_few_step(cfg: "Config") -> None:
    model, diffusion, name = cfg.model, cfg.diffusion, f"few_step.objective={cfg.few_step.objective!r}"
    require(model.step_input, f"{name} needs model.step_input=True.")
    require(
        diffusion.prediction == "x" and diffusion.schedule == "flow",
        f"{name} is for diffusion.prediction='x' with diffusion.schedule='flow', not {diffusion.prediction!r} with "
        f"{diffusion.schedule!r}.",
    )
    require(
        cfg.few_step.objective != "meanflow"
        or model.attention == "dense"
        or (model.attention == "auto" and cfg.layout.row_length**2 <= DENSE_LIMIT),
        f"{name} differentiates forwards, which only dense attention can: with model.attention={model.attention!r} and "
        f"layout.row_length={cfg.layout.row_length} set model.attention='dense', or few_step.objective='difference'.",
    )

    require(
        cfg.few_step.guidance == 1 or cfg.layout.markers,
        f"few_step.guidance={cfg.few_step.guidance} guides by text, and layout.markers=False has none.",
    )


def _check_rival(cfg: "Config") -> None:
    model, layout, size = cfg.model, cfg.layout, cfg.fixed_size
    name = f"model.network={model.network!r}"
    paired = model.network == "seed" and cfg.tokenizer.stage == 1
    require(paired or not layout.markers, f"{name} knows images alone: set layout.markers=False.")
    require(not layout.time_token, f"{name} has its own way to be told the time: set layout.time_token=False.")
    if size is None:
        raise ConfigError(f"{name} needs images of one size: set data.image_size.")
    halvings = len(model.channels) - 1 if model.network in ("unet", "conv_autoencoder") else 0
    require(
        size[0] % 2**halvings == 0 and size[1] % 2**halvings == 0,
        f"an image of {size[0]}x{size[1]} cannot be halved {halvings} times: with {name} and {halvings + 1} entries in "
        f"model.channels its sides must be multiples of {2**halvings}. Change data.image_size or model.channels.",
    )
    require(
        model.network not in ("unet", "conv_autoencoder") or cfg.optimizer.name != "muon",
        f"optimizer.name='muon' is for matrices of stacked layers, and {name} has none: use 'adamw' or 'lamb'.",
    )
    count = (size[0] // model.patch) * (size[1] // model.patch)
    require(
        paired or (count > 0 and layout.row_length % count == 0),
        f"layout.row_length={layout.row_length} must be a multiple of the {count} patches of an image with {name}.",
    )


def _check_images(cfg: "Config") -> None:
    model, layout, name = cfg.model, cfg.layout, f"layout.images={cfg.layout.images!r}"
    require(
        layout.codes == bool(cfg.data.tokenizer),
        f"{name} and data.tokenizer={cfg.data.tokenizer!r} do not go together: with codes set it to the folder of "
        "a tokenizer's run, with raw patches leave it empty.",
    )
    require(
        model.sparse == "none" or (layout.in_order and model.depth > 1),
        f"model.sparse={model.sparse!r} takes turns with layers and is for images that are read in order: it needs "
        f"model.depth above 1 and layout.images='next_...', not {model.depth} and {layout.images!r}.",
    )
    require(
        model.sparse == "none" or layout.order == "raster",
        f"layout.order={layout.order!r}: model.sparse={model.sparse!r} reads columns and rows, and so needs 'raster'.",
    )
    if layout.images == "denoised":
        return
    require(not model.step_input and cfg.few_step.objective == "none", f"{name} has no few-step training.")
    fields = (field.name for field in dataclasses.fields(cfg.diffusion) if field.name != "image_scale")
    _unread("diffusion", cfg.diffusion, fields, f"{name}, which does not denoise")
    ignored = [*IMAGE_SAMPLING, *(["steps"] if layout.images not in ("masked_code", "next_embedding") else [])]
    classified = layout.codes and layout.images != "next_vector"  # guidance mixes log-probabilities
    _unread("sampling", cfg.sampling, [*ignored, *([] if classified else ["guidance"])], name)
    unread: tuple[str, ...] = RAW_ONLY
    if cfg.front_end.kind != "none":
        unread, name = (*RAW_ONLY, "places"), f"front_end.kind={cfg.front_end.kind!r}"
    elif not layout.codes:
        unread = ("time", "time_embedding", "patch_head", "zero_head")
    _unread("model", model, unread, name)
    name, usual = f"layout.images={layout.images!r}", type(layout)().trailing_context
    require(
        layout.blocks or layout.trailing_context == usual,
        f"layout.trailing_context={layout.trailing_context} has no meaning with {name}, whose images always "
        f"stand in the stream; change that, or leave it at {usual}.",
    )
    if layout.images == "next_pixel":
        require(model.patch == 1, f"{name} predicts pixels: set model.patch=1, not {model.patch}.")
    if not layout.codes:
        return
    require(not model.lossless, f"{name} reads codes, which do not hold the whole image: set model.lossless=False.")
    require(not cfg.data.flip, f"data.flip=True mirrors raw patches, and {name} reads codes: set it to False.")


def _check_front_end(cfg: "Config") -> None:
    model, layout, front = cfg.model, cfg.layout, cfg.front_end
    require(
        layout.images != "next_embedding" or front.kind == "causal_former",
        "layout.images='next_embedding' predicts the vectors of front_end.kind='causal_former', each of which knows only those "
        f"before it, not of {front.kind!r}.",
    )
    if front.kind == "none":
        return
    name = f"front_end.kind={front.kind!r}"
    require(
        layout.images in ("read", "next_embedding"),
        f"{name} needs layout.images='read' or 'next_embedding', not {layout.images!r}.",
    )
    require(
        front.regression == "l2" or layout.images == "next_embedding",
        f"front_end.regression={front.regression!r} has no meaning with layout.images={layout.images!r}; leave it at 'l2'.",
    )
    require(cfg.fixed_size is not None, f"{name} needs images of one size: set data.image_size.")
    require(not model.lossless, f"{name} does not hold the whole image: set model.lossless=False.")
    require(model.sparse == "none", f"model.sparse={model.sparse!r} has no meaning with {name}: set it to 'none'.")
    require(layout.order == "raster", f"layout.order={layout.order!r} has no meaning with {name}: set it to 'raster'.")
    width = front.width or model.width
    require(
        front.kind in ("linear", "mlp", "merger") or width % front.heads == 0,
        f"front_end.heads={front.heads} does not divide the adapter's width, {width}: change front_end.heads or "
        "front_end.width.",
    )


def _check_tokenizer(cfg: "Config") -> None:
    model, settings = cfg.model, cfg.tokenizer
    if model.network not in TOKENIZERS:
        require(
            settings == type(settings)(),
            f"tokenizer: its fields are for model.network in {', '.join(map(repr, TOKENIZERS))}, not {model.network!r}; "
            "leave them at their defaults.",
        )
        return
    name = f"model.network={model.network!r}"
    require(
        model.network in AUTOENCODERS or settings.quantizer != "v2l",
        f"tokenizer.quantizer='v2l' codes pixels under words, and {name} what an encoder says: change one of them.",
    )
    unread: tuple[str, ...] = AUTOENCODER_ONLY if model.network in SEMANTIC else SEMANTIC_ONLY
    unread += {"lavit": ("stage",), "seed": ("deterministic", "keep", "causal")}.get(model.network, ())
    _unread("tokenizer", settings, (field for field in unread if (field, settings.quantizer) != ("tower", "v2l")), name)
    if model.network in SEMANTIC:
        _unread("diffusion", cfg.diffusion, ("image_scale",), name)
        _unread("sampling", cfg.sampling, ("guidance", *GUIDING), f"{name}, whose pixels follow no text")
    else:
        by = f"{name}, which does not denoise"
        _unread("diffusion", cfg.diffusion, (field.name for field in dataclasses.fields(cfg.diffusion)), by)
        _unread("sampling", cfg.sampling, (*IMAGE_SAMPLING, "steps", "guidance"), by)
    require(
        settings.latents == 0 or model.network in ("vit_autoencoder", "seed"),
        f"tokenizer.latents={settings.latents} needs model.network='vit_autoencoder' or 'seed'; 0 is one code for each patch.",
    )
    if model.network in SEMANTIC:
        _check_semantic(cfg)
    require(
        settings.quantizer != "v2l" or settings.latents == 0,
        f"tokenizer.latents={settings.latents}: with tokenizer.quantizer='v2l' local codes stand for patches; set it to 0.",
    )
    require(
        settings.quantizer != "v2l" or model.network == "conv_autoencoder" or model.depth > 1,
        f"model.depth={model.depth}: a v2l decoder reads its words between two halves of its blocks; set it to 2 or more.",
    )
    require(
        cfg.training.accumulate == 1,
        f"training.accumulate={cfg.training.accumulate}: a codebook learns from whole batches; set it to 1.",
    )


def _check_semantic(cfg: "Config") -> None:
    model, settings, name = cfg.model, cfg.tokenizer, f"model.network={cfg.model.network!r}"
    require(
        bool(settings.encoder),
        f"{name} codes the features of a frozen encoder: set tokenizer.encoder to its folder (CLIP's, or what "
        "experiments/stand_ins/two_tower.py trains).",
    )
    require(
        cfg.sampling.solver != "few_step" and cfg.sampling.grid != "tuned",
        f"sampling.solver={cfg.sampling.solver!r}, sampling.grid={cfg.sampling.grid!r}: the pixels of {name} are drawn by "
        "another solver than few_step, on another grid than a tuned one.",
    )
    if model.network == "seed":
        require(settings.latents > 0, "model.network='seed' has tokenizer.latents codes for an image: set it, to 8 or 32.")
        require(
            settings.stage == 1 or bool(cfg.training.init),
            "tokenizer.stage=2 codes what the Q-Former of stage 1 says: set training.init to the folder of that run.",
        )
        require(
            settings.stage == 2 or (cfg.layout.markers and cfg.layout.images == "read" and cfg.training.sample_every == 0),
            "tokenizer.stage=1 reads images with their texts and draws nothing: set layout.markers=True, layout.images='read' "
            "and training.sample_every=0.",
        )


def _unread(group: str, settings: Any, names: Iterable[str], by: str) -> None:
    """Refuses fields of a group that differ from their defaults, and that nothing reads."""
    for name in names:
        value, usual = getattr(settings, name), getattr(type(settings)(), name)
        require(value == usual, f"{group}.{name}={value!r} has no meaning with {by}; change that, or leave it at {usual!r}.")


def _check_mesh(cfg: "Config") -> None:
    model, mesh = cfg.model, cfg.mesh
    if model.network != "transfusion":
        require(
            mesh.tensor in (1, -1) and mesh.fsdp in (1, -1), f"mesh: model.network={model.network!r} is split by rows only."
        )
        return
    if model.block == "gau":
        split, what = model.expansion * model.width, "the gated width model.expansion * model.width"
    else:
        split, what = model.width // model.head_width, "the number of heads model.width / model.head_width"
    for size, name, parts, of in (
        (model.width, "fsdp", mesh.fsdp, f"model.width={model.width}"),
        (split, "tensor", mesh.tensor, f"{what} = {split}"),
    ):
        require(parts == -1 or size % parts == 0, f"mesh.{name}={parts} does not divide {of}. Change one of them.")
