"""The pair of caches of an encoder-decoder model."""

from transformers import EncoderDecoderCache, PreTrainedConfig

from .paged_cache import PagedCache


def paged_encoder_decoder_cache(
    config: PreTrainedConfig, *, batch_size: int, repeats: int = 1
) -> EncoderDecoderCache:
    """Two PagedCaches that know of each other, for a decoder of `config`.

    The encoder's padding is not stored. Where `batch_size * repeats` rows come, each `repeats` of them (beams,
    returned sequences) are alike, and the encoder's keys are stored once for them.
    """
    own, cross = PagedCache(config), PagedCache(config)
    own.groups.cross = cross.groups
    cross.groups.is_cross = True
    for group in cross.groups:
        group.window = None  # the config's windows are the decoder's own, every token sees the whole encoder
    cross.groups.repeats = (batch_size * repeats, repeats)
    return EncoderDecoderCache(own, cross)
