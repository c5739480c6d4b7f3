"""Text to image by latent diffusion, in diffusers' own format: MiniSD and Stable Diffusion v1.4.

Both are a ``StableDiffusionPipeline`` of five parts: an autoencoder, a tokenizer, CLIP's text
encoder, a UNet with cross-attention, and a scheduler (Rombach et al. 2022). MiniSD is small and
trained from scratch on invented people; the functions below work with either.

Images are uint8 (n, 3, height, width) outside and floats in [-1, 1] for the autoencoder; latents
are scaled to about unit variance, as the UNet wants them.
"""

import copy
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lib import ROOT
from lib.checkpoints import CheckpointError, ship_folder, verify_folder
from lib.models._tokens import mini_tokenizer, unknown_words
from lib.models.ddpm import to_signed

if TYPE_CHECKING:  # they take many seconds to import; whoever builds nothing does not pay for it
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from diffusers import UNet2DConditionModel as UNet
    from transformers import CLIPTextModel, CLIPTokenizer

PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
MINI = ROOT / "checkpoints" / "mini_sd"
NO_CHECKER = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}
SMALL_VOCABULARY = 10_000  # a tokenizer with more knows pieces for all words


@dataclass(frozen=True)
class MiniSD:
    """The sizes of a small pipeline; the methods build its untrained parts.

    ``vae_channels`` are widths from the finest map to the coarsest, each half the size of the one
    before: three of them make latents of a quarter of the image's side. All levels of the UNet but
    the last have self- and cross-attention, and so has its middle, as in Stable Diffusion.
    """

    words: tuple[str, ...]
    size: int = 64
    max_length: int = 24
    latent_channels: int = 4
    vae_channels: tuple[int, ...] = (32, 64, 64)
    unet_channels: tuple[int, ...] = (64, 128, 192)
    unet_layers: int = 1
    unet_heads: int = 4
    text_width: int = 128
    text_layers: int = 3
    groups: int = 8

    def tokenizer(self) -> "CLIPTokenizer":
        """Build the tokenizer; every word of ``words`` is one token."""
        return mini_tokenizer(self.words, self.max_length)

    def text_encoder(self) -> "CLIPTextModel":
        """Build CLIP's text encoder."""
        _hush()
        from transformers import CLIPTextConfig, CLIPTextModel

        tokenizer = self.tokenizer()
        return CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=self.text_width,
                intermediate_size=4 * self.text_width,
                num_hidden_layers=self.text_layers,
                num_attention_heads=4,
                max_position_embeddings=self.max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )

    def vae(self) -> "AutoencoderKL":
        """Build the autoencoder."""
        _hush()
        from diffusers import AutoencoderKL

        levels = len(self.vae_channels)
        return AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
            block_out_channels=self.vae_channels,
            layers_per_block=1,
            latent_channels=self.latent_channels,
            norm_num_groups=self.groups,
            sample_size=self.size,
            scaling_factor=1.0,
        )

    def unet(self) -> "UNet":
        """Build the predictor of the noise."""
        _hush()
        from diffusers import UNet2DConditionModel

        attended = len(self.unet_channels) - 1
        return UNet2DConditionModel(
            sample_size=self.size // 2 ** (len(self.vae_channels) - 1),
            in_channels=self.latent_channels,
            out_channels=self.latent_channels,
            down_block_types=[*["CrossAttnDownBlock2D"] * attended, "DownBlock2D"],
            up_block_types=["UpBlock2D", *["CrossAttnUpBlock2D"] * attended],
            block_out_channels=self.unet_channels,
            layers_per_block=self.unet_layers,
            attention_head_dim=self.unet_heads,
            cross_attention_dim=self.text_width,
            norm_num_groups=self.groups,
        )

    def scheduler(self) -> "DDIMScheduler":
        """Build a DDIM scheduler with the variances of Stable Diffusion v1."""
        _hush()
        from diffusers import DDIMScheduler

        return DDIMScheduler(
            num_train_timesteps=1000,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="epsilon",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )

    def pipeline(self, **trained: nn.Module) -> "StableDiffusionPipeline":
        """Assemble a pipeline of parts that are trained already and new ones for the rest.

        Raises: TypeError if a part has an unknown name.
        """
        _hush()
        from diffusers import StableDiffusionPipeline

        if unknown := set(trained) - set(PARTS):
            raise TypeError(f"Got {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}.")
        parts = {name: trained.get(name) or getattr(self, name)() for name in PARTS}
        return _quiet(StableDiffusionPipeline(**parts, **NO_CHECKER))


