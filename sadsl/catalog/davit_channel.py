"""The channel groups of DaViT's dual attention."""

from sadsl.terms.channel import Channel, channel


def davit_channel(*, florence: bool = False) -> Channel:
    """Channels of a group (a head) attend to each other over the whole image.

    Ding et al., DaViT: dual attention vision transformers, 2022, section 3.2: blocks of
    ``davit_window`` and of this take turns; scores are scaled by the width of a group.
    ``florence`` scales by the number of tokens instead, as the vision encoder of
    Florence-2 does (Xiao et al., 2024). No image sizes are needed.
    """
    return channel("tokens" if florence else "head_dim")
