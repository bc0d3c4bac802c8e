"""The redundancy-bypassing load: a job reads each byte once and its ranks exchange what several of them want.

What one rank alone wants, it reads itself. The rest is cut into *atoms*, runs of elements that the same ranks want;
each has an *owner* among them, which reads it once and sends every other rank the part that it wants (arXiv 2406.18820,
"redundancy-bypassing load").
"""

from ucp.train.exchange.together import MEMORY, Meeting, fill_together, meet

__all__ = ["MEMORY", "Meeting", "fill_together", "meet"]