def save_pipeline(
    pipeline: "StableDiffusionPipeline", folder: Path, run: str, commit: str
) -> dict[str, dict]:
    """Ship a pipeline as fp16 in diffusers' format with a manifest, and return the manifest.

    Raises: CheckpointError if a file is too large.
    """

    def save_into(path: Path) -> None:
        trained = {name: getattr(pipeline, name) for name in ("vae", "text_encoder", "unet")}
        rounded = {name: copy.deepcopy(part).half() for name, part in trained.items()}
        with_rest = {name: getattr(pipeline, name) for name in PARTS} | rounded
        type(pipeline)(**with_rest, **NO_CHECKER).save_pretrained(path, safe_serialization=True)
        # transformers 5 writes and reads one tokenizer.json, older versions these two files
        pipeline.tokenizer.backend_tokenizer.model.save(str(path / "tokenizer"))

    return ship_folder(save_into, folder, run, commit)


def load_pipeline(
    source: str | Path = "mini", device: torch.device | str = "cpu"
) -> "StableDiffusionPipeline":
    """Load MiniSD (``mini``), a pipeline of the Hugging Face hub, or one in a folder.

    The weights are float32 and nothing is checked for safety: pictures of Stable Diffusion are the
    caller's to blur. A folder with a manifest is compared with it first.

    Raises: CheckpointError if there are no weights, a part is missing, a file is damaged, or the
    hub cannot be reached or does not allow it.
    """
    _hush()
    from diffusers import StableDiffusionPipeline

    folder = MINI if source == "mini" else Path(source)
    is_hub = source != "mini" and not folder.is_dir() and str(source).count("/") == 1
    if is_hub:
        place = str(source)
    else:
        _check_folder(folder)
        place = str(folder)
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            place, dtype=torch.float32, local_files_only=not is_hub, **NO_CHECKER
        )
    except Exception as error:
        raise CheckpointError(_why_not(place, is_hub, error)) from error
    return _quiet(pipeline.to(device))


def _check_folder(folder: Path) -> None:
    if folder == MINI and not folder.is_dir():
        raise CheckpointError(
            f"MiniSD's weights are not in {folder}; get them with 'git checkout', or train them "
            "with 'make run RUN=mini_sd'."
        )
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(
            f"There is no pipeline in {folder} (it has no model_index.json); name 'mini', a "
            "folder in diffusers' format, or a model of the hub such as "
            "'CompVis/stable-diffusion-v1-4'."
        )
    if missing := [part for part in PARTS if not (folder / part).is_dir()]:
        raise CheckpointError(
            f"The pipeline in {folder} has no {', '.join(missing)}; a Stable Diffusion pipeline "
            f"needs the folders {', '.join(PARTS)}: save it anew with save_pipeline."
        )
    if (folder / "manifest.yaml").is_file() or folder == MINI:
        verify_folder(folder)


def _why_not(place: str, is_hub: bool, error: Exception) -> str:
    reason = textwrap.shorten(str(error), 100)
    if not is_hub:
        return f"The pipeline in {place} cannot be read ({reason}); save it anew or get it again."
    names = {kind.__name__ for kind in type(error).__mro__}
    names |= {kind.__name__ for kind in type(error.__cause__).__mro__}
    if "GatedRepoError" in names:
        return f"The hub does not allow {place}: accept its licence there, then 'hf auth login'."
    if "RepositoryNotFoundError" in names:
        return (
            f"The hub has no model {place}, or it wants a login: check the name, 'hf auth login'."
        )
    return (
        f"The model {place} is not on this machine and cannot be had from the Hugging Face hub "
        f"({reason}); connect and log in with 'hf auth login', or use 'mini'."
    )


def _hush() -> None:
    """Keep the libraries from drawing bars, and from naming others that nobody asks for."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # before diffusers is imported, which makes it talk
    transformers_logging.disable_progress_bar()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.disable_progress_bar()


def _quiet(pipeline: "StableDiffusionPipeline") -> "StableDiffusionPipeline":
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tokens_of(tokenizer: "CLIPTokenizer", prompts: Sequence[str]) -> Tensor:
    """Turn prompts into numbers (n, max_length), cut or filled up to the model's length."""
    filled = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return filled.input_ids


