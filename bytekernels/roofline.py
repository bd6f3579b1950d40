"""What a call must do at least. Each room's ``roofline.py`` gives it for the room's ops, from their shapes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """The arithmetic and the compulsory traffic of one call.

    Attributes:
        flops: multiplications and additions on rows of D values; what is done once per byte or chunk is left out.
        bytes: each input read once and each output written once.
    """

    flops: int
    bytes: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, bytes_per_second: float, flops_per_second: float | None = None) -> float:
        """The roofline: the longer of the times that the traffic and the arithmetic take at these rates.

        Args:
            bytes_per_second: measured bandwidth of a copy, bytes read and written.
            flops_per_second: measured rate of the unit that does the arithmetic; None where only the traffic counts.
        """
        traffic = self.bytes / bytes_per_second
        return traffic if flops_per_second is None else max(traffic, self.flops / flops_per_second)
