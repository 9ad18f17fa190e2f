"""Numbers and tables as commands print them."""

from dqrm.text import bytes_text, pairs, seconds_text, table

__all__ = ["bytes_text", "pairs", "seconds_text", "table"]