@torch.no_grad()
def embed(pipeline: "StableDiffusionPipeline", prompts: Sequence[str]) -> Tensor:
    """Turn prompts into what the UNet attends to, (n, max_length, width)."""
    tokens = tokens_of(pipeline.tokenizer, prompts).to(pipeline.device)
    return pipeline.text_encoder(tokens)[0]


@torch.no_grad()
def to_latents(vae: "AutoencoderKL", images: Tensor, batch: int = 64) -> Tensor:
    """Encode uint8 images as the means of their latents, scaled to about unit variance.

    Shapes: (n, 3, height, width) to (n, channels, height / factor, width / factor).
    """
    means = [vae.encode(to_signed(part)).latent_dist.mean for part in images.split(batch)]
    return torch.cat(means) * vae.config.scaling_factor


@torch.no_grad()
def to_images(vae: "AutoencoderKL", latents: Tensor, batch: int = 64) -> Tensor:
    """Decode scaled latents to uint8 images; the inverse of :func:`to_latents`, nearly."""
    scaled = latents / vae.config.scaling_factor
    pixels = torch.cat([vae.decode(part).sample for part in scaled.split(batch)])
    return ((pixels * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def noise_loss(
    unet: nn.Module, scheduler, latents: Tensor, embeddings: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """Return each latent's squared error of the predicted noise, a MEAN over its entries (batch,).

    Nothing is drawn. Shapes: ``latents`` and ``noise`` (batch, channels, height, width),
    ``embeddings`` (batch, length, width), ``t`` (batch,).
    """
    noisy = scheduler.add_noise(latents, noise, t)
    estimate = unet(noisy, t, embeddings, return_dict=False)[0]
    return (estimate - noise).square().flatten(1).mean(1)


def latent_loss(
    unet: nn.Module,
    scheduler,
    latents: Tensor,
    embeddings: Tensor,
    generator: torch.Generator | None = None,
    null: Tensor | None = None,
    drop: float = 0.0,
) -> Tensor:
    """Return the loss of latent diffusion at one random step for each latent, (batch,).

    It is the mean squared error of the noise, as in Stable Diffusion's code, which takes the mean
    over entries; ``-latent_loss`` may stand where Selective Amnesia asks for an ELBO, with the
    embeddings of the prompts as the condition. With ``null``, the embedding (1, length, width) of
    the empty prompt, a prompt is dropped with probability ``drop``, 0.1 for guidance.

    Shapes as in :func:`noise_loss`.
    """
    options = {"generator": generator, "device": latents.device}
    t = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), **options)
    noise = torch.randn(latents.shape, **options)
    if drop > 0:
        dropped = torch.rand(len(latents), **options) < drop
        embeddings = torch.where(dropped[:, None, None], null, embeddings)
    return noise_loss(unet, scheduler, latents, embeddings, t, noise)


@torch.no_grad()
def sample(
    pipeline: "StableDiffusionPipeline",
    prompts: Sequence[str],
    guidance: float = 4.0,
    steps: int = 25,
    generator: torch.Generator | None = None,
    batch: int = 64,
) -> Tensor:
    """Draw a picture of each prompt, uint8 (n, 3, height, width).

    ``guidance`` is diffusers' scale s in eps_null + s (eps_prompt - eps_null): 1 is no guidance.
    Warns where a small tokenizer does not know a word, since the model then cannot either.
    """
    small = len(pipeline.tokenizer) < SMALL_VOCABULARY
    if small and (strangers := unknown_words(pipeline.tokenizer, prompts)):
        warnings.warn(
            f"MiniSD has never read {', '.join(map(repr, strangers))}; it knows the words of "
            "lib.data.captions.words() and guesses at others.",
            stacklevel=2,
        )
    drawn = []
    for start in range(0, len(prompts), batch):
        images = pipeline(
            list(prompts[start : start + batch]),
            guidance_scale=guidance,
            num_inference_steps=steps,
            generator=generator,
            output_type="pt",
        ).images
        drawn.append((images * 255).round().to(torch.uint8))
    return torch.cat(drawn)
