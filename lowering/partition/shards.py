"""``Shards``: how the positions of a call are dealt to devices, in order."""

from dataclasses import dataclass

# Keys travel in granules. A granule has at most so many keys, and at most an eighth of
# those of a shard. Padded shards are whole granules: longer by a sixteenth at most.
LARGEST_GRANULE = 128
FEWEST, PADDING = 8, 16


@dataclass(frozen=True)
class Shards:
    """Equal shards of the queries and of the keys, in order.

    If a length is no multiple of the count, the last shards are padded.

    Attributes:
      count: the number of shards.
      q_seq_len, kv_seq_len: the lengths of the whole call.
    """

    count: int
    q_seq_len: int
    kv_seq_len: int

    @property
    def granule(self) -> int:
        """The number of keys in a granule, a power of two."""
        length = self.kv_seq_len if self.ratio is None else self.q_seq_len
        size, found = -(-length // self.count), LARGEST_GRANULE
        exact = length % self.count == 0
        most = 0 if exact else size // PADDING
        while found > 1 and (found > size // FEWEST or -size % found > most):
            found //= 2
        return found

    @property
    def ratio(self) -> int | None:
        """The keys for each query, if that is an integer."""
        whole = self.kv_seq_len % self.q_seq_len == 0
        return self.kv_seq_len // self.q_seq_len if whole else None

    @property
    def q_size(self) -> int:
        """The queries of a shard, with padding."""
        size = -(-self.q_seq_len // self.count)
        return size if self.ratio is None else _rounded(size, self.granule)

    @property
    def kv_size(self) -> int:
        """The keys of a shard, with padding."""
        if self.ratio is not None:
            return self.ratio * self.q_size
        return _rounded(-(-self.kv_seq_len // self.count), self.granule)

    @property
    def granules(self) -> int:
        """The granules of keys of a shard."""
        return self.kv_size // self.granule

    @property
    def aligned(self) -> bool:
        """Whether queries and keys of a shard have the same positions."""
        return self.ratio == 1


def _rounded(size: int, granule: int) -> int:
    """``size`` rounded up to whole granules."""
    return -(-size // granule) * granule
