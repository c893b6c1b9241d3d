"""The channel groups of DaViT's dual attention."""

from sadsl.terms.channel import Channel, channel


def davit_channel(*, florence: bool = False) -> Channel:
    """The channels of each head attend to each other over the whole image.

    Ding et al., DaViT: dual attention vision transformers, 2022, section 3.2. A head is
    called a channel group there. Layers of ``davit_window`` and of this take turns. No
    image sizes are needed.

    Args:
      florence: scales scores by the number of tokens, ``n ** -0.5``, as the vision
        encoder of Florence-2 does (Xiao et al., 2024), instead of by the width of a
        head.

    Example:
      >>> from sadsl import catalog
      >>> catalog.davit_channel()
      channel()
      >>> catalog.davit_channel(florence=True)
      channel('tokens')
    """
    return channel("tokens" if florence else "head_dim")
