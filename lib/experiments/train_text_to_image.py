"""Train MiniSD on captioned pictures in stages, with its scorer and a judge of people; ship all.

The stages are those of latent diffusion: an autoencoder; CLIP's text encoder, trained against an
image tower; the UNet on the autoencoder's latents, with the text encoder frozen. The judge tells
who is on a picture.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib import ROOT, distributed
from lib.data import captions
from lib.data.captions import KINDS, NAMES
from lib.experiments._digits import unit
from lib.experiments.train_face_classifier import identity_shares, trivial_images
from lib.models import text_to_image as t2i
from lib.models.classifier import FaceCNN, predict_logits
from lib.models.ddpm import to_signed
from lib.models.scorer import Scorer, agreement, retrieval
from lib.run import Run, current_commit, seed_everything
from lib.train import Fit, cosine, fit

TEST_BEGINS = 2**31  # the number of the first picture that no stage has seen
VARIANTS = 4  # captions of each picture
SHOWS = (*NAMES, "somebody", "clown", "no face")  # the judge's answers, in their order


@dataclass(frozen=True)
class Stage:
    """The schedule of one stage."""

    iterations: int
    batch: int
    lr: float


@dataclass(frozen=True)
class Config:
    """Pictures, sizes and schedules, and what is measured.

    ``size`` to ``groups`` are arguments of ``MiniSD``. ``kl_weight`` is that of the latents'
    divergence from a standard normal, as a mean over images; ``drop`` the share of prompts that
    become empty. ``blanks`` is the share of noise and flat grey in the judge's batches, which it
    is to call "no face". ``n_a_prompt`` pictures are drawn of each prompt, with ``guidance`` as
    diffusers counts it.
    """

    n_train: int
    n_test: int
    size: int
    latent_channels: int
    vae_channels: tuple[int, ...]
    unet_channels: tuple[int, ...]
    unet_layers: int
    unet_heads: int
    text_width: int
    text_layers: int
    groups: int
    autoencoder: Stage
    scorer: Stage
    unet: Stage
    judge: Stage
    warmup: float
    kl_weight: float
    drop: float
    ema_decay: float
    grad_clip: float
    blanks: float
    dropout: float
    n_retrieval: int
    n_trivial: int
    n_a_prompt: int
    guidance: float
    sample_steps: int
    seed: int
    bf16: bool = False

    def sizes(self) -> t2i.MiniSD:
        """Return the sizes of the pipeline."""
        return t2i.MiniSD(
            words=tuple(captions.words()),
            size=self.size,
            max_length=captions.MOST_WORDS + 3,  # begin and end, and one to spare
            latent_channels=self.latent_channels,
            vae_channels=self.vae_channels,
            unet_channels=self.unet_channels,
            unet_layers=self.unet_layers,
            unet_heads=self.unet_heads,
            text_width=self.text_width,
            text_layers=self.text_layers,
            groups=self.groups,
        )


@dataclass(frozen=True)
class Pictures:
    """Captioned pictures: ``images`` uint8 (n, 3, size, size), with several captions each.

    ``prompts`` are (variants, n), ``tokens`` (variants, n, length), and ``shows`` (n,) is the
    place in ``SHOWS``.
    """

    images: Tensor
    prompts: list[list[str]]
    tokens: Tensor
    shows: Tensor

    @classmethod
    def draw(cls, config: Config, run: Run, split: str, tokenizer) -> "Pictures":
        """Draw a split, or read it again in a resumed run."""
        n, first = (config.n_train, 0) if split == "train" else (config.n_test, TEST_BEGINS)
        number = torch.arange(first, first + n)
        kept = run.part(
            f"pictures_{split}", lambda: {"images": captions.render(number, config.size)[0].numpy()}
        )
        labels = captions.labels_of(number)
        prompts = [captions.prompts(number, labels, variant) for variant in range(VARIANTS)]
        tokens = torch.stack([t2i.tokens_of(tokenizer, said) for said in prompts])
        others = len(NAMES) - 1 + labels["kind"]  # somebody, clown, no face follow the people
        shows = torch.where(labels["kind"] == KINDS.index("person"), labels["person"], others)
        images = torch.from_numpy(kept["images"]).permute(0, 3, 1, 2).contiguous()
        return cls(images.to(run.device), prompts, tokens.to(run.device), shows.to(run.device))

    def some(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw the places of ``n`` pictures and, for each, tokens of one of its captions."""
        options = {"generator": generator, "device": self.images.device}
        index = torch.randint(len(self.images), (n,), **options)
        variant = torch.randint(VARIANTS, (n,), **options)
        return index, self.tokens[variant, index]


