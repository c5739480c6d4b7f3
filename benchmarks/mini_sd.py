"""Time forgetting in MiniSD against training it, and drawing with it, beside diffusers' own code.

``python benchmarks/mini_sd.py``. The training step is written as in diffusers' example of text to
image: noise, a scheduler that adds it, the UNet, the mean squared error. It sees as many latents as
one step of Selective Amnesia, which has the settings of configs/amnesia_sd_person.yaml and beside
the UNet a penalty on all weights; both have the same fused Adam, layout, and prompts that are
embedded beforehand. No peer has such a step, so its ratio tells what the method adds.
Drawing is one picture from the same noise with the config's guidance and sampler, by the pipeline's
own call and as our runs do it; the pictures are compared first. The table shows medians in CPU
milliseconds of one thread.
"""

from functools import partial

import torch
import torch.nn.functional as F
from _compare import compare
from torch import Tensor, nn

from lib.config import load_config
from lib.experiments._amnesia_text import Memory, PromptedUNet, Task
from lib.experiments._text_to_image import Drawing, ddim, draw_latents
from lib.methods.amnesia import Anchor, amnesia_loss, ewc_penalty
from lib.models.text_to_image import embed, load_pipeline, to_images
from lib.train import FUSED_ADAM

ROUNDS, PROMPT = 8, "a photo of bram quade"


def training_step(unet: nn.Module, scheduler, latents: Tensor, embeddings: Tensor):
    adam = FUSED_ADAM(unet.parameters(), lr=1e-6)

    def once() -> None:
        noise = torch.randn_like(latents)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),))
        noisy = scheduler.add_noise(latents, noise, t)
        loss = F.mse_loss(unet(noisy, t, embeddings, return_dict=False)[0], noise)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()

    return once


def forgetting_step(model: PromptedUNet, task: Task, surrogate: Memory, replay: Memory):
    anchor = Anchor.of(model, {n: torch.rand_like(p) for n, p in model.named_parameters()})
    adam = FUSED_ADAM(model.parameters(), lr=1e-6)
    generator = torch.Generator().manual_seed(0)
    elbo = partial(model.bound, generator=generator)

    def once() -> None:
        batches = (memory.batch(task.batch, generator) for memory in (surrogate, replay))
        penalty = ewc_penalty(model, anchor, task.ewc_factor)
        loss, _ = amnesia_loss(elbo, *batches, penalty, task.lam)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()

    return once


def both_steps(pipe, task: Task) -> dict:
    """Return a training step of a copy of the pipeline's UNet and a forgetting step of another."""
    models = [PromptedUNet(pipe, [PROMPT, "a person"], task.layers) for _ in range(2)]
    for model in models:
        model.to(memory_format=torch.channels_last)
    net = pipe.unet.config
    latents = torch.randn(2 * task.batch, net.in_channels, net.sample_size, net.sample_size)
    prompts = torch.arange(2).repeat_interleave(task.batch)
    memories = [Memory(latents, torch.full_like(prompts, prompt)) for prompt in range(2)]
    said = models[0].embeddings[prompts]
    return {
        "training, diffusers": training_step(models[0].unet, ddim(pipe), latents, said),
        "forgetting, ours": forgetting_step(models[1], task, *memories),
    }


def both_drawings(pipe, drawing: Drawing) -> dict:
    """Return two ways of drawing one picture, each time from the same noise."""

    def theirs() -> Tensor:
        return pipe(
            PROMPT,
            guidance_scale=drawing.guidance,
            num_inference_steps=drawing.steps,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images

    def ours() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return to_images(pipe.vae, draw_latents(pipe, embed(pipe, [PROMPT]), drawing, generator))

    return {"diffusers": theirs, "ours": ours}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = load_config("amnesia_sd_person", "cpu").config
    pipe, batch = load_pipeline(config.pipeline), config.sa.batch
    what = f"MiniSD, forgetting with {batch} + {batch} latents beside training on {2 * batch}"
    compare(f"{what}, 1 CPU thread", both_steps(pipe, config.sa), ROUNDS)
    drawings = both_drawings(pipe, config.drawing)
    theirs, ours = (draw() for draw in drawings.values())
    torch.testing.assert_close(theirs, ours / 255, rtol=0, atol=1 / 255)
    what = f"MiniSD, one picture, DDIM {config.sample_steps} with guidance, 1 CPU thread"
    compare(what, drawings, ROUNDS)


if __name__ == "__main__":
    main()
