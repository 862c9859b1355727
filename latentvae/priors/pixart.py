"""A small diffusion transformer that reads text: diffusers' PixArt with the paper's initialisation.

PixArt-alpha (arXiv:2310.00426) is `PixArtTransformer2DModel` in diffusers: a DiT whose blocks also
attend to the states of a frozen text encoder. Layers that the official code initialises to zero
also start at zero here. So the network predicts 0 at the start of training, and the influence of
the text grows slowly.

The encoding of "" means "no caption", as in diffusers' pipelines.

`d` latent channels, `C` channels of the text encoder's states.
"""

from collections.abc import Sequence
from typing import Any

from diffusers import PixArtTransformer2DModel
from torch import nn

from latentvae.errors import UserError
from latentvae.priors.text import encode_prompts, load_text_encoder
from latentvae.priors.transformer import Text


def build_pixart(
    *,
    channels: int,
    side: int,
    text_channels: int,
    width: int = 256,
    depth: int = 6,
    head_dim: int = 32,
    patch_size: int = 1,
) -> PixArtTransformer2DModel:
    """Return a new PixArt network.

    Args:
        channels: latent channels d.
        side: height and width of the latent, in positions.
        text_channels: channels C of the text encoder's states.
        width: channels of a block, a multiple of `head_dim`.
        depth: number of blocks.
        head_dim: channels of an attention head.
        patch_size: side of the patches of latent positions that become one token.
    """
    net = PixArtTransformer2DModel(
        num_attention_heads=width // head_dim,
        attention_head_dim=head_dim,
        in_channels=channels,
        out_channels=channels,
        num_layers=depth,
        cross_attention_dim=width,
        sample_size=side,
        patch_size=patch_size,
        norm_type="ada_norm_single",
        use_additional_conditions=False,
        caption_channels=text_channels,
    )

    _initialise(net)
    return net


def _initialise(net: Any) -> None:
    """Initialise as PixArt's official code does.

    Most linear layers get Xavier weights. The output layers of cross-attention and the network's
    output layer get zeros.
    """
    for part in net.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)

    # patches
    patches = net.pos_embed.proj
    nn.init.xavier_uniform_(patches.weight.view(len(patches.weight), -1))

    # noise level, modulation and text
    time, text = net.adaln_single.emb.timestep_embedder, net.caption_projection
    smalls = (time.linear_1, time.linear_2, net.adaln_single.linear, text.linear_1, text.linear_2)
    for linear in smalls:
        nn.init.normal_(linear.weight, std=0.02)

    # what starts at zero
    for linear in [block.attn2.to_out[0] for block in net.transformer_blocks] + [net.proj_out]:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


def load_caption_encoder(path: str) -> tuple[Any, Any]:
    """Return the tokenizer and the frozen text encoder in a folder or a Hub repository.

    Raises:
        UserError: `load_text_encoder` fails, or the encoder has no token for an empty text.
    """
    tokenizer, encoder = load_text_encoder(path)
    if not encode_captions(["", "a"], tokenizer, encoder).mask[0].any():
        raise UserError(
            f"text_encoder '{path}' has no token for an empty text, but training uses the encoding "
            "of an empty text as 'no caption'. Give an encoder whose tokenizer ends each text with "
            "a token, as T5's tokenizer does."
        )
    return tokenizer, encoder


def encode_captions(captions: Sequence[str], tokenizer: Any, encoder: Any) -> Text:
    """Strip captions, convert them to lower case, and return their states with a mask.

    diffusers' PixArt pipelines prepare prompts in the same way, with `clean_caption=False`.
    """
    return encode_prompts([text.lower().strip() for text in captions], tokenizer, encoder)
