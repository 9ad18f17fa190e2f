"""The namespace ``torch.ops.dqrm``, through which autograd and torch.compile see the kernels.

Kernels register with ``LIBRARY.define`` and ``LIBRARY.impl``, which cost a few microseconds a
call; ``torch.library.custom_op`` costs ten times that.
"""

from torch.library import Library

LIBRARY = Library("dqrm", "DEF")