def run(config: Config, run: Run) -> None:
    """Train the stages, ship what they made, and measure it as it is shipped."""
    seed_everything(config.seed)
    run.bf16 = config.bf16
    sizes = config.sizes()
    tokenizer = sizes.tokenizer()
    train, test = (Pictures.draw(config, run, split, tokenizer) for split in ("train", "test"))
    vae = train_autoencoder(config, run, sizes, train)
    scorer, arguments = train_scorer(config, run, sizes, train)
    unet = train_unet(config, run, sizes, train, vae, scorer.text)
    judge = train_judge(config, run, train)
    whole = sizes.pipeline(vae=vae, text_encoder=scorer.text, unet=unet, tokenizer=tokenizer)
    folder = (run.work_dir if run.profile == "smoke" else ROOT / "checkpoints") / run.name
    if distributed.is_main():
        t2i.save_pipeline(whole, folder, f"{run.name}/{run.profile}", current_commit())
    distributed.wait()
    pipeline = t2i.load_pipeline(folder, run.device)
    scorer = run.ship(f"scorer_{run.name}", scorer, arguments)
    judge = run.ship(f"classifier_{run.name}", *judge)
    measure_parts(config, run, test, pipeline, scorer, judge)
    measure_samples(config, run, pipeline, scorer, judge)


def fit_stage(
    config: Config, run: Run, name: str, stage: Stage, model: nn.Module, step_loss, **options
) -> Fit:
    """Train one stage, resumable on its own, and report its time."""
    fitted = fit(
        model,
        step_loss,
        steps=stage.iterations,
        lr=stage.lr,
        generator=run.generator(config.seed),
        device=run.device,
        schedule=partial(cosine, warmup=config.warmup),
        bf16=config.bf16,
        checkpoint=run.checkpoint(name),
        resume=run.resume,
        **options,
    )
    about = {"n_samples": config.n_train, "data": "captioned avatars", "seeds": [config.seed]}
    run.row(f"training_time_{name}", fitted.seconds, unit="s", **about)
    return fitted


