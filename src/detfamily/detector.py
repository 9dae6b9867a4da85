"""The detector: one order of blocks for every family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from detfamily.auxiliary.collaboration import Collaboration
from detfamily.auxiliary.head import AuxiliaryHead
from detfamily.blocks.decoder import Decoder
from detfamily.blocks.denoising import Denoising
from detfamily.blocks.heads import Heads
from detfamily.blocks.queries import QuerySource
from detfamily.blocks.tokens import flatten, flatten_maps, resize_mask
from detfamily.structures import Given, Images, Predictions, Targets, Tokens


class Detector(nn.Module):
    """Pixels -> backbone -> neck -> encoder -> queries -> (denoising) -> decoder -> heads; auxiliary heads in training.

    Args:
        normalize: from uint8 pixels to the backbone's input.
        backbone: (B, 3, H, W) -> maps, finest first; its ``channels`` lists theirs.
        neck: factory called with ``in_channels``; maps -> levels of one width.
        position: code of position of the levels.
        level_embed: what tells one level's positions from another's, or an identity.
        encoder_position: how positions enter the encoder.
        encoder: tokens -> tokens.
        memory_position: how positions enter what the decoder reads.
        query_source: memory -> queries, and what proposals say.
        patterns: queries -> queries, several at each place.
        denoising: factory of what adds noised copies of the targets to the queries, in training; None for no copies.
        decoder: the decoder loop.
        heads: class and box heads of the decoder layers.
        auxiliary: heads that read the encoder's output, too, in training (Co-DETR): what ``collaboration`` takes; or
            None.
        collaboration: factory of what makes use of them.

    Raises:
        ValueError: blocks that contradict each other.
    """

    def __init__(
        self,
        normalize: nn.Module,
        backbone: nn.Module,
        neck: Callable[..., nn.Module],
        position: nn.Module,
        level_embed: nn.Module,
        encoder_position: nn.Module,
        encoder: nn.Module,
        memory_position: nn.Module,
        query_source: QuerySource,
        patterns: nn.Module,
        denoising: Callable[..., Denoising] | None,
        decoder: Decoder,
        heads: Heads,
        auxiliary: Callable[..., AuxiliaryHead] | Sequence[Callable[..., AuxiliaryHead]] | None = None,
        collaboration: Callable[..., Collaboration] | None = None,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.backbone = backbone
        self.neck = neck(in_channels=list(cast("Sequence[int]", backbone.channels)))
        self.position = position
        self.level_embed = level_embed
        self.encoder_position = encoder_position
        self.encoder = encoder
        self.memory_position = memory_position
        if not decoder.query_position.reads_pos:
            query_source.drop_unread_positions()
        self.query_source = query_source
        self.patterns = patterns
        self.denoising = None
        if denoising is not None:
            self.denoising = denoising(
                fills_content=not query_source.has_content,
                needs_pos=query_source.has_pos and decoder.query_position.reads_pos,
                reference_dim=query_source.reference_dim,
            )
        self.decoder = decoder
        self.heads = heads
        self.auxiliary = None
        if auxiliary is not None and collaboration is not None:
            self.auxiliary = collaboration(
                heads=auxiliary,
                strides=list(cast("Sequence[int]", backbone.strides)),
                needs_pos=decoder.query_position.reads_pos,
                reference_dim=query_source.reference_dim,
            )

    def forward(self, images: Images, targets: Targets | None = None) -> dict[str, Predictions]:
        """What each group of queries says.

        Args:
            images: a batch; uint8 pixels are normalised here, float pixels are taken as normalised.
            targets: its objects, for denoising and auxiliary heads in training; nothing else reads them.

        Returns:
            "match": all decoder layers, (D, B, N, ...); with two stages also "proposals": tokens, (1, B, S or N, ...);
            in training, with one-to-many queries also "one_to_many", (D, B, N', ...), and with denoising "denoise": the
            noised copies, (D, B, G * T, ...), and with auxiliary heads "auxiliary.NAME" of each: its positives,
            (D, B, M, ...), and its own losses.

        Raises:
            ValueError: denoising or auxiliary heads in training without targets.
        """
        memory = self.encode(images)
        queries, proposals = self.query_source(memory, self.heads)
        queries = self.patterns(queries)
        given: dict[str, Given | None] = {}
        if self.denoising is not None:
            if self.training and targets is None:
                raise ValueError(
                    "denoising needs the targets in training: detector(images, targets), or detector.eval()"
                )
            queries, given["denoise"] = self.denoising(queries, targets if self.training else None)
        hidden, references = self.decoder(queries, memory, self.heads)
        everything = self.heads(hidden, references)
        predictions = {
            name: Predictions(everything.logits[:, :, one], everything.boxes[:, :, one], given.get(name))
            for name, one in queries.groups.items()
        }
        if proposals is not None:
            predictions["proposals"] = proposals
        if self.auxiliary is not None and self.training:
            if targets is None:
                raise ValueError(
                    "auxiliary heads need the targets in training: detector(images, targets), or detector.eval()"
                )
            predictions |= self.auxiliary(memory, images, targets, self.decoder, self.heads)
        return predictions

    def encode(self, images: Images) -> Tokens:
        """The memory that the decoder reads."""
        padded = images.padded
        pixels: Tensor = self.normalize(images.pixels, images.padding_mask if padded else None)
        # Channels last: convolutions keep it, run faster in it on CPUs and tensor cores, and tokens are then views.
        maps = self.neck(self.backbone(pixels.contiguous(memory_format=torch.channels_last)))
        masks = [resize_mask(images.padding_mask, one.shape[-2:]) for one in maps]
        tokens = flatten_maps(maps, masks, padded)
        pos: Tensor = flatten(self.level_embed(self.position(masks))).to(tokens.content.dtype)
        memory = self.encoder(self.encoder_position(tokens, pos))
        output: Tokens = self.memory_position(memory, pos)
        return output
