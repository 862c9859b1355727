"""A small diffusion transformer for flow matching: diffusers' DiT, with the paper's initialisation.

DiT (Peebles & Xie 2022, arXiv:2212.09748) is `DiTTransformer2DModel` in diffusers. The networks of
this module differ in three ways from the networks that diffusers builds:

- Layers that the paper initialises to zero are also zero at the start of training here. So an
  untrained network predicts 0.
- diffusers drops labels at random, separately in each block. In this module, the caller of the
  network drops a label for all blocks at once: label number `num_classes` means "no class".
- `DiTPipeline` always uses label 1000 for "no class". So an export has 1,000 classes, and the
  classes after the model's last class are copies of "no class".

`velocity` and `sample_latents` also take the network of the module `pixart`, which reads text.

`B` batch, `d` latent channels, `h w` latent positions.
"""

from typing import Any, cast

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from torch import Tensor, nn

from latentvae.priors.flow_matching import FlowSampling, integrate, noise_of
from latentvae.priors.text import join_texts, repeat_text
from latentvae.priors.transformer import NO_CLASS, Text

Condition = Tensor | Text  # classes (B,) of a DiT, or the texts of a PixArt network
PIPELINE_CLASSES = 1000  # number of classes that diffusers' `DiTPipeline` assumes
TIME_SCALE = 1000  # sigma 1 is timestep 1000, as in diffusers' schedulers


def build_dit(
    *,
    channels: int,
    side: int,
    num_classes: int,
    width: int = 256,
    depth: int = 6,
    head_dim: int = 32,
    patch_size: int = 1,
) -> DiTTransformer2DModel:
    """Return a new DiT.

    Args:
        channels: latent channels d.
        side: height and width of the latent, in positions.
        num_classes: number of classes, 0 for a model without classes.
        width: channels of a block, a multiple of `head_dim`.
        depth: number of blocks.
        head_dim: channels of an attention head.
        patch_size: side of the patches of latent positions that become one token.
    """
    net = DiTTransformer2DModel(
        num_attention_heads=width // head_dim,
        attention_head_dim=head_dim,
        in_channels=channels,
        out_channels=channels,
        num_layers=depth,
        sample_size=side,
        patch_size=patch_size,
        num_embeds_ada_norm=num_classes,
    )

    _initialise(net)
    return callers_drop_labels(net)


def callers_drop_labels(net: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Switch off the dropping of labels inside the blocks, and return the same network."""
    for block in cast("Any", net.transformer_blocks):
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return net


def _initialise(net: DiTTransformer2DModel) -> None:
    """Initialise as DiT's official code does: Xavier, but zero for modulation and output layers."""
    for part in net.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)

    patches = cast("nn.Conv2d", net.pos_embed.proj)
    nn.init.xavier_uniform_(patches.weight.view(len(patches.weight), -1))
    assert patches.bias is not None
    nn.init.zeros_(patches.bias)

    blocks: Any = net.transformer_blocks
    for block in blocks:
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
        for linear in (block.norm1.emb.timestep_embedder.linear_1, _second(block)):
            nn.init.normal_(linear.weight, std=0.02)
    zeros = [block.norm1.linear for block in blocks] + [net.proj_out_1, net.proj_out_2]
    for linear in zeros:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


def _second(block: Any) -> nn.Linear:
    return block.norm1.emb.timestep_embedder.linear_2


def num_classes_of(net: DiTTransformer2DModel) -> int:
    """Return the number of labels of a network, not counting "no class"."""
    return int(cast("Any", net.config).num_embeds_ada_norm)


def velocity(net: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    """Return the predicted velocity (B, d, h, w).

    Args:
        net: the DiT, or for texts the PixArt network.
        x: noised latents, (B, d, h, w).
        sigma: noise levels in [0, 1], (B,).
        condition: classes (B,), int64, where `NO_CLASS` means "no class". A PixArt network gets
            encoded texts instead of classes, where the encoding of "" means "no text".
    """
    time = sigma * TIME_SCALE
    if isinstance(condition, Text):
        return net(
            x,
            encoder_hidden_states=condition.states,
            timestep=time,
            encoder_attention_mask=condition.mask,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
    none = cast("Any", net).config.num_embeds_ada_norm
    labels = torch.where(condition == NO_CLASS, none, condition)
    return net(x, timestep=time, class_labels=labels).sample


@torch.no_grad()
def sample_latents(
    net: DiTTransformer2DModel | PixArtTransformer2DModel,
    condition: Condition,
    *,
    unconditional: Text | None = None,
    options: FlowSampling | None = None,
    shift: float,
    seed: int = 0,
    numbers: range | None = None,
) -> Tensor:
    """Draw normalised latents (B, d, h, w) on the network's device.

    Args:
        net: the DiT or PixArt network, in eval mode.
        condition: either the class of each image, (B,), where `NO_CLASS` means "no class", or the
            encoded text of each image.
        unconditional: the encoding of "" (one row), which guidance with texts needs.
        options: solver, steps and guidance.
        shift: shift of the noise levels, see `flow_matching.shifted`.
        seed: seed of the noise.
        numbers: a number for each image, by default 0 to B - 1. The noise of an image depends only
            on the seed and on its number.
    """
    options, config = options or FlowSampling(), cast("Any", net.config)
    shape = (config.in_channels, config.sample_size, config.sample_size)
    condition = condition.to(net.device)
    numbers = range(len(condition)) if numbers is None else numbers
    noise = noise_of(shape, seed=seed, numbers=numbers).to(net.device)
    guides = options.guidance != 1
    both = _with_unconditional(condition, unconditional) if guides else condition

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        if not guides:
            return velocity(net, x, sigma, condition)
        found = velocity(net, x.repeat(2, 1, 1, 1), sigma.repeat(2), both)
        conditional, without = found.chunk(2)
        return without + options.guidance * (conditional - without)

    return integrate(guided, noise, options=options, shift=shift)


def _with_unconditional(condition: Condition, unconditional: Text | None) -> Condition:
    """Return 2 B conditions for guidance: those of B images, then B times "no condition"."""
    if not isinstance(condition, Text):
        return torch.cat([condition, torch.full_like(condition, NO_CLASS)])
    if unconditional is None:
        raise ValueError("guidance with texts needs the encoding of an empty text")
    empty = repeat_text(unconditional.to(condition.states.device), len(condition))
    return join_texts([condition, empty])


def for_pipeline(net: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Return a copy of the network with 1,000 classes, so that `DiTPipeline` can use guidance.

    In the copy, all classes after the network's last class mean "no class".

    Raises:
        ValueError: the network has more than 1,000 classes.
    """
    missing = PIPELINE_CLASSES - num_classes_of(net)
    if missing < 0:
        raise ValueError(f"DiTPipeline has at most 1,000 classes (got {num_classes_of(net)})")
    config = {**net.config, "num_embeds_ada_norm": PIPELINE_CLASSES}
    copy: Any = DiTTransformer2DModel.from_config(config)

    weights = dict(net.state_dict())
    for name, value in weights.items():
        if name.endswith("class_embedder.embedding_table.weight"):
            weights[name] = torch.cat([value, value[-1:].expand(missing, -1)])
    copy.load_state_dict(weights)
    return copy.to(net.device).eval()