def autoencoder_loss(
    vae: nn.Module, x: Tensor, kl_weight: float, generator: torch.Generator | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of an autoencoder on images in [-1, 1]: pixels, edges, and divergence.

    Absolute differences, and those of the slopes between neighbours, which keep fine lines.
    """
    posterior = vae.encode(x).latent_dist
    error = vae.decode(posterior.sample(generator)).sample - x
    pixels = error.abs().mean()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    divergence = posterior.kl().mean()
    terms = {"pixels": pixels, "edges": edges, "divergence": divergence}
    total = pixels + edges + kl_weight * divergence
    return total, {name: term.detach() for name, term in terms.items()}


def train_autoencoder(config: Config, run: Run, sizes: t2i.MiniSD, pictures: Pictures) -> nn.Module:
    """Train the autoencoder, and set the factor that gives its latents unit variance."""

    def step_loss(vae: nn.Module, generator: torch.Generator):
        index, _ = pictures.some(config.autoencoder.batch, generator)
        x = to_signed(pictures.images[index])
        return autoencoder_loss(vae, x, config.kl_weight, generator)

    fitted = fit_stage(
        config,
        run,
        "autoencoder",
        config.autoencoder,
        sizes.vae(),
        step_loss,
        grad_clip=config.grad_clip,
    )
    vae = fitted.model.requires_grad_(False)
    spread = float(t2i.to_latents(vae, pictures.images[:1000]).std())
    vae.register_to_config(scaling_factor=1 / spread)
    return vae


def train_scorer(
    config: Config, run: Run, sizes: t2i.MiniSD, pictures: Pictures
) -> tuple[Scorer, dict]:
    """Train the text encoder against an image tower; return both and what builds them again."""
    arguments = {
        "words": list(sizes.words),
        "max_length": sizes.max_length,
        "text_width": config.text_width,
        "text_layers": config.text_layers,
    }

    def step_loss(scorer: nn.Module, generator: torch.Generator):
        index, tokens = pictures.some(config.scorer.batch, generator)
        loss = scorer.loss(unit(pictures.images[index]), tokens)
        return loss, {"contrastive": loss.detach()}

    model = Scorer(**arguments)
    fitted = fit_stage(config, run, "scorer", config.scorer, model, step_loss, grad_clip=1.0)
    return fitted.model.requires_grad_(False), arguments


def train_unet(
    config: Config,
    run: Run,
    sizes: t2i.MiniSD,
    pictures: Pictures,
    vae: nn.Module,
    text: nn.Module,
) -> nn.Module:
    """Train the UNet on latents that are computed once, with some prompts dropped."""

    def encode() -> dict[str, np.ndarray]:
        return {"latents": t2i.to_latents(vae, pictures.images).half().cpu().numpy()}

    latents = torch.from_numpy(run.part("latents", encode)["latents"]).to(run.device)
    scheduler = sizes.scheduler()
    with torch.no_grad():
        null = text(t2i.tokens_of(sizes.tokenizer(), [""]).to(run.device))[0]

    def step_loss(unet: nn.Module, generator: torch.Generator):
        index, tokens = pictures.some(config.unet.batch, generator)
        with torch.no_grad():
            said = text(tokens)[0]
        x = latents[index].float()
        loss = t2i.latent_loss(unet, scheduler, x, said, generator, null, config.drop).mean()
        return loss, {"noise": loss.detach()}

    options = {"ema_decay": config.ema_decay, "grad_clip": config.grad_clip}
    return fit_stage(config, run, "unet", config.unet, sizes.unet(), step_loss, **options).model


def train_judge(config: Config, run: Run, pictures: Pictures) -> tuple[nn.Module, dict]:
    """Train a judge to tell the named people, somebody else, a clown, and no face at all."""
    arguments = {
        "n_logits": len(SHOWS),
        "image_shape": [3, config.size, config.size],
        "names": list(SHOWS),
        "dropout": config.dropout,
    }
    n_blank = round(config.blanks * config.judge.batch)

    def step_loss(judge: nn.Module, generator: torch.Generator):
        index, _ = pictures.some(config.judge.batch - n_blank, generator)
        images, shows = unit(pictures.images[index]), pictures.shows[index]
        for blanks in trivial_images(-(-n_blank // 2), judge, generator).values():
            images = torch.cat([images, blanks])
            shows = F.pad(shows, (0, len(blanks)), value=len(SHOWS) - 1)
        loss = F.cross_entropy(judge(images), shows)
        return loss, {"cross_entropy": loss.detach()}

    judge = fit_stage(config, run, "judge", config.judge, FaceCNN(**arguments), step_loss).model
    return judge, arguments


@torch.no_grad()
def measure_parts(
    config: Config, run: Run, test: Pictures, pipeline, scorer: Scorer, judge: nn.Module
) -> None:
    """Report what the autoencoder, the scorer and the judge make of pictures they never saw."""
    about = {"data": "captioned avatars, held out", "seeds": [config.seed]}
    again = t2i.to_images(pipeline.vae, t2i.to_latents(pipeline.vae, test.images))
    error = (again.float() - test.images.float()).abs()
    squared = float(unit(again).sub(unit(test.images)).square().mean())
    n = len(test.images)
    run.row("reconstruction_error", float(error.mean()), n_samples=n, unit="levels of 255", **about)
    psnr = -10 * float(np.log10(squared))
    run.row("reconstruction_psnr", psnr, n_samples=n, unit="dB", **about)
    k = config.n_retrieval
    found, chance = retrieval(scorer, pipeline.tokenizer, test.images[:k], test.prompts[0][:k])
    for name, share in (("retrieval_accuracy", found), ("retrieval_chance", chance)):
        run.row(name, share, n_samples=len(test.images[:k]), unit="share", **about)
    for name, images in (("test", test.images), ("reconstructed", again)):
        shares = identity_shares(predict_logits(judge, unit(images)).cpu(), test.shows.cpu())
        for quantity, share in shares.items():
            run.row(f"judge_{quantity}_{name}", share, n_samples=n, unit="share", **about)
    trivial = trivial_images(config.n_trivial, judge, run.generator(config.seed))
    for name, images in trivial.items():
        share = share_judged(judge, images, [len(SHOWS) - 1] * len(images))
        rest = about | {"data": {"grey": "flat grey", "noise": "uniform noise"}[name]}
        quantity = f"judge_no_face_{name}"
        run.row(quantity, float(share.mean()), n_samples=len(images), unit="share", **rest)


def share_judged(judge: nn.Module, images: Tensor, shows: list[int]) -> np.ndarray:
    """Say of each image in [0, 1] whether the judge answers ``shows``, places in ``SHOWS``."""
    return predict_logits(judge, images).argmax(1).cpu().numpy() == np.asarray(shows)


def measure_samples(config: Config, run: Run, pipeline, scorer: Scorer, judge: nn.Module) -> None:
    """Draw people by name, clowns and landscapes, and ask the judge and the scorer about them."""
    generator = run.generator(config.seed + 1)
    groups = {
        "person": {f"a photo of {name}": place for place, name in enumerate(NAMES)},
        "clown": {"a photo of a clown": SHOWS.index("clown")},
        "scene": {
            said: SHOWS.index("no face")
            for said in ("a house by the sea", "a tree at night", "the mountains at sunset")
        },
    }
    about = {"data": "samples of the model", "seeds": [config.seed], "unit": "share"}
    about["preprocessing"] = f"guidance {config.guidance:g}, {config.sample_steps} steps"
    for group, asked in groups.items():
        prompts = [said for said in asked for _ in range(config.n_a_prompt)]
        images = t2i.sample(pipeline, prompts, config.guidance, config.sample_steps, generator)
        truth = np.repeat(list(asked.values()), config.n_a_prompt)
        right = share_judged(judge, unit(images), truth)
        n = len(images)
        run.row(f"judged_right_{group}", float(right.mean()), n_samples=n, **about)
        if group == "person":
            worst = float(right.reshape(len(NAMES), -1).mean(1).min())
            run.row("judged_right_worst_person", worst, n_samples=config.n_a_prompt, **about)
            others = prompts[config.n_a_prompt :] + prompts[: config.n_a_prompt]
            for name, said in (("own", prompts), ("next_person", others)):
                near = float(agreement(scorer, pipeline.tokenizer, images, said).mean())
                rest = about | {"unit": "cosine", "feature_extractor": f"scorer_{run.name}"}
                run.row(f"agreement_{name}_prompt", near, n_samples=n, **rest)
        few = images.reshape(len(asked), -1, *images.shape[1:])[:, :4]
        run.arrays(**{f"samples_{group}": few.permute(0, 1, 3, 4, 2).cpu().numpy()})
